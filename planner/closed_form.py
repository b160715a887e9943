"""What the closed form models, and what only a dry run knows."""

from __future__ import annotations

from collections.abc import Iterator

from ftplan.planner.adapter_counts import CONV1D_MODEL_TYPES
from ftplan.planner.errors import InputError
from ftplan.planner.methods import METHODS
from ftplan.planner.model_spec import Layer, ModelSpec
from ftplan.planner.peft_options import read_options
from ftplan.planner.plan import TrainingPlan, flag_name
from ftplan.planner.prefixes import keys_in_front
from ftplan.planner.prequantized import PREQUANTIZED
from ftplan.planner.prompts import tokens_in_front

# Methods whose step the closed form does not model; what they train and add is counted for all.
# ShadowPEFT runs a second decoder beside the layers.
UNMODELLED_METHODS = frozenset(("shadow",))
MODELLED_METHODS = frozenset(METHODS) - UNMODELLED_METHODS
# Methods that are modelled with every base and sharding, with PEFT's options as they are.
_PLAIN_METHODS = frozenset(("lora", "qlora", "rslora", "pissa", "freeze", "full"))

# PEFT's types that do not generate under TRL's trainer: their wrappers hand out no
# log-probabilities, or are told no row's task.
_UNTOLD_ROWS = frozenset(("ADAPTION_PROMPT", "POLY"))

# Settings that say what is trained beside the method's own.
_BESIDE = ("modules_to_save", "peft_config", "trainable_modules", "add_tokens", "train_tokens")

_OTHER_SHARDINGS = (("sharding", "fsdp"), ("sharding", "zero2"))

# Options of PEFT that change a step, and in which way is not modelled.
_UNMODELLED_OPTIONS = frozenset(
    (
        *("coft", "use_cayley_neumann", "num_cayley_neumann_terms", "apply_GS", "wavelet_family"),
        *("use_idwt", "topk", "decomposition_method", "act_fn", "depth", "init_weights", "mini_r"),
        *("hybrid_r", "config_A_B", "config_C", "config_D_E", "variant", "weight_tying"),
        *("psoft_orth", "psoft_mag_a", "psoft_mag_b", "orth_reg_weight", "stride_A"),
    )
)


def unmodelled(plan: TrainingPlan) -> str | None:
    """What the closed form does not model of `plan`, as the command line spells it; None where it
    models all."""
    if plan.method not in MODELLED_METHODS:
        return _spelled(plan, "method")
    return _unmodelled_together(plan) or _unmodelled_with_method(plan)


def _unmodelled_together(plan: TrainingPlan) -> str | None:
    """What is not modelled where parameters are divided, or with a base that came quantized."""
    if plan.quantization in PREQUANTIZED:
        beside = _spelled(plan, "quantization")
    elif plan.shards_parameters:
        beside = _spelled(plan, "sharding")
    else:
        return None
    if plan.method not in _PLAIN_METHODS:
        return f"{_spelled(plan, 'method')} with {beside}"
    for setting in _BESIDE:
        if getattr(plan, setting):
            return f"{_spelled(plan, setting)} with {beside}"
    return None


def _unmodelled_with_method(plan: TrainingPlan) -> str | None:
    """The same of settings that are modelled with some methods only."""
    quantized = plan.quantization != "none"
    if plan.resolved_objective.generates and _reads_ahead(plan):
        return f"{_spelled(plan, 'method')} with {_spelled(plan, 'objective')}"
    if plan.resolved_objective.generates and plan.method == "randlora" and quantized:
        # TRL holds the adapters in bfloat16 there and generates without autocast.
        return (
            f"{_spelled(plan, 'method')} of a quantized base with {_spelled(plan, 'objective')}, "
            "which meets its float32 matrices with bfloat16 adapters"
        )
    if plan.method == "poly" and plan.gradient_checkpointing:
        return "`--method poly` with checkpointing, in which PEFT loses the rows' tasks"
    if quantized and plan.trainer == "trl" and _computes_in_float16(plan):
        return (
            "`--dtype float16` without mixed precision beside a quantized base: TRL holds adapters "
            "in bfloat16, and torch computes with both in float32"
        )
    given = read_options(plan.peft_config)
    for name, value in given.items():
        if name in _UNMODELLED_OPTIONS or name.endswith("_dropout"):
            return f"`--peft-config {name}={value}`"
    saves = bool(plan.modules_to_save or given.get("modules_to_save"))
    if given.get("layers_to_transform") and (saves or given.get("bias", "none") != "none"):
        return "`--peft-config layers_to_transform=...` beside trained modules or biases"
    return None


def _computes_in_float16(plan: TrainingPlan) -> bool:
    return plan.dtype == "float16" and not plan.autocast


