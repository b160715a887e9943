"""The tuned modules of a model, each merged by PEFT's own code with nothing else in memory.

PEFT is given a model whose parameters have shapes and no memory: one zero, repeated. It puts its
adapters there and loads them; then each tuned module gets its weights from the base's files, is
merged, and gives them up again.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from ftplan.planner.errors import InputError

# Beginnings that change the base's weights as well, so that they are made again at every load.
_CHANGES_BASE = ("pissa", "olora", "loftq")

Reader = Callable[[str], torch.Tensor]


class TunedModule(Struct, frozen=True):
    """A module that PEFT has wrapped. `parameters`: the model's parameters that it is made of, by
    the objects that stand for them."""

    name: str
    module: Any
    parameters: dict[str, nn.Parameter]


class EmptyTuned:
    """A model with its adapter, without the base's weights.

    `skeleton`: with the base's weights where `needs_base` says so. `whole`: parameters of the base
    that come with the adapter.
    """

    def __init__(
        self, skeleton: PreTrainedModel, adapter: Path, whole: Mapping[str, tuple[int, ...]]
    ) -> None:
        config = PeftConfig.from_pretrained(str(adapter))
        self.begun_as = _begun_as(config)
        self.has_base = needs_base(config)
        self._names = _parameter_names(skeleton) if self.has_base else _empty(skeleton, whole)
        self._same = {name: names for names in self._names.values() for name in names}
        if self.begun_as:
            config.init_lora_weights = True
        with _quiet():
            tuned = PeftModel.from_pretrained(
                skeleton, str(adapter), config=config, torch_device="cpu"
            )
        self.peft = tuned.eval()
        self.config = config

    @property
    def model(self) -> nn.Module:
        """transformers' model, with PEFT's modules in it."""
        found: nn.Module = self.peft.base_model.model
        return found

    def same_as(self, name: str) -> list[str]:
        """All names of the parameter; several where weights are tied."""
        return self._same.get(name, [name])

    def modules(self) -> list[TunedModule]:
        """Every wrapped module, outermost ones only, in the model's order."""
        found: list[TunedModule] = []
        for name, module in self.model.named_modules():
            inside = found and name.startswith(f"{found[-1].name}.")
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not inside:
                parameters = {
                    self._names[id(p)][0]: p for p in module.parameters() if id(p) in self._names
                }
                found.append(TunedModule(name, module, parameters))
        return found

    def merged(self, tuned: TunedModule, read: Reader) -> dict[str, torch.Tensor]:
        """The parameters of the module with the adapter in them; `read` gives the base's."""
        for name, parameter in tuned.parameters.items():
            if not self.has_base:
                parameter.data = read(name)
        with torch.no_grad(), _quiet():
            self._begin_again(tuned.module)
            plain = _merge(tuned.module, self.config)
        found = {f"{tuned.name}.{name}": p.data for name, p in plain.named_parameters()}
        for parameter in () if self.has_base else tuned.parameters.values():
            parameter.data = _nothing(parameter.shape, parameter.dtype)
        for part in tuned.module.modules():
            if isinstance(part, BaseTunerLayer):
                part.merged_adapters.clear()  # it can be merged again
        return found

    def _begin_again(self, module: nn.Module) -> None:
        """Take from the base's weights what the adapters began with, and keep the trained ones."""
        if not self.begun_as or not isinstance(module, BaseTunerLayer):
            return
        (adapter,) = module.active_adapters
        parts: list[Any] = [module.lora_A[adapter], module.lora_B[adapter]]
        trained = [part.weight.data for part in parts]
        if self.begun_as.startswith("pissa"):
            module.pissa_init(adapter, self.begun_as)
        elif self.begun_as == "olora":
            module.olora_init(adapter)
        else:
            module.loftq_init(adapter, self.config)
        for part, weight in zip((module.lora_A, module.lora_B), trained, strict=True):
            part[adapter].weight.data = weight


def _begun_as(config: Any) -> str:
    """How adapters began that changed the base's weights too; empty for others."""
    begun = getattr(config, "init_lora_weights", True)
    name = begun.lower() if isinstance(begun, str) else ""
    if name.startswith("corda"):
        raise InputError(
            "adapters begun by CorDA cannot be merged: what they took from the base is not kept",
            "load the adapter with PEFT, or train with `--method pissa`",
        )
    return name if name.startswith(_CHANGES_BASE) else ""


def _empty(model: nn.Module, whole: Mapping[str, tuple[int, ...]]) -> dict[int, list[str]]:
    """Give every parameter a shape without memory; the names of each, by its object's id. PEFT
    writes into those of `whole`, which have memory."""
    made: dict[int, nn.Parameter] = {}
    names = _parameter_names(model)
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(old) not in made:
                data = _nothing(old.shape, torch.float32)
                if any(same in whole for same in names[id(old)]):
                    data = data.clone()
                made[id(old)] = nn.Parameter(data, requires_grad=False)
            setattr(module, name, made[id(old)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, _nothing(buffer.shape, buffer.dtype))
    return {id(made[old]): same for old, same in names.items()}


def _parameter_names(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _nothing(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros((), dtype=dtype).expand(shape)


def _merge(module: Any, config: PeftConfig) -> nn.Module:
    """As PEFT's `merge_and_unload` does with one module. Raises InputError where it cannot."""
    try:
        if hasattr(module, "unload_and_optionally_merge_module"):
            found: nn.Module = module.unload_and_optionally_merge_module(
                merge=True, safe_merge=True, adapter_names=None
            )
            return found
        module.merge(safe_merge=True)
    except (NotImplementedError, AttributeError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"PEFT cannot merge {_said_method(config)}: {said}", _INSTEAD) from error
    base: nn.Module = module.get_base_layer()
    return base


# Tuners that make part of what they train from the base's weights when they are loaded.
_NEED_BASE = (PeftType.PSOFT, PeftType.OSF)

_INSTEAD = (
    "load the base model with the adapter, as the end of the run said: the adapter is small. To "
    "merge, train with `--method lora`"
)


def needs_base(config: PeftConfig) -> bool:
    """Whether the adapter can be loaded only with all of the base's weights in memory."""
    return config.peft_type in _NEED_BASE


def _said_method(config: PeftConfig) -> str:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    return f"`{kind.lower().replace('_', '-')}`"


def check_mergeable(config: PeftConfig) -> None:
    """Raises InputError for what has no part in the weights."""
    if config.is_prompt_learning or config.peft_type == PeftType.ADAPTION_PROMPT:
        raise InputError(
            f"{_said_method(config)} cannot be merged: it adds to the input, not to the weights",
            _INSTEAD,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without PEFT's warnings, which speak of models that stay in memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
