"""Plans of several stages, each made for what the one before leaves, all before any starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, structs

from ftplan.launcher.costs import usd_for
from ftplan.launcher.plan_file import model_name, with_reasons
from ftplan.launcher.planning import Planned, check_settings, make_plan, planned_again
from ftplan.launcher.stage_file import AskedStage, of_stage
from ftplan.launcher.ui import Ui
from ftplan.planner.disk import stored_bytes
from ftplan.planner.errors import DoesNotFitError, FtplanError, InputError
from ftplan.planner.goals import ANY_PLAN, Wanted
from ftplan.planner.hardware_spec import Device
from ftplan.planner.plan import Reason, TrainingPlan
from ftplan.planner.stages import (
    Begin,
    begin_of,
    evenly,
    inherited,
    replayed_rows,
    would_go_on,
)
from ftplan.planner.units import format_bytes, format_seconds

_GOES_ON = "as in the stage before, whose adapter goes on being trained"
_SAME_METHOD = "as in the stage before"
_REFERENCE = "the reference is the model as this stage finds it: it is asked before it changes"


class Replayed(Struct, frozen=True):
    """Rows of an earlier stage that another one mixes in: how many, and how long at most."""

    stage: int
    rows: int
    max_length: int


class PlannedStage(Struct, frozen=True, kw_only=True):
    """A stage, planned. `number` counts from 1; `begin`: None for the first, which begins from the
    base model. `replayed`: rows of earlier stages among its own."""

    number: int
    name: str
    planned: Planned
    begin: Begin | None
    replay_share: float = 0.0
    replayed: tuple[Replayed, ...] = ()

    @property
    def folder(self) -> str:
        return f"{self.number}-{self.name}"

    @property
    def plan(self) -> TrainingPlan:
        return self.planned.chosen.plan

    @property
    def seconds(self) -> float:
        return self.planned.run_time.seconds

    @property
    def said_begin(self) -> str:
        """What it begins from, in words."""
        if self.begin is None:
            return "the base model"
        before = self.number - 1
        return {
            "model": f"the model of stage {before}",
            "adapter": f"the adapter of stage {before}, which goes on",
            "merged": f"stage {before} merged into its base",
        }[self.begin]


def plan_stages(
    ui: Ui,
    asked: Sequence[AskedStage],
    *,
    model: str | None,
    named_device: Device | None,
    runs_dir: Path,
    for_launch: bool,
    wanted: Wanted = ANY_PLAN,
    checked: Callable[[Planned], Planned] = lambda planned: planned,
    calibrate: bool = True,
    on_processor: bool = False,
) -> list[PlannedStage]:
    """Every stage's plan. `checked`: what a plan goes through before the next one is made.

    Raises what `make_plan` does, of the first stage that it concerns; DoesNotFitError where all
    together take longer or cost more than wanted, or more disk than there is.
    """
    for number, stage in enumerate(asked, start=1):  # at once, before anything slow
        try:
            check_settings(stage.settings, for_launch=for_launch)
            stage.asked.check()
        except FtplanError as error:
            raise of_stage(error, number) from error
    stages: list[PlannedStage] = []
    for number, stage in enumerate(asked, start=1):
        if len(asked) > 1:
            ui.say(f"stage {number} of {len(asked)}: {stage.name}")
        try:
            stages.append(
                _planned_stage(
                    ui,
                    stage,
                    stages,
                    model=model_name(stages[0].planned) if stages else model,
                    named_device=named_device,
                    runs_dir=runs_dir,
                    for_launch=for_launch,
                    wanted=wanted,
                    checked=checked,
                    calibrate=calibrate,
                    on_processor=on_processor,
                )
            )
        except FtplanError as error:
            raise of_stage(error, number, _hint(error, stage, stages)) from error
    _check_wanted(stages, wanted)
    if for_launch:
        _check_host(stages)
    return stages


def _hint(error: FtplanError, stage: AskedStage, earlier: Sequence[PlannedStage]) -> str | None:
    """Where a method that a stage has taken over does not fit, that it may have its own."""
    taken_over = earlier and "method" not in stage.settings
    if not isinstance(error, DoesNotFitError) or not taken_over:
        return error.hint
    method = earlier[-1].plan.method
    own = f"or give the stage a `method` of its own, in the place of `{method}`"
    return f"{error.hint}; {own}" if error.hint else own


def _planned_stage(
    ui: Ui,
    stage: AskedStage,
    earlier: Sequence[PlannedStage],
    *,
    model: str | None,
    named_device: Device | None,
    runs_dir: Path,
    for_launch: bool,
    wanted: Wanted,
    checked: Callable[[Planned], Planned],
    calibrate: bool,
    on_processor: bool,
) -> PlannedStage:
    before = earlier[-1].plan if earlier else None
    taken = inherited(before, stage.settings) if before else {}
    given = {**taken, **stage.settings}
    planned = make_plan(
        ui,
        asked=stage.asked,
        model_name=model,
        named_device=named_device,
        given=given,
        runs_dir=runs_dir,
        for_launch=for_launch,
        wanted=wanted,
        machine=earlier[0].planned.machine if earlier else None,
        calibrate=calibrate,
        on_processor=on_processor,
    )
    if stage.sha256 and planned.data.sha256 != stage.sha256:
        raise InputError(
            f"the data of `{stage.name}` have changed since they were planned",
            "plan again, or take `sha256` out of the file",
        )
    reasons = dict(stage.reasons)
    again: dict[str, Any] = {}
    asks_later = before is not None and would_go_on(before, planned.chosen.plan)
    if asks_later and "precompute_ref_log_probs" not in stage.settings:
        again["precompute_ref_log_probs"] = True
        reasons["precompute_ref_log_probs"] = Reason(origin="derived", why=_REFERENCE)
    replayed = _replayed(stage, planned, earlier)
    if again or replayed:
        profile = planned.profile
        if replayed:
            lengths = [n for rows in replayed for n in _lengths(earlier, rows)]
            together = tuple(sorted((*profile.trained_lengths, *lengths), reverse=True))
            profile = structs.replace(profile, lengths_left=together)
            # It decides which rows are short enough.
            again["max_length"] = planned.chosen.plan.max_length
            reasons.setdefault("max_length", planned.chosen.reasoned.reasons["max_length"])
        planned = planned_again(ui, planned, profile, {**given, **again}, for_launch=for_launch)
    planned = checked(planned)
    begin = begin_of(before, planned.chosen.plan) if before else None
    why = _GOES_ON if begin == "adapter" else _SAME_METHOD
    for name in taken:
        reasons.setdefault(name, Reason(origin="derived", why=why))
    return PlannedStage(
        number=len(earlier) + 1,
        name=stage.name,
        planned=with_reasons(planned, reasons),
        begin=begin,
        replay_share=stage.replay_share,
        replayed=replayed,
    )


def _replayed(
    stage: AskedStage, planned: Planned, earlier: Sequence[PlannedStage]
) -> tuple[Replayed, ...]:
    """Rows of earlier stages that are no longer than the stage's own may be. Texts among texts:
    pairs are not replayed."""
    if not stage.replay_share or planned.chosen.plan.objective != "sft":
        return ()
    limit = planned.chosen.plan.max_length
    alike = [one for one in earlier if one.plan.objective == "sft"]
    available = [len(_short(one, limit)) for one in alike]
    counts = replayed_rows(stage.replay_share, planned.profile.num_train_rows, available)
    return tuple(
        Replayed(one.number, count, limit)
        for one, count in zip(alike, counts, strict=True)
        if count
    )


def _short(stage: PlannedStage, limit: int) -> list[int]:
    """Lengths of a stage's own rows of up to `limit` tokens, longest first. Rows cut at the stage's
    own length are in the run as long as that."""
    profile, longest = stage.planned.profile, stage.plan.max_length
    own = profile.trained_lengths
    return [min(length, longest) for length in own if min(length, longest) <= limit]


def _lengths(earlier: Sequence[PlannedStage], rows: Replayed) -> list[int]:
    short = _short(earlier[rows.stage - 1], rows.max_length)
    return [short[place] for place in evenly(len(short), rows.rows)]


def _check_wanted(stages: Sequence[PlannedStage], wanted: Wanted) -> None:
    """Raises DoesNotFitError where the stages together are longer or dearer than wanted."""
    seconds = sum(stage.seconds for stage in stages)
    hint = "take fewer epochs or `--max-steps`, or raise the budget"
    if wanted.seconds is not None and seconds > wanted.seconds:
        raise DoesNotFitError(
            f"the stages take {format_seconds(seconds)} together, more than "
            f"{format_seconds(wanted.seconds)}",
            hint,
        )
    costs = [usd for usd in total_usd(stages).values() if usd is not None]
    if wanted.usd is not None and costs and min(costs) > wanted.usd:
        raise DoesNotFitError(
            f"the stages cost {min(costs):.2g} USD together, more than {wanted.usd:.2g} USD", hint
        )


def total_usd(stages: Sequence[PlannedStage]) -> Mapping[str, float | None]:
    """What the GPUs of all stages cost, by way of billing."""
    device = stages[0].planned.device
    return usd_for(device, sum(stage.plan.num_gpus * stage.seconds for stage in stages))


def _check_host(stages: Sequence[PlannedStage]) -> None:
    """Raises DoesNotFitError where the disk does not hold what all stages leave, or the RAM the
    model whose adapter is merged."""
    machine = stages[0].planned.machine
    if machine is None:
        return
    host = machine.host
    merged = [stage for stage in stages if stage.begin == "merged"]
    base_bytes = stored_bytes(stages[0].planned.source.spec)
    disk_bytes = len(merged) * base_bytes + sum(_left_bytes(stage) for stage in stages)
    if disk_bytes > host.disk_free_bytes:
        raise DoesNotFitError(
            f"the stages leave {format_bytes(disk_bytes)} of models and checkpoints, and "
            f"`{host.disk_path}` has {format_bytes(host.disk_free_bytes)} free",
            "free some disk, write elsewhere with `--runs-dir`, or train adapters",
        )
    if merged and base_bytes > host.ram_available_bytes:
        raise DoesNotFitError(
            f"stage {merged[0].number}: merging the adapter before it takes "
            f"{format_bytes(base_bytes)} of RAM, and {format_bytes(host.ram_available_bytes)} are "
            "available",
            "leave `method` and its settings as in the stage before: its adapter then goes on "
            "being trained, and nothing is merged",
        )


def _left_bytes(stage: PlannedStage) -> int:
    saves = -(-stage.planned.steps // stage.plan.save_steps)
    return stage.planned.chosen.memory.disk.run_bytes(saves)
