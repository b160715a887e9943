"""How LoRA's relatives step: LoRA+ has two learning rates, LoRA-FA an AdamW of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from msgspec import structs

from ftplan.planner.optimizer_steps import (
    FLOAT32,
    Groups,
    Updated,
    decay_groups,
    hold,
    like_parameter,
)
from ftplan.planner.optimizers import Optimizer, resolve_optimizer
from ftplan.planner.tape import Tape, Tensor

# What LoRA-FA's optimizer stands in for: it is AdamW but for the gradients of B.
LORA_FA_OPTIMIZERS = ("adamw_torch_fused", "adamw_torch")

_BFLOAT16 = 2


@lru_cache(maxsize=256)
def optimizer_of(method: str, optim: str) -> Optimizer:
    """The optimizer as the method uses it. Raises UnknownNameError."""
    optimizer = resolve_optimizer(optim)
    if method == "lora-fa":
        return LORA_FA
    if method == "lora-plus" and not optimizer.needs_trainer:
        return structs.replace(optimizer, groups=lora_plus_groups)
    return optimizer


def lora_plus_groups(parameters: Sequence[Updated]) -> list[list[Updated]]:
    """All but the second matrices; these, at a higher rate; and vectors, at that rate too
    (peft/optimizers/loraplus.py `create_loraplus_optimizer`)."""
    matrices, vectors = decay_groups(parameters)
    second = [p for p in matrices if p.is_lora_b]
    return [[p for p in matrices if not p.is_lora_b], second, vectors]


def _lora_fa_step(tape: Tape, groups: Groups) -> None:
    """peft/optimizers/lorafa.py `LoraFAOptimizer.step`: for each module the gradient of B times the
    inverse of A A^T, in bf16 and then as wide as B; the roots of its squares. What a variable holds
    goes when it is set anew. What is no adapter is stepped without the products."""
    held: dict[str, Tensor] = {}
    for group in groups:
        for p in group:
            elements, width = p.of.num_elements, p.of.width
            if p.of.is_lora_b:
                _project(tape, p.of, held)
                held["denom_B"] = hold(tape, elements, width)
            else:
                held["denom"] = hold(tape, elements, width)


def _project(tape: Tape, of: Updated, held: dict[str, Tensor]) -> None:
    """The gradient of B with A's part taken out."""
    rank = of.shape[-1]
    held["AA_T"] = hold(tape, rank * rank, of.width)
    held["AA_T_inv"] = hold(tape, rank * rank, of.width)
    cast = [hold(tape, of.num_elements, _BFLOAT16)] if of.width == FLOAT32 else []
    product = hold(tape, of.num_elements, _BFLOAT16)
    cast.clear()
    held["grad_B"] = hold(tape, of.num_elements, _BFLOAT16)
    del product
    if of.width == FLOAT32:
        held["grad_B"] = hold(tape, of.num_elements, FLOAT32)


LORA_FA = Optimizer(
    name="lora-fa",
    states=like_parameter(2),
    step=_lora_fa_step,
    groups=lambda parameters: [list(parameters)],
    needs_whole_parameters=True,
    needs_model=True,
    source="peft 0.21, optimizers/lorafa.py: exp_avg_B, exp_avg_sq_B; arXiv 2308.03303",
)
