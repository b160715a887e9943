"""Two steps, an evaluation and a save of the training process, on fake tensors.

The second step holds optimizer states; with accumulation, each step has two micro-batches, the
second of which meets the gradients of the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from msgspec import Struct
from torch._subclasses.fake_tensor import FakeTensorMode

from ftplan.launcher.dry_run.build_trainer import build_trainer
from ftplan.launcher.dry_run.case import DryRunCase
from ftplan.launcher.dry_run.cuda import CUDA_KERNELS
from ftplan.launcher.dry_run.draft import Draft
from ftplan.launcher.dry_run.fakes import make_fake, quantize_blank
from ftplan.launcher.dry_run.generation import completions_alone
from ftplan.launcher.dry_run.layers import keep_few_layers, meet_outside, same_on_every_layer
from ftplan.launcher.dry_run.objectives import trainer_construction
from ftplan.launcher.dry_run.operations import REPLACED
from ftplan.launcher.dry_run.optimizers import optimizer_kernels
from ftplan.launcher.dry_run.quantized import quantized_kernels
from ftplan.launcher.dry_run.recorder import Recorder
from ftplan.launcher.dry_run.sharding import adopt, spread
from ftplan.launcher.dry_run.surroundings import surroundings
from ftplan.launcher.dry_run.trainers import PhaseMarker
from ftplan.launcher.dry_run.zero import engine_dtype, turn_into
from ftplan.launcher.emit import method_settings
from ftplan.launcher.training.build import (
    apply_method,
    count_parameters,
    count_trainable,
    decoder_layer_list,
    decoder_layers,
    meta_model,
    trained_bytes,
)
from ftplan.planner.allocator import BLOCK_BYTES
from ftplan.planner.memory_record import MemoryRecord
from ftplan.planner.objectives import keeps_reference
from ftplan.planner.repeat_layers import NotRepeating
from ftplan.planner.sharding import ZERO
from ftplan.planner.stack import cublas_workspace_bytes


class DryRun(Struct, frozen=True, kw_only=True):
    """The record of a dry run, and what the model turned out to be."""

    record: MemoryRecord
    num_parameters: int
    num_trainable_parameters: int
    trained_weight_bytes: int
    num_layers_traced: int
    num_layers: int


def dry_run(case: DryRunCase, say: Callable[[str], None] = lambda _: None) -> DryRun:
    """Carry the case out; layers that turn out unlike are traced one by one.

    Raises InputError for what cannot be built or run.
    """
    try:
        return _DryRun(case, say).carry_out(few_layers=case.few_layers)
    except NotRepeating:
        say("equal layers behave unlike: tracing all of them")
        return _DryRun(case, say).carry_out(few_layers=False)


class _DryRun:
    def __init__(self, case: DryRunCase, say: Callable[[str], None]) -> None:
        self.case, self.plan, self.say = case, case.plan, say

    def carry_out(self, *, few_layers: bool) -> DryRun:
        plan, settings = self.plan, method_settings(self.plan)
        self.say("building the model")
        model = meta_model(self.case.config, settings)
        peft_config = apply_method(model, plan.method, settings)
        reference = meta_model(self.case.config, settings) if keeps_reference(plan) else None
        judge = self._reward_model()
        num_parameters, num_layers = count_parameters(model), len(decoder_layers(model))
        quantize_blank(model, getattr(torch, plan.dtype))
        selection = None
        if few_layers and self._may_repeat(model, peft_config):
            every = plan.every_n_layers
            selection = keep_few_layers(model, reference, every_n_layers=every)
        with trainer_construction(self.case.kind, reference):
            trainer = build_trainer(self.case, model, peft_config, judge)
        layers_path, layers = decoder_layer_list(trainer.model)
        whole = [(trainer.model, 1)]  # what stands for the whole model, and how often
        if selection:
            whole += [
                (layers[place], run.left_out) for run in selection.runs for place in run.template
            ]
        draft = Draft(layers_path)
        self._record(trainer, reference, judge, draft)
        return DryRun(
            record=draft.finish(selection.runs if selection else ()),
            num_parameters=num_parameters,
            num_trainable_parameters=sum(count_trainable(m) * times for m, times in whole),
            trained_weight_bytes=sum(trained_bytes(m) * times for m, times in whole),
            num_layers_traced=len(layers),
            num_layers=num_layers,
        )

    def _reward_model(self) -> Any:
        """What judges completions, in the dtype that the plan computes in; None without."""
        if self.case.reward_config is None:
            return None
        plan = self.plan
        settings = method_settings(plan.replace(quantization="none", method="full"))
        judging = {**settings, "objective": "reward", "dtype": plan.compute_dtype}
        return meta_model(self.case.reward_config, judging).requires_grad_(False)

    def _may_repeat(self, model: Any, peft_config: Any) -> bool:
        """Whether equal layers may be expected to do the same."""
        # FSDP1 gathers two layers ahead of adapters, further than what is known to repeat; ZeRO-3
        # keeps what is used again within a billion elements, across any number of layers. The
        # shares that ZeRO has of adapters' gradients are alike, so that one layer's is not known
        # from another's.
        sharding = self.plan.sharding
        first_fsdp = sharding == "fsdp" and self.case.fsdp_version == 1
        adapted_zero = sharding in ZERO and peft_config is not None
        if first_fsdp or adapted_zero or sharding == "zero3":
            return False
        alone = not meet_outside(model.config, self.plan.trainer)
        return alone and same_on_every_layer(peft_config)

    def _record(self, trainer: Any, reference: Any, judge: Any, draft: Draft) -> None:
        decompositions = {
            **REPLACED,
            **(completions_alone(self.case) if self.plan.resolved_objective.generates else {}),
            **quantized_kernels(self.plan.quantization),
            **optimizer_kernels(self.plan.optimizer, self.case.kind),
        }
        fake_mode = FakeTensorMode()
        recorder = Recorder(draft, fake_mode, decompositions, self.case.padded)
        if self.case.kind == "cuda":
            recorder.decompositions.update(CUDA_KERNELS)
            draft.granularity = BLOCK_BYTES
            draft.workspace_bytes = cublas_workspace_bytes(self.case.capability)
        trainer.observe(PhaseMarker(draft, recorder))
        if self.plan.sharding in ZERO:
            turn_into(trainer.model, engine_dtype(self.plan))
        make_fake(trainer.model, fake_mode)
        if reference is not None:
            make_fake(reference, fake_mode)
        if judge is not None:
            make_fake(judge, fake_mode)
        draft.begin_phase("load")
        self.say("tracing two steps")
        recorder.between_steps = True  # while the optimizer is made
        with (
            surroundings(self.case, trainer, reference),
            fake_mode,
            recorder.watching(trainer.model, reference, judge),
            spread(trainer, recorder, self.case),
        ):
            if reference is not None:
                adopt(recorder, reference, held_as="reference_model")
            if judge is not None:
                adopt(recorder, judge, held_as="reward_model")
            trainer.train()
            if not self.plan.resolved_objective.generates:  # that would be less of the same
                self.say("tracing an evaluation step")
                trainer.evaluate_one_batch()
            draft.begin_phase("save")
