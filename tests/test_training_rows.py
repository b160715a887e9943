"""Rows on their way into training: what was counted in the profile is what goes in."""

from __future__ import annotations

import itertools
import json
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the `train` extra")

from datasets import Dataset

from ftplan.launcher.data.data_file import DataFile, read_data
from ftplan.launcher.data.hashes import row_hashes
from ftplan.launcher.data.overlong import Rule
from ftplan.launcher.data.profiling import make_split, profile_data
from ftplan.launcher.data.tokens import RowTokenizer
from ftplan.launcher.training.config import DataConfig, TrainConfig
from ftplan.launcher.training.rows import RunRows, read_rows, remove_token_files
from ftplan.launcher.training.token_file import (
    COLUMNS,
    TokenFile,
    mapped,
    with_mismatched_answers,
)
from ftplan.planner.batching import training_order
from ftplan.planner.errors import InputError
from tests.launcher_fixtures import CHATML, tiny_tokenizer
from tests.sweeps import swept
from tests.test_data_tokens import FORGETFUL, NO_SYSTEM, TRIMMING

WORDS = ("the", "answer", "is", "here", "and", "the", "question", "is", "there")


def said(rng: random.Random, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def sft(rng: random.Random, number: int) -> dict[str, Any]:
    """Conversations of up to six turns, some with tools, some with a system message."""
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": said(rng, 8)})
    for turn in range(rng.randint(1, 6)):
        question = f"{number}.{turn} {said(rng, 30)}"
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": said(rng, 30)})
    return {"messages": messages}


def text(rng: random.Random, number: int) -> dict[str, Any]:
    return {"text": f"{number} {said(rng, 150)}"}


def pair(rng: random.Random, number: int) -> dict[str, Any]:
    row = {
        **{"prompt": f"{number} {said(rng, 60)}", "chosen": said(rng, 50)},
        **{"rejected": "no, " + said(rng, 50), "score": {"chosen": 5, "rejected": number % 5}},
    }
    if number % 7 == 0:  # whole conversations that begin alike
        asked = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": "What?"},
            {"role": "user", "content": "That."},
        ]
        row = {
            "chosen": [*asked, {"role": "assistant", "content": row["chosen"]}],
            "rejected": [*asked, {"role": "assistant", "content": row["rejected"]}],
            "score": row["score"],
        }
    return row


def labelled(rng: random.Random, number: int) -> dict[str, Any]:
    return {
        **{"prompt": f"{number} {said(rng, 60)}", "completion": said(rng, 50)},
        "label": number % 2 == 0,
    }


def short(rng: random.Random, number: int) -> dict[str, Any]:
    return {"prompt": f"{number}", "completion": said(rng, 120)}


ROWS: dict[str, Callable[[random.Random, int], dict[str, Any]]] = {
    **{"sft": sft, "text": text, "dpo": pair, "reward": pair, "chosen": pair, "kto": labelled},
    "short": short,
}
OBJECTIVES = {"text": "sft", "chosen": "sft", "short": "sft"}


