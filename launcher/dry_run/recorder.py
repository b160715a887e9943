"""Birth and death of every storage, while a model trains on fake tensors.

A dispatch mode sees each operation after autograd and autocast, with the storages that it
returns; a weak reference tells when a storage's last owner lets go. The module comes from hooks;
in backward, from the autograd node that runs.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from ftplan.launcher.dry_run.draft import REFERENCE_PATH, REWARD_MODEL_PATH, Draft
from ftplan.launcher.dry_run.shape_memory import ShapeMemory
from ftplan.launcher.training.measure import local_tensor

_aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
_ALL = (_aten.all.default, _aten.all.dim)
_RANDOM = (_aten.rand.default,)

# Components of which autocast makes copies.
_COPIED = ("weights", "reference_model", "adapters")


class Recorder(TorchDispatchMode):
    """Records into a Draft while it is on.

    `decompositions`: what to run in the place of an operation, whose own parts are recorded.
    `padded`: whether the batch has padding (data, which fakes do not have, would tell).
    `between_steps`: no module runs; storages belong to the modules of what they are made from.
    `in_optimizer`: the optimizer steps.
    `on_host`: what is born is no memory of the device. `component`: what everything born is.
    `backward_ended`: called after each backward, with whether the optimizer steps next.
    """

    def __init__(
        self,
        draft: Draft,
        fake_mode: FakeTensorMode,
        decompositions: dict[Any, Callable[..., Any]],
        padded: bool,
    ) -> None:
        super().__init__()
        self._shapes = ShapeMemory(fake_mode)
        self.draft = draft
        self.decompositions = decompositions
        self.padded = padded
        self.between_steps = False
        self.in_backward = False
        self.in_optimizer = False
        self._works_on_list = False
        self.on_host = False
        self.component: str | None = None
        self.backward_ended: Callable[[bool], None] = lambda steps_next: None
        self._decomposing = False
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._index: dict[int, int] = {}
        self._emptied: dict[int, int] = {}
        self._paths: dict[nn.Module, str] = {}
        self._stack: list[str] = []
        self._path_of_node: dict[int, str] = {}
        self._next_node = 0
        self._recomputed_from = 0

    @contextmanager
    def watching(
        self,
        model: nn.Module,
        reference: nn.Module | None = None,
        reward_model: nn.Module | None = None,
    ) -> Iterator[None]:
        """Record within, deaths included. Modules are known by their paths in `model`, those of
        a `reference` model by theirs below REFERENCE_PATH, a reward model's below another."""
        self._paths = {module: name for name, module in model.named_modules()}
        for path, beside in ((REFERENCE_PATH, reference), (REWARD_MODEL_PATH, reward_model)):
            if beside is not None:
                named = beside.named_modules(prefix=path)
                self._paths.update((module, name) for name, module in named)
        resize = torch.UntypedStorage.resize_

        def resized(storage: Any, num_bytes: int) -> Any:
            # Not an operation: sharded parameters come and go so, their storages stay.
            result = resize(storage, num_bytes)
            self._resized(storage)
            return result

        hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            with self, mock.patch.object(torch.UntypedStorage, "resize_", resized):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def adopt(self, tensors: Iterable[torch.Tensor], component: str, path: str) -> None:
        """Record storages that exist before anything runs, such as weights."""
        for tensor in map(local_tensor, tensors):
            key = tensor.untyped_storage()._cdata
            if key not in self._index:
                self._alive.pop(key, None)
                self._see(tensor, "load", path, component)

    def place(self, module: nn.Module, *, like: nn.Module) -> None:
        """Take a module that came later as being where `like` is."""
        self._paths[module] = self._paths[like]

    def path_of(self, module: nn.Module) -> str:
        return self._paths[module]

    def relabel(
        self, tensors: Iterable[torch.Tensor], component: str, *, anew: bool = True
    ) -> None:
        """Say what storages are, once it is known (gradients, optimizer states); with `anew` also
        of those of which something was said before."""
        for tensor in tensors:
            index = self._index.get(local_tensor(tensor).untyped_storage()._cdata)
            if index is not None and (anew or self.draft.components[index] is None):
                self.draft.components[index] = component

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own operations on what this GPU holds come here next
        if func is _DEVICE:  # C++ asks two times an operation; the fake mode would think it over
            return args[0].fake_device
        if func is _aten._local_scalar_dense.default and args[0].constant is None:
            return self._plausible(args[0])
        if func is _aten.add.Tensor and self.in_backward and _sums_gradients(*args):
            return args[0]
        if func in self.decompositions and not self._decomposing:
            self._decomposing = True
            try:
                with self:
                    return self.decompositions[func](*args, **(kwargs or {}))
            finally:
                self._decomposing = False
        result = self._shapes.run(func, args, kwargs or {})
        if isinstance(result, torch.Tensor):
            path = self._current_path(args, 0)
            self._see(result, func, path, self._copied_component(func, args))
            if func in _ALL:
                result.is_true = not self.padded
            elif func is _aten._is_all_true.default:  # what torch.distributions asks of parameters
                result.is_true = True
            elif func in _RANDOM:
                result.is_chance = True
            elif func is _aten.gt.Scalar and hasattr(args[0], "is_chance"):
                result.is_true = True
        elif isinstance(result, (list, tuple)):
            for number, item in enumerate(result):
                if isinstance(item, torch.Tensor):
                    self._see(item, func, self._current_path(args, number), None)
        return result

    def _plausible(self, tensor: torch.Tensor) -> bool | int | float:
        """What `.item()` gives on a fake: numbers are finite, counts are one, and a module that is
        left out by chance is not."""
        if tensor.dtype is torch.bool:
            return bool(getattr(tensor, "is_true", False))
        return 1.0 if tensor.dtype.is_floating_point else 1

    def _copied_component(self, func: Any, args: tuple[Any, ...]) -> str | None:
        """Autocast's copies of weights are known by what they copy."""
        if func is _aten._to_copy.default and not self.between_steps:
            source = self._index.get(args[0].untyped_storage()._cdata)
            if source is not None and self.draft.components[source] in _COPIED:
                return "autocast_copies"
        return None

    def _current_path(self, args: tuple[Any, ...], number: int) -> str:
        node = torch._C._current_autograd_node()
        if self._stack:  # forward, or a layer computed again by gradient checkpointing
            path = self._stack[-1]
        elif self.between_steps:
            path = self._path_of_argument(args, number)
        elif node is not None:
            path = self._path_of_node.get(node._sequence_nr(), self.draft.path)
        else:
            path = ""
        last = torch.autograd._get_sequence_nr()
        for new in range(self._next_node, last):
            self._path_of_node[new] = path
        self._next_node = last
        self.draft.path = path
        return path

    def _path_of_argument(self, args: tuple[Any, ...], number: int) -> str:
        """The module of the tensor that an optimizer works on; of a list's, the one at `number`."""
        first = args[0] if args else None
        if isinstance(first, (list, tuple)):
            first = first[number] if number < len(first) else None
            self._works_on_list = isinstance(first, torch.Tensor)
        else:
            self._works_on_list = False
        if isinstance(first, torch.Tensor):
            index = self._index.get(first.untyped_storage()._cdata)
            if index is not None:
                return self.draft.paths[index]
        return self.draft.path

    def _see(self, tensor: torch.Tensor, func: Any, path: str, component: str | None) -> None:
        if tensor.layout is torch.sparse_coo:
            for part in (tensor._indices(), tensor._values()):
                self._see(part, func, path, component)
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = weakref.ref(storage, lambda _: self._forget(key))
        if self.on_host:
            return
        self._index[key] = self.draft.born(
            num_bytes=storage.nbytes(),
            path=path,
            operation=func,
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            component=component or self.component,
        )

    def leaves_device(self, tensor: torch.Tensor) -> None:
        """The storage's memory is given back, though the storage lives on."""
        self._died(local_tensor(tensor).untyped_storage()._cdata)

    def _resized(self, storage: Any) -> None:
        key, draft = storage._cdata, self.draft
        self._died(key)
        emptied = self._emptied.get(key)
        if emptied is not None and storage.nbytes():
            self._index[key] = draft.born(
                num_bytes=storage.nbytes(),
                path=self._current_path((), 0),
                operation=draft.operations[emptied],
                shape=draft.shapes[emptied],
                dtype=draft.dtypes[emptied],
                component=self.component,
            )

    def _forget(self, key: int) -> None:
        self._died(key)
        del self._alive[key]
        self._emptied.pop(key, None)

    def _died(self, key: int) -> None:
        index = self._index.pop(key, None)
        if index is not None:
            self._emptied[key] = index
            draft = self.draft
            # An optimizer that goes from parameter to parameter lets go of one while it works on
            # the next; all else between steps is let go of in rows.
            one_by_one = self.in_optimizer and not self._works_on_list
            own_path = self.between_steps and not one_by_one
            draft.died(index, draft.paths[index] if own_path else draft.path)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self.in_backward and not self._stack:
            self._recomputed_from = len(self.draft.sizes)
        path = self._paths.get(module)
        self._stack.append(path if path is not None else (self._stack or [""])[-1])
        self.draft.path = self._stack[-1]

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        self._stack.pop()
        if self.in_backward and not self._stack:
            self.draft.mark_recomputed(self._recomputed_from)


# The frame from which autograd's engine runs (torch.autograd.graph).
_ENGINE_FRAME = "_engine_run_backward"
# What torch wraps around a dispatch mode's method.
_MODE_FRAMES = ("_fn", "inner")
# Uses of a storage that no other tensor has: the tensor's, and that of who asks.
_USES_OF_OWN_STORAGE = 2


def _sums_gradients(first: Any, second: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether the engine adds a second gradient to a first one that no one else refers to.

    It does so in place (torch/csrc/autograd/input_buffer.cpp), but not on fake tensors, which it
    takes for a subclass of which it knows nothing.
    """
    frame = sys._getframe(2)
    while frame.f_code.co_name in _MODE_FRAMES and frame.f_back is not None:
        frame = frame.f_back
    if frame.f_code.co_name != _ENGINE_FRAME:
        return False
    both = isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
    if not both or first.shape != second.shape or first.dtype != second.dtype:
        return False
    storage = first.untyped_storage()
    return bool(torch._C._storage_Use_Count(storage._cdata) == _USES_OF_OWN_STORAGE)
