"""The held-out loss as a mean over tokens."""

from __future__ import annotations

from typing import Any

import torch

from ftplan.launcher.training.labels import NO_LOSS, predicted


class TokenMeanEvaluation:
    """For trainers of transformers whose loss is a mean over a batch's tokens.

    transformers reports the mean of the batches' means, in which a token of a short row weighs more
    than one of a long row, and which differs with the batch size. Here each token weighs the same,
    and rows that several processes take again to have equal batches do not count.
    """

    _nats: float | torch.Tensor = 0.0
    _tokens: float | torch.Tensor = 0.0

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        labels: torch.Tensor | None = inputs.get("labels")
        num_tokens: torch.Tensor | int = 0
        if labels is not None and (own := _own_rows(self, len(labels))):
            # A batch of nothing but others' rows has no mean without them.
            inputs = {**inputs, "labels": labels.clone()}
            inputs["labels"][own:] = NO_LOSS
            num_tokens = predicted(inputs["labels"]).sum()
        found: Any = super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if found[0] is not None:
            self._nats = self._nats + found[0].float() * num_tokens
            self._tokens = self._tokens + num_tokens
        return found

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._nats = self._tokens = 0.0
        output: Any = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        trainer: Any = self
        sums = torch.tensor([self._nats, self._tokens], device=trainer.args.device)
        nats, num_tokens = trainer.accelerator.reduce(sums, reduction="sum").tolist()
        name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if num_tokens and name in output.metrics:
            output.metrics[name] = nats / num_tokens
        return output


def _own_rows(trainer: Any, num_rows: int) -> int:
    """Of this process's batch, the rows before those that fill up the last batches of all processes
    with the first rows of the data (accelerate, `BatchSamplerShard`)."""
    state = trainer.accelerator.gradient_state
    if trainer.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return num_rows
    left = state.remainder - trainer.args.process_index // trainer.get_tp_size() * num_rows
    return int(min(max(left, 0), num_rows))
