"""The check before a launch: the chosen plan's dry run on the longest batch.

Where the dry run needs more memory than there is, the next plan of the ranking is tried.
"""

from __future__ import annotations

from msgspec import structs

from ftplan.launcher.exact import DryRunner, case_of, memory_of, shown_dry_runs
from ftplan.launcher.own_stack import installed_stack
from ftplan.launcher.planning import Planned
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import DoesNotFitError, InputError, RunFailedError
from ftplan.planner.hardware_spec import Device
from ftplan.planner.memory import fits, needed_bytes
from ftplan.planner.ranking import Evaluated
from ftplan.planner.teams import roomiest
from ftplan.planner.units import format_bytes

# Dry runs take half a minute each.
_MOST_TRIED = 4

# On a processor a plan that needs less than this share of the free memory is not worth the wait.
_WORTH_CONFIRMING = 0.5


def confirm(ui: Ui, planned: Planned) -> Planned:
    """The plan with the dry run's memory in the place of the closed form's.

    Raises DoesNotFitError when no plan of the ranking passes. A dry run that cannot be carried
    out is told, and the closed form stands.
    """
    if not _is_worth_it(planned):
        return planned
    try:
        with shown_dry_runs(ui) as runner:
            return _confirmed(ui, planned, runner)
    except (InputError, RunFailedError) as error:
        ui.warn(f"{error.message}; the closed form's figures stand unconfirmed")
        return planned


def _is_worth_it(planned: Planned) -> bool:
    if planned.device.kind == "cuda":
        return True
    return needed_bytes(planned.chosen.memory) > _WORTH_CONFIRMING * planned.device.free_bytes


def _confirmed(ui: Ui, planned: Planned, runner: DryRunner) -> Planned:
    tried: list[Evaluated] = []
    margin = planned.offer.margin.share

    def needs(evaluated: Evaluated) -> str:
        return format_bytes(needed_bytes(evaluated.memory, margin))

    waiting = [planned.chosen, *planned.ranking.alternatives]
    while waiting:
        candidate = waiting.pop(0)
        exact = _with_exact_memory(planned, candidate, runner)
        if fits(exact.memory, candidate.device, margin):
            return structs.replace(
                planned, chosen=exact, device=candidate.device, closed_form=candidate.memory
            )
        ui.say(
            f"{candidate.plan.method} needs {needs(exact)} by dry run, not {needs(candidate)}: it "
            "does not fit"
        )
        tried.append(exact)
        smaller = _smaller(planned, candidate, exact)
        if smaller is not None and len(tried) < _MOST_TRIED:
            waiting.insert(0, smaller)
    nearest = min(tried, key=lambda one: needed_bytes(one.memory, margin) - one.device.free_bytes)
    missing = needed_bytes(nearest.memory, margin) - nearest.device.free_bytes
    raise DoesNotFitError(
        f"by dry run no plan fits {nearest.device.name}: {format_bytes(missing)} are missing",
        "cut rows with a smaller `--max-length`, add `--gradient-checkpointing`, or take a "
        "smaller model",
    )


def _smaller(planned: Planned, candidate: Evaluated, exact: Evaluated) -> Evaluated | None:
    """The method's next plan: the best if the closed form is as far off as it was here."""
    plan = candidate.plan
    offer = planned.offer.with_less_memory(
        needed_bytes(exact.memory) / needed_bytes(candidate.memory)
    )
    given = {"method": plan.method, "quantization": plan.quantization}
    try:
        found = offer.ranking(planned.source.spec, planned.profile, **given).best
    except InputError:
        return None
    return None if found is None or found.plan == plan else _with_all_memory(found, planned)


def _with_all_memory(found: Evaluated, planned: Planned) -> Evaluated:
    """On the devices as they are."""
    devices = planned.offer.devices
    if isinstance(devices, Device):
        team = structs.replace(found.team, device=devices)
    else:
        indices = [member.index for member in found.team.members]
        members = [gpu for gpu in devices if gpu.index in indices]
        team = roomiest(members, len(members))
    return structs.replace(found, team=team)


def _with_exact_memory(planned: Planned, candidate: Evaluated, runner: DryRunner) -> Evaluated:
    plan = candidate.plan
    longest = min(planned.profile.longest_in_run, plan.max_length)
    case = case_of(
        planned.source,
        plan,
        candidate.device,
        row_length=longest,
        padded=planned.profile.on(installed_stack(candidate.device), plan).padded,
    )
    memory = memory_of(runner.run(case), planned.source, plan, candidate.device)
    return structs.replace(candidate, memory=memory)
