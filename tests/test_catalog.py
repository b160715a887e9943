"""The catalogs: every file is read, every number has its source, names are exact."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ftplan import profiles
from ftplan.planner.errors import UnknownNameError
from ftplan.planner.families import FAMILIES, spec_from_config
from ftplan.planner.families.remote import REMOTE
from ftplan.planner.stack import kernel_capability
from tests.meta_models import build

FOLDER = Path(__file__).parents[1] / "profiles"
MODEL_FILES = sorted((FOLDER / "models").glob("*.json"))
GPU_FILES = sorted((FOLDER / "gpus").glob("*.json"))


def stem(path: Path) -> str:
    return path.stem


def read(path: Path) -> dict[str, Any]:
    entry = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(entry, dict)
    return entry


GPUS = {key: entry for path in GPU_FILES for key, entry in read(path).items()}


def test_the_catalogs_hold_every_file() -> None:
    assert set(profiles.model_catalog()) == {path.stem for path in MODEL_FILES}
    assert set(profiles.gpu_catalog()) == set(GPUS)


def test_the_catalogs_can_be_asked_again_and_again() -> None:
    for _ in range(3):
        assert profiles.find_model("gpt2") is not None
        assert profiles.find_gpu("t4").name == "T4"
        assert len(profiles.model_catalog()) == len(MODEL_FILES)
        assert len(profiles.gpu_catalog()) == len(GPUS)


# --- models


@pytest.mark.parametrize("path", MODEL_FILES, ids=stem)
def test_a_model_has_its_exact_count(path: Path) -> None:
    entry = read(path)
    assert spec_from_config(entry["config"], path.stem).num_parameters == entry["num_parameters"]


DEPTH_FIELDS = ("num_hidden_layers", "n_layer", "num_layers")


def cut(config: dict[str, Any], depth: int) -> dict[str, Any]:
    """The same model with fewer layers, in the dtype of the class."""
    shallow = {key: value for key, value in config.items() if key != "torch_dtype"}
    if "text_config" in config:
        return {**shallow, "text_config": cut(config["text_config"], depth)}
    if "attention_types" in config:
        shallow["attention_types"] = [[["global", "local"], depth // 2]]
    return {**shallow, **{field: depth for field in DEPTH_FIELDS if field in config}}


def depth_of_every_kind(config: dict[str, Any]) -> int:
    """Layers until each kind has come up, two at least."""
    layers = spec_from_config(config, "whole").layers
    return max(2, *(layers.index(kind) + 1 for kind in set(layers)))


@pytest.mark.parametrize(
    "path",
    [p for p in MODEL_FILES if read(p)["config"]["model_type"] not in REMOTE],
    ids=stem,
)
def test_a_model_cut_to_its_kinds_of_layers_counts_as_transformers_builds_it(path: Path) -> None:
    """At full width, on the meta device, where nothing is allocated."""
    whole = read(path)["config"]
    config = cut(whole, depth_of_every_kind(whole))
    model, spec = build(config), spec_from_config(config, path.stem)
    assert set(spec.layers) == set(spec_from_config(whole, path.stem).layers)
    assert spec.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert spec.architecture == type(model).__name__


@pytest.mark.parametrize(
    "path", [p for p in MODEL_FILES if read(p)["config"]["model_type"] in REMOTE], ids=stem
)
def test_a_model_of_its_repositorys_own_code_says_so(path: Path) -> None:
    """Its count is the published one, which no library at hand can rebuild."""
    entry = read(path)
    assert spec_from_config(entry["config"], path.stem).code == "remote"
    assert "own code" in entry["source"]


@pytest.mark.parametrize("path", MODEL_FILES, ids=stem)
def test_a_model_is_filed_under_its_name(path: Path) -> None:
    entry = read(path)
    assert entry["name"] == path.stem
    assert entry["hub_id"].casefold().split("/")[1] == path.stem
    assert entry["kind"] in ("base", "chat")
    assert entry["licence"].strip()
    assert entry["source"].strip()


@pytest.mark.parametrize("path", MODEL_FILES, ids=stem)
def test_a_model_is_read_as_its_file_has_it(path: Path) -> None:
    entry, found = read(path), profiles.require_model(path.stem)
    for field in ("name", "hub_id", "licence", "kind", "num_parameters", "config"):
        assert getattr(found, field) == entry[field], field
    assert found.aliases == tuple(entry["aliases"])


# Counts that others publish: the Hub for safetensors files, print-outs of the loaded model.
PUBLISHED = {
    "THUDM/chatglm3-6b": 6_243_584_000,
    "Qwen/Qwen-7B-Chat": 7_721_324_544,
    "Qwen/Qwen-72B-Chat": 72_287_920_128,
    "internlm/internlm2-1_8b": 1_889_110_016,
    "internlm/internlm2_5-7b-chat": 7_737_708_544,
    "internlm/internlm2-20b": 19_861_149_696,
    "google/gemma-3-4b-it": 4_300_079_472,
    "google/gemma-3-27b-it": 27_432_406_640,
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": 24_011_361_280,
    "mistralai/Mixtral-8x22B-Instruct-v0.1": 140_630_071_296,
    "deepseek-ai/DeepSeek-V2-Lite": 15_706_484_224,
    "openai/gpt-oss-20b": 20_914_757_184,
    "openai/gpt-oss-120b": 116_829_156_672,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "allenai/OLMoE-1B-7B-0924": 6_919_161_856,
    "stabilityai/stablelm-2-12b": 12_143_185_920,
    "bigcode/starcoder2-15b": 15_957_889_024,
    "EleutherAI/gpt-neox-20b": 20_554_567_680,
    "bigscience/bloom": 176_247_271_424,
    "facebook/opt-350m": 331_196_416,
    "openai-community/gpt2-xl": 1_557_611_200,
}


@pytest.mark.parametrize("hub_id", sorted(PUBLISHED))
def test_counts_are_the_published_ones(hub_id: str) -> None:
    assert profiles.require_model(hub_id).spec.num_parameters == PUBLISHED[hub_id]


def test_no_two_models_share_a_name() -> None:
    names: Counter[str] = Counter()
    for path in MODEL_FILES:
        entry = read(path)
        assert [a.casefold() for a in entry["aliases"]] == entry["aliases"], path.stem
        names.update({entry["name"], entry["hub_id"].casefold(), *entry["aliases"]})
    assert [name for name, count in names.items() if count > 1] == []


def test_every_family_has_a_model() -> None:
    """The text part of a multimodal model stands for its own family."""
    configs = [read(path)["config"] for path in MODEL_FILES]
    texts = [config["text_config"] for config in configs if "text_config" in config]
    assert {config["model_type"] for config in (*configs, *texts)} == set(FAMILIES)


def test_the_catalog_holds_what_people_train() -> None:
    assert len(MODEL_FILES) >= 100
    for name in (
        "llama3-8b",
        "qwen2.5-7b",
        "r1-distill-qwen-7b",
        "mistral-7b",
        "gemma3-4b",
        "phi-4-mini",
        "gpt-oss-20b",
        "deepseek-v3",
        "santacoder",
        "smollm3",
    ):
        assert profiles.find_model(name) is not None, name


def test_an_alias_without_a_size_means_what_people_mean_by_it() -> None:
    """An alias without a size means the model that people mean by it."""
    for name, hub_id in (
        ("tinyllama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
        ("mistral-nemo", "mistralai/Mistral-Nemo-Base-2407"),
        ("r1", "deepseek-ai/DeepSeek-R1"),
    ):
        assert profiles.require_model(name).hub_id == hub_id


@pytest.mark.parametrize("path", MODEL_FILES, ids=stem)
def test_a_model_is_found_by_each_of_its_names_in_any_case(path: Path) -> None:
    entry = read(path)
    for name in (entry["name"], entry["hub_id"], *entry["aliases"]):
        for spelling in (name, name.upper(), name.title()):
            found = profiles.find_model(spelling)
            assert found is not None and found.name == path.stem, spelling


def test_an_unknown_model_is_none_or_refused_with_the_nearest() -> None:
    assert profiles.find_model("llama-3.1") is None
    assert profiles.find_model("") is None
    with pytest.raises(UnknownNameError, match=r"unknown model `llama-3\.1-9b`") as refused:
        profiles.require_model("llama-3.1-9b")
    assert "`llama-3.1-8b`" in (refused.value.hint or "")
    assert profiles.require_model("gpt2").num_parameters == 124_439_808


# --- GPUs


def names_of(entry: dict[str, Any]) -> list[str]:
    names: list[str] = entry[profiles.DRIVER_NAMES[entry["vendor"]]]
    return names


NOT_FIGURES = ("compute_capability", "architecture")


def figures(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Every number of an entry: mappings with a `value`, and bare numbers (there are none)."""
    if isinstance(value, dict) and "value" in value:
        yield where, value
    elif isinstance(value, dict):
        for key, part in value.items():
            if key not in NOT_FIGURES:
                yield from figures(part, f"{where}.{key}")
    elif isinstance(value, int | float):
        yield where, {"value": value}


