"""What a fine-tuning method trains and adds, as lists of parameters.

Here are the methods that train the model's own parameters; `adapter_counts.py` and
`prompt_counts.py` have those that add some. A test compares all of them with PEFT's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cached_property

from msgspec import Struct

from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.model_spec import Layer, Linear, ModelSpec, Norm, Parameter
from ftplan.planner.peft_options import PeftOptions

ALL_LINEAR = "all-linear"

# What stands between a module's name and its parameter's in the names of a copy: a whole module's,
# and a tuned norm's.
COPIES = ("modules_to_save", "ln_tuning_layers")

# Mixtures whose experts were modules before transformers 5: given these names, PEFT's LoRA adapts
# the stacked experts, and no module of the name (`transformers_weight_conversion.py`).
EXPERT_NAMES = frozenset(("gate", "gate_proj", "up_proj", "down_proj"))
STACKED_MODEL_TYPES = frozenset(
    (
        *("afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1"),
        *("ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"),
        *("hunyuan_v1_moe", "longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next"),
        *("solar_open",),
    )
)

# What transformers calls the output projection, and the token embeddings where not `embed_tokens`.
LM_HEAD = "lm_head"
_EMBEDDING_NAMES = {
    "bloom": "word_embeddings",
    "falcon": "word_embeddings",
    "gpt2": "wte",
    "gpt_bigcode": "wte",
    "gpt_neo": "wte",
    "gpt_neox": "embed_in",
    "gptj": "wte",
}


class Trained(Struct, frozen=True, kw_only=True, dict=True):
    """What a configuration trains of a model, and what it adds to it.

    `own`: the model's own parameters that are trained. What the method adds and trains: `adapters`,
    which PEFT turns into fp32 beside a 16-bit base (`cast_adapter_dtype`; prompts are made so), and
    `held_as_base`, which keep the base's dtype: copies of modules by `modules_to_save` (named
    `lm_head.modules_to_save.weight`; `ModulesToSaveWrapper` is no layer of PEFT's) and of tuned
    norms, LLaMA-Adapter's prompts, Shadow's network.
    `frozen`: what the method adds and does not train, in fp32 but for GLoRA's zeros, which are
    held as the base; `index_bytes`: besides, tables of whole numbers (places in a matrix).
    `adapted`: for each kind of layer, its linear modules that carry an adapter; `rank`: of the
    adapters, but of the modules that `ranks` names. `adapted_layers`: places of the layers to
    which something is added.
    `trained_layers`: how many layers, from the last, have own weights that are trained:
    `trained_in_layers` are these weights' names.
    `trains_embeddings`, `trains_lm_head`: as own parameters or as copies; `saved_modules`: what
    `modules_to_save` copied. `num_virtual_tokens`: learned tokens, keys or values in front of every
    row; `num_trained_tokens`: tokens whose embeddings are trained beside the frozen others, and,
    where it `trains_head_rows`, what the output projection has for them.
    """

    own: tuple[Parameter, ...] = ()
    adapters: tuple[Parameter, ...] = ()
    held_as_base: tuple[Parameter, ...] = ()
    frozen: tuple[Parameter, ...] = ()
    index_bytes: int = 0
    adapted: tuple[tuple[Layer, tuple[Linear, ...]], ...] = ()
    adapted_layers: tuple[int, ...] = ()
    rank: int = 0
    ranks: tuple[tuple[str, int], ...] = ()
    trained_layers: int = 0
    trained_in_layers: frozenset[str] = frozenset()
    trains_embeddings: bool = False
    trains_lm_head: bool = False
    saved_modules: tuple[str, ...] = ()
    num_virtual_tokens: int = 0
    num_trained_tokens: int = 0
    trains_head_rows: bool = False

    @cached_property
    def base_parameters(self) -> int:
        """Trained parameters of the model itself."""
        return num_elements(self.own)

    @cached_property
    def added(self) -> tuple[Parameter, ...]:
        """All trained parameters that the method adds."""
        return (*self.adapters, *self.held_as_base)

    @cached_property
    def added_parameters(self) -> int:
        """Trained parameters that the method adds."""
        return num_elements(self.added)

    @cached_property
    def frozen_parameters(self) -> int:
        """Numbers that the method adds and does not train, `index_bytes` aside."""
        return num_elements(self.frozen)

    @property
    def num_trainable_parameters(self) -> int:
        return self.base_parameters + self.added_parameters

    def linears_of(self, layer: Layer) -> tuple[Linear, ...]:
        """The linear modules of this kind of layer that carry an adapter."""
        return next((linears for kind, linears in self.adapted if kind == layer), ())

    def rank_of(self, linear: Linear) -> int:
        """The rank of this module's adapter."""
        return dict(self.ranks).get(linear.name, self.rank)

    def reached_layers(self, model: ModelSpec) -> int:
        """Layers that backward goes through, from the last: down to the first trained number."""
        if self.trains_embeddings or self.num_virtual_tokens or self.num_trained_tokens:
            return model.num_hidden_layers
        first = min(self.adapted_layers, default=model.num_hidden_layers)
        return max(model.num_hidden_layers - first, self.trained_layers)


