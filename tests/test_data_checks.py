"""What is found in the text of rows, and above all what is not."""

# ruff: noqa: RUF001 -- text in other scripts is what is tested here

from __future__ import annotations

import base64
import json
import pickle
import random
import re
import string
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ftplan.launcher.data import languages, odd_text, private_text, similar_rows
from ftplan.launcher.data.checks import TextChecks
from ftplan.launcher.data.findings import KINDS, Finding
from ftplan.launcher.data.fingerprints import groups, hash_array
from ftplan.launcher.data.languages import language
from ftplan.launcher.data.leaks import LeakCheck
from ftplan.launcher.data.row_checks import Batch
from ftplan.profiles.text_facts import (
    chat_markers,
    function_words,
    personal_data,
    secret_patterns,
)

ROOT = Path(__file__).parents[1]
Row = tuple[str, str]


def findings(*rows: Row) -> dict[str, Finding]:
    """By kind; rows are numbered from 1."""
    checks = TextChecks()
    for number, (prompt, answer) in enumerate(rows, start=1):
        checks.look(number, prompt, answer)
    return {finding.kind: finding for finding in checks.findings()}


def kinds_of(text: str) -> set[str]:
    """What is found in one answer."""
    return set(findings(("Say something about this.", text)))


def token(length: int, alphabet: str = string.ascii_letters + string.digits) -> str:
    """What a key's random part looks like; made here, so that no file holds one."""
    return "".join(random.Random(length).choices(alphabet, k=length))


BASE32 = string.ascii_uppercase + "234567"
URL_SAFE = string.ascii_letters + string.digits + "_-"


def json_web_token() -> str:
    def part(fields: dict[str, str]) -> str:
        return base64.urlsafe_b64encode(json.dumps(fields).encode()).decode().rstrip("=")

    header = part({"alg": "HS256", "typ": "JWT"})
    return f"{header}.{part({'sub': 'u-8841', 'role': 'admin'})}.{token(43, URL_SAFE)}"


KEYS = {
    "AWS access key": "AKIA" + token(16, BASE32),
    "Google API key": "AIza" + token(35),
    "Google OAuth client secret": "GOCSPX-" + token(28),
    "Azure storage key": "AccountKey=" + token(86) + "==",
    "Azure client secret": "aB3" + "8Q~" + token(34),
    "GitHub token": "ghp_" + token(36),
    "GitLab token": "glpat-" + token(20),
    "Slack token": "xoxb-" + "8471930265-" + token(24),
    "Slack webhook": "https://hooks.slack.com/services/T0"
    + token(8, BASE32)
    + "/B0"
    + token(8, BASE32)
    + "/"
    + token(24),
    "OpenAI key": "sk-" + token(20) + "T3Blbk" + "FJ" + token(21),
    "Anthropic key": "sk-ant-" + "api03-" + token(93, URL_SAFE) + "AA",
    "Hugging Face token": "hf_" + token(34, string.ascii_letters),
    "Stripe key": "sk_" + "live_" + token(24),
    "npm token": "npm_" + token(36),
    "PyPI token": "pypi-" + "AgEIcHlwaS5vcmc" + token(80),
    "SendGrid key": "SG." + token(22) + "." + token(43),
    "JSON web token": json_web_token(),
    "private key": "-----BEGIN RSA PRIVATE " + "KEY-----\n" + token(64) + "\n" + token(64),
    "password or key in an assignment": 'DB_PASSWORD = "' + token(17) + "4T" + '"',
    "password in a URL": "postgres://deploy:" + token(14) + "@db.corp.net/main",
}