def write(path: Path, kind: str, count: int) -> Path:
    rng = random.Random(kind)
    rows = (ROWS[kind](rng, number) for number in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def with_first_token() -> RowTokenizer:
    """Puts its first token before every text, as Llama's and Gemma's do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    bos = ("<|bos|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[bos]
    )
    return RowTokenizer(tokenizer)


TOKENIZERS: dict[str, Callable[[], RowTokenizer]] = {
    "chatml": lambda: RowTokenizer(tiny_tokenizer(CHATML)),
    "plain": lambda: RowTokenizer(tiny_tokenizer()),
    "first token": with_first_token,
    "trimming": lambda: RowTokenizer(tiny_tokenizer(TRIMMING)),
    "forgetful": lambda: RowTokenizer(tiny_tokenizer(FORGETFUL)),
    "no system": lambda: RowTokenizer(tiny_tokenizer(NO_SYSTEM)),
}


def planned(
    path: Path, tokenizer: RowTokenizer, objective: str, mode: str, limit: int, **more: Any
) -> tuple[DataFile, TrainConfig]:
    """The data as a plan reads it, and the run's configuration that follows."""
    rule = Rule(mode, limit)
    data = read_data([path], tokenizer=tokenizer, objective=objective, rule=rule, checks=False)
    split = make_split(data, None)
    settings = {
        **{"max_length": limit, "per_device_train_batch_size": 4, "seed": 1},
        "gradient_accumulation_steps": 2,
    }
    return data, TrainConfig(
        model="",
        data=DataConfig(files=(path,), sha256=data.sha256, columns={}),
        eval_data=None,
        test_share=0.0,
        overlong=mode,
        hashes=row_hashes(data, split, None, tokenizer),
        method="lora",
        method_settings={"objective": objective, "quantization": "none"},
        loss="stock",
        training_arguments={**settings, **more},
    )


CELLS = list(itertools.product(ROWS, TOKENIZERS, ("truncate", "drop", "split")))


@pytest.mark.parametrize(
    ("kind", "template", "mode"),
    swept(
        CELLS,
        [
            cell
            for cell in CELLS
            if "sft" in cell or "chatml" in cell or cell[1:] == ("first token", "split")
        ],
    ),
)
def test_what_was_counted_is_what_goes_into_training(
    kind: str, template: str, mode: str, tmp_path: Path
) -> None:
    """Rows, cut ones, tokens: each of both sides, and every row's length."""
    tokenizer, objective = TOKENIZERS[template](), OBJECTIVES.get(kind, kind)
    path = write(tmp_path / "rows.jsonl", kind, 120)
    for limit in (150, 80):
        data, config = planned(path, tokenizer, objective, mode, limit)
        profile = profile_data(data, make_split(data, None))
        rows = read_rows(config, tokenizer, tmp_path / "tokens")
        assert rows.train.counts == profile.train_counts
        assert rows.held_out.counts == profile.eval_counts
        assert sorted(rows.train.lengths, reverse=True) == list(profile.trained_lengths)
        assert len(rows.train.dataset) == profile.num_train_rows
        assert len(rows.held_out.dataset) == profile.num_eval_rows
        assert longest_of(rows.train.dataset, objective) <= limit
    counts = profile.train_counts
    assert counts.num_too_long > 0
    if kind != "chosen":  # of which some have several turns
        assert (counts.num_split > 0) == (mode == "split" and kind in ("sft", "text"))


def longest_of(dataset: Dataset, objective: str) -> int:
    """As the model sees rows; KTO's are cut when they are put together."""
    if objective == "kto":
        return 0
    prompts = dataset["prompt_ids"] if objective == "dpo" else [[]] * len(dataset)
    names = ("input_ids",) if objective == "sft" else ("chosen_ids", "rejected_ids")
    return max(
        len(prompt) + len(ids)
        for name in names
        for prompt, ids in zip(prompts, dataset[name], strict=True)
    )


@pytest.mark.parametrize("template", ["chatml", "plain", "first token", "trimming", "no system"])
def test_a_split_conversation_trains_each_answer_once(template: str, tmp_path: Path) -> None:
    """Where templates render earlier turns alike, whatever comes later."""
    tokenizer = TOKENIZERS[template]()
    path = write(tmp_path / "rows.jsonl", "sft", 60)
    answers = []
    for mode, limit in (("truncate", 4000), ("split", 200)):
        _, config = planned(path, tokenizer, "sft", mode, limit)
        rows = read_rows(config, tokenizer, tmp_path / "tokens")
        assert rows.train.counts.num_cut == 0
        assert (rows.train.counts.num_split > 10) == (mode == "split")
        answers.append(list(trained_runs(rows.train.dataset)))
    assert answers[0] == answers[1]


def trained_runs(dataset: Dataset) -> Iterator[list[int]]:
    """Stretches of tokens that carry loss: the answers."""
    for labels in dataset["labels"]:
        run: list[int] = []
        for label in [*labels, -100]:
            if label != -100:
                run.append(label)
            elif run:
                yield run
                run = []


@pytest.mark.parametrize("template", ["chatml", "first token"])
def test_a_split_text_loses_no_token(template: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[template]()
    path = write(tmp_path / "rows.jsonl", "text", 40)
    texts = []
    for mode, limit in (("truncate", 4000), ("split", 70)):
        _, config = planned(path, tokenizer, "sft", mode, limit)
        dataset = read_rows(config, tokenizer, tmp_path / "tokens").train.dataset
        first = len(tokenizer.first_token)
        texts.append([token for ids in dataset["input_ids"] for token in ids[first:]])
        assert all(ids[:first] == tokenizer.first_token for ids in dataset["input_ids"])
    assert texts[0] == texts[1]


def test_rows_that_are_too_long_all_the_same_are_refused(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["chatml"]()
    path = write(tmp_path / "rows.jsonl", "short", 40)
    _, config = planned(path, tokenizer, "sft", "refuse", 60)
    with pytest.raises(InputError, match="longer than 60 tokens"):
        read_rows(config, tokenizer, tmp_path / "tokens")


# --- what is checked before anything is trained


def changed(config: TrainConfig, **hashes: str) -> TrainConfig:
    from msgspec import structs

    return structs.replace(config, hashes=structs.replace(config.hashes, **hashes))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("reading_sha256", "columns or the objective"),
        ("split_sha256", "other rows are held out"),
        ("template_sha256", "template is another one"),
    ],
)
def test_a_run_that_is_not_the_planned_one_is_refused(name: str, said: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["chatml"]()
    _, config = planned(write(tmp_path / "rows.jsonl", "short", 30), tokenizer, "sft", "drop", 300)
    assert isinstance(read_rows(config, tokenizer, tmp_path / "tokens"), RunRows)
    with pytest.raises(InputError, match=said) as error:
        read_rows(changed(config, **{name: "0" * 64}), tokenizer, tmp_path / "tokens")
    assert error.value.hint and "plan again" in error.value.hint


def test_another_template_is_another_hash(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "short", 30)
    hashes = {
        name: planned(path, make(), "sft", "drop", 300)[1].hashes.template_sha256
        for name, make in TOKENIZERS.items()
    }
    assert len(set(hashes.values())) == len(hashes)


def test_the_split_s_hash_follows_the_rows_held_out_not_their_order(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["chatml"]()
    path = write(tmp_path / "rows.jsonl", "short", 30)
    first = planned(path, tokenizer, "sft", "drop", 300)[1].hashes
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(reversed(lines)))
    assert planned(path, tokenizer, "sft", "drop", 300)[1].hashes == first
    path.write_text("".join(lines[:15]))
    assert planned(path, tokenizer, "sft", "drop", 300)[1].hashes.split_sha256 != first.split_sha256


# --- files of tokens


def test_margins_are_kept_where_every_row_has_one(tmp_path: Path) -> None:
    rows = [{"chosen_ids": [1], "rejected_ids": [2], "margin": margin} for margin in (1.0, 0.5)]
    for number, batch in enumerate((rows, [*rows, {**rows[0], "margin": None}])):
        path = tmp_path / f"{number}.arrow"
        with TokenFile(path, COLUMNS["reward"]) as file:
            file.write(batch, [1] * len(batch))
        assert ("margin" in mapped(path).column_names) == (number == 0)


@pytest.mark.parametrize("num_rows", [1, 8, 9, 1100])
def test_mismatched_answers_are_trl_s(num_rows: int, tmp_path: Path) -> None:
    """A rotation within each micro-batch, as `add_kl_completion_ids` of TRL's KTOTrainer makes it
    of rows in the same order."""
    path, size = tmp_path / "rows.arrow", 4
    rows = [
        {"prompt_ids": [n], "completion_ids": [n] * (n % 5 + 1), "label": n % 2 == 0}
        for n in range(num_rows)
    ]
    with TokenFile(path, COLUMNS["kto"]) as file:
        file.write(rows, [2] * num_rows)
    order = training_order([len(row["completion_ids"]) for row in rows], size, 1, 0, 0)
    made = with_mismatched_answers(mapped(path), order, size, tmp_path / "paired.arrow")

    def rotated(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        answers = batch["completion_ids"]
        return {"KL_completion_ids": [answers[-1], *answers[:-1]]}

    theirs = Dataset.from_list([rows[n] for n in order]).map(rotated, batched=True, batch_size=size)
    assert made.to_list() == theirs.to_list()


def test_kto_s_rows_stand_in_the_order_of_training(tmp_path: Path) -> None:
    """All good answers before all bad ones in the file would else be trained so."""
    tokenizer = TOKENIZERS["chatml"]()
    path = write(tmp_path / "rows.jsonl", "kto", 200)
    lines = sorted(path.read_text().splitlines(keepends=True), key=lambda line: "true" in line)
    path.write_text("".join(lines))
    _, config = planned(path, tokenizer, "kto", "truncate", 300)
    train = read_rows(config, tokenizer, tmp_path / "tokens").train
    assert 20 < sum(train.dataset["label"][:90]) < 70
    assert max(train.lengths[:4]) == max(train.lengths)


def test_token_files_are_removed(tmp_path: Path) -> None:
    tokenizer, folder = TOKENIZERS["chatml"](), tmp_path / "tokens"
    _, config = planned(write(tmp_path / "rows.jsonl", "kto", 30), tokenizer, "kto", "drop", 300)
    read_rows(config, tokenizer, folder)
    (folder / "train-1.paired.arrow").write_bytes(b"of another process")
    remove_token_files(folder)
    assert [path.name for path in folder.iterdir()] == ["train-1.paired.arrow"]


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Four times the tokens: as lists of Python's integers they would take four times as much."""
    tokenizer = TOKENIZERS["chatml"]()
    answer = json.dumps({"prompt": "N", "completion": " ".join(WORDS * 30)})
    peaks = []
    for count in (500, 2000):
        path = tmp_path / f"{count}.jsonl"
        lines = (answer.replace('"N"', f'"{number}"') + "\n" for number in range(count))
        path.write_text("".join(lines))
        _, config = planned(path, tokenizer, "sft", "truncate", 8192)
        tracemalloc.start()
        rows = read_rows(config, tokenizer, tmp_path / "tokens")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert rows.train.counts.num_tokens > 200 * count
    assert peaks[1] < 1.5 * peaks[0]
