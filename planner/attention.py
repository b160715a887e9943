"""Attention kernels on a tape: torch's and FlashAttention-2's, and eager attention.

What they keep and what backward needs besides: flash_api.cpp of FlashAttention-2 and of ATen
(native/transformers/cuda/flash_attn), attention.cu and attention_backward.cu of ATen for the
memory-efficient kernel, sdp_utils.cpp for the choice between them.
"""

from __future__ import annotations

from ftplan.planner import functions as f
from ftplan.planner.model_spec import Attention
from ftplan.planner.ring_attention import RingAttention
from ftplan.planner.stack import FLASH_CAPABILITY
from ftplan.planner.tape import (
    Form,
    Tape,
    Tensor,
    Weight,
    add_forms,
    per_pair,
    per_token,
    scaled,
)

# FlashAttention's backward works on head dimensions rounded up to a multiple of this.
FLASH_HEAD_DIM = 32
FLASH_MAX_HEAD_DIM = 256
INDEX_BYTES = 8


class AttentionKernel:
    """From rotated query, key and value to the result that the output projection reads.

    `keys_in_front`: of each row, which all its tokens see. `mask_padding`: entries by which the
    efficient kernel's copy of a mask has longer rows. `row_parts`: GPUs that divide each row.
    """

    def __init__(
        self,
        attention: Attention,
        implementation: str,
        *,
        mask_width: int,
        repeats_key_value: bool = False,
        efficient_takes_groups: bool = False,
        masked: bool = False,
        keys_in_front: int = 0,
        mask_padding: int = 0,
        sinks: Weight | None = None,
        row_parts: int = 1,
    ) -> None:
        self.attention, self.implementation, self.sinks = attention, implementation, sinks
        self.row_parts = row_parts
        self.mask_width, self.repeats_key_value = mask_width, repeats_key_value
        self.efficient_takes_groups = efficient_takes_groups
        self.masked, self.keys_in_front = masked, keys_in_front
        self.mask_padding = mask_padding

    def __call__(self, tape: Tape, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.implementation == "eager":
            return self._eager(tape, query, key, value)
        repeats = self._is_given_mask and not self.attention.picks_heads
        if repeats and not self.repeats_key_value:
            key, value = self._repeat_as_transformers(tape, key, value)
        width = tape.autocast or query.width
        query = f.cast(tape, query, width)
        key = f.cast(tape, key, width)
        value = f.cast(tape, value, width)
        if self.row_parts > 1:
            ring = RingAttention(self.attention, self.row_parts, self._padded_width)
            return ring(tape, query, key, value)
        flash_2 = self.implementation == "flash_attention_2"
        if self.repeats_key_value:
            key, value = self._repeat_both(tape, key, value)
        if not tape.on_cuda and self._has_one_head_dim() and not self.masked:
            return self._flash_on_processor(tape, query, key, value)
        if flash_2 or self._takes_flash(tape, width):
            return self._flash(tape, query, key, value)
        if self._takes_math(tape, query, repeats or self.repeats_key_value):
            return self._math(tape, query, key, value)
        return self._efficient(tape, query, key, value)

    @property
    def _is_given_mask(self) -> bool:
        return self.masked and self.implementation != "flash_attention_2"

    def _takes_math(self, tape: Tape, query: Tensor, repeats: bool) -> bool:
        """The efficient kernel takes no grouped heads before torch 2.14, nor bf16 where the card
        has none."""
        bf16_on_old = query.width == 2 and not tape.is_fp16 and tape.capability < FLASH_CAPABILITY
        a = self.attention
        grouped = a.num_heads != a.num_key_value_heads and not repeats
        return (grouped and not self.efficient_takes_groups) or bf16_on_old

    def _takes_flash(self, tape: Tape, width: int) -> bool:
        modern = tape.capability >= FLASH_CAPABILITY
        fits = self._has_one_head_dim() and self.attention.head_dim <= FLASH_MAX_HEAD_DIM
        return width == 2 and modern and fits and not self.masked

    def _has_one_head_dim(self) -> bool:
        return self.attention.value_head_dim in (None, self.attention.head_dim)

    def _flash_on_processor(self, tape: Tape, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keeps what FlashAttention-2 keeps, in any dtype, and allocates the gradients alone. The
        result has the query's order of dimensions, and is copied where that is by heads
        (ATen/native/transformers/attention.cpp, `_scaled_dot_product_flash_attention_for_cpu`)."""
        a = self.attention
        result = tape.empty(per_token(a.result_width), query.width)
        sums = tape.empty(per_token(a.num_heads), f.FLOAT32)
        self._count(tape, query.width)

        def backward(tape: Tape, gradients: f.Gradients, saved: list[Tensor]) -> f.Gradients:
            tape.count(self._causal(5 * (a.query_width + a.result_width) // 2), saved[0].width)
            return [tape.like(saved[0]), tape.like(saved[1]), tape.like(saved[2])]

        if tape.differentiates(query, key, value):
            saved = tape.save(query, key, value, result, sums)
            tape.attach([result], [query, key, value], saved, backward)
        return f.clone(tape, result) if a.rotary_joins else result

    def _flash(self, tape: Tape, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keeps query, key, value, the result and one fp32 log-sum a head (arXiv 2307.08691)."""
        a = self.attention
        saved = []
        result = tape.empty(per_token(a.result_width), query.width)
        sums = tape.empty(per_token(a.num_heads), f.FLOAT32)
        self._count(tape, query.width)
        if not tape.differentiates(query, key, value):
            return result
        saved = tape.save(query, key, value, result, sums)
        padded = self._padded_width

        def backward(tape: Tape, gradients: f.Gradients, saved: list[Tensor]) -> f.Gradients:
            # Scores once more.
            tape.count(self._causal(5 * (a.query_width + a.result_width) // 2), saved[0].width)
            grads: f.Gradients = [tape.like(saved[0]), tape.like(saved[1]), tape.like(saved[2])]
            products = tape.empty(per_token(a.num_heads), f.FLOAT32)
            accumulator = tape.empty(per_token(padded), f.FLOAT32)
            if saved[1].elements != saved[0].elements:  # of every query head, then summed by group
                size = self._of_all_heads(saved[1])
                expanded = [tape.empty(size, saved[1].width) for _ in "kv"]
                del expanded
            del products, accumulator
            return grads

        tape.attach([result], [query, key, value], saved, backward)
        return result

    @property
    def _padded_width(self) -> int:
        """Of a token's queries, as FlashAttention's backward works on them."""
        a = self.attention
        return a.num_heads * -(-a.head_dim // FLASH_HEAD_DIM) * FLASH_HEAD_DIM

    def _count(self, tape: Tape, width: int) -> None:
        """Two products, half of whose scores causality masks out."""
        a = self.attention
        tape.count(self._causal(a.query_width + a.result_width), width)

    def _efficient(self, tape: Tape, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """ATen's memory-efficient kernel, which reads a mask as a bias of the query's dtype.
        Backward adds up the query's gradient in fp32."""
        a = self.attention
        bias = self._bias(tape, query.width)
        result = tape.empty(per_token(a.result_width), query.width)
        sums = tape.empty(per_token(a.num_heads), f.FLOAT32)
        self._count(tape, query.width)
        if not tape.differentiates(query, key, value):
            return result
        saved = tape.save(query, key, value, result, sums, *bias)

        def backward(tape: Tape, gradients: f.Gradients, saved: list[Tensor]) -> f.Gradients:
            tape.count(self._causal(5 * (a.query_width + a.result_width) // 2), saved[0].width)
            grads: f.Gradients = [tape.like(saved[0]), tape.like(saved[1]), tape.like(saved[2])]
            query, result = saved[0], saved[3]
            if query.width == f.FLOAT32:  # gradient times result, before it is summed up
                elementwise = tape.like(result)
                del elementwise
            products = tape.empty(per_token(a.num_heads), f.FLOAT32)
            if query.width != f.FLOAT32:
                workspace = tape.like(query, f.FLOAT32)
                del workspace
            if saved[1].elements != query.elements:  # of every query head, then summed by group
                expanded = [tape.empty(self._of_all_heads(x), x.width) for x in saved[1:3]]
                del expanded
            del products
            return grads

        tape.attach([result], [query, key, value], saved, backward)
        return result

    def _bias(self, tape: Tape, width: int) -> list[Tensor]:
        """What is made of the mask for the kernel, a longer copy where its rows do not suit.
        ALiBi's is a bias already, one for each head; autocast casts it all the same."""
        a = self.attention
        if not self.masked:
            return []
        if a.alibi:
            return [] if self.mask_width == width else [tape.empty(per_pair(a.num_heads), width)]
        pairs = self._pairs(1)
        bias = tape.empty(pairs, width)
        if self.mask_padding:
            bias = tape.empty(add_forms(pairs, per_token(self.mask_padding)), width)
        return [bias]

    def _pairs(self, number: int) -> Form:
        """So many for each token and each key that it may see."""
        return add_forms(per_pair(number), per_token(number * self.keys_in_front))

    def _causal(self, number: int) -> Form:
        """The same of products of which half are masked out, but for keys in front."""
        return add_forms(per_pair(number), per_token(2 * number * self.keys_in_front))

    def _eager(self, tape: Tape, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Scores of every pair of tokens, their softmax in fp32, and the mix of values
        (transformers' `eager_attention_forward`)."""
        a = self.attention
        # Rotation under autocast makes fp32 of a query, and never of a value.
        width = value.width if a.sinks or a.scores_in_float32 else query.width
        key, value = self._repeat_as_transformers(tape, key, value)
        scores = self._scores(tape, query, key)
        if a.softcapped:
            scores = f.scale(tape, f.tanh(tape, f.scale(tape, scores)))
        scores = f.add_mask(tape, scores, self.mask_width)
        weights = self._with_sinks(tape, scores) if a.sinks else self._softmax(tape, scores)
        weights = f.cast(tape, weights, width)
        del scores
        weights = f.dropout(tape, weights, a.dropout)
        tape.keep_local(weights)  # they are returned beside the result
        mixed = self._products(tape, weights, value, per_token(a.result_width))
        return f.clone(tape, mixed)

    def _scores(self, tape: Tape, query: Tensor, key: Tensor) -> Tensor:
        a = self.attention
        if a.scores_in_float32:
            query, key = f.cast(tape, query, f.FLOAT32), f.cast(tape, key, f.FLOAT32)
        scores = self._products(tape, query, key, self._pairs(a.num_heads))
        return scores if a.alibi else f.scale(tape, scores)  # ALiBi's product scales by itself

    def _softmax(self, tape: Tape, scores: Tensor) -> Tensor:
        """In fp32, which the module asks for or CUDA's autocast does."""
        if self.attention.softmax_keeps_dtype and not (tape.autocast and tape.on_cuda):
            return f.softmax(tape, scores)
        return f.softmax_in_float32(tape, scores)

    def _with_sinks(self, tape: Tape, scores: Tensor) -> Tensor:
        """Softmax with one more score for each token and head, which is then left out
        (transformers.models.gpt_oss.modeling_gpt_oss.eager_attention_forward)."""
        elements, heads = scores.elements, per_token(self.attention.num_heads)
        assert self.sinks is not None
        sinks = f.broadcast(tape, self.sinks, heads)
        scores = f.join(tape, [scores, sinks])
        places = tape.empty(heads, INDEX_BYTES)
        scores = f.subtract(tape, scores, f.pick(tape, scores, heads, places))
        weights = f.part(tape, f.softmax(tape, scores), elements)
        weights.by_heads = True
        return weights

    def _math(self, tape: Tape, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """ATen's plain attention, in fp32 (`_scaled_dot_product_attention_math`)."""
        a, before = self.attention, query.width
        bias = self._bias(tape, before)
        query, key, value = (f.cast(tape, x, f.FLOAT32) for x in (query, key, value))
        scaled_query = f.scale(tape, query)
        grouped = (key, value) if a.picks_heads else self._repeat_both(tape, key, value)
        keys = self._of_each_head(tape, f.scale(tape, grouped[0]), per_token(a.query_width))
        scores = self._multiply(tape, scaled_query, keys, self._pairs(a.num_heads))
        del keys
        weights = f.safe_softmax(tape, scores)  # the mask is added to the scores in place
        del scores
        weights = f.dropout(tape, weights, a.dropout)
        returned = f.cast(tape, weights, before)
        values = self._of_each_head(tape, grouped[1], per_token(a.result_width))
        mixed = self._multiply(tape, weights, values, per_token(a.result_width))
        result = f.cast(tape, mixed, before)
        del returned, mixed, bias
        return f.clone(tape, result)

    def _of_each_head(self, tape: Tape, x: Tensor, elements: Form) -> Tensor:
        """One head for all queries as the batched product takes it: a copy for each of them, where
        rows keep them from being one view (ATen/native/LinearAlgebra.cpp, `_matmul_impl`)."""
        if not self.attention.picks_heads or x.elements == elements:
            return x
        return (f.broadcast if tape.single_row else f.expand)(tape, x, elements)

    def _repeat_as_transformers(
        self, tape: Tape, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """transformers' `repeat_kv`, whose reshape of a single head is a view."""
        if self.attention.num_key_value_heads > 1:
            return self._repeat_both(tape, key, value)
        key = f.broadcast(tape, key, self._of_all_heads(key))
        return key, f.broadcast(tape, value, self._of_all_heads(value))

    def _repeat_both(self, tape: Tape, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """A key and a value head for each query head."""
        a = self.attention
        if a.num_heads == a.num_key_value_heads:
            return key, value
        key = f.expand(tape, key, self._of_all_heads(key))
        return key, f.expand(tape, value, self._of_all_heads(value))

    def _of_all_heads(self, x: Tensor) -> Form:
        """The elements of a key or value for each query head."""
        a = self.attention
        return scaled(x.elements, a.num_heads, a.num_key_value_heads)

    def _products(self, tape: Tape, left: Tensor, right: Tensor, elements: Form) -> Tensor:
        """A batched product under autocast, head by head."""
        left = f.by_heads(tape, f.to_product(tape, left))
        return self._multiply(tape, left, f.to_product(tape, right), elements)

    def _multiply(self, tape: Tape, left: Tensor, right: Tensor, elements: Form) -> Tensor:
        """A batched product of all pairs, head by head, those too that causality masks out."""
        flops = self._pairs(2 * self.attention.query_width)
        left = f.by_heads(tape, left)
        right = f.by_heads(tape, right)
        return f.batched_product(tape, left, right, elements, flops)