# Later and rarer forms of the same kinds.
OTHER_KEYS = [
    ("AWS access key", "ABIA" + token(16, BASE32)),
    ("Azure storage key", "AccountKey = " + token(86) + "=="),
    ("GitHub token", "github_" + "pat_" + token(22) + "_" + token(59)),
    ("GitHub token", "ghs_" + "1184023_" + json_web_token()),
    ("GitLab token", "ACME-glpat-" + token(27) + ".0t1a2b3c4"),
    ("GitLab token", "gldt-" + token(20)),
    ("GitLab token", "glptt-" + token(40, "0123456789abcdef")),
    ("GitLab token", "glcbt-64_" + token(20)),
    ("Slack token", "xoxe.xoxp-" + "1-" + token(163)),
    ("Slack token", "xapp-1-" + token(11, BASE32) + "-8471930265122-" + token(64, "abcdef0189")),
    ("OpenAI key", "sk-" + "proj-" + token(74, URL_SAFE) + "T3Blbk" + "FJ" + token(74, URL_SAFE)),
    ("Anthropic key", "sk-ant-" + "oat01-" + token(95, URL_SAFE)),
    ("Hugging Face token", "api_" + "org_" + token(34, string.ascii_letters)),
    ("Stripe key", "rk_" + "live_" + token(99)),
    ("PyPI token", "pypi-" + "AgENdGVzdC5weXBpLm9yZw" + token(80)),
]


@pytest.mark.parametrize(("kind", "key"), OTHER_KEYS)
def test_other_forms_of_a_key_are_found_as_well(kind: str, key: str) -> None:
    assert f"likely secret ({kind})" in kinds_of(f"It is {key} I think.")


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_is_found_and_never_shown(kind: str) -> None:
    found = findings(("Fix it.", "Fine."), ("Show me.", f"It is {KEYS[kind]} I think."))
    finding = found[f"likely secret ({kind})"]
    assert (finding.count, finding.numbers, finding.severity) == (1, (2,), "warning")
    assert KEYS[kind][8:] not in repr(finding)


def test_every_pattern_of_a_key_has_a_test() -> None:
    assert {pattern.name for pattern in secret_patterns().patterns} <= set(KEYS)


@pytest.mark.parametrize(
    "text",
    [
        "The access key AKIAIOSFODNN7EXAMPLE and wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        "commit 3f786850e387550fdab836ed7e6dc881de23001b",
        "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        'token = "550e8400-e29b-41d4-a716-446655440000"',
        'password = "5f4dcc3b5aa765d61d8327deb882cf99"',
        "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAUAAAAFCAYAAACNbyblAAAAHElEQVQI12P4//8/w38GIAX"
        "DIBKE0DHxgljNBAAO9TXL0Y4OHwAAAABJRU5ErkJggg==",
        "export OPENAI_API_KEY=sk-your-key-here",
        "GITHUB_TOKEN=ghp_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        'api_key = os.environ["ANTHROPIC_API_KEY"]',
        'password = "correct horse battery staple"',
        "password: str = Field(min_length=12)",
        'const token = await getAccessTokenSilently2("default")',
        "if text.startswith('hf_') or 'AKIA' in text:",
        "-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----",
        "-----BEGIN PUBLIC KEY-----\n" + "MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8A" * 3,
        "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIiwibmFtZSI6IkpvaG4gRG9lIn0."
        "SflKxwRJSMeKKF2QT4fwpMeJf36POk6yJV_adQssw5c",
        "postgres://user:password@localhost:5432/db and https://user:pass123@example.com",
        "useStateWithCallbackAndVeryLongName1 = AbstractSingletonProxyFactoryBean2",
        'cache_key = "Xk29dkLq0ZmPq81x"',
    ],
)
def test_what_is_no_key_is_not_found(text: str) -> None:
    assert not [kind for kind in kinds_of(text) if "secret" in kind]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("e-mail address", "Write to jane.miller@initech.de, please."),
        ("e-mail address", "mail <j.m+lists@cs.stanford.edu> for it"),
        ("phone number", "Call +49 171 2839 4756 now"),
        ("phone number", "(+442071838750)"),
        ("card number", "Card: 4539 5787 6362 1478"),
        ("card number", "my visa is 4539578763621478"),
        ("card number", "3741-496353-98434 is the amex"),
        ("IBAN", "IBAN DE44 5001 0517 5407 3249 31 BIC INGDDEFF"),
        ("IBAN", "to DE44500105175407324931."),
    ],
)
def test_personal_data_are_found(kind: str, text: str) -> None:
    assert f"personal data ({kind})" in kinds_of(text)


