"""How much of what a model knew tuning may take before a person should hear of it.

Measured as the perplexity of general text. A rise by 10 % is 0.095 nats a token. By the scaling law
of Hoffmann et al. 2022 (arXiv 2203.15556, approach 3: loss = 1.69 + 406.4 / N^0.34 + 410.7 / D^0.28
for N parameters and D tokens) that is what a model of a billion parameters loses with half of
them: 406.4 / 1e9^0.34 * (2^0.34 - 1) = 0.094 nats. The law is of pretraining losses, not of
forgetting: it says how large a change is, not where it comes from.
"""

from __future__ import annotations

import math

PERPLEXITY_RISE = 0.10
# The same of a loss in nats a token.
RISE_NATS = math.log(1 + PERPLEXITY_RISE)

# Rates and ranks below which lowering them is not the first advice.
_LOW_RANK = 8
_LOW_RATE = 2e-5


def has_forgotten(before: float, after: float) -> bool:
    """Whether the perplexity of general text rose past the threshold."""
    return after > before * (1 + PERPLEXITY_RISE)


def what_helps(
    *,
    adapter: bool,
    lora_rank: int | None,
    learning_rate: float,
    num_train_epochs: float,
    max_steps: int | None,
) -> list[str]:
    """What keeps more of the model, the strongest first; in words, with the flags that do it.

    Adapters, and low ranks of them, forget less than full tuning (Biderman et al. 2024, arXiv
    2405.09673); forgetting grows with trained parameters and steps (Kalajdzievski 2024, arXiv
    2401.05605); general rows among the data keep what they are about (Luo et al. 2023, arXiv
    2308.08747).
    """
    helps = []
    if not adapter:
        helps.append("adapters: `--method lora`")
    if learning_rate > _LOW_RATE:
        helps.append(f"a lower rate: `--learning-rate {learning_rate / 2:.2g}`")
    if max_steps is None and num_train_epochs > 1:
        helps.append(f"fewer passes: `--num-train-epochs {max(1.0, num_train_epochs / 2):g}`")
    if max_steps is not None and max_steps > 1:
        helps.append(f"fewer steps: `--max-steps {max_steps // 2}`")
    if adapter and lora_rank and lora_rank > _LOW_RANK:
        helps.append(f"a lower rank: `--lora-rank {lora_rank // 2}`")
    helps.append("general rows mixed into the data")
    return helps
