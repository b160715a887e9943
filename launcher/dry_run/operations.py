"""Operations that fake tensors cannot run as they are.

Where the size of a result depends on data it is taken at its largest: everything is selected.
Distinct values alone are taken as one: what follows is done for each, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_aten = torch.ops.aten


def selections(count: Callable[[torch.Tensor], int]) -> dict[Any, Callable[..., Any]]:
    """What a mask selects by: as if `count` of its elements were true."""

    def nonzero(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_empty((count(tensor), tensor.dim()), dtype=torch.int64)

    def whole(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Masks as the positions that they would give."""
        positions: list[torch.Tensor | None] = []
        for index in indices:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                positions += nonzero(index).unbind(1)
            else:
                positions.append(index)
        return positions

    def selecting(operation: Any) -> Callable[..., Any]:
        def select(tensor: torch.Tensor, indices: Any, *args: Any, **kwargs: Any) -> Any:
            return operation(tensor, whole(indices), *args, **kwargs)

        return select

    return {
        _aten.nonzero.default: nonzero,
        **{
            operation: selecting(operation)
            for operation in (
                _aten.index.Tensor,
                _aten.index_put.default,
                _aten.index_put_.default,
                _aten._index_put_impl_.default,
            )
        },
    }


def _grouped_mm(
    left: torch.Tensor,
    right: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A grouped product in any dtype; torch's own shape function takes bf16 only."""
    dtype = out_dtype or left.dtype
    if left.dim() == right.dim() == 2:
        assert offs is not None
        return left.new_empty((offs.shape[0], left.shape[0], right.shape[1]), dtype=dtype)
    if left.dim() == right.dim():
        return left.new_empty((*left.shape[:2], right.shape[-1]), dtype=dtype)
    return left.new_empty((left.shape[-2], right.shape[-1]), dtype=dtype)


def _sparse_mask(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The values at the places of `mask`; torch's own shape function forgets how many they are."""
    chosen = values.new_empty(mask._indices().shape[1])
    return torch.sparse_coo_tensor(mask._indices(), chosen, mask.shape, check_invariants=False)


def _unique(
    tensor: torch.Tensor,
    sorted: bool = True,
    return_inverse: bool = False,
    return_counts: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As if all elements were equal."""
    whole = tensor.shape if return_inverse or return_counts else (0,)
    return (
        tensor.new_empty(1),
        tensor.new_empty(whole, dtype=torch.int64),
        tensor.new_empty(int(return_counts), dtype=torch.int64),
    )


def _multinomial(
    probabilities: torch.Tensor, num_samples: int, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """One sample is where a random number is largest beside its probability
    (ATen/native/Distributions.cpp)."""
    drawn = torch.empty_like(probabilities)
    result = drawn.new_empty((*drawn.shape[:-1], num_samples), dtype=torch.int64)
    del drawn
    return result


def _safe_softmax(scores: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """With what the operation makes on the way (ATen/native/transformers/attention.cpp)."""
    usual = torch.softmax(scores, dim, dtype)
    masked = scores.eq(float("-inf"))
    masked_rows = masked.all(dim, keepdim=True)
    return torch.where(masked_rows, torch.scalar_tensor(0.0, dtype=usual.dtype), usual)


REPLACED: dict[Any, Callable[..., Any]] = {
    _aten._grouped_mm.default: _grouped_mm,
    _aten._unique2.default: _unique,
    _aten.sparse_mask.default: _sparse_mask,
    _aten._safe_softmax.default: _safe_softmax,
    _aten.multinomial.default: _multinomial,
    **selections(torch.Tensor.numel),
}