def check_figure(where: str, figure: dict[str, Any]) -> None:
    assert set(figure) == {"value", "kind", "source"}, where
    assert figure["kind"] in ("datasheet", "measured", "assumed"), where
    assert figure["source"].strip(), where
    value = figure["value"]
    if where.endswith((".pcie", ".nvlink")):
        generation, number = value
        known = read(FOLDER / "interconnects.json")[where.rsplit(".")[-1]]["bytes_per_second"]
        assert generation in known and number > 0, where
    elif where.endswith(".pci_ids"):
        assert all(re.fullmatch("[0-9a-f]{4}(:[0-9a-f]{2})?", pci_id) for pci_id in value), where
    else:
        assert value > 0, where


@pytest.mark.parametrize("key", GPUS)
def test_every_figure_of_a_gpu_has_kind_and_source(key: str) -> None:
    found = dict(figures(GPUS[key], key))
    assert {f"{key}.memory_bytes", f"{key}.memory_bandwidth_bytes_per_second"} <= set(found)
    for where, figure in found.items():
        check_figure(where, figure)


@pytest.mark.parametrize("name", ["interconnects", "matmul_rates"])
def test_every_other_figure_has_kind_and_source(name: str) -> None:
    for where, figure in figures(read(FOLDER / f"{name}.json"), name):
        check_figure(where, figure)


