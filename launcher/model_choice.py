"""The base model when none is named, and a model's weights on this machine."""

from __future__ import annotations

import math
from pathlib import Path

from msgspec import structs

from ftplan.launcher import default_model
from ftplan.launcher.data.asked import DataAsked
from ftplan.launcher.data.profiling import make_split, profile_data
from ftplan.launcher.model_source import ModelSource, cached_folder, has_weights, hub_offline
from ftplan.launcher.offer import Offer
from ftplan.launcher.packages import require_training
from ftplan.launcher.ui import Ui
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import InputError
from ftplan.planner.policy import MODEL_CHOICE_SECONDS
from ftplan.planner.run_time import optimizer_steps
from ftplan.profiles import model_catalog

# Licences under which a model may be chosen for somebody who named none.
_FREE_LICENCES = ("Apache-2.0", "MIT")


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
