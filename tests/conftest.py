"""Shapes, devices and data sets that several test files share."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import pytest
from hypothesis import settings

from ftplan.planner.data_profile import DataProfile
from ftplan.planner.families import spec_from_config
from ftplan.planner.hardware_spec import Device
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.units import GIB
from tests.quick import libraries_left_alone, little_asked, measured_once

# Workers of pytest-xdist have the width of the terminal that pytest was started in.
os.environ.pop("COLUMNS", None)

# Workers and the processes that they start share the cores; threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Shells have what they start in the background ignore Ctrl-C, and so would what tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples on every machine, however slow it is at the moment.
settings.register_profile("ftplan", deadline=None, derandomize=True)
settings.load_profile("ftplan")

_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    # The classes' own ids lie outside so small a vocabulary.
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_TOKEN_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_GPT2_SHAPE = {
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 128,
    **_TOKEN_IDS,
}
# What families without groups of heads have, under the usual names.
_PLAIN_SHAPE = {name: size for name, size in _SHAPE.items() if name != "num_key_value_heads"}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT_EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 48,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_VISION_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}

TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "baichuan": _PLAIN_SHAPE,
    "bloom": {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 128, **_TOKEN_IDS},
    "chatglm": {
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_layers": 3,
        "num_attention_heads": 4,
        "kv_channels": 16,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "add_qkv_bias": True,
        "padded_vocab_size": 128,
        "seq_length": 64,
    },
    "cohere": _SHAPE,
    "deepseek_v2": {**_SHAPE, **_LATENT_EXPERTS},
    "deepseek_v3": {**_SHAPE, **_LATENT_EXPERTS},
    "falcon": {**_PLAIN_SHAPE, "ffn_hidden_size": 96},
    "gemma": {**_SHAPE, "head_dim": 24},
    "gemma2": {**_SHAPE, "head_dim": 24},
    "gemma3": {
        "text_config": {**_SHAPE, "model_type": "gemma3_text", "sliding_window_pattern": 2},
        "vision_config": {
            **_VISION_SHAPE,
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
        },
        "mm_tokens_per_image": 4,
    },
    "gemma3_text": {**_SHAPE, "head_dim": 24, "sliding_window_pattern": 2},
    "glm": {**_SHAPE, "head_dim": 16},
    "glm4": {**_SHAPE, "head_dim": 16},
    "gpt2": _GPT2_SHAPE,
    "gpt_bigcode": _GPT2_SHAPE,
    "gpt_neo": {
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 64,
        "vocab_size": 128,
        **_TOKEN_IDS,
    },
    "gpt_neox": _PLAIN_SHAPE,
    "gpt_oss": {**_SHAPE, **_LOCAL_EXPERTS, "head_dim": 16},
    "gptj": {**_GPT2_SHAPE, "rotary_dim": 8},
    "granite": _SHAPE,
    "granitemoe": {**_SHAPE, **_LOCAL_EXPERTS},
    "internlm2": _SHAPE,
    "llama": _SHAPE,
    "llama4": {
        "text_config": {**_SHAPE, "model_type": "llama4_text", "head_dim": 16},
        "vision_config": {"model_type": "llama4_vision_model"},
    },
    "llama4_text": {
        **_SHAPE,
        **_LOCAL_EXPERTS,
        "head_dim": 16,
        "intermediate_size_mlp": 160,
        "interleave_moe_layer_step": 2,
        "no_rope_layer_interval": 3,
    },
    "mistral": _SHAPE,
    "mistral3": {
        "text_config": {**_SHAPE, "model_type": "mistral"},
        "vision_config": {**_VISION_SHAPE, "model_type": "pixtral"},
    },
    "mixtral": {**_SHAPE, **_LOCAL_EXPERTS},
    "olmo": _SHAPE,
    "olmo2": _SHAPE,
    "olmoe": {**_SHAPE, "num_experts": 4, "num_experts_per_tok": 2},
    "opt": {**_PLAIN_SHAPE, "ffn_dim": 96},
    "phi": _SHAPE,
    "phi3": _SHAPE,
    "phimoe": {**_SHAPE, **_LOCAL_EXPERTS},
    "qwen": {**_PLAIN_SHAPE, "kv_channels": 16},
    "qwen2": _SHAPE,
    "qwen2_moe": {**_SHAPE, **_EXPERTS, "shared_expert_intermediate_size": 80},
    "qwen3": {**_SHAPE, "head_dim": 32},
    "qwen3_moe": {**_SHAPE, **_EXPERTS, "head_dim": 32},
    "smollm3": {**_SHAPE, "no_rope_layer_interval": 2},
    "stablelm": _SHAPE,
    "starcoder2": _SHAPE,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole-matrix",
        action="store_true",
        help="every cell of the sweeps, not only one of each mechanism",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--whole-matrix"):
        return
    left_out = [item for item in items if item.get_closest_marker("whole_matrix")]
    items[:] = [item for item in items if not item.get_closest_marker("whole_matrix")]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session", autouse=True)
def data_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs of tests are no part of the user's history, and what it taught is not used in them."""
    with mock.patch.dict(os.environ, XDG_DATA_HOME=str(tmp_path_factory.mktemp("data-home"))):
        yield


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., dict[str, Any]]:
    """`tiny_config("qwen2", vocab_size=256)`: a config.json of a very small model."""

    def make(family: str, **changes: Any) -> dict[str, Any]:
        return {"model_type": family, **TINY_CONFIGS[family], **changes}

    return make