def test_measured_products_are_of_catalogued_gpus_and_near_their_peaks() -> None:
    """Data sheets of GeForce cards count a lower clock than they run at; what a card imitates, bf16
    before Ampere, has no peak of its own."""
    for key, rates in read(FOLDER / "matmul_rates.json").items():
        peaks = GPUS[key]["peak_flops_per_second"]
        for dtype, figure in rates.items():
            peak = peaks.get(dtype, peaks["float32"])["value"]
            assert 0.1 < figure["value"] / peak < 1.25, (key, dtype)


def test_the_catalog_holds_the_gpus_that_people_train_on() -> None:
    assert len(GPUS) >= 100
    for name in (
        *("GTX 1080 Ti", "RTX 2080 Ti", "RTX 3060", "RTX 4060 Ti 16GB", "RTX 5090"),
        *(
            "RTX A2000 12GB",
            "RTX 6000 Ada",
            "RTX PRO 6000",
            "T4",
            "p100-16gb",
            "V100 16GB",
            "A10",
            "A16",
        ),
        *("A30", "A40", "A100 40GB PCIe", "A100 80GB SXM", "L4", "L40", "L40S", "H20", "H100 PCIe"),
        *("H100 SXM", "H100 NVL", "H200", "GH200", "B100", "B200", "GB200"),
        *("MI210", "MI250X", "MI300X", "MI355X", "RX 7900 XTX", "M1", "M2 Pro", "M3 Max", "M4"),
    ):
        assert profiles.find_gpu(name), name


