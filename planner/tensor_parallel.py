"""Tensor parallelism: what one of several GPUs holds and computes of a model that they divide.

As transformers 5.23 divides it (`base_model_tp_plan` of a model's configuration, `_tp_plan` of its
class, `transformers/distributed/tensor_parallel.py`): matrices that read the hidden state by their
outputs, `colwise`; those that write it by their inputs, `rowwise`, whose products are summed over
the GPUs; embeddings and output projection by entries of the vocabulary. Norms, the hidden state and
the logits are whole on each.
"""

from __future__ import annotations

import math
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING

from msgspec import structs

from ftplan.planner.errors import InputError
from ftplan.planner.model_spec import Attention, FeedForward, Layer, Linear, ModelSpec, Parallel

if TYPE_CHECKING:
    from ftplan.planner.plan import TrainingPlan

# Families whose plan is the one above; tests/test_tensor_parallel.py compares it with
# transformers'. Others gather what they divided (Phi 3, OLMo 2), divide stacked experts, or have no
# plan.
MODEL_TYPES = frozenset(
    (
        *("cohere", "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo"),
        *("phi", "qwen2", "qwen3", "smollm3", "starcoder2"),
    )
)
# PEFT 0.21 wraps divided matrices, and fails where such a model is evaluated: a `down_proj` with
# LoRA takes rows of another shape (two processes on torch 2.13, transformers 5.23).
METHODS = ("full", "freeze")
# TRL's asks for the whole weight of the output projection; others call it, or do not know DTensor.
LOSSES = ("stock", "trl-fused")
# Those whose step on DTensors beside norms' own tensors is known.
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "sgd")


def check_tensor_parallel(plan: TrainingPlan) -> None:
    """Raises InputError where matrices cannot be divided so, or it is not modelled."""
    if plan.tp_size == 1:
        return
    if plan.num_gpus != plan.tp_size:
        raise InputError(
            f"`--tp-size {plan.tp_size}` with `--num-gpus {plan.num_gpus}` is not modelled: all "
            "GPUs divide the one model",
            f"use `--num-gpus {plan.tp_size}`, or `--tp-size {plan.num_gpus}`",
        )
    if plan.sharding != "none":
        raise InputError(
            f"`--tp-size {plan.tp_size}` with `--sharding {plan.sharding}` is not modelled",
            "leave out one of them: tensor parallelism divides gradients and states along with "
            "the weights",
        )
    _check_divided_training(plan)


def _check_divided_training(plan: TrainingPlan) -> None:
    """Raises InputError for what does not go with divided matrices, or is not modelled so."""
    spelled = f"`--tp-size {plan.tp_size}`"
    if plan.quantization != "none":
        raise InputError(
            f"a base quantized to {plan.quantization} with {spelled} is not modelled",
            "use `--sharding fsdp`, which divides a 4-bit base",
        )
    if plan.method not in METHODS:
        raise InputError(
            f"method `{plan.method}` with {spelled} is not modelled",
            "use `--method full`, or `--sharding fsdp` in the place of `--tp-size`",
        )
    if plan.loss not in LOSSES:
        raise InputError(
            f"`--loss {plan.loss}` reads the weight of the output projection, which {spelled} "
            "divides",
            "use " + " or ".join(f"`--loss {loss}`" for loss in LOSSES),
        )
    if plan.trainer == "loop":
        raise InputError(
            "`--trainer loop` trains on one GPU", "use `--trainer trl` or `--trainer transformers`"
        )
    if plan.objective != "sft":
        raise InputError(
            f"`--objective {plan.objective}` with {spelled} is not modelled",
            "leave out `--tp-size`",
        )
    if plan.optim not in OPTIMIZERS:
        raise InputError(
            f"`--optim {plan.optim}` with {spelled} is not modelled",
            "use `--optim adamw_torch_fused`",
        )


def check_divides(model: ModelSpec, tp_size: int) -> None:
    """Raises InputError where a model's heads, matrices or vocabulary do not divide evenly."""
    counts = {("vocab_size", model.vocab_size)}
    for layer in model.layer_counts:
        counts.add(("num_key_value_heads", layer.attention.num_key_value_heads))
        counts.add(("num_attention_heads", layer.attention.num_heads))
        counts.add(("intermediate_size", layer.feed_forward.intermediate_size))
    for name, number in sorted(counts, key=itemgetter(1, 0)):
        if number % tp_size:
            raise InputError(
                f"`--tp-size {tp_size}` does not divide the {name} {number} of `{model.name}`",
                f"use a divisor of {math.gcd(*(number for _, number in counts))}",
            )


def one_rank(model: ModelSpec, tp_size: int) -> ModelSpec:
    """The model as one of `tp_size` GPUs has it, eq. (12): its own heads, columns and rows.

    Raises InputError where they do not divide it evenly, or as this module does not know.
    """
    if tp_size == 1:
        return model
    if model.model_type not in MODEL_TYPES or model.code != "transformers":
        raise InputError(
            f"the closed form does not model `--tp-size {tp_size}` with `{model.model_type}`",
            "`ftplan estimate` with `--exact` divides it by transformers' own plan, if it has one",
        )
    return model.remembered(("one rank", tp_size), partial(_one_rank, model, tp_size))


def _one_rank(model: ModelSpec, tp_size: int) -> ModelSpec:
    check_divides(model, tp_size)
    divided = {id(layer): _divided_layer(layer, tp_size) for layer in model.layers}
    return structs.replace(
        model,
        layers=tuple(divided[id(layer)] for layer in model.layers),
        vocabulary_parts=tp_size,
        biased=model.biased and _one_rank(model.biased, tp_size),
    )


def _divided_layer(layer: Layer, parts: int) -> Layer:
    return structs.replace(
        layer,
        attention=_divided_attention(layer.attention, parts),
        feed_forward=_divided_feed_forward(layer.feed_forward, parts),
    )


def _divided_attention(attention: Attention, parts: int) -> Attention:
    return structs.replace(
        attention,
        num_heads=attention.num_heads // parts,
        num_key_value_heads=attention.num_key_value_heads // parts,
        inputs=tuple(_divided(linear, "colwise", parts) for linear in attention.inputs),
        output=_divided(attention.output, "rowwise", parts),
    )


def _divided_feed_forward(block: FeedForward, parts: int) -> FeedForward:
    return structs.replace(
        block,
        intermediate_size=block.intermediate_size // parts,
        inputs=tuple(_divided(linear, "colwise", parts) for linear in block.inputs),
        output=_divided(block.output, "rowwise", parts),
    )


def _divided(linear: Linear, parallel: Parallel, parts: int) -> Linear:
    width = "out_features" if parallel == "colwise" else "in_features"
    return structs.replace(linear, parallel=parallel, **{width: getattr(linear, width) // parts})
