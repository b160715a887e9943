"""What an optimizer holds for each trained parameter, and what its step needs besides.

Names are `TrainingArguments.optim`'s. States take the parameter's dtype (torch's optimizers
use `zeros_like`) unless `state_bytes_per_parameter` says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

from ftplan.planner.errors import UnknownNameError


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer:
    """Memory of an optimizer.

    `num_states`: states a parameter, each of the parameter's dtype.
    `state_bytes_per_parameter`: instead, for states of a fixed width.
    `step_copies`: tensors of the parameters' size and dtype that the step holds at once
    (the foreach implementations work on all parameters together).
    `paged`: states live in managed memory that can be moved to the host.
    """

    name: str
    num_states: int = 0
    state_bytes_per_parameter: float | None = None
    step_copies: int = 0
    paged: bool = False
    needs_bitsandbytes: bool = False
    source: str

    def state_bytes(self, num_parameters: int, bytes_per_parameter: int) -> int:
        """Bytes of all states for `num_parameters` of `bytes_per_parameter` each."""
        if self.state_bytes_per_parameter is not None:
            return round(num_parameters * self.state_bytes_per_parameter)
        return num_parameters * self.num_states * bytes_per_parameter

    def step_temporary_bytes(self, num_parameters: int, bytes_per_parameter: int) -> int:
        """Bytes that exist only while the step runs."""
        return num_parameters * self.step_copies * bytes_per_parameter


# Blockwise 8-bit states: one byte each and an fp32 scale for every block of 256 values
# (bitsandbytes.optim, `blocksize=256`); tensors under 4096 elements keep fp32 states.
_EIGHT_BIT_STATE_BYTES = 1 + 4 / 256

OPTIMIZERS: dict[str, Optimizer] = {
    optimizer.name: optimizer
    for optimizer in (
        Optimizer(
            name="adamw_torch_fused",
            num_states=2,
            source="torch.optim.AdamW(fused=True): exp_avg, exp_avg_sq, updated in place",
        ),
        Optimizer(
            name="adamw_torch",
            num_states=2,
            step_copies=1,
            source="torch.optim.AdamW(foreach): one list of square roots beside the states; "
            "10.0 bytes a bf16 parameter at the step on A100 (fms-acceleration)",
        ),
        Optimizer(
            name="adamw_8bit",
            state_bytes_per_parameter=2 * _EIGHT_BIT_STATE_BYTES,
            needs_bitsandbytes=True,
            source="bitsandbytes AdamW8bit, arXiv 2110.02861",
        ),
        Optimizer(
            name="paged_adamw_8bit",
            state_bytes_per_parameter=2 * _EIGHT_BIT_STATE_BYTES,
            paged=True,
            needs_bitsandbytes=True,
            source="bitsandbytes PagedAdamW8bit, arXiv 2305.14314",
        ),
        Optimizer(
            name="sgd",
            step_copies=0,
            source="torch.optim.SGD without momentum, as TrainingArguments makes it",
        ),
    )
}


def resolve_optimizer(name: str) -> Optimizer:
    """The optimizer of that name; raises UnknownNameError with the nearest ones."""
    optimizer = OPTIMIZERS.get(name)
    if optimizer is None:
        raise UnknownNameError("optimizer", name, OPTIMIZERS)
    return optimizer
