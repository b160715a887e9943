"""One decoder layer as a list of operations, written down once.

Activation memory, backward temporaries and FLOPs are all read off this list. Every figure is
per token of the micro-batch; attention's quadratic part is per token and per token of length.

What an operation keeps for its backward pass follows autograd's rules: a product keeps the
operand whose partner needs a gradient, a frozen linear keeps nothing of its input, softmax and
rsqrt keep their results. Sources: torch's derivatives.yaml; the modelling code of transformers 5;
Korthikanti et al. 2022 (arXiv 2205.05198) for the method.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from ftplan.planner.hardware_spec import DeviceKind
from ftplan.planner.model_spec import Linear, ModelSpec
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.trained import Trained

FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One step of a layer.

    `saved_bytes`: what it keeps for backward.
    `saved_bytes_per_length`: what it keeps for each token of row length besides (eager
    attention's weights).
    `gradient_bytes`, `gradient_bytes_per_length`: gradients with respect to its inputs, made in
    backward. `gradient_temporary_bytes`: what making them holds besides.
    `operand_bytes`, `operand_bytes_per_length`: its inputs, temporaries and results, all that is
    alive while it runs without a backward pass to come. 0 where a neighbour plainly holds more.
    `forward_flops`, `weight_gradient_flops`: multiply and add counted as two. The gradient with
    respect to the inputs costs `forward_flops` again.
    `forward_flops_per_length`: attention's part that grows with the row's length.
    """

    name: str
    saved_bytes: float = 0.0
    saved_bytes_per_length: float = 0.0
    gradient_bytes: float = 0.0
    gradient_bytes_per_length: float = 0.0
    gradient_temporary_bytes: float = 0.0
    operand_bytes: float = 0.0
    operand_bytes_per_length: float = 0.0
    forward_flops: float = 0.0
    weight_gradient_flops: float = 0.0
    forward_flops_per_length: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Numerics:
    """Bytes an element of what flows through a layer.

    `residual`: the hidden state between layers, in the dtype of the weights.
    `compute`: what matrix products return: the autocast dtype, or the weights'.
    `adapter`: adapter weights. `autocast`: whether inputs are cast at each product.
    `casts_to_adapter`: PEFT casts an adapter's input to the adapter's dtype. Its layers for
    bitsandbytes leave that to autocast where it is on (peft.tuners.lora.bnb).
    `float32_functions`: CUDA's autocast runs `layer_norm` and `pow` in fp32, the processor's
    does not (ATen/autocast_mode.h, AT_FORALL_FP32).
    """

    residual: int
    compute: int
    adapter: int
    autocast: bool
    casts_to_adapter: bool
    float32_functions: bool

    @staticmethod
    def of(plan: TrainingPlan, kind: DeviceKind) -> Numerics:
        return Numerics(
            residual=plan.weight_bytes,
            compute=plan.compute_bytes,
            adapter=adapter_weight_bytes(plan),
            autocast=plan.autocast,
            casts_to_adapter=plan.quantization == "none" or not plan.autocast,
            float32_functions=plan.autocast and kind == "cuda",
        )

    def within_experts(self) -> Numerics:
        """Autocast leaves grouped products alone: they compute in the dtype of the weights
        (transformers.integrations.moe)."""
        return dataclasses.replace(self, compute=self.residual, autocast=False)

    def function_bytes(self, input_bytes: int) -> int:
        """Width in which `layer_norm` and `pow` work and return."""
        return FLOAT32_BYTES if self.float32_functions else input_bytes

    @property
    def adapter_input(self) -> int:
        """Width in which an adapter's products read."""
        return self.compute if self.autocast else self.adapter

    def copies_for_weight(self, input_bytes: int) -> bool:
        """Whether a trained weight's product reads a cast copy of its input."""
        return self.autocast and input_bytes != self.compute

    def copies_for_adapter(self, input_bytes: int) -> bool:
        """Whether an adapter reads a cast copy of its input, be it to another width and back."""
        given = self.adapter if self.casts_to_adapter else input_bytes
        return given != input_bytes or given != self.adapter_input


def adapter_weight_bytes(plan: TrainingPlan) -> int:
    """Bytes of one adapter weight.

    PEFT holds adapters of a 16-bit base in fp32 (`autocast_adapter_dtype`); TRL's trainers
    cast the adapters of a quantized base to bf16 (trl.trainer.sft_trainer, TRL 1.16).
    """
    if plan.quantization != "none":
        return 2 if plan.trainer == "trl" else FLOAT32_BYTES
    return FLOAT32_BYTES if plan.autocast_adapter_dtype else plan.weight_bytes


def trained_widths(plan: TrainingPlan, trained: Trained) -> tuple[tuple[int, int], ...]:
    """(count, bytes a parameter) of the model's own trained parameters and the adapters'."""
    return (
        (trained.base_parameters, plan.weight_bytes),
        (trained.added_parameters, adapter_weight_bytes(plan)),
    )


