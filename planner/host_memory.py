"""RAM of the machine: its processes, the files that they map, and what waits on the host.

A sum over all processes, one a GPU, on one machine. Equations are numbered in
docs/memory-model.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct, structs

from ftplan.planner.disk import MERGED_WEIGHT_BYTES, stored_bytes
from ftplan.planner.hardware_spec import CPU_PROCESS_BYTES, CUDA_HOST_BYTES, DeviceKind
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.units import FLOAT32_BYTES

HOST_COMPONENTS: dict[str, str] = {
    "processes": "processes: Python, its libraries, CUDA",
    "mapped_files": "weight files, mapped",
    "weights": "weights on the host",
    "gradients": "gradients on the host",
    "optimizer_states": "optimizer states on the host",
    "buffers": "buffers between host and GPU",
    "training": "training on the processor",
    "copies": "copies of weights that are divided or written",
}

# `max_shard_size` of `save_pretrained`, transformers 5: what is written at once.
SAVED_AT_ONCE_BYTES = 50 * 10**9


class HostPhase(Struct, frozen=True, kw_only=True):
    """One phase of a run, and what the machine's RAM holds at its highest point."""

    name: str
    components: Mapping[str, int]

    @property
    def peak_bytes(self) -> int:
        return sum(self.components.values())

    @property
    def required_bytes(self) -> int:
        """Without the mapped files' pages, which the kernel takes back where RAM is short."""
        return self.peak_bytes - self.components.get("mapped_files", 0)


