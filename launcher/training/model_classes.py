"""Which of transformers' classes an objective trains: one for each entry of
`planner.objectives.OBJECTIVES`. Needs no TRL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)

from ftplan.planner.errors import InputError


class ModelClass(Struct, frozen=True, kw_only=True):
    """`settings`: of the model's configuration. `task_type`: PEFT's; for `SEQ_CLS` it trains the
    head whole."""

    auto: Any = AutoModelForCausalLM
    settings: Mapping[str, Any] = {}
    task_type: str = "CAUSAL_LM"


_CAUSAL = ModelClass()

MODEL_CLASSES: dict[str, ModelClass] = {
    "sft": _CAUSAL,
    "dpo": _CAUSAL,
    "orpo": _CAUSAL,
    "simpo": _CAUSAL,
    "kto": _CAUSAL,
    "reward": ModelClass(
        auto=AutoModelForSequenceClassification,
        settings={"num_labels": 1},
        task_type="SEQ_CLS",
    ),
    "grpo": _CAUSAL,
    "rloo": _CAUSAL,
}


def check_model_class(objective: str, config: PretrainedConfig) -> None:
    """Raises InputError where transformers has no model for the objective."""
    model = MODEL_CLASSES[objective].auto
    if model is AutoModelForSequenceClassification and type(config) not in model._model_mapping:
        raise InputError(
            f"transformers has no sequence classification model for `{config.model_type}`, "
            f"which `--objective {objective}` trains",
            "take a model of another family, such as Llama or Qwen",
        )
