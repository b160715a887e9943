"""ZeRO-1 and ZeRO-2 as DeepSpeed 0.18 allocates (deepspeed/runtime/zero/stage_1_and_2.py), with
the settings that accelerate leaves at DeepSpeed's defaults (zero/config.py).

DeepSpeed holds flat buffers; here each parameter has its share of them, so that equal layers can
be told apart. The last GPU is imagined, whose share of the gradients is there first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from ftplan.launcher.dry_run.recorder import Recorder
from ftplan.planner.plan import AUTOCAST_DTYPE, TrainingPlan
from ftplan.planner.zero import REDUCE_BUCKET_SIZE

Adopt = Callable[..., None]


def engine_dtype(plan: TrainingPlan) -> torch.dtype:
    """That of the whole model (`_configure_distributed_model` of deepspeed/runtime/engine.py)."""
    dtype: torch.dtype = getattr(torch, AUTOCAST_DTYPE[plan.mixed_precision] or plan.dtype)
    return dtype


def turn_into(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn what is floating-point of a model on the meta device into `dtype`."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


@contextmanager
def optimizer_sharded(
    trainer: Any, recorder: Recorder, plan: TrainingPlan, adopt: Adopt
) -> Iterator[None]:
    """Within, the trainer is one that `accelerate launch` started with DeepSpeed."""
    trainer.accelerator.native_amp = False  # the engine does without autocast
    adopt(recorder, trainer.model)
    zero = _Zero(trainer, recorder, plan)
    hooks = [p.register_post_accumulate_grad_hook(zero.has_gradient) for p in zero.parameters]
    yield
    for hook in hooks:
        hook.remove()


def have_divided(accelerator: Any, divide: Callable[[torch.optim.Optimizer], None]) -> None:
    """Have the accelerator divide the optimizer that it prepares."""
    prepare = accelerator.prepare

    def prepared(*objects: Any, **kwargs: Any) -> Any:
        for item in objects:
            if isinstance(item, torch.optim.Optimizer):
                divide(item)
        return prepare(*objects, **kwargs)

    accelerator.prepare = prepared
    # The step itself clips, in place.
    accelerator.clip_grad_norm_ = lambda *args, **kwargs: 0.0


@contextmanager
def making(recorder: Recorder, component: str, *, on_host: bool = False) -> Iterator[None]:
    """What is born within belongs to the module of what it is made from."""
    before = recorder.between_steps, recorder.component
    recorder.between_steps, recorder.component = True, component
    recorder.on_host = on_host
    yield
    recorder.between_steps, recorder.component = before
    recorder.on_host = False


class _Zero:
    """DeepSpeed's optimizer around the trainer's, named after its attributes."""

    def __init__(self, trainer: Any, recorder: Recorder, plan: TrainingPlan) -> None:
        self.recorder, self.num_gpus = recorder, plan.num_gpus
        self.dtype = engine_dtype(plan)
        self.partition_gradients = plan.sharding == "zero2"
        self.cpu_offload = plan.offload == "optimizer"
        self.parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        # Else the bucket is reduced before backward ends.
        self.at_end = sum(p.numel() for p in self.parameters) <= REDUCE_BUCKET_SIZE
        self.partition: list[nn.Parameter] = []
        self.buffers: list[torch.Tensor] = []
        self.grads_in_partition: list[torch.Tensor] = []
        self.averaged_gradients: list[torch.Tensor] = []
        self.extra_large: torch.Tensor | None = None
        recorder.backward_ended = self._end_of_backward
        have_divided(trainer.accelerator, self._divide)
        self._makes = partial(making, recorder)

    def _divide(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer works on fp32 copies of this GPU's share."""
        shares: dict[torch.Tensor, nn.Parameter] = {}
        with self._makes("optimizer_states", on_host=self.cpu_offload):
            for parameter in self.parameters:
                size = -(-parameter.numel() // self.num_gpus)
                share = parameter.detach().new_empty(size, dtype=torch.float32)
                shares[parameter] = nn.Parameter(share)
        for group in optimizer.param_groups:
            group["params"] = [shares[parameter] for parameter in group["params"]]
        self.partition = list(shares.values())
        if self.cpu_offload:
            with self._makes("communication"):
                largest = max(parameter.numel() for parameter in self.parameters)
                self.temp_grad_buffer_for_gpu_offload = torch.empty(largest, dtype=self.dtype)
        step = optimizer.step

        def stepped(_: Any, *args: Any, **kwargs: Any) -> Any:
            self._hand_gradients_over()
            self.recorder.on_host = self.cpu_offload
            result = step(*args, **kwargs)
            self.recorder.on_host = False
            for share in self.partition:
                share.grad = None
            return result

        optimizer.step = MethodType(stepped, optimizer)

    def has_gradient(self, parameter: torch.Tensor) -> None:
        """`process_gradients`: the gradient moves into the buffer, or waits for the last one."""
        if not self.buffers:
            with self._makes("communication"):
                self.buffers = [torch.empty(REDUCE_BUCKET_SIZE, dtype=self.dtype)]
        if not self.partition_gradients:
            return
        if not self.at_end:
            self._allocate_share()
        large = parameter.numel() > REDUCE_BUCKET_SIZE
        self.extra_large = parameter.grad if large else None
        parameter.grad = None

    def _allocate_share(self) -> None:
        """`copy_grads_in_partition`."""
        if not self.grads_in_partition and not self.cpu_offload:
            with self._makes("gradients"):
                shares = self.partition
                self.grads_in_partition = [torch.empty_like(s, dtype=self.dtype) for s in shares]

    def _end_of_backward(self, steps_next: bool) -> None:
        """`reduce_gradients` at the last micro-batch, `independent_gradient_partition_epilogue`."""
        if not (steps_next or self.partition_gradients):
            return
        self._allocate_share()
        for parameter in self.parameters:
            parameter.grad = None
        self.extra_large = None
        self.averaged_gradients = self.averaged_gradients or self.grads_in_partition
        self.grads_in_partition = []
        self.buffers = []

    def _hand_gradients_over(self) -> None:
        """`scaled_global_norm` and `step`: a flat copy, then one in fp32."""
        if self.cpu_offload:
            with self._makes("gradients", on_host=True):
                for share in self.partition:
                    share.grad = torch.empty_like(share)
            return
        with self._makes("temporaries"):
            for gradient in self.averaged_gradients:
                gradient.double()
            flat = [torch.empty_like(gradient) for gradient in self.averaged_gradients]
        with self._makes("gradients"):
            for share, gradient in zip(self.partition, flat, strict=True):
                share.grad = torch.empty_like(gradient, dtype=torch.float32)
        del flat, gradient
        self.averaged_gradients = []
