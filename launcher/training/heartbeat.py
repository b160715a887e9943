"""Signs of life between the rows of metrics.jsonl."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftplan.launcher.run_dir import RunDir


class Heartbeat(TrainerCallback):
    """Renews the time of status.json with every micro-batch that is trained or evaluated on, once a
    second at most; `launcher.hangs` looks at it."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self._last = 0.0

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        self._beat(state)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        self._beat(state)

    def _beat(self, state: TrainerState) -> None:
        now = time.monotonic()
        if state.is_world_process_zero and now - self._last > 1:
            self._last = now
            with contextlib.suppress(OSError):
                os.utime(self.run.status)
