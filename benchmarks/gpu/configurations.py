"""Which runs tell most about a card: configurations that fit it, in the order of what they add.

Hands are dealt from the axes below, the same ones every time. What the card cannot run is put away;
of the rest the one comes first that shows most not seen yet, for each second that it takes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from random import Random
from typing import Any

from msgspec import Struct, structs

from benchmarks.gpu.task import WARM_UP_STEPS
from ftplan.launcher.dry_run.case import DryRunCase
from ftplan.launcher.exact import case_of
from ftplan.launcher.model_source import ModelSource, find_source
from ftplan.planner.closed_form import check_closed_form
from ftplan.planner.combinations import check_together
from ftplan.planner.errors import FtplanError, InputError
from ftplan.planner.hardware_spec import Device
from ftplan.planner.memory import estimate_memory
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.recipe import estimate_recipe
from ftplan.planner.replayed import replayed_memory
from ftplan.planner.stack import Stack
from ftplan.planner.step_time import estimate_step_time

COUNT = 60
SEED = 20260
_HANDS = 4000
_ENOUGH = 500

# Of the free memory, what a run may require.
_MOST_OF_FREE = 0.9
# A run of a few steps is to be over soon.
_MOST_STEP_SECONDS = 6.0
_MOST_PARAMETERS = {True: 35e9, False: 15e9}  # by whether the base is quantized
_MOST_TOKENS = 32 * 1024
# Loading libraries and making a model, on a usual machine.
START_SECONDS = 25.0
# Steps are timed for so long, but not fewer and not more of them.
_TIMED_SECONDS, _FEWEST_STEPS, _MOST_STEPS = 6.0, 3, 12

# How far from the required memory a run is that is left little on purpose, and of how many
# configurations: those that require most.
TIGHT_SHARES = (0.03, -0.03)
_TIGHT_CONFIGURATIONS = 6
# Configurations that come before the first such run.
_BEFORE_TIGHT = 20

# Axis, value, and how often it is dealt.
Axes = Mapping[str, Mapping[Any, float]]

AXES: Axes = {
    "model": {
        "llama-3.1-8b": 3,
        "llama-3.2-1b": 3,
        "qwen2.5-0.5b": 2,
        "qwen2.5-7b": 2,
        "qwen2.5-1.5b": 2,
        "qwen2.5-14b": 2,
        "qwen2.5-32b": 2,
        "qwen3-4b": 2,
        "mistral-7b-v0.3": 2,
        "gemma-2-2b": 2,
        "gemma-3-1b-it": 1,
        "phi-3.5-mini-instruct": 1,
        "smollm2-135m": 2,
        "smollm2-1.7b": 1,
        "olmoe-1b-7b-0924": 1,
        "gpt2-xl": 1,
        "pythia-1.4b": 1,
        "bloom-1b7": 1,
        "opt-1.3b": 1,
    },
    "method": {"full": 4, "lora": 5, "freeze": 1, "dora": 1, "ia3": 1, "bitfit": 1, "vera": 1},
    "quantization": {"none": 5, "nf4": 4, "int8": 1, "fp4": 1},
    "precision": {
        ("bfloat16", "bf16"): 4,
        ("bfloat16", "no"): 3,
        ("float32", "bf16"): 2,
        ("float32", "no"): 1,
        ("float16", "fp16"): 1,
    },
    "trainer": {"trl": 4, "transformers": 3, "loop": 2},
    "loss": {"stock": 3, "trl-fused": 3, "liger": 1},
    "optim": {
        "adamw_torch_fused": 5,
        "adamw_torch": 2,
        "adamw_8bit": 2,
        "paged_adamw_8bit": 1,
        "adafactor": 1,
        "sgd": 1,
        "lion_8bit": 1,
    },
    "attn_implementation": {"sdpa": 5, "eager": 1, "flash_attention_2": 1},
    "gradient_checkpointing": {True: 3, False: 2},
    "max_length": {512: 2, 1024: 1, 2048: 3, 4096: 2, 8192: 1},
    "per_device_train_batch_size": {1: 3, 2: 2, 4: 2, 8: 1, 16: 1},
    "gradient_accumulation_steps": {1: 4, 4: 1},
    "objective": {"sft": 8, "dpo": 1, "kto": 1, "reward": 1},
}

# Pairs of axes that act on one another.
_TOGETHER = frozenset(
    map(
        frozenset,
        (
            ("method", "quantization"),
            ("method", "gradient_checkpointing"),
            ("method", "optim"),
            ("method", "precision"),
            ("method", "trainer"),
            ("model", "loss"),
            ("model", "method"),
            ("trainer", "precision"),
            ("trainer", "quantization"),
            ("loss", "max_length"),
            ("attn_implementation", "max_length"),
            ("max_length", "per_device_train_batch_size"),
            ("gradient_checkpointing", "max_length"),
            ("quantization", "precision"),
        ),
    )
)
_ALONE_WEIGHT, _PAIR_WEIGHT = 3.0, 1.0

# What a package brings; where it is not installed, what needs it is left out.
PACKAGES_OF: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "trl": lambda hand: hand["trainer"] == "trl",
    "datasets": lambda hand: hand["trainer"] == "trl",
    "bitsandbytes": lambda hand: hand["quantization"] != "none" or "8bit" in hand["optim"],
    "liger_kernel": lambda hand: hand["loss"] == "liger",
    "flash_attn": lambda hand: hand["attn_implementation"] == "flash_attention_2",
}


class Candidate(Struct, frozen=True, kw_only=True):
    """A configuration that a device can run.

    `hand`: the axes' values. `model`: a catalog name, or a folder with a config.json.
    `kbit_prepare`: PEFT's k-bit preparation, as its documentation has it for a quantized base that
    transformers' own trainer or a loop trains.
    """

    model: str
    hand: Mapping[str, Any]
    source: ModelSource
    plan: TrainingPlan
    device: Device
    required_bytes: int
    step_seconds: float

    @property
    def kbit_prepare(self) -> bool:
        return self.plan.quantization != "none" and self.plan.trainer != "trl"

    @property
    def case(self) -> DryRunCase:
        """As a measuring process is told it."""
        stack = {"kbit_prepare": self.kbit_prepare}
        return case_of(self.source, self.plan, self.device, **stack)

    @property
    def key(self) -> str:
        """A name that says what is in it: equal candidates have equal keys."""
        plan = self.plan
        said = json.dumps([self.model, sorted(self.hand.items())], default=str)
        base = "" if plan.quantization == "none" else f"-{plan.quantization}"
        rows = f"{plan.per_device_train_batch_size}x{plan.max_length}"
        name = self.model.rpartition("/")[2]
        digest = hashlib.sha256(said.encode()).hexdigest()[:6]
        return f"{name}/{plan.method}{base}/{plan.trainer}/{rows}/{digest}"

    @property
    def steps(self) -> int:
        """Steps of a measured run, those that are not timed included."""
        timed = round(_TIMED_SECONDS / max(self.step_seconds, 1e-3))
        return WARM_UP_STEPS + min(max(timed, _FEWEST_STEPS), _MOST_STEPS)

    @property
    def seconds(self) -> float:
        """What a measured run takes, about."""
        return START_SECONDS + self.steps * self.step_seconds


class Run(Struct, frozen=True, kw_only=True):
    """A candidate to be measured; with `tight_share`, one that is left so much more or less than
    the required memory, and tells only whether it survives."""

    candidate: Candidate
    tight_share: float | None = None

    @property
    def key(self) -> str:
        if self.tight_share is None:
            return self.candidate.key
        return f"{self.candidate.key}/required{100 * self.tight_share:+.0f}%"

    @property
    def free_bytes(self) -> int | None:
        """What is left free on purpose; None for all there is."""
        if self.tight_share is None:
            return None
        return round((1 + self.tight_share) * self.candidate.required_bytes)


def choose(
    device: Device,
    packages: Collection[str],
    *,
    axes: Axes = AXES,
    count: int = COUNT,
    hands: int = _HANDS,
) -> list[Run]:
    """What to run on a device, most telling first. `packages`: those of PACKAGES_OF at hand."""
    missing = [needs for package, needs in PACKAGES_OF.items() if package not in packages]
    candidates: dict[str, Candidate] = {}
    for hand in dealt(axes, hands):
        if any(needs(hand) for needs in missing) or len(candidates) == _ENOUGH:
            continue
        with suppress(FtplanError):
            candidate = candidate_of(hand, device)
            candidates.setdefault(candidate.key, candidate)
    chosen = most_telling(list(candidates.values()), count, axes)
    return _with_tight(chosen) if device.kind == "cuda" else [Run(candidate=c) for c in chosen]


def dealt(axes: Axes, hands: int) -> Iterator[dict[str, Any]]:
    """So many hands, the same ones every time."""
    for number in range(hands):
        rng = Random(f"{SEED}/{number}")
        yield {axis: rng.choices(list(w), list(w.values()))[0] for axis, w in axes.items()}


def candidate_of(hand: Mapping[str, Any], device: Device) -> Candidate:
    """Raises InputError for what ftplan refuses, and for what is too much for the device."""
    source = find_source(hand["model"])
    model = source.spec
    dtype, mixed_precision = hand["precision"]
    given = {k: v for k, v in hand.items() if k not in ("model", "precision")}
    given |= {"dtype": dtype, "mixed_precision": mixed_precision}
    if hand["objective"] != "sft":
        given["loss"] = "stock" if hand["objective"] == "reward" else hand["loss"]
    plan = estimate_recipe(model, device, given).plan
    if plan.objective != "sft" and not plan.resolved_method.adapter:
        raise InputError("a reference model, which would be loaded from a folder")
    check_together(model, plan)
    check_closed_form(plan, model)
    tokens = plan.per_device_train_batch_size * plan.max_length
    if plan.max_length > model.max_position_embeddings or tokens > _MOST_TOKENS:
        raise InputError("rows that are too long")
    if model.num_parameters > _MOST_PARAMETERS[plan.quantization != "none"]:
        raise InputError("a model that takes long to make")
    candidate = Candidate(
        model=hand["model"],
        hand=hand,
        source=source,
        plan=plan,
        device=device,
        required_bytes=0,
        step_seconds=0.0,
    )
    case_of(source, plan, device)
    stack = Stack(kbit_prepare=candidate.kbit_prepare)
    memory = estimate_memory(model, plan, device=device, stack=stack)
    if memory.required_bytes > _MOST_OF_FREE * device.free_bytes:
        raise InputError("too much memory")
    step = estimate_step_time(
        model,
        plan,
        device,
        tokens_per_micro_batch=tokens,
        mean_length=plan.max_length,
        stack=stack,
    )
    if step.step_seconds > _MOST_STEP_SECONDS:
        raise InputError("steps that are too long")
    return structs.replace(
        candidate, required_bytes=memory.required_bytes, step_seconds=step.step_seconds
    )


def most_telling(candidates: Sequence[Candidate], count: int, axes: Axes) -> list[Candidate]:
    """So many of them: each time the one that shows most not seen yet for a second of its time.
    What is dealt often, since people run it often, counts for more."""
    left, seen, chosen = list(candidates), set[Any](), list[Candidate]()

    def worth(candidate: Candidate) -> tuple[float, str]:
        new = sum(weight for what, weight in _shows(candidate, axes) if what not in seen)
        return new / candidate.seconds, candidate.key

    while left and len(chosen) < count:
        best = max(left, key=worth)
        left.remove(best)
        chosen.append(best)
        seen.update(what for what, _ in _shows(best, axes))
    return chosen


def _shows(candidate: Candidate, axes: Axes) -> Iterator[tuple[Any, float]]:
    """What a run shows: values of axes, and of pairs of them that act on one another."""
    values = sorted(candidate.hand.items())
    usual = {axis: axes[axis][value] / max(axes[axis].values()) for axis, value in values}
    for value in values:
        yield value, _ALONE_WEIGHT * usual[value[0]]
    for one, other in combinations(values, 2):
        if frozenset((one[0], other[0])) in _TOGETHER:
            yield (one, other), _PAIR_WEIGHT * usual[one[0]] * usual[other[0]]


def _with_tight(chosen: Sequence[Candidate]) -> list[Run]:
    """Runs that are left little memory come behind the first that are not. None with paged
    states: a driver that moves pages to and fro without end may hang the GPU."""
    first = [c for c in chosen[:_BEFORE_TIGHT] if not c.plan.optimizer.paged]
    first.sort(key=lambda c: -c.required_bytes)
    tight = [
        Run(candidate=_replayed(candidate), tight_share=share)
        for candidate in first[:_TIGHT_CONFIGURATIONS]
        for share in TIGHT_SHARES
    ]
    runs = [Run(candidate=candidate) for candidate in chosen]
    return [*runs[:_BEFORE_TIGHT], *tight, *runs[_BEFORE_TIGHT:]]


def _replayed(candidate: Candidate) -> Candidate:
    """With the required memory of the allocator's replay, which `ftplan estimate` prints."""
    memory = replayed_memory(
        candidate.source.spec,
        candidate.plan,
        device=candidate.device,
        stack=Stack(kbit_prepare=candidate.kbit_prepare),
    )
    return structs.replace(candidate, required_bytes=memory.required_bytes)


def left_out(packages: Collection[str]) -> list[str]:
    """Packages that are not at hand, whose runs are left out."""
    return [package for package in PACKAGES_OF if package not in packages]
