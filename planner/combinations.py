"""Combinations of model, plan and device that cannot be, or disappoint: each with a name and the
way out. What contradicts itself within a plan is refused in `plan.py`, `objectives.py` and
`sharding.py`, before any model is known."""

from __future__ import annotations

from ftplan.planner.combination import Asked, Caution, Combination, Outcome, spelled
from ftplan.planner.cycles import LORA_DROP_KEPT_SHARE
from ftplan.planner.errors import InputError
from ftplan.planner.hardware_spec import QUANTIZATION_CAPABILITY, Device
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.peft_options import read_options
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.refused_steps import REFUSED_STEPS
from ftplan.planner.trained import LM_HEAD, routers_taken_for_linear
from ftplan.planner.units import format_bytes

# FlashAttention-2's README: Ampere, Ada or Hopper GPUs.
_FLASH_ATTENTION_CAPABILITY = (8, 0)

# Architectures whose classes in transformers 5.23 have no `_supports_flash_attn`.
WITHOUT_FLASH_ATTENTION = frozenset(("bloom", "codegen", "llama4", "llama4_text", "mpt"))

# The least change of a number, as a share of it, that is not rounded away: half of the last bit.
_LEAST_CHANGES = {"bfloat16": 512, "float16": 4096}

# `TrainingArguments.per_device_eval_batch_size` of transformers.
_DEFAULT_EVAL_ROWS = 8


# Optimizers whose code calls CUDA by name (galore-torch 1.0, adamw8bit.py; lomo-optim 0.1.1,
# adalomo.py); and those that let a gradient's norm grow by 1 % a step.
CUDA_OPTIMIZERS = frozenset(("adalomo", "galore_adamw_8bit", "galore_adamw_8bit_layerwise"))
_LIMITED_OPTIMIZERS = frozenset(("apollo_adamw", "apollo_adamw_layerwise"))


def cautions(model: ModelSpec, plan: TrainingPlan, device: Device | None) -> list[Caution]:
    """What to be warned about before running the plan."""
    asked = Asked(model=model, plan=plan, device=device)
    return [
        known.caution(asked)
        for known in COMBINATIONS
        if known.outcome != "refused" and known.applies(asked)
    ]


def check_together(model: ModelSpec, plan: TrainingPlan) -> None:
    """Raises InputError for what no device can run."""
    _refuse(Asked(model=model, plan=plan, device=None), ("refused",))


def check_runs(model: ModelSpec, plan: TrainingPlan, device: Device) -> None:
    """Raises InputError for what this device cannot run."""
    _refuse(Asked(model=model, plan=plan, device=device), ("refused", "not run"))


def _refuse(asked: Asked, outcomes: tuple[Outcome, ...]) -> None:
    for known in COMBINATIONS:
        if known.outcome in outcomes and known.applies(asked):
            raise InputError(known.text(asked), known.way_out(asked))


# --- when they apply


def _lacks_bfloat16(asked: Asked) -> bool:
    plan, device = asked.plan, asked.device
    uses = plan.mixed_precision == "bf16" or plan.dtype == "bfloat16"
    return uses and device is not None and not device.supports_bfloat16


def _flash_attention_cannot_run(asked: Asked) -> bool:
    if not asked.uses_flash_attention or asked.device is None:
        return False
    capability = asked.capability
    if capability is None:
        return asked.device.vendor == "apple"
    return capability < _FLASH_ATTENTION_CAPABILITY


# What PCI Express 5.0 with 16 lanes reaches; NVLink of any card in use since 2020 has more.
_PCIE_BYTES_PER_SECOND = 38e9


def _link(asked: Asked) -> float:
    return (asked.device and asked.device.link_bytes_per_second) or 0.0


def _tensor_parallel_over_pcie(asked: Asked) -> bool:
    return asked.plan.tp_size > 1 and 0 < _link(asked) < _PCIE_BYTES_PER_SECOND


QUANTIZED_ON_PROCESSOR = (
    "4- and 8-bit bases are for GPUs: a processor expands their weights for each product, which "
    "saves memory and takes far longer"
)


