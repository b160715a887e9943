"""What a tokenizer makes of the settings that speak of templates and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from ftplan.launcher.data.tokens import RowTokenizer
from ftplan.launcher.model_source import ModelSource
from ftplan.planner.memory import estimate_memory
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import Reason, TrainingPlan
from ftplan.planner.units import format_bytes, format_count
from ftplan.planner.vocabulary import (
    OF_TEMPLATE,
    check_named_tokens,
    saved_for_tokens,
    shown_tokens,
)
from ftplan.profiles import model_catalog


class TokenSettings(Struct, frozen=True, kw_only=True):
    """`values` of a plan's settings, as if given; `reasons` of those that were not."""

    values: Mapping[str, Any]
    reasons: Mapping[str, Reason]


def token_settings(tokenizer: RowTokenizer | None, given: Mapping[str, Any]) -> TokenSettings:
    """Which template is taken, which tokens are new, and which are trained.

    Raises InputError where only a tokenizer could say so, and there is none.
    """
    if tokenizer is None:
        check_named_tokens(given)
        return TokenSettings(values={}, reasons={})
    template = tokenizer.chosen
    values: dict[str, Any] = {"chat_template": template.name}
    reasons: dict[str, Reason] = {}
    if not template.asked:
        reasons["chat_template"] = Reason(origin="derived", why=template.why)
    asked = given.get("add_tokens", ())
    added = (*asked, *(token for token in tokenizer.added if token not in asked))
    if added:
        values["add_tokens"] = added
    if len(added) > len(asked):
        why = "the template writes them, and the vocabulary has them not"
        if asked:
            why = f"asked for; {shown_tokens(added[len(asked) :])}: {why}"
        reasons["add_tokens"] = Reason(origin="derived", why=why)
    if "train_tokens" in given:
        values["train_tokens"] = tuple(t for t in tokenizer.trained if t not in added)
        if OF_TEMPLATE in given["train_tokens"]:
            why = "asked for: those that the template writes"
            reasons["train_tokens"] = Reason(origin="given", why=why)
    return TokenSettings(values=values, reasons=reasons)


def with_rows_for(
    source: ModelSource, tokenizer: RowTokenizer | None, given: Mapping[str, Any]
) -> ModelSource:
    """The model with a row for each new token; many vocabularies have some to spare."""
    if tokenizer is None:
        return source.with_new_tokens(given)
    added = given.get("add_tokens") or tokenizer.added
    return source.with_vocabulary(len(tokenizer.tokenizer)) if added else source


def said_tokens(spec: ModelSpec, plan: TrainingPlan) -> str | None:
    """Which tokens are trained, what of the model that is, and what it adds to the peak; None where
    none are named."""
    tokens = plan.trained_tokens
    if not tokens:
        return None
    without = plan.replace(add_tokens=(), train_tokens=())
    if saved_for_tokens(plan.resolved_method, spec) == plan.modules_to_save:
        without = without.replace(modules_to_save=())
    numbers = [
        one.resolved_method.count(spec, one.method_settings).num_trainable_parameters
        for one in (plan, without)
    ]
    trained = f"{format_count(numbers[0] - numbers[1])} parameters"
    said = f"{shown_tokens(tokens)}: {trained if numbers[0] > numbers[1] else 'with all others'}"
    more = _peak_bytes(spec, plan) - _peak_bytes(spec, without)
    return f"{said}, {format_bytes(more)} of the peak" if more > 0 else said


def _peak_bytes(spec: ModelSpec, plan: TrainingPlan) -> int:
    return estimate_memory(spec, plan).allocated_peak_bytes


def is_base_model(source: ModelSource) -> bool:
    """Whether the catalog knows it for a model that has learnt no chat."""
    entry = model_catalog().get(source.spec.name)
    return entry is not None and entry.kind == "base"
