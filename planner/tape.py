"""Training on tensors that have a size and nothing else.

A model's forward pass is written down once, with the operations of `functions.py`, as its
modelling code reads. Running it here tells what torch would hold: an operation's result lives as
long as something refers to it, what autograd saves is referred to by a node, and `backward` walks
the nodes as torch's engine does. Sizes are linear in the micro-batch (`Form`), so one run holds
for every batch and length.

Sources: torch/csrc/autograd/engine.cpp and input_buffer.cpp (order of nodes, sums in place),
torch/utils/checkpoint.py (what is computed again, and where it stops), ATen/autocast_mode.cpp
(which copies are cached).
"""

from __future__ import annotations

import heapq
import itertools
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

from msgspec import Struct

from ftplan.planner.units import FLOAT32_BYTES

# A number of bytes or elements: coefficients of 1, rows, row length, tokens, and tokens times row
# length, where tokens = rows x length.
Form = tuple[int, int, int, int, int]
Number = TypeVar("Number", int, float)
ZERO: Form = (0, 0, 0, 0, 0)


def constant(number: int) -> Form:
    return (number, 0, 0, 0, 0)


def per_row(number: int) -> Form:
    return (0, number, 0, 0, 0)


def per_position(number: int) -> Form:
    """So many for each place in a row, whatever the number of rows."""
    return (0, 0, number, 0, 0)


def per_token(number: int) -> Form:
    return (0, 0, 0, number, 0)


def per_pair(number: int) -> Form:
    """So many for each token and each token of its row."""
    return (0, 0, 0, 0, number)


def add_forms(left: Sequence[int], right: Sequence[int]) -> Form:
    a, b, c, d, e = left
    f, g, h, i, j = right
    return (a + f, b + g, c + h, d + i, e + j)


def subtract_forms(left: Sequence[int], right: Sequence[int]) -> Form:
    a, b, c, d, e = left
    f, g, h, i, j = right
    return (a - f, b - g, c - h, d - i, e - j)


def times(form: Sequence[int], factor: int) -> Form:
    a, b, c, d, e = form
    return (a * factor, b * factor, c * factor, d * factor, e * factor)


def scaled(form: Form, numerator: int, denominator: int) -> Form:
    """A form whose every part divides evenly, such as the elements of one more product."""
    a, b, c, d, e = form
    return (
        a * numerator // denominator,
        b * numerator // denominator,
        c * numerator // denominator,
        d * numerator // denominator,
        e * numerator // denominator,
    )


def added(forms: Iterable[Form]) -> Form:
    total = ZERO
    for form in forms:
        total = add_forms(total, form)
    return total


def value(form: Sequence[int], rows: Number, length: Number) -> Number:
    a, b, c, d, e = form
    return a + b * rows + length * (c + rows * (d + e * length))


class Moment(Struct, frozen=True):
    """What is alive at one moment, by component, beyond what was when the trace began."""

    total: Form
    components: dict[str, Form]


class Stretch(Struct):
    """A part of a trace between two marks: what was marked (None at a trace's beginning), what was
    alive then, and the high moments until the next mark."""

    event: object
    begins: Moment
    moments: tuple[Moment, ...] = ()


class Storage:
    """Memory of one or several tensors; it is given back when the last of them goes."""

    __slots__ = ("component", "number", "size", "tape")

    def __init__(self, tape: Tape, size: Form, component: str) -> None:
        self.tape, self.size, self.component = tape, size, component
        self.number = tape.born(self)

    def __del__(self) -> None:
        self.tape.died(self)


class Tensor:
    """`elements` of `width` bytes each in a storage, or a view of some of one.

    `node` made it, as its result number `index`; none made a leaf. `is_view`: torch keeps another
    tensor of the same storage, so that a sum cannot be put into this one. `by_heads`: it is laid
    out head by head, not token by token.
    """

    __slots__ = (
        "by_heads",
        "elements",
        "index",
        "is_view",
        "node",
        "requires_grad",
        "storage",
        "width",
    )

    def __init__(self, storage: Storage | None, elements: Form, width: int) -> None:
        self.storage, self.elements, self.width = storage, elements, width
        self.node: Node | None = None
        self.index = 0
        self.requires_grad = self.is_view = self.by_heads = False

    @property
    def num_bytes(self) -> Form:
        return times(self.elements, self.width)


