"""Training in several processes with DeepSpeed's ZeRO, which divides optimizer states (stage 1),
gradients (2) and parameters (3)."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from transformers.integrations.deepspeed import deepspeed_init

from ftplan.launcher.training.measure import storage_sizes


def with_deepspeed(
    arguments: Mapping[str, Any], config: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    """The trainer's arguments with DeepSpeed's configuration, which it fills in."""
    return arguments if config is None else {**arguments, "deepspeed": copy.deepcopy(config)}


def join(config: Mapping[str, Any] | None) -> None:
    """Have DeepSpeed take part in the processes' group before a model is loaded, which stage 3
    divides at once. On processors without its collectives in shared memory, which it would compile
    first; gloo has its own."""
    if config is None:
        return
    import deepspeed

    if torch.distributed.get_backend() == "gloo":
        deepspeed.comm.torch.build_shm_op = lambda: None
    deepspeed.init_distributed(torch.distributed.get_backend(), auto_mpi_discovery=False)


def divide(trainer: Any) -> None:
    """Make DeepSpeed's engine, once: it takes model and optimizer over for good, and the trainer
    would make one for each evaluation and each training (transformers 5.23
    `Trainer.evaluation_loop`, which refuses stages 1 and 2, and `_prepare_for_training`)."""
    accelerator, model = trainer.accelerator, trainer.model
    deepspeed_init(trainer, num_training_steps=0)
    engine, optimizer = accelerator.prepare(model, trainer.optimizer)
    trainer.model_wrapped = trainer.deepspeed = engine
    prepare = accelerator.prepare

    planned = [(group["lr"], group.get("weight_decay")) for group in optimizer.param_groups]

    def create_optimizer(*args: Any) -> Any:
        """The same one, which trials have go nowhere."""
        for group, (lr, weight_decay) in zip(optimizer.param_groups, planned, strict=True):
            group.pop("initial_lr", None)
            group["lr"] = lr if trainer.args.learning_rate else 0.0
            if weight_decay is not None:
                group["weight_decay"] = weight_decay if trainer.args.weight_decay else 0.0
        trainer.optimizer = optimizer
        return optimizer

    def once(*objects: Any, **kwargs: Any) -> Any:
        ready = {id(model): engine, id(engine): engine, id(optimizer): optimizer}
        if any(id(one) not in ready for one in objects):
            return prepare(*objects, **kwargs)
        found = tuple(ready[id(one)] for one in objects)
        return found if len(found) > 1 else found[0]

    def begin_anew(*objects: Any) -> Any:
        """What accelerate frees before a training, but for the engine, which it would end."""
        accelerator._dataloaders.clear()
        accelerator._schedulers.clear()
        accelerator.step = 0
        _forget_steps(engine)
        return objects

    create_optimizer()
    trainer.create_optimizer = create_optimizer
    trainer.save_model = partial(_save_model, trainer)
    accelerator.prepare, accelerator.free_memory = once, begin_anew


def _forget_steps(engine: Any) -> None:
    """The engine as it was before its first step, but for the weights.

    Stage 3 has the order of modules of the last evaluation, which is not that of training, and
    would fetch anew what it keeps until it has another. Small parameters that stay whole are
    divided again, as they are when training begins.
    """
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is not None:
        offload.partition_all_parameters()
        if not offload.get_param_coordinator().is_invalid_trace():
            offload.get_param_coordinator()._invalidate_trace()
    engine.optimizer.optimizer.state.clear()
    engine.global_steps = engine.global_samples = engine.micro_steps = engine.skipped_steps = 0
    scaler = engine.optimizer.loss_scaler
    if engine.fp16_enabled():
        scaler.cur_scale = float(2 ** engine.fp16_config().initial_scale_power)


def _save_model(trainer: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
    """As the trainer saves a model that it holds whole. With DeepSpeed it would copy all of it in
    each process, and save what is tied twice."""
    state = whole_state(trainer) if is_partitioned(trainer.model) else None
    trainer._save(output_dir, state_dict=state)


def is_partitioned(model: Any) -> bool:
    """Whether processes hold a part of each parameter (stage 3)."""
    return any(hasattr(parameter, "ds_tensor") for parameter in model.parameters())


def whole_state(trainer: Any) -> dict[str, torch.Tensor]:
    """What is saved of a partitioned model, as `sharded.whole_state`, in the engine's dtype."""
    adapted = isinstance(trainer.model, PeftModel)
    engine = trainer.deepspeed
    return engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=adapted) or {}


def num_elements(parameter: torch.Tensor) -> int:
    """Of a whole parameter, wherever its parts are."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def loss_scale(trainer: Any) -> float | None:
    """By which the engine multiplies losses in fp16; None where it does not."""
    engine = getattr(trainer, "deepspeed", None)
    if engine is None or not engine.fp16_enabled():
        return None
    return float(engine.optimizer.loss_scale)


def held_by_engine(trainer: Any) -> list[torch.Tensor]:
    """Tensors in this process that are neither the model's own nor states of its optimizer: fp32
    masters, buffers of gradients, and the parts of partitioned parameters."""
    engine = getattr(trainer, "deepspeed", None)
    if engine is None:
        return []
    model, optimizer = trainer.model, engine.optimizer
    own = [*model.parameters(), *model.buffers()]
    own += [p.grad for p in model.parameters() if p.grad is not None]
    own += [one for state in optimizer.state.values() for one in _tensors(state, set())]
    known = set(storage_sizes(own))
    parts = [p.ds_tensor for p in model.parameters() if hasattr(p, "ds_tensor")]
    found = [*parts, *_tensors(vars(optimizer), set())]
    return [tensor for tensor in found if tensor.untyped_storage().data_ptr() not in known]


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """All within containers and DeepSpeed's own objects."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one, seen)
    elif isinstance(value, (list, tuple, set, deque)):
        for one in value:
            yield from _tensors(one, seen)
    elif type(value).__module__.startswith("deepspeed.runtime.zero"):
        yield from _tensors(getattr(value, "__dict__", {}), seen)
