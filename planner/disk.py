"""Disk that a run takes: the model as it is downloaded, checkpoints, and what is left."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.sharding import ZERO
from ftplan.planner.stack import Stack
from ftplan.planner.step_settings import adapter_weight_bytes, spread_of
from ftplan.planner.trained import Trained, num_elements
from ftplan.planner.units import BYTES_PER_DTYPE, FLOAT32_BYTES

# `save_total_limit` of what ftplan launches. A checkpoint is written before the oldest is deleted
# (`Trainer._save_checkpoint`, transformers 5.23).
CHECKPOINTS_KEPT = 2

# A merged model is written in 16 bits.
MERGED_WEIGHT_BYTES = 2


# Random states, schedule, arguments, configuration, state of the trainer (transformers 5.23) and,
# of an adapter, its configuration and README (PEFT 0.21), as measured.
_SMALL_FILES_BYTES = {False: 23_000, True: 28_000}

# Of what these add and do not train, PEFT 0.21 saves: nothing; tables of whole numbers.
_KEEPS_FROZEN_APART = ("PSOFT", "TRAINABLE_TOKENS", "UNILORA")
_SAVES_INDEX = ("SHIRA", "SUPERTUNING")


class DiskNeeds(Struct, frozen=True, kw_only=True):
    """Bytes on disk. `weights`: the model's files as they are published; `checkpoint`: one of
    those; `final_model`: trained weights at the end, an adapter or the whole model.

    Left out: the tokenizer's files, which stand in each folder.
    """

    weights: int
    checkpoint: int
    final_model: int

    @property
    def checkpoints(self) -> int:
        """Those kept, and one that is being written."""
        return (CHECKPOINTS_KEPT + 1) * self.checkpoint

    @property
    def total(self) -> int:
        return self.weights + self.checkpoints + self.final_model

    def run_bytes(self, num_saves: float) -> int:
        """What the run directory comes to where so many checkpoints are written."""
        return int(min(num_saves, CHECKPOINTS_KEPT + 1)) * self.checkpoint + self.final_model

    def to_dict(self) -> Mapping[str, int]:
        return {
            "weights": self.weights,
            "checkpoints": self.checkpoints,
            "final_model": self.final_model,
        }


def disk_needs(
    model: ModelSpec, plan: TrainingPlan, *, saved_bytes: int, state_bytes: int
) -> DiskNeeds:
    """Disk of a run, eq. (11).

    `model`: as it is published; `saved_bytes`: weights that a save writes; `state_bytes`: optimizer
    states of all GPUs, fp32 masters among them. The checkpoint of DeepSpeed's stages 1 and 2 has
    the module's weights once more (`save_checkpoint` of deepspeed/runtime/engine.py). Known error:
    within 2 % of the trainer's files for models from 10 MB on, without the tokenizer's.
    """
    again = saved_bytes if plan.sharding in ("zero1", "zero2") else 0
    small = _SMALL_FILES_BYTES[plan.resolved_method.adapter]
    return DiskNeeds(
        weights=stored_bytes(model),
        checkpoint=saved_bytes + again + state_bytes + small,
        final_model=saved_bytes + small,
    )


def stored_bytes(model: ModelSpec) -> int:
    """The model's files on the Hub: its parameters in its own dtype; in 16 bits, as most are, where
    only a size is known."""
    width = 2 if model.approximate else BYTES_PER_DTYPE[model.native_dtype]
    return model.num_parameters * width


def saved_weight_bytes(model: ModelSpec, plan: TrainingPlan, trained: Trained, stack: Stack) -> int:
    """Bytes of the weights that a save writes. `model`: as the plan's objective has it.

    The whole model, frozen weights included (`PreTrainedModel.save_pretrained`); of adapters these
    alone (`PeftModel.save_pretrained`). ZeRO's weights are those that the engine computes with,
    FSDP's the masters.
    """
    frozen, own, adapters = _widths(plan, stack)
    if not plan.resolved_method.adapter:
        changed = trained.base_parameters
        return changed * own + (model.num_parameters - changed) * frozen
    if plan.resolved_method.peft_type == "P_TUNING":  # the prompt that its network makes
        return trained.num_virtual_tokens * model.hidden_size * adapters
    return (
        num_elements(trained.adapters) * adapters
        + num_elements(trained.held_as_base) * own
        + _saved_beside(model, plan, trained)
    )


def _widths(plan: TrainingPlan, stack: Stack) -> tuple[int, int, int]:
    """Bytes of a frozen weight, a trained one of the model's own, and an adapter's."""
    if plan.sharding in ZERO:
        return (plan.compute_bytes,) * 3
    spread = spread_of(plan, stack)
    if spread is not None:
        return spread.frozen, spread.trained, spread.adapters
    return plan.weight_bytes, plan.weight_bytes, adapter_weight_bytes(plan)


def _saved_beside(model: ModelSpec, plan: TrainingPlan, trained: Trained) -> int:
    """What an adapter's file has of what is not trained."""
    kind = plan.resolved_method.peft_type
    index = trained.index_bytes if kind in _SAVES_INDEX else 0
    if kind in _KEEPS_FROZEN_APART:
        return index
    copies = 1
    if kind == "RANDLORA":  # its bases stand there once, and for each module
        copies += sum(model.layer_counts[layer] * len(own) for layer, own in trained.adapted)
    return index + copies * trained.frozen_parameters * FLOAT32_BYTES
