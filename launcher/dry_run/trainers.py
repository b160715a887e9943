"""The trainers of real runs, on a model that has no data."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import Trainer

from ftplan.launcher.dry_run.draft import Draft
from ftplan.launcher.dry_run.optimizers import optimizer_states
from ftplan.launcher.dry_run.recorder import Recorder
from ftplan.launcher.training.importance import importance
from ftplan.launcher.training.stacks import Observed, Observer
from ftplan.launcher.training.trainer import PlannedTrainer


class PhaseMarker(Observer):
    """Marks phases in a draft, and tells it which storages are gradients and optimizer states."""

    def __init__(self, draft: Draft, recorder: Recorder) -> None:
        self.draft, self.recorder = draft, recorder

    def begin(self, phase: str) -> None:
        """A phase in which modules run."""
        self.recorder.between_steps = False
        self.draft.begin_phase(phase)

    def forward_begins(self) -> None:
        self.begin("forward")

    def backward_begins(self) -> None:
        self.draft.begin_phase("backward")
        self.recorder.in_backward = True

    def backward_ended(self, *, steps_next: bool) -> None:
        self.recorder.in_backward = False
        self.recorder.between_steps = True
        self.recorder.backward_ended(steps_next)
        if steps_next:
            self.draft.begin_phase("optimizer step")

    def optimizer_begins(self, model: nn.Module) -> None:
        gradients = (p.grad for p in model.parameters() if p.grad is not None)
        self.recorder.relabel(gradients, "gradients")
        self.recorder.in_optimizer = True

    def optimizer_ended(self, model: nn.Module, optimizer: Any) -> None:
        self.recorder.relabel(optimizer_states(optimizer), "optimizer_states")
        self.recorder.relabel(importance(model), "optimizer_states")
        self.recorder.in_optimizer = False
        # GaLore's 8-bit optimizer puts new storages into the parameters.
        trained = (p for p in model.parameters() if p.requires_grad)
        adapted = hasattr(model, "peft_config")
        self.recorder.relabel(trained, "adapters" if adapted else "weights", anew=False)

    def evaluation_begins(self) -> None:
        self.begin("evaluation")


class Dry(Observed):
    """Where fakes need it otherwise: nothing is moved."""

    observer: PhaseMarker

    def _move_model_to_device(self, model: nn.Module, device: Any) -> None:
        """Fakes are where they are."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        self.accelerator: Any
        self.accelerator.device_placement = False


class DrySFTTrainer(Dry, PlannedTrainer):
    """TRL's trainer, as ftplan launches it."""


class DryTransformersTrainer(Dry, Trainer):
    """transformers' own trainer."""


def cast_back(model: Any) -> None:
    """What TRL 0.x does under bf16 after PEFT's k-bit preparation (`peft_module_casting_to_bf16`):
    embeddings, head and adapters in bf16; norms stay in fp32."""
    for name, parameter in model.named_parameters():
        outer = any(part in name for part in ("lm_head", "embed_tokens", "wte", "wpe"))
        if parameter.requires_grad or (outer and parameter.dtype is torch.float32):
            parameter.data = parameter.data.to(torch.bfloat16)


def collating_for_real(collator: Any) -> Any:
    """A collator that works on real numbers and gives tensors without data: packed rows are told
    apart by numbers that it computes."""

    def collate(rows: Any) -> dict[str, Any]:
        with _disable_current_modes():
            batch = collator(rows)
        return {
            name: torch.empty(value.shape, dtype=value.dtype) if torch.is_tensor(value) else value
            for name, value in batch.items()
        }

    return collate
