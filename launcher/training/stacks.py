"""Training stacks as plans name them, with moments of a step at which somebody may look.

The dry run looks at them on tensors without data, `benchmarks.gpu` on a GPU. Needs no TRL: its
trainers are mixed with `Observed` where they are needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Observer:
    """Is told what comes next in a step; does nothing itself."""

    def forward_begins(self) -> None:
        """A micro-batch."""

    def backward_begins(self) -> None:
        """Of the micro-batch."""

    def backward_ended(self, *, steps_next: bool) -> None:
        """`steps_next`: the optimizer's step follows, not another micro-batch."""

    def optimizer_begins(self, model: nn.Module) -> None:
        """Gradients are whole, and clipped where they are."""

    def optimizer_ended(self, model: nn.Module, optimizer: Any) -> None:
        """The optimizer has made its step; gradients are there still."""

    def step_ended(self) -> None:
        """Gradients are gone."""

    def evaluation_begins(self) -> None:
        """The evaluation step on one batch."""


class Observed:
    """A trainer of transformers or TRL that tells an observer what it does."""

    observer: Observer

    def observe(self, observer: Observer) -> None:
        """Tell `observer` from now on."""
        trainer: Any = self
        self.observer = observer
        accelerator = trainer.accelerator
        backward = accelerator.backward

        def observed(loss: Any, **kwargs: Any) -> None:
            observer.backward_begins()
            backward(loss, **kwargs)
            observer.backward_ended(steps_next=accelerator.sync_gradients)

        accelerator.backward = observed
        trainer.add_callback(_StepObserver(observer))
        trainer.remove_callback(PrinterCallback)

    def begin_micro_batch(self) -> None:
        """What comes next is forward."""
        self.observer.forward_begins()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.begin_micro_batch()
        return super().training_step(*args, **kwargs)  # type: ignore[misc]

    def evaluate_one_batch(self) -> None:
        """The evaluation step on the first batch of the evaluation data."""
        trainer: Any = self
        trainer.model.eval()
        self.observer.evaluation_begins()
        batch = next(iter(trainer.get_eval_dataloader()))
        trainer.prediction_step(trainer.model_wrapped, batch, prediction_loss_only=True)


class _StepObserver(TrainerCallback):
    """Tells an observer of the optimizer's step."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.observer.optimizer_begins(model)

    def on_optimizer_step(
        self, *args: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self.observer.optimizer_ended(model, optimizer)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.observer.step_ended()


class ObservedTrainer(Observed, Trainer):
    """transformers' own trainer."""


class PlainLoop:
    """A loop of one's own: the model's loss, backward, the optimizer's step; no autocast.

    The outputs, logits among them, are held until the step is over. No clipping, no mask. `rows`:
    their first one's `input_ids` give the length of all.
    """

    def __init__(
        self,
        model: Any,
        arguments: TrainingArguments,
        rows: Sequence[Mapping[str, Any]],
        *,
        steps: int,
    ) -> None:
        self.model, self.arguments, self.rows, self.steps = model, arguments, rows, steps
        self.observer = Observer()
        if arguments.gradient_checkpointing:
            settings = dict(arguments.gradient_checkpointing_kwargs)
            every = settings.pop("every_n_layers", 1)
            enable = getattr(model, "activation_checkpointing_enable", None)  # not yet in 5.17
            enable = enable or model.gradient_checkpointing_enable
            enable(settings, **({"every_n_layers": every} if every > 1 else {}))

    def observe(self, observer: Observer) -> None:
        """Tell `observer` from now on."""
        self.observer = observer

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
        observer, micro_batches = self.observer, self.arguments.gradient_accumulation_steps
        optimizer.zero_grad(set_to_none=True)
        observer.step_ended()
        for number in range(micro_batches):
            observer.forward_begins()
            outputs = self.model(input_ids=batch, labels=batch, use_cache=False)
            observer.backward_begins()
            outputs.loss.backward()
            observer.backward_ended(steps_next=number == micro_batches - 1)
        observer.optimizer_begins(self.model)
        optimizer.step()
        observer.optimizer_ended(self.model, optimizer)

    def evaluate_one_batch(self) -> None:
        """The evaluation step."""
        self.model.eval()
        self.observer.evaluation_begins()
        batch = self._batch()
        with torch.no_grad():
            self.model(input_ids=batch, labels=batch, use_cache=False)

    def _batch(self) -> torch.Tensor:
        rows = self.arguments.per_device_train_batch_size
        length = len(self.rows[0]["input_ids"])
        return torch.ones((rows, length), dtype=torch.int64, device=self.arguments.device)


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