@pytest.mark.parametrize(
    "text",
    [
        "user@example.com, me@mail.example.org, you@yourdomain.com, a@host.test",
        "info@initech.de and no-reply@github.com",
        "git@github.com:torvalds/linux.git and ssh root@10.0.0.1",
        "https://john:secret@db.initech.de/x",
        "@app.route('/') and x = q@k.mT and a@b.shape",
        "lodash@4.17.21 and icon@2x.png",
        "netdev@vger.kernel.org, bug-bash@gnu.org, python-dev@python.org, x@lists.debian.org",
        "<142480216486.20800.16526388040877946887@nightshade.la.mastaler.com>",
        "+1 555 123 4567 and +44 7700 900123 and +1 212 555 0123",
        "+44 113 496 0123, +44 29 2018 0999, +44 3069 990123, +44 909 879 0001",
        "quantize(Decimal('+35236450.6')) and z +6073641856.9",
        "x = y+491712839475 and UTC+0100, 1.5e+100, +1000000000 points, +12 345 678",
        "2024-01-15T10:30:00+0100 and +10.000.000",
        "ISBN 978-3-16-148410-0, 9783161484100",
        "1700000000000000 and 1700000000 and 20240115103000",
        "0.4539578763621478 and 4539578763621478",
        "visa 4242 4242 4242 4242 or 4111 1111 1111 1111",
        "card 4539 5787 6362 1479",
        "1234 5678 9012 3456 7890 1234",
        "DE89 3704 0044 0532 0130 00 and GB82WEST12345698765432",
        "IBAN DE44 5001 0517 5407 3249 32",
        "DE44AFFE05175407324931",
        "192.168.0.1 and 8.8.8.8",
    ],
)
def test_what_is_no_personal_data_is_not_found(text: str) -> None:
    assert not [kind for kind in kinds_of(text) if "personal" in kind]


def test_the_registrys_and_the_networks_examples_have_right_checksums() -> None:
    """So the checksums are computed rightly; only the lists keep the examples from being found."""
    facts = personal_data()
    for iban in facts.ibans.examples:
        moved = iban[4:] + iban[:4]
        assert int("".join(str(int(sign, 36)) for sign in moved)) % 97 == 1
        assert private_text._iban_forms()[iban[:2]].fullmatch(iban), iban
        assert not private_text.is_iban(iban)
    for number in facts.cards.examples:
        assert private_text._luhn(number), number
        assert not private_text.is_card_number(number)


MARKED = {
    "ChatML": "<|im_start|>user\nHi<|im_end|>",
    "Llama 3": "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "Llama 4": "<|header_start|>user<|header_end|>",
    "Gemma": "<start_of_turn>user\nHi<end_of_turn>",
    "Gemma 4": "<|turn>user\nHi<turn|>",
    "Llama 2 or Mistral": "[INST] Hi [/INST]",
    "Phi or Zephyr": "<|user|>\nHi<|end|>",
    "Harmony": "<|channel|>final<|message|>Hi",
    "Command R": "<|START_OF_TURN_TOKEN|>Hi",
    "DeepSeek": "<\uff5cUser\uff5c>Hi",
    "Granite": "<|start_of_role|>user",
    "Kimi": "<|im_user|>user<|im_middle|>Hi",
    "end of text": "That is all.<|endoftext|>",
    "Alpaca headings": "### Instruction:\nAdd.\n\n### Response:\n4",
    "Human and Assistant headings": "### Human: Hi\n### Assistant: Hello",
    "Vicuna turns": "USER: Hi\nASSISTANT: Hello",
    "end of sequence": "That is all.</s>",
}


@pytest.mark.parametrize("name", MARKED)
def test_another_templates_marks_are_found(name: str) -> None:
    assert kinds_of(MARKED[name]) == {f"chat tokens ({name})"}


def test_every_family_of_marks_has_a_test() -> None:
    assert {marker.name for marker in chat_markers().markers} <= set(MARKED)


@pytest.mark.parametrize(
    "text",
    [
        "if token == \"<|im_start|>\" or token in ('<|endoftext|>', `<|eot_id|>`): skip()",
        "```\n<|im_start|>user\nHi<|im_end|>\n```",
        "x <| f |> y and a [0] [INSTALL] list",
        "### Response: 200\nThe heading of an interface's page.",
        "The user: a person. The assistant: a program.",
        "<p>This was <s>wrong</s> right.</p>",
        "It prints `</s>` last.",
    ],
)
def test_text_about_marks_is_not_found(text: str) -> None:
    assert not [kind for kind in kinds_of(text) if "chat tokens" in kind]


