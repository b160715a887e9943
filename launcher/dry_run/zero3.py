"""ZeRO-3 as DeepSpeed 0.18 allocates (deepspeed/runtime/zero/stage3.py), with the settings that
accelerate leaves at DeepSpeed's defaults (zero/config.py). The first GPU is imagined.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from types import MethodType
from typing import Any

import torch
from torch import nn

from ftplan.launcher.dry_run.recorder import Recorder
from ftplan.launcher.dry_run.zero import (
    Adopt,
    engine_dtype,
    have_divided,
    making,
)
from ftplan.launcher.dry_run.zero3_parameters import PartitionedParameters, TensorParameter
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.zero import REDUCE_BUCKET_SIZE
from ftplan.planner.zero3 import NORM_BUFFER_SIZE, sub_groups


@contextmanager
def parameters_partitioned(
    trainer: Any, recorder: Recorder, plan: TrainingPlan, adopt: Adopt
) -> Iterator[None]:
    """Within, the trainer is one that `accelerate launch` started with DeepSpeed's stage 3."""
    trainer.accelerator.native_amp = False  # the engine does without autocast
    adopt(recorder, trainer.model, parameters=False)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    parameters = PartitionedParameters(
        trainer.model, recorder, plan.num_gpus, offloads=plan.offload == "parameters"
    )
    zero = _Stage3(trainer, parameters, plan)
    hooks = [p.register_post_accumulate_grad_hook(zero.has_gradient) for p in trained]
    with parameters.hooked():
        yield
    for hook in hooks:
        hook.remove()


