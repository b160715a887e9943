"""Operations on a tape: what each returns, what it saves for backward, and what backward makes.

What is saved follows autograd's rules (torch/tools/autograd/derivatives.yaml): a product saves the
operand whose partner needs a gradient, softmax and rsqrt save their results, sums save nothing.
"""

from __future__ import annotations

from ftplan.planner.tape import (
    ZERO,
    Backward,
    Form,
    Tape,
    Tensor,
    Weight,
    add_forms,
    constant,
    scaled,
    times,
)

FLOAT32 = 4
Gradients = list["Tensor | None"]


def _new(*sizes: tuple[Form, int] | None) -> Backward:
    """A backward that makes a new gradient of (elements, width) for each input that has one."""

    def backward(tape: Tape, gradients: Gradients, saved: list[Tensor]) -> Gradients:
        return [tape.empty(*size) if size else None for size in sizes]

    return backward


def _new_like(x: Tensor) -> Backward:
    """The same for the one input x."""
    elements, width, in_order = x.elements, x.width, x.by_heads

    def backward(tape: Tape, gradients: Gradients, saved: list[Tensor]) -> Gradients:
        gradient = tape.empty(elements, width)
        gradient.by_heads = in_order
        return [gradient]

    return backward


def _pass_on(tape: Tape, gradients: Gradients, saved: list[Tensor]) -> Gradients:
    """The gradient as it came."""
    return [gradients[0]]


def _pass_to_both(tape: Tape, gradients: Gradients, saved: list[Tensor]) -> Gradients:
    """The gradient of a sum, for both of its sides."""
    return [gradients[0], gradients[0]]


def _size(x: Tensor) -> tuple[Form, int]:
    return x.elements, x.width


def _each_value(tape: Tape, x: Tensor, *, saves_input: bool, saves_result: bool = False) -> Tensor:
    """An operation on each value, whose gradient takes one new tensor."""
    tape.read(x)
    if not tape.differentiates(x):
        return tape.like(x)
    saved = tape.save(x) if saves_input else []
    result = tape.like(x)
    if saves_result:
        saved += tape.save(result)
    tape.attach([result], [x], saved, _new_like(x))
    return result


def cast(tape: Tape, x: Tensor, width: int) -> Tensor:
    """A copy of another width; the tensor itself where it has that."""
    if x.width == width:
        return x
    tape.read(x)
    result = tape.like(x, width)
    if tape.differentiates(x):
        tape.attach([result], [x], [], _new_like(x))
    return result


def in_float32(tape: Tape, x: Tensor) -> Tensor:
    """An input as CUDA's autocast hands it to `pow` and `layer_norm`; the processor's does not."""
    return cast(tape, x, FLOAT32) if tape.autocast and tape.on_cuda else x


def to_product(tape: Tape, x: Tensor) -> Tensor:
    """An input as autocast hands it to a product."""
    return x if tape.autocast is None else cast(tape, x, tape.autocast)


def clone(tape: Tape, x: Tensor) -> Tensor:
    """A copy; the gradient goes through as it is."""
    tape.read(x)
    result = tape.like(x)
    if tape.differentiates(x):
        tape.attach([result], [x], [], _pass_on)
    return result


def sum_over_gpus(tape: Tape, x: Tensor, *, has_bias: bool) -> Tensor:
    """The sum of what each GPU has, in a new tensor (torch's functional `all_reduce`, which copies
    its input). Without gradients transformers sums in place, and then adds the bias. The gradient
    goes through as it is."""
    return clone(tape, x) if tape.grad_enabled or has_bias else x


def sum_gradient_over_gpus(tape: Tape, x: Tensor) -> Tensor:
    """x, of whose gradient each GPU gets a part: the sum is a new tensor."""
    if not tape.differentiates(x):
        return x
    result = Tensor(x.storage, x.elements, x.width)
    tape.attach([result], [x], [], _new_like(x))
    return result


def gather_columns(tape: Tape, x: Tensor, parts: int) -> Tensor:
    """All GPUs' columns: gathered part behind part, then joined row by row
    (`all_gather_tensor` of torch/distributed/_functional_collectives.py). Backward copies this
    GPU's columns of the gradient."""
    tape.read(x)
    gathered = tape.empty(times(x.elements, parts), x.width)
    result = tape.like(gathered)
    if tape.differentiates(x):
        tape.attach([result], [x], [], _new(_size(x)))
    return result