@pytest.mark.parametrize("key", GPUS)
def test_a_vendors_gpu_has_what_its_driver_calls_it(key: str) -> None:
    entry = GPUS[key]
    vendor = entry["vendor"]
    assert [name for name in profiles.DRIVER_NAMES.values() if name in entry] == [
        profiles.DRIVER_NAMES[vendor]
    ]
    assert ("compute_capability" in entry) == (vendor == "nvidia")
    assert ("architecture" in entry) == (vendor == "amd")
    assert not {"nvlink", "infinity_fabric_bytes_per_second"} <= set(entry)


@pytest.mark.parametrize("key", GPUS)
def test_a_gpu_lists_what_it_computes(key: str) -> None:
    """NVIDIA's tensor cores have bf16 and TF32 since Ampere, fp8 since Ada."""
    entry = GPUS[key]
    rates = set(entry["peak_flops_per_second"])
    assert {"float32", "float16"} <= rates
    if entry["vendor"] == "nvidia":
        capability = tuple(entry["compute_capability"])
        assert ("bfloat16" in rates) == ("tensorfloat32" in rates) == (capability >= (8, 0))
        assert ("float8" in rates) == (capability >= (8, 9))


def test_links_are_a_generation_s_rate_times_their_number() -> None:
    """One direction: an A100's NVLink 300 GB/s, an RTX 3090's 56.25, an L4's PCIe 4.0 x16 31.5, of
    which 0.8 and 0.6 are reached."""
    for name, gigabytes in (
        ("A100 80GB SXM", 0.8 * 300),
        ("RTX 3090", 0.8 * 56.25),
        ("L4", 0.6 * 31.5),
    ):
        link = profiles.find_gpu(name).link_bytes_per_second
        assert link == pytest.approx(gigabytes * 1e9, rel=0.001), name


def test_a_rate_is_a_generations_times_its_number() -> None:
    assert profiles.link_bytes_per_second("pcie", "3", 4) == pytest.approx(3.938e9, rel=0.001)
    assert profiles.link_bytes_per_second("nvlink", "4", 18) == 450e9
    with pytest.raises(KeyError):
        profiles.link_bytes_per_second("pcie", "9", 16)


def test_amds_cards_are_found_by_their_pci_ids() -> None:
    """Each has some, and no two share one: an id without a revision stands for all of them."""
    ids = [(pci_id, e) for e in profiles.gpu_catalog().values() for pci_id in e.pci_ids]
    assert {entry.key for _, entry in ids} == {k for k, e in GPUS.items() if e["vendor"] == "amd"}
    assert len({pci_id for pci_id, _ in ids}) == len(ids)
    whole = {pci_id for pci_id, _ in ids if ":" not in pci_id}
    assert not whole & {pci_id.split(":")[0] for pci_id, _ in ids if ":" in pci_id}
    for pci_id, entry in ids:
        device, _, revision = pci_id.partition(":")
        assert profiles.find_gpu_by_pci_id(device, revision or "00") is entry
    assert profiles.find_gpu_by_pci_id("744c", "00") is None


# --- prices


def test_prices_are_of_catalogued_gpus_and_dated() -> None:
    assert len(profiles.prices()) >= 40
    for price in profiles.prices():
        assert price.gpu in GPUS
        assert 0.01 < price.usd_per_gpu_hour < 30 and price.num_gpus >= 1
        assert price.billing in ("on-demand", "spot")
        assert re.fullmatch(r"20\d\d(-\d\d(-\d\d)?)?", price.date), price
        assert price.provider and price.region and price.source.strip()


# --- names of GPUs


