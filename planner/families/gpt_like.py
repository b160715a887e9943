"""Readers for the generation of GPT-2: plain feed-forward blocks, LayerNorm, biases."""

from __future__ import annotations

from typing import Any

from msgspec import structs

from ftplan.planner.families.blocks import (
    Reader,
    decoder,
    equal_layers,
    layer_norm,
    layers_of_kinds,
    placed,
    plain,
    separate_attention,
)
from ftplan.planner.families.fields import (
    Config,
    FieldError,
    count,
    divided_head_dim,
    flag,
    head_dim,
    optional_count,
    refuse_dropout,
    rotary_dim,
    share,
    text,
)
from ftplan.planner.model_spec import Attention, Layer, Linear, ModelSpec, Norm


def _with_usual_names(config: Config, own: dict[str, str]) -> Config:
    """The config with its sizes under the names that most families use; `own`: theirs for them."""
    return {**config, **{usual: count(config, name) for usual, name in own.items()}}


_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}


def gpt2(config: Config, name: str) -> ModelSpec:
    width = divided_head_dim(config, "n_embd", "n_head")
    if config.get("add_cross_attention"):
        raise FieldError("has `add_cross_attention`: the decoder half of an encoder-decoder")
    config = _with_usual_names(config, _GPT2_NAMES)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    attention = Attention(
        num_heads=heads,
        num_key_value_heads=heads,
        head_dim=width,
        inputs=(_linear("c_attn", hidden, 3 * hidden, transposed=True),),
        output=_linear("c_proj", hidden, hidden, transposed=True),
        dropout=share(config, "attn_pdrop"),
        softmax_keeps_dtype=True,
    )
    intermediate = optional_count(config, "n_inner") or 4 * hidden
    layer = Layer(
        attention=attention,
        feed_forward=plain(
            hidden,
            intermediate,
            ("c_fc", "c_proj"),
            text(config, "activation_function"),
            transposed=True,
        ),
        dropout=share(config, "resid_pdrop"),
        holds=("attended",),
        **placed(config, _GPT2_NORMS, layer_norm),
    )
    return _gpt2_decoder(config, name, "GPT2LMHeadModel", equal_layers(config, layer))


_GPT2_NORMS = {"attention_norm": "ln_1", "feed_forward_norm": "ln_2"}


def _linear(
    name: str, in_features: int, out_features: int, *, bias: bool = True, **more: Any
) -> Linear:
    return Linear(name=name, in_features=in_features, out_features=out_features, bias=bias, **more)


def _gpt2_decoder(
    config: Config, name: str, default_class: str, layers: tuple[Layer, ...], **more: Any
) -> ModelSpec:
    """With a learned position for each token of the context, unless `more` says otherwise."""
    fields = {
        "final_norm": layer_norm("ln_f", config["hidden_size"]),
        "positions": count(config, "max_position_embeddings"),
        "embedding_dropout": share(config, "embd_pdrop"),
    }
    return decoder(config, name, default_class, layers, **{**fields, **more})


def gpt_bigcode(config: Config, name: str) -> ModelSpec:
    width = divided_head_dim(config, "n_embd", "n_head")
    config = _with_usual_names(config, _GPT2_NAMES)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = 1 if flag(config, "multi_query") else heads
    attention = Attention(
        num_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width,
        inputs=(_linear("c_attn", hidden, hidden + 2 * kv_heads * width),),
        output=_linear("c_proj", hidden, hidden),
        dropout=share(config, "attn_pdrop"),
    )
    intermediate = optional_count(config, "n_inner") or 4 * hidden
    layer = Layer(
        attention=attention,
        feed_forward=plain(
            hidden, intermediate, ("c_fc", "c_proj"), text(config, "activation_function")
        ),
        dropout=share(config, "resid_pdrop"),
        holds=("attended",),
        **placed(config, _GPT2_NORMS, layer_norm),
    )
    layers = equal_layers(config, layer)
    masks = config["max_position_embeddings"] ** 2  # of one byte, `GPTBigCodeModel.bias`
    return _gpt2_decoder(config, name, "GPTBigCodeForCausalLM", layers, buffer_bytes=masks)


def gpt_neo(config: Config, name: str) -> ModelSpec:
    divided_head_dim(config, "hidden_size", "num_heads")
    config = _with_usual_names(
        config, {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}
    )
    hidden = count(config, "hidden_size")
    config = {**config, "embd_pdrop": share(config, "embed_dropout")}
    intermediate = optional_count(config, "intermediate_size") or 4 * hidden

    def build(kind: str) -> Layer:
        attention = separate_attention(
            config,
            input_bias=False,
            output_bias=True,
            output_name="out_proj",
            rotary_dim=0,
            scores_in_float32=True,
            sliding_window=count(config, "window_size") if kind == "local" else None,
        )
        return Layer(
            attention=attention,
            feed_forward=plain(
                hidden, intermediate, ("c_fc", "c_proj"), text(config, "activation_function")
            ),
            dropout=share(config, "resid_dropout"),
            holds=("attended", "weights"),
            **placed(config, _GPT2_NORMS, layer_norm),
        )

    layers = layers_of_kinds(_gpt_neo_kinds(config), build)
    # Each layer has a mask of its own, of one byte (`GPTNeoSelfAttention.bias`).
    masks = len(layers) * count(config, "max_position_embeddings") ** 2
    return _gpt2_decoder(
        config, name, "GPTNeoForCausalLM", layers, supports_sdpa=False, buffer_bytes=masks
    )


