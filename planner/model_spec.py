"""The shape of a decoder-only language model, as a composition of blocks.

A model is embeddings, `num_hidden_layers` equal layers (attention, feed-forward, norms), a final
norm and an output projection. Every number ftplan prints about a model is counted on these
blocks; `families.py` builds them from a `config.json`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ftplan.planner.errors import InputError


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Multi-head (or grouped-query) attention.

    `inputs` are the projections that read the layer's input (separate q, k, v or one fused
    matrix), `output` the one that writes back. `num_norm_parameters` counts query and key norms.
    """

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    inputs: tuple[Linear, ...]
    output: Linear
    num_norm_parameters: int = 0
    rotary: bool = True
    rotary_concatenates: bool = False
    """Rotation writes query and key anew head by head (Phi), so that attention's result must be
    copied into token order before its projection."""
    softcapped: bool = False
    """Scores pass through a tanh before the softmax (Gemma 2)."""

    @property
    def is_fused(self) -> bool:
        """Query, key and value are views of one product's result."""
        return len(self.inputs) == 1

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (*self.inputs, self.output)


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedForward:
    """A dense or gated feed-forward block, or a mixture of them.

    With `num_experts > 0` the expert weights are stacked parameters, not modules
    (transformers 5), so adapters that target linear modules do not reach them;
    `expert_inputs` and `expert_output` then give the shapes of one expert.
    """

    intermediate_size: int
    gated: bool
    inputs: tuple[Linear, ...]
    output: Linear
    num_experts: int = 0
    num_experts_per_token: int = 0

    @property
    def is_mixture(self) -> bool:
        return self.num_experts > 0

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The matrices of one expert, or of the block where there is only one."""
        return (*self.inputs, self.output)

    @property
    def copies(self) -> int:
        return self.num_experts if self.is_mixture else 1

    @property
    def active_copies(self) -> int:
        """How many copies of the block each token passes through."""
        return self.num_experts_per_token if self.is_mixture else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Everything about a model's shape that memory and time depend on."""

    name: str
    architecture: str
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    max_position_embeddings: int
    attention: Attention
    feed_forward: FeedForward
    norms_per_layer: int = 2
    norm_has_bias: bool = False
    norm_scales_in_float32: bool = False
    """The norm's scale multiplies the fp32 value, not its 16-bit copy (Gemma 2)."""
    tie_word_embeddings: bool = False
    lm_head_bias: bool = False
    learned_positions: int = 0
    supports_sdpa: bool = True
    """transformers has torch's own attention kernel for this architecture."""
    final_logit_softcapping: bool = False
    """Logits pass through a tanh (Gemma 2)."""
    native_dtype: str = "bfloat16"
    approximate: str | None = None
    """Why the shape is a stand-in (a bare size was given); None for a real model."""

    def __post_init__(self) -> None:
        for field in ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"):
            if getattr(self, field) < 1:
                raise InputError(f"model `{self.name}`: `{field}` must be at least 1")

    @property
    def norm_parameters(self) -> int:
        """Parameters of one normalization over the hidden state."""
        return self.hidden_size * (2 if self.norm_has_bias else 1)

    @property
    def embedding_parameters(self) -> int:
        """Token embeddings (shared with the output projection when tied)."""
        return self.vocab_size * self.hidden_size

    @property
    def router_parameters(self) -> int:
        """The expert router of one layer."""
        return self.feed_forward.num_experts * self.hidden_size

    @property
    def layer_linears(self) -> tuple[Linear, ...]:
        """The linear modules of one layer, as `target_modules` can name them.

        Stacked experts are no modules, so they are absent from a mixture's list.
        """
        if self.feed_forward.is_mixture:
            return self.attention.linears
        return (*self.attention.linears, *self.feed_forward.linears)

    @property
    def layer_matrix_parameters(self) -> int:
        """Weights and biases of one layer's matrices, all experts included."""
        feed_forward = sum(m.num_parameters for m in self.feed_forward.linears)
        return (
            sum(m.num_parameters for m in self.attention.linears)
            + self.feed_forward.copies * feed_forward
        )

    @property
    def layer_parameters(self) -> int:
        return (
            self.layer_matrix_parameters
            + self.router_parameters
            + self.attention.num_norm_parameters
            + self.norms_per_layer * self.norm_parameters
        )

    @property
    def lm_head_parameters(self) -> int:
        """Parameters of the output projection that are not shared with the embeddings."""
        own = 0 if self.tie_word_embeddings else self.embedding_parameters
        return own + (self.vocab_size if self.lm_head_bias else 0)

    @property
    def num_parameters(self) -> int:
        """Exact parameter count, tied embeddings once; equal to what transformers builds."""
        return (
            self.embedding_parameters
            + self.learned_positions * self.hidden_size
            + self.num_hidden_layers * self.layer_parameters
            + self.norm_parameters
            + self.lm_head_parameters
        )

    @property
    def active_layer_weights(self) -> int:
        """Matrix weights of one layer that a token is multiplied with."""
        attention = sum(m.num_weights for m in self.attention.linears)
        expert = sum(m.num_weights for m in self.feed_forward.linears)
        return attention + self.feed_forward.active_copies * expert + self.router_parameters

    @property
    def quantizable_weights(self) -> int:
        """Weights that 4- and 8-bit loading quantizes: the matrices in the layers.

        Embeddings, the output projection and the norms keep their dtype, and so do routers
        and stacked experts (bitsandbytes replaces linear modules only).
        """
        return self.num_hidden_layers * sum(m.num_weights for m in self.layer_linears)
