"""ZeRO-3's parameters: partitioned, gathered, fetched ahead and released as DeepSpeed 0.18 does
(deepspeed/runtime/zero: partition_parameters.py, parameter_offload.py,
partitioned_param_coordinator.py), whose names are kept here.

In the first forward and backward the order of modules is recorded; from then on parameters are
fetched ahead in that order, and those that are used again soon are not released.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from unittest import mock

import torch
from torch import nn

from ftplan.launcher.dry_run.recorder import Recorder
from ftplan.planner.sharding import PARAM_PERSISTENCE_THRESHOLD

# Elements, DeepSpeed's defaults (zero/config.py): accelerate's plugin leaves them alone unless it
# is given a configuration file.
PREFETCH_BUCKET_SIZE = 50_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000
MAX_REUSE_DISTANCE = 1_000_000_000


class Status(Enum):
    """Of a parameter: `ZeroParamStatus`."""

    NOT_AVAILABLE = 0
    INFLIGHT = 1
    AVAILABLE = 2


@dataclass(eq=False, kw_only=True, slots=True)
class ZeroParameter:
    """A parameter and this GPU's share of it, `ds_tensor`."""

    parameter: nn.Parameter
    ds_id: int
    ds_shape: torch.Size
    ds_tensor: torch.Tensor
    ds_numel: int
    partition_numel: int
    status: Status = Status.NOT_AVAILABLE
    active_sub_modules: set[nn.Module] = field(default_factory=set)

    @property
    def ds_persist(self) -> bool:
        return self.ds_numel <= PARAM_PERSISTENCE_THRESHOLD

    def hold(self, flat: torch.Tensor) -> None:
        """The parameter lies at the beginning of `flat`."""
        self.parameter.data = flat.narrow(0, 0, self.ds_numel).view(self.ds_shape)

    def free(self) -> None:
        """`free_param`."""
        self.parameter.data = self.parameter.data.new_empty(0)
        self.status = Status.NOT_AVAILABLE


class _Handle:
    """`AllGatherCoalescedHandle`: the buffer of several parameters lives as long as one of them has
    not been waited for, beside the copies that the first wait makes."""

    def __init__(self, params: list[ZeroParameter], flat_tensor: torch.Tensor | None) -> None:
        self.params, self.flat_tensor, self.complete = params, flat_tensor, False

    def wait(self) -> None:
        if self.complete:
            return
        for param in self.params:
            if self.flat_tensor is not None:
                param.hold(self.flat_tensor.new_empty(param.ds_numel))
            param.status = Status.AVAILABLE
        self.complete = True


class _Parameters(dict[str, Any]):
    """`ZeROOrderedDict`: reading a parameter that is not there gathers it for the module that
    runs, and for good makes it one of that module's."""

    def __init__(self, own: dict[str, Any], read: Callable[[nn.Parameter], None]) -> None:
        super().__init__(own)
        self._read = read

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        if parameter is not None:
            self._read(parameter)
        return parameter


