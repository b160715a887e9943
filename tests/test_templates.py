"""Which template a run takes, and that what is saved renders prompts as they were trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="templates are its tokenizers'")

from transformers import AutoTokenizer

from ftplan.launcher.data.rows import Message, Row
from ftplan.launcher.data.templates import Template, choose_template, marks_of
from ftplan.launcher.data.tokens import RowTokenizer, load_tokenizer
from ftplan.planner.errors import InputError
from tests.launcher_fixtures import CHATML, chat, tiny_tokenizer
from tests.test_data_tokens import FORGETFUL, MULTI_TURN

LLAMA_2 = (
    "{% for message in messages %}{% if message.role == 'user' %}"
    "{{ bos_token + '[INST] ' + message.content + ' [/INST]' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' + message.content + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}"
    "{{ message.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}"
    "{{ message.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "{{ '[INST] ' + message.content + '[/INST]' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}"
    "{% else %}{{ raise_exception('user and assistant alternate') }}{% endif %}{% endfor %}"
)
# Writes no token behind an answer.
ENDLESS = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def opening(template: str | None = None, **changes: Any) -> Any:
    """Puts its first token before every text, as Llama's and Gemma's do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(template, **changes)
    first = ("<|bos|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[first]
    )
    return tokenizer


def of_marks(template: str, end: str, make: Callable[..., Any] = opening) -> Any:
    """A tokenizer that has the template's marks, and whose texts end with another token."""
    tokenizer = make(template, eos_token="<|im_start|>")
    tokenizer.add_special_tokens({"additional_special_tokens": [*marks_of(template), end]})
    return tokenizer


def llama_3() -> RowTokenizer:
    """Cuts texts as Llama 3's does: line feeds that follow each other stay together, so that those
    before an answer are one token whether or not it is there."""
    from tokenizers import Regex, pre_tokenizers

    tokenizer = of_marks(LLAMA_3, "<|eot_id|>")
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return RowTokenizer(tokenizer)


KINDS: dict[str, Callable[[], RowTokenizer]] = {
    "ChatML, pad is eos": lambda: RowTokenizer(tiny_tokenizer(CHATML, pad_token="<|im_end|>")),
    "Qwen3, no pad": lambda: RowTokenizer(tiny_tokenizer(FORGETFUL)),
    "Llama 2": lambda: RowTokenizer(opening(LLAMA_2)),
    "Llama 3": llama_3,
    "Gemma": lambda: RowTokenizer(of_marks(GEMMA, "<end_of_turn>")),
    "Mistral": lambda: RowTokenizer(opening(MISTRAL)),
    "plain": lambda: RowTokenizer(tiny_tokenizer()),
    "plain, with a first token": lambda: RowTokenizer(opening()),
    "plain, for a base model": lambda: asked(opening(LLAMA_3), "auto", is_base=True),
    "ChatML on a tokenizer without": lambda: asked(opening(eos_token="<|bos|>"), "chatml"),
    "without an end": lambda: RowTokenizer(tiny_tokenizer(ENDLESS)),
}
ROWS = {
    "one question": chat("The question?", "The answer."),
    "many turns": chat("a", "b", "The question?\n", " The answer is\n\n"),
    "a system message": MULTI_TURN,
}


def asked(tokenizer: Any, name: str, **more: Any) -> RowTokenizer:
    return RowTokenizer(tokenizer, choose_template(tokenizer, name, **more))


def trained(tokens: Any) -> list[int]:
    pairs = zip(tokens.input_ids, tokens.completion_mask, strict=True)
    return [token for token, carries in pairs if carries]


def folded(row: Row) -> list[dict[str, Any]]:
    """The prompt with the system message in its first question."""
    system, question, *rest = row.prompt
    first = Message("user", f"{system.content}\n\n{question.content}")
    return [message.to_dict() for message in (first, *rest)]


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_renders_prompts_as_they_were_trained(
    kind: str, row: Row, tmp_path: Path
) -> None:
    tokenizer = KINDS[kind]()
    ids = tokenizer.prompt_ids(row.prompt)
    (tokens,) = tokenizer.tokenize([row])
    assert tokens.input_ids[: len(ids)] == ids
    tokenizer.tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    turns = [message.to_dict() for message in row.prompt]
    if row is ROWS["a system message"] and kind in ("Llama 2", "Gemma", "Mistral"):
        turns = folded(row)
    again = saved.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert again == ids


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_the_last_answer_is_trained_once(kind: str) -> None:
    tokenizer = KINDS[kind]()
    end = tokenizer.end_ids[0]
    (tokens,) = tokenizer.tokenize([ROWS["one question"]])
    assert trained(tokens).count(end) == 1
    ends = {"Llama 3": "<|eot_id|>", "Gemma": "<end_of_turn>"}
    assert tokenizer.tokenizer.convert_ids_to_tokens(end) == ends.get(kind, "<|im_end|>") or (
        kind in ("plain, for a base model", "ChatML on a tokenizer without")
    )


def test_what_ends_texts_ends_generation_too() -> None:
    llama = KINDS["Llama 3"]()
    names = llama.tokenizer.convert_ids_to_tokens(llama.end_ids)
    assert names == ["<|eot_id|>", "<|im_start|>"]


def test_a_template_without_an_end_gets_the_tokenizers() -> None:
    """A model that is never shown an end speaks on for ever."""
    tokenizer = KINDS["without an end"]()
    (tokens,) = tokenizer.tokenize([ROWS["many turns"]])
    eos = tokenizer.tokenizer.eos_token_id
    assert tokens.input_ids[-1] == eos and tokens.completion_mask[-1] == 1
    assert tokens.input_ids.count(eos) == 1
    pair = tokenizer.pair(ROWS["one question"])
    assert pair.chosen_ids[-1] == eos