class Weight(Tensor):
    """A parameter. Its own memory is counted elsewhere; its gradient's and its copies' here.

    `matrix`: its shape, where it is the weight of a torch.nn.Linear. Of a parameter that two
    modules share, the one that backward meets first `waits` for the other; the other's gradient is
    summed with the first while so many tensors of its size live `beside` it.
    """

    __slots__ = ("beside", "gradient", "gradient_is_view", "matrix", "waits")

    def __init__(
        self,
        num_elements: int,
        width: int,
        *,
        trained: bool,
        matrix: tuple[int, int] | None = None,
        waits: bool = False,
        beside: int = 0,
    ) -> None:
        super().__init__(None, constant(num_elements), width)
        self.requires_grad = trained
        self.gradient: Tensor | None = None
        self.gradient_is_view = False
        self.matrix, self.waits, self.beside = matrix, waits, beside


Backward = Callable[["Tape", list["Tensor | None"], list["Tensor"]], "list[Tensor | None]"]


class Node:
    """One operation of the backward pass: its inputs, what it saved, and what it does with the
    gradients of its results (`buffer`)."""

    __slots__ = ("backward", "buffer", "inputs", "order", "saved")

    def __init__(
        self,
        order: int,
        inputs: list[Edge | None],
        saved: list[Tensor | Saved],
        backward: Backward,
        num_results: int,
    ) -> None:
        self.order, self.inputs, self.saved, self.backward = order, inputs, saved, backward
        self.buffer: list[Tensor | None] = [None] * num_results


class Edge(Struct):
    """Where the gradient of an input goes, and the size it has to have there."""

    to: Node | Weight
    index: int
    elements: Form
    width: int


class Saved:
    """What a checkpointed operation saves: nothing, until its layer is computed again."""

    __slots__ = ("__weakref__", "frame", "number")

    def __init__(self, frame: Frame, number: int) -> None:
        self.frame, self.number = frame, number


class Frame(Struct):
    """A checkpointed call: how to compute it again, and what that gave.

    `saved`: in the order of the operations; one whose node is gone is not kept again.
    """

    recompute: Callable[[], object]
    saved: list[weakref.ref[Saved]] = []
    num_again: int = 0
    again: dict[int, Tensor] | None = None


class Update(Protocol):
    """An optimizer that steps within backward: it is called once a parameter's gradient is there,
    and at the end."""

    def __call__(self, tape: Tape, weight: Weight) -> None: ...

    def end(self, tape: Tape) -> None: ...


class _AllSaved(Exception):
    """What backward needs has been computed again; the rest need not be."""


