"""ZeRO-3's order of gathering: what is fetched, fetched ahead and released at each module, as
DeepSpeed 0.18 does it (deepspeed/runtime/zero/partitioned_param_coordinator.py), whose names are
kept here.

In the first forward and backward the order of modules is recorded; from then on parameters are
fetched ahead in that order, and those that are used again soon are not released.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import deque
from collections.abc import Hashable
from enum import Enum
from typing import Any, Protocol

from msgspec import Struct

from ftplan.planner.sharding import PARAM_PERSISTENCE_THRESHOLD

# Elements, DeepSpeed's defaults (zero/config.py): accelerate's plugin leaves them alone unless it
# is given a configuration file.
PREFETCH_BUCKET_SIZE = 50_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000
MAX_REUSE_DISTANCE = 1_000_000_000


class Status(Enum):
    """Of a parameter: `ZeroParamStatus`."""

    NOT_AVAILABLE = 0
    INFLIGHT = 1
    AVAILABLE = 2


class ZeroParameter(Struct, kw_only=True, eq=False):
    """A parameter, of which each GPU has `partition_numel` elements."""

    ds_id: int
    ds_numel: int
    partition_numel: int
    status: Status = Status.NOT_AVAILABLE
    active_sub_modules: set[Hashable] = set()

    @property
    def ds_persist(self) -> bool:
        return self.ds_numel <= PARAM_PERSISTENCE_THRESHOLD

    def free(self) -> None:
        """`free_param`."""
        self.status = Status.NOT_AVAILABLE


class Handle(Protocol):
    """Parameters on their way."""

    def wait(self) -> None:
        """Have them there."""


class Coordinator(ABC):
    """`PartitionedParameterCoordinator`. A module is whatever tells modules apart."""

    def __init__(self) -> None:
        self.inflight: dict[Any, Handle] = {}
        self._trace: list[Hashable] = []
        self._recording = self._complete = False
        self._param_order: list[tuple[Any, int]] = []
        self._param_queue: deque[tuple[Any, int]] = deque()
        self._fetched_for: dict[Any, int] = {}
        self._releasable: dict[tuple[Hashable, int], set[Any]] = {}
        self._uses: dict[Any, list[int]] = {}
        self._traversed: list[int] = []
        self._step_id = 0
        self._num_available = 0

    @abstractmethod
    def params_of(self, module: Any) -> list[Any]:
        """A module's own parameters, and those of others that it reads."""

    @abstractmethod
    def all_gather_coalesced(self, params: list[Any]) -> Handle:
        """Parameters on their way, fetched together."""

    def reset_step(self) -> None:
        """A forward begins."""
        self._clean_inflight()
        if self._recording:
            self._param_order = [
                (param, step)
                for step, module in enumerate(self._trace)
                for param in sorted(self.params_of(module), key=lambda p: p.ds_id)
            ]
            self._index_trace()
            self._recording, self._complete = False, True
        elif not self._complete:
            self._recording = True
        self._param_queue = deque(self._param_order)
        self._fetched_for = {}
        self._step_id = self._num_available = 0

    def _index_trace(self) -> None:
        """When each parameter is used, and how many elements are before each module."""
        self._uses, self._traversed = {}, [0]
        for param, step in self._param_order:
            self._uses.setdefault(param, []).append(step)
        for module in self._trace:
            numel = sum(param.ds_numel for param in self.params_of(module))
            self._traversed.append(self._traversed[-1] + numel)

    def _clean_inflight(self) -> None:
        for param, handle in self.inflight.items():
            handle.wait()
            self._release(param)
        self.inflight.clear()

    def _check_trace(self, module: Hashable) -> None:
        """`trace_prologue`: another order of modules than recorded ends fetching ahead."""
        expected = self._trace[self._step_id : self._step_id + 1]
        if self._complete and expected != [module]:
            self._complete = False
            self._trace, self._param_order = [], []
            self._fetched_for = {}
            self._param_queue.clear()
            self._clean_inflight()

    def fetch_sub_module(self, module: Hashable) -> None:
        """Before a module runs, forward or backward."""
        self._check_trace(module)
        if self._recording:
            self._trace.append(module)
        params = self.params_of(module)
        self._all_gather(params)
        for param in params:
            param.active_sub_modules.add(module)
            if param in self.inflight:
                self.inflight.pop(param).wait()
        if self._complete:
            self._skip_in_queue(params)
            self._prefetch()
        self._step_id += 1

    def _all_gather(self, params: list[Any]) -> None:
        missing = [param for param in params if param.status is Status.NOT_AVAILABLE]
        if missing:
            self._num_available += sum(param.ds_numel for param in missing)
            handle = self.all_gather_coalesced(missing)
            self.inflight.update(dict.fromkeys(missing, handle))

    def _skip_in_queue(self, params: list[Any]) -> None:
        to_skip = sum(self._fetched_for.get(param, -1) < self._step_id for param in params)
        skipped: set[Any] = set()
        while self._param_queue and len(skipped) < to_skip:
            param, last_used = self._param_queue.popleft()
            self._fetched_for[param] = last_used
            skipped.add(param)

    def _prefetch(self) -> None:
        most = min(MAX_LIVE_PARAMETERS - self._num_available, PREFETCH_BUCKET_SIZE)
        ahead: dict[Any, None] = {}
        numel = 0
        while self._param_queue and numel < most:
            param, last_used = self._param_queue.popleft()
            self._fetched_for[param] = max(self._fetched_for.get(param, -1), last_used)
            if param.status is Status.NOT_AVAILABLE and param not in ahead:
                ahead[param] = None
                numel += param.ds_numel
        self._all_gather(list(ahead))

    def release_sub_module(self, module: Hashable) -> None:
        """Behind a module's forward or backward."""
        params = self.params_of(module)
        releasable = self._params_to_release(module) if self._complete else params
        for param in params:
            param.active_sub_modules.discard(module)
            if param in releasable:
                self._release(param)

    def _release(self, param: ZeroParameter) -> None:
        if param.status is Status.AVAILABLE and not param.active_sub_modules:
            param.free()
            self._num_available -= param.ds_numel

    def _params_to_release(self, module: Hashable) -> set[Any]:
        """All but what is small, or is used again within `MAX_REUSE_DISTANCE`. As there, what was
        found for a place in the order is kept for the next time."""
        key = module, self._step_id
        if key not in self._releasable:
            self._releasable[key] = {
                param
                for param in self.params_of(module)
                if not param.ds_persist
                and self._fetched_for.get(param, -1) <= self._step_id
                and not self._used_soon(param)
            }
        return self._releasable[key]

    def _used_soon(self, param: Any) -> bool:
        uses = self._uses.get(param, [])
        later = uses[bisect_left(uses, self._step_id) :][:1]
        passed = [self._traversed[step] - self._traversed[self._step_id] for step in later]
        return any(numel < MAX_REUSE_DISTANCE for numel in passed)
