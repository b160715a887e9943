"""A model's modules on a tape, each as its modelling code reads (transformers 5, PEFT 0.21,
bitsandbytes 0.50).

Local variables live here as long as they do there: that is what memory is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from functools import partial

from msgspec import Struct, structs

from ftplan.planner import functions as f
from ftplan.planner.attention import AttentionKernel
from ftplan.planner.called import Called
from ftplan.planner.kv_cache import Cache, CacheKind, fill
from ftplan.planner.model_spec import Attention, FeedForward, Linear, Norm, Parameter
from ftplan.planner.norms import CenteredNorm, Float32LayerNorm, NormOfEachHead
from ftplan.planner.prequantized import PREQUANTIZED, PrequantizedLinear
from ftplan.planner.rotary import Rotary
from ftplan.planner.tape import Form, Tape, Tensor, Weight, constant, per_token, scaled, times

FLOAT32 = f.FLOAT32
QUANT_BLOCK_SIZE = 64
Module = Callable[[Tape, Tensor], Tensor]


class Numerics(Struct, frozen=True, kw_only=True):
    """How weights are held and what computes.

    `weights`, `norms`, `adapters`: bytes a parameter. `residual`: of the hidden state. `compute`:
    what 4-bit bases compute in. `quantization`: how linear modules are held.
    `trained`: names of the layer's own parameters that are trained. `adapted`: which linear modules
    carry an adapter, `adapter` what makes it. `rank`, `dropout`: of adapters; `drops`: they have a
    dropout module and train, whatever its rate by now; `adapter_input`:
    bytes a value of what they read, where that is not their own width. `fused_kernels`: norms,
    rotary embeddings and dropout of a quantized base's adapters are fms-acceleration's.
    `repeats_key_value`: grouped heads are repeated before the kernel; `efficient_takes_groups`:
    torch's memory-efficient kernel takes them as they are. `separate_experts`: experts
    are modules. `gathers`: ZeRO-3 gathers each module's parameters. `padded`: some rows are
    shorter, `masked_windows`: sliding windows no longer than a row, `keys_in_front`: learned
    keys of each row; each of them needs a mask, of which a kernel's copy has rows that are
    `mask_padding` entries longer. `cache`: of keys and values, which is filled. `has_bottlenecks`:
    small networks stand behind attention and feed-forward. `prompt_tokens`: of a prompt that
    attention also looks at, in `prompt_width` bytes a parameter. `checkpointed`: the layer is
    computed again in backward. `row_parts`: GPUs that divide each row.
    """

    weights: int
    residual: int
    norms: int
    adapters: int
    compute: int
    quantization: str = "none"
    double_quant: bool = False
    is_fp16: bool = False
    trained: frozenset[str] = frozenset()
    adapted: frozenset[Linear] = frozenset()
    adapter: Callable[[Linear, Numerics], Module] | None = None
    rank: int = 0
    adapter_input: int | None = None
    dropout: float = 0.0
    drops: bool = False
    attn_implementation: str = "sdpa"
    fused_kernels: bool = False
    repeats_key_value: bool = False
    efficient_takes_groups: bool = False
    separate_experts: bool = False
    gathers: bool = False
    padded: bool = False
    masked_windows: frozenset[int] = frozenset()
    cache: CacheKind | None = None
    keys_in_front: int = 0
    mask_padding: int = 0
    has_bottlenecks: bool = False
    prompt_tokens: int = 0
    prompt_width: int = 2
    checkpointed: bool = False
    row_parts: int = 1

    @property
    def trains(self) -> bool:
        """Whether something is trained in the layer."""
        beside = self.adapted or self.has_bottlenecks or self.prompt_tokens
        return bool(self.trained or beside)

    @property
    def learns(self) -> bool:
        """Whether something is trained in the layer, or comes to it from what is."""
        return self.trains or bool(self.keys_in_front)


def called(
    module: Module,
    numerics: Numerics,
    parameters: Iterable[Parameter] = (),
    *,
    by_name: bool = False,
) -> Module:
    """A module that another one calls, with its own parameters."""
    return Called(module, parameters, by_name=by_name) if numerics.gathers else module


class PlainLinear:
    """torch.nn.Linear."""

    def __init__(self, linear: Linear, width: int, trained: Container[str]) -> None:
        """`trained`: names of parameters, this module's among them if it is trained."""
        self.linear = linear
        weight, bias = f"{linear.name}.weight" in trained, f"{linear.name}.bias" in trained
        matrix = None if linear.transposed else linear.weight_shape
        self.weight = Weight(linear.num_weights, width, trained=weight, matrix=matrix)
        self.bias = Weight(linear.out_features, width, trained=bias) if linear.bias else None

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        linear = self.linear
        if linear.parallel == "colwise":
            x = f.sum_gradient_over_gpus(tape, x)
        x = f.to_product(tape, x)
        if linear.multiplies_transposed:
            return self._multiply_transposed(tape, x)
        # Without gradients transformers multiplies with this GPU's part as a tensor of its own.
        is_part = linear.parallel is not None and not tape.grad_enabled
        weight = tape.cast_weight(self.weight, is_view=is_part)
        bias = None if self.bias is None else tape.cast_weight(self.bias)
        result = f.product(tape, x, weight, linear.in_features, linear.out_features, bias)
        del x
        if linear.parallel != "rowwise":
            return result
        return f.sum_over_gpus(tape, result, has_bias=linear.bias)

    def _multiply_transposed(self, tape: Tape, x: Tensor) -> Tensor:
        """transformers' FalconLinear: autocast neither keeps its copy of the weight nor casts the
        bias."""
        linear = self.linear
        weight = tape.cast_weight(self.weight, is_view=True)
        result = f.product(tape, x, weight, linear.in_features, linear.out_features)
        return result if self.bias is None else f.add(tape, result, self.bias)


