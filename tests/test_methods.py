"""What each method trains and adds: counted again, and compared with what PEFT really builds."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from ftplan.planner.adapter_counts import (
    BEFT_MODEL_TYPES,
    EXPERT_NAMES,
    IA3_TARGETS,
    STACKED_MODEL_TYPES,
)
from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.families import FAMILIES, spec_from_config
from ftplan.planner.methods import METHODS, resolve_method
from ftplan.planner.model_spec import ModelSpec, Parameter
from ftplan.planner.peft_options import COUNTED, NEUTRAL, read_options
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.prompt_counts import ADAPTION_PROMPT_MODEL_TYPES, NORM_TARGETS
from ftplan.planner.trained import (
    LM_HEAD,
    MethodSettings,
    Trained,
    embedding_name,
    target_names,
    targeted_linears,
)

MakeConfig = Callable[..., dict[str, Any]]
MakeSpec = Callable[..., ModelSpec]
Shapes = Counter[tuple[int, ...]]

# PEFT's own sizes are for models whose sides are in the thousands.
SMALL: dict[str, tuple[str, ...]] = {
    "c3a": ("block_size=16",),
    "fourierft": ("n_frequency=50",),
    "road": ("group_size=16",),
    "vblora": ("vector_length=16",),
    "waveft": ("n_frequency=64",),
}
# What PEFT builds for these is LoRA, differently begun or trained.
LIKE_LORA = ("loftq", "lora-drop", "lora-plus", "pissa", "plora", "qlora", "relora", "rslora")
PEFT_METHODS = [m.name for m in METHODS.values() if m.peft_type and m.name not in LIKE_LORA]

# Tied embeddings, Conv1D, grouped heads, experts, fused matrices, some biases.
COMPARED = ("gemma2", "gpt2", "llama", "mixtral", "phi3", "qwen2")


def count(method: str, model: ModelSpec, **settings: Any) -> Trained:
    return METHODS[method].count(model, MethodSettings(**settings))


def built(config: dict[str, Any], device: str = "meta") -> Any:
    """The model that transformers builds from `config`."""
    torch = pytest.importorskip("torch", reason="counts come from torch modules")
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if config["model_type"] not in names:
        pytest.skip("transformers has no causal language model of this family")
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config)
        )


# In the path of what PEFT copies from the model.
_COPIED = ("modules_to_save", "shadow_backbone")


@dataclasses.dataclass(frozen=True)
class Built:
    """Shapes of what PEFT's model trains and has on top of the base."""

    own: Shapes
    adapters: Shapes
    held_as_base: Shapes
    frozen: Shapes
    index_bytes: int


def built_by_peft(
    method: str, config: dict[str, Any], dtype: str = "bfloat16", **settings: Any
) -> Built:
    """What the training process builds of these settings, with the names of `target_names`.

    On a bf16 base what PEFT turns into fp32 is an adapter.
    """
    pytest.importorskip("trl", reason="needs the `train` extra")
    from peft import get_peft_model

    from ftplan.launcher.training.adapters import settle_adapters
    from ftplan.launcher.training.build import apply_method, switched_on

    config = {**config, **switched_on(config, {"trains_biases": method == "bitfit"})}
    given = MethodSettings(**settings)
    targets = target_names(spec_from_config(config, "tiny"), given.target_modules)
    torch = pytest.importorskip("torch")
    model = built(config, "cpu").to(getattr(torch, dtype))
    if given.quantization != "none":
        model = quantized(model, given.quantization)
    base = {id(p) for p in (*model.parameters(), *model.buffers())}
    whole = list(model.parameters())  # none of them may be freed, or its id is given anew
    peft_config = apply_method(
        model,
        method,
        {
            **structs.asdict(given),
            **{"objective": "sft", "lora_alpha": 8, "lora_dropout": 0.0},
            "target_modules": list(targets),
        },
    )
    if peft_config is not None:
        model = get_peft_model(model, peft_config)
        settle_adapters(model, {"autocast_adapter_dtype": True})
    parameters = list(model.parameters())
    new = [p for p in parameters if id(p) not in base]
    buffers = [
        buffer
        for name, buffer in model.named_buffers()
        # Those of copied modules are the model's own.
        if id(buffer) not in base and not any(part in name for part in _COPIED)
    ]
    tables = [b for b in buffers if not b.is_floating_point()]
    for module in model.modules():
        tables += getattr(module, "shira_indices", {}).values()
    assert len(whole) == len({id(p) for p in whole})
    return Built(
        own=_shapes(p for p in parameters if id(p) in base and p.requires_grad),
        adapters=_shapes(p for p in new if p.requires_grad and p.dtype == torch.float32),
        held_as_base=_shapes(p for p in new if p.requires_grad and p.dtype == torch.bfloat16),
        frozen=_shapes([p for p in new if not p.requires_grad])
        + _shapes(b for b in buffers if b.is_floating_point()),
        index_bytes=sum(t.numel() * t.element_size() for t in tables),
    )