class Tape:
    """Runs operations, and records what is alive.

    `autocast`: width in bytes of the autocast dtype, None without. `on_cuda`, `capability`: which
    operations autocast casts, and which kernels run. `is_fp16`: 16-bit values are fp16, not bf16.
    `accumulates`: gradients of an earlier micro-batch are there already. `residual`: width of
    embeddings, and so of masks. `single_row`: the micro-batch is one row. `update`: what an
    optimizer does with each gradient within backward. `has_dropout`: dropout drops some.
    `partitioned`: ZeRO-3 gathers the parameters, in whose place it puts its own linear function.
    `row_stretch`: rows are so many times as long as those that sizes are forms of.
    """

    def __init__(
        self,
        *,
        autocast: int | None = None,
        on_cuda: bool = True,
        capability: tuple[int, int] = (8, 0),
        is_fp16: bool = False,
        accumulates: bool = False,
        residual: int = 2,
        single_row: bool = False,
        update: Update | None = None,
        has_dropout: bool = True,
        partitioned: bool = False,
        row_stretch: int = 1,
    ) -> None:
        self.row_stretch = row_stretch
        self.update, self.has_dropout = update, has_dropout
        self.partitioned = partitioned
        self.autocast, self.on_cuda, self.capability = autocast, on_cuda, capability
        self.is_fp16, self.accumulates = is_fp16, accumulates
        self.residual, self._single_row = residual, single_row
        self.asks_for_rows = False
        self.component = "temporaries"
        # Births and deaths in order: `i` is the birth of the storage of `sizes[i]`, `~i` its death.
        # `labels[i]`: its component.
        self.sizes: list[Form] = []
        self.labels: list[str] = []
        self.events: list[int] = []
        self.grad_enabled = True
        self.flops: Form = ZERO
        self.float32_flops: Form = ZERO
        self.recomputed_flops: Form = ZERO
        self.num_in_place = 0
        self._read = [0, 0, 0, 0, 0]
        self._live: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0, 0])
        self._total = [0, 0, 0, 0, 0]
        self._moments: list[Moment] = []
        self._risen = False
        self._order = itertools.count()
        self._frame: Frame | None = None
        self._refilled: Frame | None = None
        self._copies: dict[int, Tensor] = {}
        self._cycles: list[Frame] = []
        self._cached: list[Tensor] = []
        self._held: list[Tensor] = []
        self._locals: list[Tensor] = []
        self.returned: list[Tensor] = []
        self._with_gradients: list[Weight] = []
        self.at_first_gradient: Callable[[Tape], None] | None = None
        self._stretches = [Stretch(None, Moment(ZERO, {}))]
        self._numbers: dict[int, int] = {}

    # What is alive.

    def born(self, storage: Storage) -> int:
        """The storage's number in the record."""
        number = len(self.sizes)
        self.sizes.append(storage.size)
        self.labels.append(storage.component)
        self.events.append(number)
        self._risen = True
        _change_both(self._total, self._live[storage.component], storage.size, 1)
        return number

    def died(self, storage: Storage) -> None:
        self.events.append(~storage.number)
        if self._risen:
            self._note()
        _change_both(self._total, self._live[storage.component], storage.size, -1)

    def relabel(self, tensor: Tensor, component: str) -> None:
        """Say what a tensor has become."""
        storage = tensor.storage
        if storage is not None and storage.component != component:
            _change(self._live[storage.component], storage.size, -1)
            _change(self._live[component], storage.size, 1)
            storage.component = self.labels[storage.number] = component

    def state(self) -> dict[str, Form]:
        """What is alive now, by component."""
        return {name: _form(live) for name, live in self._live.items() if any(live)}

    def moments(self) -> tuple[Moment, ...]:
        """The high moments since this was last asked: each is above all others for some batch and
        length."""
        self._note()
        found, self._moments = tuple(self._moments), []
        return found

    def mark(self, event: object) -> None:
        """Begin a stretch."""
        self._stretches[-1].moments = self.moments()
        self._stretches.append(Stretch(event, Moment(_form(self._total), self.state())))

    def stretches(self) -> tuple[Stretch, ...]:
        """Those since this was last asked."""
        self._stretches[-1].moments = self.moments()
        found = tuple(self._stretches)
        self._stretches = [Stretch(None, Moment(_form(self._total), self.state()))]
        return found

    def number_of(self, item: object) -> int:
        """Which one a module or parameter is, by when it was first asked for."""
        return self._numbers.setdefault(id(item), len(self._numbers))

    def _note(self) -> None:
        self._risen = False
        total = _form(self._total)
        for moment in self._moments:
            if covers(moment.total, total):
                return
        self._moments = [m for m in self._moments if not covers(total, m.total)]
        self._moments.append(Moment(total, self.state()))

    def count(self, flops: Form, width: int) -> None:
        """Of a product of values of so many bytes; multiply and add counted as two."""
        self.flops = add_forms(self.flops, flops)
        if width == FLOAT32_BYTES:
            self.float32_flops = add_forms(self.float32_flops, flops)

    def read(self, *tensors: Tensor) -> None:
        """Count the bytes of tensors that an operation reads; parameters are not counted."""
        for tensor in tensors:
            if tensor.storage is not None:
                _change(self._read, tensor.num_bytes, 1)

    @property
    def single_row(self) -> bool:
        """Whether the micro-batch is one row; `asks_for_rows` says that something depends on it."""
        self.asks_for_rows = True
        return self._single_row

    @property
    def num_kernels(self) -> int:
        """Launched so far: one for each new tensor, and those that write where one is."""
        return len(self.sizes) + self.num_in_place

    @property
    def moved(self) -> Form:
        """Bytes written and read so far."""
        return add_forms(self._read, added(self.sizes))

    # Operations.

    def empty(self, elements: Form, width: int, component: str | None = None) -> Tensor:
        """A new tensor that needs no gradient."""
        size = times(elements, width)
        if self.row_stretch > 1:
            size = stretched(size, self.row_stretch)
        return Tensor(Storage(self, size, component or self.component), elements, width)

    def like(self, tensor: Tensor, width: int | None = None) -> Tensor:
        result = self.empty(tensor.elements, width or tensor.width)
        result.by_heads = tensor.by_heads
        return result

    def differentiates(self, *inputs: Tensor) -> bool:
        """Whether an operation on these has a backward pass to come."""
        if self.grad_enabled:
            for tensor in inputs:
                if tensor.requires_grad:
                    return True
        return False

    def save(self, *tensors: Tensor) -> list[Tensor | Saved]:
        """What a node keeps of the tensors that its backward needs.

        torch saves an operation's inputs before it carries it out.
        """
        return [self._saved(tensor) for tensor in tensors]

    def _saved(self, tensor: Tensor) -> Tensor | Saved:
        frame = self._frame
        if frame is not None:
            saved = Saved(frame, len(frame.saved))
            frame.saved.append(weakref.ref(saved))
            return saved
        self._keep(tensor)
        view = Tensor(tensor.storage, tensor.elements, tensor.width)
        frame = self._refilled
        if frame is not None:
            assert frame.again is not None
            if frame.saved[frame.num_again]() is not None:
                frame.again[frame.num_again] = view
            frame.num_again += 1
            if frame.num_again == len(frame.saved):
                raise _AllSaved
        return view

    def _keep(self, tensor: Tensor) -> None:
        if tensor.storage is not None and tensor.storage.component == "temporaries":
            self.relabel(tensor, "activations")

    def hold(self, tensor: Tensor) -> None:
        """Keep a tensor as an attribute of a node: checkpointing does not know of it, and it lives
        as long as the graph."""
        self._keep(tensor)
        self._held.append(Tensor(tensor.storage, tensor.elements, tensor.width))

    def cache(self, *tensors: Tensor) -> None:
        """Hold tensors that the model returns beside its result, until `release_cached`."""
        self._cached += [Tensor(x.storage, x.elements, x.width) for x in tensors]

    def release_cached(self) -> None:
        self._cached.clear()

    def keep_local(self, tensor: Tensor) -> None:
        """Hold a tensor as a local variable of the decoder layer's own forward does."""
        self._locals.append(Tensor(tensor.storage, tensor.elements, tensor.width))

    def release_locals(self, *, returns: bool = False) -> None:
        """At the layer's end, which `returns` them or lets them go."""
        self.returned, self._locals = (self._locals if returns else []), []

    def attach(
        self,
        results: Sequence[Tensor],
        inputs: Sequence[Tensor],
        saved: list[Tensor | Saved],
        backward: Backward,
    ) -> None:
        """Give results their node. `backward` returns a gradient, or None, for each input; it must
        refer to no tensor but those it is given."""
        edges = [_edge(tensor) for tensor in inputs]
        node = Node(next(self._order), edges, saved, backward, len(results))
        for index, result in enumerate(results):
            result.node, result.index, result.requires_grad = node, index, True

    def cast_weight(self, weight: Weight, *, is_view: bool = False) -> Tensor:
        """The parameter as a product under autocast reads it. Copies of trained fp32 parameters,
        but not of views of them, are cached until autocast ends, and made as if gradients were
        asked for (ATen/autocast_mode.cpp, `cached_cast`)."""
        if self.autocast is None or weight.width == self.autocast:
            return weight
        cached = None if is_view else self._copies.get(id(weight))
        if cached is not None:
            return cached
        copy = self.empty(weight.elements, self.autocast, "autocast_copies")
        is_cached = weight.requires_grad and weight.width == 4 and not is_view
        if is_cached:
            self._copies[id(weight)] = copy
        if is_cached or self.differentiates(weight):
            self.attach([copy], [weight], [], _hand_on)
        return copy

    def end_autocast(self) -> None:
        self._copies.clear()

    def checkpoint(self, function: Callable[[Tensor], Tensor], given: list[Tensor]) -> Tensor:
        """`function` of the one tensor in `given`, whose results are computed again for backward
        (torch.utils.checkpoint, `use_reentrant=False`)."""
        argument = given.pop()

        def recompute() -> None:
            function(argument)

        frame = self._frame = Frame(recompute)
        try:
            result = function(argument)
        finally:
            self._frame = None
        if argument.storage is not None:
            self.relabel(argument, "activations")
        if not frame.saved:
            # The frame and the node that holds its arguments refer to each other: without saved
            # tensors nothing breaks the circle before Python's collector does.
            self._cycles.append(frame)
        return result

    def checkpoint_reentrant(
        self, function: Callable[[Tensor], Tensor], given: list[Tensor]
    ) -> Tensor:
        """The same by torch's older function: backward within backward, nothing left out."""
        argument = given.pop()
        if not self.differentiates(argument):
            return function(argument)
        saved = self.save(argument)
        self.grad_enabled = False
        try:
            result = function(argument)
        finally:
            self.grad_enabled = True
        returned = [(x.elements, x.width) for x in self.returned]

        def backward(
            tape: Tape, gradients: list[Tensor | None], saved: list[Tensor]
        ) -> list[Tensor | None]:
            # Of what came with the result, zeros stand for the gradient (`materialize_grads`).
            zeros = [tape.empty(*size) for size in returned]
            leaf = saved[0]
            holder = tape.leaf(leaf)
            held, tape._held = tape._held, []
            tape.grad_enabled = True
            before = tape.flops
            result = function(leaf)
            tape._count_again(before)
            tape.grad_enabled = False
            tape.end_autocast()
            # Result, what came with it and gradient are held by the call until all is done.
            beside, tape.returned = tape.returned, []
            tape.backward([result], [gradients[0]])
            beside.clear()
            zeros.clear()
            tape.release_cached()
            tape._held = held
            return [holder.pop()]

        self.attach([result], [argument], saved, backward)
        return result

    def leaf(self, tensor: Tensor) -> list[Tensor | None]:
        """Make a tensor the beginning of a graph; its gradient is put into the returned list."""
        holder: list[Tensor | None] = []

        def backward(
            tape: Tape, gradients: list[Tensor | None], saved: list[Tensor]
        ) -> list[Tensor | None]:
            holder.append(gradients[0])
            return []

        self.attach([tensor], [], [], backward)
        return holder

    def backward(self, roots: list[Tensor], gradients: list[Tensor | None]) -> None:
        """Walk the nodes from the root back, the later ones first. Both lists are emptied: what
        they hold lives no longer than torch would keep it."""
        root = roots.pop()
        node = root.node
        assert node is not None
        node.buffer[root.index] = gradients.pop()
        del root
        waiting = [(-node.order, node)]
        seen = {node.order}
        grad_enabled, self.grad_enabled = self.grad_enabled, False
        while waiting:
            node = heapq.heappop(waiting)[1]
            seen.discard(node.order)
            results = self._run(node)
            inputs, node.inputs = node.inputs, []
            for edge in inputs:
                gradient = results.pop(0) if results else None
                if edge is None or gradient is None:
                    continue
                if isinstance(edge.to, Weight):
                    self._accumulate(edge.to, gradient)
                    gradient = None
                    if self.update is not None and not edge.to.waits:
                        self.update(self, edge.to)
                    continue
                if edge.to.order not in seen:
                    seen.add(edge.to.order)
                    heapq.heappush(waiting, (-edge.to.order, edge.to))
                self._sum_up(edge, gradient)
                gradient = None
        self.grad_enabled = grad_enabled

    def _run(self, node: Node) -> list[Tensor | None]:
        """The gradients of the node's inputs, summed and cast to what those inputs are."""
        gradients, node.buffer = node.buffer, []
        saved = [self._unpacked(item) for item in node.saved]
        self.read(*saved, *(gradient for gradient in gradients if gradient is not None))
        results = node.backward(self, gradients, saved)
        saved.clear()  # what was computed again is gone; what was not, the node holds
        for number, edge in enumerate(node.inputs[: len(results)]):
            if edge is None:
                continue
            result = results[number]
            if result is not None and result.elements != edge.elements:
                result = results[number] = self.empty(edge.elements, result.width)
            if result is not None and result.width != edge.width:
                result = results[number] = self.like(result, edge.width)
            del result
        gradients.clear()
        node.saved = []
        return results

    def _unpacked(self, item: Tensor | Saved) -> Tensor:
        if isinstance(item, Tensor):
            return item
        if item.frame.again is None:
            self._recompute(item.frame)
        assert item.frame.again is not None
        return item.frame.again.pop(item.number)

    def _recompute(self, frame: Frame) -> None:
        frame.again, frame.num_again = {}, 0
        self._refilled, self.grad_enabled = frame, True
        copies, self._copies = self._copies, {}
        held, self._held = self._held, []
        before = self.flops
        try:
            frame.recompute()
        except _AllSaved:
            pass
        finally:
            self._count_again(before)
            self._refilled, self.grad_enabled = None, False
            self._copies, self._held = copies, held
            self.returned.clear()
            self.release_cached()

    def _count_again(self, before: Form) -> None:
        """What was computed since then was computed for the second time."""
        again = subtract_forms(self.flops, before)
        self.recomputed_flops = add_forms(self.recomputed_flops, again)

    def _accumulate(self, weight: Weight, gradient: Tensor) -> None:
        """The first gradient of a parameter is kept as it is, later ones are added to it."""
        weight.gradient_is_view = gradient.is_view
        beside = [self.like(gradient) for _ in range(weight.beside)]
        beside.clear()
        if weight.waits:
            self.relabel(gradient, "gradients")
            weight.gradient = gradient
            return
        begin, self.at_first_gradient = self.at_first_gradient, None
        if begin is not None:
            begin(self)
        if weight.gradient is None and not self.accumulates:
            self.relabel(gradient, "gradients")
            weight.gradient = gradient
            self._with_gradients.append(weight)
        else:
            self.num_in_place += 1

    def release_gradients(self) -> None:
        """Let go of the gradients of all parameters."""
        for weight in self._with_gradients:
            weight.gradient = None
        self._with_gradients.clear()

    def _sum_up(self, edge: Edge, gradient: Tensor) -> None:
        """Into the first gradient where no one else refers to it, else into a new tensor."""
        node = edge.to
        assert isinstance(node, Node)
        first = node.buffer[edge.index]
        if first is None:
            node.buffer[edge.index] = gradient
        elif first.is_view or sys.getrefcount(first) > _ONLY_REFERENCE or is_shared(first):
            node.buffer[edge.index] = self.like(first)
        else:
            self.num_in_place += 1


