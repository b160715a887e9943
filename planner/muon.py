"""Muon as torch steps it (torch 2.13, optim/_muon.py), beside AdamW for what is no hidden matrix.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the learning rate as in Liu et al. 2025
(arXiv 2502.16982, section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence

from ftplan.planner.optimizer_steps import (
    FLOAT32,
    Groups,
    Updated,
    decay_groups,
    hold,
    like_parameter,
    of_each,
    of_lists,
)
from ftplan.planner.tape import Tape, Tensor

# Iterations of Newton and Schulz, in bf16.
NEWTON_SCHULZ_STEPS = 5
_BFLOAT16 = 2

# Operations on one matrix: two averages, a cast, a norm, a division, three products an iteration,
# decay and update.
_KERNELS_OF_A_MATRIX = 8 + 3 * NEWTON_SCHULZ_STEPS

# Parts of a parameter's name that stand for rows looked up by number, or for an output projection:
# these are AdamW's, as Muon's authors advise.
_NO_HIDDEN_MATRIX = ("embed", "wte", "wpe", "trainable_tokens", "lm_head", "score")

_adamw_states = like_parameter(2, counts_steps=True)


def is_hidden_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether Muon updates the parameter: a matrix, no embeddings and no output projection. Stacks
    of experts have three sides, and torch's Muon takes two."""
    named = any(part in name for part in _NO_HIDDEN_MATRIX)
    return len(shape) == 2 and min(shape) > 1 and not named


def muon_states(parameter: Updated) -> list[int]:
    """A momentum; of all others what AdamW keeps."""
    return [parameter.num_bytes] if parameter.is_hidden_matrix else list(_adamw_states(parameter))


def muon_groups(parameters: Sequence[Updated]) -> list[list[Updated]]:
    """Hidden matrices first, then the others as AdamW has them."""
    groups = decay_groups(parameters)
    hidden = [p for group in groups for p in group if p.is_hidden_matrix]
    return [hidden, *([p for p in group if not p.is_hidden_matrix] for group in groups)]


def muon_step(tape: Tape, groups: Groups) -> None:
    """One matrix after the other (`_single_tensor_muon`); the fused AdamW writes in place."""
    held: dict[str, Tensor] = {}
    for p in groups[0]:
        held["update"] = hold(tape, p.of.num_elements, p.of.width)
        held["update"] = _orthogonal(tape, p.of, held["update"])


def _orthogonal(tape: Tape, parameter: Updated, update: Tensor) -> Tensor:
    """`_zeropower_via_newtonschulz`: in bf16, on matrices no higher than wide."""
    elements, least = parameter.num_elements, min(parameter.shape)
    held = {"ortho_grad": update}
    if parameter.width == FLOAT32:
        held["ortho_grad"] = hold(tape, elements, _BFLOAT16)
    for _ in range(NEWTON_SCHULZ_STEPS):
        for name in ("gram_matrix", "gram_update"):
            held[name] = hold(tape, least * least, _BFLOAT16)
        held["ortho_grad"] = hold(tape, elements, _BFLOAT16)
    return held["ortho_grad"]


def muon_flops(parameters: Sequence[Updated]) -> int:
    """Of the products. An n x m matrix, n <= m: two of 2 n n m and one of 2 n n n an iteration."""
    total = 0
    for p in parameters:
        if p.is_hidden_matrix:
            least, most = min(p.shape), max(p.shape)
            total += p.count * NEWTON_SCHULZ_STEPS * 2 * least * least * (2 * most + least)
    return total


def muon_kernels(parameters: Sequence[Updated]) -> int:
    """Operations of a step."""
    hidden = [p for p in parameters if p.is_hidden_matrix]
    others = [p for p in parameters if not p.is_hidden_matrix]
    return of_each(_KERNELS_OF_A_MATRIX)(hidden) + (of_lists(1)(others) if others else 0)