@pytest.mark.parametrize(
    ("has_own", "is_base", "name", "plain"),
    [
        (True, False, "auto", False),
        (True, True, "auto", True),
        (False, False, "auto", True),
        (True, True, "model", False),
        (True, False, "plain", True),
    ],
)
def test_the_template_follows_the_model_unless_it_is_asked_for(
    has_own: bool, is_base: bool, name: str, plain: bool
) -> None:
    tokenizer = tiny_tokenizer(CHATML if has_own else None)
    chosen = choose_template(tokenizer, name, is_base=is_base)
    assert chosen.is_plain == plain
    assert chosen.asked == (name != "auto")
    assert chosen.why


def test_a_template_from_a_file_is_the_one_that_is_saved(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(ENDLESS)
    tokenizer = asked(tiny_tokenizer(CHATML), str(path))
    assert tokenizer.tokenizer.chat_template == ENDLESS
    assert tokenizer.template == f"the chat template `{path}`"


@pytest.mark.parametrize(
    ("name", "said"),
    [("chatlm", "unknown chat template `chatlm`"), ("model", "has no chat template")],
)
def test_a_template_that_is_not_to_be_had_is_refused(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        choose_template(tiny_tokenizer(), name)
    assert "chatml" in (caught.value.hint or "")


def test_a_file_that_is_no_template_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    with pytest.raises(InputError, match="does not speak of `messages`"):
        choose_template(tiny_tokenizer(), str(path))


@pytest.mark.parametrize("name", ["plain", "chatml"])
def test_tools_and_their_calls_are_written_out(name: str) -> None:
    tokenizer = asked(tiny_tokenizer(), name)
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": 3}}}
    messages = (
        Message("user", "Look."),
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", "Seen.", name="look"),
        Message("assistant", "It is there."),
    )
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    row = Row(number=1, messages=messages, tools=(tool,))
    text = "".join(segment.text for segment in tokenizer.segments(row))
    assert '"arguments": {"at": 3}' in text and '"parameters": {}' in text and "Seen." in text
    calls = [s.text for s in tokenizer.segments(row) if s.trained]
    assert calls[0].startswith('{"type": "function"') and calls[1].startswith("It is there.")


class TestPadding:
    def test_a_tokenizer_without_gets_a_token_that_is_there(self) -> None:
        tokenizer = tiny_tokenizer(CHATML)
        before = len(tokenizer)
        RowTokenizer(tokenizer)
        assert tokenizer.pad_token == "<|im_end|>" and len(tokenizer) == before

    def test_a_token_made_for_it_is_taken_first(self) -> None:
        tokenizer = tiny_tokenizer(CHATML)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|pad|>"]})
        assert RowTokenizer(tokenizer).tokenizer.pad_token == "<|pad|>"

    def test_one_that_is_named_is_kept(self) -> None:
        tokenizer = tiny_tokenizer(CHATML, pad_token="<|bos|>")
        assert RowTokenizer(tokenizer).tokenizer.pad_token == "<|bos|>"

    def test_without_an_end_token_another_one_does(self) -> None:
        assert RowTokenizer(tiny_tokenizer(eos_token=None)).tokenizer.pad_token == "<|bos|>"


class TestNewTokens:
    def test_they_are_one_token_each_and_are_shown_in_answers(self) -> None:
        tokenizer = RowTokenizer(tiny_tokenizer(CHATML), add_tokens=("<tool>", "<think>"))
        core = tokenizer.tokenizer
        assert tokenizer.added == tokenizer.trained == ("<tool>", "<think>")
        assert core("x<tool>y")["input_ids"][1] == tokenizer.trained_ids[0] == len(core) - 2
        (tokens,) = tokenizer.tokenize([chat("q", "<think>a")])
        assert core.decode(trained(tokens), skip_special_tokens=True) == "<think>a\n"

    def test_those_of_a_named_template_come_with_it_and_are_hidden(self) -> None:
        core = tiny_tokenizer()
        template = Template(name="own", text=LLAMA_3)
        tokenizer = RowTokenizer(core, template)
        assert tokenizer.added == ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        assert core.decode(tokenizer.end_ids[:1], skip_special_tokens=True) == ""

    def test_one_that_is_there_already_is_trained_and_not_added(self) -> None:
        tokenizer = RowTokenizer(tiny_tokenizer(CHATML), add_tokens=("<|im_start|>",))
        assert tokenizer.added == () and tokenizer.trained == ("<|im_start|>",)

    def test_the_templates_own_are_trained_when_asked_for(self) -> None:
        core = of_marks(LLAMA_3, "<|eot_id|>")
        tokenizer = RowTokenizer(core, train_tokens=("template", "<|bos|>"))
        assert tokenizer.trained == (*marks_of(LLAMA_3), "<|bos|>")
        assert tokenizer.trained_ids == core.convert_tokens_to_ids(list(tokenizer.trained))

    def test_plain_headings_have_none(self) -> None:
        with pytest.raises(InputError, match="words only"):
            RowTokenizer(tiny_tokenizer(), train_tokens=("template",))

    def test_an_unknown_one_is_refused_with_the_nearest(self) -> None:
        with pytest.raises(InputError, match=r"unknown token to train `<\|im_ned\|>`") as caught:
            RowTokenizer(tiny_tokenizer(CHATML), train_tokens=("<|im_ned|>",))
        assert "<|im_end|>" in (caught.value.hint or "")

    def test_a_loaded_tokenizer_has_them_at_the_same_places(self, tmp_path: Path) -> None:
        tiny_tokenizer(CHATML).save_pretrained(tmp_path)
        first, second = (
            load_tokenizer(tmp_path, "chatml", add_tokens=("<tool>",)) for _ in range(2)
        )
        assert first.trained_ids == second.trained_ids