# What `sys.getrefcount` says of an object in a list's slot and one variable.
_ONLY_REFERENCE = 3


def is_shared(tensor: Tensor) -> bool:
    """Whether other tensors use the storage: its slot in `tensor` and the call refer to it."""
    return sys.getrefcount(tensor.storage) > 2


def _edge(tensor: Tensor) -> Edge | None:
    if not tensor.requires_grad:
        return None
    if isinstance(tensor, Weight):
        return Edge(tensor, 0, tensor.elements, tensor.width)
    assert tensor.node is not None
    return Edge(tensor.node, tensor.index, tensor.elements, tensor.width)


def _hand_on(
    tape: Tape, gradients: list[Tensor | None], saved: list[Tensor]
) -> list[Tensor | None]:
    """The gradient as it came."""
    return [gradients[0]]


def _change(sums: list[int], size: Form, sign: int) -> None:
    a, b, c, d, e = size
    if d:  # most sizes are so many bytes a token
        sums[3] += sign * d
    if a:
        sums[0] += sign * a
    if b or c or e:
        sums[1] += sign * b
        sums[2] += sign * c
        sums[4] += sign * e


def _change_both(total: list[int], live: list[int], size: Form, sign: int) -> None:
    """`_change` of two sums, in one call: this is what a trace does most."""
    a, b, c, d, e = size
    if d:
        d *= sign
        total[3] += d
        live[3] += d
    if a:
        a *= sign
        total[0] += a
        live[0] += a
    if b or c or e:
        _change(total, (0, b, c, 0, e), sign)
        _change(live, (0, b, c, 0, e), sign)


def _form(sums: Sequence[int]) -> Form:
    a, b, c, d, e = sums
    return (a, b, c, d, e)


def stretched(form: Form, factor: int) -> Form:
    """The form of rows that are so many times as long."""
    a, b, c, d, e = form
    return (a, b, c * factor, d * factor, e * factor * factor)


def covers(left: Form, right: Form) -> bool:
    """Whether `left` is at least `right` for every batch and length."""
    a, b, c, d, e = left
    f, g, h, i, j = right
    return d >= i and a >= f and e >= j and c >= h and b >= g
