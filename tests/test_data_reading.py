"""Files of rows, read once: what they are for, what is left out, what a plan is told."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftplan.launcher import cli
from ftplan.launcher.data import data_file
from ftplan.launcher.data.asked import DataAsked, checked_share, read_columns
from ftplan.launcher.data.data_file import DataFile, read_data
from ftplan.launcher.data.profiling import make_split, profile_data, profile_to_dict
from ftplan.launcher.data.rows import Message
from ftplan.launcher.data.split import Split, rows_of
from ftplan.launcher.data.survey import RowMeasure, estimated_tokens
from ftplan.launcher.data.tokens import RowTokenizer
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import FtplanError, InputError
from ftplan.profiles import require_model
from tests.launcher_fixtures import CHATML, chat, tiny_tokenizer

Write = Callable[..., Path]

PAIR = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*rows: Any, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


def asked(number: int, **more: Any) -> dict[str, Any]:
    return {"instruction": f"question {number}", "output": f"answer {number}", **more}


def left_out(data: DataFile) -> dict[str, tuple[int, str]]:
    return {kind: (trouble.count, data.where(trouble)) for kind, trouble in data.troubles.items()}


class TestWhatAFileIsFor:
    @pytest.mark.parametrize(
        ("row", "shape", "kind", "objective"),
        [
            (asked(1), "instruction", "supervised", "sft"),
            ({"task": "t", "input": "a", "output": "b"}, "multi-task", "multi-task", "sft"),
            ({"text": "words"}, "text", "pretraining", "sft"),
            (PAIR, "preference", "preference", "dpo"),
            ({"prompt": "a", "completion": "b", "label": True}, "labelled", "kto", "kto"),
            ({"prompt": "a"}, "prompt", "online", "grpo"),
        ],
    )
    def test_it_follows_from_the_rows(
        self, write: Write, row: dict[str, Any], shape: str, kind: str, objective: str
    ) -> None:
        data = read_data([write(row, row)])
        assert (data.format, data.kind, data.objective) == (shape, kind, objective)
        assert data.num_rows == 2 and len(list(data.rows())) == 2

    def test_most_rows_decide_and_the_others_are_left_out(self, write: Write) -> None:
        labelled = {"prompt": "a", "completion": "b", "label": False}
        data = read_data([write(asked(1), labelled, asked(2), {"instruction": "alone"}, asked(3))])
        assert data.objective == "sft"
        assert left_out(data) == {
            "a row for something else: labelled, most are instruction": (1, "line 2"),
            "no answer": (1, "line 4"),
        }
        assert [row.number for row in data.rows()] == [1, 3, 5]
        assert len(data.groups()) == 3
        assert dict(data.left_out()) == {
            (0, 2): "a row for something else: labelled, most are instruction",
            (0, 4): "no answer",
        }

    def test_shapes_that_train_alike_may_be_mixed(self, write: Write) -> None:
        data = read_data(
            [write(asked(1), asked(2), {"text": "words"}, {"prompt": "a", "answer": "b"})]
        )
        assert not data.troubles and len(list(data.rows())) == 4

    def test_pairs_train_a_reward_model_or_their_chosen_answers_on_request(
        self, write: Write
    ) -> None:
        path = write({**PAIR, "score": {"chosen": 5, "rejected": 1}}, PAIR)
        assert read_data([path], objective="reward").objective == "reward"
        assert read_data([path], objective="sft").objective == "sft"
        assert read_data([path]).survey.num_margins == 1

    def test_rows_that_cannot_train_what_was_asked_for_are_refused(self, write: Write) -> None:
        with pytest.raises(InputError, match="no row can train `dpo`: most are instruction") as e:
            read_data([write(asked(1))], objective="dpo")
        assert "such rows train `sft`" in e.value.hint

    def test_two_readings_are_told(self, write: Write) -> None:
        rows = [asked(n, text="### Instruction ...") for n in range(3)]
        (note,) = read_data([write(*rows)]).notes()
        assert note == (
            "rows could be read as text, too; they are read as instruction, which takes more of "
            "their fields (`--columns output=` reads them as text)"
        )


class TestRowsThatAreLeftOut:
    def test_each_row_is_left_out_for_the_reason_that_is_counted(self, write: Write) -> None:
        """What is wrong with a row is told before what else it could have trained."""
        data = read_data([write(PAIR, PAIR, {"input": 1}, {"prompt": "a"}, {"messages": ["b"]})])
        each: dict[str, int] = {}
        for _, why in data.left_out():
            each[why] = each.get(why, 0) + 1
        assert each == {kind: count for kind, (count, _) in left_out(data).items()}
        assert "`input` is not text" in each

    def test_each_kind_with_its_lines(self, write: Write) -> None:
        """One of each kind that a file can have, among rows that are fine."""
        bad = {
            "not a JSON object": [1],
            "no usable field": {"id": 1},
            "`output` is empty": {"instruction": "a", "output": " "},
            "`output` is not text": {"instruction": "a", "output": 4},
            "no answer": {"instruction": "a"},
            "user and assistant do not take turns": {
                "messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
            },
            "the chosen answer is the rejected one": {**PAIR, "rejected": "4"},
            "half a character (a lone surrogate)": '{"instruction": "a", "output": "\\ud83d"}',
        }
        rows: list[Any] = []
        for number, row in enumerate(bad.values()):
            rows += [asked(number), row]
        found = left_out(read_data([write(*rows, *[asked(90 + n) for n in range(9)])]))
        assert found == {
            kind: (1, f"line {2 * number}") for number, kind in enumerate(bad, start=1)
        }

    def test_broken_json_costs_its_own_row(self, write: Write) -> None:
        data = read_data([write(asked(1), '{"instruction": "a", "output":', asked(2))])
        (kind,) = data.troubles
        assert "broken" in kind or "JSON" in kind
        assert data.where(data.troubles[kind]) == "line 2"
        assert [row.number for row in data.rows()] == [1, 3]

    def test_several_files_say_which(self, write: Write, tmp_path: Path) -> None:
        one, two = write(asked(1), {"id": 1}, name="a.jsonl"), write(asked(2), name="b.jsonl")
        data = read_data([one, two])
        assert left_out(data) == {"no usable field": (1, "line 2 of a.jsonl")}
        assert [(row.file, row.number) for row in data.rows()] == [(0, 1), (1, 1)]

    def test_a_file_without_a_usable_row_is_an_error(self, write: Write) -> None:
        with pytest.raises(InputError, match="none of its 2 rows can be trained on") as raised:
            read_data([write({"a": 1}, {"b": 2})])
        assert "`--columns instruction=NAME,output=NAME`" in raised.value.hint

    def test_columns_of_ones_own(self, write: Write) -> None:
        path = write({"q": "2 + 2?", "a": "4"}, {"q": "3 + 3?", "a": "6"})
        rows = list(read_data([path], columns={"instruction": "q", "output": "a"}).rows())
        assert rows[0].messages == (Message("user", "2 + 2?"), Message("assistant", "4"))


class TestWhatWasAsked:
    def test_columns(self) -> None:
        assert read_columns(" instruction=q, output = a") == {"instruction": "q", "output": "a"}
        assert read_columns(None) == {}
        with pytest.raises(FtplanError, match="unknown field of a row `answr`"):
            read_columns("answr=a")
        with pytest.raises(InputError, match="does not name pairs"):
            read_columns("instruction")

    def test_shares(self) -> None:
        assert checked_share(0.05) == 0.05
        for share in (-0.1, 0.6, float("nan")):
            with pytest.raises(InputError, match="is not between 0 and"):
                checked_share(share)

    def test_strict_refuses_what_would_be_left_out(self, write: Write) -> None:
        path = str(write(asked(1), {"id": 1}, asked(2), {"id": 2}))
        with pytest.raises(InputError, match=r"2 of 4 rows would be left out: no usable field"):
            DataAsked(paths=(path,), strict=True).read(Ui(), None)
        assert DataAsked(paths=(path,)).read(Ui(), None)[0].num_rows == 4

    def test_a_missing_file_is_told_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(InputError):
            DataAsked(paths=(str(tmp_path / "nowhere.jsonl"),)).check()


class TestSideBySide:
    def test_parts_find_what_one_pass_finds(
        self, write: Write, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(data_file, "_BYTES_FOR_PROCESSES", 1)
        monkeypatch.setattr("ftplan.launcher.data.streams.BLOCK_BYTES", 4096)
        rows: list[Any] = [asked(n, input="word " * (n % 50)) for n in range(4000)]
        rows[700] = rows[3200] = {"id": 1}
        rows[10] = rows[3990] = asked(5, input="word " * 5)
        path, told = write(*rows), [0, 0]

        def read(processes: int) -> DataFile:
            def progress(num_bytes: int) -> None:
                told[processes - 1] += num_bytes

            tokenizer = RowTokenizer(tiny_tokenizer(CHATML))
            return read_data([path], tokenizer=tokenizer, progress=progress, processes=processes)

        one, two = read(1), read(2)
        for name in ("num_rows", "numbers", "groups", "shapes", "tokens", "trained"):
            assert getattr(one.survey, name) == getattr(two.survey, name)
        assert left_out(one) == left_out(two) == {"no usable field": (2, "line 701, 3201")}
        assert one.odd_rows() == two.odd_rows()
        assert one.sha256 == two.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert told == [path.stat().st_size] * 2


class TestMeasures:
    def test_lengths_are_the_tokenizers(self, write: Write) -> None:
        rows = [asked(n, input="word " * n, system="Be brief.") for n in range(20)]
        rows += [{"text": "plain words " * n} for n in range(1, 9)]
        tokenizer = RowTokenizer(tiny_tokenizer(CHATML))
        data = read_data([write(*rows)], tokenizer=tokenizer)
        expected = list(tokenizer.tokenize(list(data.rows())))
        assert list(data.survey.tokens) == [len(row.input_ids) for row in expected]
        assert list(data.survey.trained) == [sum(row.completion_mask) for row in expected]
        assert data.exact

    def test_of_a_pair_the_longer_answer_counts(self) -> None:
        tokenizer = RowTokenizer(tiny_tokenizer(CHATML))
        short, long = Message("assistant", "no"), Message("assistant", "no " * 40)
        from ftplan.launcher.data.rows import Row

        question = (Message("user", "why?"),)
        pair = Row(number=1, messages=question, chosen=(short,), rejected=(long,))
        (measured,) = RowMeasure(tokenizer).lengths([pair])
        (alone,) = tokenizer.tokenize([Row(number=1, messages=(*question, long))])
        assert measured.tokens == len(alone.input_ids)
        assert estimated_tokens(pair) > 40 * 3 / 4

    def test_without_a_tokenizer_characters_are_counted(self, write: Write) -> None:
        data = read_data([write({"text": "x" * 400})])
        assert list(data.survey.tokens) == [105] and not data.exact
        short, long = estimated_tokens(chat("a", "b")), estimated_tokens(chat("a", "b" * 100))
        assert 1 < short < long


class TestProfile:
    def profile(self, data: DataFile, test_share: float = 0.0) -> Any:
        return profile_data(data, make_split(data, None, test_share))

    def test_rows_are_counted_on_each_side(self, write: Write) -> None:
        data = read_data([write(*[asked(n) for n in range(100)], {"id": 1})])
        profile = self.profile(data, test_share=0.05)
        assert (profile.num_rows, profile.num_usable_rows) == (101, 100)
        assert (profile.num_train_rows, profile.num_eval_rows, profile.num_test_rows) == (85, 10, 5)
        assert profile.total_tokens == sum(profile.lengths)
        assert 0 < profile.trained_tokens < profile.total_tokens

    def test_a_file_of_held_out_rows_leaves_all_to_train_on(self, write: Write) -> None:
        data = read_data([write(*[asked(n) for n in range(9)])])
        held_out = read_data([write(*[asked(n) for n in range(50, 53)], name="held.jsonl")])
        assert make_split(data, held_out) == Split()
        profile = profile_data(data, Split(), held_out)
        assert (profile.num_train_rows, profile.num_eval_rows) == (9, 3)

    def test_held_out_rows_that_are_trained_on_are_told(self, write: Write) -> None:
        data = read_data([write(*[asked(n) for n in range(9)])])
        held_out = read_data([write(asked(50), asked(3), asked(51), name="held.jsonl")])
        problems = profile_data(data, Split(), held_out).problems
        assert [(p.kind, p.where) for p in problems] == [
            ("a held-out row that is trained on", "line 2")
        ]

    def test_what_is_wrong_is_told_with_where_and_what_to_do(self, write: Write) -> None:
        rows = [asked(n) for n in range(40)]
        rows[20] = rows[3]
        profile = self.profile(read_data([write(*rows, {"id": 1}, {"id": 2})]))
        assert "2 of 42 rows left out: no usable field (line 41, 42)" in profile.warnings
        (again,) = (p for p in profile.problems if p.kind == "repeats an earlier row")
        assert (again.count, again.first_lines, again.where) == (1, (21,), "line 21")
        assert not again.left_out and again.advice and profile.duplicates == 1

    def test_its_json_has_the_designs_fields_and_more(self, write: Write) -> None:
        rows = [
            {"task": "t" if n % 3 else "u", "input": f"i {n}", "output": "o"} for n in range(30)
        ]
        told = json.loads(
            json.dumps(
                profile_to_dict(
                    self.profile(read_data([write(*rows)])), require_model("smollm2-135m").spec
                )
            )
        )
        assert {
            *("schema", "format", "objective", "num_rows", "num_usable_rows", "problems"),
            *("token_lengths", "max_length", "truncated_rows", "duplicates", "advice"),
        } <= set(told)
        assert set(told["token_lengths"]) == {"min", "median", "mean", "p95", "p99", "max", "exact"}
        assert all(set(item) == {"setting", "value", "why"} for item in told["advice"])
        advice = {item["setting"]: item["value"] for item in told["advice"]}
        assert advice["model"] == "chat" and advice["validation_rows"] == 3
        assert set(told["tasks"]) == {"t", "u"} and advice["task_weighting"] == "temperature"
        assert told["by_max_length"][-1]["cut_rows"] == 0

    def test_a_clean_file_makes_no_words(self, write: Write) -> None:
        texts = ("The sea is cold.", "Bread needs time.", "Two and two are four.", "Birds fly far.")
        rows = [{"prompt": f"Say something about {t[:9]}", "completion": t} for t in texts]
        assert self.profile(read_data([write(*rows)])).warnings == ()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of very different lengths."""
    path, rng = tmp_path_factory.mktemp("large") / "rows.jsonl", random.Random(1)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(12_000):
            text = "word " * round(rng.lognormvariate(4.5, 1))
            file.write(json.dumps({"text": f"{number} {text}"}) + "\n")
            if number % 1000 == 7:
                file.write('{"text": broken\n')
    assert path.stat().st_size > 4 * 2**20
    return path


