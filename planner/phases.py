"""The phases of a run, and the components that memory is told by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

COMPONENTS: dict[str, str] = {
    "weights": "model weights",
    "reference_model": "reference model",
    "reward_model": "reward model",
    "adapters": "adapter weights",
    "gradients": "gradients",
    "optimizer_states": "optimizer states",
    "autocast_copies": "16-bit copies by autocast",
    "activations": "activations kept for backward",
    "logits_and_loss": "logits and loss",
    "communication": "buffers between GPUs",
    "temporaries": "temporaries",
}

# Phases of a micro-batch, in order.
STEP_PHASES = ("forward", "loss", "backward")


class Phase(Struct, frozen=True, kw_only=True):
    """One phase of a run and what is allocated at its highest point."""

    name: str
    components: Mapping[str, int]

    @property
    def allocated_peak_bytes(self) -> int:
        return sum(self.components.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "allocated_peak_bytes": self.allocated_peak_bytes,
            "components": dict(self.components),
        }
