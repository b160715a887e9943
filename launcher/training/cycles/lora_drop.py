"""LoRA-drop: layers whose adapters do little share one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.step_seconds import PROFILED_STEPS
from ftplan.launcher.training.cycles.cycle import ADAPTER, Cycle, read_state
from ftplan.launcher.training.cycles.merging import Adapted, adapted_modules, begin_anew
from ftplan.launcher.training.measure import CpuAllocationRecorder
from ftplan.planner.cycles import scoring_steps


class LoraDrop(Cycle):
    """Trains all adapters for some steps, sees how much each adds to its layer's output, and lets
    the layers that add least share one adapter for each kind of module. Then training begins.

    The importance of a layer is the sum over tokens of the squared length of B A x, as a share of
    that of all layers of its kind; the most important ones up to `lora_drop_threshold` keep theirs.
    """

    def __init__(
        self, run: RunDir, settings: Mapping[str, Any], seed: int, recorder: CpuAllocationRecorder
    ) -> None:
        super().__init__(run)
        self.threshold, self.seed = settings["lora_drop_threshold"], seed
        self.recorder = recorder
        self.kept: list[str] = []

    def prepare(self, trainer: Any, checkpoint: Path | None) -> None:
        modules = adapted_modules(trainer.model)
        if checkpoint is None:
            found = score(trainer, modules, self.recorder)
            self.kept = important(modules, found, self.threshold)
            if trainer.is_world_process_zero():
                self.tell("layers scored", importance=found, kept=self.kept)
        else:
            self.kept = read_state(checkpoint)["kept"]
        share_adapters(modules, frozenset(self.kept))
        begin_anew(trainer.model, modules, self.seed)

    def state(self) -> dict[str, Any]:
        return {"kept": self.kept}


def important(
    modules: Sequence[Adapted], importance: Mapping[str, float], threshold: float
) -> list[str]:
    """Names of the modules that keep their own adapter: of each kind the most important ones,
    until together they reach `threshold`."""
    kept: set[str] = set()
    for of_kind in _kinds(modules).values():
        total = sum(importance[module.name] for module in of_kind)
        reached = 0.0
        for module in sorted(of_kind, key=lambda m: -importance[m.name]):
            if reached >= threshold * total and kept & {m.name for m in of_kind}:
                break
            kept.add(module.name)
            reached += importance[module.name]
    return [module.name for module in modules if module.name in kept]


def share_adapters(modules: Sequence[Adapted], kept: frozenset[str]) -> None:
    """Give all others of a kind the matrices of the first of them."""
    for of_kind in _kinds(modules).values():
        sharing = [module for module in of_kind if module.name not in kept]
        for module in sharing[1:]:
            first = sharing[0]
            if ADAPTER in module.layer.lora_A:
                module.layer.lora_A[ADAPTER].weight = first.layer.lora_A[ADAPTER].weight
                module.layer.lora_B[ADAPTER].weight = first.layer.lora_B[ADAPTER].weight
            else:
                module.layer.lora_embedding_A[ADAPTER] = first.layer.lora_embedding_A[ADAPTER]
                module.layer.lora_embedding_B[ADAPTER] = first.layer.lora_embedding_B[ADAPTER]


def _kinds(modules: Sequence[Adapted]) -> dict[Any, list[Adapted]]:
    """Modules that could share an adapter: of the same name in their layers, and of one shape."""
    kinds: dict[Any, list[Adapted]] = {}
    for module in modules:
        shapes = tuple(tuple(parameter.shape) for parameter in module.parameters)
        kinds.setdefault((module.kind, *shapes), []).append(module)
    return kinds


def score(
    trainer: Any, modules: Sequence[Adapted], recorder: CpuAllocationRecorder
) -> dict[str, float]:
    """Importance of each module's adapter, by a short training of its own on the first rows.

    The trainer trains as it will, without reports and checkpoints; all ranks come to the same.
    """
    arguments = trainer.args
    steps = scoring_steps(_planned_steps(trainer))
    rate = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    changes = {"max_steps": steps, "save_strategy": "no", **rate}
    with (
        _changed(arguments, **changes),
        _only(trainer, recorder),
        _outputs(trainer.model, modules) as sums,
    ):
        trainer.train()
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.model_wrapped = trainer.model
    together = torch.stack([sums[module.name] for module in modules]).to(arguments.device)
    together = trainer.accelerator.reduce(together, reduction="sum")
    return dict(zip([module.name for module in modules], together.tolist(), strict=True))


def _planned_steps(trainer: Any) -> int:
    """Optimizer steps of the run, as the trainer will count them."""
    arguments = trainer.args
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    counts = trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())
    return int(counts[-1])


@contextmanager
def _changed(arguments: TrainingArguments, **values: Any) -> Iterator[None]:
    before = {name: getattr(arguments, name) for name in values}
    for name, value in values.items():
        setattr(arguments, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(arguments, name, value)


@contextmanager
def _only(trainer: Any, recorder: CpuAllocationRecorder) -> Iterator[None]:
    """Without the callbacks of the run, but for the measurement of memory."""
    handler = trainer.callback_handler
    callbacks = handler.callbacks
    own = [
        callback for callback in callbacks if type(callback).__module__.startswith("transformers")
    ]
    handler.callbacks = [*own, _Measuring(recorder)]
    try:
        yield
    finally:
        handler.callbacks = callbacks


class _Measuring(TrainerCallback):
    """Peaks of the first steps on a processor: all adapters train, which takes most memory."""

    def __init__(self, recorder: CpuAllocationRecorder) -> None:
        self.recorder = recorder

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **parts: Any,
    ) -> None:
        if args.device.type == "cpu" and state.global_step < PROFILED_STEPS:
            self.recorder.start(model, optimizer)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        self.recorder.stop()


@contextmanager
def _outputs(model: Any, modules: Sequence[Adapted]) -> Iterator[dict[str, torch.Tensor]]:
    """Sums of the squared lengths of what adapters give, while the model is called: layers that
    checkpointing computes again in backward count once."""
    sums = {module.name: torch.zeros((), dtype=torch.float64) for module in modules}
    calling = [False]

    def watch(module: Adapted) -> Any:
        def add(layer: Any, args: Any, output: torch.Tensor) -> None:
            if calling[0] and layer.training:
                length = torch.linalg.vector_norm(output.detach(), dtype=torch.float32)
                sums[module.name] = sums[module.name].to(length.device)
                sums[module.name] += (module.scaling * length.double()) ** 2

        return module.layer.lora_B[ADAPTER].register_forward_hook(add)

    hooks = [watch(module) for module in modules if ADAPTER in module.layer.lora_A]
    hooks.append(model.register_forward_pre_hook(lambda *_: calling.__setitem__(0, True)))
    hooks.append(model.register_forward_hook(lambda *_: calling.__setitem__(0, False)))
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
