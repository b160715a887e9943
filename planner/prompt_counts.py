"""What is added to a model by the methods that do not adapt its linear modules: prompts, tokens,
norms, bottlenecks and a network beside it. PEFT 0.21 builds all but the bottlenecks.
"""

from __future__ import annotations

from msgspec import structs

from ftplan.planner.adapter_counts import tokens_of, with_copies
from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.model_spec import ModelSpec, Norm, Parameter
from ftplan.planner.peft_options import PeftOptions
from ftplan.planner.trained import (
    MethodSettings,
    Tally,
    Trained,
    embedding_name,
)

# Of LLaMA's 32 layers the topmost 30 have prompts (Zhang et al. 2023, arXiv 2303.16199).
ADAPTION_PROMPT_LAYERS = 30
ADAPTION_PROMPT_MODEL_TYPES = ("gpt2", "llama", "mistral")

# Configurations without `num_key_value_heads`, from which PEFT then takes a row of every head.
_WITHOUT_KEY_VALUE_HEADS = ("falcon",)

# PEFT's own targets of LayerNorm tuning: `TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING`
# of peft/utils/constants.py, for decoders.
_LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
_GEMMA2_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "norm",
)
NORM_TARGETS: dict[str, tuple[str, ...]] = {
    "bloom": ("input_layernorm", "post_attention_layernorm", "ln_f"),
    "falcon": ("input_layernorm", "post_attention_layernorm", "ln_f"),
    "gemma": _LLAMA_NORMS,
    "gemma2": _GEMMA2_NORMS,
    "gemma3_text": _GEMMA2_NORMS,
    "gpt2": ("ln_1", "ln_2", "ln_f"),
    "gptj": ("ln_1", "ln_f"),
    "llama": _LLAMA_NORMS,
    "mistral": _LLAMA_NORMS,
    "phi": ("input_layernorm", "final_layernorm"),
    "qwen2": ("post_attention_layernorm",),
    "qwen3": ("post_attention_layernorm",),
}


def prompt_count(model: ModelSpec, settings: MethodSettings, options: PeftOptions) -> Trained:
    """Embeddings in front of the input: Lester et al. 2021 (arXiv 2104.08691)."""
    tokens = options.count("num_virtual_tokens")
    return _prompt(model, options, embedding=(tokens, model.hidden_size))


def p_tuning_count(model: ModelSpec, settings: MethodSettings, options: PeftOptions) -> Trained:
    """The embeddings, and a network that makes the prompt of them: three linear modules, or an LSTM
    in both directions and two of them (peft/tuners/p_tuning/model.py)."""
    kind = options.one_of("encoder_reparameterization_type", "MLP", "LSTM")
    tokens, width = options.count("num_virtual_tokens"), model.hidden_size
    inner = options.optional_count("encoder_hidden_size", width)
    shapes: dict[str, tuple[int, ...]] = {"embedding": (tokens, width)}
    sides = [(width, inner), (inner, inner), (inner, width)]
    if kind == "LSTM":
        shapes |= _lstm_shapes(width, inner, options.count("encoder_num_layers"))
        sides = [(2 * inner, 2 * inner), (2 * inner, width)]
    for place, (into, out) in enumerate(sides):
        shapes[f"mlp_head.{2 * place}.weight"] = (out, into)
        shapes[f"mlp_head.{2 * place}.bias"] = (out,)
    return _prompt(model, options, **shapes)


