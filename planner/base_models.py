"""The base model when none is named: which come into question, in which order, and why.

What is published about models and what is tried on a device come from outside.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from msgspec import Struct

from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import InputError
from ftplan.planner.hardware_spec import Device
from ftplan.planner.memory import MEMORY_MARGIN
from ftplan.planner.methods import COMPARED_METHODS, resolve_method
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.objectives import trained_part
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.policy import Advice, model_kind
from ftplan.planner.recipe import data_recipe
from ftplan.planner.step_time import achieved_flops_per_second
from ftplan.planner.tasks import TaskWeighting
from ftplan.planner.units import format_bytes, format_count, format_seconds
from ftplan.planner.weights import weight_memory_bytes

# Licences under which a model may be chosen for somebody who named none.
FREE_LICENCES = ("Apache-2.0", "MIT")

# What data are in as far as ftplan tells, and the languages that this may be; others are one.
LANGUAGES_OF: Mapping[str, tuple[str, ...]] = {
    "Cyrillic script": ("Russian", "Ukrainian", "Bulgarian"),
    "Arabic script": ("Arabic", "Persian", "Urdu"),
    "Devanagari": ("Hindi", "Marathi", "Nepali"),
    "Gurmukhi": ("Punjabi",),
    "Danish or Norwegian": ("Danish", "Norwegian"),
    "Indonesian or Malay": ("Indonesian", "Malay"),
}

# No form in which a model is loaded has less: 4 bits a parameter.
_LEAST_BYTES_PER_PARAMETER = 0.5


class BaseModel(Struct, frozen=True, kw_only=True):
    """What is published about a model.

    `kind`: `base` or `chat`; `languages`: those its makers name, empty where they name none;
    `specialty`: what it was made for, where that is not text of any kind.
    """

    name: str
    kind: str
    num_parameters: int
    licence: str
    languages: tuple[str, ...] = ()
    specialty: str = ""

    def knows(self, language: str) -> bool:
        """Whether its makers name the data's language. True where they name none, or the data's
        language is not plain (empty)."""
        if not (language and self.languages):
            return True
        return bool(set(self.languages) & set(LANGUAGES_OF.get(language, (language,))))


class Obstacle(Struct, frozen=True):
    """Why a model cannot be trained; `late`: it could, but for the time."""

    reason: str
    late: bool = False


class RunnerUp(Struct, frozen=True, kw_only=True):
    """The model that was next to the chosen one, and why it was not taken."""

    name: str
    why_not: str


class ModelChoice(Struct, frozen=True, kw_only=True):
    """The chosen model."""

    name: str
    why: str
    runner_up: RunnerUp | None = None


Tried = Callable[[BaseModel], Obstacle | None]


def choose_base_model(
    models: Iterable[BaseModel],
    data: DataProfile,
    bounded: Tried,
    tried: Tried,
    *,
    where: str = "of the catalog",
    within: str = "",
) -> ModelChoice | None:
    """The first model, in order, against which nothing speaks; None where there is none.

    `bounded`: what is plain without looking at plans; `tried`: by looking at them. `where`,
    `within`: what all were chosen from, and what a run had to keep, for the reason.
    """
    advice = model_kind(data.num_train_rows, data.objective)
    ordered = in_order(models, str(advice.value), data.language)
    late: RunnerUp | None = None
    for number, model in enumerate(ordered):
        obstacle = bounded(model) or tried(model)
        if obstacle is None:
            others = (other for other in ordered[number + 1 :] if bounded(other) is None)
            behind = next(others, None)
            if late is None and behind is not None:
                late = RunnerUp(
                    name=behind.name, why_not=_why_behind(behind, model, advice, data.language)
                )
            why = _why(model, advice, data.language, where, within)
            return ModelChoice(name=model.name, why=why, runner_up=late)
        if obstacle.late:
            late = RunnerUp(name=model.name, why_not=obstacle.reason)
    return None


def in_order(models: Iterable[BaseModel], kind: str, language: str) -> list[BaseModel]:
    """Those that come into question, the best first: such as have the data's language before
    others, then those of the advised kind, then the larger; of about equal size the later
    version."""
    possible = [m for m in models if m.licence in FREE_LICENCES and not m.specialty]
    by_version = sorted(possible, key=lambda m: (_version(m.name), m.name), reverse=True)
    return sorted(
        by_version, key=lambda m: (not m.knows(language), m.kind != kind, -_about(m.num_parameters))
    )


def _about(num_parameters: int) -> float:
    """Three digits: models of one size in two versions differ in the fourth."""
    return float(f"{num_parameters:.2e}")


def _version(name: str) -> tuple[float, ...]:
    """The numbers in a model's name that are no sizes: (2.5,) of `qwen2.5-7b`."""
    return tuple(
        float(found) for found in re.findall(r"(?<![\d.])\d+(?:\.\d+)?(?![\d.bmkx])", name)
    )


