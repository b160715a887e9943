"""Operations that adapters need beside those of `functions.py`, on tensors of any size."""

from __future__ import annotations

from ftplan.planner import functions as f
from ftplan.planner.tape import Form, Tape, Tensor, Weight, constant, times


def view(tape: Tape, x: Tensor) -> Tensor:
    """x seen otherwise, such as transposed. Autocast makes a copy of a parameter's view anew each
    time."""
    result = Tensor(x.storage, x.elements, x.width)
    if tape.differentiates(x):
        tape.attach([result], [x], [], f._pass_on)
    return result


def detached(x: Tensor) -> Tensor:
    """x without a past."""
    return Tensor(x.storage, x.elements, x.width)


def matrix(tape: Tape, rows: int, columns: int, width: int) -> Tensor:
    """A new matrix, such as the identity, that needs no gradient."""
    return tape.empty(constant(rows * columns), width)


def matmul(tape: Tape, x: Tensor, y: Tensor, in_features: int, out_features: int) -> Tensor:
    """x times y; either may be a parameter. Autocast casts both."""
    left, right = _to_product(tape, x), _to_product(tape, y)
    return f.product(tape, left, right, in_features, out_features)


def _to_product(tape: Tape, x: Tensor) -> Tensor:
    return tape.cast_weight(x) if isinstance(x, Weight) else f.to_product(tape, x)


def add_in_place(tape: Tape, x: Tensor, y: Tensor, *, scales: bool = False) -> Tensor:
    """x, to which y is added where it lies. `scales`: a multiple of y, and so of its gradient."""
    tape.read(x, y)
    result = Tensor(x.storage, x.elements, x.width)
    if tape.differentiates(x, y):
        tape.attach([result], [x, y], [], _of_difference if scales else f._pass_to_both)
    return result


def subtract(tape: Tape, x: Tensor, y: Tensor) -> Tensor:
    tape.read(x, y)
    result = tape.empty(f.larger(x.elements, y.elements), max(x.width, y.width))
    if tape.differentiates(x, y):
        learns = tape.differentiates(y)
        tape.attach([result], [x, y], [], _of_difference if learns else f._pass_to_both)
    return result


def _of_difference(tape: Tape, gradients: f.Gradients, saved: list[Tensor]) -> f.Gradients:
    """The gradient as it came, and its negative or multiple."""
    incoming = gradients[0]
    assert incoming is not None
    return [incoming, tape.like(incoming)]


def batched(tape: Tape, x: Tensor, y: Tensor, elements: Form, inner: int) -> Tensor:
    """A product of stacked matrices, in any order."""
    left, right = _to_product(tape, x), _to_product(tape, y)
    tape.read(left, right)
    x_learns, y_learns = tape.differentiates(left), tape.differentiates(right)
    saved = tape.save(left) if y_learns else []
    if x_learns:
        saved += tape.save(right)
    result = tape.empty(elements, left.width)
    flops = times(elements, 2 * inner)
    width = left.width
    tape.count(flops, width)
    if x_learns or y_learns:
        sizes = (f._size(left) if x_learns else None, f._size(right) if y_learns else None)

        def backward(tape: Tape, gradients: f.Gradients, saved: list[Tensor]) -> f.Gradients:
            tape.count(times(flops, x_learns + y_learns), width)
            return [tape.empty(*size) if size else None for size in sizes]

        tape.attach([result], [left, right], saved, backward)
    return result


def view_copied_back(tape: Tape, x: Tensor) -> Tensor:
    """x in another shape, whose gradient comes in another order and is copied."""
    result = Tensor(x.storage, x.elements, x.width)
    if tape.differentiates(x):
        tape.attach([result], [x], [], f._new_like(x))
    return result


def norm(tape: Tape, x: Tensor, elements: Form) -> Tensor:
    """The lengths of x's vectors. Backward scales x."""
    tape.read(x)
    result = tape.empty(elements, x.width)
    if tape.differentiates(x):
        saved = tape.save(x, result)
        tape.attach([result], [x], saved, f._new(f._size(x)))
    return result


def outer(tape: Tape, x: Tensor, y: Tensor, elements: Form) -> Tensor:
    """x times y, both broadcast to `elements`."""
    tape.read(x, y)
    x_learns, y_learns = tape.differentiates(x), tape.differentiates(y)
    saved = tape.save(x) if y_learns else []
    if x_learns:
        saved += tape.save(y)
    width = max(x.width, y.width)
    result = tape.empty(elements, width)
    if x_learns or y_learns:
        size = (elements, width)
        backward = f._new(size if x_learns else None, size if y_learns else None)
        tape.attach([result], [x, y], saved, backward)
    return result


def divide(tape: Tape, x: Tensor, y: Tensor) -> Tensor:
    """x by y, which may be broadcast. The divisor's gradient is made of x over its square."""
    tape.read(x, y)
    x_learns, y_learns = tape.differentiates(x), tape.differentiates(y)
    saved = tape.save(y) if x_learns or y_learns else []
    if y_learns:
        saved += tape.save(x)
    elements, width = f.larger(x.elements, y.elements), max(x.width, y.width)
    result = tape.empty(elements, width)

    def backward(tape: Tape, gradients: f.Gradients, saved: list[Tensor]) -> f.Gradients:
        of_x = tape.empty(elements, width) if x_learns else None
        if not y_learns:
            return [of_x, None]
        negative = tape.empty(elements, width)
        quotient = tape.empty(elements, width)
        square = tape.empty(elements, width)
        del quotient
        of_y = tape.empty(elements, width)
        del negative, square
        return [of_x, of_y]

    if x_learns or y_learns:
        tape.attach([result], [x, y], saved, backward)
    return result


