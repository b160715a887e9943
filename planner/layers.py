"""One decoder layer as a list of operations, written down once.

Activation memory, backward temporaries and FLOPs are all read off this list. Every figure is
per token of the micro-batch; attention's quadratic part is per token and per token of length.

What an operation keeps for its backward pass follows autograd's rules: a product keeps the
operand whose partner needs a gradient, a frozen linear keeps nothing of its input, softmax and
rsqrt keep their results. Sources: torch's derivatives.yaml; the modelling code of transformers 5;
Korthikanti et al. 2022 (arXiv 2205.05198) for the method.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ftplan.planner.methods import Trained
from ftplan.planner.model_spec import Linear, ModelSpec
from ftplan.planner.plan import TrainingPlan

FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One step of a layer.

    `saved_bytes`: what it keeps for backward.
    `saved_bytes_per_length`: what it keeps for each token of row length besides (eager
    attention's weights).
    `gradient_bytes`: gradients with respect to its inputs, made in backward.
    `forward_flops`, `weight_gradient_flops`: multiply and add counted as two. The gradient with
    respect to the inputs costs `forward_flops` again.
    `forward_flops_per_length`: attention's part that grows with the row's length.
    """

    name: str
    saved_bytes: float = 0.0
    saved_bytes_per_length: float = 0.0
    gradient_bytes: float = 0.0
    forward_flops: float = 0.0
    weight_gradient_flops: float = 0.0
    forward_flops_per_length: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Numerics:
    """Bytes an element of what flows through a layer.

    `residual`: the hidden state between layers, in the dtype of the weights.
    `compute`: what matrix products return: the autocast dtype, or the weights'.
    `adapter`: adapter weights. `autocast`: whether inputs are cast at each product.
    """

    residual: int
    compute: int
    adapter: int
    autocast: bool

    @staticmethod
    def of(plan: TrainingPlan) -> Numerics:
        return Numerics(
            residual=plan.weight_bytes,
            compute=plan.compute_bytes,
            adapter=adapter_weight_bytes(plan),
            autocast=plan.autocast,
        )


def adapter_weight_bytes(plan: TrainingPlan) -> int:
    """Bytes of one adapter weight.

    PEFT holds adapters of a 16-bit base in fp32 (`autocast_adapter_dtype`); TRL's trainers
    cast the adapters of a quantized base to bf16.
    """
    quantized = plan.quantization != "none"
    return 2 if quantized and plan.trainer == "trl" and plan.mixed_precision == "bf16" else 4


def decoder_layer(
    model: ModelSpec, plan: TrainingPlan, trained: Trained, *, own_weights: bool
) -> tuple[Operation, ...]:
    """The operations of one layer in forward order.

    `own_weights`: the layer's own matrices and norms are trained (full, or one of the last
    layers under `freeze`).
    """
    numerics = Numerics.of(plan)
    adapted = {m.name for m in trained.adapted}
    builder = _LayerBuilder(model, plan, numerics, adapted, trained.rank, own_weights)
    attention = (
        builder.norm("attention_norm"),
        *builder.projections(model.attention.inputs, numerics.residual),
        *builder.query_key_norms(),
        builder.attention(),
        *builder.projections((model.attention.output,), numerics.compute),
    )
    feed_forward = builder.feed_forward()
    if model.norms_per_layer == 1:  # attention and feed-forward read the same norm, in parallel
        return (*attention, *feed_forward)
    extra = (
        (builder.norm("post_attention_norm"), builder.norm("post_feed_forward_norm"))
        if model.norms_per_layer == 4
        else ()
    )
    return (*attention, *extra, builder.norm("feed_forward_norm"), *feed_forward)


