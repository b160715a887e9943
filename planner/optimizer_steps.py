"""What optimizers keep for each parameter, and what their steps hold, as their code reads.

A step runs on a tape without data: what a variable refers to is alive until the variable is given
something else, also from one parameter to the next.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from msgspec import Struct

from ftplan.planner.allocator import BLOCK_BYTES
from ftplan.planner.tape import Tape, Tensor, Weight, constant, value

FLOAT32 = 4

# What bitsandbytes and torchao quantize in 8 or 4 bits: tensors of at least so many elements
# (`min_8bit_size`; torchao/optim/adam.py `_new_buffer`), in blocks of so many (bitsandbytes'
# default; transformers asks torchao for the same).
MIN_QUANTIZED_ELEMENTS = 4096
STATE_BLOCK_SIZE = 256

# Columns of GaLore's and APOLLO's projections, transformers' default.
PROJECTION_RANK = 128


class Updated(Struct, frozen=True, kw_only=True):
    """`count` equal parameters that an optimizer updates, of `width` bytes an element.

    `kind`: an `embedding`'s matrix, one of a `linear` module (torch.nn's own), or another.
    `is_hidden_matrix`: one that Muon updates; `is_lora_b`: LoRA's second matrix.
    """

    shape: tuple[int, ...]
    width: int
    count: int = 1
    kind: Literal["embedding", "linear", "other"] = "other"
    is_hidden_matrix: bool = False
    is_lora_b: bool = False

    @property
    def num_elements(self) -> int:
        return _product(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.width

    @property
    def projected(self) -> tuple[int, int, int]:
        """Elements of the gradient as GaLore projects it, of the projection, and of the matrix of
        singular vectors whose part the projection is (galore_projector.py, `std`)."""
        rows, columns = self.shape
        least = min(self.shape)
        rank = min(least, PROJECTION_RANK)
        longer = max(rows, columns)
        return longer * rank, rank * least, least * least

    @property
    def randomly_projected(self) -> tuple[int, int]:
        """The same of APOLLO's: random matrices, which have all columns."""
        return max(self.shape) * PROJECTION_RANK, min(self.shape) * PROJECTION_RANK


class Stepped:
    """One parameter while the optimizer steps, with its gradient."""

    __slots__ = ("gradient", "of")

    def __init__(self, of: Updated, gradient: Tensor | None) -> None:
        self.of, self.gradient = of, gradient


Groups = Sequence[Sequence[Stepped]]
# Bytes of each tensor that an optimizer keeps for one of these parameters; and a step on groups
# of parameters.
States = Callable[[Updated], Iterable[int]]
Grouping = Callable[[Sequence[Updated]], list[list[Updated]]]
Step = Callable[[Tape, Groups], None]
FusedStep = Callable[[Tape, Stepped], None]


def rounded(num_bytes: int) -> int:
    """What CUDA's allocator gives for one tensor."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


def hold(tape: Tape, num_elements: int, width: int, component: str | None = None) -> Tensor:
    """A tensor of the optimizer's."""
    num_bytes = num_elements * width
    return tape.empty(constant(rounded(num_bytes) if tape.on_cuda else num_bytes), 1, component)