class TestSample:
    def test_estimates_are_within_their_errors(
        self, large: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(data_file, "LEAST_BYTES", 0)
        whole, part = read_data([large]), read_data([large], sample=2000)
        sample = part.sample
        assert sample is not None and 1500 < sample.num_sampled <= 2000
        truth = {
            "rows": len(whole.survey.tokens),
            "mean_tokens": sum(whole.survey.tokens) / len(whole.survey.tokens),
            "total_tokens": sum(whole.survey.tokens),
        }
        for name, value in truth.items():
            estimate = getattr(sample, name)
            assert abs(estimate.value - value) < 4 * estimate.standard_error, name
            assert 0 < estimate.standard_error < 0.06 * value, name
        profile = profile_data(part, Split())
        assert profile.num_rows == pytest.approx(whole.num_rows, rel=0.1)
        assert profile.total_tokens == pytest.approx(truth["total_tokens"], rel=0.1)
        assert profile.cut_rows(100) == pytest.approx(
            profile_data(whole, Split()).cut_rows(100), rel=0.15
        )

    def test_problems_are_named_by_their_bytes(
        self, large: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(data_file, "LEAST_BYTES", 0)
        part = read_data([large], sample=11_000)
        (trouble,) = part.troubles.values()
        assert part.where(trouble).startswith("byte ")
        content = large.read_bytes()
        for _, begin in trouble.first:
            assert content[begin:].startswith(b'{"text": broken')

    def test_small_files_are_read_whole(self, write: Write) -> None:
        assert read_data([write(*[asked(n) for n in range(9)])], sample=5).sample is None

    def test_what_cannot_be_sampled_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(data_file, "LEAST_BYTES", 0)
        (tmp_path / "rows.csv").write_text("text\nwords\n")
        with pytest.raises(InputError, match=r"cannot be sampled \(CSV\)"):
            read_data([tmp_path / "rows.csv"], sample=100)

    def test_too_small_a_sample_is_refused(self, large: Path) -> None:
        assert cli.main(["data", str(large), "--sample", "5"]) == 2


class TestCommand:
    def test_it_prints_what_it_found(
        self, write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("XDG_CACHE_HOME", "/nowhere")
        path = write(*[asked(n) for n in range(60)], {"id": 1})
        assert cli.main(["data", str(path)]) == 0
        shown = capsys.readouterr()
        for said in ("instruction, for supervised training", "Rows by tokens", "no usable field"):
            assert said in shown.out
        assert cli.main(["data", str(path), "--json", "--test-share", "0.1"]) == 0
        assert json.loads(capsys.readouterr().out)["num_test_rows"] == 6
        assert cli.main(["data", str(path), "--strict"]) == 2
        assert "1 of 61 rows would be left out" in capsys.readouterr().err

    def test_the_histogram_is_drawn(
        self, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("matplotlib", reason="needs the `train` extra")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("XDG_CACHE_HOME", "/nowhere")
        path, plot = write(*[asked(n) for n in range(60)]), tmp_path / "lengths.png"
        assert cli.main(["data", str(path), "--plot", str(plot)]) == 0
        assert plot.read_bytes().startswith(b"\x89PNG")


def test_split_counts_are_those_of_the_rows_that_training_reads(write: Write) -> None:
    data = read_data([write(*[asked(n % 50) for n in range(100)])])
    split = make_split(data, None)
    train = list(data.rows(split.trains))
    held_out = list(data.rows(lambda group: group in split.held_out))
    assert (len(train), len(held_out), 0) == rows_of(data.groups(), split)
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}
