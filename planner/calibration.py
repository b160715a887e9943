"""Corrections of the few constants of a machine that no formula gives (docs/calibration.md).

They are factors, learned from finished runs (planner/calibration_fit.py) and kept apart from the
formulas: with all of them 1 a prediction is the formulas' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Any

from msgspec import Struct, structs


class Constant(Struct, frozen=True, kw_only=True):
    """One constant that may be corrected: the least and the most factor, and what of a machine and
    of a run is expected, as standard deviations of the factor's logarithm.

    `spread`: how far machines are from what is assumed of all; few runs move the factor less.
    `noise`: how far runs of one machine are from each other.
    """

    least: float
    most: float
    spread: float
    noise: float
    of: str


# Of rates. The farthest of 152 measured runs was 1.8 times as fast as predicted, so twice is the
# most, and two deviations. Nine of ten are within 23 %, which are 1.645 deviations
# (docs/time-model.md).
_TWICE = log(2)
_RATE_NOISE = 0.23 / 1.645

# Reserved bytes of a dry run are within 6.5 % in 95 of 100 measured runs, in the middle within
# 1.3 %, which is 0.6745 of a deviation (docs/accuracy.md).
_MOST_RESERVED = 1.065
_RESERVED_NOISE = 0.013 / 0.6745

# A T4's process held 141 MiB where half a GiB would have been assumed, 0.28 of it; others hold
# "several hundred MiB" (planner/hardware_spec.py). The noise is assumed: libraries that some runs
# load and others do not.
_LEAST_CONTEXT, _MOST_CONTEXT = 0.25, 2.0
_CONTEXT_NOISE = 0.1

CONSTANTS: dict[str, Constant] = {
    "context": Constant(
        least=_LEAST_CONTEXT,
        most=_MOST_CONTEXT,
        spread=_TWICE,
        noise=_CONTEXT_NOISE,
        of="what a process holds of the GPU beside torch's allocator",
    ),
    "reserved": Constant(
        least=1 / _MOST_RESERVED,
        most=_MOST_RESERVED,
        spread=log(_MOST_RESERVED) / 2,
        noise=_RESERVED_NOISE,
        of="what torch's allocator reserves for the same tensors",
    ),
    "arithmetic": Constant(
        least=0.5, most=2.0, spread=_TWICE / 2, noise=_RATE_NOISE, of="the rate of products"
    ),
    "traffic": Constant(
        least=0.5, most=2.0, spread=_TWICE / 2, noise=_RATE_NOISE, of="the memory bandwidth"
    ),
    "launching": Constant(
        least=0.5, most=2.0, spread=_TWICE / 2, noise=_RATE_NOISE, of="the host's seconds a kernel"
    ),
}


class Calibration(Struct, frozen=True, kw_only=True):
    """Factors of a machine's constants, by name those of `CONSTANTS`, and where they are from.

    `context` and `reserved` multiply bytes, `arithmetic` and `traffic` rates, `launching` seconds.
    `margin`: the share of what a plan requires that is kept free, None where it is as without.
    `num_runs` and `fitted_on`, a date: of what was learned; none and nothing without.
    """

    context: float = 1.0
    reserved: float = 1.0
    arithmetic: float = 1.0
    traffic: float = 1.0
    launching: float = 1.0
    margin: float | None = None
    num_runs: int = 0
    fitted_on: str = ""

    @property
    def in_force(self) -> bool:
        """Whether anything is predicted otherwise than without."""
        return self.margin is not None or any(factor != 1 for factor in self.factors.values())

    @property
    def factors(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in CONSTANTS}

    def to_dict(self) -> dict[str, Any]:
        return structs.asdict(self)


UNCALIBRATED = Calibration()


def out_of_bounds(factors: Mapping[str, float]) -> list[str]:
    """Names of factors that no fit gives: damaged, or of another version."""
    return [name for name, value in factors.items() if not within(value, CONSTANTS[name])]


def within(factor: float, constant: Constant) -> bool:
    # A factor that went through a logarithm may be off by its last digit.
    return constant.least * (1 - 1e-9) <= factor <= constant.most * (1 + 1e-9)