def _lstm_shapes(into: int, inner: int, layers: int) -> dict[str, tuple[int, ...]]:
    """torch.nn.LSTM's parameters in both directions: those of four gates together."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        for direction in ("", "_reverse"):
            end = f"l{layer}{direction}"
            shapes[f"lstm_head.weight_ih_{end}"] = (4 * inner, 2 * inner if layer else into)
            shapes[f"lstm_head.weight_hh_{end}"] = (4 * inner, inner)
            shapes[f"lstm_head.bias_ih_{end}"] = (4 * inner,)
            shapes[f"lstm_head.bias_hh_{end}"] = (4 * inner,)
    return shapes


def multitask_prompt_count(
    model: ModelSpec, settings: MethodSettings, options: PeftOptions
) -> Trained:
    """A shared prompt, and for each task a column and a row whose product changes it."""
    tokens, width = options.count("num_virtual_tokens"), model.hidden_size
    tasks, ranks = options.count("num_tasks"), options.count("num_ranks")
    return _prompt(
        model,
        options,
        embedding=(tokens, width),
        prefix_task_cols=(tasks, tokens, ranks),
        prefix_task_rows=(tasks, ranks, width),
    )


def prefix_count(model: ModelSpec, settings: MethodSettings, options: PeftOptions) -> Trained:
    """Keys and values in front of those of each layer: Li and Liang 2021 (arXiv 2101.00190).

    With `prefix_projection`, a network that makes them.
    """
    tokens, width = options.count("num_virtual_tokens"), _key_width(model, options)
    all_layers = 2 * model.num_hidden_layers * width
    if not options.flag("prefix_projection"):
        return _prompt(model, options, embedding=(tokens, all_layers))
    inner = options.optional_count("encoder_hidden_size", width)
    shapes = {
        "embedding": (tokens, width),
        "transform.0.weight": (inner, width),
        "transform.0.bias": (inner,),
        "transform.2.weight": (all_layers, inner),
        "transform.2.bias": (all_layers,),
    }
    return _prompt(model, options, **shapes)


def cartridge_count(model: ModelSpec, settings: MethodSettings, options: PeftOptions) -> Trained:
    """A key-value cache, the first tokens of which stay as they are."""
    tokens, kept = (
        options.count("num_virtual_tokens"),
        options.count("num_frozen_tokens", least=0),
    )
    if kept > tokens:
        raise options.refused("num_frozen_tokens", f"there are {tokens} tokens only")
    width = 2 * model.num_hidden_layers * _key_width(model, options)
    trained = _prompt(model, options, trainable_embedding=(tokens - kept, width))
    if kept == 0:
        return trained
    frozen = Parameter(name="prompt_encoder.frozen_embedding", shape=(kept, width))
    return structs.replace(trained, frozen=(frozen,))


def _key_width(model: ModelSpec, options: PeftOptions) -> int:
    """The width of a token's keys, as PEFT reads it off the configuration."""
    attentions = {layer.attention for layer in model.layer_counts}
    widths = {a.key_width for a in attentions}
    unlike = any(a.latents or a.value_width != a.key_width for a in attentions)
    if len(widths) > 1 or unlike:
        raise InputError(
            f"method `{options.method}` puts keys and values of one width before each layer's, "
            f"and those of {model.name} have several",
            "use `--method prompt-tuning` or `--method lora`",
        )
    if model.model_type in _WITHOUT_KEY_VALUE_HEADS:
        return model.hidden_size
    return widths.pop()


def _prompt(model: ModelSpec, options: PeftOptions, **shapes: tuple[int, ...]) -> Trained:
    added = tuple(
        Parameter(name=f"prompt_encoder.{name}", shape=shape) for name, shape in shapes.items()
    )
    tokens = options.count("num_virtual_tokens")
    return with_copies(model, options, Trained(adapters=added, num_virtual_tokens=tokens))


def adaption_prompt_count(
    model: ModelSpec, settings: MethodSettings, options: PeftOptions
) -> Trained:
    """Prompts and a gate in the last layers: Zhang et al. 2023 (arXiv 2303.16199)."""
    if model.model_type not in ADAPTION_PROMPT_MODEL_TYPES:
        raise InputError(
            f"PEFT has method `{options.method}` for {', '.join(ADAPTION_PROMPT_MODEL_TYPES)}, "
            f"not for `{model.model_type}`",
            "use `--method prefix-tuning` or `--method lora`",
        )
    deep = model.num_hidden_layers
    layers = options.optional_count("adapter_layers", min(ADAPTION_PROMPT_LAYERS, deep))
    if layers > deep:
        raise options.refused("adapter_layers", f"{model.name} has {deep} layers")
    prompt = (1, options.count("adapter_len"), model.hidden_size)
    return Trained(
        held_as_base=(
            Parameter(name="adaption_prompt", shape=prompt, count=layers),
            Parameter(name="adaption_gate", shape=(1,), count=layers),
        ),
        adapted_layers=tuple(range(deep - layers, deep)),
    )


def tokens_count(model: ModelSpec, settings: MethodSettings, options: PeftOptions) -> Trained:
    """The embeddings of some tokens, beside the frozen others."""
    tokens = options.numbers("token_indices")
    if not tokens:
        raise options.refused("token_indices", "a list of tokens is needed")
    trained, original = tokens_of(model, len(tokens), embedding_name(model))
    return Trained(
        adapters=(trained,),
        frozen=(original,),
        num_trained_tokens=len(tokens),
        trains_head_rows=model.tie_word_embeddings and not model.scores,
    )


