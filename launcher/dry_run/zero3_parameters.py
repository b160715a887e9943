"""ZeRO-3's parameters as tensors: partitioned and gathered as DeepSpeed 0.18 does
(deepspeed/runtime/zero: partition_parameters.py, parameter_offload.py), whose names are kept here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from ftplan.launcher.dry_run.recorder import Recorder
from ftplan.planner.coordinator import Coordinator, Status, ZeroParameter


class TensorParameter(ZeroParameter, kw_only=True, eq=False):
    """A parameter and this GPU's share of it, `ds_tensor`."""

    parameter: nn.Parameter
    ds_shape: torch.Size
    ds_tensor: torch.Tensor

    def hold(self, flat: torch.Tensor) -> None:
        """The parameter lies at the beginning of `flat`."""
        self.parameter.data = flat.narrow(0, 0, self.ds_numel).view(self.ds_shape)

    def free(self) -> None:
        self.parameter.data = self.parameter.data.new_empty(0)
        self.status = Status.NOT_AVAILABLE


class _Handle:
    """`AllGatherCoalescedHandle`: the buffer of several parameters lives as long as one of them has
    not been waited for, beside the copies that the first wait makes."""

    def __init__(
        self,
        params: list[TensorParameter],
        flat_tensor: torch.Tensor | None,
        communicating: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.params, self.flat_tensor, self.complete = params, flat_tensor, False
        self.communicating = communicating

    def wait(self) -> None:
        if self.complete:
            return
        with self.communicating():
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
        self.all: dict[nn.Parameter, TensorParameter] = {}
        for module in model.modules():
            for parameter in module._parameters.values():
                if parameter is not None and parameter not in self.all:
                    self.all[parameter] = self._partition(parameter, recorder.path_of(module))
        self.persistent = [param for param in self.all.values() if param.ds_persist]
        self.coordinator = _Coordinator(self)

    def _partition(self, parameter: nn.Parameter, path: str) -> TensorParameter:
        size = -(-parameter.numel() // self.num_gpus)
        self.recorder.on_host = True
        share = parameter.data.new_empty(size)
        self.recorder.on_host = False
        if not self.offloads:
            self.recorder.adopt([share], self.component_of(parameter), path)
        param = TensorParameter(
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

    def all_gather_coalesced(self, params: list[TensorParameter]) -> _Handle:
        """The buffers of parameters on their way."""
        params = sorted(params, key=lambda param: param.ds_id)
        for param in params:
            param.status = Status.INFLIGHT
        with self._communicating():
            shares = [self._on_device(param) for param in params]
            if self.num_gpus == 1:  # `_no_gather_coalesced`
                for param, share in zip(params, shares, strict=True):
                    param.hold(share)
                return _Handle(params, None, self._communicating)
            numel = sum(param.partition_numel for param in params) * self.num_gpus
            flat_tensor = shares[0].new_empty(numel)
            if len(params) > 1:
                return _Handle(params, flat_tensor, self._communicating)
            params[0].hold(flat_tensor)
            return _Handle(params, None, self._communicating)

    def all_gather(self, params: list[TensorParameter]) -> None:
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

    def _on_device(self, param: TensorParameter) -> torch.Tensor:
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


class _Coordinator(Coordinator):
    """Of modules and tensors."""

    def __init__(self, parameters: PartitionedParameters) -> None:
        super().__init__()
        self.parameters = parameters
        self.running: list[nn.Module] = []
        self._external: dict[nn.Module, dict[TensorParameter, None]] = {}

    def params_of(self, module: nn.Module) -> list[TensorParameter]:
        own = [self.parameters.all[p] for p in module._parameters.values() if p is not None]
        return list(dict.fromkeys((*own, *self._external.get(module, ()))))

    def all_gather_coalesced(self, params: list[TensorParameter]) -> _Handle:
        return self.parameters.all_gather_coalesced(params)

    def read(self, parameter: nn.Parameter) -> None:
        """`ZeROOrderedDict.__getitem__`."""
        param = self.parameters.all.get(parameter)
        if self.running and param is not None and param.status is Status.NOT_AVAILABLE:
            self._external.setdefault(self.running[-1], {})[param] = None
            self.parameters.all_gather([param])


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
