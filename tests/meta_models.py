"""Models as transformers builds them on the meta device, where nothing is allocated."""

from __future__ import annotations

from typing import Any

import pytest


def build(config: dict[str, Any]) -> Any:
    """The model that transformers builds for training on text from a config.json."""
    torch = pytest.importorskip("torch", reason="counts come from torch modules")
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    made = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        if config["model_type"] == "mistral3":  # AutoModelForCausalLM does not list it
            return transformers.Mistral3ForConditionalGeneration(made)
        return transformers.AutoModelForCausalLM.from_config(made)


def transformers_count(config: dict[str, Any]) -> int:
    """Parameters of that model, tied ones once."""
    return sum(parameter.numel() for parameter in build(config).parameters())
