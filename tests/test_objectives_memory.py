"""The closed form beside dry runs: training objectives, evaluation, packing and the processor."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

pytest.importorskip("trl", reason="needs the `train` extra")

from ftplan.launcher.dry_run.case import DryRunCase
from ftplan.launcher.dry_run.step import dry_run
from ftplan.planner.families import spec_from_config
from ftplan.planner.hardware_spec import Device
from ftplan.planner.memory import estimate_memory
from ftplan.planner.objectives import trained_model, trained_part
from ftplan.planner.phases import STEP_PHASES
from ftplan.planner.rewards import with_reward_model
from ftplan.planner.stack import Stack
from ftplan.planner.trained import target_names
from tests.dry_runs import BF16, FREEZE, GPT2, GPT2_MODULES, LLAMA, QLORA, QWEN3, REENTRANT, case
from tests.sweeps import named

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("on_the_processor")]

# Wide enough that what is counted in bytes a token outweighs rounding to 512 bytes, which dry runs
# of a GPU do.
WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "vocab_size": 4000,
    "max_position_embeddings": 1024,
}
CUDA: dict[str, Any] = {**BF16, "kind": "cuda"}
DPO: dict[str, Any] = {"objective": "dpo", "loss": "trl-fused"}
ORPO: dict[str, Any] = {"objective": "orpo", "loss": "trl-fused"}
SIMPO: dict[str, Any] = {"objective": "simpo", "loss": "trl-fused"}
KTO: dict[str, Any] = {"objective": "kto", "loss": "trl-fused"}
REWARD: dict[str, Any] = {"objective": "reward"}
HEAD: dict[str, Any] = {"modules_to_save": ("lm_head",)}
FULL: dict[str, Any] = {"method": "full"}
FUSED: dict[str, Any] = {"loss": "trl-fused"}
CHECKPOINTING: dict[str, Any] = {"gradient_checkpointing": True}
PRECOMPUTED: dict[str, Any] = {"precompute_ref_log_probs": True}
EAGER: dict[str, Any] = {"attn_implementation": "eager"}
PACKED: dict[str, Any] = {"packing": True, "attn_implementation": "flash_attention_2"}

# Of a phase's peak; and only phases above this share of the highest are compared.
TOLERANCE = 0.005
SHARE_OF_PEAK = 0.05
# What a batch holds before the first step begins, and rounding: bytes.
SLACK = 200 * 1024

WIDE_LLAMA = {**LLAMA, **WIDE}
WIDE_QWEN3 = {**QWEN3, **WIDE, "head_dim": 64}
WIDE_GPT2 = {**GPT2, "n_embd": 256, "n_layer": 4, "vocab_size": 4000, "n_positions": 512}
WIDE_PHI3 = {**LLAMA, **WIDE, "model_type": "phi3", "pad_token_id": 0}
WIDE_PHI = {**WIDE_PHI3, "model_type": "phi", "partial_rotary_factor": 0.5}
WIDE_GEMMA2 = {**QWEN3, **WIDE, "model_type": "gemma2", "head_dim": 64, "sliding_window": 4096}

JOINED = {
    *("dpo, freeze, checkpointing", "dpo, qlora", "orpo, full", "kto, qlora", "reward, qlora"),
    *("reward, freeze", "reward, lora, reentrant", "packed, full", "packed, qlora"),
    *("cpu, lora, dropout", "cpu, dpo", "cpu, kto", "cpu, reward, eager"),
}

PROCESSOR = Device(
    name="CPU",
    kind="cpu",
    total_bytes=2**40,
    free_bytes=2**40,
    memory_bandwidth_bytes_per_second=1e11,
    peak_flops_per_second={"float32": 1e12},
)
CARD = structs.replace(PROCESSOR, name="card", kind="cuda")


def wide_case(config: dict[str, Any], **settings: Any) -> DryRunCase:
    return case(config, **{"max_length": 512, "target_modules": ("all-linear",), **settings})


def dry_peaks(dry_case: DryRunCase) -> dict[str, int]:
    """Each phase's peak in a dry run; a micro-batch's phases as one, since the closed form has the
    loss of both directions as a phase of its own."""
    peaks = dry_run(_with_names(dry_case)).record.phase_peaks()
    return _joined({name: peak.allocated_bytes for name, peak in peaks.items()})


def _with_names(dry_case: DryRunCase) -> DryRunCase:
    """Target modules spelled out, as a dry run from the command line gets them."""
    model = spec_from_config(dry_case.config, "")
    names = target_names(model, dry_case.plan.target_modules)
    plan = dry_case.plan.replace(target_modules=names)
    return structs.replace(dry_case, plan=plan)


def closed_peaks(dry_case: DryRunCase, card: Device | None = None) -> dict[str, int]:
    """The same in closed form, on a card or one of the default compute capability."""
    stack = Stack(**{name: getattr(dry_case, name) for name in Stack.__struct_fields__})
    model = spec_from_config(dry_case.config, "")
    if dry_case.reward_config is not None:
        model = with_reward_model(model, spec_from_config(dry_case.reward_config, ""))
    memory = estimate_memory(
        model,
        dry_case.plan,
        device=PROCESSOR if dry_case.kind == "cpu" else card,
        stack=stack,
    )
    return _joined({phase.name: phase.allocated_peak_bytes for phase in memory.phases})


def _joined(peaks: dict[str, int]) -> dict[str, int]:
    step = max(peaks.pop(name) for name in STEP_PHASES if name in peaks)
    return {**peaks, "micro-batch": step}


@pytest.mark.parametrize(
    "dry_case",
    [
        named(name, wide_case(config, **settings), joined=JOINED)
        for name, config, settings in (
            ("dpo, full", WIDE_LLAMA, {**CUDA, **DPO, **FULL}),
            ("dpo, full, fp32", WIDE_QWEN3, {**CUDA, **DPO, **FULL, "dtype": "float32"}),
            ("dpo, full, precomputed", WIDE_PHI, {**CUDA, **DPO, **FULL, **PRECOMPUTED}),
            ("dpo, freeze, checkpointing", WIDE_LLAMA, {**CUDA, **DPO, **FREEZE, **CHECKPOINTING}),
            ("dpo, lora", WIDE_LLAMA, {**CUDA, **DPO, "lora_dropout": 0.1}),
            (
                "dpo, lora, precomputed, checkpointing",
                WIDE_GPT2,
                {
                    **{**CUDA, **DPO, **PRECOMPUTED, **CHECKPOINTING},
                    **{"gradient_accumulation_steps": 2, "target_modules": GPT2_MODULES},
                },
            ),
            ("dpo, qlora", WIDE_LLAMA, {**CUDA, **DPO, **QLORA}),
            ("orpo, full", WIDE_LLAMA, {**CUDA, **ORPO, **FULL}),
            ("orpo, lora, checkpointing", WIDE_QWEN3, {**CUDA, **ORPO, **CHECKPOINTING}),
            ("simpo, qlora", WIDE_LLAMA, {**CUDA, **SIMPO, **QLORA}),
            ("cpu, simpo", WIDE_PHI, {**SIMPO, **FULL}),
            ("kto, full", WIDE_LLAMA, {**CUDA, **KTO, **FULL}),
            ("kto, lora, checkpointing", WIDE_QWEN3, {**CUDA, **KTO, **CHECKPOINTING}),
            ("kto, qlora", WIDE_PHI3, {**CUDA, **KTO, **QLORA}),
            ("reward, full, checkpointing", WIDE_PHI3, {**CUDA, **REWARD, **FULL, **CHECKPOINTING}),
            ("reward, lora", WIDE_LLAMA, {**CUDA, **REWARD}),
            ("reward, lora, no head to save", WIDE_LLAMA, {**CUDA, **REWARD, **HEAD}),
            ("reward, lora, eager", WIDE_LLAMA, {**CUDA, **REWARD, **EAGER}),
            ("reward, lora, reentrant", WIDE_QWEN3, {**CUDA, **REWARD, **REENTRANT}),
            ("reward, qlora", WIDE_LLAMA, {**CUDA, **REWARD, **QLORA}),
            ("reward, freeze", WIDE_LLAMA, {**CUDA, **REWARD, **FREEZE, **CHECKPOINTING}),
            ("int8", WIDE_LLAMA, {**CUDA, **FUSED, **QLORA, "quantization": "int8"}),
            ("packed, lora", WIDE_LLAMA, {**CUDA, **FUSED, **PACKED}),
            ("packed, full", WIDE_QWEN3, {**CUDA, **FULL, **PACKED, **CHECKPOINTING}),
            ("packed, qlora", WIDE_LLAMA, {**CUDA, **FUSED, **QLORA, **PACKED}),
            ("cpu, full", WIDE_LLAMA, FULL),
            ("cpu, full, tiles", WIDE_QWEN3, {**FULL, **FUSED, **CHECKPOINTING}),
            ("cpu, full, tiles, softcap", WIDE_GEMMA2, {**FULL, **FUSED, **EAGER}),
            ("cpu, lora, checkpointing", WIDE_LLAMA, CHECKPOINTING),
            ("cpu, lora, dropout", WIDE_LLAMA, {"lora_dropout": 0.1}),
            ("cpu, freeze, rmsprop", WIDE_PHI, {**FREEZE, "optim": "rmsprop"}),
            ("cpu, autocast", WIDE_QWEN3, {**BF16, **FUSED}),
            ("cpu, dpo", WIDE_LLAMA, {**DPO, **FULL}),
            ("cpu, kto", WIDE_LLAMA, KTO),
            ("cpu, reward, eager", WIDE_LLAMA, {**REWARD, **EAGER}),
        )
    ],
)
def test_every_phase_is_what_a_dry_run_has(dry_case: DryRunCase) -> None:
    dry, closed = dry_peaks(dry_case), closed_peaks(dry_case)
    assert closed.keys() == dry.keys()
    least = SHARE_OF_PEAK * max(dry.values())
    for phase, peak in dry.items():
        if peak > least:
            assert closed[phase] == pytest.approx(peak, rel=TOLERANCE, abs=SLACK), phase


def test_a_reference_model_is_a_second_one() -> None:
    """And none is held where adapters are switched off, or its pass comes before training."""
    held = {
        name: estimate_memory(
            spec_from_config(WIDE_LLAMA, ""), wide_case(WIDE_LLAMA, **settings).plan
        ).peak_phase.components["reference_model"]
        for name, settings in {
            "full": {**CUDA, **DPO, **FULL},
            "lora": {**CUDA, **DPO},
            "precomputed": {**CUDA, **DPO, **FULL, **PRECOMPUTED},
        }.items()
    }
    weights = 2 * spec_from_config(WIDE_LLAMA, "").num_parameters
    assert held == {"full": weights, "lora": 0, "precomputed": 0}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_reward_model_has_a_score_for_a_head(method: str) -> None:
    dry_case = _with_names(wide_case(WIDE_LLAMA, **CUDA, **REWARD, method=method, max_length=16))
    done = dry_run(dry_case)
    model = trained_model(spec_from_config(WIDE_LLAMA, ""), dry_case.plan)
    trained = trained_part(model, dry_case.plan)
    assert trained.num_trainable_parameters == done.num_trainable_parameters
    if method == "full":
        assert model.num_parameters == done.num_parameters


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("mixed_precision", ["fp16", "no"])
def test_grouped_heads_on_a_card_before_ampere(rows: int, mixed_precision: str) -> None:
    """Plain attention carries them out, and torch's memory-efficient kernel from 2.14 on."""
    settings = {**CUDA, **FULL, "dtype": "float32", "mixed_precision": mixed_precision}
    peaks = []
    for efficient_takes_groups in (False, True):
        dry_case = wide_case(
            WIDE_LLAMA,
            **settings,
            capability=(7, 5),
            efficient_takes_groups=efficient_takes_groups,
            per_device_train_batch_size=rows,
        )
        dry, closed = (
            dry_peaks(dry_case),
            closed_peaks(dry_case, structs.replace(CARD, compute_capability=(7, 5))),
        )
        assert closed == pytest.approx(dry, rel=0.015)
        assert closed["micro-batch"] == pytest.approx(dry["micro-batch"], rel=0.002)
        peaks.append(closed["micro-batch"])
    assert peaks[0] > 1.05 * peaks[1]