def reduced(tape: Tape, x: Tensor, elements: Form) -> Tensor:
    """A sum or mean over some of x's places. Backward expands the gradient, which is no copy."""
    tape.read(x)
    result = tape.empty(elements, x.width)
    if tape.differentiates(x):
        whole = x.elements

        def backward(tape: Tape, gradients: f.Gradients, saved: list[Tensor]) -> f.Gradients:
            gradient = gradients[0]
            assert gradient is not None
            return [Tensor(gradient.storage, whole, gradient.width)]

        tape.attach([result], [x], [], backward)
    return result


def put_at(tape: Tape, values: Tensor, elements: Form) -> Tensor:
    """Zeros of a size, into which values are put. Backward takes the gradient from their places."""
    tape.read(values)
    result = tape.empty(elements, values.width)
    if tape.differentiates(values):
        tape.attach([result], [values], [], f._new(f._size(values)))
    return result


def looked_up(tape: Tape, weight: Weight, elements: Form) -> Tensor:
    """Values at places of a parameter. Backward puts them among zeros, in a tensor more."""
    tape.read(weight)
    result = tape.empty(elements, weight.width)
    if tape.differentiates(weight):
        size = f._size(weight)

        def backward(tape: Tape, gradients: f.Gradients, saved: list[Tensor]) -> f.Gradients:
            zeros = tape.empty(*size)
            gradient = tape.empty(*size)
            del zeros
            return [gradient]

        tape.attach([result], [weight], [], backward)
    return result


def reordered(tape: Tape, x: Tensor) -> Tensor:
    """A copy in another order; so is its gradient."""
    tape.read(x)
    result = tape.like(x)
    if tape.differentiates(x):
        tape.attach([result], [x], [], f._new_like(x))
    return result


def averaged(tape: Tape, x: Tensor, elements: Form) -> Tensor:
    """A mean over some of x's places. Backward divides the gradient, which is expanded first."""
    tape.read(x)
    result = tape.empty(elements, x.width)
    if tape.differentiates(x):
        tape.attach([result], [x], [], f._new_like(x))
    return result


def add_sparse(tape: Tape, x: Tensor, values: Tensor, places: Tensor) -> Tensor:
    """x, to which values at some places are added where it lies. Backward brings the whole
    gradient into the width of the values."""
    result = Tensor(x.storage, x.elements, x.width)
    if tape.differentiates(values):
        size = f._size(values)

        def backward(tape: Tape, gradients: f.Gradients, saved: list[Tensor]) -> f.Gradients:
            incoming = gradients[0]
            assert incoming is not None
            whole = f.cast(tape, incoming, size[1])
            gradient = tape.empty(*size)
            del whole, incoming
            return [None, gradient]

        tape.attach([result], [x, values], tape.save(values, places), backward)
    return result


def scattered(tape: Tape, x: Tensor, values: Tensor, places: Tensor) -> Tensor:
    """A copy of x with values added at some places."""
    tape.read(x, values)
    result = tape.like(x)
    if tape.differentiates(values):
        tape.attach([result], [values], tape.save(places), f._new(f._size(values)))
    return result


def inverse_transform(tape: Tape, x: Tensor) -> Tensor:
    """The real part, a view, of x's inverse Fourier transform. Backward puts the gradient beside
    zeros and transforms it back."""
    tape.read(x)
    converted = tape.like(x, 2 * x.width)
    whole = tape.like(x, 2 * x.width)
    del converted
    result = Tensor(whole.storage, x.elements, x.width)
    if tape.differentiates(x):
        elements, width = x.elements, x.width

        def backward(tape: Tape, gradients: f.Gradients, saved: list[Tensor]) -> f.Gradients:
            gradients.clear()
            beside = tape.empty(elements, 2 * width)
            whole = tape.empty(elements, 2 * width)
            del beside
            return [Tensor(whole.storage, elements, width)]

        tape.attach([result], [x], [], backward)
    return result


def exponential(tape: Tape, x: Tensor) -> Tensor:
    x = f.in_float32(tape, x)
    return f._each_value(tape, x, saves_input=False, saves_result=True)


def convolved(tape: Tape, x: Tensor) -> Tensor:
    """As many values by a convolution with frozen filters, which keeps its input."""
    return f._each_value(tape, x, saves_input=True)


def projected(tape: Tape, x: Tensor, inner: Form, *, subtracts: bool) -> Tensor:
    """x as it is. A hook multiplies its gradient by a matrix and its transpose, over `inner`
    values; or subtracts that from it."""
    result = Tensor(x.storage, x.elements, x.width)
    if tape.differentiates(x):

        def backward(tape: Tape, gradients: f.Gradients, saved: list[Tensor]) -> f.Gradients:
            incoming = gradients[0]
            assert incoming is not None
            coefficients = tape.empty(inner, incoming.width)
            product = tape.like(incoming)
            del coefficients
            return [tape.like(incoming) if subtracts else product]

        tape.attach([result], [x], [], backward)
    return result


def solved(tape: Tape, x: Tensor, y: Tensor) -> Tensor:
    """The solution of linear equations in batches of matrices. Keeps x, its factors and the
    solution (`linalg_solve_backward`)."""
    tape.read(x, y)
    saved = tape.save(x)
    factors, result = tape.like(x), tape.like(y)
    if tape.differentiates(x, y):
        saved += tape.save(factors, result)
        tape.attach([result], [x, y], saved, f._new(f._size(x), f._size(y)))
    return result