def gather_rows(tape: Tape, weight: Tensor, parts: int) -> Tensor:
    """All GPUs' rows of a weight (`DTensor.full_tensor`)."""
    result = tape.empty(times(weight.elements, parts), weight.width, "communication")
    if tape.differentiates(weight):
        tape.attach([result], [weight], [], _new(_size(weight)))
    return result


def scale(tape: Tape, x: Tensor) -> Tensor:
    """Times a number, or the negative."""
    return _each_value(tape, x, saves_input=False)


def activate(tape: Tape, x: Tensor, name: str) -> Tensor:
    """The activation of that (Hugging Face's) name."""
    if name == "bloom_gelu":
        return _bloom_gelu(tape, x)
    if name in ("relu", "sigmoid"):
        return _each_value(tape, x, saves_input=False, saves_result=True)
    if name in ("gelu_new", "gelu_fast", "gelu_pytorch_new"):
        return _gelu_in_python(tape, x)
    return _each_value(tape, x, saves_input=True)


def _gelu_in_python(tape: Tape, x: Tensor) -> Tensor:
    """tanh-GELU written out: half of x times (1 + tanh(c (x + 0.0447 x^3)))
    (transformers.activations.NewGELUActivation)."""
    half = scale(tape, x)
    cube = scale(tape, power(tape, x))
    inner = add(tape, x, cube)
    del cube
    inner = scale(tape, inner)
    inner = tanh(tape, inner)
    inner = _each_value(tape, inner, saves_input=False)
    return multiply(tape, half, inner)


def _bloom_gelu(tape: Tape, x: Tensor) -> Tensor:
    """tanh-GELU as one function that keeps its input
    (transformers.models.bloom.modeling_bloom.GeLUFunction)."""
    tape.read(x)
    result = _bloom_gelu_forward(tape, x)
    if tape.differentiates(x):
        tape.attach([result], [x], tape.save(x), _bloom_gelu_backward)
    return result


def _bloom_gelu_forward(tape: Tape, x: Tensor) -> Tensor:
    half = tape.like(x)
    tanh = _bloom_tanh(tape, x)
    one_more = tape.like(x)
    del tanh
    result = tape.like(x)
    del half, one_more
    return result


def _bloom_tanh(tape: Tape, x: Tensor) -> Tensor:
    """tanh(0.798 x (1 + 0.0447 x x)), a tensor for each step."""
    outer, inner = tape.like(x), tape.like(x)
    square = tape.like(x)
    del inner
    one_more = tape.like(x)
    del square
    product = tape.like(x)
    del outer, one_more
    result = tape.like(x)
    del product
    return result


def _bloom_gelu_backward(tape: Tape, gradients: Gradients, saved: list[Tensor]) -> Gradients:
    """(0.5 x ((1 - t t) (0.798 + 0.107 x x)) + 0.5 (1 + t)) times the gradient."""
    x = saved[0]
    tanh = _bloom_tanh(tape, x)
    half, rest = tape.like(x), tape.like(x)
    square = tape.like(x)
    factor = tape.like(x)
    del square
    product = tape.like(x)
    del rest, factor
    left = tape.like(x)
    del half, product
    right = tape.like(x)
    slope = tape.like(x)
    del left, right
    result = tape.like(x)
    del slope, tanh
    return [result]


def clamp(tape: Tape, x: Tensor) -> Tensor:
    """Between bounds that are numbers."""
    return _each_value(tape, x, saves_input=True)


def power(tape: Tape, x: Tensor) -> Tensor:
    """To a power that is a number. Backward multiplies a lower power (`pow_backward`)."""
    tape.read(x)
    x = in_float32(tape, x)
    if not tape.differentiates(x):
        return tape.like(x)
    saved = tape.save(x)
    result = tape.like(x)

    def backward(tape: Tape, gradients: Gradients, saved: list[Tensor]) -> Gradients:
        lower = tape.like(saved[0])
        multiple = tape.like(lower)
        return [tape.like(multiple)]

    tape.attach([result], [x], saved, backward)
    return result


def add(tape: Tape, x: Tensor, y: Tensor) -> Tensor:
    tape.read(x, y)
    result = tape.empty(larger(x.elements, y.elements), max(x.width, y.width))
    if tape.differentiates(x, y):
        tape.attach([result], [x, y], [], _pass_to_both)
    return result