def test_thoughts_are_told_apart_from_chat_tokens() -> None:
    assert kinds_of("<think>Two and two.</think>Four.") == {"thoughts in <think> tags"}
    assert kinds_of("The tag `<think>` opens, `</think>` closes.") == set()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("control characters", "a\x00b"),
        ("control characters", "a\x1b[31mred"),
        ("control characters", "a\x85b"),
        ("control characters", "a\x7fb"),
        ("invisible characters", "abc\u202edef"),
        ("invisible characters", "pay\u200b\u200bpal"),
        ("lost characters (U+FFFD)", "caf\ufffd"),
        ("wrongly decoded characters", "dÃ©jÃ\xa0 vu"),
        ("wrongly decoded characters", "itâ€™s"),
        ("wrongly decoded characters", "20 Â°C"),
    ],
)
def test_odd_characters_are_found(kind: str, text: str) -> None:
    assert kind in kinds_of(text)


@pytest.mark.parametrize(
    "text",
    [
        "tab\tnew\nline\r\nend",
        "déjà vu, Ärger, São Paulo, NÃO, «CAFÉ», 20 °C, it\u2019s \u201cso\u201d \u2026 \u20ac 5",
        "👨‍👩‍👧 and می‌خواهم and हिन्दी",
        "שלום \u2067(Hello)\u2069",
    ],
)
def test_right_characters_are_not_found(text: str) -> None:
    assert kinds_of(text) == set()


def test_html_is_found_where_it_is_a_remainder_only() -> None:
    assert "remains of HTML" in kinds_of("The cat<br/>sat on <b>the</b> mat.")
    assert "remains of HTML" in kinds_of("Salt &amp; pepper&nbsp;mill")
    assert not kinds_of("Use the `<b>` element of HTML: <b>bold</b>")
    assert not kinds_of("```\n<p>Hi</p>\n```")
    assert not kinds_of("std::vector<int> x; a < b && c > d; List<String> y")


def test_an_answer_that_speaks_of_itself_or_repeats_its_prompt_is_found() -> None:
    assert "an AI model speaks of itself" in kinds_of("I'm sorry, but as an AI language model, I")
    assert "an AI model speaks of itself" in kinds_of("As an AI, I have no bicycle of my own.")
    assert not kinds_of("It works as an air filter, and as a large language barrier.")
    prompt = "Describe in a few words how a bicycle is kept upright while it moves."
    assert "the answer repeats the prompt" in findings((prompt, prompt + " It is steered."))
    assert not findings(("Hello", "Hello, how are you?"))


def test_repeats_are_told_apart() -> None:
    long = "Bicycles stay upright since the rider steers into the fall, again and again."
    found = findings(
        ("Why do bicycles stay upright?", long),
        ("Why do bicycles stay upright?", long),
        ("why do bicycles stay upright", long.upper()),
        ("Why do bicycles stay upright?", "Since wheels are gyroscopes, some say."),
        ("Add 2 and 3, please, and answer with a number.", "5"),
        ("Add 2 and 4, please, and answer with a number.", "6"),
    )
    near = "repeats an earlier row but for case, punctuation, blanks or digits"
    assert found["repeats an earlier row"].numbers == (2,)
    assert found[near].numbers == (3,)
    assert found["the prompt of an earlier row with another answer"].numbers == (4,)
    assert len(found) == 3


def test_digits_count_in_short_rows_only() -> None:
    near = "repeats an earlier row but for case, punctuation, blanks or digits"
    log = (
        "The job {} of the nightly queue was started on host {} and has ended without errors. " * 4
    )
    assert near in findings(("", log.format(*"12345678")), ("", log.format(*"87654321")))
    short = "There are {} apples on the table."
    assert near not in findings(("", short.format(3)), ("", short.format(4)))


