"""The shape of a decoder-only language model, as a composition of blocks.

A model is embeddings, layers (attention, feed-forward, norms), a final norm and an output
projection. Every number ftplan prints about a model is counted on these blocks; `families.py`
builds them from a `config.json`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ftplan.planner.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """`count` parameters of one name and shape, such as `q_proj.weight`, out x in."""

    name: str
    shape: tuple[int, ...]
    count: int = 1

    @property
    def size(self) -> int:
        """Elements of one of them."""
        return math.prod(self.shape)

    @property
    def num_elements(self) -> int:
        """Elements of all of them."""
        return self.count * self.size


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """One linear module of a layer: `out_features x in_features` weights, and a bias or none.

    `name` is the module's own name (`q_proj`), the one that `target_modules` matches.
    """

    name: str
    in_features: int
    out_features: int
    bias: bool = False

    @property
    def num_weights(self) -> int:
        return self.in_features * self.out_features

    @property
    def num_parameters(self) -> int:
        return self.num_weights + (self.out_features if self.bias else 0)

    def parameters(self) -> Iterator[Parameter]:
        yield Parameter(name=f"{self.name}.weight", shape=(self.out_features, self.in_features))
        if self.bias:
            yield Parameter(name=f"{self.name}.bias", shape=(self.out_features,))


@dataclass(frozen=True, kw_only=True, slots=True)
class Norm:
    """A normalization over `width` values: RMSNorm, or LayerNorm (`kind`).

    `scaled`: it has a weight; `bias`: a bias besides. `scales_in_float32`: the weight multiplies
    the fp32 value, not its 16-bit copy; `offset`: it multiplies by one plus the weight (Gemma).
    """

    name: str
    width: int
    kind: str = "rms"
    scaled: bool = True
    bias: bool = False
    scales_in_float32: bool = False
    offset: bool = False

    def parameters(self) -> Iterator[Parameter]:
        if self.scaled:
            yield Parameter(name=f"{self.name}.weight", shape=(self.width,))
        if self.bias:
            yield Parameter(name=f"{self.name}.bias", shape=(self.width,))

    @property
    def num_parameters(self) -> int:
        return sum(p.num_elements for p in self.parameters())


@dataclass(frozen=True, kw_only=True, slots=True)
class Latent:
    """A projection through a narrow, normalized middle (DeepSeek's latent attention)."""

    down: Linear
    norm: Norm
    up: Linear


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Multi-head, grouped-query or latent attention.

    `inputs` are the projections that read the layer's input (separate q, k, v or one fused
    matrix, or what latent projections leave of them), `latents` those through a narrow middle,
    `output` the one that writes back. `query_norm` and `key_norm` normalize each head
    (`norm.width == head_dim`) or all of a token's queries and keys.
    `head_dim` is the width of a query or key head, `value_head_dim` that of a value head where
    it differs. `rotary_dim`: of those, how many are rotated; 0 for none.
    `rotary_concatenates`: rotation writes query and key anew head by head (Phi), so that
    attention's result must be copied into token order before its projection.
    `softcapped`: scores pass through a tanh before the softmax (Gemma 2). `sinks`: a learned score
    a head beside them (gpt-oss). `alibi`: scores get a distance-dependent bias (BLOOM).
    `sliding_window`: how many tokens back it sees; None for all.
    """

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    inputs: tuple[Linear, ...]
    output: Linear
    latents: tuple[Latent, ...] = ()
    value_head_dim: int | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    rotary_dim: int = 0
    rotary_concatenates: bool = False
    softcapped: bool = False
    sinks: bool = False
    alibi: bool = False
    sliding_window: int | None = None

    @property
    def rotary_joins(self) -> bool:
        """Rotation joins a turned part of each head and the rest to new tensors."""
        partial = 0 < self.rotary_dim < self.head_dim
        return partial or self.rotary_concatenates

    @property
    def is_fused(self) -> bool:
        """Query, key and value are views of one product's result."""
        return len(self.inputs) == 1

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def value_width(self) -> int:
        return self.num_key_value_heads * (self.value_head_dim or self.head_dim)

    @property
    def result_width(self) -> int:
        """Width of attention's result, which `output` reads."""
        return self.num_heads * (self.value_head_dim or self.head_dim)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its linear modules, in the order of the forward pass."""
        through = tuple(linear for latent in self.latents for linear in (latent.down, latent.up))
        return (*through, *self.inputs, self.output)

    @property
    def norms(self) -> tuple[Norm, ...]:
        own = (self.query_norm, self.key_norm, *(latent.norm for latent in self.latents))
        return tuple(norm for norm in own if norm is not None)

    def parameters(self) -> Iterator[Parameter]:
        for part in (*self.linears, *self.norms):
            yield from part.parameters()
        if self.sinks:
            yield Parameter(name="sinks", shape=(self.num_heads,))


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """The mixture around a feed-forward block.

    transformers 5 holds the experts' weights as stacked parameters (experts x out x in), not as
    modules, so that quantization and adapters for linear modules do not reach them.
    A shared expert is a `FeedForward` of its own, `shared`, behind `shared_gate` where it has one.
    `router` is the module that scores the experts;
    `router_is_linear`: `target_modules` and quantization take it for a linear module.
    `router_correction`: a buffer or parameter of one number an expert that shifts the scores;
    counted where it is a parameter.
    """

    num_experts: int
    num_experts_per_token: int
    router: Linear
    router_is_linear: bool = False
    router_correction: bool = False
    shared: FeedForward | None = None
    shared_gate: Linear | None = None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """What `target_modules` can name of it."""
        return (
            *((self.router,) if self.router_is_linear else ()),
            *(self.shared.linears if self.shared else ()),
            *((self.shared_gate,) if self.shared_gate else ()),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedForward:
    """A plain or gated feed-forward block, or a mixture of such blocks.

    `inputs` read the block's input: gate and up where `gated` (or both in one matrix), else one;
    `output` writes back. With `experts`, these are the shapes of one expert.
    `activation` is Hugging Face's name.
    """

    intermediate_size: int
    gated: bool
    inputs: tuple[Linear, ...]
    output: Linear
    activation: str = "silu"
    experts: Experts | None = None

    @property
    def matrices(self) -> tuple[Linear, ...]:
        """The matrices of one expert, or of the block where there is only one."""
        return (*self.inputs, self.output)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its linear modules, as `target_modules` can name them."""
        return self.experts.linears if self.experts else self.matrices

    @property
    def active_copies(self) -> int:
        """How many routed copies of the block each token passes through."""
        return self.experts.num_experts_per_token if self.experts else 1

    def parameters(self) -> Iterator[Parameter]:
        if self.experts is None:
            for linear in self.matrices:
                yield from linear.parameters()
            return
        experts = self.experts
        for linear in self.matrices:
            for one in linear.parameters():
                yield Parameter(name=one.name, shape=(experts.num_experts, *one.shape))
        yield from experts.router.parameters()
        if experts.router_correction:
            yield Parameter(name="e_score_correction_bias", shape=(experts.num_experts,))
        if experts.shared is not None:
            yield from experts.shared.parameters()
        if experts.shared_gate is not None:
            yield from experts.shared_gate.parameters()


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One decoder layer.

    Each norm stands before or behind its block, or is absent. `parallel`: attention and
    feed-forward read the layer's input side by side, and their results are added together;
    without `feed_forward_norm` both read the attention's norm.
    `scales_residual`: each block's result is multiplied before it is added (Granite).
    """

    attention: Attention
    feed_forward: FeedForward
    attention_norm: Norm | None = None
    post_attention_norm: Norm | None = None
    feed_forward_norm: Norm | None = None
    post_feed_forward_norm: Norm | None = None
    parallel: bool = False
    scales_residual: bool = False

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The norms over the hidden state."""
        places = (
            self.attention_norm,
            self.post_attention_norm,
            self.feed_forward_norm,
            self.post_feed_forward_norm,
        )
        return tuple(norm for norm in places if norm is not None)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linear modules of the layer, as `target_modules` can name them."""
        return (*self.attention.linears, *self.feed_forward.linears)

    def parameters(self) -> Iterator[Parameter]:
        yield from self.attention.parameters()
        yield from self.feed_forward.parameters()
        for norm in self.norms:
            yield from norm.parameters()

    @property
    def num_parameters(self) -> int:
        return sum(p.num_elements for p in self.parameters())

    @property
    def quantizable_weights(self) -> int:
        """Weights that 4- and 8-bit loading quantizes: bitsandbytes replaces linear modules."""
        return sum(linear.num_weights for linear in self.linears)


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelSpec:
    """Everything about a model's shape that memory and time depend on.

    `layers`, first to last; equal ones are best the same object. `positions`: rows of a learned
    position table. `embedding_norm` follows the embeddings (BLOOM). `embedding_linears` stand
    between embeddings and layers or layers and head (opt-350m's projections).
    `scales_embeddings`, `scales_logits`: multiplied by a constant. `final_logit_softcapping`:
    logits pass through a tanh. `supports_sdpa`: transformers has torch's own attention kernel for
    the architecture. `other_parameters`: what is loaded along and has no part in a text's forward
    pass, such as a vision tower. `code`: `transformers`, or `remote` where only the repository's
    own code runs it.
    `approximate`: why the shape is a stand-in (a bare size was given); None for a real model.
    """

    name: str
    architecture: str
    model_type: str
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    tie_word_embeddings: bool = False
    lm_head_bias: bool = False
    embedding_width: int | None = None
    embedding_norm: Norm | None = None
    embedding_linears: tuple[Linear, ...] = ()
    scales_embeddings: bool = False
    scales_logits: bool = False
    positions: int = 0
    supports_sdpa: bool = True
    final_logit_softcapping: bool = False
    other_parameters: tuple[Parameter, ...] = ()
    code: str = "transformers"
    native_dtype: str = "bfloat16"
    approximate: str | None = None

    def __post_init__(self) -> None:
        for field in ("hidden_size", "vocab_size", "max_position_embeddings"):
            if getattr(self, field) < 1:
                raise InputError(f"model `{self.name}`: `{field}` must be at least 1")
        if not self.layers:
            raise InputError(f"model `{self.name}`: `num_hidden_layers` must be at least 1")

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def layer_counts(self) -> dict[Layer, int]:
        """Each kind of layer and how many there are, in the order of their first place."""
        by_object = Counter(id(layer) for layer in self.layers)
        distinct = {id(layer): layer for layer in self.layers}
        counts: dict[Layer, int] = {}
        for key, layer in distinct.items():
            counts[layer] = counts.get(layer, 0) + by_object[key]
        return counts

    @cached_property
    def embedding_parameters(self) -> int:
        """Token embeddings (shared with the output projection when tied)."""
        return self.vocab_size * (self.embedding_width or self.hidden_size)

    @property
    def lm_head_parameters(self) -> int:
        """Parameters of the output projection that are not shared with the embeddings."""
        own = 0 if self.tie_word_embeddings else self.embedding_parameters
        return own + (self.vocab_size if self.lm_head_bias else 0)

    @cached_property
    def outer_parameters(self) -> tuple[Parameter, ...]:
        """Parameters outside of the layers, tied ones once."""
        width = self.embedding_width or self.hidden_size
        found = [Parameter(name="embed_tokens.weight", shape=(self.vocab_size, width))]
        if self.positions:
            found.append(Parameter(name="wpe.weight", shape=(self.positions, self.hidden_size)))
        for part in (self.embedding_norm, *self.embedding_linears, self.final_norm):
            found += part.parameters() if part is not None else ()
        if not self.tie_word_embeddings:
            found.append(Parameter(name="lm_head.weight", shape=(self.vocab_size, width)))
        if self.lm_head_bias:
            found.append(Parameter(name="lm_head.bias", shape=(self.vocab_size,)))
        return (*found, *self.other_parameters)

    @cached_property
    def num_parameters(self) -> int:
        """Exact parameter count, tied embeddings once; equal to what transformers builds."""
        layers = sum(count * layer.num_parameters for layer, count in self.layer_counts.items())
        return layers + sum(p.num_elements for p in self.outer_parameters)

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """The linear modules of all kinds of layers, each kind once, as `target_modules` can name
        them."""
        return tuple(linear for layer in self.layer_counts for linear in layer.linears)

    @cached_property
    def quantizable_weights(self) -> int:
        """Weights that 4- and 8-bit loading quantizes: the linear modules of the layers.

        Embeddings, the output projection and the norms keep their dtype, and so do routers
        and stacked experts (bitsandbytes replaces linear modules only).
        """
        counts = self.layer_counts.items()
        return sum(count * layer.quantizable_weights for layer, count in counts)
