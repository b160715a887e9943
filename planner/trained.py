"""What a fine-tuning method trains, as counts: one closed form for each that has one.

A test compares them with PEFT's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.model_spec import Linear, ModelSpec

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """Which parameters a configuration trains, as counts.

    `base_parameters` belong to the model itself, `added_parameters` to adapters. `adapted`
    are the linear modules of one layer that carry an adapter of rank `rank`.
    `trained_layers` counts the layers whose own weights are trained, from the last.
    """

    base_parameters: int
    added_parameters: int
    adapted: tuple[Linear, ...] = ()
    rank: int = 0
    trained_layers: int = 0
    trains_embeddings: bool = False
    trains_lm_head: bool = False

    @property
    def num_trainable_parameters(self) -> int:
        return self.base_parameters + self.added_parameters

    def reached_layers(self, model: ModelSpec) -> int:
        """Layers that backward goes through: all with adapters, else the trained ones."""
        return model.num_hidden_layers if self.adapted else self.trained_layers


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodSettings:
    """The settings of a plan that decide what is trained."""

    lora_rank: int = 16
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    num_trainable_layers: int = 2


def full_count(model: ModelSpec, settings: MethodSettings) -> Trained:
    return Trained(
        base_parameters=model.num_parameters,
        added_parameters=0,
        trained_layers=model.num_hidden_layers,
        trains_embeddings=True,
        trains_lm_head=True,
    )


def freeze_count(model: ModelSpec, settings: MethodSettings) -> Trained:
    """The last layers with all their parameters; the rest, embeddings and head stay frozen."""
    layers = settings.num_trainable_layers
    if not 1 <= layers <= model.num_hidden_layers:
        raise InputError(
            f"`--num-trainable-layers {layers}` is outside this model's "
            f"1 to {model.num_hidden_layers} layers"
        )
    return Trained(
        base_parameters=sum(l.num_parameters for l in model.layers[-layers:]),
        added_parameters=0,
        trained_layers=layers,
    )


def lora_count(model: ModelSpec, settings: MethodSettings) -> Trained:
    """A pair A (rank x in), B (out x rank) for each targeted linear module of every layer.

    LoRA, Hu et al. 2021 (arXiv 2106.09685), section 4.1: rank (in + out) parameters each.
    """
    if settings.lora_rank < 1:
        raise InputError(f"`--lora-rank {settings.lora_rank}` must be at least 1")
    adapted = targeted_linears(model, settings.target_modules)
    per_layer = sum(settings.lora_rank * (m.in_features + m.out_features) for m in adapted)
    return Trained(
        base_parameters=0,
        added_parameters=model.num_hidden_layers * per_layer,
        adapted=adapted,
        rank=settings.lora_rank,
    )


def check_target_modules(target_modules: Sequence[str]) -> None:
    """Raises InputError for a list that no model can have."""
    if not target_modules:
        raise InputError(
            "`--target-modules` names no module",
            f"name some, such as `q_proj,v_proj`, or write `{ALL_LINEAR}`",
        )
    if ALL_LINEAR in target_modules and len(target_modules) > 1:
        others = ", ".join(f"`{name}`" for name in target_modules if name != ALL_LINEAR)
        raise InputError(
            f"`{ALL_LINEAR}` already means every linear module: it stands alone",
            f"leave out {others or 'the second one'}, or leave out `{ALL_LINEAR}`",
        )


def targeted_linears(model: ModelSpec, target_modules: Sequence[str]) -> tuple[Linear, ...]:
    """The linear modules of one layer that `target_modules` names; `all-linear` means all.

    A name takes every module of that name, as PEFT's match by suffix does (GPT-2 has a `c_proj`
    in attention and one in the feed-forward). Raises UnknownNameError for a name that no module
    of this model has.
    """
    check_target_modules(target_modules)
    linears = model.linears
    if tuple(target_modules) == (ALL_LINEAR,):
        return linears
    known = {m.name for m in linears}
    for name in target_modules:
        if name not in known:
            raise UnknownNameError("target module", name, {*known, ALL_LINEAR})
    return tuple(m for m in linears if m.name in target_modules)


def target_names(model: ModelSpec, target_modules: Sequence[str]) -> tuple[str, ...]:
    """The module names that PEFT is given, each once: `all-linear` spelled out.

    PEFT's own `all-linear` (0.21) also takes routers and stacked experts, which the counts here
    leave out; so training is given names.
    """
    return tuple(dict.fromkeys(m.name for m in targeted_linears(model, target_modules)))
