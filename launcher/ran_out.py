"""A run that ends for want of memory, with nothing left to give up: what would make room."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from msgspec import structs

from ftplan.launcher.data.asked import DataAsked
from ftplan.launcher.next_plans import cheaper_plans
from ftplan.launcher.plan_file import read_settings
from ftplan.launcher.planning import Planned, make_plan
from ftplan.launcher.refusal import does_not_fit, rungs_of
from ftplan.launcher.run_dir import RunDir, read_mapping
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import DoesNotFitError, FtplanError, RunFailedError
from ftplan.planner.hardware_spec import Device
from ftplan.planner.ladder import Rung
from ftplan.planner.memory import needed_bytes
from ftplan.planner.out_of_memory import EVENT
from ftplan.planner.ranking import Evaluated

# What a run has come down to by then.
_SMALLEST: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "gradient_checkpointing": True,
    "every_n_layers": 1,
}


@contextmanager
def ladder_at_the_end(ui: Ui, run: RunDir, planned: Planned | None = None) -> Iterator[None]:
    """Where the run ends for want of memory, the planner's ladder, shown and as the hint.

    `planned`: what the run came of; without it, it is planned anew from its directory.
    """
    try:
        yield
    except RunFailedError as error:
        if run.read_status().get("stage") != EVENT:
            raise
        try:
            planned = planned or planned_again(ui, run)
            nearest, rungs = rungs_after(planned)
        except DoesNotFitError as refused:  # by now less is free, which has a ladder of its own
            raise RunFailedError(error.message, refused.hint) from None
        except FtplanError:  # what is given leaves no plan to begin the ladder from
            raise error from None
        _show(ui, rungs, nearest.device)
        told = does_not_fit(planned.source, nearest, rungs, planned.ranking.margin, launches=True)
        raise RunFailedError(error.message, told.hint) from None


def planned_again(ui: Ui, run: RunDir) -> Planned:
    """The plan of a run directory, made anew on this machine with what was given for it; raises as
    `make_plan` does."""
    ui.say("looking for what would make room ...")
    train = read_mapping(run.train)
    settings, reasons = read_settings(run.read_plan()["plan"])
    held_out = train["eval_data"] or {"files": ()}
    return make_plan(
        ui,
        asked=DataAsked(
            paths=tuple(str(run.root / name) for name in train["data"]["files"]),
            eval_paths=tuple(str(run.root / name) for name in held_out["files"]),
            columns=train["data"]["columns"],
            test_share=train["test_share"],
        ),
        model_name=train["model"],
        named_device=None,
        given={name: settings[name] for name, why in reasons.items() if why.origin == "given"},
        runs_dir=run.root.parent,
        for_launch=True,
    )


def _show(ui: Ui, rungs: Sequence[Rung], device: Device) -> None:
    from ftplan.launcher import views

    if rungs and not ui.as_json:
        ui.show(views.ladder_table(rungs, device), "")


def rungs_after(planned: Planned) -> tuple[Evaluated, list[Rung]]:
    """The last plan that was tried, with the smallest batch, and what to give up beside: on devices
    that have a byte less than it was said to need, since it did not fit."""
    tried = [planned.chosen, *cheaper_plans(planned.chosen, planned.ranking)]
    given = {**planned.offer.given, "method": tried[-1].plan.method}
    offer = structs.replace(planned.offer, given=given)
    spec, profile = planned.source.spec, planned.profile
    smallest = offer.ranking(spec, profile, **_SMALLEST)
    last = smallest.best or smallest.nearest or tried[-1]
    room = needed_bytes(last.memory, planned.ranking.margin) - 1
    devices = [offer.devices] if isinstance(offer.devices, Device) else offer.devices
    less = [structs.replace(one, free_bytes=min(one.free_bytes, room)) for one in devices]
    tight = less[0] if isinstance(offer.devices, Device) else less
    offer = structs.replace(offer, devices=tight)
    nearest = offer.ranking(spec, profile, **_SMALLEST).nearest or last
    return nearest, rungs_of(planned.source, profile, offer, nearest)
