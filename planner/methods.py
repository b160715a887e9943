"""The fine-tuning methods: one entry each.

`launcher/training/build.py` builds a method from its entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct, structs

from ftplan.planner.adapter_counts import (
    adapter_count,
    beft_count,
    check_quantization,
    ia3_count,
    lora_fa_count,
)
from ftplan.planner.cycles import RESTARTING, adalora_first_rank
from ftplan.planner.errors import UnknownNameError
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.peft_options import CACHE_FILLING, PeftOptions, read_options, resolve_options
from ftplan.planner.prompt_counts import (
    adaption_prompt_count,
    bottleneck_count,
    cartridge_count,
    multitask_prompt_count,
    norms_count,
    p_tuning_count,
    prefix_count,
    prompt_count,
    shadow_count,
    tokens_count,
)
from ftplan.planner.trained import (
    CountedBy,
    MethodSettings,
    Trained,
    bitfit_count,
    freeze_count,
    full_count,
)

_SETTLED = frozenset(MethodSettings.__struct_fields__)


class Method(Struct, frozen=True, kw_only=True):
    """A way to fine-tune.

    `adapter`: small matrices are trained beside a frozen base.
    `quantized_base`: that base is held in 4 or 8 bits.
    `counted_by`: what is trained and added, of a model's specification.
    `peft_type`: PEFT's name of it; None where PEFT has no part in it.
    `peft_options`: options of PEFT's configuration that make the method.
    `takes`: which option of that configuration takes which setting of the plan.
    """

    name: str
    title: str
    trains: str
    source: str
    counted_by: CountedBy
    adapter: bool = False
    quantized_base: bool = False
    peft_type: str | None = None
    peft_options: Mapping[str, Any] = {}
    takes: Mapping[str, str] = {}

    @property
    def merges(self) -> bool:
        """Whether the adapters are merged into the base: what is saved is a whole model."""
        return self.name in RESTARTING

    @property
    def fills_cache(self) -> bool:
        """Layers are given what it trains by their cache of keys and values. Checkpointed ones are
        given no cache (`GradientCheckpointingLayer` of transformers 5)."""
        return self.peft_type in CACHE_FILLING

    @property
    def tells_tasks_apart(self) -> bool:
        """Whether it trains something of its own for each task."""
        return "num_tasks" in self.takes.values()

    @property
    def has_rank(self) -> bool:
        """Whether `lora_rank` decides how large its adapters are."""
        return "lora_rank" in self.takes.values() or self.name == "bottleneck"

    def check_base(self, quantization: str, peft_config: Sequence[str]) -> None:
        """Raises InputError where PEFT does not have the method on a base held so."""
        if self.peft_type is not None:
            values = {**self.peft_options, **read_options(peft_config)}
            options = PeftOptions(method=self.name, peft_type=self.peft_type, values=values)
            check_quantization(quantization, options)

    def count(self, model: ModelSpec, settings: MethodSettings) -> Trained:
        """What is trained of `model`, and what is added to it.

        Raises InputError for modules and options that PEFT refuses or that are not modelled.
        """
        return self.counted_by(model, settings, self.options(settings))

    def options(self, settings: MethodSettings) -> PeftOptions:
        """The options of PEFT's configuration: its own, the plan's, the method's, given ones."""
        if self.peft_type is None:
            return PeftOptions(method=self.name, peft_type="", values={})
        settled = {
            option: getattr(settings, setting)
            for option, setting in self.takes.items()
            if setting in _SETTLED and getattr(settings, setting) is not None
        }
        given = read_options(settings.peft_config)
        if settings.modules_to_save:
            given = {"modules_to_save": list(settings.modules_to_save), **given}
        settled = {**self.peft_options, **settled}
        settled |= derived_options(self.peft_type, settings.lora_rank, given)
        options = resolve_options(self.name, self.peft_type, settled, given)
        return structs.replace(options, num_trained_tokens=settings.num_trained_tokens)


