"""Combinations whose training step ends in an exception, or trains nothing: of a library with
another, as both are installed."""

from __future__ import annotations

from collections.abc import Callable

from ftplan.planner.combination import Asked, Combination, spelled
from ftplan.planner.objectives import trained_part
from ftplan.planner.optimizer_steps import Updated
from ftplan.planner.peft_options import CACHE_FILLING, PROMPTING, read_options
from ftplan.planner.sharding import PARAM_PERSISTENCE_THRESHOLD
from ftplan.planner.updated import updated_parameters

# The class calls its decoder `language_model` and has it as `model` (transformers 5.23).
MISNAMED_DECODERS = frozenset(("llama4_text",))

# Architectures whose decoder is not called `model` (`base_model_prefix`, transformers 5.23).
# Within PEFT's wrapper, `model` is the whole causal model, so that accelerate finds no final norm.
DECODERS_BY_OTHER_NAMES = frozenset(
    ("bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "mpt")
)

_FUSED_OPTIMIZERS = ("lomo", "adalomo")
# PEFT's methods that put a prompt before the rows and leave the model's own modules as they are.
_PROMPTS = tuple(sorted(PROMPTING))
# PEFT's methods that train a parameter which several layers share.
_SHARED_BY_LAYERS = ("LILY", "TINYLORA", "UNILORA", "VBLORA")


def needs_whole_graph(peft_type: str | None) -> bool:
    """Whether a method of PEFT cannot be trained with checkpointed layers."""
    return peft_type == "POLY" or peft_type in CACHE_FILLING


def _has_alibi(asked: Asked) -> bool:
    return any(layer.attention.alibi for layer in asked.model.layer_counts)


def _is_checkpointed(asked: Asked, *peft_types: str) -> bool:
    return asked.plan.gradient_checkpointing and asked.peft_type in peft_types


def _partitions_adapters(asked: Asked) -> bool:
    """Whether ZeRO-3 divides a parameter that the method adds."""
    trained = asked.plan.resolved_method.count(asked.model, asked.plan.method_settings)
    return any(p.size > PARAM_PERSISTENCE_THRESHOLD for p in trained.adapters)


def _updates_none(asked: Asked, wanted: Callable[[Updated], bool]) -> bool:
    """Whether nothing that the plan trains is of the `wanted` kind."""
    trained = trained_part(asked.model, asked.plan)
    return not any(map(wanted, updated_parameters(asked.model, asked.plan, trained)))


def _is_dora(asked: Asked) -> bool:
    method = asked.plan.resolved_method
    return bool({**method.peft_options, **read_options(asked.plan.peft_config)}.get("use_dora"))


def _reads_divided_head(asked: Asked) -> bool:
    """Whether Liger reads the weight of a head that is a unit of its own, and calls no module of
    that unit."""
    model = asked.model
    found = model.tie_word_embeddings or model.model_type in DECODERS_BY_OTHER_NAMES
    return asked.peft_type not in (None, *_PROMPTS) and not found


REFUSED_STEPS: tuple[Combination, ...] = (
    Combination(
        name="flash-attention-alibi",
        outcome="refused",
        applies=lambda a: (
            a.uses_flash_attention and a.model.model_type == "falcon" and _has_alibi(a)
        ),
        text=lambda a: (
            f"transformers' Falcon has no ALiBi, which {a.model.name} wants, in FlashAttention-2"
        ),
        way_out=lambda a: "use `--attn-implementation sdpa`",
        source="transformers 5.23, modeling_falcon.py `FalconFlashAttention2.forward`",
    ),
    Combination(
        name="misnamed-decoder",
        outcome="refused",
        applies=lambda a: a.plan.loss == "trl-fused" and a.model.model_type in MISNAMED_DECODERS,
        text=lambda a: (
            f"TRL's fused loss does not find the decoder of `{a.model.model_type}`: it looks for "
            "it by a name that the class in transformers gives wrongly"
        ),
        way_out=lambda a: "use `--loss stock`, with `--objective sft`",
        source="trl 1.16, trainer/utils.py `add_fused_lm_head`; transformers 5.23, "
        "modeling_llama4.py `base_model_prefix`",
    ),
    Combination(
        name="muon-no-matrix",
        outcome="refused",
        applies=lambda a: a.plan.optim == "muon" and _updates_none(a, lambda p: p.is_hidden_matrix),
        text=lambda a: (
            f"`--optim muon` is for matrices between embeddings and output projection, and method "
            f"`{a.plan.method}` trains none of {a.model.name}"
        ),
        way_out=lambda a: "use `--optim adamw_torch_fused`",
        source="torch 2.13, optim/_muon.py",
    ),
    Combination(
        name="low-rank-no-linear",
        outcome="refused",
        applies=lambda a: (
            a.plan.optimizer.low_rank and _updates_none(a, lambda p: p.kind == "linear")
        ),
        text=lambda a: (
            f"`--optim {a.plan.optim}` projects the gradients of linear modules, and method "
            f"`{a.plan.method}` trains none of {a.model.name}"
        ),
        way_out=lambda a: "use `--optim adamw_torch_fused`",
        source="transformers 5.23, trainer_optimizer.py `_setup_low_rank_optimizer`",
    ),
    Combination(
        name="lomo-fp16",
        outcome="refused",
        applies=lambda a: a.plan.optim in _FUSED_OPTIMIZERS and a.plan.mixed_precision == "fp16",
        text=lambda a: (
            f"`--optim {a.plan.optim}` steps within backward, and accelerate's backward under "
            "fp16 autocast knows nothing of that"
        ),
        way_out=lambda a: "use `--mixed-precision bf16`, or `--optim adamw_torch_fused`",
        source="accelerate 1.15, accelerator.py `Accelerator.backward`",
    ),
    Combination(
        name="poly-checkpointed",
        outcome="refused",
        applies=lambda a: _is_checkpointed(a, "POLY"),
        text=lambda a: (
            "method `poly` knows the rows' tasks during forward only, and a checkpointed layer is "
            "computed again in backward"
        ),
        way_out=lambda a: "use `--gradient-checkpointing false`, or `--method lora`",
        source="peft, tuners/poly/model.py `_enable_peft_forward_hooks`",
    ),
    Combination(
        name="every-n-layers-reference",
        outcome="refused",
        applies=lambda a: (
            a.plan.every_n_layers > 1
            and a.plan.resolved_objective.has_reference
            and not a.plan.resolved_objective.generates
            and not a.plan.precompute_ref_log_probs
        ),
        text=lambda a: (
            f"`--objective {a.plan.objective}` turns checkpointing off for the reference's pass, "
            "and on again for all layers, whatever `--every-n-layers` says"
        ),
        way_out=lambda a: "use `--precompute-ref-log-probs`, or leave out `--every-n-layers`",
        source="trl 1.16, models/utils.py `disable_gradient_checkpointing`",
    ),
    Combination(
        name="every-n-layers-generation",
        outcome="refused",
        applies=lambda a: a.plan.every_n_layers > 1 and a.plan.resolved_objective.generates,
        text=lambda a: (
            f"`--objective {a.plan.objective}` turns checkpointing off to generate, and on again "
            "for all layers, whatever `--every-n-layers` says"
        ),
        way_out=lambda a: "leave out `--every-n-layers`",
        source="trl 1.16, models/utils.py `unwrap_model_for_generation`",
    ),
    Combination(
        name="every-n-layers-remote",
        outcome="refused",
        applies=lambda a: a.plan.every_n_layers > 1 and a.model.code == "remote",
        text=lambda a: (
            f"the repository's own code for `{a.model.model_type}` checkpoints all layers or none"
        ),
        way_out=lambda a: "leave out `--every-n-layers`",
        source="transformers 5.23, modeling_utils.py: models with a `_set_gradient_checkpointing` "
        "of their own",
    ),
    Combination(
        name="adalora-zero3",
        outcome="refused",
        applies=lambda a: (
            a.plan.sharding == "zero3" and a.peft_type == "ADALORA" and _partitions_adapters(a)
        ),
        text=lambda a: (
            "AdaLoRA multiplies gathered parameters with themselves, and ZeRO-3 has let go of "
            "them when backward needs them again"
        ),
        way_out=lambda a: "use `--sharding zero2`, or `--method lora`",
        source="peft, tuners/adalora/model.py `AdaLoraModel.forward`; deepspeed, "
        "zero/partition_parameters.py `GatheredParameters`",
    ),
    Combination(
        name="fsdp-adalora",
        outcome="refused",
        applies=lambda a: a.plan.sharding == "fsdp" and a.peft_type == "ADALORA",
        text=lambda a: (
            "AdaLoRA multiplies whole parameters with themselves after the model's forward, when "
            "FSDP2 has divided them again"
        ),
        way_out=lambda a: "use `--sharding zero2`, or `--method lora`",
        source="peft, tuners/adalora/model.py `AdaLoraModel.forward`; two processes on torch 2.13",
    ),
    Combination(
        name="fsdp-shared-adapters",
        outcome="refused",
        applies=lambda a: a.plan.sharding == "fsdp" and a.peft_type in _SHARED_BY_LAYERS,
        text=lambda a: (
            f"method `{a.plan.method}` trains parameters that several layers share, and FSDP2 "
            "divides each layer by itself"
        ),
        way_out=lambda a: "use `--sharding zero2`, or `--method lora`",
        source="torch 2.13, distributed/fsdp/_fully_shard/_fsdp_param.py",
    ),
    Combination(
        name="fsdp-dora-quantized",
        outcome="refused",
        applies=lambda a: (
            a.plan.sharding == "fsdp"
            and a.plan.trainer == "trl"
            and a.plan.quantization != "none"
            and _is_dora(a)
        ),
        text=lambda a: (
            "beside a quantized base TRL holds DoRA's lengths in fp32 and its matrices in bf16, "
            "and FSDP2 wants what it trains of a layer in one dtype"
        ),
        way_out=lambda a: "use `--method qlora`, `--quantization none` or `--sharding zero2`",
        source="trl 1.16, sft_trainer.py; torch 2.13, _fsdp_param_group.py `_init_mp_dtypes`",
    ),
    Combination(
        name="fsdp-copied-ties",
        outcome="refused",
        applies=lambda a: a.plan.sharding == "fsdp" and bool(a.copied_ties),
        text=lambda a: (
            f"PEFT trains a copy of {spelled(a.copied_ties)}, and the weight that "
            "it is a copy of stays tied to a module of another of FSDP2's groups"
        ),
        way_out=lambda a: "leave it out of `--modules-to-save`, or use `--sharding zero2`",
        source="torch 2.13, distributed/fsdp/_fully_shard; accelerate 1.15, utils/fsdp_utils.py "
        "`fsdp2_prepare_model`",
    ),
    Combination(
        name="fsdp-liger-adapters",
        outcome="refused",
        applies=lambda a: (
            a.plan.sharding == "fsdp" and a.plan.loss == "liger" and _reads_divided_head(a)
        ),
        text=lambda a: (
            "Liger's fused loss reads the output projection without calling it, and beside "
            "adapters FSDP2 has not gathered it then"
        ),
        way_out=lambda a: "use `--loss stock`, or TRL's own with `--trainer trl`",
        source="liger-kernel 0.8.5, transformers/model/llama.py `lce_maybe_trainable_lm_head`; "
        "accelerate 1.15, utils/fsdp_utils.py `_find_final_norm`",
    ),
)
