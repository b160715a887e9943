"""The shape of a decoder-only language model, as a composition of blocks.

A model is embeddings, layers (attention, feed-forward, norms), a final norm and an output
projection. Every number ftplan prints about a model is counted on these blocks; `families.py`
builds them from a `config.json`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from functools import cached_property
from typing import Any, Literal, TypeVar

from msgspec import Struct

from ftplan.planner.errors import InputError

Known = TypeVar("Known")

# What one of several GPUs has of a divided matrix: columns, outputs; rows, inputs.
Parallel = Literal["colwise", "rowwise"]


class Parameter(Struct, frozen=True, kw_only=True):
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


class Linear(Struct, frozen=True, kw_only=True):
    """One linear module of a layer: `out_features x in_features` weights, and a bias or none.

    `name` is the module's own name (`q_proj`), the one that `target_modules` matches.
    `transposed`: the weight is held as `in_features x out_features` (GPT-2's Conv1D).
    `quantizable`: its class is torch's own or Conv1D; bitsandbytes leaves classes derived from
    them alone (Falcon's, some routers'), which `target_modules` can name all the same.
    `multiplies_transposed`: it multiplies with a view of its weight and adds its bias behind, an
    operation each (FalconLinear).
    `parallel`: it is one GPU's part of a matrix that several divide (`tensor_parallel.py`).
    """

    name: str
    in_features: int
    out_features: int
    bias: bool = False
    transposed: bool = False
    quantizable: bool = True
    multiplies_transposed: bool = False
    parallel: Parallel | None = None

    @property
    def num_weights(self) -> int:
        return self.in_features * self.out_features

    @property
    def weight_shape(self) -> tuple[int, int]:
        if self.transposed:
            return (self.in_features, self.out_features)
        return (self.out_features, self.in_features)

    @property
    def num_parameters(self) -> int:
        return self.num_weights + (self.out_features if self.bias else 0)

    def parameters(self) -> Iterator[Parameter]:
        yield Parameter(name=f"{self.name}.weight", shape=self.weight_shape)
        if self.bias:
            yield Parameter(name=f"{self.name}.bias", shape=(self.out_features,))


class Norm(Struct, frozen=True, kw_only=True):
    """A normalization over `width` values.

    `kind`: `rms`; `layer`, torch's own LayerNorm; `centered`, a LayerNorm without bias that is
    written out in fp32 (Cohere).
    `scaled`: it has a weight; `bias`: a bias besides. `scales_in_float32`: the weight multiplies
    the fp32 value, not its 16-bit copy; `offset`: it multiplies by one plus the weight (Gemma).
    `computes_in_float32`: a `layer` norm over an fp32 copy of its input (OLMo).
    `num_heads`: rows of the weight, one for each head (Cohere). `copies`: modules side by side,
    one for each head (StableLM 2).
    """

    name: str
    width: int
    kind: str = "rms"
    scaled: bool = True
    bias: bool = False
    scales_in_float32: bool = False
    offset: bool = False
    computes_in_float32: bool = False
    num_heads: int | None = None
    copies: int = 1

    def parameters(self) -> Iterator[Parameter]:
        shape = (self.width,) if self.num_heads is None else (self.num_heads, self.width)
        if self.scaled:
            yield Parameter(name=f"{self.name}.weight", shape=shape, count=self.copies)
        if self.bias:
            yield Parameter(name=f"{self.name}.bias", shape=shape, count=self.copies)

    @property
    def num_parameters(self) -> int:
        return sum(p.num_elements for p in self.parameters())


class Latent(Struct, frozen=True, kw_only=True):
    """A projection through a narrow, normalized middle (DeepSeek's latent attention).

    What `down` writes beyond the norm's width goes past it: the part of the keys that all heads
    share and that is rotated.
    """

    down: Linear
    norm: Norm
    up: Linear


class Attention(Struct, frozen=True, kw_only=True):
    """Multi-head, grouped-query or latent attention.

    `inputs` are the projections that read the layer's input (separate q, k, v or one fused
    matrix, or what latent projections leave of them), `latents` those through a narrow middle,
    `output` the one that writes back. `query_norm` and `key_norm` normalize each head
    (`norm.width == head_dim`) or all of a token's queries and keys.
    `normalizes_after_rotation`: the norms come after the rotation, not before it (Llama 4).
    `head_dim` is the width of a query or key head, `value_head_dim` that of a value head where
    it differs. `rotary_dim`: of those, how many are rotated; 0 for none.
    `rotary_kind`: `half`, `x * cos + rotate_half(x) * sin` (Llama); `pairs`, the same over
    neighbours (GLM, Cohere); `parts`, both halves rotated apart and joined (gpt-oss); `complex`,
    as complex fp32 numbers (Llama 4, DeepSeek-V2).
    `rotary_in_float32`: rotated values are fp32 until they are cast back (OLMo, Cohere).
    `rotary_concatenates`: rotation writes query and key anew head by head (Phi), so that
    attention's result must be copied into token order before its projection.
    `scales_query`: queries are multiplied by a scale of their own before the scores (OPT).
    `picks_heads`: query, key and value are picked out of one product head by head, and torch's
    kernels are given a mask always, and heads as they are (Falcon).
    `expands_key_value`: keys and values are copied for every query head first (Falcon 40B).
    `scores_in_float32`: eager attention multiplies fp32 copies of query and key (GPT-J).
    `softmax_keeps_dtype`: its softmax does not ask for fp32 (GPT-2).
    `softcapped`: scores pass through a tanh before the softmax (Gemma 2). `sinks`: a learned score
    a head beside them (gpt-oss). `alibi`: scores get a distance-dependent bias (BLOOM).
    `sliding_window`: how many tokens back it sees; `chunk_size`: the length of the pieces of text
    that see only themselves (Llama 4); None for all. `dropout`: of the attention weights.
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
    normalizes_after_rotation: bool = False
    rotary_dim: int = 0
    rotary_kind: str = "half"
    rotary_in_float32: bool = False
    rotary_concatenates: bool = False
    scales_query: bool = False
    picks_heads: bool = False
    expands_key_value: bool = False
    scores_in_float32: bool = False
    softmax_keeps_dtype: bool = False
    softcapped: bool = False
    sinks: bool = False
    alibi: bool = False
    sliding_window: int | None = None
    chunk_size: int | None = None
    dropout: float = 0.0

    @property
    def rotary_joins(self) -> bool:
        """Rotation joins a turned part of each head and the rest to new tensors."""
        partial = 0 < self.rotary_dim < self.head_dim
        return partial or self.rotary_concatenates

    @property
    def reach(self) -> int | None:
        """How many tokens back it may see, by a window or a chunk; None for all."""
        return self.sliding_window or self.chunk_size

    @property
    def is_fused(self) -> bool:
        """Query, key and value are views of one product's result."""
        return len(self.inputs) == 1 and not self.latents

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
        for linear in self.linears:
            yield from linear.parameters()
        for norm in self.norms:
            yield from norm.parameters()
        if self.sinks:
            yield Parameter(name="sinks", shape=(self.num_heads,))


class Experts(Struct, frozen=True, kw_only=True):
    """The mixture around a feed-forward block.

    transformers 5 holds the experts' weights as stacked parameters (experts x out x in), not as
    modules, so that quantization and adapters for linear modules do not reach them.
    A shared expert is a `FeedForward` of its own, `shared`, behind `shared_gate` where it has one.
    `router` is the module that scores the experts;
    `router_is_linear`: `target_modules` and quantization take it for a linear module.
    `router_in_float32`: it multiplies fp32 copies of its input and weight (DeepSeek).
    `scoring`: how weights come from scores: `softmax` over all experts, then the best;
    `best_softmax`, the best first (gpt-oss, Granite); `sigmoid`, then the best (Llama 4: of the
    best); `sparsemixer` (Phi-3.5-MoE). `normalizes_scores`: the chosen ones are divided by their
    sum. `router_correction`: a buffer of one number an expert shifts the choice (DeepSeek-V3);
    buffers are not counted.
    `every_expert`: every expert computes every token, and scores of 0 drop what was not chosen
    (Llama 4). `returns_scores`: beside its result (gpt-oss).
    """

    num_experts: int
    num_experts_per_token: int
    router: Linear
    router_is_linear: bool = False
    router_in_float32: bool = False
    scoring: str = "softmax"
    normalizes_scores: bool = False
    router_correction: bool = False
    every_expert: bool = False
    returns_scores: bool = False
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


class FeedForward(Struct, frozen=True, kw_only=True):
    """A plain or gated feed-forward block, or a mixture of such blocks.

    `inputs` read the block's input: gate and up where `gated` (or both in one matrix), else one;
    `output` writes back. With `experts`, these are the shapes of one expert.
    `activation` is Hugging Face's name; `bloom_gelu` and `gpt_oss_glu` are functions of those
    models' own code (a GELU that keeps its input only; a clamped gate over neighbouring columns).
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
        if self.experts is None:
            return 1
        every = self.experts.every_expert
        return self.experts.num_experts if every else self.experts.num_experts_per_token

    def parameters(self) -> Iterator[Parameter]:
        if self.experts is None:
            for linear in self.matrices:
                yield from linear.parameters()
            return
        experts = self.experts
        for matrix in self.matrices:
            stacked = (experts.num_experts, *matrix.weight_shape)
            yield Parameter(name=matrix.name, shape=stacked)
            if matrix.bias:
                biases = (experts.num_experts, matrix.out_features)
                yield Parameter(name=f"{matrix.name}_bias", shape=biases)
        yield from experts.router.parameters()
        if experts.shared is not None:
            yield from experts.shared.parameters()
        if experts.shared_gate is not None:
            yield from experts.shared_gate.parameters()


class Layer(Struct, frozen=True, kw_only=True):
    """One decoder layer.

    Each norm stands before or behind its block, or is absent. `parallel`: attention and
    feed-forward read the layer's input side by side, and their results are added together;
    without `feed_forward_norm` both read the attention's norm.
    `normalizes_sums`: the norms behind the blocks stand behind the additions too, so that the
    next block adds to what they write (opt-350m).
    `scales_residual`: each block's result is multiplied before it is added (Granite).
    `dropout`: of each block's result before it is added.
    `adds_in_place`: blocks side by side are added up in the second one's result (Falcon).
    `normalizes_first`: the norms of both blocks come before either block (Falcon 40B).
    `holds`: what of the attention block is still a local variable when the layer ends, its
    `normalized` input or what it `attended` (GPT-2's, StableLM's code); its `weights`, where the
    layer returns them to the model's loop, which has them until the next layer ends (BLOOM's).
    `feeds_by_itself`: the feed-forward block is no module of its own, so that its normalized input
    is let go of behind the first product (OPT).
    """

    attention: Attention
    feed_forward: FeedForward
    attention_norm: Norm | None = None
    post_attention_norm: Norm | None = None
    feed_forward_norm: Norm | None = None
    post_feed_forward_norm: Norm | None = None
    parallel: bool = False
    normalizes_sums: bool = False
    scales_residual: bool = False
    dropout: float = 0.0
    adds_in_place: bool = False
    normalizes_first: bool = False
    holds: tuple[str, ...] = ()
    feeds_by_itself: bool = False

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
        return sum(linear.num_weights for linear in self.linears if linear.quantizable)


class ModelSpec(Struct, frozen=True, kw_only=True, eq=False, dict=True):
    """Everything about a model's shape that memory and time depend on.

    `layers`, first to last; equal ones are best the same object. `positions`: rows of a learned
    position table; `counts_positions`: each row's tokens are counted to look them up (OPT), not
    one row for all. `embedding_norm` follows the embeddings (BLOOM). `embedding_linears` stand
    between embeddings and layers or layers and head (opt-350m's projections).
    `embedding_dropout`: of what enters the first layer.
    `scales_embeddings`, `scales_logits`: multiplied by a constant; `scales_inputs`: embeddings are,
    outside of their module (Granite). `final_logit_softcapping`:
    logits pass through a tanh. `supports_sdpa`: transformers has torch's own attention kernel for
    the architecture. `other_linears` and `other_parameters`: what is loaded along and has no part
    in a text's forward pass, such as a vision tower; its linear modules, each as often as it is
    there (quantization and `target_modules` reach them too), and its other parameters.
    `code`: `transformers`, or `remote` where only the repository's own code runs it.
    `buffer_bytes`: of tables that are no parameters, such as GPT-Neo's masks.
    `auto_class`: the class of transformers that loads it. `nests_config`: its decoder reads a
    config of its own, in which a trainer leaves `use_cache` on. `rotates_by_kind`: layers with a
    sliding window have rotary tables of their own (Gemma 3).
    `scores`: a score a token stands in the place of the output projection. `reward_model`: the one
    beside it that judges what it generates.
    `vocabulary_parts`: GPUs that divide the rows of embeddings and output projection; their
    parameters are then those of one of them, and `vocab_size` is still the whole.
    `biased`: the same model with the biases that its config can switch on and has off, which
    `bias_switches` names; None where there is nothing to switch on.
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
    embedding_dropout: float = 0.0
    scales_embeddings: bool = False
    scales_inputs: bool = False
    scales_logits: bool = False
    positions: int = 0
    counts_positions: bool = False
    supports_sdpa: bool = True
    final_logit_softcapping: bool = False
    other_linears: tuple[Linear, ...] = ()
    other_parameters: tuple[Parameter, ...] = ()
    code: str = "transformers"
    buffer_bytes: int = 0
    auto_class: str = "AutoModelForCausalLM"
    nests_config: bool = False
    rotates_by_kind: bool = False
    scores: bool = False
    reward_model: ModelSpec | None = None
    vocabulary_parts: int = 1
    native_dtype: str = "bfloat16"
    biased: ModelSpec | None = None
    bias_switches: tuple[str, ...] = ()
    approximate: str | None = None

    def __post_init__(self) -> None:
        for field in ("hidden_size", "vocab_size", "max_position_embeddings"):
            if getattr(self, field) < 1:
                raise InputError(f"model `{self.name}`: `{field}` must be at least 1")
        if not self.layers:
            raise InputError(f"model `{self.name}`: `num_hidden_layers` must be at least 1")

    @property
    def loads_as_causal_lm(self) -> bool:
        """The training process can load it: it asks AutoModelForCausalLM and trusts no code."""
        return self.code == "transformers" and self.auto_class == "AutoModelForCausalLM"

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def has_biases(self) -> bool:
        """Whether anything in it has a bias."""
        inside = (p for layer in self.layer_counts for p in layer.parameters())
        return any(p.name.endswith("bias") for p in (*self.outer_parameters, *inside))

    @cached_property
    def _known(self) -> dict[Hashable, Any]:
        return {}

    def remembered(self, key: Hashable, work_out: Callable[[], Known]) -> Known:
        """What `work_out` returns, worked out once for each key as long as the model lives."""
        with suppress(KeyError):
            found: Known = self._known[key]
            return found
        found = self._known[key] = work_out()
        return found

    def recalled(self, key: Hashable) -> Any:
        """What is remembered under the key, if anything is."""
        return self._known.get(key)

    @cached_property
    def sliding_windows(self) -> tuple[int, ...]:
        """The windows and chunks of its layers, each once."""
        windows = {layer.attention.reach for layer in self.layers}
        return tuple(window for window in windows if window is not None)

    @cached_property
    def layer_counts(self) -> dict[Layer, int]:
        """Each kind of layer and how many there are, in the order of their first place."""
        by_object = Counter(id(layer) for layer in self.layers)
        distinct = {id(layer): layer for layer in self.layers}
        counts: dict[Layer, int] = {}
        for key, layer in distinct.items():
            counts[layer] = counts.get(layer, 0) + by_object[key]
        return counts

    @property
    def vocabulary_rows(self) -> int:
        """Entries of the vocabulary that embeddings and output projection have here."""
        return self.vocab_size // self.vocabulary_parts

    @cached_property
    def embedding_parameters(self) -> int:
        """Token embeddings (shared with the output projection when tied)."""
        return self.vocabulary_rows * (self.embedding_width or self.hidden_size)

    @property
    def lm_head_parameters(self) -> int:
        """Parameters of the output projection that are not shared with the embeddings."""
        own = 0 if self.tie_word_embeddings else self.embedding_parameters
        return own + (self.vocabulary_rows if self.lm_head_bias else 0)

    @cached_property
    def outer_parameters(self) -> tuple[Parameter, ...]:
        """Parameters outside of the layers, tied ones once."""
        width = self.embedding_width or self.hidden_size
        rows = self.vocabulary_rows
        found = [Parameter(name="embed_tokens.weight", shape=(rows, width))]
        if self.positions:
            found.append(Parameter(name="wpe.weight", shape=(self.positions, self.hidden_size)))
        for part in (self.embedding_norm, *self.embedding_linears, self.final_norm):
            found += part.parameters() if part is not None else ()
        if not self.tie_word_embeddings:
            found.append(Parameter(name="lm_head.weight", shape=(rows, width)))
        if self.lm_head_bias:
            found.append(Parameter(name="lm_head.bias", shape=(rows,)))
        return (*found, *self.parameters_beside)

    @cached_property
    def parameters_beside(self) -> tuple[Parameter, ...]:
        """What is loaded along and has no part in a text's forward pass."""
        linears = (p for linear in self.other_linears for p in linear.parameters())
        return (*linears, *self.other_parameters)

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
        """Weights that 4- and 8-bit loading quantizes: linear modules except the output projection.

        Embeddings and norms keep their dtype, and so do routers and stacked experts, which are
        parameters (bitsandbytes replaces modules only).
        """
        counts = self.layer_counts.items()
        others = (*self.embedding_linears, *self.other_linears)
        return sum(count * layer.quantizable_weights for layer, count in counts) + sum(
            linear.num_weights for linear in others if linear.quantizable
        )
