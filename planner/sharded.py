"""What several GPUs divide: units of parameters gathered together, and each GPU's share of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from operator import add

from msgspec import Struct, structs

from ftplan.planner.allocator import pinned_bytes
from ftplan.planner.model_spec import Layer, Linear, ModelSpec, Parameter
from ftplan.planner.modules import Numerics
from ftplan.planner.optimizer_steps import Updated
from ftplan.planner.prequantized import PREQUANTIZED, prequantized_bytes
from ftplan.planner.separate_experts import quantized_linears


class Spread(Struct, frozen=True, kw_only=True):
    """How the parameters of a model lie on several GPUs.

    `kind`: whose code divides them, among `num_shards` GPUs; `replicates`: other groups of as many
    hold the same. Bytes of a parameter at rest: `frozen`, `trained` (of the model
    itself), `adapters`; `gathered`: of any while it is computed with, None for as at rest.
    `offloads`: shares wait in the host's memory. `checkpointed_around`: checkpointing is around
    what gathers a layer, not within.
    """

    kind: str
    num_shards: int
    frozen: int
    trained: int
    adapters: int
    gathered: int | None
    replicates: bool = False
    offloads: bool = False
    checkpointed_around: bool = False


class Unit(Struct, frozen=True, kw_only=True):
    """Parameters that are gathered together, in bytes.

    `weights`, `adapters`: a GPU's share at rest. `gathered`: all of them as computed with; `cast`:
    a GPU's share of those that are copied before they are sent. `gradients`: of all, as they are
    sent; `gradient_share`: what a GPU gets of them; `reduced`: in the dtype of its share, and of
    those `reduced_adapters`. `pinned`, `pinned_gradients`: a GPU's share in the host's memory.
    """

    weights: int = 0
    adapters: int = 0
    gathered: int = 0
    cast: int = 0
    gradients: int = 0
    gradient_share: int = 0
    reduced: int = 0
    reduced_adapters: int = 0
    pinned: int = 0
    pinned_gradients: int = 0

    def __add__(self, other: Unit) -> Unit:
        mine, others = structs.astuple(self), structs.astuple(other)
        sums = map(add, mine, others)
        return Unit(**dict(zip(self.__struct_fields__, sums, strict=True)))


NO_UNIT = Unit()


class Units(Struct, frozen=True, kw_only=True):
    """The units of a model: embeddings, each layer, final norm and head, and the rest. Tied
    embeddings are with the head; their own unit is then empty."""

    embedding: Unit
    layers: tuple[Unit, ...]
    tail: Unit
    root: Unit

    @property
    def outside(self) -> Unit:
        """All but the layers."""
        return self.embedding + self.tail + self.root

    @property
    def whole(self) -> Unit:
        return sum(self.layers, self.outside)


def units_of(
    model: ModelSpec, spread: Spread, numerics: Sequence[Numerics], trained_outside: Collection[str]
) -> Units:
    """The units of a model.

    `numerics`: of each layer. `trained_outside`: names of trained parameters outside of the layers.
    """
    embedding, tail, rest = _outside(model)
    known: dict[tuple[int, Numerics], Unit] = {}
    layers = []
    for layer, own in zip(model.layers, numerics, strict=True):
        key = id(layer), own
        if key not in known:
            known[key] = _layer_unit(layer, spread, own)
        layers.append(known[key])
    return Units(
        embedding=_unit(embedding, spread, trained_outside),
        layers=tuple(layers),
        tail=_unit(tail, spread, trained_outside),
        root=_unit(rest, spread, trained_outside, unused=model.parameters_beside),
    )


class Shards(Struct, frozen=True, kw_only=True):
    """A GPU's shares, tensor by tensor: bytes of each at rest, and what the optimizer is given."""

    at_rest: tuple[int, ...]
    updated: tuple[Updated, ...]


def shards_of(
    model: ModelSpec, spread: Spread, numerics: Sequence[Numerics], trained_outside: Collection[str]
) -> Shards:
    """The shares of all parameters; arguments as of `units_of`."""
    at_rest: list[int] = []
    updated: list[Updated] = []

    def add(parameter: Parameter, trained: int | None, *, learns: bool = True) -> None:
        elements = _share(parameter, spread) // parameter.count
        stored = trained or spread.frozen
        at_rest.extend([0 if spread.offloads else elements * stored] * parameter.count)
        if trained and learns:
            updated.append(Updated(shape=(elements,), width=stored, count=parameter.count))

    for layer, own in zip(model.layers, numerics, strict=True):
        for parameter in _base_parameters(layer, spread, own):
            add(parameter, spread.trained if parameter.name in own.trained else None)
        for parameter in _adapters(layer, own):
            add(parameter, spread.adapters)
    unused = () if spread.kind == "fsdp1" else model.parameters_beside
    for parameter in itertools.chain(*_outside(model)):
        trained = spread.trained if parameter.name in trained_outside else None
        add(parameter, trained, learns=parameter not in unused)
    return Shards(at_rest=tuple(at_rest), updated=tuple(updated))


