"""What PEFT's methods add to linear modules, tensor by tensor, as PEFT 0.21 builds them.

Each function has the shapes beside one module; each class of `peft/tuners/<method>/layer.py` is
the source. Names are PEFT's, without the adapter's own (`default`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct, structs

from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.model_spec import Layer, Linear, ModelSpec, Parameter
from ftplan.planner.peft_options import PeftOptions
from ftplan.planner.trained import (
    ALL_LINEAR,
    EXPERT_NAMES,
    LM_HEAD,
    STACKED_MODEL_TYPES,
    MethodSettings,
    Tally,
    Trained,
    embedding_name,
    kinds_of,
    layer_modules,
    outer_modules,
    targeted_linears,
)

Shape = tuple[int, ...]
_Paths = Mapping[str, Mapping[str, Shape]]


class Tensors(Struct, frozen=True, kw_only=True):
    """What a method adds in one place: trained, not trained, and tables of whole numbers."""

    trained: Mapping[str, Shape]
    frozen: Mapping[str, Shape] = {}
    index_bytes: int = 0


_INT32, _INT64 = 4, 8

# transformers' Conv1D in the place of linear modules, and PEFT's methods that do not know it.
CONV1D_MODEL_TYPES = ("gpt2",)
_LINEAR_ONLY = frozenset(
    (
        *("LOHA", "LOKR", "OFT", "BOFT", "PSOFT", "HRA", "C3A", "ROAD", "MISS", "DELORA"),
        *("GLORA", "LILY", "PEANUT", "SHIRA", "SUPERTUNING", "OSF", "POLY", "BEFT"),
    )
)


# What PEFT decomposes or measures weights for, which must not be quantized; and what it takes the
# packed numbers of 4-bit weights for weights with.
_UNQUANTIZED = frozenset(("DELORA", "GLORA", "OSF", "PSOFT", "TINYLORA"))
# Their layers add in place to what bitsandbytes' int8 product gives, a view that autograd lets
# nobody change (bitsandbytes 0.50, `MatMul8bitLt.forward`; peft, tuners/*/layer.py).
_ADDING_IN_PLACE = frozenset(("C3A", "GRALORA", "POLY"))
_NOT_PACKED = frozenset(("DEFT", "HRA", "LOHA", "LOKR", "PEANUT", "SUPERTUNING"))

# PEFT's own targets where the method is given none: `TRANSFORMERS_MODELS_TO_..._MAPPING` of
# peft/utils/constants.py, for decoders. Of IA3, the second list are its feed-forward modules.
IA3_TARGETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bloom": (("query_key_value", "mlp.dense_4h_to_h"), ("mlp.dense_4h_to_h",)),
    "falcon": (("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",)),
    "gemma": (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    "gemma2": (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    "gemma3_text": (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    "gpt2": (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
    "gpt_bigcode": (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
    "gpt_neo": (("q_proj", "v_proj", "c_proj"), ("c_proj",)),
    "gpt_neox": (("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",)),
    "gptj": (("q_proj", "v_proj", "fc_out"), ("fc_out",)),
    "llama": (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "llama4": (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    "mistral": (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "mixtral": (("k_proj", "v_proj", "w2"), ("w2",)),
    "opt": (("q_proj", "k_proj", "fc2"), ("fc2",)),
    "phi": (("q_proj", "v_proj", "fc2"), ("fc2",)),
    "qwen2": (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    "qwen3": (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
}
BEFT_MODEL_TYPES = frozenset(
    (
        *("gemma", "gemma2", "gemma3_text", "gpt_neo", "gptj", "llama", "llama4", "mistral"),
        *("mixtral", "opt", "phi", "qwen2", "qwen3"),
    )
)


# How LoRA's matrices begin without another shape than usual; EVA shares ranks out by the data.
# The first two decompose weights.
_DECOMPOSED = ("orthogonal", "pissa")
_LORA_BEGINNINGS = (*_DECOMPOSED, "gaussian", "loftq", "olora", True, False)


# --- one linear module


def _lora(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    """A (rank x in) and B (out x rank): Hu et al. 2021 (arXiv 2106.09685), section 4.1."""
    if not str(o.values["init_lora_weights"]).startswith("pissa_niter_"):
        o.one_of("init_lora_weights", *_LORA_BEGINNINGS)
    trained = _pair("lora_A.weight", "lora_B.weight", linear, rank)
    if o.flag("lora_bias"):
        if o.flag("use_dora") or not isinstance(o.values["init_lora_weights"], bool):
            raise o.refused("lora_bias", "DoRA has none, nor have matrices that begin otherwise")
        trained["lora_B.bias"] = (linear.out_features,)
    if o.flag("use_dora"):
        trained["lora_magnitude_vector.weight"] = (linear.out_features,)
    return Tensors(trained=trained)


def _lora_fa(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    """A stays as it began: Zhang et al. 2023 (arXiv 2308.03303)."""
    trained = dict(_lora(linear, o, rank).trained)
    return Tensors(frozen={"lora_A.weight": trained.pop("lora_A.weight")}, trained=trained)


def _pair(first: str, second: str, linear: Linear, rank: int) -> dict[str, Shape]:
    return {first: (rank, linear.in_features), second: (linear.out_features, rank)}


def _adalora(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    """As it begins, before ranks shrink: Zhang et al. 2023 (arXiv 2303.10512). PEFT's cast of
    adapters to fp32 would train the rank's number too, which no file holds: training does not
    (`launcher/training/adapters.py`)."""
    trained = _pair("lora_A", "lora_B", linear, rank)
    return Tensors(trained={**trained, "lora_E": (rank, 1)}, frozen={"ranknum": (1,)})


def _loha(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    left, right = (linear.out_features, rank), (rank, linear.in_features)
    return Tensors(
        trained={"hada_w1_a": left, "hada_w1_b": right, "hada_w2_a": left, "hada_w2_b": right}
    )


def _lokr(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    factor = o.values["decompose_factor"]
    if factor != -1:
        factor = o.count("decompose_factor")
    (out_1, out_2), (in_1, in_2) = (
        _factors(side, factor) for side in (linear.out_features, linear.in_features)
    )
    trained: dict[str, Shape] = {}
    if o.flag("decompose_both") and rank < max(out_1, in_1) / 2:
        trained |= {"lokr_w1_a": (out_1, rank), "lokr_w1_b": (rank, in_1)}
    else:
        trained["lokr_w1"] = (out_1, in_1)
    if rank < max(out_2, in_2) / 2:
        trained |= {"lokr_w2_a": (out_2, rank), "lokr_w2_b": (rank, in_2)}
    else:
        trained["lokr_w2"] = (out_2, in_2)
    return Tensors(trained=trained)


def _factors(side: int, factor: int) -> tuple[int, int]:
    """Two factors of a side, the lesser first: the nearest to its root, up to `factor`.

    A `factor` that divides the side is taken as it is (PEFT's `lokr.layer.factorization`).
    """
    if factor > 0 and side % factor == 0:
        return factor, side // factor
    most = math.isqrt(side) if factor == -1 else min(math.isqrt(side), factor)
    lesser = next(f for f in range(most, 0, -1) if side % f == 0)
    return lesser, side // lesser


def _ia3(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    return Tensors(trained={"ia3_l": (linear.out_features, 1)})


def _ia3_feed_forward(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    return Tensors(trained={"ia3_l": (1, linear.in_features)})


def _vera(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    return Tensors(trained={"vera_lambda_b": (linear.out_features,), "vera_lambda_d": (rank,)})


def _pvera(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    return Tensors(
        trained={"pvera_lambda_b": (linear.out_features,), "pvera_lambda_d": (2 * rank,)}
    )


def _oft(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    """Skew-symmetric blocks along the input, and where their upper triangle's numbers go."""
    block = oft_block(linear, o)
    numbers = block * (block - 1) // 2
    shared = 1 if o.flag("block_share") else linear.in_features // block
    return Tensors(trained={"oft_R.weight": (shared, numbers)}, index_bytes=2 * numbers * _INT64)


def oft_block(linear: Linear, o: PeftOptions) -> int:
    """The side of OFT's blocks."""
    side, blocks = linear.in_features, o.count("r", least=0)
    block = o.count("oft_block_size", least=0)
    if (blocks == 0) == (block == 0):
        raise o.refused("oft_block_size", "one of `r` and it must be 0")
    return side // _nearest_divisor(side, blocks) if blocks else _nearest_divisor(side, block)


def _nearest_divisor(side: int, wanted: int) -> int:
    """The divisor of a side nearest to what is wanted (PEFT's `adjust_oft_parameters`)."""
    if side % wanted == 0:
        return wanted
    higher = next((d for d in range(wanted, side + 1) if side % d == 0), side)
    lower = next((d for d in range(min(wanted, side), 1, -1) if side % d == 0), 1)
    return lower if wanted - lower <= higher - wanted else higher


def _boft(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    """One butterfly factor, and the permutation in full."""
    side, block = linear.in_features, o.count("boft_block_size", least=0)
    blocks = o.count("boft_block_num", least=0)
    if (blocks == 0) == (block == 0):
        raise o.refused("boft_block_num", "one of `boft_block_size` and it must be 0")
    if block:
        _check_divides(o, "boft_block_size", linear.name, side)
    else:
        _check_divides(o, "boft_block_num", linear.name, side)
    block, blocks = block or side // blocks, blocks or side // block
    return Tensors(
        trained={"boft_R": (1, blocks, block, block), "boft_s": (linear.out_features, 1)},
        frozen={"boft_P": (1, side, side)},
    )


def _psoft(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    _check_at_most(o, "r", linear.name, min(linear.in_features, linear.out_features))
    numbers = rank * (rank - 1) // 2
    trained: dict[str, Shape] = {
        **({"psoft_R.weight": (numbers,)} if o.flag("psoft_orth") else {"psoft_R.R": (rank, rank)}),
        **({"psoft_R.vector_b": (rank,)} if o.flag("psoft_mag_b") else {}),
        **({"psoft_R.vector_a": (rank,)} if o.flag("psoft_mag_a") else {}),
    }
    return Tensors(
        trained=trained,
        frozen=_pair("_psoft_A_cache", "_psoft_B_cache", linear, rank),
        index_bytes=2 * numbers * _INT64 if o.flag("psoft_orth") else 0,
    )


def _hra(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    return Tensors(trained={"hra_u": (linear.in_features, rank)})


def _fourierft(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    _check_at_most(o, "n_frequency", linear.name, linear.num_weights)
    return Tensors(trained={"fourierft_spectrum": (o.count("n_frequency"),)})


def _waveft(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    _check_at_most(o, "n_frequency", linear.name, linear.num_weights)
    o.one_of("proportional_parameters", False)
    return Tensors(trained={"waveft_spectrum": (o.count("n_frequency"),)})


def _c3a(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    for side in (linear.in_features, linear.out_features):
        _check_divides(o, "block_size", linear.name, side)
    block = o.count("block_size")
    kernel = (linear.out_features // block, linear.in_features // block, block)
    return Tensors(trained={"c3a_kernel": kernel})


_ROAD_HALVES = {"road_1": 1, "road_2": 2, "road_4": 4}


def _road(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    _check_divides(o, "group_size", linear.name, linear.out_features)
    halves = _ROAD_HALVES[o.one_of("variant", *_ROAD_HALVES)]
    size = halves * linear.out_features // 2
    return Tensors(trained={"road_theta": (size,), "road_alpha": (size,)})


def _miss(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    _check_at_most(o, "r", linear.name, linear.in_features)
    kind, width = o.one_of("init_weights", True, False, "bat", "mini"), linear.out_features
    if kind == "bat":
        for side in (linear.in_features, linear.out_features):
            _check_divides(o, "r", linear.name, side)
        return Tensors(trained={"miss_block": (width // rank, rank, rank)})
    if kind == "mini":
        _check_divides(o, "mini_r", linear.name, width)
        width = o.count("mini_r")
    return Tensors(trained={"miss_block": (rank, width)})


def _randlora(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    lesser = min(linear.in_features, linear.out_features)
    bases = math.ceil(lesser / rank)
    return Tensors(trained={"randlora_lambda": (rank, bases), "randlora_gamma": (bases, lesser)})


def _vblora(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    for side in (linear.in_features, linear.out_features):
        _check_divides(o, "vector_length", linear.name, side)
    length, vectors = o.count("vector_length"), o.count("num_vectors")
    return Tensors(
        trained={
            "vblora_logits_A": (rank, linear.in_features // length, vectors),
            "vblora_logits_B": (linear.out_features // length, rank, vectors),
        }
    )


def _unilora(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    places = rank * (linear.in_features + linear.out_features)
    scales = _pair("unilora_scales_A", "unilora_scales_B", linear, rank)
    return Tensors(trained={}, frozen=scales, index_bytes=places * _INT64)


def _tinylora(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    rank = min(rank, linear.in_features, linear.out_features)
    frozen = _pair("tinylora_A", "tinylora_B", linear, rank)
    return Tensors(trained={}, frozen={**frozen, "tinylora_P": (o.count("u"), rank, rank)})


def _hira(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    return Tensors(trained=_pair("hira_A", "hira_B", linear, rank))


def _delora(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    trained = _pair("delora_A", "delora_B", linear, rank)
    return Tensors(
        trained={**trained, "delora_lambda": (1,)}, frozen={"delora_w_norm": (linear.in_features,)}
    )


def _gralora(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    parts, general = o.count("gralora_k"), o.count("hybrid_r", least=0)
    for side in (linear.in_features, linear.out_features):
        _check_divides(o, "gralora_k", linear.name, side)
    trained: dict[str, Shape] = {
        "gralora_A": (parts, linear.in_features // parts, rank),
        "gralora_B": (parts, rank, linear.out_features // parts),
    }
    if general:
        names = ("gralora_A_general.weight", "gralora_B_general.weight")
        trained |= _pair(*names, linear, general)
    return Tensors(trained=trained)


def _glora(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    """Paths A and B change the weight; C, D and E change a bias, zeros where there is none."""
    wide, deep = linear.out_features, linear.in_features
    weight: _Paths = {
        "lora": {"Xd": (wide, rank), "Xu": (rank, deep)},
        "vector": {"X": (wide, 1)},
        "constant": {"X": (1,)},
    }
    inputs: _Paths = {"lora": {"Xd": (deep, rank), "Xu": (rank, 1)}, "vector": {"X": (deep, 1)}}
    results: _Paths = {"vector": {"X": (wide,)}, "constant": {"X": (1,)}}
    paths: tuple[tuple[str, str, _Paths, Shape], ...] = (
        ("AB", "config_A_B", weight, (wide, deep)),
        ("C", "config_C", inputs if linear.bias else {}, (deep, 1)),
        ("DE", "config_D_E", results if linear.bias else {}, (wide,)),
    )
    trained: dict[str, Shape] = {}
    frozen: dict[str, Shape] = {}
    for letters, option, kinds, zeros in paths:
        shapes = kinds.get(o.one_of(option, "lora", "vector", "constant", "none"))
        for letter in letters:
            if shapes is None:
                frozen[f"glora_{letter}.zeros"] = zeros
            else:
                trained |= {f"glora_{letter}.{name}": shape for name, shape in shapes.items()}
    return Tensors(trained=trained, frozen=frozen)


def _lily(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    return Tensors(trained={"lily_router.weight": (o.count("num_B"), rank)})


def _deft(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    rank = min(rank, linear.out_features)
    trained: dict[str, Shape] = {"deft_P": (linear.out_features, rank)}
    if not o.flag("para"):
        trained["deft_R"] = (rank, linear.in_features)
    return Tensors(trained=trained)


def _peanut(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    ends = {"peanut_A.weight": (rank, linear.out_features)}
    between = {
        f"peanut_{part}.{i}.weight": (rank, rank)
        for part in ("encoders", "decoders")
        for i in range(o.count("depth", least=0))
    }
    return Tensors(trained={**ends, **between, "peanut_B.weight": (linear.out_features, rank)})


def _shira(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    """As many of the weights as LoRA of that rank has numbers, and where they are."""
    o.one_of("mask_type", "random")
    places = rank * (linear.in_features + linear.out_features)
    if places > linear.num_weights:
        raise o.refused("r", f"`{linear.name}` has too few weights for it")
    return Tensors(trained={"shira_weight": (places,)}, index_bytes=2 * places * _INT32)


def _supertuning(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    o.one_of("r", None)
    chosen = int(linear.num_weights * (1 - o.share("sparsity")))
    if chosen < 1:
        raise o.refused("sparsity", f"nothing of `{linear.name}` is left to train")
    return Tensors(trained={"supertuning_values": (chosen,)}, index_bytes=chosen * _INT32)


def _osf(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    """The singular directions below the first `effective_rank`, which are kept."""
    wide, deep = linear.out_features, linear.in_features
    lesser = min(wide, deep)
    kept = o.values["effective_rank"]
    if kept is None:
        kept = lesser // 2
    elif isinstance(kept, float):
        kept = int(lesser * o.share("effective_rank"))
    else:
        kept = min(lesser, o.count("effective_rank"))
    low = lesser - kept
    shapes: dict[str, Shape] = {"U_low": (wide, low), "S_low": (low,), "V_low": (low, deep)}
    frozen: dict[str, Shape] = {f"_osf_{name}_init": shape for name, shape in shapes.items()}
    if wide > deep:
        frozen["_osf_U_high"] = (wide, kept)
    if wide < deep:
        frozen["_osf_V_high"] = (kept, deep)
    return Tensors(trained={f"osf_svd_params.{n}": s for n, s in shapes.items()}, frozen=frozen)


def _beft(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    return Tensors(trained={"beft_bias": (1, linear.out_features)})


def _poly(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
    tasks, skills, splits = (o.count(name) for name in ("n_tasks", "n_skills", "n_splits"))
    return Tensors(
        trained={
            "poly_router.module_logits": (tasks, splits * skills),
            "poly_lora_A": (splits, skills, linear.in_features // splits, rank),
            "poly_lora_B": (splits, skills, rank, linear.out_features // splits),
        }
    )


def _check_divides(o: PeftOptions, name: str, module: str, side: int) -> None:
    if side % o.count(name):
        raise o.refused(name, f"it does not divide a side of `{module}`, {side}")


def _check_at_most(o: PeftOptions, name: str, module: str, most: int) -> None:
    if o.count(name) > most:
        raise o.refused(name, f"`{module}` allows {most} at most")


# --- what all modules share, or several of them: trained, and not trained


class _Place(Struct, frozen=True):
    """Adapted linear modules of one shape and name, and how many there are."""

    linear: Linear
    times: int


_Two = tuple[list[Parameter], list[Parameter]]


def _vera_shared(places: Sequence[_Place], o: PeftOptions, rank: int) -> _Two:
    wide, deep = _largest(places)
    return [], _parameters("shared", {"vera_A": (rank, deep), "vera_B": (wide, rank)})


def _pvera_shared(places: Sequence[_Place], o: PeftOptions, rank: int) -> _Two:
    wide, deep = _largest(places)
    return [], _parameters("shared", {"pvera_A": (2 * rank, deep), "pvera_B": (wide, rank)})


def _randlora_shared(places: Sequence[_Place], o: PeftOptions, rank: int) -> _Two:
    lesser, greater = sorted(_largest(places))
    first, second = (rank, 1, lesser), (greater, math.ceil(lesser / rank), rank)
    return [], _parameters("shared", {"randlora_A": first, "randlora_B": second})


def _largest(places: Sequence[_Place]) -> tuple[int, int]:
    """The widest output and the widest input among the modules."""
    return (
        max(place.linear.out_features for place in places),
        max(place.linear.in_features for place in places),
    )


def _vblora_shared(places: Sequence[_Place], o: PeftOptions, rank: int) -> _Two:
    bank = (o.count("num_vectors"), o.count("vector_length"))
    return _parameters("shared", {"vblora_vector_bank": bank}), []


def _unilora_shared(places: Sequence[_Place], o: PeftOptions, rank: int) -> _Two:
    return _parameters("shared", {"unilora_theta_d": (o.count("theta_d_length"),)}), []


def _tinylora_shared(places: Sequence[_Place], o: PeftOptions, rank: int) -> _Two:
    """A vector for each group of modules; `weight_tying` is the share of modules that join one."""
    modules = sum(place.times for place in places)
    groups = max(1, round(modules * (1.0 - o.share("weight_tying"))))
    return [Parameter(name="shared.tinylora_v", shape=(o.count("u"),), count=groups)], []


def _lily_shared(places: Sequence[_Place], o: PeftOptions, rank: int) -> _Two:
    """One B for all modules of a name and shape, one A for each `stride_A` of them."""
    trained, parts = [], o.count("num_B")
    for place in places:
        name, linear = place.linear.name, place.linear
        blocks = math.ceil(place.times / o.count("stride_A"))
        trained += [
            Parameter(name=f"{name}.lily_B.weight", shape=(parts * rank, linear.out_features)),
            Parameter(name=f"{name}.lily_A.weight", shape=(rank, linear.in_features), count=blocks),
        ]
    return trained, []


# --- the whole model

_Beside = Callable[[Linear, PeftOptions, int], Tensors]
_Shared = Callable[[Sequence[_Place], PeftOptions, int], _Two]

_BESIDE: dict[str, _Beside] = {
    "LORA": _lora,
    "ADALORA": _adalora,
    "BEFT": _beft,
    "LOHA": _loha,
    "LOKR": _lokr,
    "VERA": _vera,
    "PVERA": _pvera,
    "OFT": _oft,
    "BOFT": _boft,
    "PSOFT": _psoft,
    "HRA": _hra,
    "FOURIERFT": _fourierft,
    "WAVEFT": _waveft,
    "C3A": _c3a,
    "ROAD": _road,
    "MISS": _miss,
    "RANDLORA": _randlora,
    "VBLORA": _vblora,
    "UNILORA": _unilora,
    "TINYLORA": _tinylora,
    "HIRA": _hira,
    "DELORA": _delora,
    "GRALORA": _gralora,
    "GLORA": _glora,
    "LILY": _lily,
    "DEFT": _deft,
    "PEANUT": _peanut,
    "SHIRA": _shira,
    "SUPERTUNING": _supertuning,
    "OSF": _osf,
    "POLY": _poly,
}
_SHARED: dict[str, _Shared] = {
    "VERA": _vera_shared,
    "PVERA": _pvera_shared,
    "RANDLORA": _randlora_shared,
    "VBLORA": _vblora_shared,
    "UNILORA": _unilora_shared,
    "TINYLORA": _tinylora_shared,
    "LILY": _lily_shared,
}


def tensors_beside(linear: Linear, options: PeftOptions, rank: int) -> Tensors:
    """What a method adds to this module alone; IA3's vector depends on the model."""
    beside = _BESIDE.get(options.peft_type)
    return beside(linear, options, rank) if beside else Tensors(trained={})


def scales_input(linear: Linear, trained: Trained) -> bool:
    """Whether IA3 scales this module's input, not its result."""
    name, shape = f"{linear.name}.ia3_l", (1, linear.in_features)
    return any(p.name == name and p.shape == shape for p in trained.adapters)


def adapter_count(model: ModelSpec, settings: MethodSettings, options: PeftOptions) -> Trained:
    """What PEFT adds to linear modules, and what of the model it trains besides.

    Raises InputError for modules and options that PEFT refuses, or that are not modelled.
    """
    check_quantization(settings.quantization, options)
    return _count(model, options, _BESIDE[options.peft_type])


def check_quantization(quantization: str, options: PeftOptions) -> None:
    """Raises InputError for a method that PEFT does not have beside quantized weights."""
    refusing = _UNQUANTIZED | (_ADDING_IN_PLACE if quantization == "int8" else _NOT_PACKED)
    decomposed = str(options.values.get("init_lora_weights")).startswith(_DECOMPOSED)
    if quantization != "none" and (options.peft_type in refusing or decomposed):
        raise InputError(
            f"PEFT does not have method `{options.method}` on a base quantized to {quantization}",
            "use `--quantization none`, or `--method qlora`",
        )


def lora_fa_count(model: ModelSpec, settings: MethodSettings, options: PeftOptions) -> Trained:
    check_quantization(settings.quantization, options)
    return _count(model, options, _lora_fa)


def ia3_count(model: ModelSpec, settings: MethodSettings, options: PeftOptions) -> Trained:
    """A factor for each result of a module, or for each input of a feed-forward one."""
    defaults = IA3_TARGETS.get(model.model_type, (None, None))
    targets, inputs = (
        default if options.names(name) is None else options.names(name)
        for name, default in zip(("target_modules", "feedforward_modules"), defaults, strict=True)
    )
    if targets is None or inputs is None:
        raise _no_default(options, model)
    scaled = {id(linear) for name in inputs for linear in _of_name(model, name)}

    def beside(linear: Linear, o: PeftOptions, rank: int) -> Tensors:
        return (_ia3_feed_forward if id(linear) in scaled else _ia3)(linear, o, rank)

    return _count(model, options, beside, targets)


def beft_count(model: ModelSpec, settings: MethodSettings, options: PeftOptions) -> Trained:
    targets = options.names("target_modules")
    if targets is None:
        if model.model_type not in BEFT_MODEL_TYPES:
            raise _no_default(options, model)
        targets = ("v_proj",)
    return _count(model, options, _beft, targets)


def _no_default(options: PeftOptions, model: ModelSpec) -> InputError:
    return InputError(
        f"PEFT has no modules of its own for method `{options.method}` on `{model.model_type}`",
        "name some with `--peft-config target_modules=[...]`, or use `--method lora`",
    )


def _count(
    model: ModelSpec,
    options: PeftOptions,
    beside: _Beside,
    default_targets: Sequence[str] | None = None,
) -> Trained:
    rank = _rank(options)
    ranks = _ranks(model, options)
    linears = _adapted_linears(model, options, default_targets)
    layers = _adapted_layers(model, options)
    kinds = kinds_of([model.layers[place] for place in layers])
    tally, frozen, index_bytes = Tally(), Tally(), 0
    times_of: dict[Linear, int] = {}
    adapted = []
    for layer, times in kinds.items():
        chosen = tuple(linear for linear in layer.linears if id(linear) in linears)
        if chosen:
            adapted.append((layer, chosen))
        for linear in chosen:
            tensors = beside(linear, options, ranks.get(linear.name, rank))
            tally.add(_parameters(linear.name, tensors.trained), times)
            frozen.add(_parameters(linear.name, tensors.frozen), times)
            index_bytes += times * tensors.index_bytes
            times_of[linear] = times_of.get(linear, 0) + times
    for linear, times in _adapted_others(model, options, linears).items():
        tensors = beside(linear, options, ranks.get(linear.name, rank))
        tally.add(_parameters(linear.name, tensors.trained), times)
        frozen.add(_parameters(linear.name, tensors.frozen), times)
        index_bytes += times * tensors.index_bytes
        times_of[linear] = times_of.get(linear, 0) + times
    if not adapted:
        raise InputError(
            f"method `{options.method}` is left without a module to adapt",
            "name other `--target-modules`, or fewer `--modules-to-save`",
        )
    shared = _SHARED.get(options.peft_type)
    if shared is not None:
        places = [_Place(linear, times) for linear, times in times_of.items()]
        shared_trained, shared_frozen = shared(places, options, rank)
        tally.add(shared_trained)
        frozen.add(shared_frozen)
    listed = len(options.numbers("trainable_token_indices") or ())
    num_tokens = options.num_trained_tokens or listed
    named = bool(options.num_trained_tokens)
    for ending in _rows_trained(model, num_tokens, named=named):
        trained_tokens, original = tokens_of(model, num_tokens, ending)
        tally.add([trained_tokens])
        frozen.add([original])
    return with_copies(
        model,
        options,
        Trained(
            own=_biases(model, options, adapted, kinds),
            adapters=tally.parameters(),
            frozen=frozen.parameters(),
            index_bytes=index_bytes,
            adapted=tuple(adapted),
            adapted_layers=layers,
            rank=rank,
            ranks=tuple(ranks.items()),
            num_trained_tokens=num_tokens,
            trains_head_rows=bool(num_tokens)
            and not model.scores
            and (named or model.tie_word_embeddings),
        ),
    )


def _parameters(prefix: str, shapes: Mapping[str, Shape]) -> list[Parameter]:
    return [Parameter(name=f"{prefix}.{name}", shape=shape) for name, shape in shapes.items()]


def _rank(options: PeftOptions) -> int:
    """The rank of the adapters; 0 for a method that has none (OFT's `r` are blocks)."""
    name = "init_r" if options.peft_type == "ADALORA" else "r"
    if options.values.get(name) is None or options.peft_type == "OFT":
        return 0
    return options.count(name)


def _ranks(model: ModelSpec, options: PeftOptions) -> dict[str, int]:
    """`rank_pattern`, of which only plain names of modules are modelled."""
    pattern = options.values.get("rank_pattern")
    if not pattern:
        return {}
    known = {linear.name for linear in model.linears}
    if not isinstance(pattern, Mapping) or not set(pattern) <= known:
        raise options.refused("rank_pattern", "the closed form needs names of modules and ranks")
    if not all(type(rank) is int and rank > 0 for rank in pattern.values()):
        raise options.refused("rank_pattern", "ranks are whole numbers from 1 up")
    return dict(pattern)


def _adapted_layers(model: ModelSpec, options: PeftOptions) -> tuple[int, ...]:
    chosen = options.numbers("layers_to_transform")
    if not chosen:
        return tuple(range(model.num_hidden_layers))
    return tuple(place for place in sorted(chosen) if place < model.num_hidden_layers)


def _adapted_linears(
    model: ModelSpec, options: PeftOptions, default_targets: Sequence[str] | None
) -> set[int]:
    """The modules that are adapted, by identity: those named, but for what is copied whole."""
    if model.model_type in CONV1D_MODEL_TYPES and options.peft_type in _LINEAR_ONLY:
        raise InputError(
            f"PEFT's {options.peft_type} adapts linear modules, and those of "
            f"`{model.model_type}` are of class Conv1D",
            "use `--method lora`",
        )
    named = options.names("target_modules")
    if named is None and default_targets is not None:
        found = [linear for name in default_targets for linear in _of_name(model, name)]
    else:
        found = list(targeted_linears(model, (ALL_LINEAR,) if named is None else named))
    if options.peft_type == "LORA" and model.model_type in STACKED_MODEL_TYPES:
        _check_no_experts(model, found)
    saved = options.names("modules_to_save") or ()
    return {id(linear) for linear in found if linear.name not in saved}


def _adapted_others(model: ModelSpec, options: PeftOptions, adapted: set[int]) -> dict[Linear, int]:
    """Modules outside of the text's layers, such as a vision tower's, that have the name of an
    adapted one and so an adapter too, and how many there are of each."""
    names = {linear.name for linear in model.linears if id(linear) in adapted}
    others = Counter(linear for linear in model.other_linears if linear.name in names)
    if others and (options.values.get("layers_to_transform") or options.peft_type == "IA3"):
        raise InputError(
            f"`{model.model_type}` has modules of these names outside of its decoder, where the "
            f"closed form does not model method `{options.method}` with these options",
            "`ftplan estimate MODEL --exact` carries out its step",
        )
    return others


def _check_no_experts(model: ModelSpec, linears: Sequence[Linear]) -> None:
    names = sorted({linear.name for linear in linears if linear.name in EXPERT_NAMES})
    if names:
        kept = {linear.name: None for linear in model.linears if linear.name not in EXPERT_NAMES}
        raise InputError(
            f"of `{model.model_type}`, PEFT adapts the stacked experts where it is given "
            f"{', '.join(f'`{name}`' for name in names)}, which the closed form does not model",
            f"use `--target-modules {','.join(kept)}`, or `ftplan estimate MODEL --exact`",
        )


def _of_name(model: ModelSpec, name: str) -> list[Linear]:
    """The linear modules of that name, none where there are none; `mlp.` before it: those of the
    feed-forward only."""
    block, _, last = name.rpartition(".")
    blocks = [layer.feed_forward if block == "mlp" else layer for layer in model.layer_counts]
    return [linear for part in blocks for linear in part.linears if linear.name == last]


def _biases(
    model: ModelSpec,
    options: PeftOptions,
    adapted: Sequence[tuple[Layer, tuple[Linear, ...]]],
    kinds: Mapping[Layer, int],
) -> tuple[Parameter, ...]:
    """The model's own biases that PEFT's option `bias` trains: all of its modules, or those of
    the adapted ones (`lora_only`). A stacked expert's bias is no module's."""
    kind = str(options.values.get("bias", "none"))
    tally = Tally()
    if kind == "all":
        for layer, times in model.layer_counts.items():
            tally.add((p for _, owned in layer_modules(layer) for p in owned if _is_bias(p)), times)
        outside = {p for owned in outer_modules(model).values() for p in owned if _is_bias(p)}
        tally.add(sorted(outside, key=lambda p: p.name))
    elif kind.endswith("_only"):
        for layer, linears in adapted:
            tally.add((p for m in linears for p in m.parameters() if _is_bias(p)), kinds[layer])
    elif kind != "none":
        raise options.refused("bias", "`none`, `all` or `lora_only` is needed")
    return tally.parameters()


def _is_bias(parameter: Parameter) -> bool:
    return parameter.name.endswith(".bias")


def with_copies(model: ModelSpec, options: PeftOptions, trained: Trained) -> Trained:
    """The same with the copies of whole modules, and the tokens' embeddings, that PEFT trains.

    `modules_to_save` takes every module whose path ends so: `norm` each norm of that ending.
    A tied module is copied apart from the other.
    """
    saved = options.names("modules_to_save")
    if not saved:
        return trained
    adapted = {linear.name for _, linears in trained.adapted for linear in linears}
    inside = [
        (name, owned, times)
        for layer, times in model.layer_counts.items()
        for name, owned in layer_modules(layer)
    ]
    outside = [(name, owned, 1) for name, owned in outer_modules(model).items()]
    tally, copied = Tally(), set[str]()
    for name, owned, times in inside + outside:
        if not name.endswith(saved):
            continue
        if name in adapted:
            raise options.refused("modules_to_save", f"`{name}` already carries an adapter")
        tally.add((_copy(name, p) for p in owned), times)
        copied.add(name)
    for ending in saved:
        if model.scores and LM_HEAD.endswith(ending):
            continue  # PEFT looks for it in vain and says nothing: `combinations.py` does
        if not any(name.endswith(ending) for name in copied):
            raise UnknownNameError("module to save", ending, {m[0] for m in inside + outside})
    everywhere = bool(copied.intersection(name for name, _, _ in inside))
    return structs.replace(
        trained,
        held_as_base=(*trained.held_as_base, *tally.parameters()),
        adapted_layers=(
            tuple(range(model.num_hidden_layers)) if everywhere else trained.adapted_layers
        ),
        trains_embeddings=embedding_name(model) in copied,
        trains_lm_head=LM_HEAD in copied,
        saved_modules=tuple(sorted(copied)),
    )


def _copy(module: str, parameter: Parameter) -> Parameter:
    """`lm_head.weight` as `lm_head.modules_to_save.weight`."""
    kind = parameter.name.rpartition(".")[2]
    return structs.replace(parameter, name=f"{module}.modules_to_save.{kind}")


def _rows_trained(model: ModelSpec, num_tokens: int, *, named: bool) -> tuple[str, ...]:
    """Modules whose rows are trained. PEFT ties those of a tied output projection to the
    embeddings'; of one that is not, named tokens train its own rows as well."""
    if not num_tokens:
        return ()
    if model.scores or not (named or model.tie_word_embeddings):
        return (embedding_name(model),)
    if model.lm_head_bias:
        raise InputError(
            f"PEFT leaves out the bias of `{LM_HEAD}` of {model.name} where rows of it are trained",
            f"use `--modules-to-save {embedding_name(model)},{LM_HEAD}`, which trains both whole",
        )
    tied = model.tie_word_embeddings
    return (embedding_name(model),) if tied else (embedding_name(model), LM_HEAD)


def tokens_of(model: ModelSpec, num_tokens: int, module: str) -> tuple[Parameter, Parameter]:
    """What is trained of these tokens' rows in a module, and their values as they were."""
    width = model.embedding_width or model.hidden_size
    shape = (num_tokens, width)
    return (
        Parameter(name=f"{module}.trainable_tokens_delta", shape=shape),
        Parameter(name=f"{module}.trainable_tokens_original", shape=shape),
    )
