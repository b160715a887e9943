"""From rows to a profile: what is held out, what is measured, what is told about the file."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from ftplan.launcher.data.tokens import RowTokenizer
from ftplan.launcher.data_reader import DataFile, Row
from ftplan.launcher.profiling import (
    Split,
    estimated_tokens,
    make_split,
    profile_data,
    profile_to_dict,
    split_rows,
)
from ftplan.planner.data_profile import Problem
from ftplan.planner.errors import InputError
from tests.launcher_fixtures import CHATML, chat, tiny_tokenizer


def different(count: int) -> list[Row]:
    return [chat(f"question {number}", "answer", line=number) for number in range(1, count + 1)]


def repeated(*counts: int) -> list[Row]:
    """`repeated(3, 1)`: three rows with one prompt and different answers, one with another."""
    prompts = [prompt for prompt, count in enumerate(counts) for _ in range(count)]
    return [
        chat(f"question {prompt}", f"answer {line}", line=line)
        for line, prompt in enumerate(prompts, start=1)
    ]


def data_file(
    rows: list[Row], problems: tuple[Problem, ...] = (), name: str = "rows.jsonl"
) -> DataFile:
    unusable = sum(problem.count for problem in problems)
    return DataFile(
        path=Path(name),
        sha256="0" * 64,
        format="instruction",
        num_rows=len(rows) + unusable,
        rows=tuple(rows),
        problems=problems,
    )


def lines(rows: tuple[Row, ...]) -> list[int]:
    return [row.line for row in rows]


groups = st.lists(st.integers(1, 12), min_size=2, max_size=30)


class TestSplit:
    @settings(max_examples=40)
    @given(groups, st.integers(0, 2**32), st.randoms(use_true_random=False))
    def test_every_row_is_on_one_side_and_every_prompt_too(
        self, counts: list[int], seed: int, order: random.Random
    ) -> None:
        rows = repeated(*counts)
        order.shuffle(rows)
        split = split_rows(rows, seed=seed)
        assert sorted(lines(split.train + split.held_out)) == sorted(row.line for row in rows)
        assert not {row.prompt for row in split.train} & {row.prompt for row in split.held_out}
        assert split.train
        assert split.held_out

    @settings(max_examples=40)
    @given(groups, st.integers(0, 2**32))
    def test_both_sides_keep_the_file_s_order(self, counts: list[int], seed: int) -> None:
        split = split_rows(repeated(*counts), seed=seed)
        assert lines(split.train) == sorted(lines(split.train))
        assert lines(split.held_out) == sorted(lines(split.held_out))

    @settings(max_examples=40)
    @given(st.integers(2, 300))
    def test_a_tenth_of_different_rows_is_held_out(self, count: int) -> None:
        split = split_rows(different(count))
        assert len(split.held_out) == max(1, round(count / 10))

    @pytest.mark.parametrize(("count", "held_out"), [(2, 1), (19, 2), (5000, 500), (8_000, 500)])
    def test_few_rows_give_one_and_many_no_more_than_is_worth_evaluating(
        self, count: int, held_out: int
    ) -> None:
        assert len(split_rows(different(count)).held_out) == held_out

    def test_what_the_common_prompts_leave_free_is_filled_with_rare_ones(self) -> None:
        split = split_rows(repeated(30, 30, 30, *[1] * 10))
        assert len(split.held_out) == 10
        assert len({row.prompt for row in split.held_out}) == 10

    @pytest.mark.parametrize("share", [0.0, 1.0])
    def test_neither_side_is_empty_whatever_the_share(self, share: float) -> None:
        split = split_rows(different(10), share=share)
        assert split.train
        assert split.held_out

    def test_a_share_may_be_asked_for(self) -> None:
        assert len(split_rows(different(100), share=0.25).held_out) == 25

    @settings(max_examples=40)
    @given(groups, st.integers(0, 50))
    def test_no_more_is_held_out_than_asked_for_but_for_the_rarest_prompt(
        self, counts: list[int], seed: int
    ) -> None:
        split = split_rows(repeated(*counts), seed=seed)
        wanted = max(1, round(sum(counts) / 10))
        assert len(split.held_out) <= max(wanted, min(counts))

    @pytest.mark.parametrize("counts", [(99, 1), (1, 99), (40, 1, 1), (1, 40, 1), (1, 1, 40)])
    def test_a_prompt_that_most_rows_share_is_trained_on(self, counts: tuple[int, ...]) -> None:
        """Held out as a whole, it would leave next to nothing to train on."""
        split = split_rows(repeated(*counts))
        assert len(split.train) >= max(counts)

    def test_it_is_the_same_in_every_process(self) -> None:
        """The training process makes the split again: it must not depend on hashing or Python."""
        rows = different(40)
        assert lines(split_rows(rows).held_out) == [2, 8, 16, 18]
        assert lines(split_rows(rows, seed=7).held_out) != lines(split_rows(rows).held_out)

    def test_texts_are_split_by_their_text(self) -> None:
        rows = [Row(line=line, text="abcd"[line % 4]) for line in range(1, 41)]
        split = split_rows(rows)
        assert not {row.text for row in split.train} & {row.text for row in split.held_out}
        assert len(split.held_out) == 10

    def test_prompts_are_compared_with_all_that_came_before(self) -> None:
        """The same last question after another beginning is another prompt."""
        rows = [chat("a", "b", "go on", "c", line=1), chat("x", "y", "go on", "c", line=2)]
        split = split_rows(rows)
        assert len(split.train) == len(split.held_out) == 1

    @pytest.mark.parametrize("rows", [[], different(1), repeated(5)], ids=["none", "one", "alike"])
    def test_too_few_different_rows_are_told(self, rows: list[Row]) -> None:
        with pytest.raises(InputError, match="at least two different rows") as caught:
            split_rows(rows)
        assert "`--eval-data FILE`" in (caught.value.hint or "")


class TestMakeSplit:
    def test_without_a_held_out_file_the_data_is_split(self) -> None:
        rows = different(40)
        assert make_split(data_file(rows), None) == split_rows(rows)

    def test_with_one_all_rows_are_trained_on(self) -> None:
        """One row, or one prompt for all, is then enough."""
        train, held_out = repeated(5), different(3)
        split = make_split(data_file(train), data_file(held_out))
        assert (split.train, split.held_out) == (tuple(train), tuple(held_out))

    def test_of_a_large_one_the_first_rows_are_taken(self) -> None:
        split = make_split(data_file(different(2)), data_file(different(700)))
        assert lines(split.held_out) == list(range(1, 501))


class TestProfile:
    def test_the_training_rows_are_measured_with_the_model_s_tokenizer(self) -> None:
        pytest.importorskip("transformers")
        tokenizer = RowTokenizer(tiny_tokenizer(CHATML))
        rows = [chat("question?", "answer " * count, line=count) for count in (3, 1, 7, 2)]
        split = Split(train=tuple(rows[:3]), held_out=(rows[3],))
        told: list[int] = []
        profile = profile_data(data_file(rows), split, tokenizer, told.append)
        expected = [len(tokens.input_ids) for tokens in tokenizer.tokenize(rows[:3])]
        assert list(profile.lengths) == sorted(expected, reverse=True)
        assert profile.exact
        assert (profile.num_train_rows, profile.num_eval_rows) == (3, 1)
        assert (profile.num_usable_rows, profile.objective) == (4, "supervised")
        assert told == [3]

    def test_without_a_tokenizer_lengths_are_estimated_and_said_to_be(self) -> None:
        rows = different(20)
        split = split_rows(rows)
        profile = profile_data(data_file(rows), split, None)
        assert not profile.exact
        assert list(profile.lengths) == sorted(map(estimated_tokens, split.train), reverse=True)

    def test_an_estimate_counts_four_characters_a_token_and_the_template(self) -> None:
        assert estimated_tokens(Row(line=1, text="x" * 400)) == 105
        assert estimated_tokens(chat("x" * 200, "y" * 200)) == 110
        assert estimated_tokens(chat("x", "y")) > 1

    @settings(max_examples=40)
    @given(st.text(min_size=1), st.text(min_size=1), st.text(min_size=1))
    def test_an_estimate_grows_with_the_text(self, first: str, second: str, third: str) -> None:
        short = estimated_tokens(chat(first, second))
        assert 1 < short <= estimated_tokens(chat(first, second + third))
        assert short < estimated_tokens(chat(first, second, first, second))

    def test_what_was_left_out_is_told(self) -> None:
        rows = [*different(4), chat("question 1", "answer", line=5)]
        problems = (
            Problem(kind="no usable field", count=7, first_lines=(6, 7, 8, 9, 10)),
            Problem(kind="`output` is empty", count=1, first_lines=(13,)),
        )
        profile = profile_data(data_file(rows, problems), split_rows(rows), None)
        assert profile.warnings == (
            "7 of 13 rows left out: no usable field (line 6, 7, 8, 9, 10, ...)",
            "1 of 13 rows left out: `output` is empty (line 13)",
            "1 rows repeat an earlier row word for word",
        )
        assert (profile.duplicates, profile.problems) == (1, problems)

    def test_a_json_array_s_rows_are_counted_by_rows(self) -> None:
        rows = different(4)
        problems = (Problem(kind="no usable field", count=1, first_lines=(5,)),)
        data = structs.replace(data_file(rows, problems), unit="row")
        profile = profile_data(data, split_rows(rows), None)
        assert profile.warnings == ("1 of 5 rows left out: no usable field (row 5)",)

    def test_a_clean_file_makes_no_words(self) -> None:
        rows = different(10)
        assert profile_data(data_file(rows), split_rows(rows), None).warnings == ()

    def test_its_json_has_the_design_s_fields(self) -> None:
        rows = different(10)
        problems = (Problem(kind="no usable field", count=2, first_lines=(11, 12)),)
        profile = profile_data(data_file(rows, problems), split_rows(rows), None)
        told = json.loads(json.dumps(profile_to_dict(profile, 2048)))
        assert {
            "schema",
            "format",
            "objective",
            "num_rows",
            "num_usable_rows",
            "problems",
            "token_lengths",
            "max_length",
            "truncated_rows",
            "duplicates",
            "advice",
        } <= set(told)
        assert (told["num_rows"], told["num_usable_rows"], told["schema"]) == (12, 10, 1)
        assert told["problems"] == [
            {"kind": "no usable field", "count": 2, "first_lines": [11, 12]}
        ]
        assert set(told["token_lengths"]) == {"min", "median", "mean", "p95", "p99", "max", "exact"}
        assert all(set(item) == {"setting", "value", "why"} for item in told["advice"])
