"""The record while it is being written: columns that are cheap to append to."""

from __future__ import annotations

import re
from typing import Any

from ftplan.planner.memory_record import MemoryRecord, Storage
from ftplan.planner.repeat_layers import Run, TracedRecord, repeat_layers
from ftplan.planner.step_trace import (
    EVALUATION_PHASE,
    GENERATION_PHASE,
    REFERENCE_PHASE,
    SCORING_PHASE,
)

# Where the reference model of a preference objective lies.
REFERENCE_PATH = "ref_model"
# And the one that judges completions.
REWARD_MODEL_PATH = "reward_model"

# Phases whose products run in one thread.
_THREADS = ((REFERENCE_PHASE, GENERATION_PHASE, "forward"), ("backward",))
# Phases in which modules run.
_MODEL_PHASES = (
    *(REFERENCE_PHASE, GENERATION_PHASE, SCORING_PHASE),
    *("forward", "backward", EVALUATION_PHASE),
)


class Draft:
    """Births and deaths as they come.

    `layers_path`: path of the list of decoder layers. `path`: the module that runs, kept from
    event to event. `granularity`: bytes that every size is rounded up to. `workspace_bytes`: what a
    thread's first matrix product takes.
    """

    def __init__(self, layers_path: str) -> None:
        self.path = ""
        self.sizes: list[int] = []
        self.paths: list[str] = []
        self.operations: list[Any] = []
        self.shapes: list[tuple[int, ...]] = []
        self.dtypes: list[Any] = []
        self.components: list[str | None] = []
        self.born_at: list[int] = []
        self.died_at: list[int | None] = []
        self.events: list[int] = []
        self.event_paths: list[str] = []
        self.phases: list[tuple[int, str]] = []
        self.granularity = 1
        self.workspace_bytes = 0
        self._decoder_path = layers_path.rpartition(".")[0]
        either = rf"(?:{REFERENCE_PATH}\.)?"
        self._in_decoder = re.compile(either + re.escape(self._decoder_path))
        self._layer = re.compile(rf"{either}{re.escape(layers_path)}\.(\d+)(?:\.|$)")
        self._layer_of_path: dict[str, int] = {}

    def begin_phase(self, name: str) -> None:
        """A new phase. The first products of forward and of backward, which run in threads of
        their own, each take a workspace for good."""
        thread = next((phases for phases in _THREADS if name in phases), ())
        first = bool(thread) and all(earlier not in thread for _, earlier in self.phases)
        self.phases.append((len(self.events), name))
        if first and self.workspace_bytes:
            self.path = ""
            self.born(
                num_bytes=self.workspace_bytes,
                path="",
                operation="cuBLAS workspace",
                shape=(self.workspace_bytes,),
                dtype="uint8",
                component="temporaries",
            )

    def born(
        self,
        *,
        num_bytes: int,
        path: str,
        operation: Any,
        shape: tuple[int, ...],
        dtype: Any,
        component: str | None,
    ) -> int:
        """One more storage; returns its index."""
        index = len(self.sizes)
        self.sizes.append(-(-num_bytes // self.granularity) * self.granularity)
        self.paths.append(path)
        self.operations.append(operation)
        self.shapes.append(shape)
        self.dtypes.append(dtype)
        self.components.append(component)
        self.born_at.append(len(self.events))
        self.died_at.append(None)
        self.events.append(index)
        self.event_paths.append(path)
        return index

    def died(self, index: int, path: str) -> None:
        self.died_at[index] = len(self.events)
        self.events.append(~index)
        self.event_paths.append(path)

    def mark_recomputed(self, first: int) -> None:
        """Storages from `first` on that are alive were computed again for backward."""
        for index in range(first, len(self.sizes)):
            if self.died_at[index] is None and self.components[index] is None:
                self.components[index] = "activations"

    def layer_of(self, path: str) -> int:
        """The decoder layer in which a module lies, -1 outside of layers."""
        layer = self._layer_of_path.get(path)
        if layer is None:
            match = self._layer.match(path)
            layer = self._layer_of_path[path] = int(match[1]) if match else -1
        return layer

    def finish(self, runs: tuple[Run, ...] = ()) -> MemoryRecord:
        """The record, with the layers that were left out put in.

        Raises NotRepeating where they did not behave as the traced ones.
        """
        self._fill_in_components()
        operations = {operation: str(operation) for operation in set(self.operations)}
        dtypes = {dtype: str(dtype).removeprefix("torch.") for dtype in set(self.dtypes)}
        traced = TracedRecord(
            events=self.events,
            event_layers=[self.layer_of(path) for path in self.event_paths],
            kinds=list(zip(self.sizes, self.operations, self.components, strict=True)),
            marks=[position for position, _ in self.phases],
        )
        whole = repeat_layers(traced, runs)
        storages = [
            Storage(
                num_bytes=self.sizes[source],
                component=self.components[source] or "temporaries",
                module=self._path_in_model(self.paths[source], further),
                operation=operations[self.operations[source]],
                shape=self.shapes[source],
                dtype=dtypes[self.dtypes[source]],
            )
            for source, further in whole.origin
        ]
        names = [name for _, name in self.phases]
        return MemoryRecord(
            storages=storages,
            events=whole.events,
            phases=list(zip(whole.marks, names, strict=True)),
        )

    def _path_in_model(self, path: str, further: int) -> str:
        if not further:
            return path
        match = self._layer.match(path)
        if not match:
            return path
        return path[: match.start(1)] + str(int(match[1]) + further) + path[match.end(1) :]

    def _fill_in_components(self) -> None:
        """Say of each storage what it was, from when and where it lived."""
        ends = [position for position, _ in self.phases[1:]] + [len(self.events)]
        spans = [(name, end) for (_, name), end in zip(self.phases, ends, strict=True)]
        at = 0
        for index, component in enumerate(self.components):
            while at < len(spans) - 1 and self.born_at[index] >= spans[at][1]:
                at += 1
            if component is None:
                self.components[index] = self._component(index, *spans[at])

    def _component(self, index: int, phase: str, phase_end: int) -> str:
        if phase not in _MODEL_PHASES:
            return "temporaries"
        if not self._in_decoder.match(self.paths[index]):
            return "logits_and_loss"
        died_at = self.died_at[index]
        outlives = died_at is None or died_at >= phase_end
        return "activations" if phase == "forward" and outlives else "temporaries"
