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
from tests.dry_runs import LLAMA, cuda_case
from tests.test_dry_run_methods import SMALL

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("on_the_processor")]

WIDE_LLAMA = {**LLAMA, "hidden_size": 256, "intermediate_size": 512}
WIDE_QWEN2 = {**WIDE_LLAMA, "model_type": "qwen2"}
TOLERANCE = 0.006
ADAPTERS = sorted(
    name
    for name in MODELLED_METHODS
    if METHODS[name].peft_type and METHODS[name].has_trainer and name not in ("lora", "qlora")
)
ON_NF4 = ("dora", "ia3", "adalora", "oft", "vera", "c3a", "miss", "randlora", "lily", "waveft")


def relative_error(config: dict[str, Any], **settings: Any) -> float:
    """Of the estimate's peak; what is resident from the start, which dry runs round up to blocks,
    is taken off."""
    spec = spec_from_config({**config, "num_hidden_layers": 4}, "tiny")
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
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_method_takes_what_its_step_takes(name: str, checkpointing: bool) -> None:
    if name == "poly" and checkpointing:
        pytest.skip("PEFT loses the rows' tasks")
    error = relative_error(
        WIDE_LLAMA,
        method=name,
        peft_config=SMALL.get(name, ()),
        gradient_checkpointing=checkpointing,
    )
    assert abs(error) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_NF4)
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
    ],
)
def test_options_of_lora(settings: dict[str, Any]) -> None:
    config = settings.get("config", WIDE_LLAMA)
    rest = {name: value for name, value in settings.items() if name != "config"}
    assert abs(relative_error(config, **rest)) < TOLERANCE
