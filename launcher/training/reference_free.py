"""Preferences without a reference model: ORPO and SimPO on log-probabilities in tiles.

TRL 1.16 has both as experiments, on whole logits of rows that it puts into tokens itself. Here they
are losses of the average log-probability of an answer's tokens, which TRL's fused output projection
gives. A row's loss depends on nothing but the row, so micro-batches may be of any size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from trl import SFTConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import disable_dropout_in_model

from ftplan.launcher.training.labels import NO_LOSS
from ftplan.launcher.training.trainer import PlannedTrainer
from ftplan.planner.objectives import OBJECTIVES


@dataclass
class ORPOConfig(SFTConfig):
    """`beta`: the weight of the odds ratio, the paper's lambda."""

    beta: float = OBJECTIVES["orpo"].beta or 0.0
    dataset_kwargs: dict[str, Any] | None = field(
        default_factory=lambda: {"skip_prepare_dataset": True}
    )


@dataclass
class SimPOConfig(ORPOConfig):
    """`beta`: the scale of the rewards. `gamma_beta_ratio`: the margin, as a share of it."""

    beta: float = OBJECTIVES["simpo"].beta or 0.0
    gamma_beta_ratio: float = OBJECTIVES["simpo"].gamma_beta_ratio or 0.0


def orpo_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """Of each row: the negative log-likelihood of the chosen answer, and `beta` times that of its
    odds being higher (arXiv 2403.07691, equations 3 to 7).

    `chosen`, `rejected`: average log-probabilities of the answers' tokens, (rows,), below 0.
    """
    log_odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    return -chosen - beta * functional.logsigmoid(log_odds)


def simpo_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, beta: float, gamma_beta_ratio: float
) -> torch.Tensor:
    """Of each row (arXiv 2405.14734, equation 6, where gamma is `beta` times the ratio).

    `chosen`, `rejected`: as of `orpo_loss`.
    """
    return -functional.logsigmoid(beta * (chosen - rejected - gamma_beta_ratio))


def _log1mexp(value: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(value)) of values below 0, precise at both ends; a certain answer, of
    log-probability 0, is taken for one just below."""
    below = value.clamp(max=-torch.finfo(value.dtype).eps)
    return torch.log(-torch.expm1(below))


class ReferenceFreeTrainer(PlannedTrainer):
    """Rows have `prompt_ids`, `chosen_ids` and `rejected_ids`."""

    loss_is_scaled_for_ga = False
    has_pairs = True

    def __init__(self, *, args: Any, processing_class: Any, **kwargs: Any) -> None:
        pad_token_id = processing_class.pad_token_id
        if pad_token_id is None:
            pad_token_id = processing_class.eos_token_id
        super().__init__(
            args=args,
            processing_class=processing_class,
            data_collator=DataCollatorForPreference(pad_token_id, max_length=args.max_length),
            **kwargs,
        )
        disable_dropout_in_model(self.model)

    def preference_loss(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        """Of each row; takes average log-probabilities."""
        raise NotImplementedError

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "chosen_ids", "rejected_ids"]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        assert not return_outputs, "evaluation takes the loss alone"
        given = {name: value for name, value in inputs.items() if name != "completion_mask"}
        if self.aux_loss_enabled:
            given["output_router_logits"] = True
        answers = inputs["completion_mask"]
        labels = inputs["input_ids"].masked_fill(answers == 0, NO_LOSS)
        outputs = model(**given, use_cache=False, labels=labels, fused_lm_head=True)
        counts = answers[:, 1:].sum(dim=1).clamp(min=1)
        # What a method puts in front of the rows has no label, and so no log-probability.
        averages = (outputs.log_probs.sum(dim=1) / counts).float()
        chosen, rejected = averages.chunk(2, dim=0)
        loss = self.preference_loss(chosen, rejected).mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        self._note(chosen.detach(), rejected.detach())
        return loss

    def _note(self, chosen: torch.Tensor, rejected: torch.Tensor) -> None:
        """Figures of a micro-batch, under TRL's names."""
        noted = self._metrics["train" if self.model.training else "eval"]
        gathered = self.accelerator.gather_for_metrics(self.args.beta * (chosen - rejected))
        noted["rewards/margins"].append(gathered.mean().item())
        noted["rewards/accuracies"].append((gathered > 0).float().mean().item())


class PlannedORPOTrainer(ReferenceFreeTrainer):
    """Odds ratio preference optimization."""

    def preference_loss(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return orpo_loss(chosen, rejected, self.args.beta)


class PlannedSimPOTrainer(ReferenceFreeTrainer):
    """Simple preference optimization."""

    def preference_loss(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return simpo_loss(chosen, rejected, self.args.beta, self.args.gamma_beta_ratio)
