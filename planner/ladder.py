"""What to give up where no plan fits, one thing after the other, and what each step buys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from msgspec import Struct

from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import InputError
from ftplan.planner.hardware_spec import Device
from ftplan.planner.memory import needed_bytes
from ftplan.planner.plan import TrainingPlan, flag_name
from ftplan.planner.ranking import Evaluated, Ranking
from ftplan.planner.recipe import DEFAULT_QUANTIZATION
from ftplan.planner.run_time import RunTime

# AdamW with its states in 8 bits (bitsandbytes).
SMALL_OPTIMIZER = "adamw_bnb_8bit"

# Rows are not cut shorter than this to make room: little would be left to learn from.
_SHORTEST = 256

_NUMBERS_OF_GPUS = (2, 4, 8)

Rank = Callable[[Mapping[str, Any]], Ranking]
"""Plans with some settings in the place of the given ones."""


class Rung(Struct, frozen=True, kw_only=True):
    """A step, on top of those before it unless it stands `alone`.

    `flags`: what to add on the command line for it and those it stands on. `needed_bytes`: with
    the margin, on each GPU; `seconds`: of the run, where it fits.
    """

    gives_up: str
    flags: tuple[str, ...]
    needed_bytes: int
    fits: bool
    seconds: float | None = None
    alone: bool = False


def ladder(
    rank: Rank, nearest: Evaluated, data: DataProfile, given: Mapping[str, Any]
) -> list[Rung]:
    """Steps from the nearest plan down to the first that fits: what costs time first, then what
    costs accuracy, then what costs data."""
    rungs: list[Rung] = []
    changed: dict[str, Any] = {}
    for gives_up, settings in _steps(nearest.plan, nearest.device, data, given):
        changed |= settings
        rung = _rung(rank, gives_up, changed, data)
        if rung is None:
            continue
        rungs.append(rung)
        if rung.fits:
            return [*rungs[:-1], _with_what_it_takes(rank, rung, changed, data)]
    return rungs


def _with_what_it_takes(
    rank: Rank, rung: Rung, changed: Mapping[str, Any], data: DataProfile
) -> Rung:
    """The rung that fits, without earlier steps that it can do without."""
    needed = dict(changed)
    for name in list(changed)[:-1]:
        fewer = {other: value for other, value in needed.items() if other != name}
        without = _rung(rank, rung.gives_up, fewer, data)
        if without is not None and without.fits:
            needed, rung = fewer, without
    return rung


def more_gpus(rank: Rank, device: Device, data: DataProfile, num_gpus: int) -> Rung | None:
    """The fewest GPUs of the kind that hold it together, if any do."""
    for number in _NUMBERS_OF_GPUS:
        if number > num_gpus:
            gives_up = f"{number} of {device.name} instead of {num_gpus}"
            rung = _rung(rank, gives_up, {"num_gpus": number}, data)
            if rung is not None and rung.fits:
                return Rung(
                    gives_up=gives_up,
                    flags=rung.flags,
                    needed_bytes=rung.needed_bytes,
                    fits=True,
                    seconds=rung.seconds,
                    alone=True,
                )
    return None


def _rung(rank: Rank, gives_up: str, changed: Mapping[str, Any], data: DataProfile) -> Rung | None:
    """None where the settings cannot be together."""
    try:
        ranking = rank(changed)
    except InputError:
        return None
    best = ranking.best or ranking.nearest
    if best is None:
        return None
    fits = ranking.best is not None
    run = RunTime.of(best.plan, best.step, data.num_train_rows)
    return Rung(
        gives_up=gives_up,
        flags=tuple(f"{flag_name(name)} {_spelled(value)}" for name, value in changed.items()),
        needed_bytes=needed_bytes(best.memory, ranking.margin),
        fits=fits,
        seconds=run.seconds if fits else None,
    )


def _spelled(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _steps(
    plan: TrainingPlan, device: Device, data: DataProfile, given: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
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
    if method in ("full", "freeze"):
        if quantizes and "optim" not in given:
            yield "a little accuracy: optimizer states in 8 bits", {"optim": SMALL_OPTIMIZER}
        yield "full tuning: adapters on all linear layers", {"method": "lora"}
    if quantizes and (method is not None or given.get("quantization") == "none"):
        yield (
            "some accuracy: the base in 4 bits",
            {
                "method": "qlora",
                "quantization": DEFAULT_QUANTIZATION,
            },
        )
    length = plan.max_length // 2
    while length >= _SHORTEST:
        cut = data.cut_rows(length)
        yield f"the ends of {cut:,} rows", {"max_length": length}
        length //= 2
