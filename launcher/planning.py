"""Joins data, machine and model into a plan: what `plan` and `auto` share."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from msgspec import Struct, structs

from ftplan.launcher import deepspeed, remote_code
from ftplan.launcher.calibration_file import calibrated
from ftplan.launcher.costs import usd_for
from ftplan.launcher.data.asked import DataAsked
from ftplan.launcher.data.data_file import DataFile
from ftplan.launcher.data.general_pieces import num_general_pieces
from ftplan.launcher.data.hashes import RowHashes, row_hashes
from ftplan.launcher.data.overlong import Rule
from ftplan.launcher.data.profiling import check_lengths, make_split, profile_data
from ftplan.launcher.data.split import Split
from ftplan.launcher.data.templates import check_template_name
from ftplan.launcher.data.tokens import RowTokenizer, load_tokenizer
from ftplan.launcher.emit import check_launched
from ftplan.launcher.model_choice import choose_model, with_weights
from ftplan.launcher.model_source import (
    ModelSource,
    cached_folder,
    find_source,
)
from ftplan.launcher.offer import Offer
from ftplan.launcher.own_stack import installed_stack
from ftplan.launcher.past_runs import margin_of
from ftplan.launcher.probe import probe_machine
from ftplan.launcher.refusal import refusal
from ftplan.launcher.reward_source import reward_source, rewarded_settings, with_judge
from ftplan.launcher.token_settings import is_base_model, token_settings, with_rows_for
from ftplan.launcher.ui import Ui
from ftplan.launcher.would_do import Refused, refused_methods
from ftplan.planner.base_models import ModelChoice, RunnerUp
from ftplan.planner.closed_form import check_modelled_method
from ftplan.planner.cycles import check_steps, num_restarts, restart_steps
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import DoesNotFitError, InputError
from ftplan.planner.evaluation_time import EvaluationTime, evaluation_time
from ftplan.planner.goals import ANY_PLAN, Wanted, why_not
from ftplan.planner.hardware_spec import Device, Host, Machine
from ftplan.planner.host_verdict import lacking_disk, lacking_ram
from ftplan.planner.machines import check_rows
from ftplan.planner.margin import Margin
from ftplan.planner.memory import MemoryEstimate
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.objectives import OBJECTIVES
from ftplan.planner.plan import TrainingPlan, check_setting
from ftplan.planner.policy import CPU_TIME_BUDGET_SECONDS, max_completion_length
from ftplan.planner.ranking import Evaluated, Ranking
from ftplan.planner.recipe import asks_for_tasks
from ftplan.planner.rewards import check_rewarded
from ftplan.planner.run_time import RunTime, limit_to_time_budget, optimizer_steps
from ftplan.planner.teams import divided


class Planned(Struct, frozen=True, kw_only=True):
    """Everything that was found out and chosen."""

    asked: DataAsked
    data: DataFile
    eval_data: DataFile | None
    profile: DataProfile
    tokenizer: RowTokenizer | None
    """Of the model, with its template and new tokens; None where its files are not here."""
    hashes: RowHashes | None
    """How rows are read, divided and rendered; None without a tokenizer."""
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
    def chat_template(self) -> bool:
        """Whether rows are conversations that more than plain headings are put around."""
        if self.tokenizer is None or self.data.kind == "pretraining":
            return False
        return self.tokenizer.has_chat_template

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
    def evaluation_time(self) -> EvaluationTime:
        """How long it evaluates beside that."""
        plan, device = self.chosen.plan, self.device
        return evaluation_time(
            self.source.spec,
            plan,
            device,
            self.profile,
            self.chosen.step,
            steps=self.steps,
            num_pieces=num_general_pieces(self.tokenizer),
            stack=self.profile.on(installed_stack(device), plan),
        )

    @property
    def usd(self) -> dict[str, float | None]:
        """What its GPUs cost for that time, by way of billing."""
        return usd_for(self.device, self.chosen.plan.num_gpus * self.run_time.seconds)

    def why_not(self, other: Evaluated) -> str:
        """Why another plan that fits was not taken."""
        return why_not(other, self.chosen, self.ranking.goal)


class FoundOut(Struct, frozen=True, kw_only=True):
    """What there is to plan with. `choice`: of a model, where none was named."""

    asked: DataAsked
    data: DataFile
    eval_data: DataFile | None
    split: Split
    profile: DataProfile
    tokenizer: RowTokenizer | None
    machine: Machine | None
    source: ModelSource
    choice: ModelChoice | None
    offer: Offer

    @property
    def hashes(self) -> RowHashes | None:
        """How rows are read, divided and rendered; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return row_hashes(self.data, self.split, self.eval_data, self.tokenizer)


def check_settings(given: Mapping[str, Any], *, for_launch: bool = True) -> None:
    """Raises before anything slow is done for values that no planned run can have."""
    for name, value in given.items():
        check_setting(name, value)
    _check_rewarded(given, given.get("objective", TrainingPlan().objective))
    check_launched(given)
    if for_launch:
        deepspeed.check_installed(given.get("sharding", TrainingPlan().sharding))
    check_modelled_method(given.get("method", TrainingPlan().method))
    check_template_name(given.get("chat_template", TrainingPlan().chat_template))


