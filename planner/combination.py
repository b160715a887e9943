"""What a combination of model, plan and device is looked for in, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from msgspec import Struct

from ftplan.planner.hardware_spec import Device
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.peft_options import read_options
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.trained import LM_HEAD, embedding_name

# `warned`: it runs; `not run`: an estimate warns, `plan` and `auto` refuse; `refused`: by all.
Outcome = Literal["warned", "not run", "refused"]


class Caution(Struct, frozen=True, kw_only=True):
    """What a person is warned about: a stable name, what is so, and what to do instead."""

    name: str
    text: str
    way_out: str = ""

    def __str__(self) -> str:
        return "; ".join(part for part in (self.text, self.way_out) if part) + f" [{self.name}]"

    def to_dict(self) -> dict[str, str]:
        return {"name": self.name, "text": self.text, "way_out": self.way_out}


class Asked(Struct, frozen=True, kw_only=True):
    """What a combination is looked for in; `device` is None where none is named."""

    model: ModelSpec
    plan: TrainingPlan
    device: Device | None

    @property
    def capability(self) -> tuple[int, int] | None:
        """The device's compute capability, (0, 0) where it has none; None without a device, and on
        another vendor's."""
        if self.device is None or self.device.vendor != "nvidia":
            return None
        return self.device.compute_capability or (0, 0)

    @property
    def device_name(self) -> str:
        return self.device.name if self.device else ""

    @property
    def uses_flash_attention(self) -> bool:
        return self.plan.attn_implementation == "flash_attention_2"

    @property
    def is_16_bit_float(self) -> bool:
        return self.plan.mixed_precision == "fp16" or self.plan.dtype == "float16"

    @property
    def peft_type(self) -> str | None:
        """PEFT's name for the plan's method; None for one that is not PEFT's."""
        return self.plan.resolved_method.peft_type

    @property
    def has_experts(self) -> bool:
        return any(layer.feed_forward.experts for layer in self.model.layer_counts)

    @property
    def saved_ends(self) -> list[str]:
        """Which of embeddings and output projection PEFT is to train a copy of."""
        given = read_options(self.plan.peft_config)
        saved = (*self.plan.modules_to_save, *(given.get("modules_to_save") or ()))
        return [name for name in (embedding_name(self.model), LM_HEAD) if name in saved]

    @property
    def copied_ties(self) -> list[str]:
        """Modules of a tied pair that PEFT trains a copy of."""
        keeps_tie = read_options(self.plan.peft_config).get("ensure_weight_tying")
        tied = self.model.tie_word_embeddings and not self.plan.resolved_objective.scores
        return self.saved_ends if tied and not keeps_tie else []


Say = Callable[[Asked], str]


class Combination(Struct, frozen=True, kw_only=True):
    """When something `applies`, its `text` and `way_out`; `source`: how it is known."""

    name: str
    outcome: Outcome
    applies: Callable[[Asked], bool]
    text: Say
    way_out: Say
    source: str

    def caution(self, asked: Asked) -> Caution:
        return Caution(name=self.name, text=self.text(asked), way_out=self.way_out(asked))


def spelled(names: Iterable[str]) -> str:
    """The names as a message has them."""
    return " and ".join(f"`{name}`" for name in names)