def quantized(model: Any, kind: str) -> Any:
    """The model as it is loaded in 4 or 8 bits."""
    pytest.importorskip("bitsandbytes")
    from ftplan.launcher.training.build import quantization_config

    settings = {"quantization": kind, "double_quant": True, "compute_dtype": "bfloat16"}
    config = quantization_config({**settings, "quant_storage": "uint8"})
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, quantization_config=config, dtype=model.dtype)


def _shapes(tensors: Iterable[Any]) -> Shapes:
    return Counter(_either_way(tuple(t.shape)) for t in tensors)


def shapes(parameters: Iterable[Parameter]) -> Shapes:
    found: Shapes = Counter()
    for p in parameters:
        found[_either_way(p.shape)] += p.count
    return found


def _either_way(shape: tuple[int, ...]) -> tuple[int, ...]:
    """GPT-2 holds its matrices transposed."""
    return tuple(sorted(shape)) if len(shape) == 2 else shape


def assert_counted(mine: Trained, theirs: Built) -> None:
    """Assert that the count is what PEFT builds, tensor by tensor."""
    counted = Built(
        own=shapes(mine.own),
        adapters=shapes(mine.adapters),
        held_as_base=shapes(mine.held_as_base),
        frozen=shapes(mine.frozen),
        index_bytes=mine.index_bytes,
    )
    assert counted == theirs
    assert mine.num_trainable_parameters == elements(
        theirs.own + theirs.adapters + theirs.held_as_base
    )
    assert mine.num_trainable_parameters > 0
    assert mine.frozen_parameters == elements(theirs.frozen)


def elements(found: Shapes) -> int:
    return sum(times * math.prod(shape) for shape, times in found.items())


def assert_as_peft(method: str, config: dict[str, Any], **settings: Any) -> Trained:
    mine = count(method, spec_from_config(config, "tiny"), **settings)
    assert_counted(mine, built_by_peft(method, config, **settings))
    return mine


# --- every method on every family

# What PEFT raises where it cannot adapt a model.
_REFUSALS = (ValueError, TypeError, NotImplementedError, InputError)


@pytest.mark.train
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("on_the_processor")
@pytest.mark.parametrize("family", COMPARED)
@pytest.mark.parametrize("method", PEFT_METHODS)
def test_every_method_adds_what_peft_builds_and_is_refused_where_peft_refuses(
    method: str, family: str, tiny_config: MakeConfig, tiny_spec: MakeSpec
) -> None:
    settings: dict[str, Any] = {"lora_rank": 4, "peft_config": SMALL.get(method, ())}
    theirs = None
    with suppress(*_REFUSALS):
        theirs = built_by_peft(method, tiny_config(family), **settings)
    if theirs is None or not theirs.adapters + theirs.held_as_base:
        with pytest.raises(InputError):
            count(method, tiny_spec(family), **settings)
        return
    mine = count(method, tiny_spec(family), **settings)
    if method == "lora-fa":  # PEFT's optimizer for it leaves A out, whatever it is
        assert shapes(mine.adapters) + shapes(mine.frozen) == theirs.adapters
        assert all("lora_B" in p.name for p in mine.added)
    else:
        assert_counted(mine, theirs)


@pytest.mark.train
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("on_the_processor")
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize(
    "method",
    [
        *("adalora", "boft", "deft", "delora", "dora", "glora", "hira", "loha", "lokr", "oft"),
        *("osf", "pissa", "psoft", "qlora", "supertuning", "tinylora", "vera"),
    ],
)
def test_beside_a_quantized_base_too(
    method: str, quantization: str, tiny_config: MakeConfig, tiny_spec: MakeSpec
) -> None:
    """PEFT builds some methods on packed weights as if these were the weights: refused as well."""
    settings: dict[str, Any] = {"lora_rank": 4, "quantization": quantization}
    theirs = None
    packed = quantization == "nf4" and method in ("loha", "lokr", "supertuning")
    with suppress(*_REFUSALS, RuntimeError):
        theirs = built_by_peft(method, tiny_config("llama"), **settings)
    if theirs is None or packed:
        with pytest.raises(InputError, match=f"quantized to {quantization}"):
            count(method, tiny_spec("llama"), **settings)
        return
    mine = count(method, tiny_spec("llama"), **settings)
    assert shapes(mine.adapters) == theirs.adapters


@pytest.mark.parametrize("method", LIKE_LORA)
def test_what_trains_lora_otherwise_adds_what_lora_adds(method: str, tiny_spec: MakeSpec) -> None:
    model = tiny_spec("qwen2")
    assert count(method, model, lora_rank=32) == count("lora", model, lora_rank=32)


@pytest.mark.train
@pytest.mark.usefixtures("on_the_processor")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adalora_leaves_the_numbers_of_its_ranks_alone(dtype: str, tiny_config: MakeConfig) -> None:
    """PEFT's cast of adapters to fp32 would train them."""
    theirs = built_by_peft("adalora", tiny_config("llama"), dtype=dtype)
    model = spec_from_config(tiny_config("llama"), "tiny")
    assert_counted(count("adalora", model), theirs)
    assert theirs.frozen == Counter({(1,): 21})


# --- options