@pytest.mark.parametrize("key", GPUS)
def test_a_gpu_is_found_by_each_of_its_names_in_any_case(key: str) -> None:
    entry = GPUS[key]
    for name in (key, entry["name"], *entry["aliases"], *names_of(entry)):
        for spelling in (name, name.upper(), name.lower(), name.replace(" ", "-")):
            assert profiles.find_gpu(spelling).key == key, spelling
    for name in names_of(entry):
        found = profiles.find_gpu_by_driver_name(name)
        assert found is not None and found.key == key


def test_no_two_gpus_share_a_name() -> None:
    """As they are looked up: case, blanks and dashes do not tell names apart."""
    names: Counter[str] = Counter()
    for key, entry in GPUS.items():
        spellings = (key, entry["name"], *entry["aliases"], *names_of(entry))
        names.update({s.casefold().replace(" ", "-").removeprefix("nvidia-") for s in spellings})
    assert [name for name, count in names.items() if count > 1] == []


def test_l4_l40_and_l40s_are_told_apart() -> None:
    assert profiles.find_gpu("L4").name == "L4"
    assert profiles.find_gpu("L40").name == "L40"
    assert profiles.find_gpu("NVIDIA L40S").name == "L40S"
    for nvml_name, key in (("NVIDIA L4", "l4"), ("NVIDIA L40", "l40"), ("NVIDIA L40S", "l40s")):
        found = profiles.find_gpu_by_driver_name(nvml_name)
        assert found is not None and found.key == key
    memory = [profiles.find_gpu(name).memory_bytes for name in ("l4", "l40")]
    assert memory[0] < memory[1]


@pytest.mark.parametrize(
    "spelling",
    [
        "rtx 4090",
        "RTX 4090",
        "rtx-4090",
        "rtx_4090",
        "RTX4090",
        "GeForce RTX 4090",
        "NVIDIA GeForce RTX 4090",
        "nvidia rtx 4090",
        "4090",
    ],
)
def test_the_rtx_4090_however_it_is_spelled(spelling: str) -> None:
    assert profiles.find_gpu(spelling).name == "RTX 4090"


@pytest.mark.parametrize("name", ["RTX", "40", "L", "A100", "NVIDIA", "RTX 4090 Ti", ""])
def test_a_part_of_a_name_is_no_name(name: str) -> None:
    with pytest.raises(UnknownNameError, match="unknown GPU"):
        profiles.find_gpu(name)


def test_an_unknown_gpu_is_told_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as refused:
        profiles.find_gpu("rtx 4091")
    assert "`rtx-4090`" in (refused.value.hint or "")
    assert profiles.find_gpu_by_driver_name("NVIDIA GeForce RTX 4091") is None
    assert profiles.find_gpu_by_driver_name("nvidia l4") is None  # the driver's spelling, exactly


def test_a_catalogued_gpu_becomes_an_idle_device() -> None:
    device = profiles.find_gpu("t4").device()
    assert device.kind == "cuda"
    assert device.free_bytes == device.total_bytes == 15360 * 1024**2
    assert not device.supports_bfloat16
    assert device.supports_quantization("nf4") and device.supports_quantization("int8")


def test_other_vendors_cards_compute_what_their_libraries_can() -> None:
    amd, apple = profiles.find_gpu("mi300x").device(), profiles.find_gpu("m2-max").device()
    assert amd.supports_bfloat16 and amd.supports_quantization("nf4")
    assert amd.compute_capability is None and amd.kind == "cuda"
    assert apple.supports_bfloat16 and not apple.supports_quantization("nf4")


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        *(("p40", (7, 0)), ("v100-16gb", (7, 0)), ("t4", (7, 0))),
        *(("a100-80gb-sxm", (8, 0)), ("rtx-4090", (8, 0)), ("mi300x", (8, 0))),
        *(("h100-sxm", (9, 0)), ("rtx-5090", (9, 0))),
    ],
)
def test_cards_with_the_same_kernels_share_a_capability(
    name: str, capability: tuple[int, int]
) -> None:
    """bf16 and FlashAttention come with 8.0, cuBLAS's larger workspace with 9.0."""
    assert kernel_capability(profiles.find_gpu(name).device()) == capability
