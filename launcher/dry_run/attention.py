"""What CUDA's attention kernels allocate and keep, on fake tensors.

Sources: flash_api.cpp of FlashAttention-2 and of ATen (native/transformers/cuda/flash_attn),
native/transformers/cuda/attention.cu and attention_backward.cu of ATen, and sdp_utils.cpp for the
choice between kernels.
"""

from __future__ import annotations

import math
from typing import Any

import torch

# FlashAttention's backward works on rows and head dimensions rounded up to these.
_FLASH_ROWS = 128
_FLASH_HEAD_DIM = 32
_FLASH_MAX_HEAD_DIM = 256
_FLASH_CAPABILITY = (8, 0)

# The memory-efficient kernel's log-sum-exp is stored in rows of a multiple of this.
_EFFICIENT_ROWS = 32
# Its attention bias is read in pieces of this many elements: shorter rows are copied, padded.
_BIAS_ALIGNMENT = 16


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def flash_forward(query: Any, key: Any, value: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention-2's result on (batch, length, heads, head_dim), and each row's log-sum-exp."""
    batch, length, heads, _ = query.shape
    result = query.new_empty((batch, length, heads, value.shape[-1]))
    return result, query.new_empty((batch, heads, length), dtype=torch.float32)


def flash_backward(gradient: Any, query: Any, key: Any, value: Any) -> tuple[torch.Tensor, ...]:
    """The gradients of query, key and value."""
    gradient = gradient.contiguous()
    batch, length, heads, head_dim = query.shape
    rows = _round_up(length, _FLASH_ROWS)
    grads = [
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)
    ]
    products = query.new_empty((batch, heads, rows), dtype=torch.float32)
    width = _round_up(head_dim, _FLASH_HEAD_DIM)
    accumulator = query.new_empty((batch, heads, rows, width), dtype=torch.float32)
    if key.shape[2] != heads:  # gradients of every query head, then summed by group
        shape = (batch, key.shape[1], heads, head_dim)
        expanded = [key.new_empty(shape), value.new_empty(shape)]
        del expanded
    del products, accumulator, gradient
    return tuple(grads)


class FlashAttention(torch.autograd.Function):
    """FlashAttention-2 on (batch, length, heads, head_dim): keeps q, k, v, its result and the
    log-sum-exp of each row."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
        result, sums = flash_forward(query, key, value)
        ctx.save_for_backward(query, key, value, result, sums)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return flash_backward(gradients[0], *ctx.saved_tensors[:3])


class EfficientAttention(torch.autograd.Function):
    """ATen's memory-efficient kernel on (batch, heads, length, head_dim), with or without bias."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, bias: Any) -> Any:
        batch, heads, length, _ = query.shape
        shape = (batch, length, heads, value.shape[-1])
        result = query.new_empty(shape).transpose(1, 2)
        sums = query.new_empty(
            (batch, heads, _round_up(length, _EFFICIENT_ROWS)), dtype=torch.float32
        )
        ctx.save_for_backward(query, key, value, bias, result, sums)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value, _, _, _ = ctx.saved_tensors
        batch, heads, length, head_dim = query.shape
        # The kernel's own order of dimensions is (batch, length, heads, head_dim).
        gradient = gradients[0].transpose(1, 2).contiguous()
        grads = [
            t.new_empty((batch, t.shape[2], t.shape[1], t.shape[3])).transpose(1, 2)
            for t in (query, key, value)
        ]
        if query.dtype is torch.float32:  # gradient times result, before it is summed up
            elementwise = torch.empty_like(gradient)
            del elementwise
        products = query.new_empty((batch, heads, length), dtype=torch.float32)
        if query.dtype is not torch.float32:  # the query's gradient is summed up in fp32
            workspace = query.new_empty((batch, heads, length, head_dim), dtype=torch.float32)
            del workspace
        if key.shape[1] != heads:  # of every query head, then summed by group
            expanded = [t.new_empty((batch, heads, *t.shape[2:])) for t in (key, value)]
            del expanded
        del products, gradient
        return (*grads, None)


def _repeated(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A key and a value head for each query head, where several shared one."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def scaled_dot_product_attention(
    capability: tuple[int, int], repeats_key_value: bool, efficient_takes_groups: bool = False
) -> Any:
    """A stand-in for torch's function of that name, as a card of that capability carries it out.

    `repeats_key_value`: key and value heads are repeated first. `efficient_takes_groups`: not only
    FlashAttention takes grouped heads.
    """

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        dtype = _autocast_dtype(query)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if attn_mask is not None:
            attn_mask = attn_mask.to(_autocast_dtype(attn_mask))
        if repeats_key_value:
            key, value = _repeated(query, key, value)
        # Unequal numbers of heads no kernel takes unless told that they are groups (ATen's
        # sdp_utils_cpp.h, `check_batch_size_and_num_heads_dense`), and the efficient one before
        # 2.14 never.
        grouped = key.shape[1] != query.shape[1]
        head_dims = {query.shape[-1], value.shape[-1]}
        if (
            attn_mask is None
            and dtype in (torch.float16, torch.bfloat16)
            and capability >= _FLASH_CAPABILITY
            and len(head_dims) == 1
            and query.shape[-1] <= _FLASH_MAX_HEAD_DIM
            and (enable_gqa or not grouped)
        ):
            turned = [t.transpose(1, 2) for t in (query, key, value)]
            return FlashAttention.apply(*turned).transpose(1, 2)
        one_by_one = grouped and not (efficient_takes_groups and enable_gqa)
        if not one_by_one and not (dtype is torch.bfloat16 and capability < _FLASH_CAPABILITY):
            return EfficientAttention.apply(query, key, value, _bias(query, key, attn_mask))
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        with _without_autocast():
            if dropout_p:
                return _math_with_dropout(query, key, value, attn_mask, dropout_p, is_causal, scale)
            return torch.ops.aten._scaled_dot_product_attention_math(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )[0]

    return attend


def _math_with_dropout(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """ATen's plain attention (`_scaled_dot_product_attention_math`), which on CUDA drops weights in
    one operation with a mask of bytes."""
    dtype, heads = query.dtype, query.shape[1]
    query, key, value = (
        x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in (query, key, value)
    )
    root = math.sqrt(scale if scale is not None else query.shape[-1] ** -0.5)
    if is_causal:
        attn_mask = query.new_zeros(query.shape[-2], key.shape[-2])
    query = query * root
    if key.shape[1] != heads:
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    weights = query @ (key.transpose(-2, -1) * root)
    if attn_mask is not None:
        weights.add_(attn_mask)
    weights = torch.ops.aten._safe_softmax(weights, -1)
    weights = torch.native_dropout(weights, dropout_p, True)[0]
    return (weights @ value).to(dtype)


def _autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    if torch.is_autocast_enabled("cpu") and tensor.dtype.is_floating_point:
        return torch.get_autocast_dtype("cpu")
    return tensor.dtype


def _without_autocast() -> Any:
    """Autocast casts what the function is given, and nothing within it."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    return torch._C._ExcludeDispatchKeyGuard(key)


def _bias(query: Any, key: Any, mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask as the kernel reads it: of the query's dtype, its rows padded."""
    if mask is None:
        return None
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype)
    if mask.shape[-1] % _BIAS_ALIGNMENT:
        mask = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % _BIAS_ALIGNMENT))
    return mask


def flash_attention_2(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    repeats_key_value: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """A stand-in for transformers' `flash_attention_forward`; flash-attn need not be there."""
    if repeats_key_value:
        key, value = _repeated(query, key, value)
    turned = [t.transpose(1, 2) for t in (query, key, value)]
    if query.dtype is torch.float32:
        dtype = _autocast_dtype(query)
        if dtype is torch.float32:
            dtype = next(p for p in module.parameters() if p.dtype.is_floating_point).dtype
        turned = [t.to(dtype) for t in turned]
    return FlashAttention.apply(*turned), None