OPTIONS: list[tuple[str, str, tuple[str, ...]]] = [
    ("adalora", "llama", ("init_r=3", "target_r=2")),
    ("adaption-prompt", "llama", ("adapter_layers=2", "adapter_len=3")),
    ("beft", "llama", ("target_modules=[v_proj, down_proj]",)),
    ("boft", "llama", ("boft_block_size=0", "boft_block_num=8")),
    ("c3a", "llama", ("block_size=8", "layers_to_transform=[1]")),
    ("cartridge", "llama", ("num_virtual_tokens=9", "num_frozen_tokens=4")),
    ("cartridge", "llama", ("num_frozen_tokens=0",)),
    ("deft", "llama", ("para=true",)),
    ("delora", "llama", ("rank_pattern={q_proj: 2}",)),
    ("lora", "gpt2", ("lora_bias=true", "init_lora_weights=false")),
    ("pissa", "llama", ("target_modules=[q_proj]",)),
    ("rslora", "phi", ()),
    ("dora", "llama", ("init_lora_weights=orthogonal",)),
    ("glora", "qwen2", ("config_A_B=vector", "config_C=vector", "config_D_E=vector")),
    ("glora", "qwen2", ("config_A_B=constant", "config_C=none", "config_D_E=none")),
    ("glora", "phi", ("config_A_B=none", "bias=glora_only")),
    ("gralora", "llama", ("gralora_k=4", "hybrid_r=3")),
    ("hra", "phi", ("bias=hra_only",)),
    ("ia3", "llama", ("target_modules=[q_proj, up_proj]", "feedforward_modules=[up_proj]")),
    ("ia3", "llama", ("target_modules=[q_proj, v_proj]", "feedforward_modules=[]")),
    ("lily", "llama", ("num_B=3", "stride_A=2")),
    ("ln-tuning", "qwen3", ("target_modules=[q_norm, norm]",)),
    ("loha", "llama", ("rank_pattern={q_proj: 2}", "rank_dropout=0.1")),
    ("lokr", "llama", ("decompose_both=true", "r=2")),
    ("lokr", "llama", ("decompose_both=true", "decompose_factor=4")),
    ("lokr", "llama", ("decompose_factor=5",)),
    ("lora", "gpt2", ("bias=all", "use_dora=true")),
    ("lora", "llama", ("layers_to_transform=[0, 2]",)),
    ("lora", "llama", ("layers_to_transform=1", "use_rslora=true")),
    ("lora", "llama", ("rank_pattern={q_proj: 2, down_proj: 5}", "alpha_pattern={q_proj: 1}")),
    ("lora", "llama", ("target_modules=[q_proj, v_proj]", "r=3")),
    ("lora", "llama", ("trainable_token_indices=[3, 5]",)),
    ("lora", "gemma2", ("trainable_token_indices=[3, 5]",)),
    ("lora", "mixtral", ("bias=all",)),
    ("lora", "phi", ("bias=all",)),
    ("lora", "phi", ("bias=lora_only", "target_modules=[fc1]", "layers_to_transform=[2]")),
    ("lora", "qwen2", ("bias=all", "target_modules=[q_proj, o_proj]")),
    ("lora", "qwen2", ("bias=lora_only", "target_modules=[q_proj, o_proj]")),
    ("miss", "llama", ("init_weights=bat",)),
    ("miss", "llama", ("init_weights=mini", "mini_r=2")),
    ("multitask-prompt-tuning", "llama", ("num_tasks=3", "num_ranks=2")),
    ("oft", "llama", ("oft_block_size=0", "r=5")),
    ("oft", "llama", ("oft_block_size=24", "block_share=true")),
    ("oft", "llama", ("oft_block_size=80",)),
    ("osf", "llama", ("effective_rank=5",)),
    ("osf", "llama", ("effective_rank=0.3",)),
    ("p-tuning", "llama", ("num_virtual_tokens=7", "encoder_hidden_size=12")),
    ("peanut", "llama", ("depth=2",)),
    ("poly", "llama", ("n_skills=3", "n_splits=2", "n_tasks=4")),
    ("prefix-tuning", "llama", ("prefix_projection=true",)),
    ("prefix-tuning", "qwen3", ("prefix_projection=true", "encoder_hidden_size=10")),
    ("psoft", "llama", ("psoft_orth=false", "psoft_mag_a=false")),
    ("pvera", "llama", ("r=7",)),
    ("randlora", "llama", ("r=7",)),
    ("road", "llama", ("variant=road_4", "group_size=16")),
    ("shadow", "gemma2", ("r=3", "update_hidden_size=5", "shadow_num_hidden_layers=2")),
    ("shadow", "llama", ("share_embeddings=false",)),
    ("shira", "llama", ("r=2",)),
    ("supertuning", "llama", ("sparsity=0.9",)),
    ("tinylora", "llama", ("weight_tying=0.5", "u=5", "r=3")),
    ("tinylora", "llama", ("weight_tying=0.9",)),
    ("trainable-tokens", "gemma2", ("token_indices=[1, 2, 3]",)),
    ("unilora", "llama", ("theta_d_length=40", "r=2")),
    ("vblora", "llama", ("num_vectors=8", "vector_length=16")),
    ("vera", "phi", ("r=6", "bias=vera_only")),
    ("waveft", "gpt2", ("n_frequency=9",)),
]