def _frozen_bias(linear: Linear, numerics: Numerics) -> Weight | None:
    """A quantized module's bias, which keeps the dtype of what is not quantized."""
    return Weight(linear.out_features, numerics.weights, trained=False) if linear.bias else None


class Linear4bit:
    """bitsandbytes.nn.Linear4bit: the weight is dequantized for each product, and again for the
    gradient of the input. It computes in the dtype asked for."""

    def __init__(self, linear: Linear, numerics: Numerics) -> None:
        self.linear, self.compute, self.width = linear, numerics.compute, numerics.weights
        self.scales = -(-linear.num_weights // QUANT_BLOCK_SIZE) if numerics.double_quant else 0
        self.bias = _frozen_bias(linear, numerics)

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        before = x.width
        x = f.cast(tape, x, self.compute)
        return f.cast(tape, self._multiply(tape, x), before)

    def _multiply(self, tape: Tape, x: Tensor) -> Tensor:
        linear = self.linear
        tape.read(x)
        dense = self._dequantize(tape, x.width)
        result = tape.empty(scaled(x.elements, linear.out_features, linear.in_features), x.width)
        flops = times(x.elements, 2 * linear.out_features)
        tape.count(flops, x.width)
        del dense
        if tape.differentiates(x):
            dequantize, elements, width = self._dequantize, x.elements, self.width

            def backward(tape: Tape, gradients: f.Gradients, saved: list[Tensor]) -> f.Gradients:
                incoming = gradients[0]
                assert incoming is not None
                tape.count(flops, incoming.width)
                dense = f.cast(tape, dequantize(tape, width), incoming.width)
                gradient = tape.empty(elements, incoming.width)
                del dense
                return [gradient]

            tape.attach([result], [x], [], backward)
        return result

    def _dequantize(self, tape: Tape, width: int) -> Tensor:
        """The dense weight. Double quantization dequantizes the scales first, and adds an offset
        to them in a new tensor."""
        scales = tape.empty(constant(self.scales), FLOAT32)
        shifted = tape.empty(constant(self.scales), FLOAT32)
        del scales
        dense = tape.empty(constant(self.linear.num_weights), width)
        del shifted
        return dense


# Bytes of what LLM.int8 multiplies: forward integers, backward fp16 values.
_INT8, _FLOAT16 = 1, 2


class Linear8bit:
    """bitsandbytes.nn.Linear8bitLt, LLM.int8 with a threshold (arXiv 2208.07339)."""

    def __init__(self, linear: Linear, numerics: Numerics) -> None:
        self.linear = linear
        self.bias = _frozen_bias(linear, numerics)

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        linear = self.linear
        vectors = scaled(x.elements, 1, linear.in_features)
        outputs = scaled(x.elements, linear.out_features, linear.in_features)
        flops = times(x.elements, 2 * linear.out_features)
        tape.count(flops, _INT8)
        codes, scales = self._quantize(tape, x, vectors)
        result = self._multiply(tape, outputs, x.width, tape.is_fp16)
        del codes, scales
        if tape.differentiates(x):
            size, width, num_weights = (x.elements, x.width), x.width, linear.num_weights

            def backward(tape: Tape, gradients: f.Gradients, saved: list[Tensor]) -> f.Gradients:
                tape.count(flops, _FLOAT16)
                dense = tape.empty(constant(num_weights), width)
                gradient = tape.empty(*size)
                del dense
                return [gradient]

            tape.hold(x)  # an attribute of the node
            tape.attach([result], [x], [], backward)
        return result

    @staticmethod
    def _quantize(tape: Tape, x: Tensor, vectors: Form) -> tuple[Tensor, Tensor]:
        half = x if tape.is_fp16 and x.width == 2 else tape.like(x, 2)
        scales = tape.empty(vectors, FLOAT32)
        codes = tape.like(x, 1)
        sizes = tape.like(half)
        outliers = tape.like(x, 1)
        del sizes, outliers
        return codes, scales

    @staticmethod
    def _multiply(tape: Tape, outputs: Form, width: int, is_fp16: bool) -> Tensor:
        product = tape.empty(outputs, 4)
        result = tape.empty(outputs, 2)
        del product
        return result if width == 2 and is_fp16 else tape.empty(outputs, width)


class LoraLinear:
    """PEFT's LoRA around a linear module (peft.tuners.lora.layer and .bnb)."""

    def __init__(
        self,
        linear: Linear,
        numerics: Numerics,
        *,
        bias: bool = False,
        trains_a: bool = True,
    ) -> None:
        """`bias`: of the second matrix. `trains_a`: LoRA-FA leaves the first as it began."""
        self.base = base_linear(linear, numerics)
        rank, width = numerics.rank, numerics.adapters
        down = Linear(name="lora_A", in_features=linear.in_features, out_features=rank)
        up = Linear(name="lora_B", in_features=rank, out_features=linear.out_features, bias=bias)
        matrix_a = PlainLinear(down, width, ("lora_A.weight",) if trains_a else ())
        matrix_b = PlainLinear(up, width, ("lora_B.weight", "lora_B.bias"))
        self.reads = tuple(down.parameters())  # whose dtype PEFT asks for
        self.lora_a = called(matrix_a, numerics, self.reads)
        self.lora_b = called(matrix_b, numerics, up.parameters())
        self.width, self.dropout = numerics.adapter_input or width, numerics.dropout
        self.quantization = numerics.quantization
        fused = numerics.fused_kernels and numerics.quantization != "none" and self.dropout
        dropped = f.fused_dropout if fused else partial(f.dropout, rate=self.dropout)
        self.drop = called(dropped, numerics)

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        if self.quantization == "none":
            return self._on_plain(tape, x)
        return self._on_quantized(tape, x)

    def _on_plain(self, tape: Tape, x: Tensor) -> Tensor:
        result = self.base(tape, x)
        before = result.width
        x = f.cast(tape, x, self.width)
        result = f.add(tape, result, self._change(tape, x))
        return f.cast(tape, result, before)

    def _on_quantized(self, tape: Tape, x: Tensor) -> Tensor:
        result = self.base(tape, x)
        if self.quantization in ("nf4", "fp4"):
            result = f.clone(tape, result)
        before = result.width
        if tape.autocast is None:
            x = f.cast(tape, x, self.width)
        output = self._change(tape, x)
        if tape.autocast is None:
            output = f.cast(tape, output, before)
        return f.add(tape, result, output)

    def _change(self, tape: Tape, x: Tensor) -> Tensor:
        dropped = self.drop(tape, x)
        middle = self.lora_a(tape, dropped)
        del dropped
        change = self.lora_b(tape, middle)
        del middle
        return f.scale(tape, change)


def base_linear(linear: Linear, numerics: Numerics) -> Module:
    """The linear module as it is held, without an adapter."""
    if linear.quantizable and numerics.quantization in ("nf4", "fp4"):
        return Linear4bit(linear, numerics)
    if linear.quantizable and numerics.quantization == "int8":
        return Linear8bit(linear, numerics)
    if numerics.quantization in PREQUANTIZED:
        return PrequantizedLinear(linear)
    plain = PlainLinear(linear, numerics.weights, numerics.trained)
    return called(plain, numerics, linear.parameters())


def linear_module(linear: Linear, numerics: Numerics) -> Module:
    make = numerics.adapter
    if make is None or linear not in numerics.adapted:
        return base_linear(linear, numerics)
    if not linear.quantizable and numerics.quantization not in PREQUANTIZED:
        # PEFT has its adapter for plain modules there (FalconLinear, an output projection).
        numerics = structs.replace(numerics, quantization="none")
    return make(linear, numerics)


class RmsNorm:
    """Root-mean-square norm, worked in fp32 (LlamaRMSNorm; Gemma's multiplies in fp32 too)."""

    def __init__(self, norm: Norm, numerics: Numerics) -> None:
        self.norm = norm
        trained = f"{norm.name}.weight" in numerics.trained
        self.weight = Weight(norm.width, numerics.norms, trained=trained)

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        before = x.width
        hidden = f.cast(tape, x, FLOAT32)
        root = f.reciprocal_root(tape, f.mean_of_squares(tape, hidden, self.norm.width))
        hidden = f.multiply(tape, hidden, root)
        del root
        if not self.norm.scaled:
            return f.cast(tape, hidden, before)
        if self.norm.scales_in_float32:
            weight = f.cast(tape, self.weight, FLOAT32)
            if self.norm.offset:
                weight = f.scale(tape, weight)
            return f.cast(tape, f.multiply(tape, hidden, weight), before)
        return f.multiply(tape, self.weight, f.cast(tape, hidden, before))


class LayerNorm:
    """torch.nn.LayerNorm, in fp32 under CUDA's autocast."""

    def __init__(self, norm: Norm, numerics: Numerics) -> None:
        self.norm = norm
        weight, bias = (f"{norm.name}.{kind}" in numerics.trained for kind in ("weight", "bias"))
        self.weight = Weight(norm.width, numerics.norms, trained=weight)
        self.bias = Weight(norm.width, numerics.norms, trained=bias) if norm.bias else None

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        return f.layer_norm(tape, x, self.norm.width, self.weight, self.bias)


class FusedRmsNorm:
    """Unsloth's (kernels/unsloth/rms_layernorm.py): keeps its input and a number a row, overwrites
    the gradient that comes in, and trains no weight."""

    def __init__(self, norm: Norm) -> None:
        self.width = norm.width

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        return f.in_place_norm(tape, x, self.width)


def norm_module(norm: Norm, numerics: Numerics) -> Module:
    return called(_norm_module(norm, numerics), numerics, norm.parameters())


def _norm_module(norm: Norm, numerics: Numerics) -> Module:
    if norm.kind == "rms":
        return FusedRmsNorm(norm) if numerics.fused_kernels else RmsNorm(norm, numerics)
    if norm.kind == "centered":
        return CenteredNorm(norm, numerics)
    if norm.copies > 1:
        return NormOfEachHead(norm, numerics)
    return Float32LayerNorm(norm) if norm.computes_in_float32 else LayerNorm(norm, numerics)


def attention_kernel(attention: Attention, numerics: Numerics) -> AttentionKernel:
    sinks = None
    if attention.sinks:
        trained = "sinks" in numerics.trained
        sinks = Weight(attention.num_heads, numerics.weights, trained=trained)
    return AttentionKernel(
        attention,
        numerics.attn_implementation,
        mask_width=numerics.residual,
        repeats_key_value=numerics.repeats_key_value,
        efficient_takes_groups=numerics.efficient_takes_groups,
        masked=attention.picks_heads
        or numerics.padded
        or bool(numerics.keys_in_front)
        or attention.reach in numerics.masked_windows,
        keys_in_front=numerics.keys_in_front,
        mask_padding=numerics.mask_padding,
        sinks=sinks,
        row_parts=numerics.row_parts,
    )


class SelfAttention:
    """Projections, rotation, the kernel, and the output projection."""

    def __init__(
        self, attention: Attention, numerics: Numerics, prefix: Cache | None = None
    ) -> None:
        self.attention, self.prefix = attention, prefix
        self.inputs = [linear_module(linear, numerics) for linear in attention.inputs]
        self.output = linear_module(attention.output, numerics)
        norms = (attention.query_norm, attention.key_norm)
        self.query_norm, self.key_norm = (norm_module(n, numerics) if n else None for n in norms)
        self.kernel = attention_kernel(attention, numerics)
        self.turns_in_place = numerics.fused_kernels
        self.cache = numerics.cache
        self.rotary = Rotary(attention, attention.head_dim, numerics.residual)

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        query, key, value = self._project(tape, x)
        if not self.attention.normalizes_after_rotation:
            query, key = self._normalize(tape, query, key)
        if self.attention.rotary_dim and not self.turns_in_place:
            query, key = self.rotary(tape, query, key)
        if self.attention.normalizes_after_rotation:
            query, key = self._normalize(tape, query, key)
        if self.cache is not None:
            key, value = fill(tape, self.cache, key, value)
        if self.prefix is not None:
            key, value = self.prefix.update(tape, key, value)
        result = self.kernel(tape, query, key, value)
        return self.output(tape, result)

    def _normalize(self, tape: Tape, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        if self.query_norm is None or self.key_norm is None:
            return query, key
        query = self.query_norm(tape, query)
        return query, self.key_norm(tape, key)

    def _project(self, tape: Tape, x: Tensor) -> list[Tensor]:
        if not self.attention.is_fused:
            return [module(tape, x) for module in self.inputs]
        whole = self.inputs[0](tape, x)
        a = self.attention
        widths = (a.query_width, a.key_width, a.value_width)
        return f.split(tape, whole, [per_token(width) for width in widths])


class Mlp:
    """A gated or plain feed-forward block."""

    def __init__(self, block: FeedForward, numerics: Numerics) -> None:
        self.block = block
        self.inputs = [linear_module(linear, numerics) for linear in block.inputs]
        self.output = linear_module(block.output, numerics)
        self.activate = called(partial(f.activate, name=block.activation), numerics)

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        return self.output(tape, self._activated(tape, x))

    @property
    def steps(self) -> list[Module]:
        """One after the other, of a block without a gate."""
        return [*self.inputs, self.activate, self.output]

    def _activated(self, tape: Tape, x: Tensor) -> Tensor:
        if not self.block.gated:
            return self.activate(tape, self.inputs[0](tape, x))
        if len(self.inputs) == 1:
            return self._gate_both(tape, self.inputs[0](tape, x))
        gate, up = self.inputs
        return f.multiply(tape, self.activate(tape, gate(tape, x)), up(tape, x))

    def _gate_both(self, tape: Tape, both: Tensor) -> Tensor:
        """Gate and the other operand are views of one product's result (Phi 3)."""
        half = scaled(both.elements, 1, 2)
        gate, up = f.split(tape, both, [half, half])
        return f.multiply(tape, up, self.activate(tape, gate))