@pytest.fixture(scope="session")
def tiny_spec(tiny_config: Callable[..., dict[str, Any]]) -> Callable[..., ModelSpec]:
    def make(family: str, **changes: Any) -> ModelSpec:
        return spec_from_config(tiny_config(family, **changes), f"tiny-{family}")

    return make


@pytest.fixture(scope="session")
def llama_2_7b() -> ModelSpec:
    """32 layers of width 4096, feed-forward 11008, vocabulary 32000: 6,738,415,616 parameters."""
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    }
    return spec_from_config(config, "llama-2-7b")


@pytest.fixture(scope="session")
def small_llama() -> ModelSpec:
    """The shape of SmolLM2-135M: 134,515,008 parameters, tied embeddings."""
    config = {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    return spec_from_config(config, "small-llama")


def _device(
    name: str,
    gib: float,
    bandwidth: float,
    flops: dict[str, float],
    capability: tuple[int, int] | None,
) -> Device:
    return Device(
        name=name,
        kind="cuda" if capability else "cpu",
        total_bytes=round(gib * GIB),
        free_bytes=round(gib * GIB),
        memory_bandwidth_bytes_per_second=bandwidth,
        peak_flops_per_second=flops,
        compute_capability=capability,
    )


@pytest.fixture(scope="session")
def devices() -> dict[str, Device]:
    """Synthetic devices with round numbers near the real cards'."""
    ampere = {"float32": 20e12, "float16": 300e12, "bfloat16": 300e12}
    ada = {"float32": 80e12, "float16": 160e12, "bfloat16": 160e12}
    return {
        "T4": _device("T4", 16, 320e9, {"float32": 8e12, "float16": 65e12}, (7, 5)),
        "RTX 4090": _device("RTX 4090", 24, 1e12, ada, (8, 9)),
        "A100": _device("A100", 80, 2e12, ampere, (8, 0)),
        "CPU": _device("CPU", 32, 20e9, {"float32": 200e9}, None),
    }


@pytest.fixture(scope="session")
def make_data() -> Callable[[Iterable[int]], DataProfile]:
    """`make_data([12, 70, 31])`: a profile of rows with these lengths in tokens."""

    def make(lengths: Iterable[int]) -> DataProfile:
        ordered = tuple(sorted(lengths, reverse=True))
        return DataProfile(
            path="rows.jsonl",
            sha256="0" * 64,
            format="alpaca",
            objective="sft",
            num_rows=len(ordered),
            num_usable_rows=len(ordered),
            num_eval_rows=0,
            lengths=ordered,
            exact=True,
        )

    return make


@pytest.fixture(scope="session")
def few_short_rows(make_data: Callable[[Iterable[int]], DataProfile]) -> DataProfile:
    """480 rows of 50 to 449 tokens."""
    return make_data(50 + 37 * i % 400 for i in range(480))


@pytest.fixture(scope="module", autouse=True)
def quick_runs() -> Iterator[None]:
    with little_asked(), libraries_left_alone():
        yield


@pytest.fixture(scope="module", autouse=True)
def quick_plans(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.module.__name__.endswith("test_probe"):  # which is about measuring
        yield
        return
    with measured_once():
        yield


@pytest.fixture(scope="module")
def on_the_processor() -> Iterator[None]:
    """As in the dry run's own process: no GPU is seen."""
    import torch  # only what needs it loads it

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for tensors so small more only wait for each other
    with mock.patch("torch.cuda.is_available", lambda: False):
        yield
    torch.set_num_threads(threads)