@pytest.mark.train
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("on_the_processor")
@pytest.mark.parametrize(("method", "family", "options"), OPTIONS)
def test_options_change_what_they_change_in_peft(
    method: str, family: str, options: tuple[str, ...], tiny_config: MakeConfig
) -> None:
    assert_as_peft(method, tiny_config(family), lora_rank=4, peft_config=options)


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("adalora", "rank_pattern={q_proj: 2}"),
        ("boft", "boft_n_butterfly_factor=2"),  # as PEFT's CUDA extension is built or not
        ("hira", "rank_pattern={q_proj: 2}"),  # PEFT has it and does not heed it
        ("lora", "exclude_modules=[q_proj]"),
        ("lora", "init_lora_weights=eva"),
        ("lora", "layer_replication=[[0, 2], [1, 3]]"),
        ("lora", "layers_pattern=layers"),
        ("lora", "target_parameters=[experts.down_proj]"),
        ("lora", "use_dorra=true"),
        ("p-tuning", "encoder_reparameterization_type=GRU"),
        ("supertuning", "r=8"),
        ("waveft", "proportional_parameters=true"),
    ],
)
def test_an_option_that_is_not_modelled_is_named_and_refused(
    method: str, option: str, tiny_spec: MakeSpec
) -> None:
    name = option.partition("=")[0]
    with pytest.raises(InputError, match=f"does not know what `--peft-config {name}") as refused:
        count(method, tiny_spec("llama"), peft_config=(option,))
    assert "ftplan estimate MODEL --exact" in (refused.value.hint or "")


def test_a_misspelt_option_is_told_the_nearest(tiny_spec: MakeSpec) -> None:
    with pytest.raises(InputError) as refused:
        count("lora", tiny_spec("llama"), peft_config=("use_dorra=true",))
    assert "did you mean `use_dora`" in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("method", "option", "why"),
    [
        ("adaption-prompt", "adapter_layers=4", "has 3 layers"),
        ("boft", "boft_block_size=5", "does not divide a side of `q_proj`, 64"),
        ("boft", "boft_block_num=2", "must be 0"),
        ("c3a", "block_size=256", "does not divide a side"),
        ("cartridge", "num_frozen_tokens=21", "20 tokens only"),
        ("dora", "lora_bias=true", "DoRA has none"),
        ("fourierft", "n_frequency=100000", "allows 4096 at most"),
        ("gralora", "gralora_k=7", "does not divide"),
        ("lora", "bias=some", "`none`, `all` or `lora_only`"),
        ("pissa", "lora_bias=true", "begin otherwise"),
        ("lora", "layers_to_transform=all", "list of whole numbers"),
        ("lora", "r=0", "whole number"),
        ("lora", "r=eight", "whole number"),
        ("lora", "rank_pattern={.*q_proj: 2}", "names of modules"),
        ("lora", "target_modules=.*_proj", "list of names"),
        ("lora", "use_dora=1", "true or false"),
        ("miss", "r=65", "allows 64 at most"),
        ("oft", "r=4", "one of `r` and it must be 0"),
        ("prompt-tuning", "num_virtual_tokens=none", "whole number"),
        ("road", "group_size=5", "does not divide"),
        ("shadow", "shadow_num_hidden_layers=4", "no such decoder"),
        ("shira", "r=32", "too few weights"),
        ("supertuning", "sparsity=2", "from 0 to 1"),
        ("trainable-tokens", "token_indices=[]", "a list of tokens"),
    ],
)
def test_a_value_that_cannot_be_is_refused(
    method: str, option: str, why: str, tiny_spec: MakeSpec
) -> None:
    with pytest.raises(InputError, match=why):
        count(method, tiny_spec("llama"), lora_rank=4, peft_config=(option,))


def test_a_method_without_modules_of_its_own_for_a_model_asks_for_some(tiny_spec: MakeSpec) -> None:
    for method in ("ia3", "beft", "ln-tuning"):
        with pytest.raises(InputError, match="on `qwen3_moe`") as refused:
            count(method, tiny_spec("qwen3_moe"))
        assert "--peft-config target_modules=" in (refused.value.hint or "")


def test_options_have_pefts_names_and_defaults() -> None:
    mapping = pytest.importorskip("peft.mapping", reason="the reference is PEFT")
    classes = mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    every_option = set()
    for peft_type, counted in COUNTED.items():
        fields = {item.name: item for item in dataclasses.fields(classes[peft_type])}
        every_option |= set(fields)
        for name, default in counted.items():
            item = fields[name]
            missing = item.default is dataclasses.MISSING
            assert default == (item.default_factory() if missing else item.default), name
    assert every_option >= NEUTRAL


