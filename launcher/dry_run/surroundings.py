"""All that differs from a real run on a real device, put in place while a dry run goes on."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch

from ftplan.launcher.dry_run.case import DryRunCase
from ftplan.launcher.dry_run.cuda import cuda_behaviour
from ftplan.launcher.dry_run.flash_classes import flash_classes
from ftplan.launcher.dry_run.fused_kernels import fused_rotary_embeddings
from ftplan.launcher.dry_run.losses import (
    logits_in_float32,
    shifted_logits_loss,
    triton_cross_entropy,
)
from ftplan.launcher.dry_run.optimizers import optimizer_behaviour
from ftplan.launcher.dry_run.quantized import dequantization, int8_matmul
from ftplan.launcher.training.stacks import causal_model


def surroundings(case: DryRunCase, trainer: Any, reference: Any = None) -> ExitStack:
    """All that differs from a real run on a real device. `reference`: a second model."""
    plan, stack = case.plan, ExitStack()
    # Cycles must not be collected at some moment or other: records would differ.
    gc.disable()
    stack.callback(gc.enable)
    stack.enter_context(torch.autograd.set_multithreading_enabled(False))
    # Names for a profiler, which nobody reads here: FSDP1 gives thousands.
    named = torch.autograd.profiler.record_function
    stack.enter_context(mock.patch.object(named, "__enter__", lambda name: name))
    stack.enter_context(mock.patch.object(named, "__exit__", lambda *_: None))
    # The batch is known, so masks are made as for real tensors.
    stack.enter_context(mock.patch("transformers.masking_utils.is_tracing", _never))
    # `sum() == numel()` says nothing to fakes; `all()` is what the recorder answers.
    stack.enter_context(
        mock.patch("transformers.masking_utils.fast_all", torch.Tensor.all, create=True)
    )
    for target, replacement in dequantization(plan.quantization):
        stack.enter_context(mock.patch.object(*target, replacement))
    stack.enter_context(optimizer_behaviour(plan.optimizer, case.kind))
    if case.kind == "cuda":
        repeats = case.repeats_heads(case.config["model_type"], plan.attn_implementation)
        groups = case.efficient_takes_groups
        stack.enter_context(
            cuda_behaviour(
                case.capability, repeats_key_value=repeats, efficient_takes_groups=groups
            )
        )
        if plan.attn_implementation == "flash_attention_2":
            models = [model for model in (trainer.model, reference) if model is not None]
            stack.enter_context(flash_classes(*models))
        if plan.quantization == "int8":
            stack.enter_context(mock.patch("bitsandbytes.matmul", int8_matmul))
    if plan.mixed_precision == "fp16" and plan.trainer != "loop":
        trainer.accelerator.state._mixed_precision = "fp16"
        # The loss scale and a flag are all that a scaler holds; gradients are scaled in place.
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", enabled=False)
    if case.fused_kernels:
        stack.enter_context(fused_rotary_embeddings(causal_model(trainer.model)))
    if plan.loss == "triton_ce":
        stack.enter_context(
            mock.patch("transformers.loss.loss_utils.fixed_cross_entropy", triton_cross_entropy)
        )
    if plan.loss in ("stock", "triton_ce") and case.shifts_logits:
        stack.enter_context(_former_loss(case, trainer))
    return stack


@contextmanager
def _former_loss(case: DryRunCase, trainer: Any) -> Iterator[None]:
    """Within, models take their loss as the case's release of transformers does."""
    in_16_bits = case.loses_in_16_bits(case.config["model_type"])
    trainer.model.config.loss_type = "ForCausalLM"
    in_place = case.plan.loss == "triton_ce"
    cross_entropy = triton_cross_entropy if in_place else torch.nn.functional.cross_entropy
    loss = partial(shifted_logits_loss, in_16_bits=in_16_bits, cross_entropy=cross_entropy)
    losses = {"ForCausalLM": loss}
    with ExitStack() as stack:
        if case.lets_logits_go and not in_16_bits:
            stack.enter_context(logits_in_float32(causal_model(trainer.model)))
        stack.enter_context(mock.patch.dict("transformers.loss.loss_utils.LOSS_MAPPING", losses))
        yield


def _never(tensor: Any = None) -> bool:
    return False
