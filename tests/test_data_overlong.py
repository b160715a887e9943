"""Rows longer than `max_length`: what becomes of them, and that profile and training agree."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftplan.launcher import cli
from ftplan.launcher.data.data_file import DataFile, read_data
from ftplan.launcher.data.overlong import (
    Lengths,
    Pieces,
    Rule,
    Tally,
    text_pieces,
    text_sizes,
    turns_apart,
)
from ftplan.launcher.data.profiling import (
    check_lengths,
    left_out_for_length,
    make_split,
    profile_data,
    profile_to_dict,
)
from ftplan.launcher.data.rows import Message, Row
from ftplan.launcher.data.split import Split
from ftplan.launcher.data.tokens import RowTokenizer
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import InputError
from ftplan.planner.overlong import RowCounts, said_counts
from ftplan.planner.run_time import optimizer_steps
from ftplan.profiles import require_model
from tests.launcher_fixtures import CHATML, chat, tiny_tokenizer

pytest.importorskip("transformers")

Write = Callable[..., Path]

WORDS = "the answer is here and the question is there "


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*rows: Any, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def asked(number: int, words: int = 1) -> dict[str, str]:
    return {"prompt": f"question {number}", "completion": WORDS * words}


def read(path: Path, mode: str, limit: int | None, **more: Any) -> DataFile:
    tokenizer = RowTokenizer(tiny_tokenizer(CHATML))
    return read_data([path], tokenizer=tokenizer, rule=Rule(mode, limit), checks=False, **more)


def profile_of(path: Path, mode: str, limit: int | None) -> DataProfile:
    data = read(path, mode, limit)
    return profile_data(data, make_split(data, None))


# --- one row


def take(mode: str, limit: int | None, *pieces: Lengths) -> tuple[list[int], RowCounts]:
    tally = Tally(Rule(mode, limit))
    whole = Lengths(sum(piece.tokens for piece in pieces), 0, pieces[0].first)
    return tally.take(whole, pieces), tally.counts


def test_a_row_that_is_not_too_long_is_left_as_it_is() -> None:
    for mode in ("truncate", "drop", "split", "refuse"):
        left, counts = take(mode, 10, Lengths(10, 4, 6))
        assert left == [10] and not counts.changes and counts.num_tokens == 10


def test_the_end_of_a_longer_one_is_cut_off() -> None:
    left, counts = take("truncate", 10, Lengths(13, 4, 6))
    assert left == [10] and (counts.num_cut, counts.num_cut_tokens) == (1, 3)


@pytest.mark.parametrize(("first", "left"), [(9, [10]), (10, [0]), (12, [0])])
def test_a_row_of_which_no_answer_is_left_is_left_out(first: int, left: list[int]) -> None:
    found, counts = take("truncate", 10, Lengths(13, 13 - first, first))
    assert found == left and counts.num_without_answer == (left == [0])


def test_a_row_that_has_never_an_answer_is_left_out_at_any_length() -> None:
    found, counts = take("truncate", None, Lengths(5, 0, 5))
    assert found == [0] and counts.num_without_answer == 1 and not counts.num_too_long


def test_drop_leaves_longer_rows_out_whole() -> None:
    left, counts = take("drop", 10, Lengths(13, 4, 6))
    assert left == [0] and (counts.num_dropped, counts.num_cut) == (1, 0)


def test_pieces_that_are_still_too_long_are_cut() -> None:
    left, counts = take("split", 10, Lengths(8, 4, 4), Lengths(14, 9, 5), Lengths(12, 1, 11))
    assert left == [8, 10, 0]
    assert counts == RowCounts(
        num_rows=1,
        num_too_long=1,
        num_split=1,
        num_pieces=3,
        num_cut=1,
        num_cut_tokens=4,
        num_without_answer=1,
        num_rows_left=2,
        num_tokens=18,
    )


# --- plain text


@given(st.integers(1, 5000), st.integers(0, 1), st.integers(2, 300))
def test_a_text_is_split_without_loss_into_as_few_parts_as_hold_it(
    text: int, opening: int, limit: int
) -> None:
    sizes = text_sizes(opening + text, opening, limit)
    assert sum(sizes) == text
    assert max(sizes) <= limit - opening and max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-text // (limit - opening))


def test_where_the_opening_takes_all_room_a_text_stays_whole() -> None:
    assert text_pieces(Lengths(9, 8, 1), 1, 1) == [Lengths(9, 8, 1)]


# --- conversations


def spoken(row: Row) -> int:
    """A length: the characters of all messages."""
    return sum(len(message.content) for message in row.messages)


turns = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 30), st.booleans()), min_size=1, max_size=9
)


@given(turns, st.booleans(), st.integers(5, 80))
def test_each_answer_is_in_one_part_behind_its_question_and_the_system_message(
    lengths: list[tuple[int, int, bool]], has_system: bool, limit: int
) -> None:
    messages: list[Message] = [Message("system", "sys")] if has_system else []
    for number, (question, answer, calls) in enumerate(lengths):
        messages.append(Message("user", chr(97 + number) * question))
        if calls:
            messages += [Message("assistant", "call", ({},)), Message("tool", "result")]
        messages.append(Message("assistant", chr(97 + number) * answer))
    row = Row(number=1, messages=tuple(messages))
    pieces = turns_apart(row, limit, spoken)
    rejoined = [message for piece in pieces for message in piece.messages[has_system:]]
    assert rejoined == messages[has_system:]
    for piece in pieces:
        assert piece.messages[:has_system] == row.messages[:has_system]
        assert piece.messages[has_system].role == "user"
        assert piece.messages[-1].role == "assistant"
        questions = sum(message.role == "user" for message in piece.messages)
        assert spoken(piece) <= limit or questions == 1, "only a single turn may be too long"
    for piece, following in itertools.pairwise(pieces):
        turn = following.messages[has_system:]
        end = next((n for n, m in enumerate(turn) if n and m.role == "user"), len(turn))
        joined = Row(number=1, messages=(*piece.messages, *turn[:end]))
        assert spoken(joined) > limit, "the next turn had no room"


@given(st.lists(st.lists(st.tuples(st.integers(1, 99), st.integers(0, 99)), max_size=4)))
def test_pieces_of_two_parts_of_a_file_are_those_of_the_whole(
    rows: list[list[tuple[int, int]]],
) -> None:
    whole, first, second = Pieces(), Pieces(), Pieces()
    middle = len(rows) // 2
    for number, each in enumerate(rows):
        lengths = [Lengths(first + more, more, first) for first, more in each]
        whole.add(number, lengths)
        if number < middle:
            first.add(number, lengths)
        else:
            second.add(number - middle, lengths)
    first.merge(second, rows_before=middle)
    assert first.by_row() == whole.by_row()
    assert [len(found) for found in whole.by_row().values()] == [len(each) for each in rows]


# --- files


def test_rows_are_counted_on_both_sides_of_the_split(write: Write) -> None:
    path = write(*[asked(n, words=1 + 20 * (n % 4 == 0)) for n in range(40)])
    profile = profile_of(path, "truncate", 100)
    trained, held_out = profile.train_counts, profile.eval_counts
    assert trained.num_rows + held_out.num_rows == 40
    assert trained.num_too_long + held_out.num_too_long == 10
    assert trained.num_cut == trained.num_too_long
    assert max(profile.trained_lengths) == 100 < max(profile.lengths) == profile.longest
    assert profile.trained_lengths[: trained.num_cut + 1].count(100) == trained.num_cut
    assert trained.num_tokens == sum(profile.trained_lengths)


def test_dropped_rows_are_no_steps(write: Write, devices: dict[str, Any]) -> None:
    from ftplan.planner.plan import TrainingPlan

    path = write(*[asked(n, words=1 + 20 * (n % 2)) for n in range(80)])
    plan = TrainingPlan(max_length=100)
    steps = {}
    for mode in ("truncate", "drop"):
        profile = profile_of(path, mode, 100)
        steps[mode] = optimizer_steps(plan, profile.num_train_rows)
    assert steps["truncate"] == 72 and steps["drop"] == 72 - profile.train_counts.num_dropped
    assert profile.train_counts.num_dropped + profile.eval_counts.num_dropped == 40
    assert profile.num_eval_rows == 8 - profile.eval_counts.num_dropped


def test_split_texts_are_more_rows(write: Write) -> None:
    path = write(*[{"text": f"{n} " + WORDS * (1 + 20 * (n % 2))} for n in range(40)])
    whole, split = profile_of(path, "truncate", None), profile_of(path, "split", 100)
    counts = split.train_counts
    assert counts.num_split == counts.num_too_long > 10 and counts.num_cut == 0
    assert split.num_train_rows == whole.num_train_rows - counts.num_split + counts.num_pieces
    assert sum(split.trained_lengths) == sum(whole.lengths), "no token is lost"
    assert max(split.trained_lengths) <= 100


def test_what_cannot_be_split_is_cut_and_said(write: Write) -> None:
    pairs = [
        {"prompt": f"q {n}", "chosen": WORDS * (1 + 9 * (n % 2)), "rejected": "no"}
        for n in range(20)
    ]
    profile = profile_of(write(*pairs), "split", 60)
    assert profile.train_counts.num_split == 0
    assert profile.train_counts.num_cut == profile.train_counts.num_too_long > 0
    said = {problem.kind: problem for problem in profile.problems}
    assert "not split" in said["longer than 60 tokens, cut off there"].advice


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("truncate", {4: "no answer within 100 tokens"}),
        ("drop", {4: "longer than 100 tokens", 6: "longer than 100 tokens"}),
    ],
)
def test_rows_left_out_are_listed_with_why(
    mode: str, expected: dict[int, str], write: Write
) -> None:
    rows = [asked(n) for n in range(20)]
    rows[3] = {"prompt": WORDS * 40, "completion": "yes"}
    rows[5] = asked(5, words=40)
    data = read(write(*rows), mode, 100)
    listed = list(left_out_for_length(data, data.fate(lambda group: True)))
    assert listed == [((0, number), why) for number, why in expected.items()]
    problems = profile_data(data, make_split(data, None)).problems
    told = [line for p in problems if p.left_out for line in p.first_lines]
    assert sorted(told) == list(expected)


def test_refuse_says_how_many_where_and_what_to_do(write: Write) -> None:
    data = read(write(*[asked(n, words=1 + 20 * (n in (4, 6))) for n in range(20)]), "refuse", 100)
    with pytest.raises(InputError, match=r"2 rows are longer than 100 tokens \(line 5, 7\)") as e:
        check_lengths(data, Split(), data, strict=False)
    assert e.value.hint and "--max-length" in e.value.hint and "--overlong" in e.value.hint
    assert e.value.exit_status == 2


def test_strict_lets_no_row_be_left_out_for_its_length(write: Write) -> None:
    path = write(*[asked(n, words=1 + 20 * (n == 4)) for n in range(20)])
    check_lengths(read(path, "truncate", 100), Split(), None, strict=True)
    dropping = read(path, "drop", 100)
    with pytest.raises(InputError, match=r"1 row would be left out .* \(line 5\)"):
        check_lengths(dropping, Split(), None, strict=True)


def test_nothing_left_to_train_on_or_to_hold_out_is_an_error(write: Write) -> None:
    path = write(*[asked(n, words=20) for n in range(20)])
    with pytest.raises(InputError, match="no row is left to train on at 100 tokens"):
        profile_of(path, "drop", 100)
    data = read(write(*[asked(n) for n in range(9)]), "drop", 100)
    held_out = read(write(asked(1, words=20), name="held.jsonl"), "drop", 100)
    with pytest.raises(InputError, match="no held-out row is left"):
        profile_data(data, Split(), held_out)


def test_of_a_file_of_held_out_rows_the_first_count(write: Write) -> None:
    data = read(write(*[asked(n) for n in range(9)]), "truncate", None)
    held_out = read(write(*[asked(n) for n in range(600)], name="held.jsonl"), "truncate", None)
    assert profile_data(data, Split(), held_out).num_eval_rows == 500


def test_pairs_among_answers_are_measured_as_the_answers_that_are_trained(write: Write) -> None:
    pair = {"prompt": "question 99", "chosen": "yes", "rejected": WORDS * 40}
    data = read(write(*[asked(n) for n in range(9)], pair), "truncate", None)
    assert data.objective == "sft" and max(data.survey.tokens) < 100
    alone = read(write(pair), "truncate", None)
    assert alone.objective == "dpo" and max(alone.survey.tokens) > 100


def test_the_json_of_data_has_the_counts(write: Write) -> None:
    path = write(*[asked(n, words=1 + 20 * (n % 4 == 0)) for n in range(40)])
    model = require_model("smollm2-135m").spec
    told = profile_to_dict(profile_of(path, "drop", 100), model, 100)
    assert told["max_length"] == told["overlong"]["max_length"] == 100
    assert told["overlong"]["mode"] == "drop" and told["truncated_rows"] == 0
    assert (
        told["overlong"]["train"]["num_dropped"] + told["overlong"]["held_out"]["num_dropped"] == 10
    )
    assert json.dumps(told)


def test_what_is_said_of_counts_names_all_that_happened() -> None:
    assert said_counts(RowCounts(num_rows=5, num_rows_left=5), 100) == ""
    counts = RowCounts(
        num_rows=9,
        num_too_long=4,
        num_split=2,
        num_pieces=6,
        num_cut=1,
        num_cut_tokens=30,
        num_without_answer=1,
        num_rows_left=12,
    )
    assert said_counts(counts, 100) == (
        "4 of 9 rows longer than 100 tokens: 2 made into 6, 1 cut by 30 tokens, "
        "1 without an answer left, left out"
    )


class TestCommand:
    @pytest.fixture
    def path(self, write: Write) -> Path:
        return write(*[asked(n, words=1 + 200 * (n == 4)) for n in range(20)])

    def run(self, capsys: pytest.CaptureFixture[str], *words: str) -> SimpleNamespace:
        status = cli.main(["data", *words])
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=" ".join(err.split()))

    def test_data_shows_what_a_length_would_do(
        self, path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Lengths are the tokenizer's where one is at hand, else estimated; both go over 400."""
        done = self.run(capsys, str(path), "--max-length", "400", "--overlong", "drop", "--json")
        assert done.status == 0
        told = json.loads(done.out)["overlong"]
        assert told["train"]["num_dropped"] + told["held_out"]["num_dropped"] == 1
        done = self.run(capsys, str(path), "--max-length", "400", "--overlong", "drop")
        assert "longer than 400 tokens" in " ".join(done.out.split())

    def test_refuse_is_exit_status_2(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        done = self.run(capsys, str(path), "--max-length", "400", "--overlong", "refuse")
        assert done.status == 2 and "1 row is longer than 400 tokens (line 5)" in done.err

    def test_another_word_is_answered_with_the_known_ones(
        self, path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        done = self.run(capsys, str(path), "--overlong", "trucate")
        assert done.status == 2 and "truncate" in done.err


def test_a_conversation_of_several_turns_is_measured_part_by_part(write: Write) -> None:
    turn = [
        {"role": "user", "content": WORDS * 2},
        {"role": "assistant", "content": WORDS * 2},
    ]
    system = {"role": "system", "content": "Be brief."}
    path = write(*[{"messages": [system, *turn * (1 + n % 5)]} for n in range(20)])
    data = read(path, "split", 120)
    fate = data.fate(lambda group: True)
    tokenizer = RowTokenizer(tiny_tokenizer(CHATML))
    single = chat(WORDS * 2, WORDS * 2, system="Be brief.")
    (one,) = tokenizer.tokenize([single])
    assert len(one.input_ids) <= 120 < 2 * len(one.input_ids) - 20
    assert fate.counts.num_cut == fate.counts.num_without_answer == 0
    assert fate.counts.num_split == sum(n % 5 > 0 for n in range(20))
    assert set(fate.left) <= set(range(len(one.input_ids), 121))
