"""Whether the merged model computes what base and adapter compute: the logits of a few tokens."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct
from peft import PeftModel

from ftplan.launcher import remote_code
from ftplan.launcher.data.tokens import load_tokenizer
from ftplan.launcher.host import ram_bytes
from ftplan.launcher.merging.request import MergeRequest
from ftplan.launcher.training.model_classes import MODEL_CLASSES
from ftplan.planner.errors import RunFailedError
from ftplan.profiles.text_facts import general_text

# Tokens of general text that both models read.
CHECKED_TOKENS = 32

# Both are computed in float32, one after the other, with room for activations beside the weights.
_COMPUTED_IN = torch.float32
_ROOM = 1.2

# Rounding a weight to the dtype changes it by half an epsilon of its size at most; through all
# layers, and in the worst of a few tokens, differences stay below a few epsilons. Assumed; what is
# measured is told.
TOLERATED_EPSILONS = 16
_LEAST_TOLERANCE = 1e-4


class Check(Struct, frozen=True, kw_only=True):
    """`difference`: root mean square of merged less unmerged logits, over that of the unmerged
    ones about their mean. `adapter_share`: what the adapter itself changes, so measured; None where
    it cannot be switched off. `same_top1`: share of tokens with the same most probable successor.
    """

    num_tokens: int
    difference: float
    adapter_share: float | None
    same_top1: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance

    @property
    def drowned(self) -> bool:
        """Whether rounding takes as much as the adapter gives."""
        return self.adapter_share is not None and self.adapter_share < self.difference


def can_check(num_parameters: int) -> bool:
    """Whether a model of so many parameters fits into the free RAM."""
    _, available = ram_bytes()
    return bool(num_parameters * _COMPUTED_IN.itemsize * _ROOM < available)


def check_merged(request: MergeRequest, merged: Path, dtype: torch.dtype) -> Check:
    """Compare the model in the folder `merged` with base and adapter.

    Raises RunFailedError where they compute different things.
    """
    tokens = _tokens(request)
    unmerged = PeftModel.from_pretrained(
        _loaded(request, request.base), str(request.adapter), torch_device="cpu"
    )
    wanted = _logits(unmerged, tokens)
    without = _without_adapter(unmerged, tokens)
    del unmerged
    gc.collect()
    found = _logits(_loaded(request, merged), tokens)
    check = Check(
        num_tokens=tokens.shape[1],
        difference=_difference(found, wanted),
        adapter_share=None if without is None else _difference(without, wanted),
        same_top1=float((found.argmax(-1) == wanted.argmax(-1)).float().mean()),
        tolerance=max(TOLERATED_EPSILONS * torch.finfo(dtype).eps, _LEAST_TOLERANCE),
    )
    if not check.passed:
        raise RunFailedError(
            f"the merged model does not compute what base and adapter do: logits differ by "
            f"{check.difference:.1%}, {check.tolerance:.1%} would be rounding",
            f"keep using the adapter in `{request.adapter}`, and report this with the versions in "
            "`environment.json`",
        )
    return check


def _tokens(request: MergeRequest) -> torch.Tensor:
    tokenizer = load_tokenizer(request.adapter)
    (ids,) = tokenizer.ids([general_text().texts[0].text])
    return torch.tensor([[*tokenizer.first_token, *ids][:CHECKED_TOKENS]])


def _loaded(request: MergeRequest, folder: Path) -> Any:
    kind = MODEL_CLASSES[request.objective]
    return kind.auto.from_pretrained(
        str(folder),
        dtype=_COMPUTED_IN,
        use_safetensors=True,
        trust_remote_code=remote_code.trusted(request.base),
        **kind.settings,
    )


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=tokens).logits
    return logits


def _without_adapter(model: Any, tokens: torch.Tensor) -> torch.Tensor | None:
    """The base's logits; None for adapters that changed the base when they began."""
    if isinstance(getattr(model.active_peft_config, "init_lora_weights", None), str):
        return None
    try:
        with model.disable_adapter():
            return _logits(model, tokens)
    except (NotImplementedError, AttributeError, ValueError):  # not every tuner has a switch
        return None


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    spread = (wanted - wanted.mean()) if wanted.shape[-1] > 1 else wanted
    size = spread.pow(2).mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return float((found - wanted).pow(2).mean().sqrt() / size)
