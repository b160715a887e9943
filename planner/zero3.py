"""ZeRO-3 as DeepSpeed 0.18 allocates (deepspeed/runtime/zero/stage3.py), with the settings that
accelerate leaves at DeepSpeed's defaults (zero/config.py).

A segment's trace is cut where modules begin and end. What the coordinator has gathered at each of
these places depends on all modules before it: it is played through the whole step, over the traces
of one layer of each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Protocol, TypeVar

from msgspec import Struct

from ftplan.planner.called import ModuleEvent
from ftplan.planner.coordinator import Coordinator, Status, ZeroParameter
from ftplan.planner.exchange import buffer
from ftplan.planner.model_spec import Parameter
from ftplan.planner.tape import (
    ZERO,
    Form,
    Moment,
    Storage,
    Stretch,
    Tape,
    Tensor,
    Weight,
    add_forms,
    added,
    covers,
    value,
)
from ftplan.planner.units import FLOAT32_BYTES
from ftplan.planner.zero import REDUCE_BUCKET_SIZE

FLOAT64_BYTES = 8
# Elements of the share that the optimizer steps on at once.
SUB_GROUP_SIZE = 1_000_000_000
# Elements of a gradient whose norm is taken at once (`_constant_buffered_norm2`).
NORM_BUFFER_SIZE = 250_000_000
# Parameters that several modules outside of the layers read.
_SHARED = frozenset(("embed_tokens.weight", "lm_head.weight"))


Share = TypeVar("Share")


def sub_groups(shares: Iterable[Share], numel_of: Callable[[Share], int]) -> list[list[Share]]:
    """What the optimizer steps on, one group after the other (`_create_fp16_sub_groups`)."""
    groups: list[list[Share]] = []
    numel = SUB_GROUP_SIZE
    for share in shares:
        if numel >= SUB_GROUP_SIZE:
            groups.append([])
            numel = 0
        groups[-1].append(share)
        numel += numel_of(share)
    return groups


class Partition(Struct, frozen=True, kw_only=True):
    """How ZeRO-3 divides a model.

    `width`: bytes a number in the engine's dtype. `offloads_parameters`, `offloads_gradients`: to
    the host, the latter with the optimizer's states. `callers`: the modules around the layers, from
    the outermost, the last but one of which computes the loss. `accumulates`: there are several
    micro-batches.
    """

    num_gpus: int
    width: int
    offloads_parameters: bool
    offloads_gradients: bool
    callers: tuple[str, ...]
    accumulates: bool

    def share(self, numel: int) -> int:
        """Elements that each GPU has of so many."""
        return -(-numel // self.num_gpus)


class GradientEvent(Struct, frozen=True):
    """A parameter of so many elements has its gradient."""

    numel: int


class Reduced:
    """What is done with a gradient in backward: it leaves for the bucket."""

    def __call__(self, tape: Tape, weight: Weight) -> None:
        tape.mark(GradientEvent(value(weight.elements, 0, 0)))
        tape.release_gradients()

    def end(self, tape: Tape) -> None:
        """Nothing is left to do."""


class Segment(Protocol):
    """A part of the step, with its stretches; `left`: what is alive behind its backward."""

    @property
    def forward_stretches(self) -> Sequence[Stretch]: ...

    @property
    def backward_stretches(self) -> Sequence[Stretch]: ...

    @property
    def left(self) -> dict[str, Form]: ...


class Beside(Struct, frozen=True):
    """The moments of each segment of a step, with what is gathered."""

    forward: list[list[Moment]]
    backward: list[list[Moment]]

    @staticmethod
    def of(segments: Sequence[Segment]) -> Beside:
        """No moments yet."""
        return Beside([[] for _ in segments], [[] for _ in segments])


class _Gathered(ZeroParameter, kw_only=True, eq=False):
    """A parameter, and the memory it lies in while it is there."""

    data: Tensor | None = None

    def free(self) -> None:
        self.data = None
        self.status = Status.NOT_AVAILABLE


class _Handle(Struct):
    """`AllGatherCoalescedHandle`: the buffer of several parameters lives as long as one of them has
    not been waited for, beside the copies that the first wait makes."""

    gathering: Gathering
    params: list[_Gathered]
    flat: Tensor | None
    complete: bool = False

    def wait(self) -> None:
        if self.complete:
            return
        for param in self.params:
            if self.flat is not None:
                param.data = self.gathering.new(param.ds_numel)
            param.status = Status.AVAILABLE
        self.complete = True


class _Record(Tape):
    """A tape that is asked much more often than anything changes."""

    def __init__(self) -> None:
        super().__init__()
        self._now: Moment | None = None

    def born(self, storage: Storage) -> int:
        self._now = None
        return super().born(storage)

    def died(self, storage: Storage) -> None:
        super().died(storage)
        self._now = None

    @property
    def now(self) -> Moment:
        """What is alive."""
        if self._now is None:
            parts = self.state()
            self._now = Moment(added(parts.values()), parts)
        return self._now

    def since(self) -> tuple[Moment, ...]:
        """The high moments since this was last asked."""
        return self.moments() if self._now is None else (self._now,)


class Gathering(Coordinator):
    """What is gathered and on its way, on a tape of its own."""

    def __init__(self, partition: Partition) -> None:
        super().__init__()
        self.partition = partition
        self.tape = _Record()
        self._parameters: dict[Hashable, _Gathered] = {}
        self._modules: dict[Hashable, list[_Gathered]] = {}
        self.bucket: list[int] = []
        self.large: Tensor | None = None

    def new(self, numel: int, component: str = "communication") -> Tensor:
        return buffer(self.tape, numel * self.partition.width, component)

    def params_of(self, module: Hashable) -> list[_Gathered]:
        return self._modules[module]

    def all_gather_coalesced(self, params: list[_Gathered]) -> _Handle:
        for param in params:
            param.status = Status.INFLIGHT
        alone = self.partition.num_gpus == 1  # `_no_gather_coalesced`
        shares = self._on_device(params)
        if alone:
            for param, share in zip(params, shares, strict=True):
                param.data = share
            return _Handle(self, params, None)
        flat = self.new(sum(param.partition_numel for param in params) * self.partition.num_gpus)
        if len(params) > 1:
            return _Handle(self, params, flat)
        params[0].data = flat
        return _Handle(self, params, None)

    def _on_device(self, params: list[_Gathered]) -> list[Tensor]:
        """Shares, those that wait on the host as copies."""
        offloads = self.partition.offloads_parameters
        return [self.new(param.partition_numel if offloads else 0) for param in params]

    def learn_order(self, segments: Sequence[Segment]) -> None:
        """A step like all later ones, whose order these know."""
        for _ in range(1 + self.partition.accumulates):
            self.reset_step()
            for place, segment in enumerate(segments):
                for stretch in segment.forward_stretches:
                    self._happen(place, stretch.event)
            for place in reversed(range(len(segments))):
                for stretch in segments[place].backward_stretches:
                    self._happen(place, stretch.event)
            self._reduce_and_partition()
        self._step()

    def play_step(self, segments: Sequence[Segment]) -> Beside:
        """A step of the optimizer: forward and backward of each micro-batch, of which two are like
        any number of them."""
        beside = Beside.of(segments)
        for _ in range(1 + self.partition.accumulates):
            self.play_forward(segments, beside.forward)
            self._play_backward(segments, beside.backward)
        self._step()
        return beside

    def play_forward(self, segments: Sequence[Segment], found: list[list[Moment]]) -> None:
        """A forward pass, whose moments are added to what is found of each segment."""
        self.reset_step()
        for place, segment in enumerate(segments):
            found[place] += self._play(place, segment.forward_stretches)

    def _play_backward(self, segments: Sequence[Segment], found: list[list[Moment]]) -> None:
        """The same of backward, which ends with `independent_gradient_partition_epilogue`."""
        passed = [place for place, segment in enumerate(segments) if segment.backward_stretches]
        for place in reversed(passed):
            found[place] += self._play(place, segments[place].backward_stretches)
        self._reduce_and_partition()
        left = segments[passed[0]].left
        after = Moment(added(left.values()), left)
        found[passed[0]] += [_together(after, own) for own in self.tape.since()]

    def _play(self, place: int, stretches: Sequence[Stretch]) -> list[Moment]:
        """The high moments of a segment."""
        pairs: list[tuple[Form, Moment, Moment]] = []

        def keep(moment: Moment, own: Moment) -> None:
            total = add_forms(moment.total, own.total)
            if not any(covers(pair[0], total) for pair in pairs):
                pairs[:] = [pair for pair in pairs if not covers(total, pair[0])]
                pairs.append((total, moment, own))

        for stretch in stretches:
            for own in self._happen(place, stretch.event):
                keep(stretch.begins, own)
            for moment in stretch.moments:
                keep(moment, self.tape.now)
        return [_together(moment, own) for _, moment, own in pairs]

    def _happen(self, place: int, event: object) -> tuple[Moment, ...]:
        """The moments of an event."""
        if isinstance(event, ModuleEvent):
            module = self._module(place, event)
            if event.kind == "fetch":
                self.fetch_sub_module(module)
            else:
                self.release_sub_module(module)
        if not isinstance(event, GradientEvent):
            return self.tape.since()
        if sum(self.bucket) + event.numel > REDUCE_BUCKET_SIZE:
            self._reduce_and_partition()
        moments = self.tape.since()
        self.bucket.append(event.numel)
        if event.numel > REDUCE_BUCKET_SIZE:  # it waits where it is
            self.large = self.new(event.numel, "gradients")
        return moments

    def _module(self, place: int, event: ModuleEvent) -> Hashable:
        """The module that is meant, whose parameters are then known. Those outside of the layers
        have their names, and tied ones one name."""
        module = event.module if isinstance(event.module, str) else (place, event.module)
        if module not in self._modules:
            self._modules[module] = [
                self._parameter((place, number, copy), parameter)
                for number, parameter in event.parameters
                for copy in range(parameter.count)
            ]
        return module

    def _parameter(self, key: Hashable, parameter: Parameter) -> _Gathered:
        if parameter.name in _SHARED:
            key = parameter.name
        if key not in self._parameters:
            self._parameters[key] = _Gathered(
                ds_id=len(self._parameters),
                ds_numel=parameter.size,
                partition_numel=self.partition.share(parameter.size),
            )
        return self._parameters[key]

    def _reduce_and_partition(self) -> None:
        """`__reduce_and_partition_ipg_grads`: shares side by side, unless one gradient needs no
        padding; with offloading each share in three copies, one after the other."""
        partition, bucket = self.partition, self.bucket
        if not bucket:
            return
        shares = [partition.share(numel) for numel in bucket]
        single = len(bucket) == 1 and bucket[0] % partition.num_gpus == 0
        flat = self.new(0 if single else sum(shares) * partition.num_gpus)
        if partition.offloads_gradients:
            for share in shares:
                copy = self.new(share, "temporaries")
                buffer(self.tape, min(share, NORM_BUFFER_SIZE) * FLOAT64_BYTES, "temporaries")
                buffer(self.tape, share * FLOAT32_BYTES, "temporaries")
                del copy
        self.bucket, self.large = [], None
        del flat

    def _step(self) -> None:
        """The optimizer steps: all is released, and what is small gathered again."""
        self.inflight.clear()
        for param in self._parameters.values():
            param.active_sub_modules.clear()
            param.free()
        persistent = [param for param in self._parameters.values() if param.ds_persist]
        for param in persistent:
            whole = param.partition_numel * self.partition.num_gpus
            in_place = self.partition.num_gpus == 1 and not self.partition.offloads_parameters
            param.data = self.new(0 if in_place else whole)
            param.status = Status.AVAILABLE
        self.tape.since()  # moments of the step itself, which nothing is beside


def _together(left: Moment, right: Moment) -> Moment:
    parts = dict(left.components)
    for name, form in right.components.items():
        parts[name] = add_forms(parts.get(name, ZERO), form)
    return Moment(add_forms(left.total, right.total), parts)
