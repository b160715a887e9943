"""The rule people quote for full fine-tuning: 17.5 bytes a parameter, in five parts.

Mixed-precision training with Adam: 16-bit parameters, fp32 gradients, two fp32 states, and
shares for activations and the framework; 16 to 20 bytes in practice (the tutorial this project
starts from; 16 bytes for model states alone in Rajbhandari et al. 2019, arXiv 1910.02054).
"""

from __future__ import annotations

from typing import Any

PARTS_BYTES_PER_PARAMETER: dict[str, float] = {
    "parameters": 2.0,
    "gradients": 4.0,
    "optimizer_states": 8.0,
    "activations": 2.0,
    "framework": 1.5,
}
BYTES_PER_PARAMETER = sum(PARTS_BYTES_PER_PARAMETER.values())

# What the detailed model computes for each part of the rule.
COMPONENTS_OF_PART: dict[str, tuple[str, ...]] = {
    "parameters": ("weights", "reference_model", "adapters", "autocast_copies"),
    "gradients": ("gradients",),
    "optimizer_states": ("optimizer_states",),
    "activations": ("activations", "logits_and_loss"),
    "framework": ("temporaries", "communication"),
}


def rule_bytes(num_parameters: int) -> int:
    """Bytes of full fine-tuning by the rule."""
    return round(num_parameters * BYTES_PER_PARAMETER)


def rule_to_dict(num_parameters: int) -> dict[str, Any]:
    return {
        "bytes_per_parameter": BYTES_PER_PARAMETER,
        "bytes": rule_bytes(num_parameters),
        "parts": dict(PARTS_BYTES_PER_PARAMETER),
    }