def test_default_targets_are_pefts() -> None:
    constants = pytest.importorskip("peft.utils.constants", reason="the reference is PEFT")
    layer = pytest.importorskip("peft.tuners.adaption_prompt.config", reason="likewise")

    def theirs(name: str) -> dict[str, Any]:
        return getattr(constants, f"TRANSFORMERS_MODELS_TO_{name}_MAPPING")

    targets, inputs = theirs("IA3_TARGET_MODULES"), theirs("IA3_FEEDFORWARD_MODULES")
    for model_type, (all_of_them, feed_forward) in IA3_TARGETS.items():
        assert list(all_of_them) == targets[model_type]
        assert list(feed_forward) == inputs[model_type]
    for model_type, norms in NORM_TARGETS.items():
        assert list(norms) == theirs("LNTUNING_TARGET_MODULES")[model_type]
    for model_type in BEFT_MODEL_TYPES:
        assert theirs("BEFT_TARGET_MODULES")[model_type] == ["v_proj"]
    assert set(ADAPTION_PROMPT_MODEL_TYPES) == set(layer.TRANSFORMERS_MODEL_CONFIG)
    conversions = pytest.importorskip("transformers.conversion_mapping")
    patterns = conversions._MODEL_TO_CONVERSION_PATTERN
    stacked = {name for name, pattern in patterns.items() if pattern == "qwen2_moe"}
    assert stacked >= STACKED_MODEL_TYPES >= stacked & set(FAMILIES)
    renamed = pytest.importorskip("peft.utils.transformers_weight_conversion")
    assert set(renamed._MOE_TARGET_MODULE_MAPPING["qwen2_moe"]) == EXPERT_NAMES
    for model_type in FAMILIES:  # and none is left out
        assert (model_type in targets) == (model_type in IA3_TARGETS)
        assert (model_type in theirs("LNTUNING_TARGET_MODULES")) == (model_type in NORM_TARGETS)
        assert (model_type in theirs("BEFT_TARGET_MODULES")) == (model_type in BEFT_MODEL_TYPES)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "true",
            "False",
            "no",
            "on",
            "null",
            "~",
            "",
            "8",
            "-3",
            "0.5",
            "1.5e-3",
            "all",
            "q_proj",
        ),
        *("[]", "[q_proj, v_proj]", "[0, 2]", "[[0, 2], [1, 3]]", "{q_proj: 8, 'v.k': 4}", "{}"),
        *('"a, b"', "'true'", "[true, 'x y', 0.5]", "{a: [1, 2], b: {c: d}}", ".*_proj", "a:b"),
    ],
)
def test_options_are_read_as_yaml_reads_them(text: str) -> None:
    yaml = pytest.importorskip("yaml")
    assert read_options([f"option={text}"]) == {"option": yaml.safe_load(text)}


@pytest.mark.parametrize("text", ["[", "[1", "{a: 1", "{a}", "[1] 2", "{a: }", "[1 : 2]", "[,]"])
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_options([f"option={text}"])


# --- modules that are saved


@pytest.mark.train
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("on_the_processor")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("family", "saved"),
    [
        ("gpt2", ("lm_head",)),
        ("gpt2", ("wte", "lm_head")),
        ("llama", ("embed_tokens",)),
        ("llama", ("lm_head", "embed_tokens")),
        ("llama", ("norm",)),  # each whose name ends so
        ("llama", ("v_proj",)),  # then without an adapter
        ("mixtral", ("gate",)),
        ("phi", ("lm_head",)),  # with its bias
        ("qwen3", ("q_norm",)),
    ],
)
def test_saved_modules_are_copied_whole(
    family: str, saved: tuple[str, ...], tied: bool, tiny_config: MakeConfig
) -> None:
    config = tiny_config(family, tie_word_embeddings=tied)
    trained = assert_as_peft("lora", config, lora_rank=4, modules_to_save=saved)
    copied = {p.name.partition(".modules_to_save.")[0] for p in trained.held_as_base}
    assert copied == set(trained.saved_modules)
    assert all(any(name.endswith(ending) for ending in saved) for name in copied)
    assert trained.trains_lm_head == ("lm_head" in saved)
    assert trained.trains_embeddings == bool({"wte", "embed_tokens"} & set(saved))


@pytest.mark.train
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("on_the_processor")
@pytest.mark.parametrize("method", ["ia3", "ln-tuning", "prompt-tuning", "shadow", "vera"])
def test_other_methods_save_modules_too(method: str, tiny_config: MakeConfig) -> None:
    saved = ("lm_head",)
    trained = assert_as_peft(method, tiny_config("llama"), modules_to_save=saved)
    copy = Parameter(name="lm_head.modules_to_save.weight", shape=(128, 64))
    assert copy in trained.held_as_base
    assert trained.saved_modules == saved


def test_a_module_that_is_not_there_cannot_be_saved(tiny_spec: MakeSpec) -> None:
    with pytest.raises(UnknownNameError, match="module to save `lm_haed`") as refused:
        count("lora", tiny_spec("llama"), modules_to_save=("lm_haed",))
    assert "`lm_head`" in (refused.value.hint or "")


