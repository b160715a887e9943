"""Joins data, machine and model into a plan: what `plan` and `auto` share."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from msgspec import Struct, structs

from ftplan.launcher import default_model
from ftplan.launcher.costs import usd_for
from ftplan.launcher.data.asked import DataAsked
from ftplan.launcher.data.data_file import DataFile
from ftplan.launcher.data.hashes import RowHashes, row_hashes
from ftplan.launcher.data.overlong import Rule
from ftplan.launcher.data.profiling import check_lengths, make_split, profile_data
from ftplan.launcher.data.tokens import RowTokenizer, load_tokenizer
from ftplan.launcher.emit import check_launched
from ftplan.launcher.model_source import (
    ModelSource,
    cached_folder,
    find_source,
    has_weights,
    hub_offline,
)
from ftplan.launcher.own_stack import installed_stack
from ftplan.launcher.probe import probe_machine
from ftplan.launcher.training.config import checked_objective
from ftplan.launcher.ui import Ui
from ftplan.planner.closed_form import check_modelled_method
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import DoesNotFitError, InputError
from ftplan.planner.goals import ANY_PLAN, Limits, Wanted, why_not
from ftplan.planner.hardware_spec import Device, Host, Machine
from ftplan.planner.host_verdict import lacking_disk, lacking_ram
from ftplan.planner.ladder import Rung, ladder, more_gpus
from ftplan.planner.memory import needed_bytes
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan, check_setting
from ftplan.planner.policy import CPU_TIME_BUDGET_SECONDS, MODEL_CHOICE_SECONDS
from ftplan.planner.ranking import Evaluated, Ranking
from ftplan.planner.run_time import RunTime, limit_to_time_budget, optimizer_steps
from ftplan.planner.search import choose_plan
from ftplan.planner.units import format_bytes
from ftplan.profiles import lowest_prices, model_catalog

TRAIN_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")

# How to get them; ftplan is installed from its folder.
INSTALL_TRAINING = "`pip install -c constraints.txt '.[train]'` in ftplan's folder"

# Licences under which a model may be chosen for somebody who named none.
_FREE_LICENCES = ("Apache-2.0", "MIT")


class Offer(Struct, frozen=True, kw_only=True):
    """Devices to choose of, and what is asked of a plan on them.

    `devices`: one, of which there are as many as asked for, or the GPUs of a machine. `divides`:
    whether they may divide what a model holds.
    """

    devices: Device | Sequence[Device]
    given: Mapping[str, Any]
    wanted: Wanted
    divides: bool

    @property
    def device(self) -> Device:
        """The one with the most free memory."""
        if isinstance(self.devices, Device):
            return self.devices
        return max(self.devices, key=lambda gpu: gpu.free_bytes)

    def ranking(self, model: ModelSpec, profile: DataProfile, **more: Any) -> Ranking:
        """Plans on the devices; `more`: settings beside the given ones. Raises InputError as
        `choose_plan` does."""
        return choose_plan(
            model,
            profile,
            self.devices,
            {**self.given, **more},
            installed_stack(self.device),
            divides=self.divides,
            goal=self.wanted.goal,
            limits=self.limits,
        )

    @property
    def limits(self) -> Limits:
        """What a run may take, at the lowest price that is known of the device."""
        prices = [price.usd_per_gpu_hour for price in lowest_prices(self.device.name).values()]
        return Limits(
            seconds=self.wanted.seconds,
            usd=self.wanted.usd,
            usd_per_gpu_hour=min(prices, default=None),
        )


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
    ranking: Ranking
    chosen: Evaluated
    confirmed: bool = False
    """Whether the memory of `chosen` is a dry run's."""

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


def missing_packages() -> list[str]:
    """Packages of the `train` extra that are not installed."""
    return [name for name in TRAIN_PACKAGES if importlib.util.find_spec(name) is None]


def require_training() -> None:
    """Raises InputError when the `train` extra is not installed."""
    missing = missing_packages()
    if missing:
        raise InputError(
            f"training needs packages that are not installed: {', '.join(missing)}",
            INSTALL_TRAINING,
        )


def check_settings(given: Mapping[str, Any]) -> None:
    """Raises before anything slow is done for values that no planned run can have."""
    for name, value in given.items():
        check_setting(name, value)
    checked_objective(given.get("objective", TrainingPlan().objective))
    check_launched(given)
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
    check_settings(given)
    asked = structs.replace(
        asked, objective=given.get("objective"), rule=overlong_rule(given, given.get("max_length"))
    )
    asked.check()
    asked = asked.settled(ui)
    source = find_source(model_name) if model_name else None
    machine = None if named_device else _probe(ui, runs_dir)
    offer = Offer(
        devices=named_device or _offered(machine, given),
        given=given,
        wanted=wanted,
        divides=not for_launch,
    )
    model_why = "asked for"
    if source is None:
        source, model_why = choose_model(asked, offer)
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
        model_why=model_why,
        ranking=ranking,
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