class PartitionedParameters:
    """The parameters of a model on one of several GPUs, on record in `recorder`."""

    def __init__(
        self, model: nn.Module, recorder: Recorder, num_gpus: int, *, offloads: bool
    ) -> None:
        self.model, self.recorder = model, recorder
        self.num_gpus, self.offloads = num_gpus, offloads
        self._adapted = hasattr(model, "peft_config")
        self.all: dict[nn.Parameter, ZeroParameter] = {}
        for module in model.modules():
            for parameter in module._parameters.values():
                if parameter is not None and parameter not in self.all:
                    self.all[parameter] = self._partition(parameter, recorder.path_of(module))
        self.persistent = [param for param in self.all.values() if param.ds_persist]
        self.coordinator = _Coordinator(self)

    def _partition(self, parameter: nn.Parameter, path: str) -> ZeroParameter:
        size = -(-parameter.numel() // self.num_gpus)
        self.recorder.on_host = True
        share = parameter.data.new_empty(size)
        self.recorder.on_host = False
        if not self.offloads:
            self.recorder.adopt([share], self.component_of(parameter), path)
        param = ZeroParameter(
            parameter=parameter,
            ds_id=len(self.all),
            ds_shape=parameter.shape,
            ds_tensor=share,
            ds_numel=parameter.numel(),
            partition_numel=size,
        )
        param.free()
        return param

    def component_of(self, parameter: nn.Parameter) -> str:
        return "adapters" if self._adapted and parameter.requires_grad else "weights"

    def all_gather_coalesced(self, params: list[ZeroParameter]) -> _Handle:
        """The buffers of parameters on their way."""
        params = sorted(params, key=lambda param: param.ds_id)
        for param in params:
            param.status = Status.INFLIGHT
        with self._communicating():
            shares = [self._on_device(param) for param in params]
            if self.num_gpus == 1:  # `_no_gather_coalesced`
                for param, share in zip(params, shares, strict=True):
                    param.hold(share)
                return _Handle(params, None)
            numel = sum(param.partition_numel for param in params) * self.num_gpus
            flat_tensor = shares[0].new_empty(numel)
            if len(params) > 1:
                return _Handle(params, flat_tensor)
            params[0].hold(flat_tensor)
            return _Handle(params, None)

    def all_gather(self, params: list[ZeroParameter]) -> None:
        """At once, each parameter in a buffer of its own (`_allgather_params_coalesced`)."""
        missing = [param for param in params if param.status is Status.NOT_AVAILABLE]
        with self._communicating():
            shares = [self._on_device(param) for param in missing]
            for param, share in zip(missing, shares, strict=True):
                whole = param.partition_numel * self.num_gpus
                param.hold(share if self.num_gpus == 1 else share.new_empty(whole))
                param.status = Status.AVAILABLE

    def release_all(self) -> None:
        """`release_and_reset_all`."""
        self.coordinator.inflight.clear()
        for param in self.all.values():
            param.active_sub_modules.clear()
            param.free()

    def _on_device(self, param: ZeroParameter) -> torch.Tensor:
        return param.ds_tensor.clone() if self.offloads else param.ds_tensor

    @contextmanager
    def _communicating(self) -> Iterator[None]:
        before, self.recorder.component = self.recorder.component, "communication"
        yield
        self.recorder.component = before

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Within, modules fetch their parameters before they run and release them afterwards."""
        coordinator = self.coordinator
        removers = [self.model.register_forward_pre_hook(lambda *_: coordinator.reset_step())]
        own = {module: module._parameters for module in self.model.modules()}
        for module in own:
            module._parameters = _Parameters(module._parameters, coordinator.read)
            hooks = _ModuleHooks(module, coordinator)
            removers += [
                module.register_forward_pre_hook(hooks.pre_forward),
                module.register_forward_pre_hook(hooks.inputs_of_backward),
                module.register_forward_hook(hooks.post_forward),
                module.register_forward_hook(hooks.outputs_of_backward),
            ]
        with mock.patch("torch.nn.functional.linear", _linear):
            yield
        for remover in removers:
            remover.remove()
        for module, parameters in own.items():
            module._parameters = parameters
        # Whole again, to be counted; what is gathered lives on, as the record has it.
        self.gathered = [parameter.data for parameter in self.all]
        self.recorder.on_host = True
        for param in self.all.values():
            param.parameter.data = param.ds_tensor.new_empty(param.ds_shape)
        self.recorder.on_host = False


class _Coordinator:
    """`PartitionedParameterCoordinator`."""

    def __init__(self, parameters: PartitionedParameters) -> None:
        self.parameters = parameters
        self.inflight: dict[ZeroParameter, _Handle] = {}
        self.running: list[nn.Module] = []
        self._external: dict[nn.Module, dict[ZeroParameter, None]] = {}
        self._trace: list[nn.Module] = []
        self._recording = self._complete = False
        self._param_order: list[tuple[ZeroParameter, int]] = []
        self._param_queue: deque[tuple[ZeroParameter, int]] = deque()
        self._fetched_for: dict[ZeroParameter, int] = {}
        self._releasable: dict[tuple[nn.Module, int], set[ZeroParameter]] = {}
        self._step_id = 0
        self._num_available = 0

    def params_of(self, module: nn.Module) -> list[ZeroParameter]:
        """A module's own parameters, and those of others that it reads."""
        own = [self.parameters.all[p] for p in module._parameters.values() if p is not None]
        return list(dict.fromkeys((*own, *self._external.get(module, ()))))

    def read(self, parameter: nn.Parameter) -> None:
        """`ZeROOrderedDict.__getitem__`."""
        param = self.parameters.all.get(parameter)
        if self.running and param is not None and param.status is Status.NOT_AVAILABLE:
            self._external.setdefault(self.running[-1], {})[param] = None
            self.parameters.all_gather([param])

    def reset_step(self) -> None:
        """A forward begins."""
        self._clean_inflight()
        if self._recording:
            self._param_order = [
                (param, step)
                for step, module in enumerate(self._trace)
                for param in sorted(self.params_of(module), key=lambda p: p.ds_id)
            ]
            self._recording, self._complete = False, True
        elif not self._complete:
            self._recording = True
        self._param_queue = deque(self._param_order)
        self._fetched_for = {}
        self._step_id = self._num_available = 0

    def _clean_inflight(self) -> None:
        for param, handle in self.inflight.items():
            handle.wait()
            self._release(param)
        self.inflight.clear()

    def _check_trace(self, module: nn.Module) -> None:
        """`trace_prologue`: another order of modules than recorded ends fetching ahead."""
        expected = self._trace[self._step_id : self._step_id + 1]
        if self._complete and expected != [module]:
            self._complete = False
            self._trace, self._param_order = [], []
            self._fetched_for = {}
            self._param_queue.clear()
            self._clean_inflight()

    def fetch_sub_module(self, module: nn.Module) -> None:
        self._check_trace(module)
        if self._recording:
            self._trace.append(module)
        params = self.params_of(module)
        self._all_gather(params)
        for param in params:
            param.active_sub_modules.add(module)
            if param in self.inflight:
                with self.parameters._communicating():
                    self.inflight.pop(param).wait()
        if self._complete:
            self._skip_in_queue(params)
            self._prefetch()
        self._step_id += 1

    def _all_gather(self, params: list[ZeroParameter]) -> None:
        missing = [param for param in params if param.status is Status.NOT_AVAILABLE]
        if missing:
            self._num_available += sum(param.ds_numel for param in missing)
            handle = self.parameters.all_gather_coalesced(missing)
            self.inflight.update(dict.fromkeys(missing, handle))

    def _skip_in_queue(self, params: list[ZeroParameter]) -> None:
        to_skip = sum(self._fetched_for.get(param, -1) < self._step_id for param in params)
        skipped: set[ZeroParameter] = set()
        while self._param_queue and len(skipped) < to_skip:
            param, last_used = self._param_queue.popleft()
            self._fetched_for[param] = last_used
            skipped.add(param)

    def _prefetch(self) -> None:
        most = min(MAX_LIVE_PARAMETERS - self._num_available, PREFETCH_BUCKET_SIZE)
        ahead: dict[ZeroParameter, None] = {}
        numel = 0
        while self._param_queue and numel < most:
            param, last_used = self._param_queue.popleft()
            self._fetched_for[param] = max(self._fetched_for.get(param, -1), last_used)
            if param.status is Status.NOT_AVAILABLE and param not in ahead:
                ahead[param] = None
                numel += param.ds_numel
        self._all_gather(list(ahead))

    def release_sub_module(self, module: nn.Module) -> None:
        params = self.params_of(module)
        releasable = self._params_to_release(module) if self._complete else params
        for param in params:
            param.active_sub_modules.discard(module)
            if param in releasable:
                self._release(param)

    def _release(self, param: ZeroParameter) -> None:
        if param.status is Status.AVAILABLE and not param.active_sub_modules:
            param.free()
            self._num_available -= param.ds_numel

    def _params_to_release(self, module: nn.Module) -> set[ZeroParameter]:
        """All but what is small, or is used again within `MAX_REUSE_DISTANCE`. As there, what was
        found for a place in the order is kept for the next time."""
        key = module, self._step_id
        if key not in self._releasable:
            found = {
                param
                for param in self.params_of(module)
                if not param.ds_persist and self._fetched_for.get(param, -1) <= self._step_id
            }
            traversed = 0
            for later in self._trace[self._step_id :]:
                if traversed >= MAX_REUSE_DISTANCE:
                    break
                params = self.params_of(later)
                found.difference_update(params)
                traversed += sum(param.ds_numel for param in params)
            self._releasable[key] = found
        return self._releasable[key]


class _ModuleHooks:
    """What `_register_deepspeed_module` puts around one module. In backward it is the nodes of
    outputs and inputs that tell where a module begins and ends; those passed by name have none."""

    def __init__(self, module: nn.Module, coordinator: _Coordinator) -> None:
        self.module, self.coordinator = module, coordinator
        self.grads_remaining = 0
        self.backwards_due = 0

    def pre_forward(self, module: nn.Module, args: Any) -> None:
        self.coordinator.running.append(module)
        with torch.no_grad():
            self.coordinator.fetch_sub_module(module)

    def post_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self.coordinator.running.pop()
        self.coordinator.release_sub_module(module)

    def inputs_of_backward(self, module: nn.Module, args: Any) -> Any:
        self.grads_remaining = 0
        return _apply_to_tensors(_PostBackward, self, args)

    def outputs_of_backward(self, module: nn.Module, args: Any, output: Any) -> Any:
        return _apply_to_tensors(_PreBackward, self, output)


def _apply_to_tensors(function: Any, hooks: _ModuleHooks, value: Any) -> Any:
    """`apply_to_tensors_only`."""
    if isinstance(value, (tuple, list)):
        return type(value)([_apply_to_tensors(function, hooks, item) for item in value])
    if isinstance(value, dict):
        for name in value:
            value[name] = _apply_to_tensors(function, hooks, value[name])
        return value
    return function.apply(hooks, value) if isinstance(value, torch.Tensor) else value


class _PreBackward(torch.autograd.Function):
    """`PreBackwardFunctionForModule`."""

    @staticmethod
    def forward(ctx: Any, hooks: _ModuleHooks, output: torch.Tensor) -> torch.Tensor:
        ctx.hooks = hooks
        hooks.backwards_due += 1
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        hooks = ctx.hooks
        if hooks.backwards_due > 0:
            hooks.coordinator.fetch_sub_module(hooks.module)
            hooks.backwards_due -= 1
        return (None, *gradients)


class _PostBackward(torch.autograd.Function):
    """`PostBackwardFunctionModule`."""

    @staticmethod
    def forward(ctx: Any, hooks: _ModuleHooks, value: torch.Tensor) -> torch.Tensor:
        ctx.hooks = hooks
        if value.requires_grad:
            hooks.grads_remaining += 1
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        hooks = ctx.hooks
        hooks.grads_remaining -= 1
        if hooks.grads_remaining == 0:
            hooks.coordinator.release_sub_module(hooks.module)
        return (None, *gradients)


class _Linear(torch.autograd.Function):
    """`LinearFunctionForZeroStage3` (zero/linear.py), which `zero.Init` puts in the place of
    torch's: it keeps the parameter, not a view of what was gathered."""

    @staticmethod
    def forward(ctx: Any, input: Any, weight: Any, bias: Any = None) -> Any:
        ctx.save_for_backward(input, weight, bias)
        if input.dim() == 2 and bias is not None:
            return torch.addmm(bias, input, weight.t())
        output = input.matmul(weight.t())
        if bias is not None:
            output += bias
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        input, weight, bias = ctx.saved_tensors
        of_input = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_input = gradient.matmul(weight)
        flat = gradient.reshape(-1, gradient.shape[-1])
        if ctx.needs_input_grad[1]:
            of_weight = flat.t().matmul(input.reshape(-1, input.shape[-1]))
        if bias is not None and ctx.needs_input_grad[2]:
            of_bias = flat.sum(0)
        return of_input, of_weight, of_bias


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    return _Linear.apply(input, weight, bias)
