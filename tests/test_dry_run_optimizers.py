"""Every optimizer's dry run against its real steps, the closed form, and all layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from msgspec import structs

pytest.importorskip("trl", reason="needs the `train` extra")

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from ftplan.launcher.dry_run.draft import Draft
from ftplan.launcher.dry_run.optimizers import (
    PROJECTORS,
    optimizer_behaviour,
    optimizer_kernels,
    renewed_projection,
)
from ftplan.launcher.dry_run.recorder import Recorder
from ftplan.launcher.dry_run.step import dry_run
from ftplan.planner.optimizers import OPTIMIZERS
from ftplan.planner.units import KIB
from tests.dry_runs import (
    LLAMA,
    PHASES,
    WORKSPACE_BYTES,
    assert_equal_records,
    case,
    cuda_case,
    measured_peaks,
    real_trainer,
)
from tests.sweeps import only_whole

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("on_the_processor")]

FULL: dict[str, Any] = {"method": "full"}

# Compiled for every shape: tested on one tensor below.
COMPILED = ("adamw_torch_4bit", "adamw_torch_8bit")
# Names that the processor carries out as it does another one.
LIKE_ANOTHER = {
    "adamw_bnb_8bit": "adamw_8bit",
    "rmsprop_bnb_32bit": "rmsprop_bnb",
    **{name: name.removeprefix("paged_") for name in OPTIMIZERS if name.startswith("paged_")},
    "paged_adamw_32bit": "paged_adamw_32bit",
    "paged_ademamix_32bit": "ademamix",
}
ON_THE_PROCESSOR = sorted(
    name for name in OPTIMIZERS if name not in COMPILED and LIKE_ANOTHER.get(name, name) == name
)


def needs(optim: str) -> None:
    """Skip where the optimizer's package is not installed."""
    module = OPTIMIZERS[optim].module
    if module:
        pytest.importorskip(module)


@contextmanager
def real_one_without_cuda(optim: str) -> Iterator[None]:
    """Some packages call CUDA by name, though nothing of theirs depends on it. bitsandbytes
    remembers what an earlier run overrode. RAdam's first steps are passed over and projections are
    made anew, as in the dry run.
    """
    module = OPTIMIZERS[optim].module
    with ExitStack() as stack:
        for target, replacement in (
            ("torch.cuda.synchronize", lambda: None),
            ("torch.Tensor.cuda", lambda tensor: tensor),
            ("bitsandbytes.optim.optimizer.GlobalOptimManager._instance", None),
        ):
            stack.enter_context(mock.patch(target, replacement))
        if optim == "schedule_free_radam":
            stack.enter_context(optimizer_behaviour(OPTIMIZERS[optim], "cpu"))
        if module in PROJECTORS:
            stack.enter_context(mock.patch(*renewed_projection(module)))
        yield


def replaced_bytes(trainer: Any, optim: str) -> int:
    """Weights that GaLore's 8-bit optimizer replaces. They were there before the profile began,
    which therefore does not see them go."""
    if not optim.startswith("galore_adamw_8bit"):
        return 0
    linear = (m for m in trainer.model.modules() if isinstance(m, torch.nn.Linear))
    return sum(module.weight.untyped_storage().nbytes() for module in linear)


@pytest.mark.parametrize("optim", ON_THE_PROCESSOR)
def test_a_dry_step_takes_what_the_real_one_takes(optim: str, tmp_path: Path) -> None:
    needs(optim)
    dry_case = case(LLAMA, **FULL, optim=optim)
    with real_one_without_cuda(optim):
        trainer = real_trainer(dry_case, tmp_path)
        unseen = replaced_bytes(trainer, optim)
        measured = measured_peaks(trainer)
    peaks = dry_run(structs.replace(dry_case, few_layers=False)).record.phase_peaks()
    for phase in PHASES:
        predicted = peaks[phase].allocated_bytes
        # Muon multiplies in 16 bits, for which oneDNN has buffers of its own on a processor.
        buffers = WORKSPACE_BYTES if (optim, phase) == ("muon", "optimizer step") else 0
        expected = pytest.approx(measured[phase] - unseen, rel=0.01, abs=buffers)
        assert predicted == expected, phase


