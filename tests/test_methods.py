"""What each method trains and adds: counted again, and compared with what PEFT really builds."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.families import FAMILIES, spec_from_config
from ftplan.planner.methods import COMPARED_METHODS, METHODS, resolve_method
from ftplan.planner.model_spec import ModelSpec, Parameter
from ftplan.planner.peft_options import COUNTED, NEUTRAL, read_options
from ftplan.planner.trained import MethodSettings, Trained, target_names, targeted_linears
from tests.conftest import TINY_CONFIGS

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
# Without and with grouped heads, biases, fused matrices, tied embeddings, experts.
COMPARED = ("gemma2", "gpt2", "llama", "mixtral", "phi", "phi3", "qwen2")
ADAPTED = ("gemma2", "gpt2", "llama", "mistral", "mixtral", "phi", "phi3", "qwen2", "qwen3")


def count(method: str, model: ModelSpec, **settings: Any) -> Trained:
    return METHODS[method].count(model, MethodSettings(**settings))


def spec_of(family: str, **changes: Any) -> ModelSpec:
    config = {"model_type": family, **TINY_CONFIGS[family], **changes}
    return spec_from_config(config, f"tiny-{family}")


def built(config: dict[str, Any], device: str = "meta") -> Any:
    """The model that transformers builds from `config`."""
    torch = pytest.importorskip("torch", reason="counts come from torch modules")
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config)
        )


@dataclasses.dataclass(frozen=True)
class Built:
    """Shapes of what PEFT's model trains and has on top of the base."""

    own: Shapes
    added: Shapes
    frozen: Shapes
    index_bytes: int


def built_by_peft(method: str, config: dict[str, Any], **settings: Any) -> Built:
    """What the training process builds of these settings, with the names of `target_names`."""
    pytest.importorskip("trl", reason="needs the `train` extra")
    from ftplan.launcher.training.build import apply_method
    from peft import get_peft_model

    given = MethodSettings(**settings)
    targets = target_names(spec_from_config(config, "tiny"), given.target_modules)
    model = built(config, "cpu")
    base = {id(p) for p in (*model.parameters(), *model.buffers())}
    whole = list(model.parameters())  # none of them may be freed, or its id is given anew
    peft_config = apply_method(
        model,
        method,
        {
            **{item.name: getattr(given, item.name) for item in dataclasses.fields(given)},
            **{"objective": "sft", "lora_alpha": 8, "lora_dropout": 0.0},
            "target_modules": list(targets),
        },
    )
    if peft_config is not None:
        model = get_peft_model(model, peft_config)
    parameters = list(model.parameters())
    new = [p for p in parameters if id(p) not in base]
    buffers = [
        buffer
        for name, buffer in model.named_buffers()
        # Those of copied modules are the model's own.
        if id(buffer) not in base and not name.endswith(("inv_freq", "embed_scale"))
    ]
    tables = [b for b in buffers if not b.is_floating_point()]
    for module in model.modules():
        tables += getattr(module, "shira_indices", {}).values()
    assert len(whole) == len({id(p) for p in whole})
    return Built(
        own=_shapes(p for p in parameters if id(p) in base and p.requires_grad),
        added=_shapes(p for p in new if p.requires_grad),
        frozen=_shapes([p for p in new if not p.requires_grad])
        + _shapes(b for b in buffers if b.is_floating_point()),
        index_bytes=sum(t.numel() * t.element_size() for t in tables),
    )


def _shapes(tensors: Iterable[Any]) -> Shapes:
    return Counter(tuple(t.shape) for t in tensors)


def shapes(parameters: Iterable[Parameter]) -> Shapes:
    found: Shapes = Counter()
    for p in parameters:
        found[p.shape] += p.count
    return found


def assert_as_peft(method: str, config: dict[str, Any], **settings: Any) -> Trained:
    """Assert that the count is what PEFT builds, tensor by tensor."""
    mine = count(method, spec_from_config(config, "tiny"), **settings)
    theirs = built_by_peft(method, config, **settings)
    counted = Built(
        own=shapes(mine.own),
        added=shapes(mine.added),
        frozen=shapes(mine.frozen),
        index_bytes=mine.index_bytes,
    )
    assert counted == theirs
    elements = {shape: Parameter(name="", shape=shape).size for shape in theirs.own + theirs.added}
    trainable = sum(n * elements[shape] for shape, n in (theirs.own + theirs.added).items())
    assert mine.num_trainable_parameters == trainable > 0
    return mine


# --- every method on every family


@cache
def _refusals() -> tuple[type[Exception], ...]:
    return (ValueError, TypeError, NotImplementedError, InputError)


@pytest.mark.train
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", COMPARED)
@pytest.mark.parametrize("method", [m.name for m in METHODS.values() if m.peft_type])
def test_every_method_adds_what_peft_builds_and_is_refused_where_peft_refuses(
    method: str, family: str, tiny_config: MakeConfig
) -> None:
    config = tiny_config(family)
    settings: dict[str, Any] = {"lora_rank": 4, "peft_config": SMALL.get(method, ())}
    try:
        theirs = built_by_peft(method, config, **settings)
    except _refusals():
        theirs = None
    if theirs is None or not theirs.own + theirs.added:
        with pytest.raises(InputError):
            count(method, spec_of(family), **settings)
    elif method == "lora-fa":
        mine = count(method, spec_of(family), **settings)
        assert shapes(mine.added) + shapes(mine.frozen) == theirs.added
        assert all("lora_B" in p.name for p in mine.added)
    else:
        assert_as_peft(method, config, **settings)