def derived_options(
    peft_type: str | None, lora_rank: int, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Options of PEFT that follow from a setting which is none of its own."""
    if peft_type != "ADALORA":
        return {}
    return {"init_r": adalora_first_rank(given.get("target_r", lora_rank))}


_TARGETS = {"target_modules": "target_modules"}
_LORA_BESIDE_RANK = {"lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", **_TARGETS}
_LORA = {"r": "lora_rank", **_LORA_BESIDE_RANK}
_RANK = {"r": "lora_rank", **_TARGETS}
_RANK_ALPHA = {"alpha": "lora_alpha", **_RANK}

_BASE_METHODS = (
    Method(
        name="lora",
        title="LoRA",
        trains="low-rank adapters on the linear layers; the base is frozen",
        source="Hu et al. 2021, arXiv 2106.09685",
        counted_by=adapter_count,
        adapter=True,
        peft_type="LORA",
        takes=_LORA,
    ),
    Method(
        name="qlora",
        title="QLoRA",
        trains="low-rank adapters; the frozen base is held in 4 bits",
        source="Dettmers et al. 2023, arXiv 2305.14314",
        counted_by=adapter_count,
        adapter=True,
        quantized_base=True,
        peft_type="LORA",
        takes=_LORA,
    ),
    Method(
        name="freeze",
        title="Freeze",
        trains="the last layers; the others, embeddings and head are frozen",
        source="Lee et al. 2019, arXiv 1911.03090",
        counted_by=freeze_count,
    ),
    Method(
        name="full",
        title="Full",
        trains="every parameter",
        source="the plain method",
        counted_by=full_count,
    ),
    Method(
        name="bitfit",
        title="BitFit",
        trains="the biases: those there are, or those that the architecture can have",
        source="Ben Zaken et al. 2021, arXiv 2106.10199",
        counted_by=bitfit_count,
    ),
    Method(
        name="bottleneck",
        title="Bottleneck adapters",
        trains="small networks behind attention and feed-forward of each layer",
        source="Houlsby et al. 2019, arXiv 1902.00751",
        counted_by=bottleneck_count,
        adapter=True,
    ),
)

# What is compared where no method is asked for.
COMPARED_METHODS: tuple[str, ...] = ("lora", "qlora", "freeze", "full")


def _peft(
    peft_type: str,
    title: str,
    trains: str,
    source: str,
    takes: Mapping[str, str],
    *,
    name: str | None = None,
    counted_by: CountedBy = adapter_count,
    quantized_base: bool = False,
    **options: Any,
) -> Method:
    """A method of PEFT that is known by its options."""
    return Method(
        name=name or peft_type.lower().replace("_", "-"),
        title=title,
        trains=trains,
        source=source,
        counted_by=counted_by,
        adapter=True,
        quantized_base=quantized_base,
        peft_type=peft_type,
        peft_options=options,
        takes=takes,
    )


# Every other method of PEFT 0.21 for causal language models but four: X-LoRA mixes adapters that
# are trained already; AdaMSS and FRoD take their shapes from the values of the weights; CPT is
# made of the examples of one task. Tokens of a prompt: 20, as in PEFT's examples. Tasks of Poly:
# two, the fewest that are several.
_PEFT_METHODS = (
    _peft(
        "LORA",
        "DoRA",
        "low-rank adapters, and the length of each row of the weights",
        "Liu et al. 2024, arXiv 2402.09353",
        _LORA,
        name="dora",
        use_dora=True,
    ),
    _peft(
        "LORA",
        "rsLoRA",
        "low-rank adapters, scaled by the root of their rank",
        "Kalajdzievski 2023, arXiv 2312.03732",
        _LORA,
        name="rslora",
        use_rslora=True,
    ),
    _peft(
        "LORA",
        "PiSSA",
        "low-rank adapters that begin as the principal part of the weights",
        "Meng et al. 2024, arXiv 2404.02948",
        _LORA,
        name="pissa",
        init_lora_weights="pissa",
    ),
    _peft(
        "LORA",
        "LoftQ",
        "low-rank adapters that begin as what quantization takes from the weights",
        "Li et al. 2023, arXiv 2310.08659",
        _LORA,
        name="loftq",
        quantized_base=True,
    ),
    _peft(
        "LORA",
        "LoRA+",
        "low-rank adapters, the second matrix at a higher learning rate",
        "Hayou et al. 2024, arXiv 2402.12354",
        _LORA,
        name="lora-plus",
    ),
    _peft(
        "LORA",
        "LoRA-FA",
        "the second matrix of low-rank adapters; the first stays as it began",
        "Zhang et al. 2023, arXiv 2308.03303",
        _LORA,
        name="lora-fa",
        counted_by=lora_fa_count,
    ),
    _peft(
        "LORA",
        "ReLoRA",
        "low-rank adapters that are merged and begun anew many times",
        "Lialin et al. 2023, arXiv 2307.05695",
        _LORA,
        name="relora",
    ),
    _peft(
        "LORA",
        "PLoRA",
        "low-rank adapters that are merged and begun anew stage by stage",
        "Meng et al. 2024, arXiv 2402.16141",
        _LORA,
        name="plora",
    ),
    _peft(
        "LORA",
        "LoRA-drop",
        "low-rank adapters; once the layers are known that matter, the others share one",
        "Zhou et al. 2024, arXiv 2402.07721",
        _LORA,
        name="lora-drop",
    ),
    _peft(
        "ADALORA",
        "AdaLoRA",
        "low-rank adapters, whose ranks shrink where they matter least",
        "Zhang et al. 2023, arXiv 2303.10512",
        {**_LORA_BESIDE_RANK, "target_r": "lora_rank"},
    ),
    _peft(
        "LOHA",
        "LoHa",
        "products of two low-rank matrices, element by element",
        "Hyeon-Woo et al. 2021, arXiv 2108.06098",
        _RANK_ALPHA,
    ),
    _peft(
        "LOKR",
        "LoKr",
        "Kronecker products of small matrices",
        "Yeh et al. 2023, arXiv 2309.14859",
        _RANK_ALPHA,
    ),
    _peft(
        "IA3",
        "IA3",
        "a factor for each key, value and feed-forward channel",
        "Liu et al. 2022, arXiv 2205.05638",
        {},
        counted_by=ia3_count,
    ),
    _peft(
        "VERA",
        "VeRA",
        "two vectors a layer around random matrices that all layers share",
        "Kopiczko et al. 2023, arXiv 2310.11454",
        _TARGETS,
    ),
    _peft(
        "PVERA",
        "PVeRA",
        "VeRA with a distribution in the place of a value",
        "arXiv 2512.07703",
        _TARGETS,
    ),
    _peft(
        "OFT",
        "OFT",
        "orthogonal blocks that turn the weights",
        "Qiu et al. 2023, arXiv 2306.07280",
        _TARGETS,
    ),
    _peft(
        "BOFT",
        "BOFT",
        "orthogonal butterfly factors that turn the weights",
        "Liu et al. 2023, arXiv 2311.06243",
        _TARGETS,
    ),
    _peft(
        "PSOFT",
        "PSOFT",
        "an orthogonal turn within the principal subspace of the weights",
        "openreview FSHrinMArK",
        {"r": "lora_rank", "psoft_alpha": "lora_alpha", **_TARGETS},
    ),
    _peft(
        "HRA",
        "HRA",
        "a chain of Householder reflections",
        "Yuan et al. 2024, arXiv 2405.17484",
        _RANK,
    ),
    _peft(
        "FOURIERFT",
        "FourierFT",
        "some frequencies of the change of each weight",
        "Gao et al. 2024, arXiv 2405.03003",
        _TARGETS,
    ),
    _peft(
        "WAVEFT",
        "WaveFT",
        "some wavelet coefficients of the change of each weight",
        "Bilican et al. 2025, arXiv 2505.12532",
        _TARGETS,
    ),
    _peft("C3A", "C3A", "circular convolutions", "Chen et al. 2024, arXiv 2407.19342", _TARGETS),
    _peft(
        "ROAD",
        "RoAd",
        "rotations of pairs of results",
        "Liao and Monz 2024, arXiv 2409.00119",
        _TARGETS,
    ),
    _peft(
        "MISS",
        "MiSS",
        "one small matrix shared by the rows of a weight",
        "Kang and Yin 2024, arXiv 2409.15371",
        _RANK,
    ),
    _peft(
        "RANDLORA",
        "RandLoRA",
        "scales of random low-rank bases that all layers share",
        "Albert et al. 2025, arXiv 2502.00987",
        _RANK,
    ),
    _peft(
        "VBLORA",
        "VB-LoRA",
        "mixtures of vectors from a bank that all layers share",
        "Li et al. 2024, arXiv 2405.15179",
        _TARGETS,
    ),
    _peft(
        "UNILORA",
        "Uni-LoRA",
        "one vector, projected to the adapters of all layers",
        "Li et al. 2025, arXiv 2506.00799",
        _TARGETS,
    ),
    _peft(
        "TINYLORA",
        "TinyLoRA",
        "a few numbers a layer within the singular space of the weights",
        "arXiv 2602.04118",
        _TARGETS,
    ),
    _peft(
        "HIRA",
        "HiRA",
        "low-rank matrices that scale the weights element by element",
        "Huang et al., ICLR 2025",
        _RANK,
    ),
    _peft(
        "DELORA",
        "DeLoRA",
        "low-rank adapters of bounded length",
        "Bini et al. 2025, arXiv 2503.18225",
        _RANK,
    ),
    _peft(
        "GRALORA",
        "GraLoRA",
        "low-rank adapters for blocks of the weights",
        "Jung et al. 2025, arXiv 2505.20355",
        _RANK_ALPHA,
    ),
    _peft(
        "GLORA",
        "GLoRA",
        "low-rank changes of weights, inputs and biases",
        "Chavan et al. 2023, arXiv 2306.07967",
        _RANK,
    ),
    _peft(
        "LILY",
        "Lily",
        "low-rank adapters whose halves are shared between layers",
        "arXiv 2407.09946",
        _RANK,
    ),
    _peft(
        "DEFT",
        "DEFT",
        "a low-rank projection and what is put in its place",
        "PEFT 0.21, tuners/deft",
        _RANK_ALPHA,
    ),
    _peft("PEANUT", "PEANuT", "small networks of the weights", "arXiv 2410.01870", _RANK),
    _peft(
        "SHIRA",
        "SHiRA",
        "a sparse share of the weights themselves",
        "Bhardwaj et al. 2024, arXiv 2406.13175",
        _RANK,
    ),
    _peft(
        "SUPERTUNING",
        "Super-Tuning",
        "a sparse share of the weights, chosen by size",
        "arXiv 2607.09287",
        _TARGETS,
    ),
    _peft(
        "OSF",
        "OSF",
        "the lesser half of the singular space of the weights",
        "Nayak et al. 2025, arXiv 2504.07097",
        _TARGETS,
    ),
    _peft(
        "BEFT",
        "BEFT",
        "biases added to the chosen layers",
        "arXiv 2509.15974",
        {},
        counted_by=beft_count,
    ),
    _peft(
        "LN_TUNING",
        "LayerNorm tuning",
        "the norms",
        "Zhao et al. 2023, arXiv 2312.11420",
        {},
        counted_by=norms_count,
    ),
    _peft(
        "TRAINABLE_TOKENS",
        "Trainable tokens",
        "the embeddings of some tokens",
        "PEFT 0.21, tuners/trainable_tokens",
        {},
        counted_by=tokens_count,
        token_indices=[0],
    ),
    _peft(
        "PROMPT_TUNING",
        "Prompt tuning",
        "embeddings in front of the input",
        "Lester et al. 2021, arXiv 2104.08691",
        {},
        counted_by=prompt_count,
        num_virtual_tokens=20,
    ),
    _peft(
        "P_TUNING",
        "P-tuning",
        "a network that makes embeddings in front of the input",
        "Liu et al. 2021, arXiv 2103.10385",
        {},
        counted_by=p_tuning_count,
        num_virtual_tokens=20,
    ),
    _peft(
        "MULTITASK_PROMPT_TUNING",
        "Multitask prompt tuning",
        "a shared prompt and a low-rank change of it for each task",
        "Wang et al. 2023, arXiv 2303.02861",
        {"num_tasks": "num_tasks"},
        counted_by=multitask_prompt_count,
        num_virtual_tokens=20,
    ),
    _peft(
        "PREFIX_TUNING",
        "Prefix tuning",
        "keys and values in front of those of each layer",
        "Li and Liang 2021, arXiv 2101.00190",
        {},
        counted_by=prefix_count,
        num_virtual_tokens=20,
    ),
    _peft(
        "PREFIX_TUNING",
        "P-tuning v2",
        "keys and values in front of those of each layer, without a network that makes them",
        "Liu et al. 2021, arXiv 2110.07602",
        {},
        name="p-tuning-v2",
        counted_by=prefix_count,
        num_virtual_tokens=20,
        prefix_projection=False,
    ),
    _peft(
        "CARTRIDGE",
        "Cartridges",
        "a key-value cache in front of the input",
        "Eyuboglu et al. 2025, arXiv 2506.06266",
        {},
        counted_by=cartridge_count,
        num_virtual_tokens=20,
    ),
    _peft(
        "ADAPTION_PROMPT",
        "LLaMA-Adapter",
        "prompts in the last layers, with gates that begin at zero",
        "Zhang et al. 2023, arXiv 2303.16199",
        {},
        counted_by=adaption_prompt_count,
        adapter_len=10,
    ),
    _peft(
        "POLY",
        "Poly",
        "mixtures of adapters, chosen by task",
        "Ponti et al. 2022, arXiv 2202.13914",
        {**_RANK, "n_tasks": "num_tasks"},
        n_tasks=2,
    ),
    _peft(
        "SHADOW",
        "ShadowPEFT",
        "a small network beside the layers",
        "PEFT 0.21, tuners/shadow",
        {},
        counted_by=shadow_count,
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in (*_BASE_METHODS, *_PEFT_METHODS)}


def resolve_method(name: str) -> Method:
    """The method of that name; raises UnknownNameError with the nearest ones."""
    method = METHODS.get(name.lower().replace("_", "-"))
    if method is None:
        raise UnknownNameError("method", name, METHODS)
    return method