def _quantizes_on_processor(asked: Asked) -> bool:
    on_cpu = asked.device is not None and asked.device.kind == "cpu"
    return on_cpu and asked.plan.quantization != "none"


def _lacks_quantization(asked: Asked) -> bool:
    device, kind = asked.device, asked.plan.quantization
    if device is None or device.kind == "cpu" or kind == "none":
        return False
    return not device.supports_quantization(kind)


def _lack_of_quantization(asked: Asked) -> str:
    kind, device = asked.plan.quantization, asked.device
    if device is not None and device.vendor != "nvidia":
        return f"there are no kernels for {kind} bases on {device.name}"
    return (
        f"{asked.device_name} lacks compute capability {_capability(kind)}, which {kind} bases need"
    )


def _other_than_quantized(asked: Asked) -> str:
    assert asked.device is not None
    four_bits = asked.plan.quantization != "nf4" and asked.device.supports_quantization("nf4")
    return f"use {'`--quantization nf4`, or ' if four_bits else ''}`--method lora`"


def _trains_experts(asked: Asked) -> bool:
    """Whether parameters that are no matrix are trained: stacks of experts."""
    trained = asked.plan.resolved_method.count(asked.model, asked.plan.method_settings)
    return any(len(parameter.shape) > 2 for parameter in trained.own)


def _adapted_routers(asked: Asked) -> list[str]:
    """Routers that `target_modules` names."""
    return sorted(routers_taken_for_linear(asked.model).intersection(asked.plan.target_modules))


def _capability(kind: str) -> str:
    major, minor = QUANTIZATION_CAPABILITY[kind]
    return f"{major}.{minor}"


# --- the table

