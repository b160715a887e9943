"""Fully sharded data parallelism in one process: torch's own, in a group that sends nothing.

accelerate and transformers set it up as in a real run, and torch's own code gathers, frees and
reduces; only the collectives are torch's fake ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, _runtime_utils
from torch.distributed.fsdp._flat_param import FlatParamHandle
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

from ftplan.launcher.dry_run.case import DryRunCase
from ftplan.launcher.dry_run.recorder import Recorder
from ftplan.launcher.training.measure import local_tensor
from ftplan.planner.plan import TrainingPlan

# What these allocate serves communication: gathered parameters, and gradients on their way.
_COMMUNICATING: tuple[tuple[Any, str], ...] = (
    (FSDPParamGroup, "unshard"),
    (FSDPParamGroup, "wait_for_unshard"),
    (FSDPParamGroup, "post_backward"),
    (FlatParamHandle, "init_flat_param_attributes"),
    (FlatParamHandle, "pre_unshard"),
    (FlatParamHandle, "unshard"),
    (_runtime_utils, "_reduce_grad"),
)


# Gives back what it waited for (torch/csrc/distributed/c10d/Functional.cpp); on fakes it makes a
# tensor of its own (`_wait_tensor_meta`).
_WAIT = torch.ops._c10d_functional.wait_tensor.default
_DEFAULT_MESH = "torch.distributed.fsdp._fully_shard._fully_shard._init_default_mesh"
# FSDP1 divides the model within a machine and copies it between machines, which are not known here.
_GROUPS_OF_NODES = "torch.distributed.fsdp._init_utils._init_intra_and_inter_node_groups"
# How DTensor finds out what an operation returns, on tensors of the unsharded shapes; and ranks,
# which are real numbers.
_UNRECORDED: tuple[tuple[Any, str], ...] = (
    (ShardingPropagator, "_propagate_tensor_meta_non_cached"),
    (DeviceMesh, "__getitem__"),
)
_ATTACH_QUANT_STATE = "bitsandbytes.nn.modules.fix_4bit_weight_quant_state_from_module"

Adopt = Callable[..., None]


@contextmanager
def fully_sharded(
    trainer: Any, recorder: Recorder, case: DryRunCase, adopt: Adopt
) -> Iterator[None]:
    """Within, this process is the first of `num_gpus`, and the trainer one that `accelerate
    launch` started with FSDP. `adopt` puts what each GPU holds on record, once it is sharded."""
    enable(trainer, case.plan, case.fsdp_version)
    prepare = trainer.accelerator.prepare
    offloads = case.plan.offload == "parameters"

    def prepared(*objects: Any, **kwargs: Any) -> Any:
        recorder.on_host = True  # layer after layer is sharded; the whole model is never there
        with _as_quantized(case, trainer):
            result = prepare(*objects, **kwargs)
        recorder.on_host = False
        for model in trainer.accelerator._models:
            _place_wrappers(recorder, model)
            if case.checkpoints_around:
                _checkpoint_around(model)
            if not offloads:
                _adopt_flat(recorder, model)
            adopt(recorder, model, parameters=not offloads)
        if offloads:
            _step_on_host(trainer.accelerator, recorder)
        return result

    trainer.accelerator.prepare = prepared
    with ExitStack() as stack:
        stack.enter_context(group_of(case.plan.num_gpus))
        # accelerate and FSDP1 know tensors by the addresses of their data, which fakes have not.
        stack.enter_context(mock.patch.object(torch.Tensor, "data_ptr", _address))
        with _disable_current_modes():  # ranks are real numbers
            mesh = _mesh(case.plan)
        stack.enter_context(mock.patch(_DEFAULT_MESH, lambda: mesh))
        if mesh.ndim > 1:
            groups = mesh.get_group(1), mesh.get_group(0)
            stack.enter_context(mock.patch(_GROUPS_OF_NODES, lambda *_: groups))
        if case.plan.quantization != "none":
            stack.enter_context(mock.patch(_ATTACH_QUANT_STATE, _attach_quant_state))
        if offloads:
            for owner, name, replacement in _offloading(recorder):
                stack.enter_context(mock.patch.object(owner, name, replacement))
        for owner, name in _UNRECORDED:
            unrecorded = _unrecorded(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, unrecorded))
        recorder.decompositions[_WAIT] = _waited
        for owner, name in _COMMUNICATING:
            communicating = _as_communication(recorder, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, communicating))
        yield


def _mesh(plan: TrainingPlan) -> DeviceMesh:
    """The GPUs; where they hold several copies of the model, one row a copy."""
    copies, shards = plan.dp_replicate_size, plan.dp_shard_size
    if copies == 1:
        return init_device_mesh("cpu", (shards,))
    names = ("dp_replicate", "dp_shard_cp")  # accelerate's (`ParallelismConfig.fsdp_dim_names`)
    return init_device_mesh("cpu", (copies, shards), mesh_dim_names=names)


@contextmanager
def _as_quantized(case: DryRunCase, trainer: Any) -> Iterator[None]:
    """Within, adapters keep their dtype if the base is quantized: accelerate looks for
    bitsandbytes' parameter class, which fakes have not, before it turns them into fp32."""
    state = trainer.accelerator.state
    before = state._mixed_precision
    if case.plan.quantization != "none" and case.fsdp_version > 1:
        state._mixed_precision = "no"
    yield
    state._mixed_precision = before