def add_in_place(tape: Tape, x: Tensor, y: Tensor) -> Tensor:
    """x, with y added to it."""
    tape.num_in_place += 1
    tape.read(x, y)
    result = Tensor(x.storage, x.elements, x.width)
    if tape.differentiates(x, y):
        tape.attach([result], [x, y], [], _pass_to_both)
    return result


def multiply(tape: Tape, x: Tensor, y: Tensor) -> Tensor:
    """x times y, one of which may be a vector, or a number for each token."""
    tape.read(x, y)
    saved = []
    x_learns, y_learns = tape.differentiates(x), tape.differentiates(y)
    if y_learns:
        saved += tape.save(x)
    if x_learns:
        saved += tape.save(y)
    elements, width = larger(x.elements, y.elements), max(x.width, y.width)
    result = tape.empty(elements, width)
    if x_learns or y_learns:
        size = (elements, width)
        backward = _new(size if x_learns else None, size if y_learns else None)
        tape.attach([result], [x, y], saved, backward)
    return result


def larger(left: Form, right: Form) -> Form:
    """Elements of a result, one of whose operands may be broadcast."""
    return max(left, right, key=lambda form: form[::-1])


def subtract(tape: Tape, x: Tensor, y: Tensor) -> Tensor:
    """x - y, one of which may be broadcast. The gradient of y is a new tensor: the negative."""
    tape.read(x, y)
    result = tape.empty(larger(x.elements, y.elements), max(x.width, y.width))
    if tape.differentiates(x, y):
        size = _size(result) if tape.differentiates(y) else None

        def backward(tape: Tape, gradients: Gradients, saved: list[Tensor]) -> Gradients:
            return [gradients[0], tape.empty(*size) if size else None]

        tape.attach([result], [x, y], [], backward)
    return result


def mean(tape: Tape, x: Tensor, width: int) -> Tensor:
    """The mean over each vector of `width` values."""
    tape.read(x)
    result = tape.empty(scaled(x.elements, 1, width), x.width)
    if tape.differentiates(x):
        tape.attach([result], [x], [], _new(_size(x)))
    return result


def mean_of_squares(tape: Tape, x: Tensor, width: int) -> Tensor:
    """The mean over each vector of `width` values."""
    return mean(tape, power(tape, x), width)


def reciprocal_root(tape: Tape, x: Tensor) -> Tensor:
    """1 / sqrt(x + epsilon)."""
    tape.read(x)
    with_epsilon = _each_value(tape, x, saves_input=False)
    del x
    if not tape.differentiates(with_epsilon):
        return tape.like(with_epsilon)
    result = tape.like(with_epsilon)
    tape.attach([result], [with_epsilon], tape.save(result), _new(_size(with_epsilon)))
    return result


def product(
    tape: Tape,
    x: Tensor,
    weight: Tensor,
    in_features: int,
    out_features: int,
    bias: Tensor | None = None,
) -> Tensor:
    """A linear module's product, in x's width and the weight's, which are the same.

    ZeRO-3's keeps both operands, whichever learns (`LinearFunctionForZeroStage3` of
    deepspeed/runtime/zero/linear.py).
    """
    tape.read(x)
    x_learns, weight_learns = tape.differentiates(x), tape.differentiates(weight)
    saved = []
    if weight_learns or (tape.partitioned and x_learns):
        saved += tape.save(x)
    if x_learns:
        saved += tape.save(weight)
    elements = scaled(x.elements, out_features, in_features)
    result = tape.empty(elements, x.width)
    flops = times(elements, 2 * in_features)
    width = x.width
    tape.count(flops, width)
    inputs = [x, weight] if bias is None else [x, weight, bias]
    if not tape.differentiates(*inputs):
        return result
    sizes = [
        _size(x) if x_learns else None,
        _size(weight) if weight_learns else None,
        _size(bias) if bias is not None and tape.differentiates(bias) else None,
    ]

    def backward(tape: Tape, gradients: Gradients, saved: list[Tensor]) -> Gradients:
        tape.count(times(flops, x_learns + weight_learns), width)
        grads = [tape.empty(*size) if size else None for size in sizes]
        if grads[0] is not None:
            grads[0].is_view = True  # rows of all batches, seen as a batch of rows
        if grads[1] is not None:
            grads[1].is_view = not tape.partitioned  # transposed
        return grads

    tape.attach([result], inputs, saved, backward)
    return result