class _Stage3:
    """`DeepSpeedZeroOptimizer_Stage3`."""

    def __init__(self, trainer: Any, parameters: PartitionedParameters, plan: TrainingPlan) -> None:
        self.parameters, self.recorder = parameters, parameters.recorder
        self.num_gpus, self.dtype = plan.num_gpus, engine_dtype(plan)
        self.offload_optimizer = plan.offload != "none"
        self.sub_groups: list[list[TensorParameter]] = []
        self.param_groups: list[int] = []
        self.bucket: list[TensorParameter] = []
        self.bucket_elements = 0
        self.makes = partial(making, self.recorder)
        self.recorder.backward_ended = self._end_of_backward
        have_divided(trainer.accelerator, self._divide)

    def _divide(self, optimizer: torch.optim.Optimizer) -> None:
        """`_create_fp16_partitions_with_defragmentation` and `_setup_for_real_optimizer`."""
        for number, group in enumerate(optimizer.param_groups):
            params = [self.parameters.all[parameter] for parameter in group["params"]]
            for sub_group in sub_groups(params, attrgetter("partition_numel")):
                self.sub_groups.append(sub_group)
                self.param_groups.append(number)
            group["params"] = []
        params = [param for sub_group in self.sub_groups for param in sub_group]
        self._defragment(params)
        on_host = self.offload_optimizer
        with self.makes("optimizer_states", on_host=on_host):
            self.fp32 = [self._master(flat) for flat in self.lp_flat]
        with self.makes("communication"):
            self.buffer = torch.empty(REDUCE_BUCKET_SIZE, dtype=self.dtype)
        with self.makes("gradients", on_host=on_host):
            numel = sum(param.partition_numel for param in params)
            self.gradients = torch.empty(numel, dtype=self.dtype)
        pieces = _pieces(self.gradients, params)
        self.averaged = dict(zip(params, pieces, strict=True))
        step = optimizer.step
        optimizer.step = MethodType(partial(self._step, step), optimizer)

    def _defragment(self, params: list[TensorParameter]) -> None:
        """Shares of what is trained move into one buffer."""
        for param in params:
            param.ds_tensor = param.ds_tensor.new_empty(0)
        component = self.parameters.component_of(params[0].parameter)
        with self.makes(component, on_host=self.parameters.offloads):
            flat = torch.empty(sum(p.partition_numel for p in params), dtype=self.dtype)
        for param, piece in zip(params, _pieces(flat, params), strict=True):
            param.ds_tensor = piece
        numels = [sum(p.partition_numel for p in sub_group) for sub_group in self.sub_groups]
        self.lp_flat = list(flat.split(numels))

    def _master(self, flat: torch.Tensor) -> nn.Parameter:
        """`_create_fp32_partitions`: a copy, of fp32 weights as well."""
        return nn.Parameter(torch.empty(flat.numel()))

    def has_gradient(self, parameter: Any) -> None:
        """`reduce_independent_p_g_buckets_and_remove_grads`."""
        param, numel = self.parameters.all[parameter], parameter.grad.numel()
        if self.bucket_elements + numel > REDUCE_BUCKET_SIZE and self.bucket:
            self._reduce_and_partition()
        if self.bucket_elements + numel <= REDUCE_BUCKET_SIZE:
            place = self.buffer.narrow(0, self.bucket_elements, numel)
            parameter.grad.data = place.view_as(parameter.grad)
        self.bucket.append(param)
        self.bucket_elements += numel

    def _reduce_and_partition(self) -> None:
        """`__reduce_and_partition_ipg_grads`."""
        params, self.bucket, self.bucket_elements = self.bucket, [], 0
        if not params:
            return
        with self.makes("communication"):
            flat = self._reduce_scatter(params)
        for param in params:
            if self.offload_optimizer:
                self._send_to_host(param)
            param.parameter.grad = None
        del flat

    def _reduce_scatter(self, params: list[TensorParameter]) -> torch.Tensor:
        """`reduce_scatter_coalesced`: shares side by side, unless one gradient needs no padding."""
        if len(params) == 1 and params[0].ds_numel % self.num_gpus == 0:
            gradient = params[0].parameter.grad
            assert gradient is not None
            return gradient
        numel = sum(param.partition_numel for param in params) * self.num_gpus
        return torch.empty(numel, dtype=self.dtype)

    def _send_to_host(self, param: TensorParameter) -> None:
        """`partition_grads`: a copy on the device, its norm, and one in fp32."""
        with self.makes("temporaries"):
            gradient = torch.empty(param.partition_numel, dtype=self.dtype)
            for part in gradient.split(NORM_BUFFER_SIZE):
                part.double()
            gradient.float()

    def _end_of_backward(self, steps_next: bool) -> None:
        """`independent_gradient_partition_epilogue`, after every micro-batch."""
        self._reduce_and_partition()

    def _step(self, step: Any, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        """`step`: one sub group after the other, whose gradients in fp32 live only then."""
        self.parameters.release_all()
        if not self.offload_optimizer:
            self._take_norm()
        for sub_group, number, fp32 in zip(
            self.sub_groups, self.param_groups, self.fp32, strict=True
        ):
            fp32.grad = self._gradient_of(sub_group, fp32)
            optimizer.param_groups[number]["params"] = [fp32]
            self.recorder.on_host = self.offload_optimizer
            step(*args, **kwargs)
            self.recorder.on_host = False
            optimizer.param_groups[number]["params"] = []
            fp32.grad = None
        self.parameters.all_gather(self.parameters.persistent)

    def _take_norm(self) -> None:
        """`has_overflow` of fp16 gradients, then `get_grad_norm_direct`."""
        with self.makes("temporaries"):
            if self.dtype is torch.float16:
                for test in (torch.isinf, torch.isnan):
                    test(self.gradients).any()
            for sub_group in self.sub_groups:
                for param in sub_group:
                    self.averaged[param].double()

    def _gradient_of(self, sub_group: list[TensorParameter], fp32: nn.Parameter) -> torch.Tensor:
        """`_prepare_fp32_grad_for_sub_group`; with offloading it waits on the host."""
        with self.makes("gradients", on_host=self.offload_optimizer):
            if self.offload_optimizer:
                return torch.empty_like(fp32)
            gradients = [self.averaged[param] for param in sub_group]
            flat = gradients[0] if len(gradients) == 1 else torch.cat(gradients)
            return flat.to(torch.float32)


def _pieces(flat: torch.Tensor, params: list[TensorParameter]) -> list[torch.Tensor]:
    return list(flat.split([param.partition_numel for param in params]))
