"""litgpt's fine-tuning step on one GPU, on a tape (`litgpt/model.py`, `lora.py`, `adapter.py`,
`adapter_v2.py` and `finetune/`; Lightning's Fabric with `bf16-true`, bitsandbytes 0.42 for 4 bits).

It has modelling code of its own: one product for query, key and value, rotary embeddings over
fp32 tables, an output projection that is never tied, and a loss in chunks of 128 places. Here the
whole model is walked through, since only `ftplan validate` asks.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from ftplan.planner import functions as f
from ftplan.planner.attention import AttentionKernel
from ftplan.planner.errors import InputError
from ftplan.planner.hardware_spec import Device
from ftplan.planner.memory import RESERVED_OVER_ALLOCATED, MemoryEstimate, memory_from_phases
from ftplan.planner.model_spec import Attention, FeedForward, Layer, Linear, ModelSpec, Norm
from ftplan.planner.modules import Module, Numerics, norm_module
from ftplan.planner.phases import COMPONENTS, Phase
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.stack import DEFAULT_CAPABILITY, cublas_workspace_bytes
from ftplan.planner.tape import (
    Form,
    Moment,
    Tape,
    Tensor,
    Weight,
    constant,
    per_pair,
    per_position,
    per_row,
    per_token,
    scaled,
    subtract_forms,
    value,
)
from ftplan.planner.weights import QUANT_BLOCK_SIZE, quantized_bytes_per_weight

# `lora_query` and so on, without `lora_`.
TARGETS = ("query", "key", "value", "projection", "mlp", "head")
# A plan's methods that litgpt has; LLaMA-Adapter's second version, of which plans know nothing, has
# the first one's name there.
METHODS = ("lora", "qlora", "adaption-prompt")
# Learned tokens of LLaMA-Adapter, and the first layer that has some (`adapter.py`, `Config`).
PROMPT_LENGTH = 10
FIRST_PROMPTED = 2
# Places of a row that `fit` projects and takes the loss of at a time (`lm_head_chunk_size`).
CHUNK_LENGTH = 128
# Tensors of bitsandbytes' paged optimizers with at least so many elements have their states in
# managed memory, which torch's allocator does not know (`Optimizer2State.get_state_buffer`).
PAGED_FROM = 100_000

WIDTH = 2  # of all weights and activations: `bf16-true`
INDEX_BYTES = 8


def check_litgpt(model: ModelSpec, plan: TrainingPlan) -> None:
    """Raises InputError for what is not modelled of litgpt."""
    outside = (model.positions, model.embedding_norm, model.embedding_width)
    plain = not any(outside) and all(
        one.feed_forward.experts is None
        and not one.attention.latents
        and one.attention.query_norm is None
        and one.attention.rotary_dim
        for one in model.layer_counts
    )
    unknown = sorted(set(plan.target_modules) - set(TARGETS))
    if plan.method not in METHODS:
        raise InputError(f"of litgpt only LoRA and its adapters are modelled, not `{plan.method}`")
    if unknown and plan.method != "adaption-prompt":
        raise InputError(f"litgpt has no LoRA for `{unknown[0]}`: only for {', '.join(TARGETS)}")
    if plan.gradient_checkpointing:
        raise InputError("litgpt checkpoints on several GPUs only")
    if plan.quantization not in ("none", "nf4", "fp4") or plan.dtype != "bfloat16":
        raise InputError("litgpt is modelled in bf16, plain or with a 4-bit base")
    if not plain:
        raise InputError(f"litgpt's modelling of `{model.name}` is not followed")
    if plan.max_length > model.max_position_embeddings:
        raise InputError(
            f"litgpt takes rows of at most {model.max_position_embeddings} tokens for "
            f"`{model.name}`, not {plan.max_length}"
        )


def estimate_litgpt(
    model: ModelSpec,
    plan: TrainingPlan,
    device: Device | None,
    *,
    longest_first: bool,
    second_adapter: bool = False,
) -> MemoryEstimate:
    """Peak memory of `litgpt finetune_lora`, `finetune_adapter` and, with `second_adapter`,
    `finetune_adapter_v2`.

    `longest_first`: the run begins with its longest batch. If not, the worst is taken: two of them
    one after the other, since the logits of a batch, and with them its graph, live until those of
    the next are there.
    """
    check_litgpt(model, plan)
    rows, length = plan.per_device_train_batch_size, plan.max_length
    capability = (device.compute_capability if device else None) or DEFAULT_CAPABILITY
    tape = Tape(capability=capability, single_row=rows == 1)
    gpt = Gpt(model, plan, length, second_adapter=second_adapter)
    trained = list(gpt.trained())
    if not trained:
        raise InputError("nothing is trained: no target, or no layer that has one")
    before = gpt.step(tape, [])
    if not longest_first:
        tape.moments()
        gpt.step(tape, before)
    moments = tape.moments()
    highest = max(moments, key=lambda moment: value(moment.total, rows, length))
    elements = sum(weight.elements[0] for weight in trained)
    held = {
        "weights": _weight_bytes(model, plan),
        "adapters": elements * WIDTH,
        "temporaries": 2 * cublas_workspace_bytes(capability),
    }
    if not longest_first:
        held["gradients"] = elements * WIDTH
        held["optimizer_states"] = sum(_state_bytes(weight, plan) for weight in trained)
        # They were there before the second step, and are counted here.
        highest = _without(highest, "gradients")
    return _estimate(model, plan, device, held, highest)


def _without(moment: Moment, component: str) -> Moment:
    rest = {name: form for name, form in moment.components.items() if name != component}
    total = moment.total
    if component in moment.components:
        total = subtract_forms(total, moment.components[component])
    return Moment(total, rest)


def _estimate(
    model: ModelSpec,
    plan: TrainingPlan,
    device: Device | None,
    held: dict[str, int],
    highest: Moment,
) -> MemoryEstimate:
    rows, length = plan.per_device_train_batch_size, plan.max_length
    components = {name: held.get(name, 0) for name in COMPONENTS}
    for name, form in highest.components.items():
        components[name] += value(form, rows, length)
    phase = Phase(name="training step", components=components)
    reserved = round(phase.allocated_peak_bytes * RESERVED_OVER_ALLOCATED["loop"])
    return memory_from_phases(
        [phase],
        model,
        plan,
        device,
        trained_weight_bytes=held["adapters"],
        reserved_bytes=reserved,
        required_reserved_bytes=reserved,
    )


def _weight_bytes(model: ModelSpec, plan: TrainingPlan) -> int:
    """Every linear module is quantized, the output projection too; embeddings are not shared."""
    head = model.embedding_parameters
    linears = head + sum(
        count * linear.num_weights
        for layer, count in model.layer_counts.items()
        for linear in layer.linears
    )
    untied = model.tie_word_embeddings
    rest = model.num_parameters + untied * head - linears
    if plan.quantization == "none":
        return (linears + rest) * WIDTH
    return round(linears * quantized_bytes_per_weight(plan)) + rest * WIDTH


def _state_bytes(weight: Weight, plan: TrainingPlan) -> int:
    """AdamW's two states: torch's in the weight's dtype, bitsandbytes' in fp32."""
    elements = weight.elements[0]
    if not plan.optimizer.paged:
        return 2 * elements * WIDTH
    return 0 if elements >= PAGED_FROM else 2 * elements * f.FLOAT32


class _Settings(Struct, frozen=True):
    """`prompts`: LLaMA-Adapter's. `scales`: its second version trains a bias and a scale of each
    product, and norms. `targets`: of LoRA. `held`: what the nodes of a graph hold beside what torch
    knows they save."""

    prompts: bool
    scales: bool
    targets: frozenset[str]
    rank: int
    dropout: float
    is_4bit: bool
    double_quant: bool
    held: list[Tensor]


class _Linear:
    """torch.nn.Linear, or what Fabric puts in its place for 4 bits."""

    def __init__(self, linear: Linear, settings: _Settings) -> None:
        self.linear, self.settings = linear, settings
        self.weight = Weight(linear.num_weights, WIDTH, trained=False)

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        linear = self.linear
        if not self.settings.is_4bit:
            return f.product(tape, x, self.weight, linear.in_features, linear.out_features)
        dense = self._dequantize(tape)
        result = tape.empty(scaled(x.elements, linear.out_features, linear.in_features), WIDTH)
        del dense
        if tape.differentiates(x):
            # bitsandbytes 0.42's `MatMul4Bit` keeps its input as an attribute, for nothing.
            self.settings.held.append(Tensor(x.storage, x.elements, x.width))
            dequantize, elements = self._dequantize, x.elements

            def backward(tape: Tape, gradients: f.Gradients, saved: list[Tensor]) -> f.Gradients:
                dense = dequantize(tape)
                gradient = tape.empty(elements, WIDTH)
                del dense
                return [gradient]

            tape.attach([result], [x], [], backward)
        return result

    def _dequantize(self, tape: Tape) -> Tensor:
        """Fabric quantizes fp16 weights, so that is what they are again before they are cast."""
        weights, double = self.linear.num_weights, self.settings.double_quant
        scales = tape.empty(constant(-(-weights // QUANT_BLOCK_SIZE) * double), f.FLOAT32)
        half = tape.empty(constant(weights), WIDTH)
        del scales
        return tape.like(half)


class _LoraLinear:
    """`LoRALinear`: (dropout(x) A^T B^T) scaling."""

    def __init__(self, linear: Linear, settings: _Settings, target: str) -> None:
        self.linear, self.settings = _Linear(linear, settings), settings
        self.weights: list[Weight] = []
        if target in settings.targets:
            down, up = settings.rank * linear.in_features, settings.rank * linear.out_features
            self.weights = [Weight(size, WIDTH, trained=True) for size in (down, up)]

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        pretrained = self.linear(tape, x)
        if not self.weights:
            return pretrained
        linear, rank = self.linear.linear, self.settings.rank
        middle = f.product(
            tape,
            f.dropout(tape, x, self.settings.dropout),
            self.weights[0],
            linear.in_features,
            rank,
        )
        change = f.product(tape, middle, self.weights[1], rank, linear.out_features)
        del middle
        change = f.scale(tape, change)
        return f.add(tape, pretrained, change)


class _ScaledLinear:
    """`AdapterV2Linear`."""

    def __init__(self, linear: Linear, settings: _Settings) -> None:
        self.linear = _Linear(linear, settings)
        self.weights = [Weight(linear.out_features, WIDTH, trained=True) for _ in "bs"]

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        bias, scale = self.weights
        return f.multiply(tape, scale, f.add(tape, self.linear(tape, x), bias))


def _adapted(linear: Linear, settings: _Settings, target: str) -> _LoraLinear | _ScaledLinear:
    if settings.scales:
        return _ScaledLinear(linear, settings)
    return _LoraLinear(linear, settings, target)


class _LoraQkvLinear:
    """`LoRAQKVLinear`: one product, and a convolution for the second matrices of those of query,
    key and value that have some."""

    def __init__(self, linear: Linear, attention: Attention, settings: _Settings) -> None:
        self.settings, self.attention = settings, attention
        widths = {
            "query": attention.query_width,
            "key": attention.key_width,
            "value": attention.value_width,
        }
        self.linear = _Linear(linear, settings)
        self.widths = [width for name, width in widths.items() if name in settings.targets]
        self.is_whole = len(self.widths) == len(widths)
        rank = settings.rank
        sizes = (rank * len(self.widths) * linear.in_features, rank * sum(self.widths))
        self.weights = [Weight(size, WIDTH, trained=True) for size in sizes if size]

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        pretrained = self.linear(tape, x)
        if not self.widths:
            return pretrained
        linear, rank = self.linear.linear, self.settings.rank
        after_a = f.product(
            tape,
            f.dropout(tape, x, self.settings.dropout),
            self.weights[0],
            linear.in_features,
            rank * len(self.widths),
        )
        after_b = self._convolve(tape, after_a)
        padded = after_b
        if not self.is_whole:
            padded = _spread(
                tape, after_b, scaled(x.elements, linear.out_features, linear.in_features)
            )
        change = f.scale(tape, padded)
        del padded
        return f.add(tape, pretrained, change)

    def _convolve(self, tape: Tape, x: Tensor) -> Tensor:
        """One convolution in groups; of grouped heads, whose matrices differ, one for each."""
        a, weight, rank = self.attention, self.weights[1], self.settings.rank
        if a.num_heads == a.num_key_value_heads:
            return _convolution(tape, x, weight, per_token(sum(self.widths)))
        inputs = f.split(tape, x, [per_token(rank)] * len(self.widths))
        weights = f.split(tape, weight, [constant(rank * width) for width in self.widths])
        parts = [
            _convolution(tape, one, matrix, per_token(width))
            for one, matrix, width in zip(inputs, weights, self.widths, strict=True)
        ]
        return f.join(tape, parts)


def _convolution(tape: Tape, x: Tensor, weight: Tensor, elements: Form) -> Tensor:
    saved = tape.save(x, weight)
    result = tape.empty(elements, WIDTH)
    sizes = (x.elements, weight.elements)

    def backward(tape: Tape, gradients: f.Gradients, saved: list[Tensor]) -> f.Gradients:
        return [tape.empty(size, WIDTH) for size in sizes]

    tape.attach([result], [x, weight], saved, backward)
    return result


def _spread(tape: Tape, x: Tensor, elements: Form) -> Tensor:
    """x in its places among zeros (`index_copy_`), which keeps x for its shape."""
    saved = tape.save(x)
    result = tape.empty(elements, x.width)
    size = (x.elements, x.width)

    def backward(tape: Tape, gradients: f.Gradients, saved: list[Tensor]) -> f.Gradients:
        return [tape.empty(*size)]

    tape.attach([result], [x], saved, backward)
    return result


class _Attention:
    """`CausalSelfAttention`. `prompted`: with learned tokens, and a gate for each head."""

    def __init__(self, attention: Attention, settings: _Settings, *, prompted: bool) -> None:
        self.attention = attention
        self.widths = (attention.query_width, attention.key_width, attention.value_width)
        width = attention.inputs[0].in_features
        linear = Linear(name="attn", in_features=width, out_features=sum(self.widths))
        self.inputs = (
            _ScaledLinear(linear, settings)
            if settings.scales
            else _LoraQkvLinear(linear, attention, settings)
        )
        self.output = _adapted(attention.output, settings, "projection")
        sizes = (PROMPT_LENGTH * width, attention.num_heads) if prompted else ()
        self.prompt = [Weight(size, WIDTH, trained=True) for size in sizes]
        self.kernel = AttentionKernel(attention, "sdpa", mask_width=WIDTH)

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        a = self.attention
        whole = self.inputs(tape, x)
        query, key, value = f.split(tape, whole, [per_token(width) for width in self.widths])
        del whole
        if a.num_heads != a.num_key_value_heads:
            # `reshape` after `expand` copies, unless one head is seen many times.
            copied = a.num_key_value_heads > 1
            repeat = f.expand if copied else f.broadcast
            query = f.clone(tape, query) if copied else query
            key, value = (repeat(tape, one, per_token(a.query_width)) for one in (key, value))
        turned = [self._turn(tape, query), self._turn(tape, key)]
        query, key = (
            f.join(tape, [front, self._part(tape, x, a.head_dim - a.rotary_dim)])
            for front, x in zip(turned, (query, key), strict=True)
        )
        attend = self._attend_softcapped if a.softcapped else self.kernel
        result = attend(tape, query, key, value)
        if self.prompt:
            tokens, gate = self.prompt
            attended = self._attend_to(tape, tokens, query)
            result = f.add(tape, result, f.multiply(tape, gate, attended))
        result = f.clone(tape, result)  # from the order of heads to that of tokens
        return self.output(tape, result)

    def _attend_to(self, tape: Tape, tokens: Weight, query: Tensor) -> Tensor:
        """Attention to the learned tokens, with a mask: ATen's memory-efficient kernel. A mask of
        so few columns is not counted."""
        a = self.attention
        whole = self.inputs(tape, tokens)
        sizes = [constant(PROMPT_LENGTH * width) for width in self.widths]
        _, key, value = f.split(tape, whole, sizes)
        result = tape.empty(per_token(a.result_width), WIDTH)
        sums = tape.empty(per_token(a.num_heads), f.FLOAT32)
        saved = tape.save(query, key, value, result, sums)

        def backward(tape: Tape, gradients: f.Gradients, saved: list[Tensor]) -> f.Gradients:
            grads: f.Gradients = [tape.like(one) for one in saved[:3]]
            products = tape.empty(per_token(a.num_heads), f.FLOAT32)
            workspace = tape.like(saved[0], f.FLOAT32)
            del products, workspace
            return grads

        tape.attach([result], [query, key, value], saved, backward)
        return result

    def _attend_softcapped(self, tape: Tape, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        a = self.attention
        flops = per_pair(2 * a.query_width)
        scores = f.scale(tape, f.batched_product(tape, query, key, per_pair(a.num_heads), flops))
        scores = f.scale(tape, f.tanh(tape, f.scale(tape, scores)))
        mask = tape.empty(per_pair(1), WIDTH)
        scores = f.add_mask(tape, scores, WIDTH)
        scores = f.cast(tape, f.softmax_in_float32(tape, scores), WIDTH)
        result = f.batched_product(tape, scores, value, per_token(a.result_width), flops)
        del mask
        return result

    def _part(self, tape: Tape, x: Tensor, width: int) -> Tensor:
        return f.part(tape, x, scaled(x.elements, width, self.attention.head_dim))

    def _turn(self, tape: Tape, x: Tensor) -> Tensor:
        """`apply_rope`, in fp32 as its tables are."""
        x = self._part(tape, x, self.attention.rotary_dim)
        half = scaled(x.elements, 1, 2)
        first, second = f.part(tape, x, half), f.part(tape, x, half)
        rotated = f.join(tape, [f.scale(tape, second), first])
        straight = f.times_table(tape, x, f.FLOAT32)
        roped = f.add(tape, straight, f.times_table(tape, rotated, f.FLOAT32))
        del straight
        return f.cast(tape, roped, WIDTH)


class _FeedForward:
    """`GptNeoxMLP`, `LLaMAMLP` and `GemmaMLP`. Gate and the other operand are two products."""

    def __init__(self, block: FeedForward, settings: _Settings) -> None:
        self.block = block
        inputs = block.inputs
        if block.gated and len(inputs) == 1:
            half = Linear(
                name="fc",
                in_features=inputs[0].in_features,
                out_features=inputs[0].out_features // 2,
            )
            inputs = (half, half)
        self.inputs = [_adapted(linear, settings, "mlp") for linear in inputs]
        self.output = _adapted(block.output, settings, "mlp")

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        fed = [module(tape, x) for module in self.inputs]
        # One kernel, whatever the name's own code.
        hidden = f.activate(tape, fed[0], "gelu" if "gelu" in self.block.activation else "silu")
        if self.block.gated:
            hidden = f.multiply(tape, hidden, fed[1])
        return self.output(tape, hidden)


class _Norm:
    """`RMSNorm`, which multiplies x by itself. Its weight multiplies fp32 values; in some releases
    (0.3, 0.4) 16-bit ones, which keeps the same while it is frozen."""

    def __init__(self, norm: Norm, trained: bool) -> None:
        self.norm = norm
        self.weight = Weight(norm.width, WIDTH, trained=trained)

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        hidden = f.cast(tape, x, f.FLOAT32)
        squares = f.multiply(tape, hidden, hidden)
        mean = f.mean(tape, squares, self.norm.width)
        del squares
        root = f.reciprocal_root(tape, mean)
        hidden = f.multiply(tape, hidden, root)
        return f.cast(tape, f.multiply(tape, hidden, self.weight), WIDTH)


def _norm(norm: Norm, settings: _Settings) -> Module:
    if norm.kind == "rms":
        return _Norm(norm, settings.scales)
    trained = frozenset(p.name for p in norm.parameters()) if settings.scales else frozenset()
    numerics = Numerics(
        weights=WIDTH, residual=WIDTH, norms=WIDTH, adapters=WIDTH, compute=WIDTH, trained=trained
    )
    return norm_module(norm, numerics)


class _Block:
    """`Block`."""

    def __init__(self, layer: Layer, settings: _Settings, place: int) -> None:
        assert layer.attention_norm is not None
        self.parallel = layer.parallel
        self.first = _norm(layer.attention_norm, settings)
        others = (
            layer.feed_forward_norm,
            layer.post_attention_norm,
            layer.post_feed_forward_norm,
        )
        self.second, *self.behind = (_norm(norm, settings) if norm else None for norm in others)
        prompted = settings.prompts and place >= FIRST_PROMPTED
        self.attention = _Attention(layer.attention, settings, prompted=prompted)
        self.feed_forward = _FeedForward(layer.feed_forward, settings)

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        behind_attention, behind_feed_forward = self.behind
        normed = self.first(tape, x)
        attended = self.attention(tape, normed)
        if behind_attention is not None:
            attended = behind_attention(tape, attended)
        if self.parallel:
            normed = normed if self.second is None else self.second(tape, x)
            both = f.add(tape, self.feed_forward(tape, normed), attended)
            return f.add(tape, both, x)
        assert self.second is not None
        x = f.add(tape, attended, x)
        fed = self.feed_forward(tape, self.second(tape, x))
        if behind_feed_forward is not None:
            fed = behind_feed_forward(tape, fed)
        return f.add(tape, fed, x)


class Gpt:
    """`GPT` for rows of `length` tokens."""

    def __init__(
        self, model: ModelSpec, plan: TrainingPlan, length: int, *, second_adapter: bool = False
    ) -> None:
        assert model.final_norm is not None
        self.model, self.single_row = model, plan.per_device_train_batch_size == 1
        prompts = plan.method == "adaption-prompt"
        self.settings = _Settings(
            prompts=prompts,
            scales=second_adapter,
            targets=frozenset(() if prompts else plan.target_modules),
            rank=plan.lora_rank,
            dropout=plan.lora_dropout,
            is_4bit=plan.quantization != "none",
            double_quant=plan.double_quant,
            held=[],
        )
        self.blocks = [
            _Block(layer, self.settings, place) for place, layer in enumerate(model.layers)
        ]
        self.norm = _norm(model.final_norm, self.settings)
        head = Linear(name="lm_head", in_features=model.hidden_size, out_features=model.vocab_size)
        self.head = _adapted(head, self.settings, "head")
        self.embeddings = Weight(model.embedding_parameters, WIDTH, trained=False)
        last = length - (length - 1) // CHUNK_LENGTH * CHUNK_LENGTH
        self.chunks = [CHUNK_LENGTH] * ((length - 1) // CHUNK_LENGTH) + [last]

    def trained(self) -> Iterator[Weight]:
        """The weights of all adapters; trained norms, which are the model's own, are left out."""
        for block in self.blocks:
            attention, feed_forward = block.attention, block.feed_forward
            yield from attention.prompt
            yield from attention.inputs.weights
            yield from attention.output.weights
            for module in (*feed_forward.inputs, feed_forward.output):
                yield from module.weights
        yield from self.head.weights

    def step(self, tape: Tape, before: list[Tensor]) -> list[Tensor]:
        """Forward and backward of a micro-batch. `before`: what is left of the one before, which is
        let go of when the logits are there; returns what is left of this one."""
        tape.component = "temporaries"
        given = tape.empty(per_token(1), 2 * INDEX_BYTES)
        rotary_dim = self.model.layers[0].attention.rotary_dim
        tables = tape.empty(per_position(rotary_dim), 2 * f.FLOAT32)
        # Fabric turns the logits into fp32 once all are there.
        logits = [f.cast(tape, chunk, f.FLOAT32) for chunk in self._logits(tape)]
        before.clear()
        loss = self._loss(tape, logits)
        gradient: list[Tensor | None] = [tape.like(loss)]
        roots = [loss]
        del loss
        tape.backward(roots, gradient)
        del given, tables
        left = [*logits, *self.settings.held]
        self.settings.held.clear()
        return left

    def _logits(self, tape: Tape) -> list[Tensor]:
        """Of each chunk."""
        x = f.look_up(tape, self.embeddings, per_token(self.model.hidden_size))
        if self.model.scales_embeddings:
            x = f.scale(tape, x)
        for block in self.blocks:
            x = block(tape, x)
        x = self.norm(tape, x)
        tape.component = "logits_and_loss"
        width = self.model.hidden_size
        parts = f.split(tape, x, [per_row(places * width) for places in self.chunks])
        del x
        return [self.head(tape, part) for part in parts]

    def _loss(self, tape: Tape, logits: list[Tensor]) -> Tensor:
        """`chunked_cross_entropy`; the last place of all predicts nothing."""
        places = self.chunks[-1]
        vocab_size = self.model.vocab_size
        logits[-1] = f.part(tape, logits[-1], per_row((places - 1) * vocab_size))
        chunks = list(logits)
        if not self.single_row:
            chunks[-1] = f.clone(tape, chunks[-1])
        return f.join(tape, [f.cross_entropy(tape, chunk) for chunk in chunks])
