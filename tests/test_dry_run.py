"""The dry run against the processor for real, and few traced layers against all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

pytest.importorskip("trl", reason="needs the `train` extra")

import torch
from torch import nn

from ftplan.launcher.dry_run.case import DryRunCase
from ftplan.launcher.dry_run.layers import keep_few_layers
from ftplan.launcher.dry_run.step import dry_run
from ftplan.launcher.training.build import count_trainable
from tests.dry_runs import (
    BF16,
    DEEPSEEK,
    EVERY_SECOND,
    FREEZE,
    GEMMA3,
    GENERATOR_STATE_BYTES,
    GPT2,
    GPT2_MODULES,
    LLAMA,
    PHASES,
    QLORA,
    QWEN3,
    QWEN3_MOE,
    REENTRANT,
    assert_equal_records,
    case,
    cuda_case,
    measured_peaks,
    num_checkpointed,
    real_trainer,
)
from tests.sweeps import named

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("on_the_processor")]

JOINED = {
    *("freeze, checkpointing", "lora, GPT-2, one in 2", "full, loop, one in 2"),
    *("qlora nf4, one in 2", "qlora nf4, checkpointing", "lora, Trainer, checkpointing"),
    *("lora, loop, accumulation, checkpointing", "lora, Trainer, reentrant"),
}
JOINED_ON_GPU = {"lora, reentrant checkpointing", "full, loop", "qlora int8"}


@pytest.mark.parametrize(
    "dry_case",
    [
        named(name, case(config, **settings), joined=JOINED)
        for name, config, settings in (
            ("full", LLAMA, {"method": "full"}),
            ("full, checkpointing", LLAMA, {"method": "full", "gradient_checkpointing": True}),
            ("full, reentrant checkpointing", LLAMA, {"method": "full", **REENTRANT}),
            ("lora, reentrant checkpointing", LLAMA, REENTRANT),
            ("lora, Trainer, reentrant", LLAMA, {"trainer": "transformers", **REENTRANT}),
            ("full, accumulation", LLAMA, {"method": "full", "gradient_accumulation_steps": 2}),
            ("full, fused loss", LLAMA, {"method": "full", "loss": "trl-fused"}),
            ("full, fused AdamW", LLAMA, {"method": "full", "optim": "adamw_torch_fused"}),
            ("full, SGD", LLAMA, {"method": "full", "optim": "sgd"}),
            ("full, autocast", LLAMA, {"method": "full", "mixed_precision": "bf16"}),
            ("full, Trainer", LLAMA, {"method": "full", "trainer": "transformers"}),
            ("full, loop", LLAMA, {"method": "full", "trainer": "loop"}),
            ("full, Qwen3, eager", QWEN3, {"method": "full", "attn_implementation": "eager"}),
            ("full, GPT-2", GPT2, {"method": "full"}),
            ("freeze", LLAMA, FREEZE),
            ("freeze, checkpointing", LLAMA, {**FREEZE, "gradient_checkpointing": True}),
            ("lora", LLAMA, {}),
            ("lora, dropout", LLAMA, {"lora_dropout": 0.1}),
            ("lora, checkpointing", LLAMA, {"gradient_checkpointing": True}),
            (
                "lora, dropout, fused loss, accumulation, checkpointing",
                QWEN3,
                {
                    **{"lora_dropout": 0.1, "loss": "trl-fused"},
                    **{"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
                },
            ),
            ("full, one layer in 2 checkpointed", LLAMA, {"method": "full", **EVERY_SECOND}),
            ("lora, one in 2, reentrant", LLAMA, {**EVERY_SECOND, "use_reentrant": True}),
            ("lora, GPT-2, one in 2", GPT2, {**EVERY_SECOND, "target_modules": GPT2_MODULES}),
            ("full, loop, one in 2", LLAMA, {"method": "full", "trainer": "loop", **EVERY_SECOND}),
            ("qlora nf4, one in 2", LLAMA, {**QLORA, **EVERY_SECOND}),
            ("lora, bf16", LLAMA, BF16),
            ("lora, GPT-2", GPT2, {"target_modules": GPT2_MODULES}),
            (
                "lora, Trainer, checkpointing",
                LLAMA,
                {"trainer": "transformers", "gradient_checkpointing": True},
            ),
            (
                "lora, loop, accumulation, checkpointing",
                LLAMA,
                {
                    **{"trainer": "loop", "gradient_accumulation_steps": 2},
                    "gradient_checkpointing": True,
                },
            ),
            ("qlora nf4", LLAMA, QLORA),
            ("qlora nf4, single quantization", LLAMA, {**QLORA, "double_quant": False}),
            ("qlora nf4, checkpointing", LLAMA, {**QLORA, "gradient_checkpointing": True}),
            ("qlora fp4", LLAMA, {**QLORA, "quantization": "fp4"}),
            ("qlora int8", LLAMA, {**QLORA, "quantization": "int8"}),
            (
                "qlora nf4, prepared by PEFT",
                LLAMA,
                {**QLORA, **BF16, "trainer": "transformers", "kbit_prepare": True},
            ),
        )
    ],
)
def test_a_dry_run_takes_what_the_real_steps_take(dry_case: DryRunCase, tmp_path: Path) -> None:
    """The peak of each phase is within 1 % of the measured one; nearly always far nearer.

    Two differences are known and never more than that. Checkpointing keeps the generator's state,
    see GENERATOR_STATE_BYTES. Numbers that torch wraps as tensors of 4 or 8 bytes, such as the
    adapters' scale, are not allocated under fake tensors. Beyond both nothing differs.
    """
    trainer = real_trainer(dry_case, tmp_path)
    measured = measured_peaks(trainer)
    done = dry_run(structs.replace(dry_case, few_layers=False))
    assert done.num_trainable_parameters == count_trainable(trainer.model)
    peaks = done.record.phase_peaks()
    unseen = GENERATOR_STATE_BYTES * num_checkpointed(dry_case.plan)
    for phase in PHASES:
        predicted = peaks[phase].allocated_bytes
        assert predicted == pytest.approx(measured[phase], rel=0.01), phase
        assert -2e-4 <= 1 - predicted / measured[phase] <= unseen / measured[phase] + 2e-4, phase


@pytest.mark.parametrize("loss", ["stock", "trl-fused"])
def test_an_evaluation_takes_what_a_real_one_takes(loss: str, tmp_path: Path) -> None:
    """The real one has fetched the next batch already."""
    dry_case = case(method="full", loss=loss)
    measured = measured_peaks(real_trainer(dry_case, tmp_path), evaluates=True)
    predicted = dry_run(dry_case).record.phase_peaks()["evaluation"].allocated_bytes
    assert predicted == pytest.approx(measured["evaluation"], rel=0.01)


def test_the_generator_state_is_as_large_as_assumed() -> None:
    assert torch.get_rng_state().untyped_storage().nbytes() == GENERATOR_STATE_BYTES


# --- few layers for all --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dry_case", "traced"),
    [
        named(name, cuda_case(config, **settings), traced, joined=JOINED_ON_GPU)
        for name, config, traced, settings in (
            ("lora", LLAMA, 4, {"trainer": "transformers", "attn_implementation": "eager"}),
            (
                "lora, checkpointing",
                LLAMA,
                4,
                {"gradient_checkpointing": True, "attn_implementation": "flash_attention_2"},
            ),
            ("lora, reentrant checkpointing", LLAMA, 4, REENTRANT),
            (
                "lora, dropout, fused loss, accumulation",
                LLAMA,
                4,
                {"lora_dropout": 0.1, "loss": "trl-fused", "gradient_accumulation_steps": 2},
            ),
            ("full", LLAMA, 4, {"method": "full", "dtype": "float32", "num_gpus": 2}),
            ("full, loop", LLAMA, 4, {"method": "full", "trainer": "loop"}),
            ("freeze", LLAMA, 5, FREEZE),
            ("qlora nf4", LLAMA, 4, {**QLORA, "gradient_checkpointing": True}),
            ("qlora int8", LLAMA, 4, {**QLORA, "quantization": "int8"}),
            ("Gemma 3", GEMMA3, 8, {"num_layers": 10, "optim": "sgd"}),
            ("Qwen3 mixture", QWEN3_MOE, 4, {"trainer": "transformers"}),
            ("DeepSeek-V3, full", DEEPSEEK, 5, {"method": "full", "optim": "sgd"}),
            ("GPT-2", GPT2, 4, {}),
            ("one layer in 2 checkpointed", LLAMA, 9, {"num_layers": 13, **EVERY_SECOND}),
        )
    ],
)
def test_few_layers_stand_for_all(dry_case: DryRunCase, traced: int) -> None:
    """The whole record is the same: every storage, event and phase, and so every reading.

    All but one thing: before clipping, gradient norms are put together into one tensor of four
    bytes for each *traced* gradient. It lives for two operations of the optimizer step and is
    smaller than a block of the allocator up to 128 gradients.
    """
    few = dry_run(dry_case)
    every = dry_run(structs.replace(dry_case, few_layers=False))
    assert few.num_layers_traced == traced < every.num_layers_traced == few.num_layers
    assert few.num_parameters == every.num_parameters
    assert few.num_trainable_parameters == every.num_trainable_parameters
    assert_equal_records(few.record, every.record)


def test_packed_rows_take_what_full_rows_take() -> None:
    """One row of all tokens, whose attention keeps rows apart by their lengths."""
    settings = {"per_device_train_batch_size": 4, "attn_implementation": "flash_attention_2"}
    cases = [cuda_case(LLAMA, packing=packing, **settings) for packing in (True, False)]
    packed, full = (dry_run(dry_case).record for dry_case in cases)
    length = cases[0].row_length
    assert packed.peak.allocated_bytes == pytest.approx(full.peak.allocated_bytes, rel=0.01)
    shapes = {storage.shape for storage in packed.storages}
    assert (1, 4 * length, 64) in shapes
    assert (4, length, 64) not in shapes


def test_layers_that_turn_out_unlike_are_all_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftplan.launcher.dry_run.layers._signature", lambda layer, shared: "same")
    said: list[str] = []
    done = dry_run(cuda_case(LLAMA, 5, method="freeze", num_trainable_layers=3), said.append)
    assert done.num_layers_traced == done.num_layers == 5
    assert any("tracing all" in text for text in said)


def test_layers_that_meet_in_an_auxiliary_loss_are_all_traced() -> None:
    """TRL adds the loss that balances experts, from what the routers of all layers gave."""
    done = dry_run(cuda_case(QWEN3_MOE, num_layers=5, method="freeze", num_trainable_layers=1))
    assert done.num_layers_traced == done.num_layers == 5
    without = {**QWEN3_MOE, "router_aux_loss_coef": 0.0}
    done = dry_run(cuda_case(without, num_layers=6, method="freeze", num_trainable_layers=1))
    assert (done.num_layers_traced, done.num_layers) == (5, 6)


def test_a_model_whose_kinds_of_layers_follow_from_their_number_stays_whole() -> None:
    class Config:
        num_hidden_layers = 9

        @property
        def layer_types(self) -> list[str]:
            return ["attention"] * self.num_hidden_layers

    model: Any = nn.Module()
    model.config = Config()
    model.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
    assert keep_few_layers(model) is None
    assert len(model.layers) == 9


# --- what a GPU does otherwise -------------------------------------------------------------------


def test_an_int8_base_trains_by_the_gpus_kernels() -> None:
    """Its products are summed up in int32; the processor's way of training has none."""
    done = dry_run(cuda_case(LLAMA, 1, **{**QLORA, "quantization": "int8"}))
    (_, start, end) = next(r for r in done.record.phase_ranges() if r[0] == "forward")
    born = [done.record.storages[event] for event in done.record.events[start:end] if event >= 0]
    assert ("int32", (2 * 64, 160)) in {(s.dtype, s.shape) for s in born}


