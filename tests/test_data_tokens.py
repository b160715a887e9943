"""Rows to tokens, with a real tokenizer: which text, and which of its tokens carry loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftplan.launcher.data.patterns import Segment
from ftplan.launcher.data.rows import Row
from ftplan.launcher.data.tokens import RowTokenizer, TokenRow, load_tokenizer
from ftplan.planner.errors import InputError
from tests.launcher_fixtures import CHATML, SPECIAL_TOKENS, chat, tiny_tokenizer

pytest.importorskip("transformers")

# As Qwen3's: thinking is shown in the last answer only, so an earlier turn changes later on.
FORGETFUL = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As DeepSeek-R1's: an answer is opened with a thought that a finished one does not have.
THINKING = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# As Llama's: contents are stripped, and the whole opens with a token of its own.
TRIMMING = (
    "{{ bos_token }}{% for message in messages %}"
    "[{{ message.role }}]\n{{ message.content | trim }}{{ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
# As Gemma's and Mistral's older ones.
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
# The end of everything, whether or not an answer is asked for.
CLOSING = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{{ eos_token }}"
)

MULTI_TURN = chat("The question?", "The answer.", "And here?", "Is there.", system="Be brief.")

texts = st.text(min_size=1, max_size=12) | st.sampled_from(
    ["the answer is here", " there", "### Response:\n", "<|im_end|>", "\r\n\t", "naïve 🤗 数"]
)


@st.composite
def conversations(draw: st.DrawFn) -> Row:
    turns = draw(st.lists(texts, min_size=1, max_size=3))
    answers = draw(st.lists(texts, min_size=len(turns), max_size=len(turns)))
    both = [text for pair in zip(turns, answers, strict=True) for text in pair]
    return chat(*both, system=draw(st.just("") | texts))


# Hypothesis takes no fixtures of function scope, and one tokenizer a template is enough.
PLAIN = RowTokenizer(tiny_tokenizer())
TEMPLATES = {
    template: RowTokenizer(tiny_tokenizer(template))
    for template in (CHATML, FORGETFUL, THINKING, TRIMMING)
}


def tokenize(tokenizer: RowTokenizer, row: Row) -> TokenRow:
    (tokens,) = tokenizer.tokenize([row])
    assert len(tokens.input_ids) == len(tokens.completion_mask)
    assert set(tokens.completion_mask) <= {0, 1}
    return tokens


def decode(tokenizer: RowTokenizer, ids: list[int]) -> str:
    return str(tokenizer.tokenizer.decode(ids))


def stretches(tokenizer: RowTokenizer, tokens: TokenRow, trained: int) -> list[str]:
    """The texts of the stretches of tokens that carry loss, or of those that do not."""
    found: list[list[int]] = [[]]
    for token, mask in zip(tokens.input_ids, tokens.completion_mask, strict=True):
        if mask == trained:
            found[-1].append(token)
        elif found[-1]:
            found.append([])
    return [decode(tokenizer, ids) for ids in found if ids]


def opening_tokenizer(chat_template: str | None = None) -> Any:
    """One that puts its first token before every text that it is given."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(chat_template)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )
    return tokenizer