def _waited(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _attach_quant_state(module: Any) -> None:
    """A gathered weight knows its scales again; bitsandbytes makes its own class of it for that."""
    module.weight.quant_state = module.quant_state


def _address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def enable(trainer: Any, plan: TrainingPlan, version: int) -> None:
    """Set the trainer up as `accelerate launch` does with FSDP of that version."""
    first = version == 1
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        # FSDP2 is told by the mesh.
        sharding_strategy="HYBRID_SHARD" if first and plan.dp_replicate_size > 1 else None,
        auto_wrap_policy="transformer_based_wrap",
        cpu_offload=plan.offload == "parameters",
        backward_prefetch="BACKWARD_PRE" if first else None,
        # `accelerate launch` sets it unless told otherwise (commands/launch.py), the plugin alone
        # does not. FSDP1 then keeps gradients until the next forward, whatever `zero_grad` does.
        use_orig_params=True if first else None,
    )
    if plan.autocast:
        plugin.set_mixed_precision(plan.mixed_precision)
    state = trainer.accelerator.state
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
    # Where `AcceleratorState` leaves it: each further one looks there first.
    PartialState._shared_state["distributed_type"] = state.distributed_type
    if first and plan.num_gpus > 1:  # accelerate counts processes, and there is one
        trainer.accelerator.no_sync = lambda model: model.no_sync()
    trainer.is_fsdp_enabled = True


@contextmanager
def group_of(num_gpus: int) -> Iterator[None]:
    """Within, this process is the first of so many; what it sends goes nowhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_gpus)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _unrecorded(function: Callable[..., Any]) -> Callable[..., Any]:
    def unrecorded(*args: Any) -> Any:
        with _disable_current_modes():
            return function(*args)

    return unrecorded


def _as_communication(recorder: Recorder, function: Callable[..., Any]) -> Callable[..., Any]:
    def communicating(*args: Any, **kwargs: Any) -> Any:
        before, recorder.component = recorder.component, "communication"
        try:
            return function(*args, **kwargs)
        finally:
            recorder.component = before

    return communicating


def _place_wrappers(recorder: Recorder, model: nn.Module) -> None:
    """Modules that FSDP put around others are where these are."""
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            recorder.place(module, like=module._fsdp_wrapped_module)


def _adopt_flat(recorder: Recorder, model: Any) -> None:
    """Put FSDP1's flat parameters on record. accelerate has just made fp32 ones of those that it
    trains under autocast; the model's own parameters look at the old ones until the first step."""
    adapted = hasattr(model, "peft_config")
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel) and module._has_params:
            parameter = module._flat_param
            component = "adapters" if adapted and parameter.requires_grad else "weights"
            recorder.adopt([parameter], component, recorder.path_of(module))


def _checkpoint_around(model: nn.Module) -> None:
    """Computed again is FSDP1's wrapper, not the layer within. Its hooks on detached inputs then
    hold those and their gradients until backward ends, if the layer is frozen
    (`_register_post_backward_reshard_only_hook`)."""
    for wrapper in model.modules():
        layer: Any = getattr(wrapper, "_fsdp_wrapped_module", None)
        if getattr(layer, "gradient_checkpointing", False):
            layer.gradient_checkpointing = False
            wrapper.forward = partial(_checkpointed, wrapper.forward)


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=True)


def _offloading(recorder: Recorder) -> tuple[tuple[Any, str, Any], ...]:
    """Host and device are one here; what moves between them, otherwise (CPUOffloadPolicy)."""
    reduce = _as_communication(recorder, FSDPParamGroup.post_backward)
    return (
        (torch.Tensor, "pin_memory", lambda tensor: tensor),
        (FSDPParam, "all_gather_inputs", property(_to_device)),
        (FSDPParamGroup, "post_backward", _to_host(recorder, reduce)),
        (FSDPParamGroup, "finalize_backward", _to_host(recorder, FSDPParamGroup.finalize_backward)),
    )


def _step_on_host(accelerator: Any, recorder: Recorder) -> None:
    accelerator.clip_grad_norm_ = _on_host(recorder, accelerator.clip_grad_norm_)
    for optimizer in accelerator._optimizers:
        optimizer.optimizer.register_step_pre_hook(_setter(recorder, True))
        optimizer.optimizer.register_step_post_hook(_setter(recorder, False))


def _setter(recorder: Recorder, on_host: bool) -> Callable[..., None]:
    def set_place(*args: Any) -> None:
        recorder.on_host = on_host

    return set_place


def _on_host(recorder: Recorder, function: Callable[..., Any]) -> Callable[..., Any]:
    def on_host(*args: Any, **kwargs: Any) -> Any:
        recorder.on_host = True
        try:
            return function(*args, **kwargs)
        finally:
            recorder.on_host = False

    return on_host


def _to_device(parameter: Any) -> list[torch.Tensor]:
    """`FSDPParam.all_gather_inputs` of a share on the host, whose copy to the device is a copy."""
    share = parameter._sharded_param_data.clone()
    return [share.to(parameter.param_dtype or share.dtype)]


def _to_host(recorder: Recorder, reduce: Callable[..., Any]) -> Callable[..., Any]:
    """`post_backward`, whose reduced gradients leave the device, and `finalize_backward`: what the
    group has summed over copies of the model it holds till then."""

    def reduce_and_leave(group: Any, *args: Any) -> Any:
        result = reduce(group, *args)
        sent = group._all_reduce_state and _address(group._all_reduce_state.all_reduce_input)
        for parameter in group.fsdp_params:
            gradient = parameter.sharded_param.grad
            if gradient is not None and _address(local_tensor(gradient)) != sent:
                recorder.leaves_device(gradient)
        return result

    return reduce_and_leave