class HostMemory(Struct, frozen=True, kw_only=True):
    """RAM over a run. `merging_bytes`: of a process that merges the adapter afterwards, on the
    processor and in 16 bits; None where there is none to merge."""

    phases: tuple[HostPhase, ...]
    merging_bytes: int | None = None

    @property
    def peak_phase(self) -> HostPhase:
        return max(self.phases, key=lambda phase: phase.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        """Resident memory of all processes at its highest, shared pages once."""
        return self.peak_phase.peak_bytes

    @property
    def required_bytes(self) -> int:
        """The least RAM with which the run survives."""
        return max(phase.required_bytes for phase in self.phases)

    def trained_on_processor(self, num_bytes: int) -> HostMemory:
        """The same, where training takes so much of this RAM, its process included."""
        components = {
            "processes": CPU_PROCESS_BYTES,
            "training": max(0, num_bytes - CPU_PROCESS_BYTES),
        }
        training = HostPhase(name="training", components=components)
        return structs.replace(self, phases=(*self.phases, training))

    def to_dict(self) -> dict[str, Any]:
        return {
            "peak_phase": self.peak_phase.name,
            "required_bytes": self.required_bytes,
            "phases": [
                {
                    "name": phase.name,
                    "peak_bytes": phase.peak_bytes,
                    "components": dict(phase.components),
                }
                for phase in self.phases
            ],
            "merging_bytes": self.merging_bytes,
        }


class HostShare(Struct, frozen=True, kw_only=True):
    """What one process keeps in the host's memory, in bytes."""

    weights: int = 0
    gradients: int = 0
    optimizer_states: int = 0
    buffers: int = 0

    def times(self, num_processes: int) -> dict[str, int]:
        sizes = structs.asdict(self)
        return {name: num_processes * size for name, size in sizes.items() if size}


NOTHING_ON_HOST = HostShare()


def host_memory(
    model: ModelSpec,
    plan: TrainingPlan,
    kind: DeviceKind,
    *,
    share: HostShare = NOTHING_ON_HOST,
    trained_own: int,
    trained_all: int,
    saved_bytes: int,
) -> HostMemory:
    """RAM of a run on one machine, eq. (9), but for training on a processor.

    `model`: as it is published; `share`: what each process keeps there while it trains;
    `trained_own`, `trained_all`: trained parameters of the model itself, and with what a method
    adds; `saved_bytes`: what a save writes.
    """
    merges = plan.resolved_method.peft_type == "LORA"
    merging = CPU_PROCESS_BYTES + model.num_parameters * MERGED_WEIGHT_BYTES
    if kind == "cpu":
        parts = {"loading": {"processes": CPU_PROCESS_BYTES, **_loaded_on_host(model, plan)}}
    else:
        processes = {"processes": plan.gpus_per_machine * (CPU_PROCESS_BYTES + CUDA_HOST_BYTES)}
        waiting = share.times(plan.gpus_per_machine)
        parts = {"loading": {**processes, **_loading(model, plan, waiting, trained_own)}}
        if plan.sharding in ("zero1", "zero2"):
            parts["dividing"] = {**processes, "copies": _divided(plan, trained_all)}
        parts["training"] = {**processes, **waiting}
        copies = _written(plan, saved_bytes)
        parts["saving"] = {**processes, **waiting, "copies": copies}
    return HostMemory(
        phases=tuple(HostPhase(name=name, components=sizes) for name, sizes in parts.items()),
        merging_bytes=merging if merges else None,
    )


def _loading(
    model: ModelSpec, plan: TrainingPlan, waiting: Mapping[str, int], trained_own: int
) -> dict[str, int]:
    """The model's files are mapped, and stay so until all is read; processes share their pages.

    A process reads them straight to its GPU (`device_map`), or quantizes them there. Under FSDP and
    ZeRO-3 an unquantized model is made on the host first, by the first process alone
    (`fsdp_cpu_ram_efficient_loading`, which `accelerate launch` turns on;
    `is_deepspeed_zero3_enabled` in transformers 5.23's modeling_utils.py). FSDP's masters are made
    there too (`fsdp2_prepare_model` of accelerate 1.15), before the model is divided.
    """
    parts = {"mapped_files": stored_bytes(model)}
    if not plan.shards_parameters:
        return parts
    parts["weights"] = waiting.get("weights", 0)
    if plan.sharding == "fsdp" and plan.quantization == "none":
        whole = _loaded_on_host(model, plan)
        parts["weights"] += whole.get("weights", 0)
        if plan.autocast and plan.weight_bytes != FLOAT32_BYTES:
            parts["copies"] = trained_own * FLOAT32_BYTES
    return parts


def _loaded_on_host(model: ModelSpec, plan: TrainingPlan) -> dict[str, int]:
    """A model on the processor: its weights are the mapped file, until they are written to."""
    parts = {"mapped_files": stored_bytes(model)}
    if not _is_its_file(model, plan):
        parts["weights"] = model.num_parameters * plan.weight_bytes
    return parts


def _is_its_file(model: ModelSpec, plan: TrainingPlan) -> bool:
    """Whether the weights are as the file has them: of that dtype, and no experts, which
    transformers 5 stacks anew (`MergeModulelist` of core_model_loading.py)."""
    if any(layer.feed_forward.experts for layer in model.layer_counts):
        return False
    if model.approximate:
        return stored_bytes(model) == model.num_parameters * plan.weight_bytes
    return model.native_dtype == plan.dtype


def _divided(plan: TrainingPlan, trained: int) -> int:
    """ZeRO-1 and ZeRO-2 flatten what is trained: every process copies it to the host, and copies
    that into one buffer (`DeepSpeedZeroOptimizer.__init__`), before there are masters."""
    return plan.gpus_per_machine * 2 * trained * plan.compute_bytes


def _written(plan: TrainingPlan, saved_bytes: int) -> int:
    """Copies of weights while they are saved.

    safetensors keeps a copy of all that a file gets (`_flatten_as_ptr` of safetensors 0.8). Under
    ZeRO-3 and FSDP the first process copies what is saved. Under tensor parallelism each process
    first gathers that (`gather_state_dict_for_save` of transformers 5.23).
    """
    if plan.tp_size > 1:
        return plan.gpus_per_machine * saved_bytes + min(saved_bytes, SAVED_AT_ONCE_BYTES)
    if not plan.shards_parameters:
        return min(saved_bytes, SAVED_AT_ONCE_BYTES)
    return saved_bytes


def share_under_zero(
    plan: TrainingPlan, *, share: int, states: int, largest: int, base_share: int = 0
) -> HostShare:
    """What DeepSpeed's offloading keeps on the host, for each process, eq. (10).

    `share`: elements of its share of what is trained, `states`: bytes of their fp32 masters and
    the optimizer's states; `largest`: elements of the largest trained parameter; `base_share`: of
    all parameters. Besides, the masters have gradients. Stages 1 and 2 have a 16-bit copy of the
    share, a buffer of one parameter, and with accumulation the gradients so far; stage 3 the
    gradients in 16 bits and, where they are offloaded, the parameters. Source: stage_1_and_2.py
    and stage3.py of deepspeed/runtime/zero. None of it is pinned unless asked for.
    """
    if plan.offload == "none":
        return NOTHING_ON_HOST
    width = plan.compute_bytes
    if plan.sharding == "zero3":
        return HostShare(
            weights=base_share * width if plan.offload == "parameters" else 0,
            gradients=share * (FLOAT32_BYTES + width),
            optimizer_states=states,
        )
    accumulated = share * width if plan.gradient_accumulation_steps > 1 else 0
    return HostShare(
        gradients=share * FLOAT32_BYTES + accumulated,
        optimizer_states=states,
        buffers=(share + largest) * width,
    )
