"""Tensors of a model folder, one at a time: read from its safetensors, written into new ones.

The format (safetensors' README): eight bytes with the length of a JSON header, the header, which
says each tensor's type, shape and place, and the tensors' bytes. Since all places are known before
the first tensor is, tensors are written in any order and none is kept.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from msgspec import Struct
from safetensors import SafetensorError, safe_open

from ftplan.planner.errors import InputError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Bytes of a header are a multiple of this, so that tensors are aligned.
_ALIGNMENT = 8


class TensorInfo(Struct, frozen=True):
    """A tensor's file, type and shape."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return int(math.prod(self.shape) * self.dtype.itemsize)


class TensorFolder:
    """The safetensors of a model folder. Raises InputError where one is missing or damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        for file in _files(folder):
            with self._opened(file) as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                    part = opened.get_slice(name)
                    kind = part.get_dtype()
                    if kind not in DTYPES:
                        raise InputError(
                            f"`{folder / file}` holds `{name}` in {kind}",
                            "merge into a base model in 16 or 32 bits",
                        )
                    self.tensors[name] = TensorInfo(file, DTYPES[kind], tuple(part.get_shape()))

    def read(self, name: str) -> torch.Tensor:
        """The tensor, copied: nothing of its file stays in memory."""
        with self._opened(self.tensors[name].file) as opened:
            tensor: torch.Tensor = opened.get_tensor(name).clone()
            return tensor

    @contextlib.contextmanager
    def _opened(self, file: str) -> Iterator[Any]:
        path = self.folder / file
        try:
            with safe_open(str(path), framework="pt") as opened:
                yield opened
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"cannot read `{path}`: {error}", "fetch or save the base model again"
            ) from error


def _files(folder: Path) -> list[str]:
    index = folder / INDEX
    if not index.is_file():
        return [WEIGHTS]
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"`{index}` is damaged: {error}", "fetch or save the base model again"
        ) from error


class TensorWriter:
    """New safetensors in `folder` with the tensors of `infos`, each given once, in any order."""

    def __init__(self, folder: Path, infos: Mapping[str, TensorInfo]) -> None:
        self.folder = folder
        self.infos = infos
        self._places: dict[str, int] = {}
        self._files: dict[str, BinaryIO] = {}
        self._missing = set(infos)

    def __enter__(self) -> TensorWriter:
        by_file: dict[str, dict[str, TensorInfo]] = {}
        for name, info in self.infos.items():
            by_file.setdefault(info.file, {})[name] = info
        for file, infos in by_file.items():
            self._files[file] = (self.folder / file).open("wb")
            self._begin(file, infos)
        if set(by_file) != {WEIGHTS}:
            (self.folder / INDEX).write_text(json.dumps(self._index(), indent=2) + "\n")
        return self

    def _begin(self, file: str, infos: Mapping[str, TensorInfo]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, info in infos.items():
            header[name] = {
                "dtype": _NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, offset + info.num_bytes],
            }
            offset += info.num_bytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        stream = self._files[file]
        stream.write(len(text).to_bytes(8, "little") + text)
        first = stream.tell()
        for name in infos:
            self._places[name] = first + header[name]["data_offsets"][0]
        stream.truncate(first + offset)

    def _index(self) -> dict[str, Any]:
        total = sum(info.num_bytes for info in self.infos.values())
        places = {name: info.file for name, info in sorted(self.infos.items())}
        return {"metadata": {"total_size": total}, "weight_map": places}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor in its place, in the dtype that it was announced with."""
        info = self.infos[name]
        assert tuple(tensor.shape) == info.shape, f"{name}: {tuple(tensor.shape)} {info.shape}"
        self._missing.remove(name)
        stream = self._files[info.file]
        stream.seek(self._places[name])
        whole = tensor.detach().to(info.dtype).contiguous()
        stream.write(memoryview(whole.reshape(-1).view(torch.uint8).numpy()))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for stream in self._files.values():
            stream.close()
        assert kind is not None or not self._missing, f"never written: {sorted(self._missing)[:5]}"