def default_source() -> ModelSource:
    """The embedded default model, with its folder if it has been fetched before."""
    entry = model_catalog()[default_model.NAME]
    converted = default_model.cache_folder() / default_model.NAME
    folder = converted if has_weights(converted) else cached_folder(entry.hub_id)
    return ModelSource(
        spec=entry.spec,
        config=entry.config,
        origin="default",
        hub_id=entry.hub_id,
        folder=folder,
    )


def choose_model(asked: DataAsked, offer: Offer) -> tuple[ModelSource, str]:
    """The base model when none is named, and why.

    On a processor the embedded default. On a GPU the largest chat model of the catalog with a
    free licence that trains in time; without a Hub, the largest of those in the local cache.
    """
    fallback = "the embedded default: small enough for a processor"
    if offer.device.kind == "cuda":
        data, eval_data = asked.read_roughly()
        rough = profile_data(data, make_split(data, eval_data, asked.test_share), eval_data)
        found = _largest_trainable(rough, offer, in_cache_only=_hub_is_out_of_reach())
        if found is not None:
            return found
        fallback = "the embedded default: no larger model of the catalog is in reach or fits"
    return default_source(), fallback


def _hub_is_out_of_reach() -> bool:
    return hub_offline() or not default_model.hub_reachable()


def _largest_trainable(
    profile: DataProfile, offer: Offer, *, in_cache_only: bool
) -> tuple[ModelSource, str] | None:
    entries = sorted(model_catalog().values(), key=lambda e: -e.num_parameters)
    free_to_choose = offer.wanted.seconds is not None or offer.wanted.goal == "largest-model"
    most_seconds = math.inf if free_to_choose else MODEL_CHOICE_SECONDS
    chat = [e for e in entries if e.kind == "chat" and e.licence in _FREE_LICENCES]
    for entry in chat:
        if not entry.spec.loads_as_causal_lm:
            continue
        folder = cached_folder(entry.hub_id)
        if in_cache_only and not (folder and has_weights(folder)):
            continue
        try:
            ranking = offer.ranking(entry.spec, profile)
        except InputError:  # not modelled, or without what was asked for
            continue
        if ranking.best is None:
            continue
        steps = optimizer_steps(ranking.best.plan, profile.num_train_rows)
        if steps * ranking.best.step.step_seconds <= most_seconds:
            where = "in the local cache" if in_cache_only else "of the catalog"
            within = "" if free_to_choose else " and trains within 6 hours"
            why = f"the largest free chat model {where} that fits{within}"
            source = ModelSource(
                spec=entry.spec,
                config=entry.config,
                origin="catalog",
                hub_id=entry.hub_id,
                folder=folder,
            )
            return source, why
    return None


def with_weights(ui: Ui, source: ModelSource) -> ModelSource:
    """The source with a folder whose weights and tokenizer are on this machine.

    Raises InputError for a bare size, and when the Hub is needed but out of reach.
    """
    require_training()
    if source.folder is not None and has_weights(source.folder):
        return source
    if source.hub_id is None:
        if source.folder is not None:
            raise InputError(
                f"`{source.folder}` has no safetensors weights",
                "put model.safetensors (or its shards and index) beside config.json",
            )
        raise InputError(
            f"`{source.spec.name}` is only a size: there are no weights to train",
            "name a model, such as `--model smollm2-135m-instruct`; see `ftplan models`",
        )
    folder = cached_folder(source.hub_id)
    if folder is None or not has_weights(folder):
        folder = _fetch(ui, source.hub_id)
    return structs.replace(source, folder=folder)


def _fetch(ui: Ui, hub_id: str) -> Path:
    """Weights and tokenizer of a Hub model; safetensors only, no code."""
    if hub_id == default_model.HUB_ID:
        return default_model.find_default_model(ui.say)
    if _hub_is_out_of_reach():
        raise InputError(
            f"the weights of `{hub_id}` are not on this machine, and the Hub is out of reach",
            "go online, or give a folder that holds the model with `--model FOLDER`",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    ui.say(f"fetching {hub_id} from the Hub ...")
    patterns = ["*.json", "*.txt", "*.jinja", "*.model", "*.safetensors"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HfHubHTTPError, OSError) as error:
        raise InputError(
            f"the Hub did not deliver `{hub_id}`: {str(error).splitlines()[0]}",
            "a gated model needs its licence accepted and HF_TOKEN set",
        ) from error


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
    error = does_not_fit(source, ranking.nearest, rungs)
    if rungs and not ui.as_json:
        from ftplan.launcher import views

        ui.show(views.ladder_table(rungs, ranking.nearest.device))
    ui.json(
        {
            "schema": 1,
            "plan": None,
            "nearest": {
                "plan": ranking.nearest.reasoned.to_dict(),
                "needs_bytes": needed_bytes(ranking.nearest.memory),
                "free_bytes": ranking.nearest.device.free_bytes,
            },
            "ladder": [structs.asdict(rung) for rung in rungs],
            "error": error.message,
        }
    )
    return error


def does_not_fit(source: ModelSource, nearest: Evaluated, rungs: Sequence[Rung]) -> DoesNotFitError:
    """By how much it misses, and what would fit."""
    device, number = nearest.device, nearest.plan.num_gpus
    needed = needed_bytes(nearest.memory)
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