def _gpt_neo_kinds(config: Config) -> list[str]:
    """`attention_types`, such as [[["global", "local"], 12]], layer by layer."""
    said = config.get("attention_types", [[["global", "local"], 12]])
    try:
        kinds = [kind for pattern, times in said for _ in range(times) for kind in pattern]
    except (TypeError, ValueError):
        kinds = []
    depth = count(config, "num_hidden_layers")
    if len(kinds) != depth or not set(kinds) <= {"global", "local"}:
        raise FieldError(
            f"has `attention_types`: {said!r}, where {depth} layers, `global` or `local`, are "
            "needed"
        )
    return kinds


def gptj(config: Config, name: str) -> ModelSpec:
    width = divided_head_dim(config, "n_embd", "n_head")
    config = _with_usual_names(config, _GPT2_NAMES)
    hidden = config["hidden_size"]
    intermediate = optional_count(config, "n_inner") or 4 * hidden
    rotated = optional_count(config, "rotary_dim")
    # Each layer has fp32 tables of its own (`GPTJAttention.embed_positions`).
    tables = 4 * config["max_position_embeddings"] * (rotated or hidden)
    layer = Layer(
        attention=separate_attention(
            {**config, "attention_dropout": share(config, "attn_pdrop")},
            input_bias=False,
            output_bias=False,
            output_name="out_proj",
            rotary_dim=rotated or width,
            scores_in_float32=True,
            rotary_kind="pairs",
        ),
        feed_forward=plain(
            hidden, intermediate, ("fc_in", "fc_out"), text(config, "activation_function")
        ),
        attention_norm=layer_norm("ln_1", hidden),
        parallel=True,
        dropout=share(config, "resid_pdrop"),
        holds=("weights",),
    )
    return _gpt2_decoder(
        config,
        name,
        "GPTJForCausalLM",
        equal_layers(config, layer),
        positions=0,
        buffer_bytes=config["num_hidden_layers"] * tables,
        lm_head_bias=True,
        supports_sdpa=False,
    )


def gpt_neox(config: Config, name: str) -> ModelSpec:
    width = divided_head_dim(config, "hidden_size", "num_attention_heads")
    hidden, heads = count(config, "hidden_size"), count(config, "num_attention_heads")
    bias = flag(config, "attention_bias")
    attention = Attention(
        num_heads=heads,
        num_key_value_heads=heads,
        head_dim=width,
        inputs=(_linear("query_key_value", hidden, 3 * hidden, bias=bias),),
        output=_linear("dense", hidden, hidden, bias=bias),
        rotary_dim=rotary_dim(config, width),
        rotary_concatenates=True,
        dropout=share(config, "attention_dropout"),
    )
    layer = Layer(
        attention=attention,
        feed_forward=plain(
            hidden,
            count(config, "intermediate_size"),
            ("dense_h_to_4h", "dense_4h_to_h"),
            text(config, "hidden_act"),
        ),
        parallel=flag(config, "use_parallel_residual"),
        dropout=share(config, "hidden_dropout"),
        **placed(config, norm=layer_norm),
    )
    return decoder(
        config,
        name,
        "GPTNeoXForCausalLM",
        equal_layers(config, layer),
        final_norm=layer_norm("final_layer_norm", hidden),
        embedding_dropout=share(config, "hidden_dropout"),
    )


def phi(config: Config, name: str) -> ModelSpec:
    hidden, width = count(config, "hidden_size"), head_dim(config)
    norms: dict[str, Any] = {}
    if flag(config, "qk_layernorm"):
        norms = {
            "query_norm": layer_norm("q_layernorm", width),
            "key_norm": layer_norm("k_layernorm", width),
        }
    layer = Layer(
        attention=separate_attention(
            config,
            input_bias=True,
            output_bias=True,
            output_name="dense",
            rotary_dim=rotary_dim(config, width),
            rotary_concatenates=True,
            **norms,
        ),
        feed_forward=plain(
            hidden,
            count(config, "intermediate_size"),
            ("fc1", "fc2"),
            text(config, "hidden_act"),
        ),
        attention_norm=layer_norm("input_layernorm", hidden),
        parallel=True,
        dropout=share(config, "resid_pdrop"),
    )
    return decoder(
        config,
        name,
        "PhiForCausalLM",
        equal_layers(config, layer),
        final_norm=layer_norm("final_layernorm", hidden),
        embedding_dropout=share(config, "embd_pdrop"),
        lm_head_bias=True,
    )


