"""PEFT's adapters by method: which puts what around a linear module, and what they hold besides.

LoRA itself is among `modules`; the others are in `adapter_products`, `adapter_rotations` and
`adapter_entries`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from msgspec import structs

from ftplan.planner import adapter_functions as g
from ftplan.planner import functions as f
from ftplan.planner.adapter import base_weight, bias_of
from ftplan.planner.adapter_counts import scales_input
from ftplan.planner.adapter_entries import (
    BeftLinear,
    C3aLinear,
    FourierftLinear,
    Ia3Linear,
    MissLinear,
    OsfLinear,
    ShiraLinear,
    SupertuningLinear,
    WaveftLinear,
)
from ftplan.planner.adapter_products import (
    AdaloraLinear,
    DeftLinear,
    DeloraLinear,
    GloraLinear,
    GraloraLinear,
    HiraLinear,
    LilyLinear,
    LohaLinear,
    LokrLinear,
    PeanutLinear,
    PolyLinear,
    PveraLinear,
    RandloraLinear,
    TinyloraLinear,
    UniloraLinear,
    VbloraLinear,
    VeraLinear,
)
from ftplan.planner.adapter_rotations import (
    BoftLinear,
    HraLinear,
    OftLinear,
    PsoftLinear,
    RoadLinear,
)
from ftplan.planner.model_spec import Linear, Parameter
from ftplan.planner.modules import LoraLinear, Module, Numerics, called
from ftplan.planner.peft_options import PeftOptions
from ftplan.planner.tape import Tape, Tensor, Weight, constant
from ftplan.planner.trained import Trained

FLOAT32 = f.FLOAT32
# What all modules share of a method and train: its gradient grows from the last layer on.
_SHARED = ("shared.vblora_vector_bank", "shared.unilora_theta_d", ".lily_B.weight")
# AdaLoRA adds to the loss how far these are from orthogonal, so that backward begins with them.
_REGULARIZED = ("lora_A", "lora_B")


def adapter_maker(
    options: PeftOptions, trained: Trained, *, loss_in_model: bool
) -> Callable[[Linear, Numerics], Module] | None:
    """What puts the method's adapter around a linear module; None where it adapts none.

    `loss_in_model`: the model computes the loss, to which AdaLoRA adds a term.
    """
    if options.peft_type == "IA3":
        return lambda linear, numerics: Ia3Linear(
            linear, numerics, options, scales_input=scales_input(linear, trained)
        )
    kind = _ADAPTERS.get(options.peft_type)
    if options.peft_type == "ADALORA":
        kind = partial(AdaloraLinear, regularized=loss_in_model)
    if kind is None:
        return None

    def make(linear: Linear, numerics: Numerics) -> Module:
        ranked = structs.replace(numerics, rank=trained.rank_of(linear))
        return kind(linear, ranked, options)

    return make


def early_gradient_bytes(
    options: PeftOptions, trained: Trained, width: int, *, loss_in_model: bool
) -> int:
    """Bytes of gradients that are there before backward reaches the layers."""
    if options.peft_type == "ADALORA" and not loss_in_model:
        return 0
    return width * sum(p.num_elements for p in _early(options, trained))


def loss_copy_bytes(options: PeftOptions, trained: Trained, *, loss_in_model: bool) -> int:
    """Bytes that AdaLoRA's term of the loss keeps: each matrix in 16 bits, and transposed."""
    if options.peft_type != "ADALORA" or not loss_in_model:
        return 0
    return 2 * 2 * sum(p.num_elements for p in _early(options, trained))


def importance_elements(options: PeftOptions, trained: Trained) -> int:
    """Numbers that AdaLoRA keeps from step to step to know which ranks matter: of each entry of its
    matrices its sensitivity, and means of that and of how it varies (peft, `RankAllocator`)."""
    if options.peft_type != "ADALORA":
        return 0
    return 3 * sum(p.num_elements for p in trained.adapters)


def unseen_gradient_bytes(options: PeftOptions, trained: Trained, width: int) -> int:
    """Bytes that gradients hold beside what they are gradients of: OSF's are views of those of
    matrices joined with frozen ones, where no hook makes new ones."""
    if options.peft_type != "OSF":
        return 0
    return width * sum(p.num_elements for p in trained.adapters if p.name.endswith("V_low"))


def trains_shared_alone(trained: Trained) -> bool:
    """Whether all that is trained is shared by layers."""
    whole = trained.adapters and not (trained.own or trained.held_as_base)
    return bool(whole) and all(p.name.endswith(_SHARED) for p in trained.adapters)


def _early(options: PeftOptions, trained: Trained) -> list[Parameter]:
    if options.peft_type == "ADALORA":
        return [p for p in trained.adapters if p.name.endswith(_REGULARIZED)]
    return [p for p in trained.adapters if p.name.endswith(_SHARED)]


