"""Learning rates that begin anew with the adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Curve = Callable[[float], float]


class JaggedRate:
    """ReLoRA's: the run's own curve, up to which the rate warms up after each restart.

    Steps are the schedule's, which does not count those that fp16's scaler skipped.
    """

    def __init__(self, warmup_steps: int) -> None:
        self.warmup_steps = warmup_steps
        self.restarted_at: int | None = None

    def on(self, curve: Curve, step: int) -> float:
        """The factor of the rate at `step`, with the run's own `curve`."""
        if self.restarted_at is None:
            return curve(step)
        since = step - self.restarted_at + 1
        return curve(step) * min(1.0, since / (self.warmup_steps + 1))


class StagedRate:
    """PLoRA's: the run's whole curve, warm-up included, in each stage."""

    def __init__(self, total_steps: int, stage_steps: int) -> None:
        self.total_steps, self.stage_steps = total_steps, stage_steps
        self.restarted_at = 0

    def on(self, curve: Curve, step: int) -> float:
        """The factor of the rate at `step`: of the middle of a step, as its ends may be 0."""
        since = min(step - self.restarted_at, self.stage_steps - 1)
        return curve(self.total_steps * (since + 0.5) / self.stage_steps)


def follow(scheduler: Any, rate: JaggedRate | StagedRate) -> None:
    """Let torch's LambdaLR follow `rate` on its own curves."""

    def following(curve: Curve) -> Curve:
        return lambda step: rate.on(curve, int(step))

    scheduler.lr_lambdas = [following(curve) for curve in scheduler.lr_lambdas]


def renew(scheduler: Any) -> None:
    """The rate of the next step, after what it follows has changed."""
    step = scheduler.last_epoch
    rates = [
        base * curve(step)
        for base, curve in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