class TestPlainHeadings:
    def test_a_question_and_its_answer(self) -> None:
        tokens = tokenize(PLAIN, chat("The question?", "The answer."))
        assert stretches(PLAIN, tokens, 0) == ["### Instruction:\nThe question?\n\n### Response:\n"]
        assert stretches(PLAIN, tokens, 1) == ["The answer.<|im_end|>"]

    def test_several_turns_and_a_system_message(self) -> None:
        tokens = tokenize(PLAIN, MULTI_TURN)
        assert stretches(PLAIN, tokens, 0) == [
            "### System:\nBe brief.\n\n### Instruction:\nThe question?\n\n### Response:\n",
            "### Instruction:\nAnd here?\n\n### Response:\n",
        ]
        assert stretches(PLAIN, tokens, 1) == ["The answer.<|im_end|>", "Is there.<|im_end|>"]

    def test_the_end_token_is_one_token_and_carries_loss(self) -> None:
        tokens = tokenize(PLAIN, chat("q", "a"))
        assert tokens.input_ids[-1] == PLAIN.tokenizer.eos_token_id
        assert tokens.completion_mask[-1] == 1
        assert tokens.input_ids.count(PLAIN.tokenizer.eos_token_id) == 1

    def test_a_prompt_is_rendered_for_an_answer_as_it_was_trained(self) -> None:
        """A person hands the prompt over as one text; GPT-2's and SmolLM2's byte-pair encoding
        has other tokens for two line feeds at the end of a text than before `###`."""
        row = chat("The question?", "The answer.", system="s")
        prompt = PLAIN.render(row.prompt, ask=True)
        ids = PLAIN.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tokens = tokenize(PLAIN, row)
        assert tokens.input_ids[: len(ids)] == ids
        assert tokens.completion_mask == [0] * len(ids) + [1] * (len(tokens.input_ids) - len(ids))

    def test_a_tokenizer_without_an_end_token_adds_none(self) -> None:
        endless = RowTokenizer(tiny_tokenizer(eos_token=None))
        tokens = tokenize(endless, chat("q", "a"))
        assert stretches(endless, tokens, 1) == ["a"]

    def test_an_empty_template_counts_as_none(self) -> None:
        assert not RowTokenizer(tiny_tokenizer("")).has_chat_template
        assert PLAIN.template == "plain headings"

    @given(conversations())
    def test_tokens_together_are_the_text_and_loss_is_on_the_answers(self, row: Row) -> None:
        tokens = tokenize(PLAIN, row)
        assert decode(PLAIN, tokens.input_ids) == PLAIN.render(row.messages)
        answers = [m.content for m in row.messages if m.role == "assistant"]
        assert stretches(PLAIN, tokens, 1) == [f"{answer}<|im_end|>" for answer in answers]


class TestPlainText:
    def test_all_of_it_carries_loss_and_it_ends(self) -> None:
        tokens = tokenize(PLAIN, Row(number=1, text="The answer is here.\n"))
        assert decode(PLAIN, tokens.input_ids) == "The answer is here.\n<|im_end|>"
        assert set(tokens.completion_mask) == {1}

    def test_a_chat_template_leaves_it_alone(self) -> None:
        text = Row(number=1, text="The answer is here.")
        assert tokenize(TEMPLATES[CHATML], text) == tokenize(PLAIN, text)

    @pytest.mark.parametrize("row", [Row(number=1, text="here"), chat("q", "a")])
    def test_a_text_opens_as_the_tokenizer_opens_one(self, row: Row) -> None:
        """Llama's and Gemma's tokenizers put a first token before every text; without it their
        base models are far outside what they were trained on, and a length is off by one."""
        opening = opening_tokenizer()
        bos = opening.bos_token_id
        assert opening("here")["input_ids"][0] == bos, "the premise"
        tokens = tokenize(RowTokenizer(opening), row)
        assert (tokens.input_ids[0], tokens.input_ids.count(bos)) == (bos, 1)
        assert tokens.completion_mask[0] == 0
        assert tokens.input_ids[1:] == tokenize(PLAIN, row).input_ids

    def test_a_text_that_has_brought_its_first_token_has_it_once(self) -> None:
        tokenizer = RowTokenizer(opening_tokenizer())
        row = Row(number=1, text="here")
        assert tokenize(tokenizer, Row(number=1, text="<|bos|>here")).input_ids == (
            tokenize(tokenizer, row).input_ids
        )


