"""Hybrid sharding in several processes on the processor, through `accelerate launch`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs the `train` extra")

from torch.distributed.checkpoint import FileSystemReader

from ftplan.launcher.run_dir import RunDir
from tests.test_several_processes import (
    Launch,
    assert_alike,
    carry_out,
    copied,
    one,
    rows,
    tiny,
    write,
)
from tests.test_training import kept_signals

__all__ = ["kept_signals", "one", "rows", "tiny", "write"]

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("kept_signals")]


def test_two_copies_of_a_divided_model_train_as_one_and_go_on_as_one_copy(
    write: Launch, one: Callable[[RunDir], RunDir], tmp_path: Path
) -> None:
    run = write(4, sharding="fsdp", dp_replicate_size=2, method="full", optim="adamw_torch")
    carry_out(run)
    assert_alike(run, one(run))
    parts = run.last_checkpoint() or Path()
    saved = FileSystemReader(parts / "pytorch_model_fsdp_0").read_metadata().state_dict_metadata
    pieces = {len(one.chunks) for one in saved.values() if len(one.size) > 1}
    assert pieces == {2}  # of each matrix: two processes divide a copy
    cut = copied(run, tmp_path / "cut")
    shutil.rmtree(cut.checkpoints / parts.name)
    shutil.rmtree(cut.model)
    cut.record.unlink()
    carry_out(cut, resume=True, num_processes=2)
    assert_alike(cut, run)


def test_two_processes_divide_a_four_bit_base_and_train_its_adapter_as_one(
    write: Launch, one: Callable[[RunDir], RunDir]
) -> None:
    # Gradients of adapters are in bfloat16: one micro-batch, so that sums of them are not compared.
    step = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    run = write(2, sharding="fsdp", method="lora", quantization="nf4", **step)
    carry_out(run)
    assert_alike(run, one(run))
    assert "Excluding from FSDP2 sharding" not in run.stderr.read_text()