def _why(model: BaseModel, advice: Advice, language: str, where: str, within: str) -> str:
    said = [f"the largest free {model.kind} model {where} that fits{within}"]
    if model.kind == advice.value:
        said.append(advice.why)
    else:
        said.append(f"no {advice.value} model does, which is advised ({advice.why})")
    if language and not model.languages:
        said.append(f"whether it knows the data's language ({language}) is not published")
    elif language and not model.knows(language):
        said.append(f"no model does whose makers name the data's language ({language})")
    elif language not in ("", "English"):
        said.append(f"its makers name the data's language ({language})")
    return "; ".join(said)


def _why_behind(model: BaseModel, chosen: BaseModel, advice: Advice, language: str) -> str:
    """Why a model comes after the chosen one."""
    if chosen.knows(language) and not model.knows(language):
        return f"its makers do not name the data's language ({language})"
    if model.kind != chosen.kind:
        return f"a {model.kind} model, where a {advice.value} one is advised"
    if _about(model.num_parameters) == _about(chosen.num_parameters):
        return "of the same size, an earlier version"
    return f"smaller: {format_count(model.num_parameters)} parameters"


# --- bounds


class Available(Struct, frozen=True, kw_only=True):
    """GPUs that a model may be trained on, or divided among; and given settings."""

    gpus: Sequence[Device]
    given: Mapping[str, Any]

    @property
    def held_bytes(self) -> int:
        """What they hold of one model."""
        return sum(gpu.free_bytes for gpu in self.gpus)


def too_large(
    model: BaseModel, spec: Callable[[], ModelSpec], data: DataProfile, available: Available
) -> Obstacle | None:
    """Whether the weights alone are more than there is memory, however they are held."""
    held = available.held_bytes
    least = math.floor(model.num_parameters * _LEAST_BYTES_PER_PARAMETER)
    if least <= held:
        least = min(
            (weight_memory_bytes(spec(), plan) for plan in _plans(spec(), data, available)),
            default=least,
        )
    if least * (1 + MEMORY_MARGIN) <= held:
        return None
    return Obstacle(f"its weights alone take {format_bytes(least)}, over {format_bytes(held)}")


def too_slow(
    model: ModelSpec, data: DataProfile, available: Available, most_seconds: float
) -> Obstacle | None:
    """Whether arithmetic alone takes longer than that, on all GPUs together."""
    least = least_run_seconds(model, data, available)
    if least <= most_seconds:
        return None
    said = f"takes {format_seconds(least)} at least, over {format_seconds(most_seconds)}"
    return Obstacle(said, late=True)


def least_run_seconds(model: ModelSpec, data: DataProfile, available: Available) -> float:
    """Seconds that no run on these data goes below: products with the layers' weights, at the rate
    that time is predicted with. Forward goes through all layers, backward down to the first with
    trained weights, but not to that one's own input. Attention, output projection, gradients of
    weights and padding are left out."""
    flops_per_token = 2 * _weights_met(model)
    found = []
    for plan in _plans(model, data, available):
        if plan.max_steps is not None:
            return 0.0
        lengths = data.epoch_lengths(TaskWeighting.of(plan))
        tokens = data.rows_each * sum(min(n, plan.max_length) for n in lengths)
        rate = sum(achieved_flops_per_second(plan.compute_dtype, gpu) for gpu in available.gpus)
        reached = trained_part(model, plan).reached_layers(model)
        passes = 1 + max(0, reached - 1) / model.num_hidden_layers
        found.append(plan.num_train_epochs * tokens * passes * flops_per_token / rate)
    return min(found, default=0.0)


def _weights_met(model: ModelSpec) -> int:
    """Weights of the layers' matrices that each token is multiplied with, at least."""
    total = 0
    for layer, times in model.layer_counts.items():
        block = layer.feed_forward
        met = sum(linear.num_weights for linear in layer.attention.linears)
        met += block.active_copies * sum(linear.num_weights for linear in block.matrices)
        total += times * met
    return total


def _plans(model: ModelSpec, data: DataProfile, available: Available) -> Iterator[TrainingPlan]:
    """A plan of each method that may be taken."""
    given = available.given
    for name in (str(given["method"]),) if "method" in given else COMPARED_METHODS:
        with suppress(InputError):  # not possible with the given settings
            plan = data_recipe(model, data, available.gpus[0], resolve_method(name), given).plan
            trained_part(model, plan)
            yield plan