def part(tape: Tape, x: Tensor, elements: Form) -> Tensor:
    """A view of some of x. Backward fills the rest with zeros, in a tensor of x's size."""
    result = Tensor(x.storage, elements, x.width)
    if tape.differentiates(x):
        tape.attach([result], [x], [], _new(_size(x)))
    return result


def split(tape: Tape, x: Tensor, sizes: list[Form]) -> list[Tensor]:
    """Views of x that together are x. Backward joins their gradients."""
    results = [Tensor(x.storage, elements, x.width) for elements in sizes]
    if tape.differentiates(x):
        tape.attach(results, [x], [], _new(_size(x)))
    return results


def join(tape: Tape, parts: list[Tensor]) -> Tensor:
    """One tensor of several, which are let go of. Backward hands out views."""
    elements = ZERO
    for one in parts:
        elements = add_forms(elements, one.elements)
    width = max(one.width for one in parts)
    tape.read(*parts)
    result = tape.empty(elements, width)
    if tape.differentiates(*parts):
        shapes = [one.elements for one in parts]

        def backward(tape: Tape, gradients: Gradients, saved: list[Tensor]) -> Gradients:
            whole = gradients[0]
            assert whole is not None
            return [Tensor(whole.storage, elements, whole.width) for elements in shapes]

        tape.attach([result], parts, [], backward)
    parts.clear()
    return result


def dropout(tape: Tape, x: Tensor, rate: float) -> Tensor:
    """Keeps a mask of one byte a value; on a processor what each value is multiplied with
    (ATen/native/Dropout.cpp)."""
    tape.read(x)
    if not rate or not tape.has_dropout:
        return x
    result, mask = tape.like(x), tape.empty(x.elements, 1 if tape.on_cuda else x.width)
    if tape.differentiates(x):
        tape.attach([result], [x], tape.save(mask), _new(_size(x)))
    return result


def times_table(tape: Tape, x: Tensor, table_width: int) -> Tensor:
    """Times a table that needs no gradient: rotary cosines and sines."""
    tape.read(x)
    result = tape.like(x, max(x.width, table_width))
    if tape.differentiates(x):
        tape.attach([result], [x], [], _new((x.elements, result.width)))
    return result


def layer_norm(
    tape: Tape, x: Tensor, width: int, weight: Weight | None, bias: Weight | None
) -> Tensor:
    """Saves its input, mean and reciprocal deviation."""
    tape.read(x)
    x, *own = inputs = [in_float32(tape, t) for t in (x, weight, bias) if t is not None]
    vectors = scaled(x.elements, 1, width)
    if not tape.differentiates(*inputs):
        return tape.like(x)
    saved = tape.save(*inputs)
    result = tape.like(x)
    saved += tape.save(tape.empty(vectors, FLOAT32), tape.empty(vectors, FLOAT32))
    small = (constant(width), x.width)
    sizes = [small if tape.differentiates(parameter) else None for parameter in own]
    tape.attach([result], inputs, saved, _new(_size(x), *sizes))
    return result


def tanh(tape: Tape, x: Tensor) -> Tensor:
    return _each_value(tape, x, saves_input=False, saves_result=True)


def add_mask(tape: Tape, scores: Tensor, width: int) -> Tensor:
    """Scores and a mask of that width, which all layers share."""
    tape.read(scores)
    result = tape.like(scores, max(scores.width, width))
    if tape.differentiates(scores):
        tape.attach([result], [scores], [], _pass_on)
    return result


def softmax_in_float32(tape: Tape, x: Tensor) -> Tensor:
    """CUDA turns fp16 scores into fp32 probabilities in one kernel, others are cast first
    (ATen/native/SoftMax.cpp)."""
    fused = tape.on_cuda and tape.is_fp16 and x.width == 2
    return softmax(tape, x if fused else cast(tape, x, FLOAT32), FLOAT32)


def softmax(tape: Tape, x: Tensor, width: int | None = None) -> Tensor:
    """Saves its result; its backward holds the product of both inputs beside the result, unlike the
    processor's (ATen/native/cuda/SoftMax.cu)."""
    tape.read(x)
    return _with_softmax_backward(tape, x, tape.like(x, width))


