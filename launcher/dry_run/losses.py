"""Losses of training stacks other than the installed one, as far as they allocate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast


class LigerLoss(torch.autograd.Function):
    """Liger's fused linear cross-entropy (liger_kernel.ops.fused_linear_cross_entropy).

    The projection and its gradients are computed in forward, a chunk of tokens at a time; what is
    kept is the gradient of the hidden states, and of the projection where it is trained.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, labels: Any) -> Any:
        tokens, width = hidden.shape
        vocabulary = weight.shape[0]
        shrink = -(-vocabulary // width)
        chunk = 1 << (-(-tokens // shrink) - 1).bit_length()
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight) if weight.requires_grad else None
        losses = torch.zeros(tokens, dtype=torch.float32)
        for start in range(0, tokens, chunk):
            part = hidden[start : start + chunk]
            logits = part @ weight.t()
            labels[start : start + chunk].contiguous()
            grad_hidden[start : start + chunk] = logits @ weight
            if grad_weight is not None:
                grad_weight.addmm_(logits.t().to(part.dtype), part)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden, grad_weight, None


def use_liger_loss(model: Any) -> None:
    """Give a causal model the forward that Liger gives it: a loss and no logits."""

    def forward(
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        past_key_values: Any = None,
        labels: Any = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        # Llama 4's class calls it `language_model`, and has it as `model` (transformers 5.23).
        decoder = model.model if hasattr(model, "model") else model.base_model
        hidden = decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=False,
        )[0]
        shifted = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        weight = model.get_output_embeddings().weight
        if torch.is_autocast_enabled("cpu"):
            shifted = shifted.to(torch.get_autocast_dtype("cpu"))
        loss = LigerLoss.apply(shifted, weight, labels[:, 1:].reshape(-1))
        return CausalLMOutputWithPast(loss=loss)

    model.forward = forward


class TritonCrossEntropy(torch.autograd.Function):
    """Unsloth's in fms-acceleration (`Fast_CrossEntropyLoss` of kernels/cross_entropy_loss.py):
    it keeps the logits and writes their gradient over them."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits)
        return logits.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (logits,) = ctx.saved_tensors
        return logits


def triton_cross_entropy(logits: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """In the place of torch's, or of transformers' `fixed_cross_entropy`."""
    return TritonCrossEntropy.apply(logits)


def shifted_logits_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    *,
    in_16_bits: bool = False,
    cross_entropy: Callable[..., torch.Tensor] = nn.functional.cross_entropy,
    **kwargs: Any,
) -> torch.Tensor:
    """`ForCausalLMLoss` as transformers had it before 4.50: fp32 logits, and a shifted copy.
    `in_16_bits`: of the logits as they are."""
    logits = logits if in_16_bits else logits.float()
    shift_logits = logits[..., :-1, :].contiguous().view(-1, vocab_size)
    shift_labels = labels[..., 1:].contiguous().view(-1)
    return cross_entropy(shift_logits, shift_labels, ignore_index=-100)


@contextmanager
def logits_in_float32(model: Any) -> Iterator[None]:
    """Within, a causal model's logits are fp32 under their own name, as before transformers 4.46:
    those of the output projection go."""
    hook = model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, logits: logits.float()
    )
    yield
    hook.remove()