class MethodSettings(Struct, frozen=True, kw_only=True):
    """The settings of a plan that decide what is trained.

    `peft_config` holds the options as they are written (`use_dora=true`); `num_tasks`: those that
    adapters tell apart, None for the method's own number; `trainable_modules`: what `freeze` trains
    instead of whole layers; `num_trained_tokens`: named ones whose rows are trained beside
    adapters. `quantization`: how the frozen base is held.
    """

    lora_rank: int = 16
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    modules_to_save: tuple[str, ...] = ()
    num_trained_tokens: int = 0
    peft_config: tuple[str, ...] = ()
    num_tasks: int | None = None
    num_trainable_layers: int = 2
    trainable_modules: tuple[str, ...] = ()
    quantization: str = "none"


CountedBy = Callable[[ModelSpec, MethodSettings, PeftOptions], Trained]


def num_elements(parameters: Iterable[Parameter]) -> int:
    return sum(p.num_elements for p in parameters)


class Tally:
    """Collects parameters: equal ones together."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def add(self, parameters: Iterable[Parameter], times: int = 1) -> None:
        for p in parameters:
            self._counts[p.name, p.shape] += times * p.count

    def parameters(self) -> tuple[Parameter, ...]:
        return tuple(
            Parameter(name=name, shape=shape, count=count)
            for (name, shape), count in self._counts.items()
        )


def kinds_of(layers: Sequence[Layer]) -> dict[Layer, int]:
    """Each kind among these layers and how many there are of it."""
    times = Counter(map(id, layers))  # equal layers are mostly one object, quickly told apart
    kinds: dict[Layer, int] = {}
    for layer in {id(layer): layer for layer in layers}.values():
        kinds[layer] = kinds.get(layer, 0) + times[id(layer)]
    return kinds


# --- the model's modules, by the names that transformers gives them


def embedding_name(model: ModelSpec) -> str:
    return _EMBEDDING_NAMES.get(model.model_type, "embed_tokens")


def outer_modules(model: ModelSpec) -> dict[str, tuple[Parameter, ...]]:
    """The modules outside of the layers, with their parameters; a tied head has the embedding's,
    and a model that scores has none.

    What a repository's own code calls embeddings and head is not known.
    """
    parameters = {p.name: p for p in model.outer_parameters}
    embedding = parameters["embed_tokens.weight"]
    head = [parameters.get("lm_head.weight", embedding)]
    if model.lm_head_bias:
        head.append(parameters["lm_head.bias"])
    found: dict[str, tuple[Parameter, ...]] = {embedding_name(model): (embedding,)}
    if not model.scores:
        found[LM_HEAD] = tuple(head)
    if model.code != "transformers":
        found.clear()
    for part in (model.final_norm, model.embedding_norm, *model.embedding_linears):
        if part is not None:
            found[part.name] = tuple(part.parameters())
    return found


def layer_modules(layer: Layer) -> list[tuple[str, tuple[Parameter, ...]]]:
    """The linear modules, norms and the router of a layer, with their parameters."""
    parts: list[Linear | Norm] = [*layer.linears, *layer.norms, *layer.attention.norms]
    experts = layer.feed_forward.experts
    if experts is not None and not (experts.router_is_linear or experts.router_correction):
        parts.append(experts.router)
    return [(part.name, tuple(part.parameters())) for part in parts]


def check_target_modules(target_modules: Sequence[str]) -> None:
    """Raises InputError for a list that no model can have."""
    if not target_modules:
        raise InputError(
            "`--target-modules` names no module",
            f"name some, such as `q_proj,v_proj`, or write `{ALL_LINEAR}`",
        )
    if ALL_LINEAR in target_modules and len(target_modules) > 1:
        others = ", ".join(f"`{name}`" for name in target_modules if name != ALL_LINEAR)
        raise InputError(
            f"`{ALL_LINEAR}` already means every linear module: it stands alone",
            f"leave out {others or 'the second one'}, or leave out `{ALL_LINEAR}`",
        )


def targeted_linears(model: ModelSpec, target_modules: Sequence[str]) -> tuple[Linear, ...]:
    """The linear modules that `target_modules` names, of each kind of layer; `all-linear`: all but
    routers, and those whose names PEFT takes for stacked experts.

    A name takes every module of that name, as PEFT's match by suffix does (GPT-2 has a `c_proj`
    in attention and one in the feed-forward). Raises UnknownNameError for a name that no module
    of this model has.
    """
    check_target_modules(target_modules)
    if tuple(target_modules) == (ALL_LINEAR,):
        left_out = routers_taken_for_linear(model)
        if model.model_type in STACKED_MODEL_TYPES:
            left_out |= EXPERT_NAMES
        return tuple(linear for linear in model.linears if linear.name not in left_out)
    known = {linear.name for linear in model.linears}
    for name in target_modules:
        if name not in known:
            raise UnknownNameError("target module", name, {*known, ALL_LINEAR})
    return tuple(linear for linear in model.linears if linear.name in target_modules)


def routers_taken_for_linear(model: ModelSpec) -> frozenset[str]:
    """Names of routers that PEFT takes for linear modules. It cannot adapt them: they return
    several tensors (`forward` of Llama 4's and Phi-3.5-MoE's in transformers 5.23)."""
    mixtures = (layer.feed_forward.experts for layer in model.layer_counts)
    return frozenset(
        experts.router.name for experts in mixtures if experts and experts.router_is_linear
    )


def target_names(model: ModelSpec, target_modules: Sequence[str]) -> tuple[str, ...]:
    """The module names that PEFT is given, each once: `all-linear` spelled out.

    PEFT's own `all-linear` (0.21) also takes routers and stacked experts, which the counts here
    leave out; so training is given names.
    """
    targeted = targeted_linears(model, target_modules)
    return tuple(dict.fromkeys(linear.name for linear in targeted))


# --- methods that train the model's own parameters


def full_count(model: ModelSpec, settings: MethodSettings, options: PeftOptions) -> Trained:
    outer = {p.name for p in model.outer_parameters}
    return _own(model, model.num_hidden_layers, lambda _: True, outer)


def with_biases(model: ModelSpec) -> ModelSpec:
    """The model as BitFit trains it: of one that has no bias, with those that its config can switch
    on, which begin at zero."""
    return model.biased or model


def bitfit_count(model: ModelSpec, settings: MethodSettings, options: PeftOptions) -> Trained:
    """Every bias: Ben Zaken et al. 2021 (arXiv 2106.10199), section 3."""
    model = with_biases(model)
    outer = {p.name for p in model.outer_parameters if p.name.endswith("bias")}
    trained = _own(model, model.num_hidden_layers, lambda name: name.endswith("bias"), outer)
    if not trained.own:
        raise InputError(
            f"method `bitfit` trains biases, and {model.name} neither has nor can have any",
            "use `--method lora`; `--method beft`, which adds some, and `ln-tuning` may need "
            "`--peft-config target_modules=[...]`",
        )
    return trained


def freeze_count(model: ModelSpec, settings: MethodSettings, options: PeftOptions) -> Trained:
    """The last layers with all their parameters, the rest frozen; or the modules that
    `trainable_modules` names, in these layers and outside of the layers."""
    layers, modules = settings.num_trainable_layers, settings.trainable_modules
    if not 1 <= layers <= model.num_hidden_layers:
        raise InputError(
            f"`--num-trainable-layers {layers}` is outside this model's "
            f"1 to {model.num_hidden_layers} layers"
        )
    if not modules:
        return _own(model, layers, lambda _: True, ())
    outside = outer_modules(model)
    known = {name for layer in model.layers[-layers:] for name, _ in layer_modules(layer)}
    for name in modules:
        if name not in known | set(outside):
            raise UnknownNameError("module to train", name, known | set(outside))
    outer = {p.name for name in modules for p in outside.get(name, ())}
    wanted = known.intersection(modules)
    return _own(
        model, layers if wanted else 0, lambda name: name.partition(".")[0] in wanted, outer
    )


def _own(
    model: ModelSpec, layers: int, wanted: Callable[[str], bool], outer: Collection[str]
) -> Trained:
    """The parameters of the last `layers` whose name is wanted, and `outer` ones."""
    tally, in_layers = Tally(), set[str]()
    for layer, times in kinds_of(model.layers[model.num_hidden_layers - layers :]).items():
        found = [p for p in layer.parameters() if wanted(p.name)]
        tally.add(found, times)
        in_layers.update(p.name for p in found)
    tally.add(p for p in model.outer_parameters if p.name in outer)
    head = "embed_tokens.weight" if model.tie_word_embeddings else "lm_head.weight"
    return Trained(
        own=tally.parameters(),
        trained_layers=layers,
        trained_in_layers=frozenset(in_layers),
        trains_embeddings="embed_tokens.weight" in outer,
        trains_lm_head=head in outer,
    )