def decoder_layer(
    model: ModelSpec,
    plan: TrainingPlan,
    trained: Trained,
    *,
    own_weights: bool,
    kind: DeviceKind = "cuda",
) -> tuple[Operation, ...]:
    """The operations of one layer in forward order.

    `own_weights`: the layer's own matrices and norms are trained (full, or one of the last
    layers under `freeze`).
    """
    builder = _LayerBuilder(model, plan, trained, own_weights, Numerics.of(plan, kind))
    attention, feed_forward = model.attention.inputs, model.feed_forward.inputs
    if model.norms_per_layer == 1:  # attention and feed-forward read the same norm, in parallel
        return (
            builder.norm("norm"),
            *builder.projections((*attention, *feed_forward), builder.normalized_bytes),
            *builder.attention(),
            *builder.feed_forward_output(),
        )
    return (
        builder.norm("attention_norm"),
        *builder.projections(attention, builder.normalized_bytes),
        *builder.attention(),
        *builder.output_norm("post_attention_norm"),
        builder.norm("feed_forward_norm"),
        *builder.feed_forward_input(),
        *builder.feed_forward_output(),
        *builder.output_norm("post_feed_forward_norm"),
    )


class _LayerBuilder:
    def __init__(
        self,
        model: ModelSpec,
        plan: TrainingPlan,
        trained: Trained,
        own_weights: bool,
        numerics: Numerics,
    ) -> None:
        self.model = model
        self.plan = plan
        self.trained = trained
        self.own_weights = own_weights
        self.numerics = numerics
        self.adapted = {m.name for m in trained.adapted}

    @property
    def normalized_bytes(self) -> int:
        """Width of what a norm returns: RMSNorm's is cast back to its input's."""
        residual = self.numerics.residual
        return self.numerics.function_bytes(residual) if self.model.norm_has_bias else residual

    def norm(self, name: str) -> Operation:
        """RMSNorm works on an fp32 copy and keeps it; LayerNorm keeps its input.

        With a trained scale RMSNorm keeps the normalized values as well.
        """
        width, residual = self.model.hidden_size, self.numerics.residual
        if self.model.norm_has_bias:
            kept = self.numerics.function_bytes(residual)
        else:
            scaled = FLOAT32_BYTES if self.model.norm_scales_in_float32 else residual
            kept = FLOAT32_BYTES + (scaled if self.own_weights else 0)
        return Operation(
            name=name,
            saved_bytes=width * kept,
            gradient_bytes=width * (FLOAT32_BYTES + FLOAT32_BYTES),
        )

    def output_norm(self, name: str) -> tuple[Operation, ...]:
        """The norm that Gemma 2 puts behind each block."""
        return (self.norm(name),) if self.model.norms_per_layer == 4 else ()

    def projections(
        self,
        linears: tuple[Linear, ...],
        input_bytes: int,
        *,
        copies: int = 1,
        input_is_kept: bool = False,
    ) -> tuple[Operation, ...]:
        """Linear modules that read one input of `input_bytes` an element.

        The input is kept once if several products use it as it is, and once for each product
        that casts it (autocast casts at every product; PEFT casts to the adapter's dtype).
        `copies` is the number of experts a token passes; `input_is_kept`: an earlier operation
        keeps the very tensor.
        """
        products = tuple(self._product(linear, input_bytes, copies) for linear in linears)
        as_it_is = any(self._keeps_input(linear, input_bytes) for linear in linears)
        if not as_it_is or input_is_kept:
            return products
        first = linears[0]
        shared = Operation(
            name=f"{first.name}_input", saved_bytes=copies * first.in_features * input_bytes
        )
        return (shared, *products)  # first, since it goes only after the last of its products

    def _keeps_input(self, linear: Linear, input_bytes: int) -> bool:
        """Whether the product keeps its input as it is, uncopied."""
        by_adapter = (
            linear.name in self.adapted
            and not self.plan.lora_dropout
            and not self.numerics.copies_for_adapter(input_bytes)
        )
        return by_adapter or (self.own_weights and not self.numerics.copies_for_weight(input_bytes))

    def _own_bytes(self, linear: Linear, input_bytes: int) -> int:
        """What the product keeps for itself: cast copies of its input, the adapter's middle."""
        numerics, kept = self.numerics, 0
        if self.own_weights and numerics.copies_for_weight(input_bytes):
            kept += linear.in_features * numerics.compute
        if linear.name in self.adapted:
            kept += self.trained.rank * numerics.adapter_input  # A's output, for B's gradient
            if self.plan.lora_dropout:  # the mask, one byte an element, and what it leaves
                kept += linear.in_features * (1 + numerics.adapter_input)
            elif numerics.copies_for_adapter(input_bytes):
                kept += linear.in_features * numerics.adapter_input
        return kept

    def _input_copies(self, linear: Linear, input_bytes: int) -> int:
        """The copies of its input that a product without a backward pass makes on the way."""
        numerics, widths = self.numerics, [input_bytes]
        if linear.name in self.adapted and numerics.casts_to_adapter:
            widths.append(numerics.adapter)
        if numerics.autocast:
            widths.append(numerics.compute)
        made = sum(new for old, new in itertools.pairwise(widths) if new != old)
        return linear.in_features * made

    def _adapter_gradient_bytes(self, linear: Linear) -> int:
        """What wider adapters without autocast (PEFT's fp32 ones on a 16-bit base) hold besides.

        First the gradient of the result and that of the adapter's share of it, both in the
        adapter's width; later that of the input, beside which the base's share still waits.
        """
        numerics = self.numerics
        wider = numerics.adapter - numerics.compute
        if linear.name not in self.adapted or numerics.autocast or wider <= 0:
            return 0
        of_result = 2 * linear.out_features * numerics.adapter
        of_input = linear.in_features * wider + linear.out_features * numerics.compute
        return max(of_result - linear.in_features * numerics.compute, of_input)

    def _product(self, linear: Linear, input_bytes: int, copies: int) -> Operation:
        sides = linear.in_features + linear.out_features
        adapter_flops = 2 * self.trained.rank * sides if linear.name in self.adapted else 0
        weight_flops = 2 * linear.num_weights
        result_bytes = linear.out_features * self.numerics.compute
        read_bytes = linear.in_features * input_bytes + self._input_copies(linear, input_bytes)
        return Operation(
            name=linear.name,
            saved_bytes=copies * self._own_bytes(linear, input_bytes),
            gradient_bytes=copies * linear.in_features * self.numerics.compute,
            gradient_temporary_bytes=copies * self._adapter_gradient_bytes(linear),
            operand_bytes=copies * (read_bytes + result_bytes),
            forward_flops=copies * (weight_flops + adapter_flops),
            weight_gradient_flops=copies
            * ((weight_flops if self.own_weights else 0) + adapter_flops),
        )

    def attention(self) -> tuple[Operation, ...]:
        """Query and key norms, the kernel, and the output projection."""
        eager = self.plan.attn_implementation == "eager"
        return (
            *self._query_key_norms(),
            self._eager_kernel() if eager else self._fused_kernel(),
            *self.projections(
                (self.model.attention.output,),
                self.numerics.compute,
                # The fused kernels keep their result, which is laid out as the query is.
                input_is_kept=not eager and not self.model.attention.rotary_concatenates,
            ),
        )

    def _query_key_norms(self) -> Iterable[Operation]:
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

    def _fused_kernel(self) -> Operation:
        """SDPA and FlashAttention keep q, k, v, the result and one fp32 log-sum a head.

        (Dao 2023, arXiv 2307.08691.) Rotary embedding makes q and k anew; where one product
        makes q, k and v, v is a view that keeps all of its result.
        """
        attention, compute = self.model.attention, self.numerics.compute
        rotated = attention.query_width + attention.key_value_width
        width = attention.key_value_width + attention.query_width  # v and the result
        if attention.rotary:
            width += rotated
        if attention.is_fused or not attention.rotary:
            width += rotated  # q and k as they were projected
        return self._kernel(
            saved_bytes=width * compute + attention.num_heads * FLOAT32_BYTES,
            saved_bytes_per_length=0,
            gradient_bytes_per_length=0,
            operand_bytes_per_length=0,
        )

    def _eager_kernel(self) -> Operation:
        """Eager attention keeps q, k, v (the latter two repeated for each query head) and the
        softmax, in fp32 and cast; with capped scores their tanh as well. Backward holds two
        gradients of the scores at a time, one on each side of the softmax.
        """
        attention, compute = self.model.attention, self.numerics.compute
        cast = compute if compute != FLOAT32_BYTES else 0
        capped = compute if attention.softcapped else 0
        return self._kernel(
            saved_bytes=3 * attention.query_width * compute,
            saved_bytes_per_length=attention.num_heads * (FLOAT32_BYTES + cast + capped),
            gradient_bytes_per_length=attention.num_heads * (FLOAT32_BYTES + compute),
            # The scores, their softmax, and what it is cast to.
            operand_bytes_per_length=attention.num_heads * (compute + FLOAT32_BYTES + cast),
        )

    def _kernel(
        self,
        *,
        saved_bytes: int,
        saved_bytes_per_length: int,
        gradient_bytes_per_length: int,
        operand_bytes_per_length: int,
    ) -> Operation:
        attention = self.model.attention
        width = attention.query_width + 2 * attention.key_value_width
        return Operation(
            name="attention",
            saved_bytes=saved_bytes,
            saved_bytes_per_length=saved_bytes_per_length,
            gradient_bytes=width * self.numerics.compute,
            gradient_bytes_per_length=gradient_bytes_per_length,
            operand_bytes=(width + attention.query_width) * self.numerics.compute,
            operand_bytes_per_length=operand_bytes_per_length,
            # Two products (scores, mixing), half of them masked out by causality.
            forward_flops_per_length=2 * attention.query_width,
        )

    def feed_forward_input(self) -> tuple[Operation, ...]:
        """The products that read the norm's result; where there are experts, routing first."""
        block, read_bytes = self.model.feed_forward, self.normalized_bytes
        if not block.is_mixture:
            return self.projections(block.inputs, read_bytes)
        router = Linear(
            name="router", in_features=self.model.hidden_size, out_features=block.num_experts
        )
        return (
            *self.projections((router,), read_bytes),
            self._routing(),
            *self._within_experts().projections(
                block.inputs, read_bytes, copies=block.active_copies
            ),
        )

    def _routing(self) -> Operation:
        """Keeps the experts' outputs, to be weighted, and the router's fp32 probabilities."""
        block, width = self.model.feed_forward, self.numerics.residual
        routed = block.active_copies * self.model.hidden_size
        return Operation(
            name="routing",
            saved_bytes=routed * width + block.num_experts * FLOAT32_BYTES,
            gradient_bytes=routed * width,
        )

    def _within_experts(self) -> _LayerBuilder:
        numerics = self.numerics.within_experts()
        return _LayerBuilder(self.model, self.plan, self.trained, self.own_weights, numerics)

    def feed_forward_output(self) -> tuple[Operation, ...]:
        """The activation and the product that writes back."""
        block = self.model.feed_forward
        builder = self._within_experts() if block.is_mixture else self
        activation, activated_bytes = builder._activation()
        return (
            activation,
            *builder.projections((block.output,), activated_bytes, copies=block.active_copies),
        )

    def _activation(self) -> tuple[Operation, int]:
        """The activation, and the width of what it returns.

        Gated: it keeps its input, the product its two operands. Plain: tanh-GELU written in
        Python keeps four results, all but half its input from `pow` on (transformers'
        NewGELUActivation).
        """
        block, compute = self.model.feed_forward, self.numerics.compute
        width = block.active_copies * block.intermediate_size
        returned = compute if block.gated else self.numerics.function_bytes(compute)
        kept = 3 * compute if block.gated else compute + 3 * returned
        activation = Operation(
            name="activation",
            saved_bytes=width * kept,
            gradient_bytes=width * 2 * returned,  # of both operands of a product
            operand_bytes=block.active_copies * max(self._around_activation(), self._adding_up()),
        )
        return activation, returned

    def _around_activation(self) -> int:
        """Gated: the activated gate, the other operand and their product; four arrays where both
        operands are views of one product's result. Plain: the input and tanh-GELU's results."""
        block, compute = self.model.feed_forward, self.numerics.compute
        if block.gated:
            return block.intermediate_size * compute * (4 if len(block.inputs) == 1 else 3)
        return block.intermediate_size * (compute + 3 * self.numerics.function_bytes(compute))

    def _adding_up(self) -> int:
        """An adapter's end on the last product before the activation: the base's result, the
        adapter's and their sum, the adapter's copy of the input, and the activated gate."""
        numerics, inputs = self.numerics, self.model.feed_forward.inputs
        last = inputs[-1]
        if last.name not in self.adapted:
            return 0
        summed = last.out_features * (numerics.compute + 2 * numerics.adapter_input)
        copied = numerics.casts_to_adapter and numerics.adapter != self.normalized_bytes
        copy = last.in_features * numerics.adapter if copied else 0
        gate = last.out_features * numerics.compute if len(inputs) > 1 else 0
        return summed + copy + gate


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
        """How far backward rises above what the layer has saved, eq. (6).

        Walking the operations backwards, gradients with respect to inputs come into being
        while saved tensors and finished gradients go.
        """
        alive = highest = 0.0
        previous_gradient = 0.0
        for op in reversed(self.operations):
            gradient = tokens * (op.gradient_bytes + length * op.gradient_bytes_per_length)
            alive += gradient
            highest = max(highest, alive + tokens * op.gradient_temporary_bytes)
            alive -= tokens * (op.saved_bytes + length * op.saved_bytes_per_length)
            if gradient:  # an entry for a shared input makes none, and consumes none
                alive -= previous_gradient
                previous_gradient = gradient
        return round(highest)

    def inference_bytes(self, tokens: float, length: float) -> int:
        """The most that one operation's operands take when nothing is kept, eq. (12)."""
        return round(
            max(
                tokens * (op.operand_bytes + length * op.operand_bytes_per_length)
                for op in self.operations
            )
        )

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
