"""Hybrid sharding, a divided base in four bits and tensor parallelism in several processes on the
processor, through `accelerate launch`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs the `train` extra")

from torch.distributed.checkpoint import FileSystemReader
from transformers import LlamaConfig, LlamaForCausalLM

from ftplan.launcher import launching
from ftplan.launcher.run_dir import RunDir, write_yaml
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError
from tests.launcher_fixtures import save_tiny_llama
from tests.test_several_processes import (
    Launch,
    assert_alike,
    carry_out,
    copied,
    one,
    rows,
    write,
)
from tests.test_training import kept_signals

__all__ = ["kept_signals", "one", "rows", "write"]

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("kept_signals")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a vocabulary that two processes can divide."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    save_tiny_llama(folder)
    config = LlamaConfig.from_pretrained(folder)
    config.vocab_size += config.vocab_size % 2
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def without_its_end(run: RunDir, folder: Path) -> RunDir:
    """A copy that has the checkpoint before the last one to go on from."""
    cut = copied(run, folder)
    last = cut.last_checkpoint()
    assert last is not None
    shutil.rmtree(last)
    shutil.rmtree(cut.model)
    cut.record.unlink()
    return cut


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
    cut = without_its_end(run, tmp_path / "cut")
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


def test_two_processes_divide_each_layer_and_go_on_with_their_checkpoint(
    write: Launch, one: Callable[[RunDir], RunDir], tmp_path: Path
) -> None:
    same = {"method": "full", "optim": "adamw_torch", "gradient_accumulation_steps": 4}
    run = write(2, tp_size=2, **same)
    plan = run.read_plan()  # the trial of the longest batches is made where memory is tight
    plan["estimate"]["per_gpu"]["required_bytes"] = 2**60
    write_yaml(run.plan, plan)
    carry_out(run)
    assert_alike(run, one(write(1, **same)))
    assert any(row.get("event") == "preflight" and "measured" in row for row in run.metric_rows())
    with pytest.raises(InputError, match="2 GPUs divide each layer"):
        launching.carry_out(Ui(as_json=True), run, anew=True, num_gpus=1)
    cut = without_its_end(run, tmp_path / "cut")  # refused before results are set aside
    carry_out(cut, resume=True)
    assert_alike(cut, run)
