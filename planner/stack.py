"""What a training stack does beyond the settings of a plan, and what a GPU generation does."""

from __future__ import annotations

from msgspec import Struct

from ftplan.planner.hardware_spec import Device
from ftplan.planner.units import KIB, MIB

# From this release on transformers shifts labels; before it shifted logits, which copies them
# (https://github.com/huggingface/transformers/pull/35646).
_SHIFTS_LABELS_SINCE = (4, 50)

# Until then these models took the cross-entropy of their 16-bit logits (`forward` in
# modeling_*.py of 4.45.2 and 4.48.1).
_LOSS_IN_16_BITS_BEFORE = (4, 49)
_LOSS_IN_16_BITS = frozenset(
    ("bloom", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "opt", "stablelm")
)

# From this release on models share their attention functions; before, these (of those without
# experts) had a class of their own for FlashAttention-2 that called `repeat_kv` first, unlike
# Llama's (`*FlashAttention2` in models/*/modeling_*.py of transformers 4.45.2).
_ATTENTION_SHARED_SINCE = (4, 48)
_REPEAT_FOR_FLASH = ("mistral", "phi3", "qwen2", "starcoder2")

# From this release on experts are stacked parameters (transformers.integrations.moe).
_STACKS_EXPERTS_SINCE = (5,)
# From this release on models call a loss function of transformers.loss; before, each computed its
# own with torch.nn.CrossEntropyLoss (`forward` in modeling_llama.py of 4.45.2 and 4.48.1).
_LOSS_FUNCTIONS_SINCE = (4, 46)
# Until then models put gradient checkpointing around what FSDP1 had put around a layer, and
# reentrant by default (`_gradient_checkpointing_func` in transformers 4.51's modeling_llama.py);
# from then on layers do it themselves (4.52's modeling_layers.py).
_CHECKPOINTS_WITHIN_SINCE = (4, 52)

# Until then GPT-BigCode handed out the products that its keys and values are views of, checkpointed
# or not (`use_cache` in `GPTBigCodeModel.forward` of 4.48.1 and 4.52.4).
_GPT_BIGCODE_CACHES_BEFORE = (4, 53)

# From this release on torch's memory-efficient attention takes grouped heads (pytorch/pytorch PR
# 191085).
TAKES_GROUPS_SINCE = (2, 14)

# Of a GPU that is not named: Ampere and later have the kernels that matter.
DEFAULT_CAPABILITY = (8, 0)

# The compute capabilities from which on something is different: bf16 and FlashAttention; a larger
# workspace of cuBLAS.
FLASH_CAPABILITY = (8, 0)
WORKSPACE_CAPABILITY = (9, 0)
_BEFORE = (7, 0)


class Stack(Struct, frozen=True, kw_only=True):
    """Traits of a training stack; the defaults are those of what ftplan launches.

    `kbit_prepare`: PEFT's `prepare_model_for_kbit_training` is called; `casts_back`: TRL 0.x turns
    embeddings, head and adapters to bf16 after it. `repeats_key_value`: grouped heads are repeated
    before the attention kernel. `transformers_version`: the release whose stock loss is meant; None
    for the installed one. `fused_kernels`: norms and rotary embeddings are fms-acceleration's.
    `fsdp_version`: of fully sharded data parallelism. `padded`: some rows are shorter than the
    longest, so that attention is masked. `efficient_takes_groups`: torch's memory-efficient
    attention takes grouped heads, as from 2.14 on. `holds_outputs`: a loop of one's own has the
    model's outputs until the step is over. `checkpoints_within`: and checkpoints what FSDP1 put
    its units around, whatever the release. `sums_in_place`: GPUs that hold all sum gradients
    without DDP's buckets.
    """

    kbit_prepare: bool = False
    casts_back: bool = False
    repeats_key_value: bool = False
    transformers_version: tuple[int, ...] | None = None
    fused_kernels: bool = False
    fsdp_version: int = 2
    padded: bool = False
    efficient_takes_groups: bool = False
    holds_outputs: bool = False
    checkpoints_within: bool = False
    sums_in_place: bool = False

    @property
    def shifts_logits(self) -> bool:
        """Whether the stock loss shifts logits; the installed release's does not."""
        version = self.transformers_version
        return version is not None and version < _SHIFTS_LABELS_SINCE

    def loses_in_16_bits(self, model_type: str) -> bool:
        """Whether the model takes the cross-entropy of logits that are not fp32."""
        version = self.transformers_version
        old = version is not None and version < _LOSS_IN_16_BITS_BEFORE
        return old and model_type in _LOSS_IN_16_BITS

    @property
    def separates_experts(self) -> bool:
        """Whether a mixture's experts are modules of their own."""
        version = self.transformers_version
        return version is not None and version < _STACKS_EXPERTS_SINCE

    @property
    def lets_logits_go(self) -> bool:
        """Whether a model's own loss turns the logits into fp32 under their own name, so that the
        16-bit ones go; the loss functions that came after do not."""
        version = self.transformers_version
        return version is not None and version < _LOSS_FUNCTIONS_SINCE

    def caches_products(self, model_type: str) -> bool:
        """Whether the model caches keys and values while it trains, even under checkpointing."""
        version = self.transformers_version
        old = version is not None and version < _GPT_BIGCODE_CACHES_BEFORE
        return old and model_type == "gpt_bigcode"

    @property
    def checkpoints_around(self) -> bool:
        """Whether checkpointing is around what FSDP1 put around a layer."""
        version = self.transformers_version
        old = version is not None and version < _CHECKPOINTS_WITHIN_SINCE
        return old and not self.checkpoints_within

    def repeats_heads(self, model_type: str, attn_implementation: str) -> bool:
        """Whether grouped heads are repeated before the attention kernel."""
        version = self.transformers_version
        old = version is not None and version < _ATTENTION_SHARED_SINCE
        flash = attn_implementation == "flash_attention_2"
        return self.repeats_key_value or (old and flash and model_type in _REPEAT_FOR_FLASH)


# What ftplan launches.
OWN_STACK = Stack()


def cublas_workspace_bytes(capability: tuple[int, int]) -> int:
    """What cuBLAS takes from the allocator, once a thread (ATen/cuda/CublasHandlePool.cpp):
    two buffers of 4 MiB and eight of 16 KiB; 32 MiB from Hopper on."""
    return 32 * MIB if capability >= WORKSPACE_CAPABILITY else 2 * 4 * MIB + 8 * 16 * KIB


def kernel_capability(device: Device | None) -> tuple[int, int]:
    """One compute capability for all cards that are alike in what is modelled, so that they share
    what is worked out; the default without a device, and for other vendors' cards."""
    own = (device.compute_capability if device else None) or DEFAULT_CAPABILITY
    steps = (WORKSPACE_CAPABILITY, FLASH_CAPABILITY)
    return next((least for least in steps if own >= least), _BEFORE)