def opt(config: Config, name: str) -> ModelSpec:
    divided_head_dim(config, "hidden_size", "num_attention_heads")
    refuse_dropout(config, "layerdrop")
    hidden, width = count(config, "hidden_size"), optional_count(config, "word_embed_proj_dim")
    bias, scaled = flag(config, "enable_bias"), flag(config, "layer_norm_elementwise_affine")
    before = flag(config, "do_layer_norm_before")

    def norm(norm_name: str, norm_width: int) -> Norm:
        return Norm(name=norm_name, width=norm_width, kind="layer", scaled=scaled, bias=scaled)

    prefix = "" if before else "post_"
    names = {
        f"{prefix}attention_norm": "self_attn_layer_norm",
        f"{prefix}feed_forward_norm": "final_layer_norm",
    }
    layer = Layer(
        attention=separate_attention(
            config,
            input_bias=bias,
            output_bias=bias,
            output_name="out_proj",
            rotary_dim=0,
            scales_query=True,
        ),
        feed_forward=plain(
            hidden,
            count(config, "ffn_dim"),
            ("fc1", "fc2"),
            text(config, "activation_function"),
            bias=bias,
        ),
        normalizes_sums=not before,
        feeds_by_itself=True,
        dropout=share(config, "dropout"),
        **placed(config, names, norm),
    )
    is_projected = width is not None and width != hidden
    has_final_norm = before and not flag(config, "_remove_final_layer_norm")
    layers = equal_layers(config, layer)
    if not bias and not scaled and flag(config, "tie_word_embeddings"):
        layers = (*layers[:-1], _without_quantized_output(layer))
    return decoder(
        config,
        name,
        "OPTForCausalLM",
        layers,
        final_norm=norm("final_layer_norm", hidden) if has_final_norm else None,
        embedding_width=width if is_projected else None,
        embedding_linears=_opt_projections(hidden, width) if width and is_projected else (),
        # The table begins with two rows that no token uses.
        positions=count(config, "max_position_embeddings") + 2,
        counts_positions=True,
    )


def _without_quantized_output(layer: Layer) -> Layer:
    """transformers quantizes no module that holds a model's last parameter: Galactica's `fc2`."""
    block = layer.feed_forward
    kept = structs.replace(block.output, quantizable=False)
    return structs.replace(layer, feed_forward=structs.replace(block, output=kept))


def _opt_projections(hidden: int, width: int) -> tuple[Linear, Linear]:
    return (
        Linear(name="project_in", in_features=width, out_features=hidden),
        Linear(name="project_out", in_features=hidden, out_features=width),
    )


def bloom(config: Config, name: str) -> ModelSpec:
    if flag(config, "apply_residual_connection_post_layernorm"):
        raise FieldError(
            "has `apply_residual_connection_post_layernorm`, which the closed form does not model"
        )
    if flag(config, "slow_but_exact"):
        raise FieldError("has `slow_but_exact`, which the closed form does not model")
    width = divided_head_dim(config, "hidden_size", "n_head")
    hidden, heads = count(config, "hidden_size"), count(config, "n_head")
    # Positions are distances: the file says what the model was trained with, if anything.
    context = optional_count(config, "seq_length") or _BLOOM_CONTEXT
    config = {
        **_with_usual_names(config, {"num_hidden_layers": "n_layer"}),
        "max_position_embeddings": context,
    }
    attention = Attention(
        num_heads=heads,
        num_key_value_heads=heads,
        head_dim=width,
        inputs=(_linear("query_key_value", hidden, 3 * hidden),),
        output=_linear("dense", hidden, hidden),
        alibi=True,
        dropout=share(config, "attention_dropout"),
    )
    names = ("dense_h_to_4h", "dense_4h_to_h")
    layer = Layer(
        attention=attention,
        feed_forward=plain(hidden, 4 * hidden, names, "bloom_gelu"),
        dropout=share(config, "hidden_dropout"),
        holds=("weights",),
        **placed(config, norm=layer_norm),
    )
    return decoder(
        config,
        name,
        "BloomForCausalLM",
        equal_layers(config, layer),
        embedding_norm=layer_norm("word_embeddings_layernorm", hidden),
        final_norm=layer_norm("ln_f", hidden),
        supports_sdpa=False,
    )


# Tokens that BLOOM was trained with: arXiv 2211.05100, table 3.
_BLOOM_CONTEXT = 2048


GPT_LIKE: dict[str, Reader] = {
    "bloom": bloom,
    "gpt2": gpt2,
    "gpt_bigcode": gpt_bigcode,
    "gpt_neo": gpt_neo,
    "gpt_neox": gpt_neox,
    "gptj": gptj,
    "opt": opt,
    "phi": phi,
}
