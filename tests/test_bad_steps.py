"""NaN and exploding losses: what is skipped, what is said, and when a run ends."""

from __future__ import annotations

import json
import math
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the `train` extra")

from ftplan.launcher.launching import write_run
from ftplan.launcher.notices import Notices
from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.training import loop
from ftplan.launcher.training.bad_steps import StepGuard
from ftplan.launcher.ui import Ui
from ftplan.planner.bad_steps import (
    EXPLODED_STEPS,
    FEWEST_STEPS,
    SKIPPED_IN_A_ROW,
    SKIPPED_OF_LAST,
    Circumstances,
    LossLevel,
    SkipCount,
    remedies,
)
from ftplan.planner.errors import RunFailedError
from tests.launcher_fixtures import save_tiny_llama
from tests.test_training import planned

train = pytest.mark.train

CIRCUMSTANCES = Circumstances(
    mixed_precision="no", dtype="float32", learning_rate=2e-4, max_grad_norm=1.0
)


def test_a_few_skips_in_a_row_end_a_run_and_scattered_ones_do_only_when_they_are_many() -> None:
    count = SkipCount()
    for _ in range(SKIPPED_IN_A_ROW - 1):
        count.add(skipped=True)
        assert count.verdict() == ""
    count.add(skipped=True)
    assert count.verdict() == f"in {SKIPPED_IN_A_ROW} steps in a row"
    count, (many, window) = SkipCount(), SKIPPED_OF_LAST
    for number in range(1, many * 11):  # every eleventh, for ever: fewer than a tenth
        count.add(skipped=number % 11 == 0)
        assert count.verdict() == ""
    count = SkipCount()
    said = []
    for number in range(window):
        count.add(skipped=number % 8 == 0)
        said.append(count.verdict())
    assert said.index(f"in {many} of the last {8 * many - 7} steps") == 8 * (many - 1)


def noisy_falling_losses(steps: int) -> list[float]:
    chance = random.Random(3)
    return [(1.0 + math.exp(-step / 40)) * chance.lognormvariate(0, 0.25) for step in range(steps)]


def test_noisy_losses_are_no_spikes() -> None:
    level = LossLevel()
    assert not any(level.add(loss) for loss in noisy_falling_losses(2000))


def test_a_loss_near_zero_may_jump_a_little() -> None:
    level = LossLevel()
    steady = [level.add(0.01) for _ in range(40)]
    assert not any([*steady, level.add(0.3)]) and level.add(3.0)


def test_a_spike_that_recovers_is_told_once_and_one_that_stays_explodes() -> None:
    level = LossLevel()
    for loss in noisy_falling_losses(100):
        level.add(loss)
    assert level.add(40.0) and not level.add(1.1)
    assert level.spikes == 0
    for _ in range(EXPLODED_STEPS - 1):
        assert level.add(40.0)
    assert not level.has_exploded()
    assert level.add(40.0) and level.has_exploded()


def test_what_stays_below_the_loss_at_the_start_does_not_explode() -> None:
    level = LossLevel()
    for loss in (*[6.0] * FEWEST_STEPS, *[1.0] * 100, *[4.0] * (EXPLODED_STEPS + 5)):
        level.add(loss)
    assert not level.has_exploded()


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"bad_weights": "model.norm.weight"}, "`model.norm.weight`"),
        ({"mixed_precision": "fp16", "dtype": "bfloat16"}, "as the model was made in it"),
        ({"rows_without_loss": 3}, "3 rows of these steps have no token"),
        ({"one_row": "row 7 of a.jsonl"}, "look at row 7 of a.jsonl"),
        ({}, "`--learning-rate 2e-05`"),
    ],
)
def test_the_likeliest_remedy_comes_first(changes: dict[str, Any], first: str) -> None:
    values = {name: getattr(CIRCUMSTANCES, name) for name in CIRCUMSTANCES.__struct_fields__}
    assert first in remedies("loss", Circumstances(**{**values, **changes}))[0]


def test_clipping_is_advised_where_there_is_none() -> None:
    values = {name: getattr(CIRCUMSTANCES, name) for name in CIRCUMSTANCES.__struct_fields__}
    unclipped = Circumstances(**{**values, "max_grad_norm": 0.0})
    assert "clip gradients" in " ".join(remedies("explosion", unclipped))
    assert "clip" not in " ".join(remedies("explosion", CIRCUMSTANCES))


def test_notices_name_the_rows_and_fall_silent_after_a_few(capsys: pytest.CaptureFixture) -> None:
    rows = [
        {
            "event": "skipped step", "at_step": step, "why": "loss", "num_rows": 5,
            "rows": [{"file": "a.jsonl", "number": n, "sha256": "0"} for n in range(5)],
        }
        for step in range(12)
    ]  # fmt: skip
    notices = Notices(Ui())
    for known in (rows[:1], rows[:2], rows):  # the first is of the attempt that is resumed
        notices.update({}, known)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("was skipped") == 5 and "step 0" not in said
    assert "row 0 of a.jsonl, row 1 of a.jsonl, row 2 of a.jsonl and 2 more" in said


