"""Why there is no plan, and what would make room for one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from msgspec import structs

from ftplan.launcher.cards import usd_per_hour
from ftplan.launcher.model_source import ModelSource
from ftplan.launcher.offer import Offer
from ftplan.launcher.own_stack import installed_stack
from ftplan.launcher.ui import Ui
from ftplan.launcher.would_do import Refused, flags_for, larger, more_alike, named, refused_methods
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import DoesNotFitError, InputError
from ftplan.planner.goals import ANY_PLAN
from ftplan.planner.hardware_spec import Device
from ftplan.planner.ladder import Rung, flags_of, ladder, rung_of
from ftplan.planner.memory import needed_bytes
from ftplan.planner.ranking import Evaluated, Ranking
from ftplan.planner.recipe import DEFAULT_QUANTIZATION
from ftplan.planner.remedies import MOST_OF_A_MACHINE, Remedy, Wish, held_by
from ftplan.planner.units import SECONDS_PER_HOUR, format_bytes
from ftplan.profiles import ModelEntry, find_model, model_catalog

# Of a weight that is held in 16 bits, and in 4.
_HALF_BYTES, _QUANTIZED_BYTES = 2.0, 0.5

# A model's name up to its size (`llama-3.1-` of `llama-3.1-8b`), and up to its first digit.
_GENERATION = re.compile(r"(.*?)(?:\d+x)?\d+(?:\.\d+)?[bm]\b")
_FAMILY = re.compile(r"[^\d]*")


def refusal(
    ui: Ui, source: ModelSource, profile: DataProfile, offer: Offer, ranking: Ranking
) -> DoesNotFitError:
    """Why there is no plan; shows what to give up for one."""
    if offer.wanted.limits_a_run:
        unlimited = structs.replace(offer, wanted=ANY_PLAN).ranking(source.spec, profile)
        if unlimited.best is not None:
            return _over_budget(source, profile, offer, unlimited)
        ranking = unlimited
    nearest = ranking.nearest
    assert nearest is not None, "what cannot be estimated at all is an error of its own"
    refused = refused_methods(source.spec, profile, offer, ranking.rejected)
    rungs = rungs_of(source, profile, offer, nearest)
    error = does_not_fit(source, nearest, rungs, ranking.margin, launches=offer.launches)
    if not ui.as_json:
        _show(ui, refused, rungs, nearest.device)
    ui.json(
        {
            "schema": 1,
            "plan": None,
            "nearest": {
                "plan": nearest.reasoned.to_dict(),
                "needs_bytes": needed_bytes(nearest.memory, ranking.margin),
                "free_bytes": nearest.device.free_bytes,
            },
            "rejected": [one.to_dict() for one in refused],
            "ladder": [structs.asdict(rung) for rung in rungs],
            "error": error.message,
        }
    )
    return error


def _show(ui: Ui, refused: Sequence[Refused], rungs: Sequence[Rung], device: Device) -> None:
    from ftplan.launcher import views

    if len(refused) > 1:  # one alone is what the error is about
        ui.show(views.rejected_table(refused), "")
    if rungs:
        ui.show(views.ladder_table(rungs, device), "")


def does_not_fit(
    source: ModelSource,
    nearest: Evaluated,
    rungs: Sequence[Rung],
    margin: float,
    *,
    launches: bool,
) -> DoesNotFitError:
    """By how much it misses, and with which flags it would fit. `launches`: whether it was to be
    launched, which other GPUs than those of this machine cannot be named for."""
    device, number = nearest.device, nearest.plan.num_gpus
    needed = needed_bytes(nearest.memory, margin)
    on = f"{number} GPUs of {device.name}" if number > 1 else device.name
    would_fit = [_in_words(rung, launches=launches) for rung in rungs if rung.fits]
    return DoesNotFitError(
        f"{source.spec.name} does not fit on {on}: {nearest.plan.method} with the "
        f"smallest batch needs {format_bytes(needed)}, {format_bytes(device.free_bytes)} is free, "
        f"{format_bytes(needed - device.free_bytes)} is missing",
        "what would fit: " + "; or ".join(would_fit) if would_fit else "take a smaller model",
    )


def _in_words(rung: Rung, *, launches: bool) -> str:
    if launches and any(flag.startswith("--gpu ") for flag in rung.flags):
        return rung.gives_up
    return f"`{' '.join(rung.flags)}`"


def rungs_of(
    source: ModelSource, profile: DataProfile, offer: Offer, nearest: Evaluated
) -> list[Rung]:
    """What to give up so that it fits; a smaller model; other GPUs, the cheapest run first."""
    rank = partial(_ranked_with, source, profile, offer)
    rungs = ladder(rank, nearest, profile, offer.given)
    offloaded = _offloaded(source, profile, offer, nearest)
    smaller = _smaller_model(source, profile, offer)
    rungs += [rung for rung in (offloaded, smaller) if rung]
    rungs = [_with_cost(rung, offer.device) for rung in rungs]
    given = {**offer.given, "method": nearest.plan.method}
    wish = Wish(model=source.spec, data=profile, given=given)
    remedies = (more_alike(wish, offer), larger(wish, offer))
    elsewhere = [_on_others(source, profile, offer, one) for one in remedies if one is not None]
    known = [rung for rung in elsewhere if rung is not None]
    return rungs + sorted(known, key=lambda rung: (rung.usd is None, rung.usd or 0.0))


def _offloaded(
    source: ModelSource, profile: DataProfile, offer: Offer, nearest: Evaluated
) -> Rung | None:
    """The nearest method with the model in the host's memory; None where it does not fit even so,
    or cannot be."""
    if offer.device.kind != "cuda" or "sharding" in offer.given:
        return None
    plan = nearest.plan
    settings = {"method": plan.method, "sharding": "fsdp", "offload": "parameters"}
    number = {"num_gpus": plan.num_gpus}
    try:
        ranking = _ranked_with(source, profile, offer, {**settings, **number})
    except InputError:
        return None
    if ranking.best is None:
        return None
    ram = format_bytes(ranking.best.memory.host.peak_bytes)
    asked = {name: value for name, value in settings.items() if offer.given.get(name) != value}
    gives_up = f"time: the model waits in {ram} of the host's memory"
    return rung_of(ranking, gives_up, flags_of(asked), profile, alone=True)


def _on_others(
    source: ModelSource, profile: DataProfile, offer: Offer, remedy: Remedy
) -> Rung | None:
    """The run on other GPUs; None where it does not keep the budget, as far as is known: how fast
    several machines are together is not modelled."""
    flags, gives_up = flags_for(remedy, offer), named(remedy)
    if remedy.num_gpus > MOST_OF_A_MACHINE:
        if offer.wanted.limits_a_run:
            return None
        return Rung(
            gives_up=gives_up,
            flags=flags,
            needed_bytes=remedy.needed_bytes,
            fits=True,
            num_gpus=remedy.num_gpus,
            alone=True,
        )
    there = structs.replace(offer, devices=remedy.device, host=None)
    changed = {"num_gpus": remedy.num_gpus, "num_machines": 1, "sharding": remedy.sharding}
    ranking = _ranked_with(source, profile, there, changed)
    if ranking.best is None:
        return None
    return _with_cost(rung_of(ranking, gives_up, flags, profile, alone=True), remedy.device)


def _with_cost(rung: Rung, device: Device) -> Rung:
    """With what its run costs, at the lowest price known of the device."""
    price = usd_per_hour(device.name, rung.num_gpus)
    if price is None or rung.seconds is None:
        return rung
    return structs.replace(rung, usd=price * rung.seconds / SECONDS_PER_HOUR)


def _ranked_with(
    source: ModelSource, profile: DataProfile, offer: Offer, changed: Mapping[str, Any]
) -> Ranking:
    return offer.ranking(source.spec, profile, **changed)


def _smaller_model(source: ModelSource, profile: DataProfile, offer: Offer) -> Rung | None:
    """The largest model of the catalog that fits: of the same generation, if one does, else of the
    same family, else of all. Chat models, where that is one or is not known."""
    entry = find_model(source.hub_id or source.spec.name)
    kind, name = (entry.kind, entry.name) if entry else ("chat", source.spec.name)
    smaller = [
        e
        for e in model_catalog().values()
        if e.kind == kind and e.num_parameters < source.spec.num_parameters
    ]
    smaller.sort(key=lambda e: (_how_far(e.name, name), -e.num_parameters))
    for other in smaller:
        if _may_hold(other, profile, offer):
            ranking = _if_possible(other, profile, offer)
            if ranking is not None and ranking.best is not None:
                flags = (f"--model {other.name}",)
                gives_up = f"a smaller model: {other.name}"
                return rung_of(ranking, gives_up, flags, profile, alone=True)
    return None


def _how_far(one: str, other: str) -> int:
    """0 for names of a generation, 1 for those of a family, else 2."""
    for far, of in enumerate((_generation, _family)):
        if of(one) and of(one) == of(other):
            return far
    return 2


def _generation(name: str) -> str:
    found = _GENERATION.match(_last_part(name))
    return found[1] if found else ""


def _family(name: str) -> str:
    found = _FAMILY.match(_last_part(name))
    return found[0] if found else ""


def _last_part(name: str) -> str:
    """Of a Hub id the repository's name; Meta's without its own."""
    return name.casefold().rpartition("/")[2].removeprefix("meta-")


def _may_hold(entry: ModelEntry, profile: DataProfile, offer: Offer) -> bool:
    """Whether what is offered may hold the model by the method that needs least of it: a search
    takes longer than this."""
    device, number = offer.device, offer.num_gpus
    quantizes = device.supports_quantization(DEFAULT_QUANTIZATION)
    if not quantizes or offer.given.get("quantization") == "none":
        least, method = _HALF_BYTES, "lora"
    else:
        least, method = _QUANTIZED_BYTES, "qlora"
    if least * entry.num_parameters > number * device.free_bytes:
        return False
    spec = entry.spec
    given = {"method": method, **offer.given}
    wish = Wish(model=spec, data=profile, given=given)
    return spec.loads_as_causal_lm and held_by(wish, device, number, installed_stack(device))


def _if_possible(entry: ModelEntry, profile: DataProfile, offer: Offer) -> Ranking | None:
    """None where what is given does not go with the model."""
    try:
        return offer.ranking(entry.spec, profile)
    except InputError:
        return None


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
