"""One training run, measured: `python -m benchmarks.gpu.measure`.

Reads a task on stdin and writes one line on stdout: {"measured": ..., ...}, {"out_of_memory": ...}
or {"failed": reason}. What libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from benchmarks.gpu.meters import CpuMeter, CudaMeter, Meter
from benchmarks.gpu.random_model import random_model
from benchmarks.gpu.task import OUT_OF_MEMORY, WARM_UP_STEPS, Task
from ftplan.launcher.dry_run.case import DryRunCase
from ftplan.launcher.emit import method_settings, training_arguments
from ftplan.launcher.training.adapters import settle_adapters
from ftplan.launcher.training.arguments import launched_arguments
from ftplan.launcher.training.build import apply_method, count_parameters, count_trainable
from ftplan.launcher.training.optimizers import settle_optimizer
from ftplan.launcher.training.stacks import (
    ObservedTrainer,
    PlainLoop,
    blank_tokenizer,
    with_adapters,
)
from ftplan.planner.errors import FtplanError

Row = dict[str, list[int]]

# What cuBLAS and the driver say where torch's allocator is not the one that finds no memory.
_NO_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")


def main() -> int:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    answer = _answer(Task.from_dict(json.load(sys.stdin)))
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
    # Half a minute of tearing down would be paid by each run.
    os._exit(0)


def _answer(task: Task) -> dict[str, Any]:
    try:
        return measure(task)
    except FtplanError as error:
        return {"failed": error.message}
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        if isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in _NO_MEMORY):
            return {OUT_OF_MEMORY: said}
        import traceback

        traceback.print_exc()
        return {"failed": said}


def measure(task: Task) -> dict[str, Any]:
    """Carries a task out: what the run took, and what is worth knowing beside it."""
    case = task.case
    ballast = None
    if case.kind == "cuda":
        torch.cuda.init()
        torch.zeros(1, device="cuda")
        ballast = _taken(task.ballast_bytes)
    set_seed(case.plan.seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(case, task.steps, folder)
        meter: Meter = CudaMeter() if case.kind == "cuda" else CpuMeter(trainer.model)
        trainer.observe(meter)
        trainer.train()
        memory = meter.finish()
    del ballast
    seconds = meter.step_seconds(WARM_UP_STEPS)
    return {
        "measured": {**memory, **_speed(case, seconds)},
        "num_trainable_parameters": count_trainable(trainer.model),
        "num_parameters": count_parameters(trainer.model),
        "step_seconds": seconds,
    }


def _speed(case: DryRunCase, seconds: Sequence[float]) -> dict[str, float]:
    """The middle of the steps: a machine that is busy for a moment does not count."""
    if not seconds:
        return {}
    plan, middle = case.plan, statistics.median(seconds)
    rows = plan.per_device_train_batch_size * plan.gradient_accumulation_steps
    return {
        "step_seconds": middle,
        "tokens_per_second_per_gpu": rows * case.row_length / middle,
    }


def _taken(num_bytes: int) -> Any:
    """So many bytes of the GPU, taken from the driver past torch's allocator, whose counters they
    would change; the process keeps them to its end."""
    if not num_bytes:
        return None
    import ctypes

    driver, address = ctypes.CDLL("libcuda.so.1"), ctypes.c_uint64()
    status = driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(num_bytes))
    if status:
        raise RuntimeError(f"{num_bytes} bytes could not be taken: CUDA error {status}")
    return address


def build(case: DryRunCase, steps: int, folder: str) -> Any:
    """The trainer of a case, on a model with random weights and rows of random tokens."""
    plan, settings = case.plan, method_settings(case.plan)
    model = random_model(case.config, settings, case.kind)
    peft_config = apply_method(model, plan.method, settings)
    planned = training_arguments(plan, case.kind) | {"max_steps": steps}
    count = steps * plan.per_device_train_batch_size * plan.gradient_accumulation_steps
    rows = random_rows(count, case.row_length, model.config.vocab_size, plan.seed)
    if plan.trainer == "trl":
        from benchmarks.gpu.with_trl import trl_trainer

        trainer = trl_trainer(plan, model, peft_config, planned, rows, folder)
    else:
        wrapped = with_adapters(
            model,
            peft_config,
            kbit_prepare=case.kbit_prepare,
            checkpointing=plan.gradient_checkpointing,
        )
        arguments = _arguments(planned, folder, uses_liger=plan.loss == "liger")
        trainer = _plain_trainer(case, wrapped, arguments, rows, steps)
    settle_adapters(trainer.model, settings)
    if plan.trainer != "loop":
        settle_optimizer(trainer, plan.method, plan.optim, settings)
    return trainer


def _plain_trainer(
    case: DryRunCase, model: Any, arguments: TrainingArguments, rows: list[Row], steps: int
) -> Any:
    """transformers' own, or a plain loop."""
    if case.plan.trainer == "loop":
        return _Loop(model.to(case.kind), arguments, rows, steps=steps)
    masked = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return ObservedTrainer(
        model=model,
        args=arguments,
        train_dataset=masked,
        processing_class=blank_tokenizer(),
    )


class _Loop(PlainLoop):
    """Trains on the first rows again and again."""

    def _batch(self) -> torch.Tensor:
        rows = self.rows[: self.arguments.per_device_train_batch_size]
        return torch.tensor([row["input_ids"] for row in rows], device=self.arguments.device)


# Of Liger's kernels the loss alone, which is what a plan's `loss` says.
_LIGER_LOSS = {
    "fused_linear_cross_entropy": True,
    **dict.fromkeys(("rope", "rms_norm", "swiglu", "geglu", "layer_norm", "cross_entropy"), False),
}


def _arguments(planned: Mapping[str, Any], folder: str, *, uses_liger: bool) -> TrainingArguments:
    """transformers' own arguments, which know neither lengths nor packing."""
    own = {k: v for k, v in planned.items() if k not in ("max_length", "packing")}
    arguments = launched_arguments(own, folder) | {"save_strategy": "no"}
    if uses_liger:
        arguments |= {"use_liger_kernel": True, "liger_kernel_config": _LIGER_LOSS}
    return TrainingArguments(**arguments)


def random_rows(count: int, length: int, vocabulary: int, seed: int) -> list[Row]:
    """Rows of equal length, each token an answer's. Equal tokens would cost a GPU less power, and
    make it faster, than text does."""
    rng = Random(seed)
    rows = []
    for _ in range(count):
        tokens = rng.choices(range(vocabulary), k=length)
        rows.append({"input_ids": tokens, "labels": tokens})
    return rows


if __name__ == "__main__":
    sys.exit(main())
