"""The training process, whose rank 1 runs out of memory once: `-m tests.broken_rank MARK RUN ...`.

`MARK`: a file that is made when it has.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from ftplan.launcher import train
from ftplan.launcher.training.trainer import PlannedTrainer


def main(mark: Path, arguments: list[str]) -> int:
    real = PlannedTrainer.compute_loss

    def compute_loss(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        late = trainer.state.global_step == 2 and trainer.model.training
        if os.environ["RANK"] == "1" and late and not mark.exists():
            mark.touch()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(trainer, *args, **kwargs)

    PlannedTrainer.compute_loss = compute_loss  # type: ignore[method-assign]
    return train.main(arguments)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