def _outside(model: ModelSpec) -> tuple[list[Parameter], list[Parameter], list[Parameter]]:
    """Parameters outside of the layers: embeddings, final norm and head, the rest."""
    norm = set(model.final_norm.parameters()) if model.final_norm else set()
    embedding: list[Parameter] = []
    tail: list[Parameter] = []
    rest: list[Parameter] = []
    for parameter in model.outer_parameters:
        if parameter.name == "embed_tokens.weight":
            (tail if model.tie_word_embeddings else embedding).append(parameter)
        elif parameter in norm or parameter.name.startswith("lm_head."):
            tail.append(parameter)
        else:
            rest.append(parameter)
    return embedding, tail, rest


def _layer_unit(layer: Layer, spread: Spread, numerics: Numerics) -> Unit:
    own = _unit(_base_parameters(layer, spread, numerics), spread, numerics.trained)
    return sum(
        (_part(p, spread, spread.adapters, added=True) for p in _adapters(layer, numerics)), own
    )


def _base_parameters(layer: Layer, spread: Spread, numerics: Numerics) -> Iterator[Parameter]:
    """A layer's own. Weights in 4 bits are stored as a column of numbers of the model's dtype."""
    if numerics.quantization == "none":
        yield from layer.parameters()
        return
    quantized = quantized_linears(layer, separate_experts=numerics.separate_experts)
    for linear, count in quantized:
        numbers = -(-_stored_bytes(linear, numerics.quantization) // spread.frozen)
        yield Parameter(name=f"{linear.name}.weight", shape=(numbers, 1), count=count)
    elsewhere = {f"{linear.name}.weight" for linear, _ in quantized}
    if numerics.separate_experts and layer.feed_forward.experts is not None:
        elsewhere |= {matrix.name for matrix in layer.feed_forward.matrices}
    for parameter in layer.parameters():
        if parameter.name not in elsewhere:
            yield parameter


def _stored_bytes(linear: Linear, quantization: str) -> int:
    """Of a 4-bit weight, as far as it is divided: bitsandbytes keeps the scales apart."""
    if quantization in PREQUANTIZED:
        return prequantized_bytes(linear, quantization)
    return -(-linear.num_weights // 2)


def _adapters(layer: Layer, numerics: Numerics) -> Iterator[Parameter]:
    for linear in layer.linears:
        if linear in numerics.adapted:
            yield Parameter(name="lora_A.weight", shape=(numerics.rank, linear.in_features))
            yield Parameter(name="lora_B.weight", shape=(linear.out_features, numerics.rank))


def _unit(
    parameters: Iterable[Parameter],
    spread: Spread,
    trained: Collection[str],
    unused: Collection[Parameter] = (),
) -> Unit:
    """Parameters of the model itself. `unused`: those that get no gradient; FSDP1's flat parameter
    has one as a whole."""
    parts = (
        _part(
            p,
            spread,
            spread.trained if p.name in trained else None,
            added=False,
            learns=spread.kind == "fsdp1" or p not in unused,
        )
        for p in parameters
    )
    return sum(parts, NO_UNIT)


def _part(
    parameter: Parameter, spread: Spread, trained: int | None, *, added: bool, learns: bool = True
) -> Unit:
    """One parameter. `trained`: bytes each at rest, if it is trained; `learns`: and has a gradient;
    `added`: it is an adapter's, which FSDP1 gathers by itself."""
    stored = trained or spread.frozen
    gathered = spread.gathered or stored
    share = _share(parameter, spread)
    alone = added and spread.kind == "fsdp1"
    copied = spread.offloads or gathered != stored
    at_rest = 0 if spread.offloads else share * stored
    sent, reduced = (share * gathered, share * stored) if trained and learns else (0, 0)
    one = share // parameter.count * stored
    pinned = parameter.count * pinned_bytes(one) if spread.offloads else 0
    return Unit(
        weights=0 if added else at_rest,
        adapters=at_rest if added else 0,
        gathered=0 if alone else share * spread.num_shards * gathered,
        cast=share * gathered if copied and not alone else 0,
        gradients=sent * spread.num_shards,
        gradient_share=sent,
        reduced=reduced,
        reduced_adapters=reduced if added else 0,
        pinned=pinned,
        pinned_gradients=pinned if trained else 0,
    )


def _share(parameter: Parameter, spread: Spread) -> int:
    """Elements of a GPU's share: FSDP2 divides the first dimension, FSDP1 all that is flat."""
    rows, *rest = (parameter.size,) if spread.kind == "fsdp1" else parameter.shape
    return parameter.count * -(-rows // spread.num_shards) * math.prod(rest)
