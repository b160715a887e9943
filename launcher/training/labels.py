"""Labels of tokens: (rows, length), the token that is to be predicted, or none."""

from __future__ import annotations

import torch

NO_LOSS = -100  # torch's `ignore_index`


def predicted(labels: torch.Tensor) -> torch.Tensor:
    """Where something is predicted, (rows, length - 1): nothing stands before a first token."""
    return labels[:, 1:] != NO_LOSS