def safe_softmax(tape: Tape, x: Tensor) -> Tensor:
    """Rows that are masked out whole become zeros, in another new tensor
    (ATen/native/transformers/attention.cpp, `_safe_softmax`)."""
    tape.read(x)
    usual = tape.like(x)
    masked = tape.empty(x.elements, 1)
    result = tape.like(x)
    del usual, masked
    return _with_softmax_backward(tape, x, result)


def _with_softmax_backward(tape: Tape, x: Tensor, result: Tensor) -> Tensor:
    if tape.differentiates(x):
        size = (x.elements, x.width)

        def backward(tape: Tape, gradients: Gradients, saved: list[Tensor]) -> Gradients:
            product = tape.like(saved[0]) if tape.on_cuda else None
            gradient = tape.empty(*size)
            gradient.by_heads = True
            del product
            return [gradient]

        tape.attach([result], [x], tape.save(result), backward)
    return result


def expand(tape: Tape, x: Tensor, elements: Form) -> Tensor:
    """Copies of each head for the heads of its group, in the order of heads; backward sums them
    up."""
    tape.read(x)
    result = tape.empty(elements, x.width)
    result.by_heads = True
    if tape.differentiates(x):
        tape.attach([result], [x], [], _pass_on)
    return result


def broadcast(tape: Tape, x: Tensor, elements: Form) -> Tensor:
    """A view that repeats x. Backward sums up."""
    result = Tensor(x.storage, elements, x.width)
    if tape.differentiates(x):
        tape.attach([result], [x], [], _pass_on)
    return result


def copy_into(tape: Tape, whole: Tensor, x: Tensor) -> Tensor:
    """`whole` with x written to a part of it. Backward copies the gradient, and the part once more
    (torch/csrc/autograd/functions/tensor.cpp, CopySlices)."""
    tape.num_in_place += 1
    tape.read(x)
    result = Tensor(whole.storage, whole.elements, whole.width)
    if tape.differentiates(whole, x):
        size, part_size = _size(whole), (x.elements, whole.width)
        learns = tape.differentiates(whole)

        def backward(tape: Tape, gradients: Gradients, saved: list[Tensor]) -> Gradients:
            rest = tape.empty(*size)
            of_part = tape.empty(*part_size)
            return [rest if learns else None, of_part]

        tape.attach([result], [whole, x], [], backward)
    return result


def by_heads(tape: Tape, x: Tensor) -> Tensor:
    """x in the order of heads, for a batched product: a copy, where there are several rows and it
    is in the order of tokens."""
    if x.by_heads or tape.single_row:
        return x
    result = clone(tape, x)
    result.by_heads = True
    return result


def batched_product(tape: Tape, x: Tensor, y: Tensor, elements: Form, flops: Form) -> Tensor:
    """A product of `flops`. Backward first brings its gradient into the order of heads, if it is in
    that of tokens."""
    tape.read(x, y)
    x_learns, y_learns = tape.differentiates(x), tape.differentiates(y)
    saved = tape.save(x) if y_learns else []
    if x_learns:
        saved += tape.save(y)
    result = tape.empty(elements, x.width)
    result.by_heads = True
    width = x.width
    tape.count(flops, width)
    if x_learns or y_learns:
        sizes = (_size(x) if x_learns else None, _size(y) if y_learns else None)

        def backward(tape: Tape, gradients: Gradients, saved: list[Tensor]) -> Gradients:
            gradient = gradients[0]
            assert gradient is not None
            copied = by_heads(tape, gradient)
            tape.count(times(flops, x_learns + y_learns), width)
            grads = [tape.empty(*size) if size else None for size in sizes]
            del copied
            return grads

        tape.attach([result], [x, y], saved, backward)
    return result


def part_copied(tape: Tape, x: Tensor, elements: Form) -> Tensor:
    """A copy of some of x. Backward puts its gradient among zeros of x's size."""
    tape.read(x)
    result = tape.empty(elements, x.width)
    if tape.differentiates(x):
        tape.attach([result], [x], [], _new(_size(x)))
    return result


def pick(tape: Tape, x: Tensor, elements: Form, places: Tensor) -> Tensor:
    """Values of x at `places`, which are kept: topk, gather and indexing."""
    tape.read(x)
    saved = tape.save(places) if tape.differentiates(x) else []
    result = tape.empty(elements, x.width)
    if tape.differentiates(x):
        tape.attach([result], [x], saved, _new(_size(x)))
    return result


