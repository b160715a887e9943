"""Why there is no plan, and what would make room for one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from msgspec import structs

from ftplan.launcher.model_source import ModelSource
from ftplan.launcher.offer import Offer
from ftplan.launcher.own_stack import installed_stack
from ftplan.launcher.ui import Ui
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import DoesNotFitError, InputError
from ftplan.planner.goals import ANY_PLAN
from ftplan.planner.hardware_spec import Device
from ftplan.planner.ladder import Rung, ladder, more_gpus
from ftplan.planner.memory import needed_bytes
from ftplan.planner.ranking import Evaluated, Ranking
from ftplan.planner.units import format_bytes
from ftplan.profiles import model_catalog


def refusal(
    ui: Ui, source: ModelSource, profile: DataProfile, offer: Offer, ranking: Ranking
) -> DoesNotFitError:
    """Why there is no plan; shows what to give up for one."""
    if offer.wanted.limits_a_run:
        unlimited = structs.replace(offer, wanted=ANY_PLAN).ranking(source.spec, profile)
        if unlimited.best is not None:
            return _over_budget(source, profile, offer, unlimited)
    assert ranking.nearest is not None, "what cannot be estimated at all is an error of its own"
    rungs = rungs_of(source, profile, offer, ranking)
    error = does_not_fit(source, ranking.nearest, rungs, ranking.margin)
    if rungs and not ui.as_json:
        from ftplan.launcher import views

        ui.show(views.ladder_table(rungs, ranking.nearest.device))
    ui.json(
        {
            "schema": 1,
            "plan": None,
            "nearest": {
                "plan": ranking.nearest.reasoned.to_dict(),
                "needs_bytes": needed_bytes(ranking.nearest.memory, ranking.margin),
                "free_bytes": ranking.nearest.device.free_bytes,
            },
            "ladder": [structs.asdict(rung) for rung in rungs],
            "error": error.message,
        }
    )
    return error


def does_not_fit(
    source: ModelSource, nearest: Evaluated, rungs: Sequence[Rung], margin: float
) -> DoesNotFitError:
    """By how much it misses, and what would fit."""
    device, number = nearest.device, nearest.plan.num_gpus
    needed = needed_bytes(nearest.memory, margin)
    on = f"{number} GPUs of {device.name}" if number > 1 else device.name
    return DoesNotFitError(
        f"{source.spec.name} does not fit on {on}: {nearest.plan.method} with the "
        f"smallest batch needs {format_bytes(needed)}, {format_bytes(device.free_bytes)} is free, "
        f"{format_bytes(needed - device.free_bytes)} is missing",
        "what would fit: " + "; or ".join(_what_would_fit(source, needed, device, rungs)),
    )


def rungs_of(
    source: ModelSource, profile: DataProfile, offer: Offer, ranking: Ranking
) -> list[Rung]:
    """What to give up so that it fits, and more of the GPUs."""
    assert ranking.nearest is not None
    rank = partial(_ranked_with, source, profile, offer)
    rungs = ladder(rank, ranking.nearest, profile, offer.given)
    device = offer.device
    if device.kind == "cuda" and offer.divides:
        alike = structs.replace(offer, devices=device)
        more = more_gpus(
            partial(_ranked_with, source, profile, alike),
            device,
            profile,
            ranking.nearest.plan.num_gpus,
        )
        rungs += [more] if more else []
    return rungs


def _ranked_with(
    source: ModelSource, profile: DataProfile, offer: Offer, changed: Mapping[str, Any]
) -> Ranking:
    return offer.ranking(source.spec, profile, **changed)


def _what_would_fit(
    source: ModelSource, needed: int, device: Device, rungs: Sequence[Rung]
) -> Iterator[str]:
    from ftplan.launcher.commands.estimate import smallest_card

    for rung in rungs:
        if rung.fits:
            yield f"`{' '.join(rung.flags)}`"
    fitting = _largest_fitting_model(device, source.spec.num_parameters)
    if fitting:
        yield f"a smaller model: `--model {fitting}`"
    if device.kind == "cuda":
        yield f"a larger GPU: {smallest_card(needed)}"


def _over_budget(
    source: ModelSource, profile: DataProfile, offer: Offer, unlimited: Ranking
) -> DoesNotFitError:
    """What plans that fit take beyond the budget."""
    assert unlimited.best is not None
    rows = profile.num_train_rows
    fitting = (unlimited.best, *unlimited.alternatives)
    beyond = [(e.plan.method, offer.limits.exceeded_by(e.plan, e.step, rows)) for e in fitting]
    told = "; ".join(f"{method} {how}" for method, how in beyond if how)
    return DoesNotFitError(
        f"no plan of {source.spec.name} keeps the budget: {told}",
        "allow more, train less with `--num-train-epochs`, or take a smaller model or a faster GPU",
    )


def _largest_fitting_model(device: Device, num_parameters: int) -> str | None:
    """The largest chat model of the catalog, of fewer parameters than the one that does not fit,
    whose plain LoRA estimate fits the device."""
    from ftplan.planner.memory import estimate_memory, fits
    from ftplan.planner.recipe import DEFAULT_QUANTIZATION, estimate_recipe

    for entry in sorted(model_catalog().values(), key=lambda e: -e.num_parameters):
        if entry.kind != "chat" or entry.num_parameters >= num_parameters:
            continue
        method = "qlora" if device.supports_quantization(DEFAULT_QUANTIZATION) else "lora"
        plan = estimate_recipe(entry.spec, device, {"method": method}).plan
        try:
            memory = estimate_memory(entry.spec, plan, device=device, stack=installed_stack(device))
        except InputError:  # not modelled
            continue
        if fits(memory, device):
            return entry.name
    return None
