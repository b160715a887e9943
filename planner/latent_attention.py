"""DeepSeek's latent attention on a tape: keys, values and perhaps queries through a narrow middle
(transformers' DeepseekV2Attention and DeepseekV3Attention)."""

from __future__ import annotations

from ftplan.planner import functions as f
from ftplan.planner.model_spec import Attention, Latent
from ftplan.planner.modules import Module, Numerics, attention_kernel, linear_module, norm_module
from ftplan.planner.rotary import Rotary
from ftplan.planner.tape import Form, Tape, Tensor, per_token


class LatentAttention:
    """The last of `latents` makes keys and values; one before it, if there is one, queries."""

    def __init__(self, attention: Attention, numerics: Numerics) -> None:
        self.attention = attention
        *of_query, of_keys = attention.latents
        self.query = (
            _modules(of_query[0], numerics)
            if of_query
            else (linear_module(attention.inputs[0], numerics),)
        )
        self.down_keys, self.norm, self.up_keys = _modules(of_keys, numerics)
        self.latent_width = of_keys.norm.width
        self.output = linear_module(attention.output, numerics)
        self.kernel = attention_kernel(attention, numerics)
        self.rotary = Rotary(attention, attention.rotary_dim, numerics.residual)

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        a = self.attention
        plain_width = a.head_dim - a.rotary_dim
        query = x
        for module in self.query:
            query = module(tape, query)
        query_parts = f.split(tape, query, [self._heads(plain_width), self._heads(a.rotary_dim)])
        narrow = self.down_keys(tape, x)
        latent, rotated_key = f.split(
            tape, narrow, [per_token(self.latent_width), per_token(a.rotary_dim)]
        )
        latent = self.norm(tape, latent)
        query_parts[1], rotated_key = self.rotary(tape, query_parts[1], rotated_key)
        joined = f.join(tape, list(query_parts))
        joined.by_heads = True
        key, value = self._expanded(tape, latent, rotated_key)
        result = self.kernel(tape, joined, key, value)
        return self.output(tape, result)

    def _expanded(self, tape: Tape, latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, a new tensor that both of their parts are copied into, and values."""
        a = self.attention
        plain_width = a.head_dim - a.rotary_dim
        both = self.up_keys(tape, latent)
        plain, value = f.split(tape, both, [self._heads(plain_width), per_token(a.value_width)])
        rotated = f.broadcast(tape, rotated, self._heads(a.rotary_dim))
        key = tape.empty(per_token(a.query_width), both.width)
        key = f.copy_into(tape, f.copy_into(tape, key, plain), rotated)
        key.by_heads = True
        return key, value

    def _heads(self, width: int) -> Form:
        return per_token(self.attention.num_heads * width)


def _modules(latent: Latent, numerics: Numerics) -> tuple[Module, ...]:
    return (
        linear_module(latent.down, numerics),
        norm_module(latent.norm, numerics),
        linear_module(latent.up, numerics),
    )
