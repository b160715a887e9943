"""The trainers of real runs, on a model that has no data."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback

from ftplan.launcher.dry_run.draft import Draft
from ftplan.launcher.dry_run.losses import liger_loss
from ftplan.launcher.dry_run.recorder import Recorder
from ftplan.launcher.training.trainer import PlannedTrainer


class _Dry:
    """Where fakes need it otherwise: nothing is moved, and phases are marked."""

    draft: Draft
    recorder: Recorder
    use_liger: bool = False

    def _move_model_to_device(self, model: nn.Module, device: Any) -> None:
        """Fakes are where they are."""

    def observe(self, draft: Draft, recorder: Recorder) -> None:
        """Mark phases in `draft` from now on."""
        self.draft, self.recorder = draft, recorder
        accelerator: Any = self.accelerator  # type: ignore[attr-defined]
        accelerator.device_placement = False
        backward = accelerator.backward

        def marked(loss: Any, **kwargs: Any) -> None:
            draft.begin_phase("backward")
            recorder.in_backward = True
            backward(loss, **kwargs)
            recorder.in_backward = False
            recorder.between_steps = True
            if accelerator.sync_gradients:
                draft.begin_phase("optimizer step")

        accelerator.backward = marked

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.recorder.between_steps = False
        self.draft.begin_phase("forward")
        return super().training_step(*args, **kwargs)  # type: ignore[misc]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.use_liger:
            loss = liger_loss(model, inputs)
            return (loss, {}) if kwargs.get("return_outputs") else loss
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def evaluate_one_batch(self) -> None:
        """The evaluation step on the first batch of the evaluation data."""
        trainer: Any = self
        trainer.model.eval()
        self.recorder.between_steps = False
        self.draft.begin_phase("evaluation")
        batch = next(iter(trainer.get_eval_dataloader()))
        trainer.prediction_step(trainer.model_wrapped, batch, prediction_loss_only=True)


class DrySFTTrainer(_Dry, PlannedTrainer):
    """TRL's trainer, as ftplan launches it."""


class DryTransformersTrainer(_Dry, Trainer):
    """transformers' own trainer."""


class StateLabels(TrainerCallback):
    """Tells the draft which storages are gradients and optimizer states."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        gradients = (p.grad for p in model.parameters() if p.grad is not None)
        self.recorder.relabel(gradients, "gradients")

    def on_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        states = [
            value
            for state in optimizer.state.values()
            for value in state.values()
            if hasattr(value, "untyped_storage")
        ]
        self.recorder.relabel(states, "optimizer_states")


def with_adapters(
    model: Any, peft_config: PeftConfig | None, *, kbit_prepare: bool, checkpointing: bool
) -> Any:
    """The model that transformers' trainer gets, wrapped as PEFT's documentation does it."""
    if kbit_prepare:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    if peft_config is None:
        return model
    wrapped = get_peft_model(model, peft_config)
    if checkpointing:
        wrapped.enable_input_require_grads()
    return wrapped


def blank_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a padding token and nothing else."""
    from tokenizers import Tokenizer, models

    words = models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="<eos>"
    )