def _product(shape: Iterable[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


# --- groups


def low_rank_groups(parameters: Sequence[Updated]) -> list[list[Updated]]:
    """The matrices of linear modules come last (transformers, `_setup_low_rank_optimizer`)."""
    ordered = _in_order(parameters)
    linear = [p for p in ordered if p.kind == "linear"]
    return [[p for p in ordered if p.kind != "linear"], linear]


def decay_groups(parameters: Sequence[Updated]) -> list[list[Updated]]:
    """Vectors (norms, biases) come last: their weights do not decay (transformers,
    `get_decay_parameter_names`)."""
    ordered = _in_order(parameters)
    return [[p for p in ordered if len(p.shape) > 1], [p for p in ordered if len(p.shape) < 2]]


def _in_order(parameters: Sequence[Updated]) -> list[Updated]:
    """Each parameter by itself, layer by layer: embeddings first, the head last."""
    embeddings = [p for p in parameters if p.kind == "embedding"]
    others = [p for p in parameters if p.kind != "embedding"]
    layers = max((p.count for p in others), default=0)
    rounds = range(layers, 0, -1)
    return embeddings + [p for left in rounds for p in others if p.count >= left]


# --- states


def no_states(parameter: Updated) -> Iterable[int]:
    return ()


def no_shared_states(parameter: Updated) -> int:
    return 0


def like_parameter(number: int, *, counts_steps: bool = False) -> States:
    """`number` tensors of the parameter's size and dtype; `counts_steps`: and a number of steps.

    Some of torch's optimizers keep the counts on the host: the dry run counts a block for each all
    the same.
    """

    def states(parameter: Updated) -> list[int]:
        return [parameter.num_bytes] * number + [FLOAT32] * counts_steps

    return states


def bitsandbytes_states(averages: Sequence[int], bits: int) -> States:
    """State tensors, each of so many averages (bitsandbytes/optim/optimizer.py `init_state`,
    ademamix.py): in 8 bits codes of one byte and an fp32 scale a block, else fp32."""

    def states(parameter: Updated) -> Iterator[int]:
        elements = parameter.num_elements
        for number in averages:
            if bits == 8 and _in_8_bits(parameter):
                yield number * elements
                yield number * -(-elements // STATE_BLOCK_SIZE) * FLOAT32
            else:
                yield number * elements * FLOAT32

    return states


def bitsandbytes_maps(number: int) -> Callable[[Updated], int]:
    """So many fp32 maps of 256 codes, which all states in 8 bits share (`name2qmap`)."""

    def maps(parameter: Updated) -> int:
        return number * 2**8 * FLOAT32 if _in_8_bits(parameter) else 0

    return maps


def _in_8_bits(parameter: Updated) -> bool:
    """transformers keeps embeddings' states in fp32 (`register_module_override`)."""
    return parameter.num_elements >= MIN_QUANTIZED_ELEMENTS and parameter.kind != "embedding"


def galore_maps(parameter: Updated) -> int:
    """The same of GaLore's averages."""
    return bitsandbytes_maps(2)(_averaged(parameter))


def _averaged(parameter: Updated) -> Updated:
    """What GaLore's 8-bit optimizer has averages of. No one tells it of embeddings."""
    linear = parameter.kind == "linear"
    elements = parameter.projected[0] if linear else parameter.num_elements
    return Updated(shape=(elements,), width=parameter.width)


def torchao_states(bits: int) -> States:
    """Two states: codes, scales of their blocks and a map of codes each (torchao/optim,
    subclass_8bit.py and subclass_4bit.py); and a count of steps."""

    def states(parameter: Updated) -> list[int]:
        elements = parameter.num_elements
        if not _torchao_quantizes(elements):
            return [parameter.num_bytes] * 2 + [FLOAT32]
        state = [
            elements * bits // 8,
            elements // STATE_BLOCK_SIZE * FLOAT32,
            2**bits * FLOAT32,
        ]
        return state * 2 + [FLOAT32]

    return states


def _torchao_quantizes(elements: int) -> bool:
    return elements >= MIN_QUANTIZED_ELEMENTS and elements % STATE_BLOCK_SIZE == 0


def adafactor_states(parameter: Updated) -> list[int]:
    """fp32 averages of squares, by rows and by columns; and a root mean square."""
    return [*_factors(parameter.shape), FLOAT32]


def adalomo_states(parameter: Updated) -> list[int]:
    """fp32 averages of squares, by the first two sizes (lomo_optim/adalomo.py)."""
    return [size * FLOAT32 for size in parameter.shape[:2]]


def _factors(shape: Sequence[int]) -> list[int]:
    if len(shape) < 2:
        return [_product(shape) * FLOAT32]
    *stack, rows, columns = shape
    return [_product((*stack, rows)) * FLOAT32, _product((*stack, columns)) * FLOAT32]


def stable_adamw_states(parameter: Updated) -> list[int]:
    """exp_avg, exp_avg_sq, Kahan's compensation of 16 bits (else one byte), eps squared and a mean
    square (optimi/stableadamw.py `_init_state`, triton)."""
    kahan = parameter.num_bytes if parameter.width < FLOAT32 else 1
    return [parameter.num_bytes] * 2 + [kahan, parameter.width, FLOAT32]


def galore_adamw_states(parameter: Updated) -> list[int]:
    """Two averages of the projected gradient, and the projection."""
    if parameter.kind != "linear":
        return [parameter.num_bytes] * 2
    low = parameter.projected[0]
    return [low * parameter.width] * 2 + [_projection_bytes(parameter)]


def _projection_bytes(parameter: Updated) -> int:
    """In fp32 the projection is a view of all singular vectors."""
    _, projection, vectors = parameter.projected
    return (projection if parameter.width < FLOAT32 else vectors) * parameter.width


def galore_adamw_8bit_states(parameter: Updated) -> Iterator[int]:
    """The averages as bitsandbytes keeps them, the projection, and the number of a norm that
    GaLore's class asks for (`max_unorm`)."""
    yield from bitsandbytes_states((1, 1), 8)(_averaged(parameter))
    yield FLOAT32
    if parameter.kind == "linear":
        yield _projection_bytes(parameter)


def galore_adafactor_states(parameter: Updated) -> list[int]:
    """Averages of the projected gradient's squares, and all singular vectors: a gradient in fp32
    is projected."""
    if parameter.kind != "linear":
        return adafactor_states(parameter)
    rank = min(*parameter.shape, PROJECTION_RANK)
    _, _, vectors = parameter.projected
    return [*_factors((max(parameter.shape), rank)), FLOAT32, vectors * FLOAT32]


def apollo_states(parameter: Updated) -> list[int]:
    """Two averages of the projected gradient, the projection, and a norm (apollo_torch/apollo.py,
    `scaled_grad`)."""
    if parameter.kind != "linear":
        return [parameter.num_bytes] * 2
    low, projection = parameter.randomly_projected
    return [low * parameter.width] * 2 + [projection * parameter.width, parameter.width]


# --- steps


def in_place(tape: Tape, groups: Groups) -> None:
    """Kernels that write into parameters and states."""


def by_group(step_group: Callable[[Tape, Sequence[Stepped]], None]) -> Step:
    """A step whose variables go with each group."""

    def step(tape: Tape, groups: Groups) -> None:
        for group in groups:
            step_group(tape, group)

    return step


def adam_step(tape: Tape, group: Sequence[Stepped]) -> None:
    """torch.optim.AdamW: the roots of all squares (`_multi_tensor_adam`); on the processor those
    of one parameter, and their quotient (`_single_tensor_adam`)."""
    held: dict[str, object] = {}
    for some in _foreach(tape, group):
        held["exp_avg_sq_sqrt"] = _all(tape, some)
        if not tape.on_cuda:
            held["denom"] = _all(tape, some)
            del held["exp_avg_sq_sqrt"]


def rmsprop_step(tape: Tape, group: Sequence[Stepped]) -> None:
    """torch.optim.RMSprop: the roots of the averages (`_multi_tensor_rmsprop`)."""
    held: dict[str, object] = {}
    for some in _foreach(tape, group):
        held["avg"] = _all(tape, some)


def adagrad_step(tape: Tape, group: Sequence[Stepped]) -> None:
    """torch.optim.Adagrad: the roots of the sums, and scaled gradients (`_multi_tensor_adagrad`;
    on the processor only the roots)."""
    held: dict[str, object] = {}
    for some in _foreach(tape, group):
        held["std"] = _all(tape, some)
        if tape.on_cuda:
            held["numerator"] = _all(tape, some)


def schedule_free_step(tape: Tape, groups: Groups) -> None:
    """schedulefree's AdamW and RAdam: a list of denominators, held from group to group."""
    held: dict[str, object] = {}
    for group in groups:
        if group:
            held["denom"] = _all(tape, group)


def stable_adamw_step(tape: Tape, groups: Groups) -> None:
    """torch-optimi's Triton kernels write in place; on the processor the gradient's square is
    divided by the largest squares so far (`_single_param_stableadamw`)."""
    if not tape.on_cuda:
        for p in itertools.chain(*groups):
            _twice(tape, p.of.num_elements, p.of.width)


# Averages of bitsandbytes, by the name of its update; and how many tensors of a parameter's size
# the longest expression of that update makes at once on the processor, in 32 and in 8 bits
# (bitsandbytes 0.50, backends/cpu/ops.py).
Averaging = Literal["adam", "ademamix", "lion", "rmsprop"]
_AT_ONCE: dict[Averaging, tuple[int, int]] = {
    "adam": (2, 2),
    "ademamix": (3, 3),
    "lion": (2, 3),
    "rmsprop": (2, 1),
}


def bitsandbytes_step(averaging: Averaging, averages: Sequence[int], bits: int) -> Step:
    """CUDA's kernels write in place. On the processor each parameter is updated in fp32
    (`_optimizer_update_32bit_cpu`, `_optimizer_update_8bit_blockwise_cpu`)."""

    def step(tape: Tape, groups: Groups) -> None:
        if tape.on_cuda:
            return
        for p in itertools.chain(*groups):
            elements, held = p.of.num_elements, list[Tensor | None]()
            in_8_bits = bits == 8 and _in_8_bits(p.of)
            if in_8_bits:  # expanded, and both of AdEMAMix' momenta once more as one tensor
                expanded = sum(number if number == 1 else 2 * number for number in averages)
                held += _some(tape, elements, expanded)
            held += [_scaled_gradient(tape, p.of), _in_float32(tape, p.of)]
            _some(tape, elements, _AT_ONCE[averaging][in_8_bits])
            if in_8_bits and averaging == "ademamix":
                # The update, both momenta as one tensor again, and the codes of one.
                held += _some(tape, elements, 3)
                held += [hold(tape, elements, 1), hold(tape, -(-elements // STATE_BLOCK_SIZE), 4)]

    return step


def _scaled_gradient(tape: Tape, parameter: Updated) -> Tensor:
    narrow = parameter.width < FLOAT32
    make = _twice if narrow else hold
    return make(tape, parameter.num_elements, FLOAT32)


def _some(tape: Tape, elements: int, number: int) -> list[Tensor]:
    return [hold(tape, elements, FLOAT32) for _ in range(number)]


def _foreach(tape: Tape, group: Sequence[Stepped]) -> list[list[Stepped]]:
    """What torch works on at once: lists of one dtype; on the processor single parameters."""
    if not tape.on_cuda:
        return [[p] for p in group]
    widths = dict.fromkeys(p.of.width for p in group)
    return [[p for p in group if p.of.width == width] for width in widths]


def _all(tape: Tape, group: Iterable[Stepped]) -> list[Tensor]:
    """One tensor for each parameter, like it."""
    return [hold(tape, p.of.num_elements, p.of.width) for p in group]


def adafactor_step(*, projects: bool) -> Step:
    """transformers.optimization.Adafactor, and with `projects` galore_torch's: fp32 copies of one
    parameter and its gradient. What a variable holds goes when it is set for the next one."""

    def step(tape: Tape, groups: Groups) -> None:
        held: dict[str, Tensor | None] = {}
        for p in itertools.chain(*groups):
            of, elements = p.of, p.of.num_elements
            projected = projects and of.kind == "linear"
            held["grad"] = _in_float32(tape, of)
            if projected:
                elements = of.projected[0]
                held["grad"] = _project(tape, of, FLOAT32)
            held["p_data_fp32"] = _in_float32(tape, of)
            held["update"] = _twice(tape, elements, FLOAT32)  # square, and epsilon added
            held["update"] = hold(tape, elements, FLOAT32)
            if projected:
                held["update"] = _twice(tape, of.num_elements, FLOAT32)  # back, and scaled
            hold(tape, of.num_elements, FLOAT32)  # its negative

    return step


def galore_adamw_step(tape: Tape, groups: Groups) -> None:
    """galore_torch/adamw.py, when it renews the projection (every `update_proj_gap` steps)."""
    held: dict[str, Tensor | None] = {}
    for p in itertools.chain(*groups):
        of, elements = p.of, p.of.num_elements
        held["grad"] = None
        if of.kind == "linear":
            elements = of.projected[0]
            held["grad"] = _project(tape, of, of.width)
        held["denom"] = hold(tape, elements, of.width)
        held["norm_grad"] = hold(tape, elements, of.width)
        if of.kind == "linear":
            held["norm_grad"] = _twice(tape, of.num_elements, of.width)  # back, and scaled


def galore_adamw_8bit_step(tape: Tape, groups: Groups) -> None:
    """galore_torch/adamw8bit.py: a copy of the parameter takes its place, while the parameter
    holds what the kernel makes of the projected gradient. That one replaces the gradient."""
    held: dict[str, Tensor | None] = {}
    for p in itertools.chain(*groups):
        of = p.of
        if of.kind == "linear":
            held["grad"] = _project(tape, of, of.width)
            saved = hold(tape, of.num_elements, of.width)
            data = hold(tape, of.projected[0], of.width)
            del saved  # the copy stays, and what it was made of goes
            p.gradient = held["grad"]
            _twice(tape, of.num_elements, of.width)  # back, and scaled
            del data


def _project(tape: Tape, parameter: Updated, width: int) -> Tensor:
    """The projected gradient, by a projection made anew (galore_projector.py `project`)."""
    _decompose(tape, parameter, width)
    return hold(tape, parameter.projected[0], width)


def _decompose(tape: Tape, parameter: Updated, width: int) -> None:
    """Singular vectors of an fp32 copy, and the projection from them, which takes the old one's
    place (`get_orthogonal_matrix`). LAPACK works on a copy; cuSOLVER gives V, of which the adjoint
    is made (ATen/native/BatchLinearAlgebra.cpp); the libraries' workspaces are not known."""
    rows, columns = parameter.shape
    least = min(rows, columns)
    low, projection, _ = parameter.projected
    held = [hold(tape, parameter.num_elements, FLOAT32)] if width < FLOAT32 else []
    held += [hold(tape, size, FLOAT32) for size in (rows * least, least, columns * least)]
    scratch = [hold(tape, parameter.num_elements, FLOAT32)]
    if tape.on_cuda:
        scratch.append(hold(tape, columns * least, FLOAT32))
    scratch.clear()
    held.append(hold(tape, low, FLOAT32))  # the other vectors, multiplied by the values
    if width < FLOAT32:
        held.append(hold(tape, projection, width))


def apollo_step(tape: Tape, groups: Groups) -> None:
    """apollo_torch/apollo.py, when it renews the projection."""
    held: dict[str, Tensor | None] = {}
    for p in itertools.chain(*groups):
        of, elements = p.of, p.of.num_elements
        held["grad"] = None
        if of.kind == "linear":
            elements = of.randomly_projected[0]
            _draw(tape, of)
            held["grad"] = hold(tape, elements, of.width)
        held["denom"] = hold(tape, elements, of.width)
        held["norm_grad"] = hold(tape, elements, of.width)
        if of.kind == "linear":
            held["scaled_grad"] = hold(tape, of.num_elements, of.width)
            held["scaled_grad"] = hold(tape, of.num_elements, of.width)  # within a norm's limit
            held["norm_grad"] = held["scaled_grad"]


def _draw(tape: Tape, parameter: Updated) -> None:
    """A random projection, which takes the old one's place (random_projector.py)."""
    projection = parameter.randomly_projected[1]
    held = [_in_float32(tape, parameter), _twice(tape, projection, FLOAT32)]
    if parameter.width < FLOAT32:
        held.append(hold(tape, projection, parameter.width))


def torchao_step(bits: int) -> Step:
    """The buffers of torchao's compiled step of one tensor, as Inductor of torch 2.13 lays them out
    on the processor: scales and scaled values of both states; with 4 bits their unpacked bytes and
    codes of int64 besides. States that are not quantized are updated in place."""

    def step(tape: Tape, groups: Groups) -> None:
        for p in itertools.chain(*groups):
            elements = p.of.num_elements
            if _torchao_quantizes(elements):
                buffers = [(elements // STATE_BLOCK_SIZE, FLOAT32), (elements, FLOAT32)]
                if bits == 4:
                    buffers += [(elements, 1), (elements, 8)]
                made = [hold(tape, *buffer) for buffer in 2 * buffers]
                del made

    return step


def grokadamw_step(tape: Tape, group: Sequence[Stepped]) -> None:
    """grokadamw 0.1.2: one tensor's states come from the host."""
    held: dict[str, Tensor] = {}
    for p in group:
        size = p.of.num_elements, p.of.width
        if tape.on_cuda:
            for name in ("exp_avg", "exp_avg_sq", "grok_ema"):
                held[name] = hold(tape, *size)
        held["grok_grad"] = _twice(tape, *size)
        hold(tape, *size)  # roots


def lomo_step(tape: Tape, p: Stepped) -> None:
    """lomo_optim/lomo.py `fuse_update`: fp32 copies of the gradient, which goes, and the
    parameter."""
    gradient = _in_float32(tape, p.of) or p.gradient
    p.gradient = None
    _in_float32(tape, p.of)
    del gradient


def adalomo_step(tape: Tape, p: Stepped) -> None:
    """lomo_optim/adalomo.py `fuse_update`."""
    elements = p.of.num_elements
    gradient = _in_float32(tape, p.of) or p.gradient
    p.gradient = None
    update = _twice(tape, elements, FLOAT32)  # square, and epsilon added
    update = hold(tape, elements, FLOAT32)
    _in_float32(tape, p.of)
    del gradient, update


def _in_float32(tape: Tape, parameter: Updated) -> Tensor | None:
    """A copy in fp32 of a parameter, or its gradient, in 16 bits."""
    return hold(tape, parameter.num_elements, FLOAT32) if parameter.width < FLOAT32 else None


def _twice(tape: Tape, num_elements: int, width: int) -> Tensor:
    """A tensor beside another of its size, which then goes."""
    first = hold(tape, num_elements, width)
    result = hold(tape, num_elements, width)
    del first
    return result


def clip_gradients(tape: Tape, groups: Groups) -> None:
    """A norm of each gradient, all of them as one tensor, and the norm of that
    (torch/nn/utils/clip_grad.py)."""
    gradients = [p for group in groups for p in group]
    norms = [hold(tape, 1, p.of.width) for p in gradients]
    stacked = hold(tape, len(norms), FLOAT32)
    hold(tape, 1, FLOAT32)
    del stacked


# --- kernels of a step


# Numbers of tensors, and of elements, that one kernel of torch's `_foreach_` functions works on: of
# lists of three tensors, and of 320 blocks of 65,536 (ATen/native/cuda/MultiTensorApply.cuh).
TENSORS_A_KERNEL = 48
ELEMENTS_A_KERNEL = 320 * 65_536

Kernels = Callable[[Sequence[Updated]], int]


def of_lists(operations: int) -> Kernels:
    """Operations on all parameters as lists. Some kernels work on lists of more or fewer tensors,
    36 of fused AdamW's four lists."""

    def kernels(parameters: Sequence[Updated]) -> int:
        tensors = sum(p.count for p in parameters)
        elements = sum(p.count * p.num_elements for p in parameters)
        lists = max(-(-tensors // TENSORS_A_KERNEL), -(-elements // ELEMENTS_A_KERNEL))
        return operations * lists

    return kernels


def of_each(operations: int) -> Kernels:
    """Operations on one parameter after another."""

    def kernels(parameters: Sequence[Updated]) -> int:
        return operations * sum(p.count for p in parameters)

    return kernels


# --- steps within backward


class LayerwiseUpdate:
    """An optimizer for each parameter, which steps once its gradient is there (transformers,
    `_setup_low_rank_optimizer`)."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def __call__(self, tape: Tape, weight: Weight) -> None:
        self.step(tape, [[_taken(weight)]])

    def end(self, tape: Tape) -> None:
        """Nothing is left to do."""


class FusedUpdate:
    """LOMO's: a parameter is updated when the next one's gradient comes, the last one at the
    end."""

    def __init__(self, step: FusedStep) -> None:
        self.step = step
        self.waiting: Weight | None = None

    def __call__(self, tape: Tape, weight: Weight) -> None:
        self.end(tape)
        self.waiting = weight

    def end(self, tape: Tape) -> None:
        """The last parameter's turn."""
        if self.waiting is not None:
            self.step(tape, _taken(self.waiting))
            self.waiting = None


def _taken(weight: Weight) -> Stepped:
    """A parameter on its own, with its gradient."""
    gradient, weight.gradient = weight.gradient, None
    elements = value(weight.elements, 0, 0)
    if weight.matrix is None:
        return Stepped(Updated(shape=(elements,), width=weight.width), gradient)
    return Stepped(Updated(shape=weight.matrix, width=weight.width, kind="linear"), gradient)
