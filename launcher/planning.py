"""Joins data, machine and model into a plan: what `plan` and `auto` share."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, structs

from ftplan.launcher.costs import usd_for
from ftplan.launcher.data.asked import DataAsked
from ftplan.launcher.data.data_file import DataFile
from ftplan.launcher.data.hashes import RowHashes, row_hashes
from ftplan.launcher.data.overlong import Rule
from ftplan.launcher.data.profiling import check_lengths, make_split, profile_data
from ftplan.launcher.data.tokens import RowTokenizer, load_tokenizer
from ftplan.launcher.emit import check_launched
from ftplan.launcher.model_choice import choose_model, with_weights
from ftplan.launcher.model_source import (
    ModelSource,
    cached_folder,
    find_source,
)
from ftplan.launcher.offer import Offer
from ftplan.launcher.past_runs import margin_of
from ftplan.launcher.probe import probe_machine
from ftplan.launcher.refusal import refusal
from ftplan.launcher.training.config import checked_objective
from ftplan.launcher.ui import Ui
from ftplan.launcher.would_do import Refused, refused_methods
from ftplan.planner.base_models import ModelChoice, RunnerUp
from ftplan.planner.closed_form import check_modelled_method
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import DoesNotFitError, InputError
from ftplan.planner.goals import ANY_PLAN, Wanted, why_not
from ftplan.planner.hardware_spec import Device, Host, Machine
from ftplan.planner.host_verdict import lacking_disk, lacking_ram
from ftplan.planner.margin import Margin
from ftplan.planner.memory import MemoryEstimate
from ftplan.planner.plan import TrainingPlan, check_setting
from ftplan.planner.policy import CPU_TIME_BUDGET_SECONDS
from ftplan.planner.ranking import Evaluated, Ranking
from ftplan.planner.recipe import asks_for_tasks
from ftplan.planner.run_time import RunTime, limit_to_time_budget, optimizer_steps


class Planned(Struct, frozen=True, kw_only=True):
    """Everything that was found out and chosen."""

    asked: DataAsked
    data: DataFile
    eval_data: DataFile | None
    profile: DataProfile
    template: str
    hashes: RowHashes | None
    """How rows are read, divided and rendered; None without a tokenizer."""
    chat_template: bool
    """Whether rows are conversations, put into the tokenizer's own template."""
    machine: Machine | None
    device: Device
    source: ModelSource
    model_why: str
    runner_up: RunnerUp | None
    """The model that would have been next, where none was named."""
    offer: Offer
    ranking: Ranking
    refused: tuple[Refused, ...]
    """The ranking's rejected methods, with what would do for each."""
    chosen: Evaluated
    closed_form: MemoryEstimate | None = None
    """What was estimated of `chosen` before its memory became a dry run's; None where it has not.
    """

    @property
    def confirmed(self) -> bool:
        """Whether the memory of `chosen` is a dry run's."""
        return self.closed_form is not None

    @property
    def ends_early(self) -> bool:
        """Whether a processor's time budget ends the run."""
        return self.chosen.reasoned.reasons["max_steps"].origin == "derived"

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return optimizer_steps(self.chosen.plan, self.profile.num_train_rows)

    @property
    def run_time(self) -> RunTime:
        """How long the run trains."""
        return RunTime.of(self.chosen.plan, self.chosen.step, self.profile.num_train_rows)

    @property
    def usd(self) -> dict[str, float | None]:
        """What its GPUs cost for that time, by way of billing."""
        return usd_for(self.device, self.chosen.plan.num_gpus * self.run_time.seconds)

    def why_not(self, other: Evaluated) -> str:
        """Why another plan that fits was not taken."""
        return why_not(other, self.chosen, self.ranking.goal)


def check_settings(given: Mapping[str, Any], *, for_launch: bool = True) -> None:
    """Raises before anything slow is done for values that no planned run can have."""
    for name, value in given.items():
        check_setting(name, value)
    checked_objective(given.get("objective", TrainingPlan().objective))
    # GPUs that divide state are planned for, and a caution says that they are not launched.
    kept = {name: value for name, value in given.items() if for_launch or name != "sharding"}
    check_launched(kept)
    check_modelled_method(given.get("method", TrainingPlan().method))


