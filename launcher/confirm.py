"""The check before a launch: the chosen plan's dry run on the longest batch.

Where the dry run needs more memory than there is, the next plan of the ranking is tried.
"""

from __future__ import annotations

from msgspec import structs

from ftplan.launcher.exact import DryRunner, case_of, memory_of, shown_dry_runs
from ftplan.launcher.planning import Planned
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import DoesNotFitError, InputError, RunFailedError
from ftplan.planner.memory import fits, needed_bytes
from ftplan.planner.ranking import Evaluated
from ftplan.planner.units import format_bytes

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
    for candidate in (planned.chosen, *planned.ranking.alternatives):
        exact = _with_exact_memory(planned, candidate, runner)
        if fits(exact.memory, planned.device):
            return structs.replace(planned, chosen=exact, confirmed=True)
        ui.say(
            f"{candidate.plan.method} needs {format_bytes(needed_bytes(exact.memory))} by dry run, "
            f"not {format_bytes(needed_bytes(candidate.memory))}: it does not fit"
        )
        tried.append(exact)
    nearest = min(tried, key=lambda evaluated: needed_bytes(evaluated.memory))
    missing = needed_bytes(nearest.memory) - planned.device.free_bytes
    raise DoesNotFitError(
        f"by dry run no plan fits {planned.device.name}: {format_bytes(missing)} are missing",
        "cut rows with a smaller `--max-length`, add `--gradient-checkpointing`, or take a "
        "smaller model",
    )


def _with_exact_memory(planned: Planned, candidate: Evaluated, runner: DryRunner) -> Evaluated:
    plan = candidate.plan
    longest = min(planned.profile.longest_in_run, plan.max_length)
    batch = planned.profile.trained_lengths[: plan.per_device_train_batch_size]
    case = case_of(
        planned.source,
        plan,
        planned.device,
        row_length=longest,
        padded=batch[-1] < longest,
    )
    memory = memory_of(runner.run(case), planned.source, plan, planned.device)
    return structs.replace(candidate, memory=memory)
