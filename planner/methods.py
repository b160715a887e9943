"""The fine-tuning methods: one entry each.

`launcher/training/build.py` builds a method from its entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.trained import (
    MethodSettings,
    Trained,
    freeze_count,
    full_count,
    lora_count,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A way to fine-tune.

    `adapter`: small matrices are trained beside a frozen base.
    `quantized_base`: that base is held in 4 or 8 bits.
    `counted_by`: the closed form of what is trained; None where only a dry run knows.
    `peft_type`: PEFT's name of it; None where PEFT has no part in it.
    `peft_options`: options of PEFT's configuration that make the method.
    `takes`: which option of that configuration takes which setting of the plan.
    """

    name: str
    title: str
    trains: str
    source: str
    counted_by: Callable[[ModelSpec, MethodSettings], Trained] | None = None
    adapter: bool = False
    quantized_base: bool = False
    peft_type: str | None = None
    peft_options: Mapping[str, Any] = field(default_factory=dict)
    takes: Mapping[str, str] = field(default_factory=dict)

    def check_counted(self) -> None:
        """Raises InputError where there is no closed form of what is trained."""
        if self.counted_by is None:
            raise InputError(
                f"method `{self.name}` has no closed form",
                "`ftplan estimate MODEL --exact` carries out its step; to plan or launch, take "
                "another method",
            )

    def count(self, model: ModelSpec, settings: MethodSettings) -> Trained:
        """What is trained of `model`; raises InputError where there is no closed form of it."""
        self.check_counted()
        assert self.counted_by is not None
        return self.counted_by(model, settings)


_TARGETS = {"target_modules": "target_modules"}
_LORA = {"r": "lora_rank", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", **_TARGETS}
_RANK = {"r": "lora_rank", **_TARGETS}
_RANK_ALPHA = {"alpha": "lora_alpha", **_RANK}

_BASE_METHODS = (
    Method(
        name="lora",
        title="LoRA",
        trains="low-rank adapters on the linear layers; the base is frozen",
        source="Hu et al. 2021, arXiv 2106.09685",
        counted_by=lora_count,
        adapter=True,
        peft_type="LORA",
        takes=_LORA,
    ),
    Method(
        name="qlora",
        title="QLoRA",
        trains="low-rank adapters; the frozen base is held in 4 bits",
        source="Dettmers et al. 2023, arXiv 2305.14314",
        counted_by=lora_count,
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
        trains="the biases; models that have some only",
        source="Ben Zaken et al. 2021, arXiv 2106.10199",
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
    counted_by: Callable[[ModelSpec, MethodSettings], Trained] | None = None,
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
        counted_by=lora_count,
        use_rslora=True,
    ),
    _peft(
        "LORA",
        "PiSSA",
        "low-rank adapters that begin as the principal part of the weights",
        "Meng et al. 2024, arXiv 2404.02948",
        _LORA,
        name="pissa",
        counted_by=lora_count,
        init_lora_weights="pissa",
    ),
    _peft(
        "ADALORA",
        "AdaLoRA",
        "low-rank adapters, whose ranks shrink where they matter least",
        "Zhang et al. 2023, arXiv 2303.10512",
        {**_LORA, "target_r": "lora_rank"},
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
    _peft("BEFT", "BEFT", "biases added to the chosen layers", "arXiv 2509.15974", {}),
    _peft("LN_TUNING", "LayerNorm tuning", "the norms", "Zhao et al. 2023, arXiv 2312.11420", {}),
    _peft(
        "TRAINABLE_TOKENS",
        "Trainable tokens",
        "the embeddings of some tokens",
        "PEFT 0.21, tuners/trainable_tokens",
        {},
        token_indices=[0],
    ),
    _peft(
        "PROMPT_TUNING",
        "Prompt tuning",
        "embeddings in front of the input",
        "Lester et al. 2021, arXiv 2104.08691",
        {},
        num_virtual_tokens=20,
    ),
    _peft(
        "P_TUNING",
        "P-tuning",
        "a network that makes embeddings in front of the input",
        "Liu et al. 2021, arXiv 2103.10385",
        {},
        num_virtual_tokens=20,
    ),
    _peft(
        "MULTITASK_PROMPT_TUNING",
        "Multitask prompt tuning",
        "a shared prompt and a low-rank change of it for each task",
        "Wang et al. 2023, arXiv 2303.02861",
        {},
        num_virtual_tokens=20,
    ),
    _peft(
        "PREFIX_TUNING",
        "Prefix tuning",
        "keys and values in front of those of each layer",
        "Li and Liang 2021, arXiv 2101.00190",
        {},
        num_virtual_tokens=20,
    ),
    _peft(
        "CARTRIDGE",
        "Cartridges",
        "a key-value cache in front of the input",
        "Eyuboglu et al. 2025, arXiv 2506.06266",
        {},
        num_virtual_tokens=20,
    ),
    _peft(
        "ADAPTION_PROMPT",
        "LLaMA-Adapter",
        "prompts in the last layers, with gates that begin at zero",
        "Zhang et al. 2023, arXiv 2303.16199",
        {},
        adapter_len=10,
    ),
    _peft(
        "POLY",
        "Poly",
        "mixtures of adapters, chosen by task",
        "Ponti et al. 2022, arXiv 2202.13914",
        _RANK,
        n_tasks=2,
    ),
    _peft(
        "SHADOW", "ShadowPEFT", "a small network beside the layers", "PEFT 0.21, tuners/shadow", {}
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in (*_BASE_METHODS, *_PEFT_METHODS)}


def resolve_method(name: str) -> Method:
    """The method of that name; raises UnknownNameError with the nearest ones."""
    method = METHODS.get(name.lower().replace("_", "-"))
    if method is None:
        raise UnknownNameError("method", name, METHODS)
    return method