def _reads_ahead(plan: TrainingPlan) -> bool:
    """Whether the method puts prompts before a row, of which what is cached is not modelled, or
    does not generate."""
    options = plan.resolved_method.options(plan.method_settings)
    prompts = tokens_in_front(options) or keys_in_front(options)
    return bool(prompts) or options.peft_type in _UNTOLD_ROWS


def _unmodelled_with_model(plan: TrainingPlan, model: ModelSpec) -> str | None:
    beside = _not_gathered(model) if plan.sharding == "zero3" else None
    if beside is not None:
        return f"{_spelled(plan, 'sharding')} with {beside}"
    if plan.every_n_layers > 1 and (model.other_linears or model.other_parameters):
        # transformers counts the layers of a vision tower, which come first.
        return f"{_spelled(plan, 'every_n_layers')} with parts beside the decoder"
    if plan.quantization != "none" and any(map(_computes_every_expert, model.layer_counts)):
        # SequentialLlama4TextExperts (transformers 5.23, quantizers/base.py).
        return (
            f"{_spelled(plan, 'quantization')} of `{model.model_type}`, whose stacked experts "
            "transformers replaces by modules, which are then quantized"
        )
    beside = _not_cached(model, plan.max_length) if plan.resolved_objective.generates else None
    if beside is not None:
        return f"{_spelled(plan, 'objective')} with {beside}"
    if plan.method == "trainable-tokens" and model.tie_word_embeddings and plan.trainer == "trl":
        return (
            f"trained tokens of `{model.model_type}`, whose output projection TRL wants unadapted"
        )
    if plan.loss == "liger" and _trains_head_rows(plan, model):
        return f"{_spelled(plan, 'loss')} over trained rows of the output projection"
    if plan.method == "hira" and model.model_type in CONV1D_MODEL_TYPES:
        return f"`--method hira` on `{model.model_type}`"
    return None


def _trains_head_rows(plan: TrainingPlan, model: ModelSpec) -> bool:
    return plan.resolved_method.count(model, plan.method_settings).trains_head_rows


def _computes_every_expert(layer: Layer) -> bool:
    experts = layer.feed_forward.experts
    return experts is not None and experts.every_expert


def _not_gathered(model: ModelSpec) -> str | None:
    """What of a model ZeRO-3's gathering is not followed through."""
    if any(layer.feed_forward.experts for layer in model.layer_counts):
        return "experts"
    if any(layer.attention.latents for layer in model.layer_counts):
        return "latent attention"
    if model.other_parameters or model.other_linears:
        return "parts beside the decoder"
    return None


def _not_cached(model: ModelSpec, length: int) -> str | None:
    """Of which attention in rows of that length the cache of keys and values is not modelled."""
    attentions = [layer.attention for layer in model.layer_counts]
    if any(attention.latents for attention in attentions):
        return "latent attention"
    if any(attention.picks_heads for attention in attentions):
        return f"the attention of `{model.model_type}`"
    if any(window <= length for window in model.sliding_windows):
        return "a sliding window that is shorter than `--max-length`"
    return None


def _spelled(plan: TrainingPlan, setting: str) -> str:
    value = getattr(plan, setting)
    return f"`{flag_name(setting)} {','.join(value) if isinstance(value, tuple) else value}`"


def check_closed_form(plan: TrainingPlan, model: ModelSpec) -> None:
    """Raises InputError for a plan that only a dry run knows."""
    what = unmodelled(plan) or _unmodelled_with_model(plan, model)
    if what is not None:
        instead = " or ".join(_modelled_instead(plan, model))
        raise InputError(
            f"the closed form does not model {what}",
            "`ftplan estimate` with `--exact` carries out the step itself, on tensors without data"
            + (f"; what is modelled: {instead}" if instead else ""),
        )


def _modelled_instead(plan: TrainingPlan, model: ModelSpec) -> Iterator[str]:
    """The settings each of which, alone, makes of the plan one that is modelled."""
    base = "lora" if plan.quantization == "none" else "qlora"
    for setting, value in (("method", base), *_OTHER_SHARDINGS):
        if getattr(plan, setting) == value or (setting, plan.sharding) == ("sharding", "none"):
            continue
        options = () if setting == "method" else plan.peft_config
        try:
            other = plan.replace(**{setting: value, "peft_config": options})
            other.resolved_method.count(model, other.method_settings)
        except InputError:
            continue
        if not (unmodelled(other) or _unmodelled_with_model(other, model)):
            yield _spelled(other, setting)


def check_modelled_method(name: str) -> None:
    """Raises InputError for a method that only a dry run knows: no plan is made for it."""
    method = METHODS.get(name)
    if method is None:
        return
    if name in MODELLED_METHODS:
        return
    raise InputError(
        f"method `{name}` has no closed form",
        "`ftplan estimate MODEL --exact` carries out its step; to plan or launch, take "
        "another method",
    )
