"""What to give up where no plan fits, one thing after the other, and what each step buys."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from ftplan.planner.concessions import SMALL_OPTIMIZER
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import InputError
from ftplan.planner.hardware_spec import Device
from ftplan.planner.memory import needed_bytes
from ftplan.planner.plan import flag_name
from ftplan.planner.ranking import Evaluated, Ranking
from ftplan.planner.recipe import DEFAULT_QUANTIZATION
from ftplan.planner.run_time import RunTime

# Rows are not cut shorter than this to make room: little would be left to learn from.
_SHORTEST = 256

Rank = Callable[[Mapping[str, Any]], Ranking]
"""Plans with some settings in the place of the given ones."""


class Rung(Struct, frozen=True, kw_only=True):
    """A step, on top of those before it unless it stands `alone`.

    `flags`: what to add on the command line for it and those it stands on. `needed_bytes`: with
    the margin, on each of `num_gpus`; `seconds` and `usd`: of the run, where it fits and they are
    known.
    """

    gives_up: str
    flags: tuple[str, ...]
    needed_bytes: int
    fits: bool
    num_gpus: int = 1
    seconds: float | None = None
    usd: float | None = None
    alone: bool = False


def ladder(
    rank: Rank, nearest: Evaluated, data: DataProfile, given: Mapping[str, Any]
) -> list[Rung]:
    """Steps from the nearest plan down to the first that fits: what costs time first, then what
    costs accuracy, then what costs data, of which the least cut that is enough."""
    rungs: list[Rung] = []
    changed: dict[str, Any] = {}
    device = nearest.device
    for gives_up, settings in _steps(device, given):
        changed |= settings
        tried = _tried(rank, changed)
        if tried is None:
            continue
        rung = rung_of(tried, gives_up, flags_of(changed), data)
        rungs.append(rung)
        if rung.fits:
            return [*rungs[:-1], _with_what_it_takes(rank, rung, changed, data)]
        nearest = _shown(tried)
    cut = _cut_rows(rank, nearest, data, changed)
    if cut is None:
        return rungs
    rung, changed = cut
    return [*rungs, _with_what_it_takes(rank, rung, changed, data) if rung.fits else rung]


def _with_what_it_takes(
    rank: Rank, rung: Rung, changed: Mapping[str, Any], data: DataProfile
) -> Rung:
    """The rung that fits, without earlier steps that it can do without."""
    needed = dict(changed)
    for name in list(changed)[:-1]:
        fewer = {other: value for other, value in needed.items() if other != name}
        without = _tried(rank, fewer)
        if without is not None and without.best is not None:
            needed, rung = fewer, rung_of(without, rung.gives_up, flags_of(fewer), data)
    return rung


def _cut_rows(
    rank: Rank, nearest: Evaluated, data: DataProfile, changed: Mapping[str, Any]
) -> tuple[Rung, dict[str, Any]] | None:
    """The longest rows, of halves of halves, with which it fits; else the shortest ones. None
    where what is there without any rows is too much."""
    lengths = list(_halves(nearest.plan.max_length))
    if not lengths or nearest.memory.peak_phase.components["weights"] > nearest.device.free_bytes:
        return None
    rankings: dict[int, Ranking | None] = {}

    def fits(length: int) -> bool:
        rankings[length] = _tried(rank, {**changed, "max_length": length})
        found = rankings[length]
        return found is not None and found.best is not None

    length = lengths[min(bisect_left(lengths, True, key=fits), len(lengths) - 1)]
    ranking = rankings[length]
    if ranking is None:
        return None
    settings = {**changed, "max_length": length}
    gives_up = f"the ends of {data.cut_rows(length):,} rows"
    return rung_of(ranking, gives_up, flags_of(settings), data), settings


def _halves(length: int) -> Iterator[int]:
    while (length := length // 2) >= _SHORTEST:
        yield length


def _tried(rank: Rank, changed: Mapping[str, Any]) -> Ranking | None:
    """None where the settings cannot be together."""
    try:
        ranking = rank(changed)
    except InputError:
        return None
    return ranking if ranking.best or ranking.nearest else None


def _shown(ranking: Ranking) -> Evaluated:
    """The best, else what misses by least."""
    shown = ranking.best or ranking.nearest
    assert shown is not None
    return shown


def rung_of(
    ranking: Ranking,
    gives_up: str,
    flags: Sequence[str],
    data: DataProfile,
    *,
    alone: bool = False,
) -> Rung:
    """The best of a ranking as a rung, or what misses by least."""
    shown = _shown(ranking)
    fits = ranking.best is not None
    run = RunTime.of(shown.plan, shown.step, data.num_train_rows)
    return Rung(
        gives_up=gives_up,
        flags=tuple(flags),
        needed_bytes=needed_bytes(shown.memory, ranking.margin),
        fits=fits,
        num_gpus=shown.plan.num_gpus,
        seconds=run.seconds if fits else None,
        alone=alone,
    )


def flags_of(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Settings as the command line takes them."""
    return tuple(f"{flag_name(name)} {_spelled(value)}" for name, value in settings.items())


def _spelled(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _steps(device: Device, given: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """In words, and the settings."""
    if given.get("gradient_checkpointing") is False or given.get("every_n_layers", 1) > 1:
        every = {"gradient_checkpointing": True, "every_n_layers": 1}
        yield "time: every layer is computed again", every
    if given.get("per_device_train_batch_size", 1) > 1:
        yield "time: one row at once", {"per_device_train_batch_size": 1}
    if given.get("loss") == "stock":
        yield "nothing: the loss in tiles", {"loss": "trl-fused"}
    method = given.get("method")
    quantizes = device.supports_quantization(DEFAULT_QUANTIZATION)
    if quantizes and given.get("optim", SMALL_OPTIMIZER) != SMALL_OPTIMIZER:
        yield "a little accuracy: optimizer states in 8 bits", {"optim": SMALL_OPTIMIZER}
    if method in ("full", "freeze"):
        yield "full tuning: adapters on all linear layers", {"method": "lora"}
    if quantizes and (method is not None or given.get("quantization") == "none"):
        yield (
            "some accuracy: the base in 4 bits",
            {
                "method": "qlora",
                "quantization": DEFAULT_QUANTIZATION,
            },
        )
