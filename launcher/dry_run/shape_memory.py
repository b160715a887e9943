"""Remembers what operations return, by the shapes they are given.

The fake mode works every shape out anew or looks it up by an elaborate key; a training step asks
the same few hundred questions thousands of times. Only operations whose result is one fresh tensor,
or a view of the first argument, that depends on shapes and plain values are remembered; all others
go to the fake mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.utils._mode_utils import no_dispatch

_CPU = torch.device("cpu")
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.memory_format, torch.layout)
_aten = torch.ops.aten
_VIEWS = frozenset(
    (
        *(_aten.view.default, _aten._unsafe_view.default, _aten.expand.default, _aten.t.default),
        *(_aten.transpose.int, _aten.permute.default, _aten.unsqueeze.default, _aten.select.int),
        *(_aten.slice.Tensor, _aten.detach.default, _aten.alias.default),
    )
)
_DEPENDS_ON_DATA = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


class _NotPlain(Exception):
    """An argument that a key cannot be made of."""


class ShapeMemory:
    """Runs operations under a fake mode."""

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        self.fake_mode = fake_mode
        self._remembered: dict[Any, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}
        self._views: dict[Any, tuple[torch.Size, tuple[int, ...], int]] = {}
        self._is_fresh: dict[Any, bool] = {}

    def run(self, operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The operation's result, a fake."""
        if operation in _VIEWS:
            return self._view(operation, args, kwargs)
        fresh = self._is_fresh.get(operation)
        if fresh is None:
            fresh = self._is_fresh[operation] = _returns_one_fresh_tensor(operation)
        if not fresh:
            return operation(*args, **kwargs)
        try:
            key = _key_of_call(operation, args, kwargs)
        except _NotPlain:
            return operation(*args, **kwargs)
        known = self._remembered.get(key)
        if known is not None:
            shape, stride, dtype = known
            with no_dispatch():
                meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            return FakeTensor(self.fake_mode, meta, _CPU)
        result = operation(*args, **kwargs)
        if type(result) is FakeTensor and _is_plain(result):
            self._remembered[key] = (result.shape, result.stride(), result.dtype)
        return result

    def _view(self, operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Remembered is a view's place in the storage, relative to that of what it shows."""
        try:
            key = _key_of_call(operation, args, kwargs)
        except _NotPlain:
            return operation(*args, **kwargs)
        viewed = args[0]
        known = self._views.get(key)
        if known is not None:
            shape, stride, further = known
            with no_dispatch():
                meta = torch.empty(0, dtype=viewed.dtype, device="meta")
            storage, offset = viewed.untyped_storage(), viewed.storage_offset() + further
            with in_kernel_invocation_manager(self.fake_mode):
                meta.set_(storage, offset, shape, stride)
            return FakeTensor(self.fake_mode, meta, _CPU)
        result = operation(*args, **kwargs)
        if type(result) is FakeTensor and _is_plain(result) and _share_storage(result, viewed):
            further = result.storage_offset() - viewed.storage_offset()
            self._views[key] = (result.shape, result.stride(), further)
        return result


def _returns_one_fresh_tensor(operation: Any) -> bool:
    schema = operation._schema
    if schema.is_mutable or len(schema.returns) != 1:
        return False
    only = schema.returns[0]
    tagged = any(tag in operation.tags for tag in _DEPENDS_ON_DATA)
    return only.alias_info is None and str(only.type) == "Tensor" and not tagged


def _is_plain(tensor: FakeTensor) -> bool:
    """Whether shape, stride and dtype say all. Known values stay with the fake mode, which looks
    after them."""
    dense = tensor.layout is torch.strided and tensor.device == _CPU
    return dense and tensor.constant is None


def _share_storage(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def _key_of_call(operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return (operation, *map(_key, args), *((k, _key(v)) for k, v in kwargs.items()))


def _key(value: Any) -> Any:
    if isinstance(value, FakeTensor):
        if not _is_plain(value):
            raise _NotPlain
        return (value.shape, value.stride(), value.dtype)
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if isinstance(value, (list, tuple)) and all(isinstance(v, _PLAIN) for v in value):
        return (list, *value)
    if isinstance(value, torch.device) and value.type == "cpu":
        return value
    raise _NotPlain
