"""Operations that adapters need beside those of `functions.py`, on tensors of any size."""

from __future__ import annotations

from ftplan.planner import functions as f
from ftplan.planner.tape import Form, Tape, Tensor, Weight, constant


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
    left = tape.cast_weight(x) if isinstance(x, Weight) else f.to_product(tape, x)
    right = tape.cast_weight(y) if isinstance(y, Weight) else f.to_product(tape, y)
    return f.product(tape, left, right, in_features, out_features)


def add_in_place(tape: Tape, x: Tensor, y: Tensor) -> Tensor:
    """x, to which y is added where it lies."""
    tape.read(x, y)
    result = Tensor(x.storage, x.elements, x.width)
    if tape.differentiates(x, y):
        tape.attach([result], [x, y], [], f._pass_on)
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
