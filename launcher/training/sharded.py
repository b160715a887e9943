"""Training in several processes: DDP; FSDP2, ZeRO and tensor parallelism, where each holds a part
of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from accelerate import ParallelismConfig
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import PeftModel, get_peft_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ftplan.launcher.training import zero
from ftplan.launcher.training.measure import local_tensor


@contextmanager
def divided_on_processors() -> Iterator[None]:
    """Within, accelerate divides models among processors as it does among GPUs: it looks for FSDP
    on accelerators only (accelerate 1.15, `AcceleratorState.__init__`) and knows tensor parallelism
    of them alone (`ParallelismConfig._validate_accelerator`); torch's run on any device."""
    init = AcceleratorState.__init__

    def with_fsdp(state: Any, *args: Any, **kwargs: Any) -> None:
        init(state, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and state.distributed_type is DistributedType.MULTI_CPU:
            if state._mixed_precision != "no":
                plugin.set_mixed_precision(state._mixed_precision)
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    check = ParallelismConfig._validate_accelerator

    def checked(sizes: Any, accelerator: Any) -> None:
        if accelerator.distributed_type is not DistributedType.MULTI_CPU:
            check(sizes, accelerator)

    with (
        mock.patch.object(AcceleratorState, "__init__", with_fsdp),
        mock.patch.object(ParallelismConfig, "_validate_accelerator", checked),
    ):
        yield


def spread(trainer: Any) -> None:
    """The model as all processes hold it, before it is first evaluated: an evaluation prepares it
    for itself alone, and training takes what is prepared as it stands, so that DDP would exchange
    no gradient (transformers 5.23 `Trainer.evaluation_loop`, accelerate 1.15
    `Accelerator.prepare_model`), and FSDP2 would not find an optimizer beside the model."""
    if trainer.is_deepspeed_enabled:
        zero.divide(trainer)
    elif trainer.is_fsdp_enabled:
        _divide(trainer)
    elif trainer.args.world_size > 1 and not is_divided(trainer.model):
        model = trainer._wrap_model(trainer.model)
        trainer.model_wrapped = trainer.accelerator.prepare_model(model)


def _divide(trainer: Any) -> None:
    """FSDP2 needs model and optimizer at once, and once: training and each evaluation ask for it
    again. An optimizer that is made later is one of the divided parameters already."""
    accelerator = trainer.accelerator
    trainer.create_optimizer()
    model, trainer.optimizer = accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model = trainer.model_wrapped = model
    prepare, create_optimizer = accelerator.prepare, trainer.create_optimizer

    def create(*args: Any) -> Any:
        reshard(model)
        return create_optimizer(*args)

    def prepared(one: Any) -> Any:
        if isinstance(one, AcceleratedOptimizer) or not isinstance(one, Optimizer):
            return one
        return accelerator.prepare_optimizer(one)

    def once(*objects: Any, **kwargs: Any) -> Any:
        if objects[0] is not model:
            return prepare(*objects, **kwargs)
        found = tuple(map(prepared, objects))
        return found if len(found) > 1 else found[0]

    accelerator.prepare, trainer.create_optimizer = once, create


def reshard(model: Any) -> None:
    """Give back what forward passes have gathered: until then a module's parameters are whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def first_says(trainer: Any, said: bool) -> bool:
    """What the first process says, in all of them: where clocks decide, they would part, and wait
    for each other for ever."""
    if getattr(trainer.args, "world_size", 1) == 1:
        return said
    told = torch.tensor([int(said)], device=trainer.args.device)
    torch.distributed.broadcast(told, src=0)
    return bool(told.item())


def is_divided(model: Any) -> bool:
    """Whether processes hold a part of each parameter."""
    return isinstance(model, FSDPModule) or zero.is_partitioned(model) or divides_matrices(model)


def divides_matrices(model: Any) -> bool:
    """Whether transformers has divided each layer as it loaded it."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


def whole_state(trainer: Any) -> dict[str, torch.Tensor]:
    """What is saved of a divided model, put together in the first process's RAM, one tensor after
    the other: an adapter's tensors, else all. All processes call it; the others get nothing."""
    model = trainer.model
    if zero.is_partitioned(model):
        return zero.whole_state(trainer)
    parts = model.state_dict()
    kept = set(_saved_with_adapter(model, parts) if isinstance(model, PeftModel) else parts)
    state: dict[str, torch.Tensor] = {}
    by_address: dict[int, torch.Tensor] = {}  # what is tied is saved once
    for name, part in parts.items():
        if name in kept:
            address = local_tensor(part).data_ptr()
            if address not in by_address:
                whole = part.full_tensor() if isinstance(part, DTensor) else part
                first = trainer.is_world_process_zero()
                by_address[address] = whole.cpu() if first else whole.new_empty(0)
            state[name] = by_address[address]
    return state


def _saved_with_adapter(model: PeftModel, parts: dict[str, Any]) -> list[str]:
    """The names of what PEFT keeps of these tensors."""
    names = {id(part): name for name, part in parts.items()}
    return [names[id(part)] for part in get_peft_model_state_dict(model, parts).values()]