def _lora(linear: Linear, numerics: Numerics, options: PeftOptions) -> Module:
    if options.flag("use_dora"):
        return DoraLinear(linear, numerics)
    bias, trains_a = options.flag("lora_bias"), options.method != "lora-fa"
    lora = LoraLinear(linear, numerics, bias=bias, trains_a=trains_a)
    return called(lora, numerics, lora.reads)


class DoraLinear(LoraLinear):
    """LoRA, and the length of each of the weight's rows (peft.tuners.lora.dora)."""

    def __init__(self, linear: Linear, numerics: Numerics) -> None:
        super().__init__(linear, numerics)
        self.linear, self.rank = linear, numerics.rank
        self.drops = numerics.drops
        # TRL turns what is trained beside a quantized base into bf16, all but this vector.
        width = self.width if self.quantization == "none" else FLOAT32
        self.magnitude = Weight(linear.out_features, width, trained=True)

    def _on_plain(self, tape: Tape, x: Tensor) -> Tensor:
        result = self.base(tape, x)
        before = result.width
        x = f.cast(tape, x, self.width)
        result = self._with_magnitude(tape, x, result)
        return f.cast(tape, result, before)

    def _on_quantized(self, tape: Tape, x: Tensor) -> Tensor:
        result = self.base(tape, x)
        if self.quantization in ("nf4", "fp4"):
            result = f.clone(tape, result)
        before = result.width
        if tape.autocast is None:
            x = f.cast(tape, x, self.width)
        result = self._with_magnitude(tape, x, result)
        return result if tape.autocast else f.cast(tape, result, before)

    def _with_magnitude(self, tape: Tape, x: Tensor, result: Tensor) -> Tensor:
        if not self.drops:
            return f.add(tape, result, self._scaled(tape, x, result))
        x = f.dropout(tape, x, self.dropout)
        return f.add(tape, result, self._scaled(tape, x, None))

    def _scaled(self, tape: Tape, x: Tensor, base_result: Tensor | None) -> Tensor:
        """What is added; `base_result` is none where dropout changes the adapter's input."""
        linear = self.linear
        change = f.cast(tape, self._change_of_weight(tape), x.width)
        weight = f.cast(tape, base_weight(tape, self.base), x.width)
        norm = self._norm(tape, weight, g.detached(change))
        scale = g.divide(tape, self.magnitude, norm)
        lora_result = self.lora_b(tape, self.lora_a(tape, x))
        if base_result is None:
            base_result = g.matmul(tape, x, weight, linear.in_features, linear.out_features)
        elif linear.bias:
            base_result = f.add(tape, base_result, bias_of(self.base))
        less = f.scale(tape, scale)
        left = f.multiply(tape, less, base_result)
        right = f.scale(tape, f.multiply(tape, scale, lora_result))
        return f.add(tape, left, right)

    def _change_of_weight(self, tape: Tape) -> Tensor:
        """The product of the adapter's matrices, as its modules multiply the identity."""
        side = self.linear.in_features
        identity = g.matrix(tape, side, side, self.width)
        return self.lora_b(tape, self.lora_a(tape, identity))

    def _norm(self, tape: Tape, weight: Tensor, change: Tensor) -> Tensor:
        weight = f.add(tape, weight, f.scale(tape, change))
        return tape.empty(constant(self.linear.out_features), weight.width)


_ADAPTERS: dict[str, Callable[[Linear, Numerics, PeftOptions], Module]] = {
    "LORA": _lora,
    "LOHA": LohaLinear,
    "LOKR": LokrLinear,
    "OFT": OftLinear,
    "VERA": VeraLinear,
    "HRA": HraLinear,
    "C3A": C3aLinear,
    "ROAD": RoadLinear,
    "MISS": MissLinear,
    "BEFT": BeftLinear,
    "RANDLORA": RandloraLinear,
    "VBLORA": VbloraLinear,
    "UNILORA": UniloraLinear,
    "HIRA": HiraLinear,
    "DELORA": DeloraLinear,
    "GRALORA": GraloraLinear,
    "GLORA": GloraLinear,
    "LILY": LilyLinear,
    "DEFT": DeftLinear,
    "PEANUT": PeanutLinear,
    "SHIRA": ShiraLinear,
    "SUPERTUNING": SupertuningLinear,
    "PSOFT": PsoftLinear,
    "FOURIERFT": FourierftLinear,
    "WAVEFT": WaveftLinear,
    "PVERA": PveraLinear,
    "POLY": PolyLinear,
    "TINYLORA": TinyloraLinear,
    "OSF": OsfLinear,
    "BOFT": BoftLinear,
}
