"""An adapter into its base model's weights: module by module, so that the memory it takes is that
of the largest module, not of the model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct
from peft import PeftConfig
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedModel

from ftplan.launcher import remote_code
from ftplan.launcher.data.tokens import load_tokenizer
from ftplan.launcher.merging.base import BaseTensors, Group
from ftplan.launcher.merging.request import MergeRequest, check_ram
from ftplan.launcher.merging.tensor_files import TensorFolder, TensorInfo, TensorWriter
from ftplan.launcher.merging.tuned import (
    EmptyTuned,
    TunedModule,
    check_mergeable,
    needs_base,
)
from ftplan.launcher.training.model_classes import MODEL_CLASSES
from ftplan.planner.errors import InputError
from ftplan.planner.objectives import OBJECTIVES

# 16 bits for a base in 32: what models are kept and served in.
DEFAULT_DTYPE = torch.bfloat16
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)

_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."

# Merged so and rounded once, whatever the base is kept in.
_MERGED_IN = torch.float32

Progress = Callable[[Sequence["Unit"]], Iterator["Unit"]]
Tensors = dict[str, torch.Tensor]


class Unit(Struct):
    """Tuned modules that share tensors of the files, and those tensors."""

    modules: list[TunedModule]
    groups: list[Group]


class Merger:
    """One merge. Raises InputError where the method has no part in weights, or the files are
    damaged.

    `dtype`: of the merged weights; None takes the base's if it has 16 bits, else bfloat16.
    """

    def __init__(self, request: MergeRequest, dtype: torch.dtype | None) -> None:
        self.request = request
        adapter = PeftConfig.from_pretrained(str(request.adapter))
        check_mergeable(adapter)
        self.files = TensorFolder(request.base)
        self.base_dtype = _main_dtype(self.files)
        own = self.base_dtype if self.base_dtype in _SIXTEEN_BITS else DEFAULT_DTYPE
        self.dtype = dtype or own
        self.config = _model_config(request)
        self.trust = remote_code.trusted(request.base)
        self.whole = WholeWeights(request.adapter, self._skeleton())
        if self.whole.vocab_size is not None:
            self.config.vocab_size = self.whole.vocab_size
        skeleton = self._skeleton()
        self.base = BaseTensors(skeleton, self.files)
        self.parameters_of = {
            name: [f"{name}.{own}" for own, _ in module.named_parameters()]
            for name, module in skeleton.named_modules()
        }
        within = self._loaded() if needs_base(adapter) else self._skeleton()
        self.tuned = EmptyTuned(within, request.adapter, self.whole.names)
        self.units = self._units()
        self.extra = self._extra()

    def _skeleton(self) -> PreTrainedModel:
        auto = MODEL_CLASSES[self.request.objective].auto
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(
                self.config, dtype=_MERGED_IN, trust_remote_code=self.trust
            )
        return model.eval()

    def _loaded(self) -> PreTrainedModel:
        """Raises InputError where the whole base does not fit into the RAM."""
        sizes = (math.prod(info.shape) for info in self.files.tensors.values())
        check_ram(sum(sizes) * _MERGED_IN.itemsize, "to merge this method")
        auto = MODEL_CLASSES[self.request.objective].auto
        model: PreTrainedModel = auto.from_pretrained(
            str(self.request.base),
            config=self.config,
            dtype=_MERGED_IN,
            trust_remote_code=self.trust,
        )
        return model.eval()

    def _units(self) -> list[Unit]:
        """Modules that need tensors in common are merged together."""
        units: list[Unit] = []
        for module in self.tuned.modules():
            unit = Unit([module], self._groups(module))
            for old in [u for u in units if _overlap(u.groups, unit.groups)]:
                unit.modules = [*old.modules, *unit.modules]
                unit.groups += [g for g in old.groups if not _overlap([g], unit.groups)]
                units.remove(old)
            units.append(unit)
        return units

    def _groups(self, module: TunedModule) -> list[Group]:
        """The groups of the module's parameters, under any of the names that tied ones have."""
        names = [name for same in module.parameters for name in self.tuned.same_as(same)]
        found: list[Group] = []
        for name in [*names, *self.parameters_of[module.name]]:
            group = self.base.group_of.get(name)
            if group is not None and not _overlap([group], found):
                found.append(group)
        return found

    def _extra(self) -> dict[str, torch.Size]:
        """Parameters that the merged files have and the base's do not: a head that was tied to the
        embeddings and no longer is like them, a new head."""
        found: dict[str, torch.Size] = {}
        for unit in self.units:
            names = {name for m in unit.modules for name in self.parameters_of[m.name]}
            names |= {same for name in names for same in self.tuned.same_as(name)}
            if any(name not in self.base.group_of for name in names):
                found |= {name: t.shape for name, t in self._merged(unit)[1].items()}
        return found

    def _merged(self, unit: Unit) -> tuple[Tensors, Tensors]:
        """What the files have for the unit, under their names, and what they do not have."""
        base: Tensors = {}
        for group in unit.groups:
            base |= self.base.parameters(group, _MERGED_IN)

        def read(name: str) -> torch.Tensor:
            if name in self.whole.names:
                return self.whole.read(name)
            return next(base[same] for same in self.tuned.same_as(name) if same in base).clone()

        new: Tensors = {}
        for module in unit.modules:
            new |= self.tuned.merged(module, read)
        after = {name: new.get(name, tensor) for name, tensor in base.items()}
        extra = {name: tensor for name, tensor in new.items() if name not in after}
        for name in list(base):
            for same in self.tuned.same_as(name):
                tensor = new.get(same, base[name])
                if same not in after and not torch.equal(tensor, after[name]):
                    extra[same] = tensor
                elif same not in base:
                    extra.pop(same, None)
        return self.base.tensors(unit.groups, after), extra

    def num_bytes(self) -> int:
        """Of the merged weights."""
        return sum(info.num_bytes for info in self._infos().values())

    def num_parameters(self) -> int:
        """Of the merged model."""
        return sum(math.prod(info.shape) for info in self._infos().values())

    def _infos(self) -> dict[str, TensorInfo]:
        """The merged files: those of the base, and in the last of them what it does not have."""
        scores = OBJECTIVES[self.request.objective].scores
        left_out = set(self.base.not_in_model) if scores else set()
        found = {
            name: TensorInfo(info.file, self._dtype(info.dtype), self._shape(name, info.shape))
            for name, info in self.files.tensors.items()
            if name not in left_out
        }
        last = max(info.file for info in found.values())
        extra = {n: TensorInfo(last, self.dtype, tuple(size)) for n, size in self.extra.items()}
        return {**found, **extra}

    def _dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What the base keeps in another type than most of it keeps that type."""
        return self.dtype if dtype is self.base_dtype else dtype

    def _shape(self, source: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        for name, size in self.whole.names.items():
            group = self.base.group_of.get(name)
            if group is not None and group.sources[0][0] == source:
                return size
        return shape

    def write(self, folder: Path, progress: Progress) -> None:
        """The merged model with its tokenizer into `folder`, which is there and empty."""
        infos, done = self._infos(), set[str]()
        with TensorWriter(folder, infos) as writer:
            for unit in progress(self.units):
                for tensors in self._merged(unit):
                    for name, tensor in tensors.items():
                        writer.write(name, tensor)
                        done.add(name)
            for name in infos:
                if name not in done:
                    writer.write(name, self._left_alone(name))
        self._write_rest(folder)

    def _left_alone(self, source: str) -> torch.Tensor:
        """A tensor that no module tuned; new rows of embeddings come with the adapter."""
        for name in self.whole.names:
            group = self.base.group_of.get(name)
            if group is not None and group.sources[0][0] == source:
                return self.whole.read(name)
        return self.files.read(source)

    def _write_rest(self, folder: Path) -> None:
        tied = {same for name in self.extra for same in self.tuned.same_as(name) if same != name}
        if tied:
            self.config.tie_word_embeddings = False
        self.config.dtype = self.dtype
        self.config.architectures = [type(self.base.skeleton).__name__]
        self.config.save_pretrained(folder)
        generation = self.request.base / "generation_config.json"
        if generation.is_file():
            (folder / generation.name).write_bytes(generation.read_bytes())
        load_tokenizer(self.request.adapter).tokenizer.save_pretrained(folder)


class WholeWeights:
    """Parameters of the base that stand in the adapter's file whole, as embeddings with new tokens
    do: their shapes by their names. `vocab_size`: where it is another one than the base's."""

    def __init__(self, adapter: Path, skeleton: PreTrainedModel) -> None:
        self.path = adapter / _ADAPTER_WEIGHTS
        self._keys: dict[str, str] = {}
        self.names: dict[str, tuple[int, ...]] = {}
        known = skeleton.state_dict()
        with safe_open(str(self.path), framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (it is no mapping)
                name = key.removeprefix(_PEFT_PREFIX).replace(".base_layer.", ".")
                if name in known and key.startswith(_PEFT_PREFIX):
                    self._keys[name] = key
                    self.names[name] = tuple(opened.get_slice(key).get_shape())
        embeddings = skeleton.get_input_embeddings().weight
        every = skeleton.named_parameters(remove_duplicate=False)
        rows = [self.names[n][0] for n, p in every if p is embeddings and n in self.names]
        self.vocab_size = next((n for n in rows if n != len(embeddings)), None)

    def read(self, name: str) -> torch.Tensor:
        with safe_open(str(self.path), framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(self._keys[name]).to(_MERGED_IN).clone()
            return tensor


def _model_config(request: MergeRequest) -> Any:
    settings = MODEL_CLASSES[request.objective].settings
    base = str(request.base)
    trust = remote_code.trusted(base)
    with remote_code.refused(base):
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust, **settings)
    if (config.quantization_config if hasattr(config, "quantization_config") else None) is not None:
        raise InputError(
            f"the base model at `{request.base}` is quantized: an adapter is merged in 16 bits",
            "put the unquantized model there",
        )
    return config


def _main_dtype(files: TensorFolder) -> torch.dtype:
    """What most of the model is kept in."""
    sizes: Counter[torch.dtype] = Counter()
    for info in files.tensors.values():
        if info.dtype.is_floating_point:
            sizes[info.dtype] += info.num_bytes
    if not sizes:
        raise InputError(f"`{files.folder}` holds no weights", "fetch the base model again")
    return sizes.most_common(1)[0][0]


def _overlap(some: list[Group], others: list[Group]) -> bool:
    return any(group is other for group in some for other in others)