def make_plan(
    ui: Ui,
    *,
    asked: DataAsked,
    model_name: str | None,
    named_device: Device | None,
    given: Mapping[str, Any],
    runs_dir: Path,
    for_launch: bool,
    wanted: Wanted = ANY_PLAN,
) -> Planned:
    """Find out what is there and choose a plan.

    With `for_launch` weights and tokenizer are fetched where need be. Raises InputError for
    input that cannot be used and DoesNotFitError when nothing fits, or the machine has not the RAM
    or disk for what is to be launched.
    """
    check_settings(given, for_launch=for_launch)
    asked = structs.replace(
        asked,
        objective=given.get("objective"),
        rule=overlong_rule(given, given.get("max_length")),
        files_are_tasks=asks_for_tasks(given),
    )
    asked.check()
    asked = asked.settled(ui)
    source = find_source(model_name) if model_name else None
    machine = None if named_device else _probe(ui, runs_dir)
    devices = named_device or _offered(machine, given)
    offer = Offer(
        devices=devices,
        given=given,
        wanted=wanted,
        divides=not for_launch,
        has_liger=named_device is None and importlib.util.find_spec("liger_kernel") is not None,
        host=machine.host if machine else None,
        margin=_margin(devices, runs_dir),
    )
    choice: ModelChoice | None = None
    if source is None:
        source, choice = choose_model(asked, offer, here=named_device is None)
    if for_launch:
        source = with_weights(ui, source)
    tokenizer = tokenizer_of(ui, source)
    # Unless told otherwise, no row is cut that the model can take (policy.max_length).
    longest = given.get("max_length", source.spec.max_position_embeddings)
    asked = structs.replace(asked, rule=overlong_rule(given, longest))
    data, eval_data = asked.read(ui, tokenizer)
    checked_objective(data.objective)
    split = make_split(data, eval_data, asked.test_share)
    check_lengths(data, split, eval_data, strict=asked.strict)
    profile = profile_data(data, split, eval_data)
    ranking = offer.ranking(source.spec, profile)
    if ranking.best is None:
        raise refusal(ui, source, profile, offer, ranking)
    chosen = ranking.best
    device = chosen.device
    if device.kind == "cpu":
        chosen = limit_to_time_budget(chosen, profile, given, CPU_TIME_BUDGET_SECONDS)
    if machine is not None and for_launch:
        for lack, hint in host_lacks(chosen, machine.host, device, profile):
            raise DoesNotFitError(lack, hint)
    return Planned(
        asked=asked,
        data=data,
        eval_data=eval_data,
        profile=profile,
        template=tokenizer.template if tokenizer else "",
        hashes=row_hashes(data, split, eval_data, tokenizer) if tokenizer else None,
        chat_template=_uses_chat_template(tokenizer, data),
        machine=machine,
        device=device,
        source=source,
        model_why=choice.why if choice else "asked for",
        runner_up=choice.runner_up if choice else None,
        offer=offer,
        ranking=ranking,
        refused=refused_methods(source.spec, profile, offer, ranking.rejected),
        chosen=chosen,
    )


def overlong_rule(given: Mapping[str, Any], longest: int | None) -> Rule:
    """What becomes of rows of more tokens than the longest that is taken whole."""
    return Rule(str(given.get("overlong", TrainingPlan().overlong)), longest)


def host_lacks(
    chosen: Evaluated, host: Host, device: Device, profile: DataProfile
) -> list[tuple[str, str]]:
    """What the machine around the device lacks for a run, and what to do about each."""
    steps = optimizer_steps(chosen.plan, profile.num_train_rows)
    num_tokens = profile.train_counts.num_tokens + profile.eval_counts.num_tokens
    found = (
        (
            lacking_ram(chosen.memory, host, device),
            "end other programs, or take a machine with more RAM",
        ),
        (
            lacking_disk(chosen.memory, host, chosen.plan, steps, num_tokens),
            "free some disk, or write elsewhere with `--runs-dir`",
        ),
    )
    return [(lack, hint) for lack, hint in found if lack is not None]


def _probe(ui: Ui, runs_dir: Path) -> Machine:
    machine = probe_machine(run_dir=runs_dir)
    if machine.gpus:
        return machine
    if importlib.util.find_spec("torch"):
        ui.say("no GPU found; measuring what this processor computes ...")
        return probe_machine(run_dir=runs_dir, measure_cpu=True)
    return machine


def _offered(machine: Machine | None, given: Mapping[str, Any]) -> Device | Sequence[Device]:
    """The machine's GPUs, else its processor; raises InputError where more GPUs are asked for than
    there are."""
    assert machine is not None
    wanted, count = given.get("num_gpus", 1), len(machine.gpus)
    if wanted > max(1, count):
        raise InputError(
            f"`--num-gpus {wanted}` asks for more GPUs than this machine has: {count}",
            "leave it out; `ftplan plan DATA --gpu NAME` plans for GPUs that are elsewhere",
        )
    return machine.gpus or machine.cpu


def _margin(devices: Device | Sequence[Device], runs_dir: Path) -> Margin:
    """Of unlike GPUs the largest."""
    several = [devices] if isinstance(devices, Device) else devices
    kinds = {device.name: device for device in several}
    margins = (margin_of(device, runs_dir) for device in kinds.values())
    return max(margins, key=lambda margin: margin.share)


def _uses_chat_template(tokenizer: RowTokenizer | None, data: DataFile) -> bool:
    if tokenizer is None or not tokenizer.has_chat_template:
        return False
    return data.kind != "pretraining"


def tokenizer_of(ui: Ui, source: ModelSource) -> RowTokenizer | None:
    """The model's own tokenizer where its files are here; None (and a word) otherwise."""
    folder = source.folder or (cached_folder(source.hub_id) if source.hub_id else None)
    if folder is None or importlib.util.find_spec("transformers") is None:
        ui.say("no tokenizer at hand: token lengths are estimated from characters")
        return None
    ui.say("reading the rows with the model's tokenizer ...")
    try:
        return load_tokenizer(folder)
    except (OSError, ValueError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"the tokenizer of `{folder}` cannot be loaded: {first_line}",
            "the folder needs a tokenizer.json beside its config.json",
        ) from error