def test_a_module_is_adapted_or_saved(tiny_spec: MakeSpec) -> None:
    with pytest.raises(InputError, match="already carries an adapter"):
        count("lora", tiny_spec("llama"), modules_to_save=("proj",))
    with pytest.raises(InputError, match="without a module to adapt"):
        count("lora", tiny_spec("llama"), target_modules=("q_proj",), modules_to_save=("q_proj",))
    with pytest.raises(InputError, match="modules_to_save"):
        count("adaption-prompt", tiny_spec("llama"), modules_to_save=("lm_head",))


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


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_linear_module_is_adapted(family: str, tiny_spec: MakeSpec) -> None:
    """But routers, and those of a name that PEFT takes for stacked experts."""
    model = tiny_spec(family)
    trained = count("hira", model, lora_rank=4)
    left_out = {"router", *(EXPERT_NAMES if model.model_type in STACKED_MODEL_TYPES else ())}
    for layer in model.layer_counts:
        expected = tuple(linear for linear in layer.linears if linear.name not in left_out)
        assert trained.linears_of(layer) == expected
    assert trained.adapted_layers == tuple(range(model.num_hidden_layers))
    assert {trained.rank_of(linear) for linear in model.linears} == {4}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_all_linear_counts_as_peft_does(family: str, tiny_config: MakeConfig) -> None:
    """Given the names of `target_names`; PEFT's own `all-linear` is the same but for mixtures,
    where it adapts routers and stacked experts as well, and for all of a vision tower."""
    peft = pytest.importorskip("peft", reason="the reference is PEFT")
    model = spec_from_config(tiny_config(family), "tiny")
    dense = all(layer.feed_forward.experts is None for layer in model.layer_counts)
    own_name = "all-linear" if dense and not model.other_linears else None
    targets = own_name or list(target_names(model, ["all-linear"]))
    settings = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(built(tiny_config(family)), settings)
    theirs = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert count("lora", model, lora_rank=4).num_trainable_parameters == theirs


def test_ranks_of_a_pattern_are_told(tiny_spec: MakeSpec) -> None:
    model = tiny_spec("llama")
    options = ("rank_pattern={q_proj: 2}", "layers_to_transform=[1]")
    trained = count("lora", model, lora_rank=4, peft_config=options)
    ranks = {linear.name: trained.rank_of(linear) for linear in model.linears}
    assert (ranks["q_proj"], ranks["k_proj"]) == (2, 4)
    assert trained.adapted_layers == (1,)


def test_target_names_spell_all_linear_out_each_name_once(tiny_spec: MakeSpec) -> None:
    assert target_names(tiny_spec("gpt2"), ("all-linear",)) == ("c_attn", "c_proj", "c_fc")
    attention_only = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert target_names(tiny_spec("mixtral"), ("all-linear",)) == attention_only
    assert target_names(tiny_spec("llama"), ("v_proj", "q_proj")) == ("q_proj", "v_proj")


def test_an_unknown_target_module_is_told_the_nearest(tiny_spec: MakeSpec) -> None:
    with pytest.raises(UnknownNameError, match="target module `qproj`") as refused:
        count("lora", tiny_spec("llama"), target_modules=("qproj",))
    assert "`q_proj`" in (refused.value.hint or "")


def test_all_linear_beside_a_name_is_not_called_unknown(tiny_spec: MakeSpec) -> None:
    """It is a known word; what cannot be is the mixture."""
    with pytest.raises(InputError, match="stands alone") as refused:
        targeted_linears(tiny_spec("llama"), ("all-linear", "q_proj"))
    assert not isinstance(refused.value, UnknownNameError)


def test_lora_without_a_target_is_refused(tiny_spec: MakeSpec) -> None:
    with pytest.raises(InputError, match="names no module"):
        count("lora", tiny_spec("llama"), target_modules=())


# --- published figures


def test_lora_of_rank_16_on_llama_2_7b(llama_2_7b: ModelSpec) -> None:
    """39,976,960 trainable parameters, the figure that PEFT prints for all seven modules."""
    assert count("lora", llama_2_7b, lora_rank=16).num_trainable_parameters == 39_976_960


def test_lora_of_rank_8_on_q_and_v_of_llama_7b(llama_2_7b: ModelSpec) -> None:
    """4,194,304: what PEFT prints for Alpaca-LoRA's first settings."""
    trained = count("lora", llama_2_7b, lora_rank=8, target_modules=("q_proj", "v_proj"))
    assert trained.num_trainable_parameters == 4_194_304


def test_vera_on_llama_2_7b_has_1_4_million(llama_2_7b: ModelSpec) -> None:
    """The first version's abstract of arXiv 2310.11454; rank 256."""
    assert f"{count('vera', llama_2_7b).num_trainable_parameters / 1e6:.1f}" == "1.4"


def test_llama_adapter_on_llama_7b_has_1_2_million(llama_2_7b: ModelSpec) -> None:
    """The abstract of arXiv 2303.16199; 30 layers of 10 tokens."""
    assert f"{count('adaption-prompt', llama_2_7b).num_trainable_parameters / 1e6:.1f}" == "1.2"


def test_prefixes_of_20_tokens_before_24_layers_of_1024(tiny_spec: MakeSpec) -> None:
    """983,040, what PEFT's guide prints for bloomz-560m, of that depth and width."""
    model = tiny_spec("gpt2", n_embd=1024, n_layer=24, n_head=16)
    for method in ("prefix-tuning", "p-tuning-v2"):
        assert count(method, model).num_trainable_parameters == 983_040


