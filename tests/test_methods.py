"""What each method trains: counts derived again, and compared with PEFT and transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.families import FAMILIES
from ftplan.planner.methods import METHODS, resolve_method
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.trained import MethodSettings, Trained, target_names, targeted_linears

MakeConfig = Callable[..., dict[str, Any]]
MakeSpec = Callable[..., ModelSpec]

# (family, modules) with PEFT's names; None is all-linear.
TARGETS = [
    ("gemma2", ("o_proj", "up_proj")),
    ("gpt2", ("c_attn", "c_proj")),  # c_proj is in attention and in the feed-forward
    ("llama", ("q_proj", "v_proj")),
    ("llama", ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    ("mistral", ("down_proj",)),
    ("mixtral", ("q_proj", "k_proj", "v_proj", "o_proj")),
    ("phi", ("dense", "fc1", "fc2")),
    ("phi3", ("qkv_proj", "gate_up_proj")),
    ("qwen2", ("k_proj", "gate_proj")),
    ("qwen3", ("q_proj", "v_proj")),
    ("qwen3_moe", ("q_proj", "o_proj")),
]


def count(method: str, model: ModelSpec, **settings: Any) -> Trained:
    return METHODS[method].count(model, MethodSettings(**settings))


def built(config: dict[str, Any]) -> Any:
    """The model that transformers builds from `config`, on the meta device."""
    torch = pytest.importorskip("torch", reason="counts come from torch modules")
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config)
        )


def peft_count(config: dict[str, Any], target_modules: str | list[str], rank: int) -> int:
    """Trainable parameters of PEFT's LoRA model."""
    peft = pytest.importorskip("peft", reason="the reference is PEFT")
    settings = peft.LoraConfig(r=rank, target_modules=target_modules, task_type="CAUSAL_LM")
    model = peft.get_peft_model(built(config), settings)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# --- LoRA


@given(rank=st.integers(1, 512), layers=st.integers(1, 80))
def test_lora_adds_rank_times_both_sides_of_each_matrix(
    rank: int, layers: int, tiny_spec: MakeSpec
) -> None:
    """Llama of width 64: q 64x64, k and v 64x32, o 64x64, gate and up 64x96, down 96x64."""
    model = tiny_spec("llama", num_hidden_layers=layers)
    sides = (64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 96)
    assert count("lora", model, lora_rank=rank).added_parameters == layers * rank * sides
    some = count("lora", model, lora_rank=rank, target_modules=("q_proj", "v_proj"))
    assert some.added_parameters == layers * rank * (128 + 96)


def test_lora_of_rank_16_on_llama_2_7b(llama_2_7b: ModelSpec) -> None:
    """39,976,960 trainable parameters, the figure that PEFT prints for all seven modules."""
    trained = count("lora", llama_2_7b, lora_rank=16)
    assert trained.num_trainable_parameters == 39_976_960
    assert trained.base_parameters == 0
    attention_only = count("lora", llama_2_7b, lora_rank=8, target_modules=("q_proj", "v_proj"))
    assert attention_only.num_trainable_parameters == 4_194_304


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_all_linear_counts_as_peft_does(
    family: str, tiny_config: MakeConfig, tiny_spec: MakeSpec
) -> None:
    """With the names that training is given; PEFT's own `all-linear` is the same but for
    mixtures, where it adapts routers and stacked experts as well."""
    model = tiny_spec(family)
    mine = count("lora", model, lora_rank=4).num_trainable_parameters
    assert mine == peft_count(tiny_config(family), list(target_names(model, ["all-linear"])), 4)
    if not model.feed_forward.is_mixture:
        assert mine == peft_count(tiny_config(family), "all-linear", 4)


def test_target_names_spell_all_linear_out_each_name_once(tiny_spec: MakeSpec) -> None:
    assert target_names(tiny_spec("gpt2"), ("all-linear",)) == ("c_attn", "c_proj", "c_fc")
    attention_only = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert target_names(tiny_spec("mixtral"), ("all-linear",)) == attention_only
    assert target_names(tiny_spec("llama"), ("v_proj", "q_proj")) == ("q_proj", "v_proj")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "modules"), TARGETS)