def find_out(
    ui: Ui,
    *,
    asked: DataAsked,
    model_name: str | None,
    named_device: Device | None,
    given: Mapping[str, Any],
    runs_dir: Path,
    for_launch: bool,
    wanted: Wanted = ANY_PLAN,
    machine: Machine | None = None,
    calibrate: bool = True,
    on_processor: bool = False,
) -> FoundOut:
    """What there is to plan with; as `make_plan`, which chooses of it."""
    given = rewarded_settings(given)
    check_settings(given, for_launch=for_launch)
    asked = structs.replace(
        asked,
        objective=given.get("objective"),
        rule=overlong_rule(given, given.get("max_length")),
        files_are_tasks=asks_for_tasks(given),
    )
    asked.check()
    judge = reward_source(given)
    asked = asked.settled(ui)
    source = find_source(model_name) if model_name else None
    machine = None if named_device else machine or _probe(ui, runs_dir, calibrate)
    devices = named_device or _offered(machine, given, on_processor=on_processor)
    offer = Offer(
        devices=devices,
        given=given,
        wanted=wanted,
        launches=for_launch,
        has_liger=named_device is None and importlib.util.find_spec("liger_kernel") is not None,
        host=machine.host if machine else None,
        margin=_margin(devices, runs_dir),
    )
    choice: ModelChoice | None = None
    if source is None:
        rough = structs.replace(asked, rule=_completed(asked.rule, None, devices, given))
        source, choice = choose_model(rough, offer, here=named_device is None, judge=judge)
    if for_launch:
        source = with_weights(ui, source)
        remote_code.check(source)
        judge = judge and with_weights(ui, judge)
    tokenizer = tokenizer_of(ui, source, given)
    tokens = token_settings(tokenizer, given)
    source = with_judge(with_rows_for(source, tokenizer, given), judge)
    offer = structs.replace(offer, given={**given, **tokens.values}, reasons=tokens.reasons)
    # Unless told otherwise, no row is cut that the model can take (policy.max_length).
    longest = given.get("max_length", source.spec.max_position_embeddings)
    rule = overlong_rule(given, longest)
    asked = structs.replace(asked, rule=_completed(rule, source.spec, devices, given))
    data, eval_data = asked.read(ui, tokenizer)
    _check_rewarded(given, data.objective)
    _check_answers(data, given)
    split = make_split(data, eval_data, asked.test_share)
    check_lengths(data, split, eval_data, strict=asked.strict)
    return FoundOut(
        asked=asked,
        data=data,
        eval_data=eval_data,
        split=split,
        profile=profile_data(data, split, eval_data),
        tokenizer=tokenizer,
        machine=machine,
        source=source,
        choice=choice,
        offer=offer,
    )


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
    machine: Machine | None = None,
    calibrate: bool = True,
    on_processor: bool = False,
) -> Planned:
    """Find out what is there and choose a plan. `machine`: what was found of it already.
    `calibrate`: correct predictions by what was learned of finished runs here. `on_processor`: on
    that, whatever GPUs there are, in as many processes as `num_gpus` says.

    With `for_launch` weights and tokenizer are fetched where need be. Raises InputError for
    input that cannot be used and DoesNotFitError when nothing fits, or the machine has not the RAM
    or disk for what is to be launched.
    """
    found = find_out(
        ui,
        asked=asked,
        model_name=model_name,
        named_device=named_device,
        given=given,
        runs_dir=runs_dir,
        for_launch=for_launch,
        wanted=wanted,
        machine=machine,
        calibrate=calibrate,
        on_processor=on_processor,
    )
    source, profile, offer, machine = found.source, found.profile, found.offer, found.machine
    ranking, chosen = _chosen(ui, source, profile, offer)
    if machine is not None and for_launch:
        _check_host(chosen, machine.host, profile)
    return Planned(
        asked=found.asked,
        data=found.data,
        eval_data=found.eval_data,
        profile=profile,
        tokenizer=found.tokenizer,
        hashes=found.hashes,
        machine=machine,
        device=chosen.device,
        source=source,
        model_why=found.choice.why if found.choice else "asked for",
        runner_up=found.choice.runner_up if found.choice else None,
        offer=offer,
        ranking=ranking,
        refused=refused_methods(source.spec, profile, offer, ranking.rejected),
        chosen=chosen,
    )


def with_cycles(chosen: Evaluated, steps: int) -> Evaluated:
    """The plan with the cycles of its method written out, which follow from the run's steps."""
    plan = chosen.plan
    if not plan.resolved_method.merges or plan.jagged_restart_steps is not None:
        return chosen
    every = restart_steps(plan, steps)
    why = f"{num_restarts(steps, every) + 1} cycles in {steps:,} steps"
    reasoned = chosen.reasoned.replace("derived", why, jagged_restart_steps=every)
    return structs.replace(chosen, reasoned=reasoned)