def test_p_tuning_of_20_tokens_of_1024(tiny_spec: MakeSpec) -> None:
    """300,288, what PEFT's guide prints for bloomz-560m with a network of width 128."""
    model = tiny_spec("gpt2", n_embd=1024, n_layer=24, n_head=16)
    trained = count("p-tuning", model, peft_config=("encoder_hidden_size=128",))
    assert trained.num_trainable_parameters == 300_288


# --- how far backward goes


def test_what_backward_reaches(tiny_spec: MakeSpec) -> None:
    """Three layers: down to the first in which something is trained."""
    model = tiny_spec("llama")

    def reached(method: str, *options: str, **settings: Any) -> int:
        return count(method, model, peft_config=options, **settings).reached_layers(model)

    assert reached("lora") == reached("prompt-tuning") == reached("full") == 3
    assert reached("lora", "layers_to_transform=[1]") == 2
    assert reached("adaption-prompt", "adapter_layers=1") == 1
    assert reached("lora", "layers_to_transform=[2]", modules_to_save=("lm_head",)) == 1
    assert reached("lora", "layers_to_transform=[2]", modules_to_save=("embed_tokens",)) == 3
    assert reached("lora", "layers_to_transform=[2]", modules_to_save=("input_layernorm",)) == 3
    assert reached("trainable-tokens") == 3
    assert reached("ln-tuning", "target_modules=[norm]") == 0
    assert reached("freeze", num_trainable_layers=2) == 2
    assert reached("freeze", trainable_modules=("lm_head",)) == 0
    assert reached("freeze", trainable_modules=("embed_tokens",)) == 3


def test_layers_of_several_kinds_are_counted_each(tiny_spec: MakeSpec) -> None:
    """A first layer of feed-forward width 96, then two of 160; ranks of 1."""
    narrow, wide = tiny_spec("llama"), tiny_spec("llama", intermediate_size=160)
    model = structs.replace(narrow, layers=(*narrow.layers[:1], *wide.layers[:2]))
    attention = (64 + 64) + 2 * (64 + 32) + (64 + 64)
    each = [attention + 3 * (64 + width) for width in (96, 160, 160)]
    assert count("lora", model, lora_rank=1).added_parameters == sum(each)
    for place, numbers in enumerate(each):
        one = count("lora", model, lora_rank=1, peft_config=(f"layers_to_transform=[{place}]",))
        assert one.added_parameters == numbers
    last = count("freeze", model, num_trainable_layers=2)
    assert last.base_parameters == 2 * wide.layers[0].num_parameters
    assert count("full", model).base_parameters == model.num_parameters


# --- names and widths that follow from the family


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_embeddings_and_head_have_the_names_of_transformers(
    family: str, tiny_config: MakeConfig, tiny_spec: MakeSpec
) -> None:
    model = built(tiny_config(family))
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    assert names[id(model.get_input_embeddings())] == embedding_name(tiny_spec(family))
    assert names[id(model.get_output_embeddings())] == LM_HEAD