class _LayerBuilder:
    def __init__(
        self,
        model: ModelSpec,
        plan: TrainingPlan,
        numerics: Numerics,
        adapted: set[str],
        rank: int,
        own_weights: bool,
    ) -> None:
        self.model = model
        self.plan = plan
        self.numerics = numerics
        self.adapted = adapted
        self.rank = rank
        self.own_weights = own_weights

    def norm(self, name: str) -> Operation:
        """RMSNorm works on an fp32 copy and keeps it; LayerNorm keeps its input.

        With a trained scale the normalized values are kept as well.
        """
        width = self.model.hidden_size
        if self.model.norm_has_bias:
            saved = float(width * self.numerics.residual)
        else:
            saved = width * FLOAT32_BYTES + (
                width * self.numerics.residual if self.own_weights else 0
            )
        return Operation(
            name=name, saved_bytes=saved, gradient_bytes=width * (FLOAT32_BYTES + FLOAT32_BYTES)
        )

    def query_key_norms(self) -> Iterable[Operation]:
        """RMSNorm over each query and key head (Qwen3)."""
        attention = self.model.attention
        if not attention.num_norm_parameters:
            return ()
        width = attention.query_width + attention.key_value_width
        kept = FLOAT32_BYTES + (self.numerics.compute if self.own_weights else 0)
        return (
            Operation(
                name="query_key_norm",
                saved_bytes=width * kept,
                gradient_bytes=width * FLOAT32_BYTES,
            ),
        )

    def projections(
        self, linears: tuple[Linear, ...], input_bytes: int, copies: int = 1
    ) -> tuple[Operation, ...]:
        """Linear modules that read one input of `input_bytes` an element.

        The input is kept once if several products use it as it is, and once for each product
        that casts it (autocast casts at every product; PEFT casts to the adapter's dtype).
        `copies` is the number of experts a token passes.
        """
        numerics = self.numerics
        cast_by_autocast = numerics.autocast and input_bytes != numerics.compute
        operations = []
        shared = False
        for linear in linears:
            lora = linear.name in self.adapted
            saved = 0.0
            if lora:
                own_copy = cast_by_autocast or numerics.adapter != input_bytes
                width = numerics.compute if numerics.autocast else numerics.adapter
                if own_copy or self.plan.lora_dropout:
                    saved += linear.in_features * width
                else:
                    shared = True
                if self.plan.lora_dropout:
                    saved += linear.in_features  # the mask, one byte an element
                saved += self.rank * width  # A's output, for B's gradient
            if self.own_weights:
                if cast_by_autocast:
                    saved += linear.in_features * numerics.compute
                else:
                    shared = True
            operations.append(self._product(linear, lora, copies * saved, copies))
        if shared:
            first = linears[0]
            operations.append(
                Operation(
                    name=f"{first.name}_input",
                    saved_bytes=copies * first.in_features * input_bytes,
                )
            )
        return tuple(operations)

    def _product(self, linear: Linear, lora: bool, saved: float, copies: int) -> Operation:
        adapter_flops = 2 * self.rank * (linear.in_features + linear.out_features) if lora else 0
        forward = copies * (2 * linear.num_weights + adapter_flops)
        weight_gradient = copies * (
            (2 * linear.num_weights if self.own_weights else 0) + adapter_flops
        )
        return Operation(
            name=linear.name,
            saved_bytes=saved,
            gradient_bytes=copies * linear.in_features * self.numerics.compute,
            forward_flops=forward,
            weight_gradient_flops=weight_gradient,
        )

    def attention(self) -> Operation:
        """Scores, softmax and mixing.

        SDPA and FlashAttention keep q, k, v, the result and one fp32 log-sum a head
        (Dao 2023, arXiv 2307.08691); eager keeps the softmax in fp32 and its cast copy too.
        """
        attention, compute = self.model.attention, self.numerics.compute
        kept = (2 * attention.query_width + 2 * attention.key_value_width) * compute
        per_length = 0.0
        if self.plan.attn_implementation == "eager":
            cast_copy = compute if compute != FLOAT32_BYTES else 0
            per_length = attention.num_heads * (FLOAT32_BYTES + cast_copy)
        else:
            kept += attention.num_heads * FLOAT32_BYTES
        return Operation(
            name="attention",
            saved_bytes=kept,
            saved_bytes_per_length=per_length,
            gradient_bytes=(attention.query_width + 2 * attention.key_value_width) * compute,
            # Two products (scores, mixing), half of them masked out by causality.
            forward_flops_per_length=2 * attention.query_width,
        )

    def feed_forward(self) -> tuple[Operation, ...]:
        block, compute = self.model.feed_forward, self.numerics.compute
        copies = block.active_copies
        inner = copies * block.intermediate_size * compute
        # Gated: the activation keeps its input, the product its two operands. Plain: tanh-GELU
        # written in Python keeps four intermediate results (transformers' NewGELUActivation).
        activation = Operation(
            name="activation",
            saved_bytes=(3 if block.gated else 4) * inner,
            gradient_bytes=2 * inner if block.gated else inner,
        )
        operations = (
            *self.projections(block.inputs, self.numerics.residual, copies),
            activation,
            *self.projections((block.output,), compute, copies),
        )
        if not block.is_mixture:
            return operations
        hidden = self.model.hidden_size
        routing = Operation(
            name="routing",
            saved_bytes=2 * copies * hidden * compute,  # gathered inputs, outputs to be weighted
            gradient_bytes=copies * hidden * compute,
            forward_flops=2 * self.model.router_parameters,
        )
        return (routing, *operations)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTotals:
    """A layer's sums, for micro-batches of `tokens` in rows of `length`."""

    operations: tuple[Operation, ...]

    def saved_bytes(self, tokens: float, length: float) -> int:
        """Bytes kept for backward when nothing is recomputed."""
        return round(
            sum(
                tokens * (op.saved_bytes + length * op.saved_bytes_per_length)
                for op in self.operations
            )
        )

    def backward_temporary_bytes(self, tokens: float, length: float) -> int:
        """How far backward rises above what the layer has saved.

        Walking the operations backwards, gradients with respect to inputs come into being
        while saved tensors and finished gradients go.
        """
        alive = highest = 0.0
        previous_gradient = 0.0
        for op in reversed(self.operations):
            alive += tokens * op.gradient_bytes
            highest = max(highest, alive)
            alive -= tokens * (op.saved_bytes + length * op.saved_bytes_per_length)
            alive -= previous_gradient
            previous_gradient = tokens * op.gradient_bytes
        return round(highest)

    def forward_flops(self, tokens: float, length: float) -> float:
        return sum(
            tokens * (op.forward_flops + length * op.forward_flops_per_length)
            for op in self.operations
        )

    def backward_flops(self, tokens: float, length: float) -> float:
        """Gradients with respect to inputs, and to the weights that are trained.

        Attention's backward costs two and a half times its forward under FlashAttention
        (scores are computed again); twice is counted for all kernels here.
        """
        return sum(
            tokens
            * (
                op.forward_flops
                + op.weight_gradient_flops
                + 2 * length * op.forward_flops_per_length
            )
            for op in self.operations
        )