def _check_rewarded(given: Mapping[str, Any], objective: str) -> None:
    check_rewarded(objective, given.get("reward_model"), given.get("reward", ()))


def _check_answers(data: DataFile, given: Mapping[str, Any]) -> None:
    """Raises InputError where a rule compares with answers and rows have none."""
    if data.kind == "online" and given.get("reward"):
        raise InputError(
            f"`--reward {','.join(given['reward'])}` compares with the rows' answers, and "
            f"`{data.source.files[0].path}` has questions alone",
            "add answers to the rows, or give `--reward-model`",
        )


def _completed(
    rule: Rule,
    model: ModelSpec | None,
    devices: Device | Sequence[Device],
    given: Mapping[str, Any],
) -> Rule:
    """With what the model, or one that is still to be chosen, adds to each prompt, where it
    does."""
    if not OBJECTIVES[given.get("objective", "sft")].generates:
        return rule
    device = devices if isinstance(devices, Device) else devices[0]
    advised = max_completion_length(model, device.kind).value
    length = given.get("max_completion_length", advised)
    return structs.replace(rule, completion_length=length)


def planned_again(
    ui: Ui, planned: Planned, profile: DataProfile, given: Mapping[str, Any], *, for_launch: bool
) -> Planned:
    """The plan for other rows or with other settings given, all else as it was found; raises as
    `make_plan` does."""
    offer = structs.replace(planned.offer, given=given)
    ranking, chosen = _chosen(ui, planned.source, profile, offer)
    if planned.machine is not None and for_launch:
        _check_host(chosen, planned.machine.host, profile)
    return structs.replace(
        planned,
        profile=profile,
        offer=offer,
        ranking=ranking,
        refused=refused_methods(planned.source.spec, profile, offer, ranking.rejected),
        chosen=chosen,
        device=chosen.device,
        closed_form=None,
    )


def _chosen(
    ui: Ui, source: ModelSource, profile: DataProfile, offer: Offer
) -> tuple[Ranking, Evaluated]:
    """The ranking and its best plan."""
    ranking = offer.ranking(source.spec, profile)
    if ranking.best is None:
        raise refusal(ui, source, profile, offer, ranking)
    check_rows(ranking.best.plan, profile.num_train_rows)
    return ranking, settled(ranking.best, profile, offer.given)


def settled(chosen: Evaluated, profile: DataProfile, given: Mapping[str, Any]) -> Evaluated:
    """A plan with what follows from the number of its steps; on a processor one that keeps to the
    time budget. Raises InputError for a method that has too few."""
    if chosen.device.kind == "cpu":
        chosen = limit_to_time_budget(chosen, profile, given, CPU_TIME_BUDGET_SECONDS)
    steps = optimizer_steps(chosen.plan, profile.num_train_rows)
    check_steps(chosen.plan, steps)
    return with_cycles(chosen, steps)


def _check_host(chosen: Evaluated, host: Host, profile: DataProfile) -> None:
    """Raises DoesNotFitError where the machine has not the RAM or disk."""
    for lack, hint in host_lacks(chosen, host, chosen.device, profile):
        raise DoesNotFitError(lack, hint)


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


def _probe(ui: Ui, runs_dir: Path, calibrate: bool) -> Machine:
    machine = probe_machine(run_dir=runs_dir)
    if not machine.gpus and importlib.util.find_spec("torch"):
        ui.say("no GPU found; measuring what this processor computes ...")
        machine = probe_machine(run_dir=runs_dir, measure_cpu=True)
    return calibrated(ui, machine) if calibrate else machine


def _offered(
    machine: Machine | None, given: Mapping[str, Any], *, on_processor: bool
) -> Device | Sequence[Device]:
    """The machine's GPUs, else its processor; raises InputError where more GPUs are asked for than
    there are. On a processor that is asked for, each of several processes has its part of it."""
    assert machine is not None
    wanted, count = given.get("num_gpus", 1), len(machine.gpus)
    if on_processor:
        return divided(machine.cpu, wanted)
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


def tokenizer_of(
    ui: Ui, source: ModelSource, given: Mapping[str, Any] = MappingProxyType({})
) -> RowTokenizer | None:
    """The model's own tokenizer where its files are here; None (and a word) otherwise.

    `given`: settings, of which template and tokens are put into it. Raises InputError where they
    are not to be had.
    """
    folder = source.folder or (cached_folder(source.hub_id) if source.hub_id else None)
    if folder is None or importlib.util.find_spec("transformers") is None:
        ui.say("no tokenizer at hand: token lengths are estimated from characters")
        return None
    ui.say("reading the rows with the model's tokenizer ...")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return load_tokenizer(
            folder,
            str(given.get("chat_template", TrainingPlan().chat_template)),
            is_base=is_base_model(source),
            add_tokens=given.get("add_tokens", ()),
            train_tokens=given.get("train_tokens", ()),
        )
    except (OSError, ValueError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"the tokenizer of `{folder}` cannot be loaded: {first_line}",
            "the folder needs a tokenizer.json beside its config.json",
        ) from error
