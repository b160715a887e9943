"""The base model when none is named, and a model's weights on this machine."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

from msgspec import structs

from ftplan.launcher import default_model, remote_code
from ftplan.launcher.data.asked import DataAsked
from ftplan.launcher.data.profiling import make_split, profile_data
from ftplan.launcher.model_source import (
    ModelSource,
    cached_folder,
    check_safetensors,
    has_weights,
    hub_offline,
)
from ftplan.launcher.offer import Offer
from ftplan.launcher.packages import require_training
from ftplan.launcher.ui import Ui
from ftplan.planner import policy
from ftplan.planner.base_models import (
    BaseModel,
    ModelChoice,
    Obstacle,
    RunnerUp,
    choose_base_model,
    in_order,
    too_large,
    too_slow,
)
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import InputError
from ftplan.planner.goals import ranked
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.policy import MODEL_CHOICE_SECONDS
from ftplan.planner.ranking import Evaluated, Ranking
from ftplan.planner.rewards import with_reward_model
from ftplan.planner.run_time import RunTime
from ftplan.planner.units import format_seconds
from ftplan.profiles import ModelEntry, model_catalog


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


def choose_model(
    asked: DataAsked, offer: Offer, *, here: bool, judge: ModelSource | None = None
) -> tuple[ModelSource, ModelChoice]:
    """The base model when none is named, and why.

    On a processor the embedded default. On a GPU what `choose_base_model` takes of the catalog;
    where training is to be `here` and the Hub is out of reach, of the local cache. `judge`: the
    reward model, which stands beside each.
    """
    default = default_source()
    if offer.device.kind != "cuda":
        return default, _for_a_processor(default.spec.name)
    data, eval_data = asked.read_roughly()
    rough = profile_data(data, make_split(data, eval_data, asked.test_share), eval_data)
    trials = _Trials(rough, offer, judge)
    in_cache_only = here and _hub_is_out_of_reach()
    choice = choose_base_model(
        [
            model
            for model in map(_published, trials.entries.values())
            if not in_cache_only or trials.has_weights(model)
        ],
        rough,
        trials.bounded,
        trials.tried,
        where="in the local cache" if in_cache_only else "of the catalog",
        within=trials.within,
    )
    if choice is None:
        why = "the embedded default: no larger model of the catalog is in reach or fits"
        return default, ModelChoice(name=default.spec.name, why=why)
    return trials.source(choice.name), choice


def _for_a_processor(name: str) -> ModelChoice:
    """The embedded default, and the next larger one of its kind."""
    catalog = model_catalog()
    chosen = catalog[name]
    models = in_order(map(_published, catalog.values()), chosen.kind, "")
    larger = [
        model
        for model in models
        if model.kind == chosen.kind and model.num_parameters > chosen.num_parameters
    ]
    times = larger[-1].num_parameters / chosen.num_parameters
    why_not = f"{times:.2g} times as large, and a processor takes as much longer"
    return ModelChoice(
        name=name,
        why="the embedded default: small enough for a processor",
        runner_up=RunnerUp(name=larger[-1].name, why_not=why_not),
    )


def _published(entry: ModelEntry) -> BaseModel:
    return BaseModel(
        name=entry.name,
        kind=entry.kind,
        num_parameters=entry.num_parameters,
        licence=entry.licence,
        languages=entry.languages,
        specialty=entry.specialty,
    )


class _Trials:
    """What speaks against models of the catalog on an offer, for rows of a first look."""

    def __init__(
        self, profile: DataProfile, offer: Offer, judge: ModelSource | None = None
    ) -> None:
        self.entries = model_catalog()
        self._profile, self._offer = profile, offer
        self._judge = judge and judge.spec
        self._specs: dict[str, ModelSpec] = {}
        wanted = offer.wanted
        self._most_seconds = wanted.seconds or MODEL_CHOICE_SECONDS
        if wanted.seconds is None and wanted.goal == "largest-model":
            self._most_seconds = math.inf
        # A method's fastest plan tells by itself whether it is too late, and a search without a
        # limit tells it from one that does not fit. Other goals may pass a faster plan over.
        if wanted.goal not in ("cheapest", "least-memory"):
            self._offer = structs.replace(offer, wanted=structs.replace(wanted, seconds=None))

    @property
    def within(self) -> str:
        """What a run has to keep, for the reason."""
        if math.isinf(self._most_seconds):
            return ""
        return f" and trains within {format_seconds(self._most_seconds)}"

    def spec(self, name: str) -> ModelSpec:
        """The same each time, since it remembers what was worked out of it."""
        if name not in self._specs:
            spec = self.entries[name].spec
            self._specs[name] = with_reward_model(spec, self._judge) if self._judge else spec
        return self._specs[name]

    def has_weights(self, model: BaseModel) -> bool:
        folder = cached_folder(self.entries[model.name].hub_id)
        return folder is not None and has_weights(folder)

    def source(self, name: str) -> ModelSource:
        entry = self.entries[name]
        return ModelSource(
            spec=self.spec(name),
            config=entry.config,
            origin="catalog",
            hub_id=entry.hub_id,
            folder=cached_folder(entry.hub_id),
        )

    def bounded(self, model: BaseModel) -> Obstacle | None:
        """What speaks against a model without a look at plans."""
        if not self.spec(model.name).loads_as_causal_lm:
            return Obstacle("transformers does not load it as a causal language model")
        spec, available = partial(self.spec, model.name), self._offer.available
        large = too_large(model, spec, self._profile, available)
        return large or too_slow(spec(), self._profile, available, self._most_seconds)

    def tried(self, model: BaseModel) -> Obstacle | None:
        """What speaks against the plan that would be taken."""
        spec, offer = self.spec(model.name), self._offer
        preferred = policy.preferred_methods(spec, self._profile, offer.device.kind, offer.given)
        obstacle: Obstacle | None = None
        found: list[Evaluated] = []
        for method in preferred.value:
            alone = structs.replace(offer.available, given={**offer.given, "method": method})
            large = too_large(model, partial(self.spec, model.name), self._profile, alone)
            if large is not None:
                obstacle = obstacle or large
                continue
            try:
                ranking = offer.ranking(spec, self._profile, method=method)
            except InputError as error:  # not modelled, or without what was asked for
                obstacle = obstacle or Obstacle(error.message)
                continue
            if ranking.best is None:
                obstacle = obstacle or _obstacle(ranking)
                continue
            found.append(ranking.best)
            late = self._late(ranked(found, offer.wanted.goal)[0])
            if late is None:
                return None
            obstacle = late
        return obstacle

    def _late(self, best: Evaluated) -> Obstacle | None:
        seconds = RunTime.of(best.plan, best.step, self._profile.num_train_rows).seconds
        if seconds <= self._most_seconds:
            return None
        most = format_seconds(self._most_seconds)
        return Obstacle(f"takes {format_seconds(seconds)}, over {most}", late=True)


def _obstacle(ranking: Ranking) -> Obstacle:
    """Why there is no plan of a method."""
    (rejection,) = ranking.rejected
    return Obstacle(rejection.reason, late=rejection.needs_bytes is None)


def _hub_is_out_of_reach() -> bool:
    return hub_offline() or not default_model.hub_reachable()


def with_weights(ui: Ui, source: ModelSource) -> ModelSource:
    """The source with a folder whose weights and tokenizer are on this machine.

    Raises InputError for a bare size, and when the Hub is needed but out of reach.
    """
    require_training()
    if source.folder is not None and has_weights(source.folder):
        return source
    if source.hub_id is None:
        if source.folder is not None:
            check_safetensors(source.folder)
            raise InputError(
                f"`{source.folder}` has no safetensors weights",
                "put model.safetensors (or its shards and index) beside config.json",
            )
        raise InputError(
            f"`{source.spec.name}` is only a size: there are no weights to train",
            "name a model, such as `--model smollm2-135m-instruct`; see `ftplan models`",
        )
    folder = cached_folder(source.hub_id)
    wants_code = remote_code.is_allowed() and folder is not None and remote_code.lacks_code(folder)
    if folder is None or not has_weights(folder) or wants_code:
        folder = _fetch(ui, source.hub_id)
        if not has_weights(folder):
            raise InputError(
                f"`{source.hub_id}` has no safetensors weights on the Hub; ftplan reads no pickles",
                "choose a copy that has them, or convert one that you trust and give its folder",
            )
    return structs.replace(source, folder=folder)


def _fetch(ui: Ui, hub_id: str) -> Path:
    """Weights and tokenizer of a Hub model; safetensors only, no code unless it may run."""
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
    patterns += ["*.py"] if remote_code.is_allowed() else []
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HfHubHTTPError, OSError) as error:
        raise InputError(
            f"the Hub did not deliver `{hub_id}`: {str(error).splitlines()[0]}",
            "a gated model needs its licence accepted and HF_TOKEN set",
        ) from error