# --- a GPU ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optim",
    [
        *("adafactor", "adamw_torch_8bit", "grokadamw", "galore_adamw_8bit_layerwise", "lomo"),
        *map(only_whole, ("adagrad", "ademamix_8bit", "stable_adamw", "galore_adafactor")),
        *map(only_whole, ("apollo_adamw", "adalomo")),
    ],
)
def test_few_layers_stand_for_all(optim: str) -> None:
    needs(optim)
    dry_case = cuda_case(LLAMA, **FULL, optim=optim)
    few = dry_run(dry_case)
    every = dry_run(structs.replace(dry_case, few_layers=False))
    assert few.num_layers_traced == 4 < every.num_layers_traced
    assert_equal_records(few.record, every.record)


# Large enough that every matrix has 8-bit states.
WIDE = {**LLAMA, "hidden_size": 256, "vocab_size": 1000, "architectures": ["LlamaForCausalLM"]}


def test_bitsandbytes_keeps_wide_states_of_embeddings() -> None:
    record = dry_run(cuda_case(WIDE, 1, **FULL, optim="adamw_8bit")).record
    states = [s for s in record.storages if s.component == "optimizer_states" and len(s.shape) > 1]
    dtypes = {(s.module, s.dtype) for s in states}
    assert ("model.embed_tokens", "float32") in dtypes
    assert {dtype for module, dtype in dtypes if module != "model.embed_tokens"} == {"uint8"}


def test_all_that_an_optimizer_keeps_is_counted_as_states() -> None:
    """What lies in projectors and in one optimizer for each parameter too."""
    for optim in ("galore_adamw", "galore_adamw_layerwise"):
        needs(optim)
        done = dry_run(cuda_case(LLAMA, 1, **FULL, optim=optim))
        parts = done.record.components_at(len(done.record.events) - 1)
        # Two states of 128 (all) columns, and a projection.
        assert parts["optimizer_states"] > 2 * done.num_trainable_parameters * 2


# --- stand-ins ------------------------------------------------------------------------------------


def peak_of(function: Callable[[], object]) -> int:
    """Tensor bytes that a real function allocates at its highest moment."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = function()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    del kept
    return peak


# What torch 2.13 hands to MKL, whatever the matrix.
LAPACK_WORKSPACE_BYTES = 16 * KIB


@pytest.mark.parametrize("shape", [(500, 64), (64, 160), (160, 128), (96, 96)])
def test_galores_decomposition_takes_what_lapack_takes(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    measured = peak_of(lambda: torch.linalg.svd(matrix, full_matrices=False))
    mode = FakeTensorMode()
    kernels = optimizer_kernels(OPTIMIZERS["galore_adamw"], "cpu")
    draft = Draft("model.layers")
    recorder = Recorder(draft, mode, kernels, padded=False)
    with mode:
        fake = torch.empty(shape)
        recorder.adopt([fake], "weights", "")
        draft.begin_phase("step")
        with recorder:
            torch.linalg.svd(fake, full_matrices=False)
    predicted = draft.finish().peak.allocated_bytes - 4 * matrix.numel()
    assert predicted == pytest.approx(measured, abs=LAPACK_WORKSPACE_BYTES)


@pytest.mark.parametrize(("optim", "bytes_each"), [("AdamW8bit", 8), ("AdamW4bit", 26)])
def test_torchaos_compiled_step_has_the_buffers_of_the_stand_in(
    optim: str, bytes_each: int
) -> None:
    """The stand-in's buffers, two of fp32 and with 4 bits two of int64 and two of one byte, beside
    the scales of blocks of 256."""
    torchao = pytest.importorskip("torchao.optim")
    parameter = torch.nn.Parameter(torch.randn(128, 64))
    parameter.grad = torch.randn(128, 64)
    optimizer = getattr(torchao, optim)([parameter], block_size=256)
    optimizer.step()  # compiles
    expected = parameter.numel() * (bytes_each + 2 * 4 / 256)
    assert peak_of(optimizer.step) == pytest.approx(expected, rel=0.01)
