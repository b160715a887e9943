"""Disk that a run takes: the model as it is downloaded, checkpoints, and what is left."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from ftplan.planner.cycles import DEFAULT_CYCLES
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
    those; `final_model`: trained weights at the end, an adapter or the whole model;
    `merged_adapter`: one of those that ReLoRA and PLoRA have merged, kept beside the checkpoints.

    Left out: the tokenizer's files, which stand in each folder.
    """

    weights: int
    checkpoint: int
    final_model: int
    merged_adapter: int = 0

    @property
    def checkpoints(self) -> int:
        """Those kept, and one that is being written; and what a usual number of cycles merges."""
        merged = (DEFAULT_CYCLES - 1) * self.merged_adapter
        return (CHECKPOINTS_KEPT + 1) * self.checkpoint + merged

    @property
    def total(self) -> int:
        return self.weights + self.checkpoints + self.final_model

    def run_bytes(self, num_saves: float, num_merges: int = DEFAULT_CYCLES - 1) -> int:
        """What the run directory comes to where so many checkpoints are written, and adapters
        merged so many times."""
        written = int(min(num_saves, CHECKPOINTS_KEPT + 1)) * self.checkpoint
        return written + num_merges * self.merged_adapter + self.final_model

    def to_dict(self) -> Mapping[str, int]:
        return {
            "weights": self.weights,
            "checkpoints": self.checkpoints,
            "final_model": self.final_model,
        }


def disk_needs(
    model: ModelSpec,
    plan: TrainingPlan,
    *,
    saved_bytes: int,
    state_bytes: int,
    final_bytes: int | None = None,
) -> DiskNeeds:
    """Disk of a run, eq. (11).

    `model`: as it is published; `saved_bytes`: weights that a checkpoint has, and what is left in
    the end where that is not something else, of `final_bytes`; `state_bytes`: optimizer
    states of all GPUs, fp32 masters among them. The checkpoint of DeepSpeed's stages 1 and 2 has
    the module's weights once more (`save_checkpoint` of deepspeed/runtime/engine.py). Known error:
    within 2 % of the trainer's files for models from 10 MB on, without the tokenizer's.
    """
    again = saved_bytes if plan.sharding in ("zero1", "zero2") else 0
    small = _SMALL_FILES_BYTES[plan.resolved_method.adapter]
    return DiskNeeds(
        weights=stored_bytes(model),
        checkpoint=saved_bytes + again + state_bytes + small,
        final_model=(saved_bytes if final_bytes is None else final_bytes) + small,
        merged_adapter=saved_bytes if plan.resolved_method.merges else 0,
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


def final_weight_bytes(model: ModelSpec, plan: TrainingPlan, saved_bytes: int) -> int:
    """Bytes of the weights that a run leaves: the whole model where adapters are merged into it;
    of AdaLoRA the ranks that it has not taken away; else what a checkpoint has, `saved_bytes`."""
    method = plan.resolved_method
    if method.merges:
        return model.num_parameters * plan.weight_bytes
    if method.peft_type == "ADALORA":
        ranks = method.options(plan.method_settings).values
        return int(saved_bytes * ranks["target_r"] // ranks["init_r"])
    return saved_bytes


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
