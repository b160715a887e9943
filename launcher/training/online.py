"""TRL's trainers on completions that the model makes itself, of prompts that come in tokens."""

from __future__ import annotations

from typing import Any

from trl import GRPOTrainer, RLOOTrainer

from ftplan.launcher.training.checkpoints import DurableCheckpoints


class TokenizedPrompts(DurableCheckpoints):
    """Rows have `prompt`, its tokens, and what reward functions ask for: `conversation`, the
    messages before the completion as JSON, and `answer`. The trainer takes `reward_funcs` besides.

    Held-out prompts are completed once each. `step_tokens`: of the rows trained on, padding
    included, since it was last set to 0.
    """

    def __init__(
        self, *args: Any, row_lengths: Any = None, micro_batches: Any = None, **kwargs: Any
    ) -> None:
        # Rows are taken in the trainer's own order, in groups of one prompt.
        self.step_tokens = 0
        self.step_longest = [0, 0]  # rows are completed to any length: nothing is said of them
        super().__init__(*args, **kwargs)

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[Any, ...]:
        return prompts, None, {}

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        self.step_tokens += inputs["prompt_ids"].numel() + inputs["completion_ids"].numel()
        return super()._compute_loss(model, inputs)  # type: ignore[misc]


class PlannedGRPOTrainer(TokenizedPrompts, GRPOTrainer):
    """Group relative policy optimization."""


class PlannedRLOOTrainer(TokenizedPrompts, RLOOTrainer):
    """REINFORCE leave-one-out."""