def test_accents_and_other_scripts_have_case_and_signs_too() -> None:
    near = "repeats an earlier row but for case, punctuation, blanks or digits"
    shouted, said = "ПРИВЕТ, МИР И ВСЕ ЕГО ЖИТЕЛИ!", "Привет мир, и все его жители."
    assert near in findings(("", shouted), ("", said))
    curly, plain = "“Où est l’été, déjà?”, demanda-t-elle", "Où est l'été... DÉJÀ? demanda-t-elle"
    assert near in findings(("", curly), ("", plain))


def words(number: int, seed: int) -> list[str]:
    chosen = random.Random(seed)
    return ["".join(chosen.choices(string.ascii_lowercase, k=6)) for _ in range(number)]


def test_rows_that_share_most_words_are_found_in_a_sample() -> None:
    kind = "shares most of its words with an earlier row"
    rows = [("", " ".join(words(60, seed))) for seed in range(300)]
    copied = words(60, 7)
    copied[30] = "changed"
    rows.append(("", " ".join(copied)))
    assert findings(*rows)[kind].numbers == (301,)
    assert findings(*rows)[kind].detail == ""


def test_a_fixed_system_message_makes_no_rows_similar() -> None:
    fixed = " ".join(words(200, 1))
    rows = [(f"{fixed} {' '.join(words(15, seed))}", "positive") for seed in range(100)]
    assert not findings(*rows)