class TestChatTemplates:
    @pytest.mark.parametrize("template", list(TEMPLATES), ids=range(len(TEMPLATES)))
    def test_a_prompt_is_tokenized_for_an_answer_as_it_was_trained(self, template: str) -> None:
        tokenizer, row = TEMPLATES[template], chat("The question?", "Is there.", system="s")
        prompt = tokenizer.render(row.prompt, ask=template != THINKING)
        ids = tokenizer.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tokens = tokenize(tokenizer, row)
        assert tokens.input_ids[: len(ids)] == ids
        assert tokens.completion_mask[: len(ids)] == [0] * len(ids)

    def test_every_answer_carries_loss_with_its_end_token(self) -> None:
        chatml = TEMPLATES[CHATML]
        tokens = tokenize(chatml, MULTI_TURN)
        assert chatml.template == "the tokenizer's chat template"
        assert stretches(chatml, tokens, 0) == [
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\nThe question?<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>user\nAnd here?<|im_end|>\n<|im_start|>assistant\n",
        ]
        assert stretches(chatml, tokens, 1) == [
            "The answer.<|im_end|>\n",
            "Is there.<|im_end|>\n",
        ]

    def test_no_token_reaches_over_the_start_of_an_answer(self) -> None:
        """In the text as a whole ` answer` is one token."""
        template = (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}: the answ"
            "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        )
        tokenizer = RowTokenizer(tiny_tokenizer(template))
        whole = tokenizer.tokenizer.tokenize("q: the answer is here")
        assert "\u0120answer" in whole, "the premise"
        tokens = tokenize(tokenizer, chat("q", "er is here"))
        assert stretches(tokenizer, tokens, 0) == ["q: the answ"]
        assert stretches(tokenizer, tokens, 1) == ["er is here<|im_end|>"]

    def test_special_tokens_stay_whole(self) -> None:
        chatml = TEMPLATES[CHATML]
        specials = chatml.tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[1:])
        ids = tokenize(chatml, chat("q", "a")).input_ids
        assert [ids.count(token) for token in specials] == [2, 2]

    def test_nothing_is_put_before_the_template_s_own_opening(self) -> None:
        trimming = RowTokenizer(opening_tokenizer(TRIMMING))
        ids = tokenize(trimming, MULTI_TURN).input_ids
        assert ids[0] == trimming.tokenizer.bos_token_id
        assert ids.count(trimming.tokenizer.bos_token_id) == 1

    def test_where_a_template_rewrites_earlier_turns_only_the_last_answer_is_trained(self) -> None:
        forgetful = TEMPLATES[FORGETFUL]
        tokens = tokenize(forgetful, MULTI_TURN)
        assert decode(forgetful, tokens.input_ids) == forgetful.render(MULTI_TURN.messages)
        assert stretches(forgetful, tokens, 1) == [
            "<think>\n\n</think>\n\nIs there.<|im_end|>\n",
        ]

    def test_an_opening_that_the_answer_does_not_have_is_left_out(self) -> None:
        thinking = TEMPLATES[THINKING]
        tokens = tokenize(thinking, MULTI_TURN)
        assert decode(thinking, tokens.input_ids) == thinking.render(MULTI_TURN.messages)
        (trained,) = stretches(thinking, tokens, 1)
        assert trained.endswith("Is there.<|im_end|>\n")
        assert "here?" not in trained

    @pytest.mark.parametrize("template", list(TEMPLATES), ids=range(len(TEMPLATES)))
    @settings(max_examples=40)
    @given(row=conversations())
    def test_tokens_together_are_the_text(self, template: str, row: Row) -> None:
        tokenizer = TEMPLATES[template]
        segments = tokenizer.segments(row)
        rendered = tokenizer.render(row.messages)
        assert "".join(segment.text for segment in segments) == rendered
        assert decode(tokenizer, tokenize(tokenizer, row).input_ids) == rendered

    @given(conversations())
    def test_loss_is_on_the_answers_and_nowhere_else(self, row: Row) -> None:
        answers = [m.content for m in row.messages if m.role == "assistant"]
        trained = [s.text for s in TEMPLATES[CHATML].segments(row) if s.trained]
        assert trained == [f"{answer}<|im_end|>\n" for answer in answers]

    @pytest.mark.parametrize("looks_for", ["'</think>'", '"<\\u002fthink>\\n"', "'x\\'s </think>'"])
    def test_a_template_that_looks_into_a_text_is_rendered(self, looks_for: str) -> None:
        """Its own words may hold line feeds and apostrophes; rows without the mark come first, so
        that how such roles are rendered is known."""
        looking = (
            "{# It's ours. #}{% for message in messages %}{{ '<|im_start|>' + message.role + '\n"
            "' }}{{ message.content.split(" + looks_for + ')[-1] }}{{ "<|im_end|>\n" }}'
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        tokenizer = RowTokenizer(tiny_tokenizer(looking))
        for number in range(5):
            tokenizer.segments(chat(f"question {number}", "It's an answer."))
        row = chat("The question?", "So x's </think>\n\nThe answer.")
        rendered = tokenizer.render(row.messages)
        assert "So " not in rendered
        assert "".join(segment.text for segment in tokenizer.segments(row)) == rendered

    def test_a_text_that_cannot_be_cut_is_refused_with_its_row(self) -> None:
        """A template that always closes: the question alone is no beginning of the whole."""
        closing = RowTokenizer(tiny_tokenizer(CLOSING))
        with pytest.raises(InputError, match=r"row 7: .* in another way once it is") as caught:
            tokenize(closing, chat("The question?", "The answer.", line=7))
        assert "plain headings" in (caught.value.hint or "")

    def test_a_system_message_that_a_template_refuses_opens_the_first_question(self) -> None:
        no_system = RowTokenizer(tiny_tokenizer(NO_SYSTEM))
        row = chat("q", "a", "r", "b", system="s")
        assert tokenize(no_system, row) == tokenize(no_system, chat("s\n\nq", "a", "r", "b"))
        assert tokenize(no_system, chat("q", "a")) == tokenize(TEMPLATES[CHATML], chat("q", "a"))

    def test_what_a_template_refuses_altogether_is_bad_input_with_its_row(self) -> None:
        refusing = RowTokenizer(tiny_tokenizer("{{ raise_exception('I speak to nobody') }}"))
        for system in ("", "s"):
            with pytest.raises(InputError, match=r"row 7: .* refuses .*: I speak to nobody"):
                tokenize(refusing, chat("q", "a", system=system, line=7))


class TestPrompts:
    @pytest.mark.parametrize("opens", [False, True])
    @pytest.mark.parametrize("template", [None, CHATML, FORGETFUL, TRIMMING, NO_SYSTEM])
    @pytest.mark.parametrize("system", ["", "s"])
    def test_an_answer_is_asked_for_as_it_was_trained(
        self, template: str | None, opens: bool, system: str
    ) -> None:
        make = opening_tokenizer if opens else tiny_tokenizer
        tokenizer = RowTokenizer(make(template))
        row = chat("The question?", "The answer.", system=system)
        ids, tokens = tokenizer.prompt_ids(row.prompt), tokenize(tokenizer, row)
        assert tokens.input_ids[: len(ids)] == ids
        if template != FORGETFUL:  # trains the empty thought before the answer as well
            assert tokens.completion_mask.index(1) == len(ids)


class TestManyRows:
    def test_rows_in_chunks_are_as_one_by_one_and_progress_is_told(self) -> None:
        rows = [chat(f"question {i}", "answer" * (i % 5 + 1), line=i) for i in range(600)]
        told: list[int] = []
        tokens = list(PLAIN.tokenize(rows, told.append))
        assert told == [256, 512, 600]
        for number in (0, 255, 256, 511, 512, 599):
            assert tokens[number] == tokenize(PLAIN, rows[number])
        assert len(tokens) == 600

    def test_no_rows_make_no_tokens(self) -> None:
        assert list(PLAIN.tokenize([])) == []

    def test_an_empty_stretch_makes_no_token(self) -> None:
        class Hollow(RowTokenizer):
            def segments(self, row: Row) -> list[Segment]:
                return [Segment("", False), Segment("a", True), Segment("", True)]

        tokens = tokenize(Hollow(tiny_tokenizer()), Row(number=1, text="a"))
        assert tokens.completion_mask == [1]


def test_a_tokenizer_is_loaded_from_a_model_s_folder(tmp_path: Path) -> None:
    saved: Any = tiny_tokenizer(CHATML)
    saved.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.has_chat_template
    row = chat("The question?", "The answer.")
    assert tokenize(loaded, row) == tokenize(TEMPLATES[CHATML], row)