QUESTIONS = [f"Where is the start of the {thing}?" for thing in ("list", "file", "set", "dict")]
BAD_TOKEN = "\x07"  # in one row only, and in none that is held out


@pytest.fixture(autouse=True)
def _kept_signals() -> Iterator[None]:
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one token whose embedding is not a number."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "spoiled"
    save_tiny_llama(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (token,) = tokenizer(BAD_TOKEN, add_special_tokens=False)["input_ids"]
    # Tied weights would spoil every logit.
    model.config.tie_word_embeddings = False
    model.lm_head.weight = type(model.lm_head.weight)(model.lm_head.weight.detach().clone())
    model.model.embed_tokens.weight.data[token] = math.nan
    model.save_pretrained(folder)
    return folder


def data_file(folder: Path, bad_rows: tuple[int, ...]) -> Path:
    rows = [
        {
            "instruction": f"{QUESTIONS[number % 4]} {number}",
            "output": "It is " + "here " * (number % 5) + (BAD_TOKEN if number in bad_rows else ""),
        }
        for number in range(24)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trained(model: Path, data: Path, folder: Path, **given: Any) -> SimpleNamespace:
    """The run, and the error that it ended with."""
    settings = {"method": "lora", "per_device_train_batch_size": 2, **given}
    run = write_run(planned(model, data, folder, **settings), None, folder)
    try:
        loop.train(run, resume=False)
    except RunFailedError as error:
        return SimpleNamespace(run=run, error=error)
    return SimpleNamespace(run=run, error=None)


def events(run: RunDir, kind: str) -> list[dict[str, Any]]:
    return [row for row in run.metric_rows() if row.get("event") == kind]


@pytest.fixture(scope="module")
def skipping(spoiled: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run over one bad row, in micro-batches of two rows, two of them a step."""
    folder = tmp_path_factory.mktemp("skipping")
    data = data_file(folder, (6,))
    settings = {"max_steps": 6, "gradient_accumulation_steps": 2, "save_steps": 1}
    first = trained(spoiled, data, folder, **settings)
    (event,) = events(first.run, "skipped step")
    # Of a run that ends with the skipped step, the checkpoints before and after it are there.
    ended = {**settings, "max_steps": event["at_step"]}
    again = trained(spoiled, data, folder, **ended)
    return SimpleNamespace(first=first, again=again, event=event)


@train
def test_the_step_of_a_row_that_makes_nan_is_skipped_and_the_row_named(
    skipping: SimpleNamespace,
) -> None:
    run, event = skipping.first.run, skipping.event
    assert skipping.first.error is None and run.read_record()["steps"] == 6
    assert event["why"] == "loss"
    assert event["num_rows"] == 2, "of the micro-batch, not of the step"
    assert 7 in [row["number"] for row in event["rows"]]
    for row in event["rows"]:
        assert row["file"] == "rows.jsonl" and len(row["sha256"]) == 12
        assert 0 < row["tokens_with_loss"] < row["tokens"]
    assert "here" not in json.dumps(event), "a row's text"
    steps = [row["step"] for row in run.metric_rows() if "step" in row]
    assert steps == [step for step in range(1, 7) if step != event["at_step"]]


@train
def test_metrics_are_json_without_not_a_number(skipping: SimpleNamespace) -> None:
    for line in skipping.first.run.metrics.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


@train
def test_a_skipped_step_leaves_weights_states_and_schedule_as_they_were(
    skipping: SimpleNamespace,
) -> None:
    import torch
    from safetensors.torch import load_file

    checkpoints, step = skipping.again.run.checkpoints, skipping.event["at_step"]
    before, after = (checkpoints / f"checkpoint-{number}" for number in (step - 1, step))
    for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt"):
        load = load_file if name.endswith("safetensors") else torch.load
        one, other = load(before / name), load(after / name)
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@train
def test_a_run_that_only_skips_ends_with_a_checkpoint_and_the_cause(
    spoiled: Path, tmp_path: Path
) -> None:
    done = trained(spoiled, data_file(tmp_path, tuple(range(24))), tmp_path, max_steps=9)
    assert "not a finite number in 3 steps in a row" in done.error.message
    assert "embed_tokens" in done.error.hint
    assert done.error.exit_status == 1 and not done.run.finished
    assert done.run.read_status()["stage"] == "failed"
    assert done.run.last_checkpoint().name == "checkpoint-3"


@train
def test_a_loss_that_explodes_is_told_and_ends_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a step that was far too long: what is trained is a hundred times what it was."""
    from ftplan.launcher.training.trainer import StepReporter

    def on_step_begin(self: Any, args: Any, state: Any, *rest: Any, **parts: Any) -> None:
        usual(self, args, state, *rest, **parts)
        if state.global_step == FEWEST_STEPS + 2:
            parts["model"].model.norm.weight.data *= 100

    usual = StepReporter.on_step_begin
    monkeypatch.setattr(StepReporter, "on_step_begin", on_step_begin)
    done = trained(model, data_file(tmp_path, ()), tmp_path, method="full", max_steps=60)
    assert "has exploded" in done.error.message
    spikes = events(done.run, "loss spike")
    assert len(spikes) == EXPLODED_STEPS and spikes[0]["rows"]
    assert spikes[0]["at_step"] == FEWEST_STEPS + 3
    assert done.error.hint.startswith("lower the learning rate (`--learning-rate ")


@train
def test_a_learning_rate_that_kills_the_model_ends_the_run(model: Path, tmp_path: Path) -> None:
    data, settings = data_file(tmp_path, ()), {"method": "full", "max_steps": 60}
    done = trained(model, data, tmp_path, learning_rate=1e4, **settings)
    assert "nothing is learned any more" in done.error.message
    assert "`--learning-rate 1e+03`" in done.error.hint
    steps = [row["step"] for row in done.run.metric_rows() if "step" in row]
    assert steps[-1] < 40


@train
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_other_objectives_skip_bad_steps_too(objective: str, spoiled: Path, tmp_path: Path) -> None:
    answers: list[dict[str, Any]] = [
        {"chosen": f"here {number}", "rejected": "no"}
        if objective == "dpo"
        else {"completion": f"here {number}", "label": number % 2 == 0}
        for number in range(16)
    ]
    done = trained(spoiled, prompts(tmp_path, answers), tmp_path, objective=objective, max_steps=8)
    assert done.error is None
    for event in events(done.run, "skipped step"):
        assert 7 in [row["number"] for row in event["rows"]]
    assert events(done.run, "skipped step")


def prompts(folder: Path, answers: list[dict[str, Any]]) -> Path:
    """The seventh row holds the bad token."""
    path = folder / "rows.jsonl"
    rows = [
        {"prompt": f"{QUESTIONS[n % 4]} {n}" + (BAD_TOKEN if n == 6 else ""), **answer}
        for n, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@train
def test_completions_that_cannot_be_made_end_a_run_with_the_rows(
    spoiled: Path, tmp_path: Path
) -> None:
    answers = [{"completion": f"here {number}"} for number in range(16)]
    rewarded = {"objective": "grpo", "reward": ("exact-match",), "num_generations": 2}
    data = prompts(tmp_path, answers)
    done = trained(spoiled, data, tmp_path, max_steps=16, max_completion_length=4, **rewarded)
    assert "no completion can be made" in done.error.message
    assert "embed_tokens" in done.error.hint
    (event,) = events(done.run, "skipped step")
    assert 7 in [row["number"] for row in event["rows"]]
    assert done.run.read_status()["stage"] == "failed"


class ScaledOptimizer:
    """As accelerate's: `step` goes through the scaler."""

    def __init__(self, scaler: Any, optimizer: Any) -> None:
        self.scaler = scaler
        self.optimizer = optimizer
        self._is_overflow = False

    def step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()


def guard_with_scaler(scale: float) -> tuple[StepGuard, Any, Any]:
    """A guard, a weight and its optimizer, where losses are multiplied by a scale as under fp16."""
    import torch

    weight = torch.nn.Parameter(torch.ones(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = ScaledOptimizer(scaler, torch.optim.SGD([weight], lr=1.0))
    accelerator = SimpleNamespace(scaler=scaler, num_processes=1)
    trainer = SimpleNamespace(accelerator=accelerator, training_step=None, _get_grad_norm=None)
    missing: Any = None
    return StepGuard(trainer, missing, missing, missing, missing), weight, optimizer


@pytest.mark.parametrize(("scale", "trouble"), [(65536.0, None), (1.0, None), (0.5, "overflow")])
def test_a_gradient_that_overflows_fp16_is_the_scalers_affair_while_a_scale_is_left(
    scale: float, trouble: str | None
) -> None:
    guard, _, _ = guard_with_scaler(scale)
    guard._grad_norm = math.inf
    assert guard._trouble(bad_loss=False) == trouble
    assert guard._trouble(bad_loss=True) == "loss"


def test_a_step_skipped_under_fp16_keeps_weight_and_scale_and_the_next_one_goes_ahead() -> None:
    guard, weight, optimizer = guard_with_scaler(1024.0)
    for loss_factor in (math.nan, 1.0):
        optimizer.scaler.scale((weight * loss_factor).sum()).backward()
        optimizer.scaler.unscale_(optimizer.optimizer)  # as the trainer does to clip
        if math.isnan(loss_factor):
            guard._skip(optimizer)
        optimizer.step()
        optimizer.optimizer.zero_grad()
        if math.isnan(loss_factor):
            assert optimizer._is_overflow and weight.tolist() == [1.0, 1.0]
            assert optimizer.scaler.get_scale() == 1024.0
    assert weight.tolist() == [0.0, 0.0]