def test_named_modules_count_as_peft_does(
    family: str, modules: tuple[str, ...], tiny_config: MakeConfig, tiny_spec: MakeSpec
) -> None:
    mine = count("lora", tiny_spec(family), lora_rank=8, target_modules=modules)
    assert mine.num_trainable_parameters == peft_count(tiny_config(family), list(modules), 8)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_linear_modules_have_the_names_and_shapes_of_transformers(
    family: str, tiny_config: MakeConfig, tiny_spec: MakeSpec
) -> None:
    """Router and stacked experts aside, which are no linear modules."""
    layers = built(tiny_config(family)).get_decoder()
    first = (layers.h if family == "gpt2" else layers.layers)[0]
    theirs = []
    for name, module in first.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D"):
            width = sorted(module.weight.shape)
            theirs.append((name.rpartition(".")[2], width, module.bias is not None))
    mine = [
        (m.name, sorted((m.in_features, m.out_features)), m.bias)
        for m in tiny_spec(family).layer_linears
    ]
    assert sorted(mine) == sorted(theirs)


def test_qlora_trains_what_lora_trains(tiny_spec: MakeSpec) -> None:
    model = tiny_spec("qwen2")
    assert count("qlora", model, lora_rank=32) == count("lora", model, lora_rank=32)


def test_an_unknown_target_module_is_told_the_nearest(tiny_spec: MakeSpec) -> None:
    with pytest.raises(UnknownNameError, match="target module `qproj`") as refused:
        count("lora", tiny_spec("llama"), target_modules=("qproj",))
    assert "`q_proj`" in (refused.value.hint or "")


def test_all_linear_beside_a_name_is_not_called_unknown(tiny_spec: MakeSpec) -> None:
    """It is a known word; what cannot be is the mixture."""
    try:
        modules = targeted_linears(tiny_spec("llama"), ("all-linear", "q_proj"))
    except InputError as refused:
        assert not isinstance(refused, UnknownNameError)
    else:
        assert modules == tiny_spec("llama").layer_linears


def test_lora_without_a_target_is_refused(tiny_spec: MakeSpec) -> None:
    with pytest.raises(InputError):
        count("lora", tiny_spec("llama"), target_modules=())


def test_a_rank_below_one_is_refused(tiny_spec: MakeSpec) -> None:
    with pytest.raises(InputError, match="--lora-rank 0"):
        count("lora", tiny_spec("llama"), lora_rank=0)


# --- freeze and full


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_freeze_trains_the_real_parameters_of_the_last_layers(
    family: str, layers: int, tiny_config: MakeConfig, tiny_spec: MakeSpec
) -> None:
    decoder = built(tiny_config(family)).get_decoder()
    last = (decoder.h if family == "gpt2" else decoder.layers)[-layers:]
    trained = count("freeze", tiny_spec(family), num_trainable_layers=layers)
    assert trained.base_parameters == sum(p.numel() for p in last.parameters())
    assert trained.trained_layers == layers
    assert not trained.trains_embeddings and not trained.trains_lm_head


@pytest.mark.parametrize("layers", [0, -1, 4])
def test_freeze_is_refused_outside_the_models_layers(layers: int, tiny_spec: MakeSpec) -> None:
    with pytest.raises(InputError, match="1 to 3 layers"):
        count("freeze", tiny_spec("llama"), num_trainable_layers=layers)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_full_trains_every_parameter(family: str, tiny_spec: MakeSpec) -> None:
    model = tiny_spec(family)
    trained = count("full", model)
    assert trained.num_trainable_parameters == model.num_parameters
    assert trained.trained_layers == model.num_hidden_layers
    assert trained.added_parameters == 0


# --- the list


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_is_found_in_any_case_and_has_a_source(name: str) -> None:
    method = resolve_method(name.upper())
    assert method.name == name
    assert method.source and method.title and method.trains


def test_an_unknown_method_is_told_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="unknown method `lorra`") as refused:
        resolve_method("lorra")
    assert "`lora`" in (refused.value.hint or "")