def test_the_sample_stays_small_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similar_rows, "SAMPLE_ROWS", 40)
    rows = [("", " ".join(words(40, seed // 8) + words(1, seed + 1000))) for seed in range(400)]
    checks = TextChecks()
    for number, row in enumerate(rows, start=1):
        checks.look(number, *row)
        assert len(checks._sample.rows) <= 80
    finding = next(f for f in checks.findings() if f.kind.startswith("shares"))
    assert finding.detail == "in a sample of 40 rows"
    assert 0 < finding.count < 40


TEXTS = {
    "English": "All human beings are born free and equal in dignity and rights. They are endowed "
    "with reason and conscience and should act towards one another in a spirit of brotherhood.",
    "German": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit "
    "Vernunft und Gewissen begabt und sollen einander im Geist der Brüderlichkeit begegnen.",
    "French": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont "
    "doués de raison et de conscience et doivent agir les uns envers les autres dans un esprit.",
    "Spanish": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados "
    "como están de razón y conciencia, deben comportarse fraternalmente los unos con los otros.",
    "Cyrillic script": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "Chinese": "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心。",
    "Japanese": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利。",
    "Korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "Arabic script": "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق. وقد وهبوا عقلاً وضميراً",
    "Devanagari": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "Thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ต่างมีเหตุผลและมโนธรรม",
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_language_is_recognized(name: str) -> None:
    assert language(TEXTS[name].encode().lower()) == name


@pytest.mark.parametrize("name", function_words().words)
def test_a_languages_function_words_are_its_own(name: str) -> None:
    text = function_words().words[name]
    assert language(text.encode()[:300]) == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Yes.",
        "Paris, London, Berlin",
        "def f(x):\n    if x is not None and x in y or z:\n        return [a for a in x if not a]",
        "for (int i = 0; i < n; i++) { a[i] = b[i] + c[i]; } while (not done) { do_it(); }",
        "3.14 2.71 1.41 " * 20,
        "Zorp blick fnord quux wibble wobble grault garply waldo plugh xyzzy thud foo bar baz",
    ],
)
def test_short_text_and_code_are_not_judged(text: str) -> None:
    assert language(text.encode().lower()) == ""


def test_other_languages_than_most_are_named() -> None:
    rows = [("", TEXTS["English"])] * 3 + [("", TEXTS["German"]), ("", TEXTS["Japanese"])]
    found = findings(*rows)
    assert found["another language than most (German)"].numbers == (4,)
    assert found["another language than most (Japanese)"].numbers == (5,)
    assert found["another language than most (German)"].detail == "most are English: 60.0%"
    assert "another language than most (English)" not in found


def test_a_row_far_longer_than_the_others_is_found() -> None:
    chosen = random.Random(0)
    rows = [("", "x" * int(chosen.lognormvariate(5, 0.6))) for _ in range(3000)]
    kind = "far longer than the others"
    assert kind not in findings(*rows)
    found = findings(*rows, ("", "y " * 20_000))[kind]
    assert found.numbers == (3001,)
    assert re.fullmatch(r"up to 2\d\d times the median", found.detail)


def test_answers_cut_at_one_length_are_found() -> None:
    def answer(seed: int) -> str:
        return " ".join(words(100, seed))[:399] + "e"

    kind = "cut off at the same length"
    asked = [(f"Question {seed}?", answer(seed)) for seed in range(8)]
    assert findings(*asked)[kind].count == 8
    assert findings(*asked)[kind].detail == "at 400 characters, within a sentence"
    assert kind not in findings(*[(p, a[:-1] + ".") for p, a in asked])
    assert kind not in findings(*asked, ("Another?", answer(9) + " and so on"))
    assert kind not in findings(*[("", a) for _, a in asked])  # plain text in equal pieces


def test_the_example_data_are_clean() -> None:
    for name in ("python_docs.jsonl", "python_docs.heldout.jsonl", "python_docs.pairs.jsonl"):
        rows = []
        for line in (ROOT / "examples" / name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            asked = row.get("prompt") or "\n\n".join((row["instruction"], row.get("input", "")))
            rows.append((asked, row.get("chosen") or row["output"]))
        assert findings(*rows) == {}, name


def test_this_repositorys_pages_are_clean() -> None:
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    parts = [part for page in pages for part in page.read_text(encoding="utf-8").split("\n## ")]
    found = findings(*[("", part) for part in parts])
    assert set(found) <= {"far longer than the others"}


ALL_KINDS = [
    *(("Say it.", text) for text in (*KEYS.values(), *MARKED.values(), *TEXTS.values())),
    ("Say it.", "Write to jane.miller@initech.de."),
    ("Say it.", "a\x00b"),
    ("Say it.", "Salt &amp; pepper"),
    ("Say it.", "Salt &amp; pepper"),
    *(("", " ".join(words(50, seed % 90))) for seed in range(150)),
]


@given(st.permutations(range(len(ALL_KINDS))), st.integers(0, len(ALL_KINDS)))
@settings(max_examples=15, deadline=None)
def test_parts_merged_say_what_one_pass_says(order: list[int], cut: int) -> None:
    whole = TextChecks()
    first, second = TextChecks(), TextChecks()
    for number, index in enumerate(order, start=1):
        row = ALL_KINDS[index]
        whole.look(number, *row)
        (first if number <= cut else second).look(number if number <= cut else number - cut, *row)
    merged: TextChecks = pickle.loads(pickle.dumps(first))
    merged.merge(pickle.loads(pickle.dumps(second)), offset=cut)
    assert merged.findings() == whole.findings()
    backwards = TextChecks()
    backwards.merge(second, offset=cut)
    backwards.merge(first)
    assert backwards.findings() == whole.findings()


LURES = (
    "@ +4 <| [INST] ### &amp; </s> <think> token=\" password: '://a:b@ -----BEGIN AKIA eyJ "
    "sk-ant- 4539 5787 6362 1478 DE44 USER: ASSISTANT: Ã© â€™ \u202e \u200b \ufffd \ud800 \x00 "
    "as an AI model"
)


@given(
    st.lists(
        st.tuples(
            st.one_of(st.just(""), st.text()),
            st.one_of(
                st.text(),
                st.lists(st.sampled_from([*LURES.split(" "), " ", "\n"]), max_size=40).map("".join),
                st.text(alphabet=sorted(set(LURES)), max_size=300),
            ),
        ),
        max_size=12,
    )
)
@example([("\udcff", "\ud800\udfff"), ("", ""), ("\x1f\x1e", "\xff\xfe")])
@settings(max_examples=300, deadline=None)
def test_no_text_is_too_odd_to_look_at(rows: list[Row]) -> None:
    for finding in findings(*rows).values():
        assert 1 <= finding.count <= len(rows)
        assert set(finding.numbers) <= set(range(1, len(rows) + 1))


@given(st.text(alphabet=sorted(set(LURES)), max_size=200))
@example("token=" * 400)
@example("X-API-Key: " + token(17) + "4T")
@example("accessKey = '" + token(17) + "4T'")
@example("a@" * 2000)
@example("4539 " * 2000)
@example("<|" * 3000 + "<p " * 2000)
@example("-----BEGIN PRIVATE " + "KEY-----\n" + "USER: " * 3000)
@settings(max_examples=200, deadline=2000)
def test_a_gate_never_hides_what_a_check_finds(text: str) -> None:
    """What each check finds in a text alone is found through the searches of a batch too."""
    alone = {
        *(f"likely secret ({kind})" for kind in private_text.assigned_in(f"?\n{text}")),
        *(f"personal data ({kind})" for kind in private_text.emails_in(f"?\n{text}")),
        *(f"personal data ({kind})" for kind in private_text.phones_in(f"?\n{text}")),
        *(f"personal data ({kind})" for kind in private_text.cards_in(f"?\n{text}")),
        *(f"personal data ({kind})" for kind in private_text.ibans_in(f"?\n{text}")),
        *(f"chat tokens ({kind})" for kind in odd_text.chat_tokens_in(f"?\n{text}")),
        *odd_text.odd_characters_in(f"?\n{text}"),
        *(f"likely secret ({kind})" for kind in private_text.passwords_in_urls(f"?\n{text}")),
    }
    found = set(Batch([(1, "?", text)]).kinds().get(0, []))
    others = {"remains of HTML", "an AI model speaks of itself", "thoughts in <think> tags"}
    assert alone <= found
    assert found - alone - others <= {f"likely secret ({kind})" for kind in KEYS}


@given(
    st.text(alphabet="aB3 _-.\n\tİßΣж", max_size=80) | st.text(alphabet="日本語のa、 ", max_size=80)
)
def test_hashes_of_words_in_threes_are_those_of_the_words(text: str) -> None:
    words = re.findall(r"\w+", text.lower())
    parts = [" ".join(three) for three in zip(words, words[1:], words[2:], strict=False)]
    if len(text) > 16 * len(words):
        joined = "".join(words)
        parts = [joined[start : start + 8] for start in range(len(joined) - 7)]
    assert similar_rows._shingles(text) == {crc32(part.encode()) for part in parts}


@given(st.sets(st.integers(0, 2**32 - 1), min_size=4, max_size=60))
def test_the_smallest_hashes_are_the_first_when_sorted(hashes: set[int]) -> None:
    assert similar_rows._smallest(hashes) == sorted(hashes)[:4]


@given(st.lists(st.sampled_from(sorted(languages._words().all))))
def test_scores_of_languages_are_their_words(words: list[bytes]) -> None:
    known, found = languages._words(), set(words)
    assert list(known.scores(found)) == [len(found & own) for own in known.words]


@given(st.lists(st.integers(0, 5)))
def test_equal_hashes_are_grouped_but_for_zeros(values: list[int]) -> None:
    hashes = hash_array()
    hashes.extend(values)
    expected = [
        [index for index, other in enumerate(values) if other == value]
        for value in sorted(set(values) - {0})
        if values.count(value) > 1
    ]
    assert sorted(groups(hashes)) == sorted(expected)


def test_hashes_of_many_rows_are_grouped_in_parts() -> None:
    hashes = hash_array()
    chosen = random.Random(1)
    hashes.extend(chosen.getrandbits(64) for _ in range(250_000))
    hashes.append(hashes[17])
    assert list(groups(hashes)) == [[17, 250_000]]


def test_held_out_rows_that_are_trained_on_are_found() -> None:
    question = "Why do bicycles stay upright while they move?"
    first, second = LeakCheck(), LeakCheck()
    first.train(question, "Since they are steered.")
    first.train("", "Plain text about bicycles and their riders.")
    second.hold_out(1, question, "Since they are steered.")
    second.hold_out(2, question.upper(), "Nobody knows.")
    second.hold_out(3, "", "plain text about bicycles, and their riders")
    second.hold_out(4, "What is a bell?", "A sign.")
    first.merge(pickle.loads(pickle.dumps(second)), offset=100)
    found = {finding.kind: finding.numbers for finding in first.findings()}
    assert found == {
        "a held-out row that is trained on": (101,),
        "a held-out prompt that is trained on": (102, 103),
    }


def test_every_kind_stands_in_the_documentation() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    section = page.partition("## What is warned about")[2].partition("\n## ")[0]
    listed = set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))
    assert listed == set(KINDS)