def test_layers_are_computed_again_under_the_same_autocast() -> None:
    """PEFT makes fp32 inputs of its own unless CUDA's autocast is on."""
    for use_reentrant in (False, True):
        settings = {"mixed_precision": "bf16", "trainer": "transformers", "quantization": "nf4"}
        record = dry_run(
            cuda_case(
                LLAMA,
                1,
                **{**QLORA, **settings, "gradient_checkpointing": True},
                use_reentrant=use_reentrant,
            )
        ).record
        copies = [s for s in record.storages if s.module.endswith("q_proj")]
        assert "float32" not in {s.dtype for s in copies if s.shape == (2, 64, 64)}, use_reentrant


def test_padding_masks_attention() -> None:
    """Without padding CUDA's flash kernel runs; with it scores are masked, and the mask lives."""
    whole, padded = (dry_run(cuda_case(LLAMA, 1, padded=p)).record for p in (False, True))
    mask = (2, 1, 64, 64)
    assert mask not in {s.shape for s in whole.storages}
    assert mask in {s.shape for s in padded.storages}
    assert padded.peak.allocated_bytes > whole.peak.allocated_bytes


# --- one process serves many cases ---------------------------------------------------------------


def test_a_case_leaves_nothing_behind_for_the_next() -> None:
    """The same case gives the same record before and after one that is otherwise in all ways."""
    plain = case(method="full", mixed_precision="bf16")
    before = dry_run(plain).record
    unlike = {"mixed_precision": "fp16", "dtype": "float32", "trainer": "transformers"}
    kernels = {"attn_implementation": "flash_attention_2", "transformers_version": (4, 48)}
    dry_run(cuda_case(LLAMA, 1, **unlike, **kernels))
    after = dry_run(plain).record
    assert (after.events, after.storages) == (before.events, before.storages)