@pytest.mark.train
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("on_the_processor")
@pytest.mark.parametrize("method", ["prefix-tuning", "prompt-tuning", "shadow", "lora"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_counted_as_peft_builds_it_or_refused(
    method: str, family: str, tiny_config: MakeConfig, tiny_spec: MakeSpec
) -> None:
    try:
        mine = count(method, tiny_spec(family))
    except InputError:
        return
    assert_counted(mine, built_by_peft(method, tiny_config(family)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma2"])
def test_common_families_are_not_refused(family: str, tiny_spec: MakeSpec) -> None:
    for method in ("prefix-tuning", "prompt-tuning", "shadow", "lora"):
        assert count(method, tiny_spec(family)).added_parameters > 0


# --- bottlenecks


@given(rank=st.integers(1, 256), layers=st.integers(1, 24))
def test_bottlenecks_stand_twice_in_each_layer(rank: int, layers: int, tiny_spec: MakeSpec) -> None:
    """2 m d + d + m numbers each, section 2.1 of arXiv 1902.00751; d = 64."""
    model = tiny_spec("llama", num_hidden_layers=layers)
    trained = count("bottleneck", model, lora_rank=rank)
    assert trained.num_trainable_parameters == 2 * layers * (2 * rank * 64 + 64 + rank)
    assert trained.own == ()


# --- what trains the model's own parameters


@pytest.mark.train
@pytest.mark.usefixtures("on_the_processor")
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_bitfit_trains_the_real_biases(
    family: str, tiny_config: MakeConfig, tiny_spec: MakeSpec
) -> None:
    theirs = None
    with suppress(InputError):
        theirs = built_by_peft("bitfit", tiny_config(family))
    if theirs is None:
        with pytest.raises(InputError, match="neither has nor can have any"):
            count("bitfit", tiny_spec(family))
    else:
        assert_counted(count("bitfit", tiny_spec(family)), theirs)


def test_bitfit_is_for_models_with_biases(tiny_spec: MakeSpec) -> None:
    assert {p.name for p in count("bitfit", tiny_spec("qwen2")).own} == {
        *("q_proj.bias", "k_proj.bias", "v_proj.bias")
    }
    with pytest.raises(InputError, match="neither has nor can have any"):
        count("bitfit", tiny_spec("mistral"))


def test_bitfit_adds_the_biases_that_a_config_can_switch_on(tiny_spec: MakeSpec) -> None:
    """Llama has a switch for attention's and one for the feed-forward's, Qwen 3 has the first."""
    attention = {f"{name}_proj.bias" for name in "qkvo"}
    feed_forward = {f"{name}_proj.bias" for name in ("gate", "up", "down")}
    names = {p.name for p in count("bitfit", tiny_spec("llama")).own}
    assert names == attention | feed_forward
    assert {p.name for p in count("bitfit", tiny_spec("qwen3")).own} == attention
    on = tiny_spec("llama", attention_bias=True)
    assert on.biased is None and {p.name for p in count("bitfit", on).own} == attention


@pytest.mark.train
@pytest.mark.usefixtures("on_the_processor")
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_freeze_trains_the_real_parameters_of_the_last_layers(
    family: str, layers: int, tiny_config: MakeConfig
) -> None:
    trained = assert_as_peft("freeze", tiny_config(family), num_trainable_layers=layers)
    assert trained.trained_layers == layers
    assert not trained.trains_embeddings and not trained.trains_lm_head


@pytest.mark.train
@pytest.mark.usefixtures("on_the_processor")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("family", "modules"),
    [
        ("gpt2", ("wte", "ln_f", "c_proj")),
        ("llama", ("lm_head",)),
        ("llama", ("q_proj", "lm_head")),
        ("llama", ("embed_tokens",)),
        ("llama", ("input_layernorm", "norm")),
        ("mixtral", ("gate",)),
        ("phi", ("lm_head", "fc2")),
    ],
)
def test_freeze_trains_named_modules(
    family: str, modules: tuple[str, ...], tied: bool, tiny_config: MakeConfig
) -> None:
    """In the last two layers, and outside of the layers."""
    config = tiny_config(family, tie_word_embeddings=tied)
    trained = assert_as_peft("freeze", config, trainable_modules=modules)
    ends = {"lm_head", "embed_tokens", "wte"} & set(modules)
    assert trained.trains_lm_head == ("lm_head" in ends or (tied and bool(ends)))
    assert trained.trains_embeddings == bool(ends - {"lm_head"} or (tied and ends))


def test_freeze_tells_which_weights_of_a_layer_it_trains(tiny_spec: MakeSpec) -> None:
    model = tiny_spec("llama")
    some = count("freeze", model, trainable_modules=("q_proj", "lm_head"))
    assert (some.trained_layers, some.trained_in_layers) == (2, {"q_proj.weight"})
    head = count("freeze", model, trainable_modules=("lm_head",))
    assert (head.trained_layers, head.trained_in_layers) == (0, frozenset())
    every = count("freeze", model)
    assert every.trained_in_layers == {p.name for p in model.layers[0].parameters()}


def test_freeze_is_told_the_nearest_module(tiny_spec: MakeSpec) -> None:
    with pytest.raises(UnknownNameError, match="module to train `qproj`") as refused:
        count("freeze", tiny_spec("llama"), trainable_modules=("qproj",))
    assert "`q_proj`" in (refused.value.hint or "")


@pytest.mark.parametrize("layers", [0, -1, 4])
def test_freeze_is_refused_outside_the_models_layers(layers: int, tiny_spec: MakeSpec) -> None:
    with pytest.raises(InputError, match="1 to 3 layers"):
        count("freeze", tiny_spec("llama"), num_trainable_layers=layers)


@pytest.mark.train
@pytest.mark.usefixtures("on_the_processor")
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_full_trains_every_parameter(
    family: str, tiny_config: MakeConfig, tiny_spec: MakeSpec
) -> None:
    trained = assert_as_peft("full", tiny_config(family))
    assert trained.num_trainable_parameters == tiny_spec(family).num_parameters
    assert trained.trained_layers == tiny_spec(family).num_hidden_layers
    assert trained.trains_embeddings and trained.trains_lm_head


# --- the list


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_is_found_in_any_case_and_has_a_source(name: str) -> None:
    method = resolve_method(name.upper())
    assert method.name == name
    assert method.source and method.title and method.trains


def test_a_plans_settings_reach_the_count(tiny_spec: MakeSpec) -> None:
    model = tiny_spec("llama")

    def trainable(**settings: Any) -> int:
        plan = TrainingPlan(**settings)
        trained = plan.resolved_method.count(model, plan.method_settings)
        return trained.num_trainable_parameters

    lora = trainable(lora_rank=4)
    assert trainable(lora_rank=8) == 2 * lora
    assert trainable(lora_rank=4, modules_to_save=("lm_head",)) == lora + 128 * 64
    assert trainable(peft_config=("r=4",)) == lora
    freeze = {"method": "freeze", "num_trainable_layers": 1}
    assert trainable(**freeze, trainable_modules=("q_proj",)) == 64 * 64


def test_modules_are_named_for_freeze_alone() -> None:
    with pytest.raises(InputError, match="`--trainable-modules` is for method `freeze`"):
        TrainingPlan(method="lora", trainable_modules=("q_proj",))


def test_an_unknown_method_is_told_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="unknown method `lorra`") as refused:
        resolve_method("lorra")
    assert "`lora`" in (refused.value.hint or "")
