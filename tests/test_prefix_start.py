"""Prefixes begin as real words, so that a model says with them what it said before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from ftplan.launcher.training.adapters import peft_config_of
from ftplan.launcher.training.prefix_start import _words, begin_with_words
from ftplan.planner.methods import resolve_method
from tests.launcher_fixtures import save_tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.fixture
def base(tmp_path: Path) -> Any:
    save_tiny_llama(tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path).eval()


def begun(base: Any, method: str, *options: str) -> tuple[Any, bool]:
    settings: dict[str, Any] = {
        "peft_config": options,
        "modules_to_save": (),
        "lora_rank": 8,
        "objective": "sft",
    }
    model = get_peft_model(base, peft_config_of(resolve_method(method), settings, base))
    return model, begin_with_words(model, TOKENIZER, settings)


@pytest.mark.parametrize("method", ["prefix-tuning", "p-tuning-v2", "cartridge"])
def test_a_prefix_does_at_first_what_its_words_do(base: Any, method: str) -> None:
    words, rest = _words(TOKENIZER, 20), torch.tensor([[5, 9, 7, 11]])
    with torch.no_grad():
        expected = base(input_ids=torch.cat([words, rest], dim=1)).logits[:, 20:]
        model, filled = begun(base, method)
        logits = model(input_ids=rest, attention_mask=torch.ones_like(rest)).logits
    assert filled
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("option", ["prefix_projection=true", "init_weights=zero"])
def test_a_prefix_that_begins_otherwise_is_left_alone(base: Any, option: str) -> None:
    _, filled = begun(base, "prefix-tuning", option)
    assert not filled


def test_other_methods_have_no_prefix_to_fill(base: Any) -> None:
    _, filled = begun(base, "prompt-tuning")
    assert not filled