def cross_entropy(tape: Tape, logits: Tensor) -> Tensor:
    """log-softmax, which is kept, and a sum of its entries. Backward makes a gradient on each side
    of the log-softmax."""
    tape.read(logits)
    logits = in_float32(tape, logits)
    log_softmax = _each_value(tape, logits, saves_input=False, saves_result=True)
    loss = tape.empty(constant(1), FLOAT32)
    if tape.differentiates(log_softmax):
        tape.attach([loss], [log_softmax], tape.save(log_softmax), _new(_size(log_softmax)))
    return loss


def look_up(tape: Tape, weight: Tensor, elements: Form) -> Tensor:
    """Embeddings of tokens. Backward makes a dense gradient."""
    result = tape.empty(elements, weight.width)
    if tape.differentiates(weight):
        tape.attach([result], [weight], [], _new(_size(weight)))
    return result


def merge_rows(tape: Tape, weight: Tensor, rows: Tensor) -> Tensor:
    """A copy of a weight, some of whose rows are put in place of its own."""
    tape.read(weight, rows)
    result = tape.like(weight)
    if tape.differentiates(rows):
        tape.attach([result], [rows], [], _new(_size(rows)))
    return result


def sum_groups(tape: Tape, x: Tensor, elements: Form) -> Tensor:
    """The sum over a token's experts, in fp32 under CUDA's autocast. Backward hands its gradient
    on, expanded; a cast one is as large as what was summed."""
    tape.read(x)
    result = tape.empty(elements, FLOAT32 if tape.autocast and tape.on_cuda else x.width)
    if tape.differentiates(x):
        size = x.elements, x.width

        def backward(tape: Tape, gradients: Gradients, saved: list[Tensor]) -> Gradients:
            whole = gradients[0]
            assert whole is not None
            if whole.width != size[1]:
                return [tape.empty(*size)]
            return [Tensor(whole.storage, *size)]

        tape.attach([result], [x], [], backward)
    return result


def in_place_norm(tape: Tape, x: Tensor, width: int) -> Tensor:
    """A norm whose gradient overwrites the one that comes in."""
    tape.read(x)
    scales = tape.empty(scaled(x.elements, 1, width), FLOAT32)
    if not tape.differentiates(x):
        return tape.like(x)
    saved = tape.save(x, scales)
    result = tape.like(x)
    tape.attach([result], [x], saved, _pass_on)
    return result


def fused_dropout(tape: Tape, x: Tensor) -> Tensor:
    """Dropout within fused LoRA: the input and what is left of it are kept, and no mask but while
    it is made (fms-acceleration, unsloth_lora/bnb/fast_lora.py)."""
    tape.read(x)
    result, mask = tape.like(x), tape.empty(x.elements, 1)
    del mask
    if tape.differentiates(x):
        size = _size(x)

        def backward(tape: Tape, gradients: Gradients, saved: list[Tensor]) -> Gradients:
            places = tape.empty(size[0], 1)
            gradient = tape.empty(*size)
            del places
            return [gradient]

        tape.attach([result], [x], tape.save(x, result), backward)
    return result


def add_rows_in_place(tape: Tape, total: Tensor, part: Tensor) -> Tensor:
    """`total` with a part added to some of its rows (`index_add_`). Backward hands `total`'s
    gradient on, and picks the part's rows out of it."""
    tape.num_in_place += 1
    tape.read(part)
    result = Tensor(total.storage, total.elements, total.width)
    if tape.differentiates(total, part):
        size = _size(part)

        def backward(tape: Tape, gradients: Gradients, saved: list[Tensor]) -> Gradients:
            return [gradients[0], tape.empty(*size)]

        tape.attach([result], [total, part], [], backward)
    return result


def cross_entropy_in_place(tape: Tape, logits: Tensor) -> Tensor:
    """Keeps the logits, over which backward writes its gradient (Unsloth's Triton kernel,
    `Fast_CrossEntropyLoss` in kernels/cross_entropy_loss.py)."""
    tape.read(logits)
    loss = tape.empty(constant(1), FLOAT32)
    if tape.differentiates(logits):

        def backward(tape: Tape, gradients: Gradients, saved: list[Tensor]) -> Gradients:
            return [saved[0]]

        tape.attach([loss], [logits], tape.save(logits), backward)
    return loss
