"""Every method of PEFT: dry run against real steps, and few layers against all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

pytest.importorskip("trl", reason="needs the `train` extra")

from ftplan.launcher.dry_run.step import dry_run
from ftplan.launcher.emit import method_settings
from ftplan.launcher.training.adapters import peft_config_of, settle_adapters
from ftplan.launcher.training.build import count_trainable, meta_model
from ftplan.launcher.training.cycles.adalora import ImportanceAlone
from ftplan.launcher.training.importance import is_adalora
from ftplan.planner.errors import InputError
from ftplan.planner.methods import METHODS, resolve_method
from tests.dry_runs import (
    GPT2,
    LLAMA,
    PHASES,
    assert_equal_records,
    case,
    cuda_case,
    measured_peaks,
    real_trainer,
)
from tests.sweeps import swept

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("on_the_processor")]

# PEFT's own sizes are for models whose sides are in the thousands.
SMALL = {
    "adaption-prompt": ("adapter_layers=6",),
    "boft": ("boft_n_butterfly_factor=2",),
    "c3a": ("block_size=32",),
    "fourierft": ("n_frequency=50",),
    "pvera": ("r=16",),
    "road": ("group_size=16",),
    "vblora": ("vector_length=32",),
    "vera": ("r=16",),
    "waveft": ("n_frequency=64",),
}
MISTRAL = {**LLAMA, "model_type": "mistral"}
DEEP_LLAMA = {**LLAMA, "num_hidden_layers": 6}
PEFT_METHODS = [
    name for name, method in METHODS.items() if method.peft_type and not method.quantized_base
]
ADAPTERS: dict[str, Any] = {
    **{"lora_rank": 4, "lora_alpha": 8},
    "target_modules": ("q_proj", "down_proj"),
}


def compare(dry_case: Any, folder: Path) -> int:
    """Assert that each phase's peak is the real one within 1 %; how many layers were traced."""
    trainer = real_trainer(dry_case, folder)
    settle_adapters(trainer.model, method_settings(dry_case.plan))
    if is_adalora(trainer.model):
        trainer.add_callback(ImportanceAlone())
    measured = measured_peaks(trainer)
    done = dry_run(dry_case)
    assert done.num_trainable_parameters == count_trainable(trainer.model)
    peaks = done.record.phase_peaks()
    for phase in PHASES:
        assert peaks[phase].allocated_bytes == pytest.approx(measured[phase], rel=0.01), phase
    return done.num_layers_traced


# Beside them there are LoRA's relatives, which do with matrices what these do; `test_matrix` has
# all methods beside real steps.
UNLIKE = (
    *("dora", "adalora", "loha", "lokr", "oft", "psoft", "boft", "hra", "road", "c3a", "vera"),
    *("randlora", "vblora", "waveft", "shira", "gralora", "glora", "lily", "poly", "osf"),
    *("lora-drop", "ia3", "ln-tuning", "prompt-tuning", "prefix-tuning", "cartridge"),
    *("adaption-prompt", "multitask-prompt-tuning", "shadow", "trainable-tokens"),
)


@pytest.mark.parametrize("name", swept((name for name in PEFT_METHODS if name != "lora"), UNLIKE))
def test_a_method_takes_what_it_takes_for_real(name: str, tmp_path: Path) -> None:
    """On six layers, of which the dry run traces four where the method allows it."""
    options = SMALL.get(name, ())
    traced = compare(case(DEEP_LLAMA, method=name, peft_config=options, **ADAPTERS), tmp_path)
    assert traced in (4, 6)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"modules_to_save": ("lm_head", "embed_tokens")}, id="modules to save"),
        pytest.param({"peft_config": ("trainable_token_indices=[3,7,11]",)}, id="tokens"),
        pytest.param({"peft_config": ("bias=all",), "config": GPT2}, id="biases beside adapters"),
        pytest.param({"dtype": "bfloat16", "autocast_adapter_dtype": False}, id="adapters in bf16"),
        pytest.param({"dtype": "bfloat16"}, id="adapters in fp32 on a bf16 base"),
        pytest.param(
            {"method": "dora", "quantization": "nf4", "dtype": "bfloat16"}, id="DoRA on nf4"
        ),
        pytest.param({"method": "oft", "quantization": "nf4"}, id="OFT on nf4"),
        pytest.param({"method": "bitfit", "config": GPT2}, id="biases alone"),
        pytest.param({"method": "bitfit"}, id="biases that are switched on"),
        pytest.param(
            {"method": "freeze", "trainable_modules": ("q_proj", "lm_head")}, id="named modules"
        ),
    ],
)
def test_what_is_trained_beside_adapters(settings: dict[str, Any], tmp_path: Path) -> None:
    if settings.get("config") is GPT2:
        settings = {**settings, "target_modules": ("c_attn", "c_proj", "c_fc")}
    compare(case(**settings), tmp_path)


@pytest.mark.parametrize(
    "name",
    swept(
        ["dora", "adalora", "ia3", "oft", "vera", "hra", "prompt-tuning"],
        ["dora", "adalora", "oft", "prompt-tuning"],
    ),
)
def test_few_layers_stand_for_all_on_a_gpu(name: str) -> None:
    dry_case = cuda_case(LLAMA, method=name, peft_config=SMALL.get(name, ()))
    every = dry_run(structs.replace(dry_case, few_layers=False))
    assert_equal_records(dry_run(dry_case).record, every.record)


def test_a_layer_is_computed_again_under_the_autocast_of_its_forward() -> None:
    """PEFT asks for CUDA's. DoRA's dtypes follow from it, and torch refuses unlike ones."""
    settings = {"dtype": "bfloat16", "mixed_precision": "bf16", "gradient_checkpointing": True}
    done = dry_run(cuda_case(LLAMA, method="dora", quantization="nf4", **settings))
    assert done.num_layers_traced == 4


# --- what cannot be ------------------------------------------------------------------------------


def built(**settings: Any) -> Any:
    plan = case(**settings).plan
    model = meta_model(LLAMA, method_settings(plan))
    return peft_config_of(resolve_method(plan.method), method_settings(plan), model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_config": ("use_dorra=true",)}, "unknown option of LoraConfig `use_dorra`"),
        ({"peft_config": ("bias=[",)}, "cannot be read"),
        ({"method": "hra", "peft_config": ("r=[1",)}, "cannot be read"),
    ],
)
def test_options_that_peft_does_not_have(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        built(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "c3a"}, "PEFT refuses method `c3a` here: The block size should be a factor"),
        ({"method": "hra", "target_modules": ("norm",)}, "PEFT refuses method `hra` here"),
        ({"method": "bitfit", "config": MISTRAL}, "neither has nor can have any"),
    ],
)
def test_what_peft_refuses_is_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dry_run(case(**settings))


def test_options_reach_peft_as_they_are_written() -> None:
    options = ("use_rslora=true", "layers_to_transform=[0, 1]", "bias=none")
    config = built(target_modules=("q_proj",), peft_config=options)
    assert config.use_rslora is True
    assert config.layers_to_transform == [0, 1]
    assert (config.r, config.lora_alpha) == (16, 32)


def test_llama_adapter_computes_the_loss_that_trl_puts_into_the_model() -> None:
    """Its model has the forward of before, which knows no log-probabilities."""
    options = {"peft_config": ("adapter_layers=2",), "loss": "trl-fused"}
    done = dry_run(case(method="adaption-prompt", **options))
    assert done.num_trainable_parameters
