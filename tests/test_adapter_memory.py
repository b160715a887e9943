"""The closed form of every method beside the dry run, which carries the step out."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the `train` extra")

from ftplan.launcher.dry_run.step import dry_run
from ftplan.planner.closed_form import MODELLED_METHODS
from ftplan.planner.families import spec_from_config
from ftplan.planner.memory import estimate_memory
from ftplan.planner.methods import METHODS
from ftplan.planner.trained import target_names
from tests.dry_runs import GPT2, LLAMA, cuda_case
from tests.sweeps import swept
from tests.test_dry_run_methods import SMALL

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("on_the_processor")]

WIDE_LLAMA = {**LLAMA, "hidden_size": 256, "intermediate_size": 512}
WIDE_QWEN2 = {**WIDE_LLAMA, "model_type": "qwen2"}
WIDE_GPT2 = {**GPT2, "n_embd": 256, "n_positions": 512}
TOLERANCE = 0.006
OPTIONS = {**SMALL, "adaption-prompt": ("adapter_layers=3",), "boft": ()}
ADAPTERS = sorted(
    name
    for name in MODELLED_METHODS
    if METHODS[name].peft_type and name != "lora"
    if not METHODS[name].quantized_base
    if name not in ("boft", "adaption-prompt", "cartridge")  # see below
)
# Layers that are computed again do what kept ones do. These have more to them: what is random, what
# is worked out anew from the weights, gradients that are seen or sparse, losses of their own, and
# trained vectors, norms and prompts.
CHECKPOINTED = (
    *("dora", "oft", "randlora", "adalora", "osf", "shira", "relora", "lily"),
    *("ia3", "ln-tuning", "prompt-tuning"),
)
ON_NF4 = (
    "loftq",
    "lora-fa",
    "dora",
    "ia3",
    "adalora",
    "oft",
    "vera",
    "c3a",
    "miss",
    "randlora",
    "lily",
    "waveft",
)


def relative_error(config: dict[str, Any], **settings: Any) -> float:
    """Of the estimate's peak; what is resident from the start, which dry runs round up to blocks,
    is taken off."""
    layers = "n_layer" if config["model_type"] == "gpt2" else "num_hidden_layers"
    spec = spec_from_config({**config, layers: 4}, "tiny")
    given = {
        **{"per_device_train_batch_size": 2, "max_length": 256, "lora_rank": 8},
        **{"target_modules": target_names(spec, ("all-linear",)), **settings},
    }
    case = cuda_case(config, 4, **given)
    record = dry_run(case).record
    estimate = estimate_memory(spec, case.plan)
    loaded = record.phase_peaks()["load"].allocated_bytes
    rounded = loaded - estimate.phases[0].allocated_peak_bytes
    return (estimate.allocated_peak_bytes + rounded) / record.peak.allocated_bytes - 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        *((name, False) for name in ADAPTERS),
        *swept(((name, True) for name in ADAPTERS), ((name, True) for name in CHECKPOINTED)),
    ],
)
def test_a_method_takes_what_its_step_takes(name: str, checkpointing: bool) -> None:
    if name == "poly" and checkpointing:
        pytest.skip("PEFT loses the rows' tasks")
    if METHODS[name].fills_cache and checkpointing:
        pytest.skip("checkpointed layers have no cache")
    error = relative_error(
        WIDE_LLAMA,
        method=name,
        peft_config=OPTIONS.get(name, ()),
        gradient_checkpointing=checkpointing,
    )
    assert abs(error) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", swept(ON_NF4, ("loftq", "dora", "ia3", "adalora", "oft", "vera")))
def test_on_a_quantized_base(name: str) -> None:
    options = SMALL.get(name, ())
    error = relative_error(WIDE_LLAMA, method=name, peft_config=options, quantization="nf4")
    assert abs(error) < TOLERANCE


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"peft_config": ("lora_bias=true",)}, id="a bias"),
        pytest.param({"peft_config": ("rank_pattern={q_proj: 16, down_proj: 4}",)}, id="ranks"),
        pytest.param({"peft_config": ("layers_to_transform=[1,3]",)}, id="some layers"),
        pytest.param({"peft_config": ("trainable_token_indices=[3,7]",)}, id="tokens"),
        pytest.param({"modules_to_save": ("lm_head", "embed_tokens")}, id="whole modules"),
        pytest.param({"autocast_adapter_dtype": False}, id="adapters in bf16"),
        pytest.param({"lora_dropout": 0.1}, id="dropout"),
        pytest.param({"method": "dora", "lora_dropout": 0.1}, id="DoRA with dropout"),
        pytest.param(
            {"quantization": "int8", "gradient_checkpointing": True, "use_reentrant": True},
            id="int8 under reentrant checkpointing",
        ),
        pytest.param({"config": WIDE_QWEN2, "peft_config": ("bias=all",)}, id="all biases"),
        pytest.param({"config": WIDE_QWEN2, "method": "bitfit"}, id="biases alone"),
        pytest.param({"method": "bitfit"}, id="biases that are switched on"),
    ],
)
def test_options_of_lora(settings: dict[str, Any]) -> None:
    config = settings.get("config", WIDE_LLAMA)
    rest = {name: value for name, value in settings.items() if name != "config"}
    assert abs(relative_error(config, **rest)) < TOLERANCE


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="a table"),
        pytest.param({"peft_config": ("prefix_projection=true",)}, id="a network"),
        pytest.param({"max_length": 100, "attn_implementation": "eager"}, id="eager attention"),
        pytest.param({"attn_implementation": "flash_attention_2"}, id="FlashAttention"),
        pytest.param({"method": "p-tuning-v2", "quantization": "nf4"}, id="a quantized base"),
        pytest.param({"trainer": "transformers"}, id="another trainer"),
        pytest.param({"config": WIDE_GPT2, "max_length": 100}, id="GPT-2"),
    ],
)
def test_keys_and_values_in_front(settings: dict[str, Any]) -> None:
    given = {"method": "prefix-tuning", **settings}
    config = given.pop("config", WIDE_LLAMA)
    assert abs(relative_error(config, **given)) < 0.002


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"method": "cartridge"}, id="a cache"),
        pytest.param({"method": "adaption-prompt"}, id="prompts in three of four layers"),
        pytest.param(
            {"method": "adaption-prompt", "config": WIDE_GPT2, "gradient_checkpointing": True},
            id="prompts in GPT-2",
        ),
        pytest.param(
            {"method": "osf", "gradient_checkpointing": True}, id="gradients seen in part"
        ),
        pytest.param({"method": "osf", "dtype": "float32"}, id="hooks on gradients"),
        pytest.param({"method": "boft"}, id="permuted blocks"),
        pytest.param(
            {"method": "boft", "config": WIDE_QWEN2, "quantization": "nf4"}, id="biases on nf4"
        ),
    ],
)
def test_methods_with_ways_of_their_own(settings: dict[str, Any]) -> None:
    given = {"peft_config": OPTIONS.get(settings["method"], ()), **settings}
    config = given.pop("config", WIDE_LLAMA)
    assert abs(relative_error(config, **given)) < 0.002


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"method": "full"}, id="full"),
        pytest.param({"method": "full", "dtype": "float32"}, id="full in fp32"),
        pytest.param({"method": "lora", "max_length": 16, "lora_rank": 64}, id="adapters"),
        pytest.param({"method": "full", "config": WIDE_GPT2, "max_length": 64}, id="GPT-2"),
    ],
)
def test_muon(settings: dict[str, Any]) -> None:
    config = settings.get("config", WIDE_LLAMA)
    rest = {name: value for name, value in settings.items() if name != "config"}
    assert abs(relative_error(config, optim="muon", **rest)) < 0.002


@pytest.mark.parametrize("options", ["encoder_num_layers=2", "encoder_hidden_size=128"])
def test_an_lstm_that_makes_a_prompt(options: str) -> None:
    encoder = ("encoder_reparameterization_type=LSTM", options)
    assert abs(relative_error(WIDE_LLAMA, method="p-tuning", peft_config=encoder)) < 0.002


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="kept"),
        pytest.param({"gradient_checkpointing": True}, id="checkpointed"),
        pytest.param({"mixed_precision": "no"}, id="without autocast"),
        pytest.param({"quantization": "nf4"}, id="a quantized base"),
        pytest.param({"config": WIDE_GPT2}, id="GPT-2"),
    ],
)
def test_bottlenecks(settings: dict[str, Any]) -> None:
    given = {"method": "bottleneck", **settings}
    config = given.pop("config", WIDE_LLAMA)
    assert abs(relative_error(config, **given)) < 0.002
