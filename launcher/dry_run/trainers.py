"""The trainers of real runs, on a model that has no data."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import (
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ftplan.launcher.dry_run.draft import Draft
from ftplan.launcher.dry_run.optimizers import optimizer_states
from ftplan.launcher.dry_run.recorder import Recorder
from ftplan.launcher.training.trainer import PlannedTrainer


class Dry:
    """Where fakes need it otherwise: nothing is moved, and phases are marked."""

    draft: Draft
    recorder: Recorder

    def _move_model_to_device(self, model: nn.Module, device: Any) -> None:
        """Fakes are where they are."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        self.accelerator: Any
        self.accelerator.device_placement = False

    def observe(self, draft: Draft, recorder: Recorder) -> None:
        """Mark phases in `draft` from now on."""
        self.draft, self.recorder = draft, recorder
        accelerator = self.accelerator
        backward = accelerator.backward

        def marked(loss: Any, **kwargs: Any) -> None:
            draft.begin_phase("backward")
            recorder.in_backward = True
            backward(loss, **kwargs)
            recorder.in_backward = False
            recorder.between_steps = True
            recorder.backward_ended(accelerator.sync_gradients)
            if accelerator.sync_gradients:
                draft.begin_phase("optimizer step")

        accelerator.backward = marked
        self.add_callback(StateLabels(recorder))  # type: ignore[attr-defined]
        self.remove_callback(PrinterCallback)  # type: ignore[attr-defined]

    def begin_micro_batch(self) -> None:
        """What comes next is forward."""
        self.recorder.between_steps = False
        self.draft.begin_phase("forward")

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.begin_micro_batch()
        return super().training_step(*args, **kwargs)  # type: ignore[misc]

    def evaluate_one_batch(self) -> None:
        """The evaluation step on the first batch of the evaluation data."""
        trainer: Any = self
        trainer.model.eval()
        self.recorder.between_steps = False
        self.draft.begin_phase("evaluation")
        batch = next(iter(trainer.get_eval_dataloader()))
        trainer.prediction_step(trainer.model_wrapped, batch, prediction_loss_only=True)


class DrySFTTrainer(Dry, PlannedTrainer):
    """TRL's trainer, as ftplan launches it."""


class DryTransformersTrainer(Dry, Trainer):
    """transformers' own trainer."""


class StateLabels(TrainerCallback):
    """Tells the draft which storages are gradients and optimizer states."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        label_gradients(self.recorder, model)

    def on_optimizer_step(
        self, *args: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        label_states(self.recorder, optimizer)
        # GaLore's 8-bit optimizer puts new storages into the parameters.
        trained = (p for p in model.parameters() if p.requires_grad)
        adapted = hasattr(model, "peft_config")
        component = "adapters" if adapted else "weights"
        self.recorder.relabel(trained, component, anew=False)


def label_gradients(recorder: Recorder, model: nn.Module) -> None:
    """Before the optimizer's step."""
    gradients = (p.grad for p in model.parameters() if p.grad is not None)
    recorder.relabel(gradients, "gradients")
    recorder.in_optimizer = True


def label_states(recorder: Recorder, optimizer: Any) -> None:
    """After the optimizer's step."""
    recorder.relabel(optimizer_states(optimizer), "optimizer_states")
    recorder.in_optimizer = False


class PlainLoop:
    """A loop of one's own: the model's loss, backward, the optimizer's step; no autocast.

    The outputs, logits among them, are held until the step is over. No clipping, no mask.
    """

    def __init__(
        self, model: Any, arguments: TrainingArguments, rows: Dataset, *, steps: int
    ) -> None:
        self.model, self.arguments, self.rows, self.steps = model, arguments, rows, steps
        if arguments.gradient_checkpointing:
            settings = dict(arguments.gradient_checkpointing_kwargs)
            every = settings.pop("every_n_layers", 1)
            model.activation_checkpointing_enable(settings, every_n_layers=every)

    def observe(self, draft: Draft, recorder: Recorder) -> None:
        """Mark phases in `draft` from now on."""
        self.draft, self.recorder = draft, recorder

    def train(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(self.arguments)
        optimizer = optimizer_class(trained, **settings)
        self.model.train()
        if hasattr(optimizer, "train"):  # schedule-free ones are told, as their README says
            optimizer.train()
        batch = self._batch()
        for _ in range(self.steps):
            self._step(optimizer, batch)

    def _step(self, optimizer: Any, batch: torch.Tensor) -> None:
        draft, recorder = self.draft, self.recorder
        recorder.between_steps = True
        optimizer.zero_grad(set_to_none=True)
        for _ in range(self.arguments.gradient_accumulation_steps):
            recorder.between_steps = False
            draft.begin_phase("forward")
            outputs = self.model(input_ids=batch, labels=batch, use_cache=False)
            draft.begin_phase("backward")
            recorder.in_backward = True
            outputs.loss.backward()
            recorder.in_backward = False
        recorder.between_steps = True
        draft.begin_phase("optimizer step")
        label_gradients(recorder, self.model)
        optimizer.step()
        label_states(recorder, optimizer)

    def evaluate_one_batch(self) -> None:
        """The evaluation step."""
        self.model.eval()
        self.recorder.between_steps = False
        self.draft.begin_phase("evaluation")
        batch = self._batch()
        with torch.no_grad():
            self.model(input_ids=batch, labels=batch, use_cache=False)

    def _batch(self) -> torch.Tensor:
        rows = self.arguments.per_device_train_batch_size
        length = len(self.rows[0]["input_ids"])
        return torch.ones((rows, length), dtype=torch.int64)


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


def cast_back(model: Any) -> None:
    """What TRL 0.x does under bf16 after PEFT's k-bit preparation (`peft_module_casting_to_bf16`):
    embeddings, head and adapters in bf16; norms stay in fp32."""
    for name, parameter in model.named_parameters():
        outer = any(part in name for part in ("lm_head", "embed_tokens", "wte", "wpe"))
        if parameter.requires_grad or (outer and parameter.dtype is torch.float32):
            parameter.data = parameter.data.to(torch.bfloat16)


def causal_model(model: Any) -> Any:
    """The transformers model, within PEFT's wrapper if there is one."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def blank_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a padding token and nothing else."""
    from tokenizers import Tokenizer, models

    words = models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="<eos>"
    )