def norms_count(model: ModelSpec, settings: MethodSettings, options: PeftOptions) -> Trained:
    """Copies of norms: Zhao et al. 2023 (arXiv 2312.11420)."""
    named = options.names("target_modules")
    targets = named or NORM_TARGETS.get(model.model_type)
    if targets is None:
        raise InputError(
            f"PEFT has no norms of its own for method `{options.method}` on `{model.model_type}`",
            "name some with `--peft-config target_modules=[...]`, or use `--method lora`",
        )
    inside = [
        (norm, times)
        for layer, times in model.layer_counts.items()
        for norm in (*layer.norms, *layer.attention.norms)
    ]
    outside = [(norm, 1) for norm in (model.embedding_norm, model.final_norm) if norm]
    known = {norm.name for norm, _ in inside + outside}
    for name in named or ():
        if name not in known:
            raise UnknownNameError("norm", name, known)
    tally = Tally()
    for norm, times in inside + outside:
        if norm.name in targets:
            tally.add(_tuned(norm), times)
    within = any(norm.name in targets for norm, _ in inside)
    layers = tuple(range(model.num_hidden_layers)) if within else ()
    return with_copies(
        model, options, Trained(held_as_base=tally.parameters(), adapted_layers=layers)
    )


def _tuned(norm: Norm) -> list[Parameter]:
    """The copy of a norm: `norm.ln_tuning_layers.weight`."""
    return [
        structs.replace(p, name=p.name.replace(".", ".ln_tuning_layers."))
        for p in norm.parameters()
    ]


def bottleneck_count(model: ModelSpec, settings: MethodSettings, options: PeftOptions) -> Trained:
    """Two small networks a layer, behind attention and feed-forward: down to `lora_rank` numbers
    a token, up again, with biases; 2 r d + d + r numbers each.

    Houlsby et al. 2019 (arXiv 1902.00751), section 2.1; norms and head stay as they are.
    """
    layers, wide, narrow = model.num_hidden_layers, model.hidden_size, settings.lora_rank
    shapes: dict[str, tuple[int, ...]] = {
        "down.weight": (narrow, wide),
        "down.bias": (narrow,),
        "up.weight": (wide, narrow),
        "up.bias": (wide,),
    }
    return Trained(
        adapters=tuple(
            Parameter(name=f"bottleneck.{name}", shape=shape, count=2 * layers)
            for name, shape in shapes.items()
        ),
        adapted_layers=tuple(range(layers)),
        rank=narrow,
    )


def shadow_count(model: ModelSpec, settings: MethodSettings, options: PeftOptions) -> Trained:
    """A shallow copy of the decoder beside it, and what joins the two at each layer."""
    wide, narrow = model.hidden_size, options.count("r")
    inner = options.optional_count("update_hidden_size", narrow)
    shapes: dict[str, tuple[int, ...]] = {
        "shadow_down.weight": (narrow, wide),
        "shadow_up.weight": (wide, narrow),
    }
    for part in ("shadow_update_transform", "shadow_update_gate"):
        shapes |= {
            f"{part}.0.weight": (inner, wide),
            f"{part}.0.bias": (inner,),
            f"{part}.2.weight": (wide, inner),
            f"{part}.2.bias": (wide,),
        }
    deep, network = model.num_hidden_layers, Tally()
    network.add(_shadow(model, options))
    trained = Trained(
        adapters=tuple(
            Parameter(name=name, shape=shape, count=deep) for name, shape in shapes.items()
        ),
        held_as_base=network.parameters(),
        adapted_layers=tuple(range(deep)),
        rank=narrow,
    )
    return with_copies(model, options, trained)


def _shadow(model: ModelSpec, options: PeftOptions) -> list[Parameter]:
    """The first layers and what surrounds them, but for the head; the embeddings are the
    decoder's own where PEFT finds them by the name `embed_tokens`."""
    layers = options.optional_count("shadow_num_hidden_layers", 1)
    if layers > model.num_hidden_layers or model.other_parameters:
        raise options.refused("shadow_num_hidden_layers", f"{model.name} has no such decoder")
    shares = options.flag("share_embeddings") and embedding_name(model) == "embed_tokens"
    left_out = {"lm_head.weight", "lm_head.bias", *(["embed_tokens.weight"] if shares else [])}
    found = [p for layer in model.layers[:layers] for p in layer.parameters()]
    found += [p for p in model.outer_parameters if p.name not in left_out]
    return [structs.replace(p, name=f"shadow_backbone.{p.name}") for p in found]
