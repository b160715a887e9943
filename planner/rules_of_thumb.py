"""What people reckon with instead of a model of the run: bytes a parameter, by four rules.

The first is printed beside each estimate of full fine-tuning; all stand beside measured runs in
docs/accuracy.md (`python -m benchmarks.rules`). None knows batch, length, loss or attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import Struct

from ftplan.planner.model_spec import Layer, ModelSpec
from ftplan.planner.plan import TrainingPlan

# Mixed-precision training with Adam: 16-bit parameters, fp32 gradients, two fp32 states, and
# shares for activations and the framework; 16 to 20 bytes in practice (the tutorial this project
# starts from; 16 bytes for model states alone in Rajbhandari et al. 2019, arXiv 1910.02054).
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
    "parameters": ("weights", "reference_model", "reward_model", "adapters", "autocast_copies"),
    "gradients": ("gradients",),
    "optimizer_states": ("optimizer_states",),
    "activations": ("activations", "logits_and_loss"),
    "framework": ("temporaries", "communication"),
}


def rule_bytes(num_parameters: int) -> int:
    """Bytes of full fine-tuning by the 17.5-bytes rule, over all GPUs."""
    return round(num_parameters * BYTES_PER_PARAMETER)


def rule_to_dict(num_parameters: int) -> dict[str, Any]:
    return {
        "bytes_per_parameter": BYTES_PER_PARAMETER,
        "bytes": rule_bytes(num_parameters),
        "parts": dict(PARTS_BYTES_PER_PARAMETER),
    }


class Rule(Struct, frozen=True, kw_only=True):
    """A rule of thumb: where it is from, what it leaves out, and its bytes on each GPU.

    `num_bytes` is None for a run that the rule says nothing of.
    """

    title: str
    source: str
    leaves_out: str
    num_bytes: Callable[[ModelSpec, TrainingPlan], int | None]


def tutorial_bytes(model: ModelSpec, plan: TrainingPlan) -> int | None:
    """17.5 bytes a parameter; it is about full fine-tuning alone."""
    if plan.method != "full":
        return None
    return _on_each_gpu(rule_bytes(model.num_parameters), plan)


def accelerate_bytes(model: ModelSpec, plan: TrainingPlan) -> int | None:
    """ "The column "Training using Adam" of `accelerate estimate-memory`: four times the model.

    That is 1 for the weights, 1 for gradients, 2 for Adam's states, in the dtype asked for: 16
    bytes a parameter for float32, and for float16 twice the model in fp32, which is the same 8
    (`estimate_training_usage` in accelerate 1.15's commands/estimate.py). The command prints N/A
    for int8 and int4, and knows nothing of adapters. It loads `AutoModel`, which has no head.
    """
    if plan.method != "full":
        return None
    width = 4 if plan.dtype == "float32" and not plan.autocast else 2
    parameters = model.num_parameters - model.lm_head_parameters
    return _on_each_gpu(4 * width * parameters, plan)


def deepspeed_bytes(model: ModelSpec, plan: TrainingPlan) -> int | None:
    """Model states by DeepSpeed's `estimate_zero{2,3}_model_states_mem_needs`, nothing offloaded.

    ZeRO-2: `2 P + 18 P / N` for P parameters on N GPUs (16-bit weights; 16-bit and fp32
    gradients, fp32 weights, two states), of one GPU too. ZeRO-3: `4 L + 18 P / N`, where L are the
    parameters of the largest module; FSDP divides the same. Both are of training all parameters
    with Adam in mixed precision (deepspeed/runtime/zero/stage_1_and_2.py and stage3.py of
    github.com/deepspeedai/DeepSpeed; older releases had 4 P + 16 P / N for ZeRO-2, which is the
    same on one GPU).
    """
    if plan.method != "full" or plan.offload != "none":
        return None
    parameters = model.num_parameters
    if plan.shards_parameters:
        return 4 * largest_module_parameters(model) + 18 * parameters // plan.dp_shard_size
    if plan.sharding == "zero2" or plan.num_gpus == 1:
        return 2 * parameters + 18 * parameters // plan.num_gpus
    return None


def llama_factory_bytes(model: ModelSpec, plan: TrainingPlan) -> int | None:
    """The column for `x` billion parameters of the table in LLaMA-Factory's README.

    18 GB a billion for full tuning in mixed precision, 8 in 16 bits alone, 2 for LoRA and freeze
    tuning, 1 over an 8-bit base, 1/2 over a 4-bit one (section "Hardware Requirement",
    github.com/hiyouga/LLaMA-Factory).
    """
    if plan.quantization != "none":
        width = 1.0 if plan.quantization == "int8" else 0.5
    elif plan.method in ("lora", "freeze"):
        width = 2.0
    elif plan.method == "full":
        width = 18.0 if plan.autocast or plan.dtype == "float32" else 8.0
    else:
        return None
    return _on_each_gpu(round(width * model.num_parameters), plan)


def _on_each_gpu(total_bytes: int, plan: TrainingPlan) -> int | None:
    """A rule's total by the number of GPUs that divide all of it; None where they divide a part,
    which no total tells."""
    if plan.shards_parameters or plan.tp_size > 1:
        return total_bytes // plan.dp_shard_size
    return total_bytes if plan.sharding == "none" else None


def largest_module_parameters(model: ModelSpec) -> int:
    """Parameters of the module that itself holds the most: the embeddings, a matrix of a layer or
    a stack of experts."""
    layers = (_largest_of_layer(layer) for layer in model.layer_counts)
    return max(model.embedding_parameters, *layers)


def _largest_of_layer(layer: Layer) -> int:
    feed_forward = layer.feed_forward
    largest = max(linear.num_parameters for linear in layer.linears)
    if feed_forward.experts is None:
        return largest
    stacked = feed_forward.experts.num_experts * sum(
        matrix.num_parameters for matrix in feed_forward.matrices
    )
    return max(largest, stacked)


RULES: dict[str, Rule] = {
    "17.5": Rule(
        title="17.5 bytes a parameter",
        source="the tutorial this project starts from",
        leaves_out="batch, length, checkpointing, loss, optimizer; weights kept in fp32",
        num_bytes=tutorial_bytes,
    ),
    "accelerate": Rule(
        title="accelerate, 4 x the model",
        source="`accelerate estimate-memory`, column Training using Adam (accelerate 1.15)",
        leaves_out="activations, logits, the head; gradients and states wider than the weights",
        num_bytes=accelerate_bytes,
    ),
    "deepspeed": Rule(
        title="DeepSpeed's estimator",
        source="`estimate_zero2_model_states_mem_needs` and `estimate_zero3_...` (DeepSpeed)",
        leaves_out="activations, logits; training in 16 bits alone",
        num_bytes=deepspeed_bytes,
    ),
    "llama-factory": Rule(
        title="LLaMA-Factory's table",
        source="its README, section Hardware Requirement, column `x`B",
        leaves_out="batch, length, checkpointing, loss; scales of a quantized base, adapters",
        num_bytes=llama_factory_bytes,
    ),
}