COMBINATIONS: tuple[Combination, ...] = (
    Combination(
        name="no-bf16",
        outcome="warned",
        applies=_lacks_bfloat16,
        text=lambda a: f"{a.device_name} has no bf16: torch can only imitate it, slowly",
        way_out=lambda a: "use `--mixed-precision fp16`, with `--dtype float16` or float32",
        source="compute capability 8.0; torch.cuda.is_bf16_supported(including_emulation=False)",
    ),
    Combination(
        name="other-vendor",
        outcome="warned",
        applies=lambda a: a.device is not None and a.device.vendor != "nvidia",
        text=lambda a: (
            f"{a.device_name} is modelled as an NVIDIA card of compute capability 8.0: kernels, "
            "allocator and context of another vendor's differ, and no run on one was compared"
        ),
        way_out=lambda a: "leave a wide margin",
        source="profiles/gpus; no measured run on such a card",
    ),
    Combination(
        name="no-flash-attention",
        outcome="not run",
        applies=_flash_attention_cannot_run,
        text=lambda a: f"FlashAttention-2 does not run on {a.device_name}",
        way_out=lambda a: "use `--attn-implementation sdpa`",
        source="FlashAttention-2's README: Ampere, Ada or Hopper GPUs",
    ),
    Combination(
        name="flash-attention-float32",
        outcome="refused",
        applies=lambda a: (
            a.uses_flash_attention and not a.plan.autocast and a.plan.dtype == "float32"
        ),
        text=lambda a: "FlashAttention-2 takes fp16 and bf16 only, and this computes in float32",
        way_out=lambda a: "use `--mixed-precision bf16`, or `--attn-implementation sdpa`",
        source="transformers, modeling_utils.py `_flash_attn_can_dispatch`",
    ),
    Combination(
        name="no-flash-attention-class",
        outcome="refused",
        applies=lambda a: a.uses_flash_attention and a.model.model_type in WITHOUT_FLASH_ATTENTION,
        text=lambda a: f"transformers has no FlashAttention-2 for `{a.model.model_type}`",
        way_out=lambda a: "use `--attn-implementation eager`, or sdpa where there is one",
        source="`_supports_flash_attn` of the classes of transformers 5.23",
    ),
    Combination(
        name="quantized-on-processor",
        outcome="warned",
        applies=_quantizes_on_processor,
        text=lambda a: QUANTIZED_ON_PROCESSOR,
        way_out=lambda a: "use `--method lora` where its memory fits",
        source="bitsandbytes 0.50, backends/cpu/ops.py",
    ),
    Combination(
        name="no-quantization-kernels",
        outcome="not run",
        applies=_lacks_quantization,
        text=_lack_of_quantization,
        way_out=_other_than_quantized,
        source="bitsandbytes' installation guide; Triton's README",
    ),
    Combination(
        name="optimizer-on-processor",
        outcome="not run",
        applies=lambda a: (
            a.device is not None and a.device.kind == "cpu" and a.plan.optim in CUDA_OPTIMIZERS
        ),
        text=lambda a: f"`--optim {a.plan.optim}` calls CUDA by name, whatever it runs on",
        way_out=lambda a: "use `--optim adamw_torch_fused`",
        source="galore-torch 1.0, adamw8bit.py; lomo-optim 0.1.1, adalomo.py",
    ),
    Combination(
        name="apollo-zero-start",
        outcome="warned",
        applies=lambda a: (
            a.plan.optim in _LIMITED_OPTIMIZERS
            and a.peft_type == "LORA"
            and read_options(a.plan.peft_config).get("init_lora_weights", True) is True
        ),
        text=lambda a: (
            f"`--optim {a.plan.optim}` lets a gradient's norm grow by 1 % a step, and LoRA's first "
            "matrix begins with a gradient of 0: it hardly moves"
        ),
        way_out=lambda a: "use `--optim adamw_torch_fused`",
        source="apollo-torch 1.0.3, apollo.py: the norm-growth limiter",
    ),
    Combination(
        name="fp16-overflow",
        outcome="warned",
        applies=lambda a: a.is_16_bit_float and a.model.native_dtype == "bfloat16",
        text=lambda a: (
            f"{a.model.name} was trained in bf16, and fp16 holds nothing above 65,504: "
            "activations may overflow"
        ),
        way_out=lambda a: "should the loss become nan, use `--dtype float32 --mixed-precision no`",
        source="gemma_pytorch issue 24; transformers PR 37226",
    ),
    Combination(
        name="beyond-positions",
        outcome="warned",
        applies=lambda a: a.plan.max_length > a.model.max_position_embeddings,
        text=lambda a: (
            f"{a.model.name} knows {a.model.max_position_embeddings} positions, "
            f"`--max-length {a.plan.max_length}` is beyond them"
        ),
        way_out=lambda a: f"use `--max-length {a.model.max_position_embeddings}`",
        source="`max_position_embeddings` of config.json",
    ),
    Combination(
        name="adapted-router",
        outcome="refused",
        applies=lambda a: a.plan.resolved_method.adapter and bool(_adapted_routers(a)),
        text=lambda a: (
            f"{spelled(_adapted_routers(a))} of `{a.model.model_type}` returns several "
            "tensors, and PEFT's adapters add to one"
        ),
        way_out=lambda a: f"leave {spelled(_adapted_routers(a))} out of `--target-modules`",
        source="the routers' `forward` in transformers 5.23; peft, tuners/lora/layer.py",
    ),
    Combination(
        name="tied-embeddings",
        outcome="warned",
        applies=lambda a: bool(a.copied_ties),
        text=lambda a: (
            f"{a.model.name} ties its output projection to its embeddings, and PEFT "
            f"trains a copy of {spelled(a.copied_ties)} that is not tied"
        ),
        way_out=lambda a: "set `ensure_weight_tying=True` in PEFT's configuration, or leave it out",
        source="peft, tuners/tuners_utils.py `_add_modules_to_save_to_tie`; peft issue 2777",
    ),
    Combination(
        name="score-for-head",
        outcome="warned",
        applies=lambda a: a.plan.resolved_objective.scores and LM_HEAD in a.saved_ends,
        text=lambda a: (
            f"`--objective {a.plan.objective}` trains a model with a score in the place of "
            f"`{LM_HEAD}`: PEFT finds no such module to save, and trains a copy of the score anyway"
        ),
        way_out=lambda a: f"leave `{LM_HEAD}` out of `--modules-to-save`",
        source="transformers.modeling_layers.GenericForSequenceClassification; peft, peft_model.py "
        "`PeftModelForSequenceClassification`",
    ),
    Combination(
        name="generating-experts",
        outcome="refused",
        applies=lambda a: a.plan.resolved_objective.generates and a.has_experts,
        text=lambda a: (
            f"`--objective {a.plan.objective}` of {a.model.name} is not modelled: for each token "
            "that is generated transformers copies the weights of its experts"
        ),
        way_out=lambda a: "take a model without experts, or another objective",
        source="transformers 5.23, generation/utils.py `_optimize_model_for_decode`",
    ),
    Combination(
        name="adalomo-experts",
        outcome="refused",
        applies=lambda a: a.plan.optim == "adalomo" and _trains_experts(a),
        text=lambda a: (
            f"`--optim adalomo` cannot step on the stacked experts of "
            f"{a.model.name}: it takes every parameter for a matrix or a vector"
        ),
        way_out=lambda a: "use `--optim lomo`, or `--method lora`",
        source="lomo-optim 0.1.1, adalomo.py `fuse_update`",
    ),
    Combination(
        name="liger-beside-trl",
        outcome="warned",
        applies=lambda a: a.plan.loss == "liger" and a.plan.trainer == "trl",
        text=lambda a: (
            "TRL 1.16 refuses Liger's fused linear cross-entropy beside its own: these "
            "are the figures of earlier releases"
        ),
        way_out=lambda a: "use `--loss trl-fused`, or `--trainer transformers`",
        source="trl 1.16, trainer/sft_trainer.py `SFTTrainer.__init__`",
    ),
    Combination(
        name="default-eval-batch",
        outcome="warned",
        applies=lambda a: (
            a.plan.trainer == "transformers"
            and a.plan.per_device_train_batch_size < _DEFAULT_EVAL_ROWS
        ),
        text=lambda a: (
            "an evaluation is taken to have as many rows as a training step; "
            f"transformers' own default is {_DEFAULT_EVAL_ROWS}, with whole logits"
        ),
        way_out=lambda a: (
            "set `per_device_eval_batch_size="
            f"{a.plan.per_device_train_batch_size}` in TrainingArguments"
        ),
        source="transformers, training_args.py; issues 12878 and 25313",
    ),
    Combination(
        name="data-parallel-memory",
        outcome="warned",
        applies=lambda a: a.plan.data_parallel_size > 1 and a.plan.sharding == "none",
        text=lambda a: (
            "the figures are per GPU: under data parallelism more GPUs save time, not memory"
        ),
        way_out=lambda a: "`--sharding fsdp` divides what each holds",
        source="pytorch PR 41954: each process holds the model, its gradients and their buckets",
    ),
    Combination(
        name="zero-whole-quantized-base",
        outcome="warned",
        applies=lambda a: a.plan.quantization != "none" and a.plan.sharding in ("zero1", "zero2"),
        text=lambda a: (
            f"`--sharding {a.plan.sharding}` leaves the whole quantized base on each GPU"
        ),
        way_out=lambda a: "`--sharding fsdp` divides it",
        source="peft's docs, accelerate/deepspeed.md; deepspeed/runtime/zero/stage_1_and_2.py",
    ),
    Combination(
        name="quant-storage",
        outcome="warned",
        applies=lambda a: a.plan.sharding == "fsdp" and a.plan.quantization in ("nf4", "fp4"),
        text=lambda a: (
            "FSDP divides a 4-bit base only where its bytes are stored as numbers of "
            "the model's dtype, which is taken to be so: else each GPU holds all of it"
        ),
        way_out=lambda a: f"set `bnb_4bit_quant_storage={a.plan.dtype}` in BitsAndBytesConfig",
        source="accelerate 1.15, utils/fsdp_utils.py `fsdp2_prepare_model`",
    ),
    Combination(
        name="tensor-parallel-pcie",
        outcome="warned",
        applies=_tensor_parallel_over_pcie,
        text=lambda a: (
            f"`--tp-size {a.plan.tp_size}` exchanges the hidden state several times in each layer, "
            f"and every GPU waits for it: {a.device_name} has "
            f"{format_bytes(_link(a))} a second to the others, as PCIe has"
        ),
        way_out=lambda a: "use `--sharding fsdp`, which exchanges weights beside computing",
        source="transformers 5.23, distributed/tensor_parallel.py; docs/time-model.md, Eq. (T5)",
    ),
    Combination(
        name="every-process-loads",
        outcome="warned",
        applies=lambda a: (
            a.plan.sharding == "fsdp"
            and a.plan.gpus_per_machine > 1
            and a.plan.quantization != "none"
        ),
        text=lambda a: (
            f"each of the {a.plan.gpus_per_machine} processes loads the whole quantized base into "
            "the host's memory before it is divided"
        ),
        way_out=lambda a: "an unquantized base is loaded by one of them",
        source="transformers 5.23, modeling_utils.py; axolotl issue 1717",
    ),
    Combination(
        name="fsdp-reentrant",
        outcome="refused",
        applies=lambda a: (
            a.plan.sharding == "fsdp" and a.plan.use_reentrant and a.plan.gradient_checkpointing
        ),
        text=lambda a: (
            "FSDP2 is not to be checkpointed by the reentrant function: accelerate's own "
            "checkpointing for it is the other one"
        ),
        way_out=lambda a: "leave out `--use-reentrant`",
        source="accelerate 1.15, utils/fsdp_utils.py `fsdp2_apply_ac`",
    ),
    Combination(
        name="relora-sharded",
        outcome="refused",
        applies=lambda a: a.plan.resolved_method.merges and a.plan.sharding != "none",
        text=lambda a: (
            f"{a.plan.resolved_method.title} merges adapters and resets optimizer states as it "
            f"goes, which is not done on state divided by `--sharding {a.plan.sharding}`"
        ),
        way_out=lambda a: "leave out `--sharding`, or use `--method lora`",
        source="axolotl's validation: neither FSDP nor DeepSpeed with ReLoRA",
    ),
    Combination(
        name="merged-in-16-bits",
        outcome="warned",
        applies=lambda a: a.plan.resolved_method.merges and a.plan.dtype != "float32",
        text=lambda a: (
            f"each of {a.plan.resolved_method.title}'s merges rounds the base to {a.plan.dtype}, "
            f"and what changes a weight by less than 1/{_LEAST_CHANGES[a.plan.dtype]} is lost"
        ),
        way_out=lambda a: "`--dtype float32` keeps it, at 4 bytes a weight",
        source="significands of 8 and 11 bits, rounded to the nearest",
    ),
    Combination(
        name="lora-drop-bound",
        outcome="warned",
        applies=lambda a: a.plan.method == "lora-drop",
        text=lambda a: (
            "memory and trained parameters are those of LoRA-drop's first steps, with an adapter "
            f"in each layer; once layers share one, about {LORA_DROP_KEPT_SHARE:.0%} of the "
            "parameters are left"
        ),
        way_out=lambda a: "`--lora-drop-threshold` says how many are",
        source="LoRA-drop, abstract: 50 % on average at its threshold of 0.9",
    ),
    Combination(
        name="adalora-fused-loss",
        outcome="warned",
        applies=lambda a: a.peft_type == "ADALORA" and a.plan.loss == "trl-fused",
        text=lambda a: (
            "PEFT adds AdaLoRA's orthogonality term to a loss that the model computes, and "
            "`--loss trl-fused` is computed outside of it: ranks are taken away without that term"
        ),
        way_out=lambda a: "use `--loss stock`",
        source="peft, tuners/adalora/model.py `AdaLoraModel.forward`",
    ),
    *REFUSED_STEPS,
)
