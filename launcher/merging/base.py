"""Which tensors of a base model's files make which parameter of the model.

Most are one and the same under another name; some are put together, as the experts of a mixture
are. transformers knows how (`conversion_mapping`); it is asked, for some parameters at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from msgspec import Struct, field
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from ftplan.launcher.merging.tensor_files import TensorFolder


class Group(Struct):
    """Tensors of the files that become parameters together. `converter`: None where one tensor is
    one parameter. `sources`: names in the files, each with the pattern that it matched."""

    targets: tuple[str, ...]
    converter: Any = None
    sources: list[tuple[str, str]] = field(default_factory=list)


class BaseTensors:
    """The base model's tensors by the names that the model has for its parameters.

    `skeleton`: the model on the meta device, without adapters.
    """

    def __init__(self, skeleton: PreTrainedModel, files: TensorFolder) -> None:
        self.skeleton = skeleton
        self.files = files
        self.groups: list[Group] = []
        self.group_of: dict[str, Group] = {}
        self.not_in_model: list[str] = []
        self._find_groups()

    def _find_groups(self) -> None:
        mapping = get_model_conversion_mapping(self.skeleton)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
        known = self.skeleton.state_dict()
        prefix = self.skeleton.base_model_prefix
        for source in sorted(self.files.tensors, key=dot_natural_key):
            target, pattern = rename_source_key(source, renamings, converters, prefix, known)
            if target not in known and source in known:
                target, pattern = source, None
            if target not in known:
                self.not_in_model.append(source)
            elif pattern is None:
                self._add(Group((target,), None, [(source, source)]))
            elif target in self.group_of:
                self.group_of[target].sources.append((source, pattern))
            else:
                converter = by_pattern[pattern]
                first, *others = converter.target_patterns
                targets = (target, *(target.replace(first, other) for other in others))
                self._add(Group(targets, deepcopy(converter), [(source, pattern)]))
        # What `save_pretrained` would undo, as it does for a model that was loaded.
        self.skeleton._weight_conversions = [entry for entry in mapping if entry.was_used()]

    def _add(self, group: Group) -> None:
        self.groups.append(group)
        for target in group.targets:
            self.group_of[target] = group

    def parameters(self, group: Group, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The group's parameters, computed from their tensors."""
        tensors = [(name, p, self.files.read(name).to(dtype)) for name, p in group.sources]
        if group.converter is None:
            return {group.targets[0]: tensors[0][2]}
        converter = deepcopy(group.converter)
        for name, pattern, tensor in tensors:
            converter.add_tensor(group.targets[0], name, pattern, tensor)
        found = converter.convert(
            group.targets[0], model=self.skeleton, config=self.skeleton.config
        )
        return {name: _one(tensor) for name, tensor in found.items()}

    def tensors(
        self, groups: Iterable[Group], parameters: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """What the files hold for these parameters, which are all of these groups."""
        found: dict[str, torch.Tensor] = {}
        for group in groups:
            mine = {target: parameters[target] for target in group.targets}
            if group.converter is None:
                found[group.sources[0][0]] = mine[group.targets[0]]
                continue
            found |= revert_weight_conversion(self.skeleton, mine)
        return found


def _one(tensor: Any) -> torch.Tensor:
    found: torch.Tensor = tensor[0] if isinstance(tensor, list) else tensor
    return found
