"""Steps that went wrong: which are skipped, which are only told, and when a run ends for it.

The numbers are choices, not measurements. Spikes of the loss are common in long runs and mostly
recover by themselves, and what follows a spike is a matter of the weights and the batch together
(Chowdhery et al. 2022, PaLM, section 5.1): one is told, and nothing else is done. A step whose loss
or gradient is not a finite number would spoil every weight it touches: it is skipped.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import Literal

from msgspec import Struct

SKIPPED_IN_A_ROW = 3
"""Rows come in random order: one bad row among many does not spoil three steps in a row. What does
lies in the weights or the settings, and more steps do not mend it."""

SKIPPED_OF_LAST = (10, 100)
"""So many of so many: a tenth of the data cannot be learned from, which nobody wants to find out
at the end."""

LOWEST_LOSS_SCALE = 1.0
"""Of fp16: losses are multiplied by a scale that is halved whenever a gradient overflows, from
65536 on (torch.amp.GradScaler). Below 1 it makes gradients smaller than they are: no scale fits."""

LEVEL_STEPS = 50
"""The running level of the loss is the median of so many steps, which a few spikes do not move."""

FEWEST_STEPS = 8
"""Before so many steps there is no level."""

SPREADS_ABOVE, TIMES_ABOVE, NATS_ABOVE = 10.0, 3.0, 0.5
"""A spike is above the level by ten of its spreads, and three times the level, and half a nat: a
steady loss near 0 has small spreads, a noisy one is not three times its level."""

EXPLODED_STEPS = 20
"""So many spikes without a step between that is not one, all above the loss that training began
with: the model is worse than it was, and does not come back."""

DEAD_STEPS, DEAD_LOSS = 20, 0.01
"""A gradient of exactly 0 in so many steps in a row, while there is a loss of more nats: weights
have grown until activations overflow, norms turn those into zeros, and nothing is learned any more.
What has been learned to the last digit has such gradients, too, and hardly a loss."""

Trouble = Literal["loss", "gradient", "overflow", "sampling"]

SAID: dict[Trouble, str] = {
    "loss": "the loss was not a finite number",
    "gradient": "the gradient was not finite",
    "sampling": "no completion can be made: the model's probabilities are not finite numbers",
    "overflow": f"gradients overflowed fp16 at every loss scale down to {LOWEST_LOSS_SCALE:g}",
}

SKIPPED, SPIKE = "skipped step", "loss spike"
"""Events of metrics.jsonl."""

# The spread of a normal distribution is 1.4826 of its median absolute deviation.
_SPREAD_OF_DEVIATION = 1.4826


class SkipCount:
    """Counts skipped steps, and says when there are too many."""

    def __init__(self) -> None:
        self.in_a_row = 0
        self._recent: deque[bool] = deque(maxlen=SKIPPED_OF_LAST[1])

    def add(self, *, skipped: bool) -> None:
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self._recent.append(skipped)

    def verdict(self) -> str:
        """Why the run ends: `in 3 steps in a row`; empty while it goes on."""
        if self.in_a_row >= SKIPPED_IN_A_ROW:
            return f"in {self.in_a_row} steps in a row"
        if sum(self._recent) >= SKIPPED_OF_LAST[0]:
            return f"in {sum(self._recent)} of the last {len(self._recent)} steps"
        return ""


class LossLevel:
    """Follows the loss of each step. `level`: nats of the running level, None before there is one.
    `began_at`: the first one."""

    def __init__(self) -> None:
        self.began_at: float | None = None
        self.spikes = 0  # without a step between that is none
        self.dead_steps = 0  # in a row
        self._recent: deque[float] = deque(maxlen=LEVEL_STEPS)

    @property
    def level(self) -> float | None:
        return statistics.median(self._recent) if len(self._recent) >= FEWEST_STEPS else None

    def add(self, loss: float, grad_norm: float = 1.0) -> bool:
        """Whether this step is a spike. Spikes do not count for the level."""
        is_dead = grad_norm == 0 and loss > DEAD_LOSS
        self.dead_steps = self.dead_steps + 1 if is_dead else 0
        if self._is_spike(loss):
            self.spikes += 1
            return True
        self.spikes = 0
        self._recent.append(loss)
        if self.began_at is None:
            self.began_at = self.level
        return False

    def is_dead(self) -> bool:
        return self.dead_steps >= DEAD_STEPS

    def has_exploded(self) -> bool:
        return self.spikes >= EXPLODED_STEPS

    def _is_spike(self, loss: float) -> bool:
        level = self.level
        if level is None or self.began_at is None:
            return False
        deviation = statistics.median(abs(one - level) for one in self._recent)
        spread = SPREADS_ABOVE * _SPREAD_OF_DEVIATION * deviation
        above = level + max(spread, (TIMES_ABOVE - 1) * level, NATS_ABOVE)
        return loss > above and (self.spikes == 0 or loss > self.began_at)


class Circumstances(Struct, frozen=True, kw_only=True):
    """What is known where a run ends for bad numbers."""

    mixed_precision: str
    dtype: str
    """Of the weights as the model's makers publish them; empty where config.json does not say."""
    learning_rate: float
    max_grad_norm: float
    """0 where gradients are not clipped."""
    bad_weights: str = ""
    """The first weight that holds a number that is not finite."""
    rows_without_loss: int = 0
    """Of the rows in skipped steps: those without a token that carries loss."""
    one_row: str = ""
    """The row that all skipped steps have in common, if there is one: `row 7 of rows.jsonl`."""


def remedies(trouble: Trouble | Literal["explosion", "dead"], found: Circumstances) -> list[str]:
    """What may be the cause and what to do about it, the likeliest first."""
    if found.bad_weights:
        return [
            f"the model's own weights are at fault: `{found.bad_weights}` holds numbers that are "
            "not finite; get the model anew, or choose another with `--model`"
        ]
    advice = []
    if trouble not in ("explosion", "dead"):
        advice += _of_rows(found)
    if found.mixed_precision == "fp16" or found.dtype == "float16":
        native = " as the model was made in it" if found.dtype == "bfloat16" else ""
        advice.append(
            f"fp16 ends at 65504: compute in bf16 (`--mixed-precision bf16`){native}, "
            "or in float32 (`--mixed-precision no --dtype float32`)"
        )
    lower = f"{found.learning_rate / 10:.2g}"
    advice.append(
        f"lower the learning rate (`--learning-rate {lower}`, it is {found.learning_rate:g}) or "
        "warm up for longer (`--warmup-ratio 0.1`)"
    )
    if not found.max_grad_norm:
        advice.append("clip gradients (`--max-grad-norm 1`)")
    elif found.max_grad_norm > 1:
        advice.append(f"clip harder (`--max-grad-norm 1`, it is {found.max_grad_norm:g})")
    return advice


def _of_rows(found: Circumstances) -> list[str]:
    if found.rows_without_loss:
        return [
            f"{found.rows_without_loss} rows of these steps have no token that carries loss: "
            "look at them with `ftplan data`"
        ]
    if found.one_row:
        return [f"look at {found.one_row}, which all of these steps have in common"]
    return []
