"""What a tokenizer makes of the settings that speak of templates and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct, structs

from ftplan.launcher.data.tokens import RowTokenizer
from ftplan.launcher.model_source import ModelSource
from ftplan.planner.plan import Reason, ReasonedPlan
from ftplan.planner.ranking import Evaluated, Ranking
from ftplan.planner.vocabulary import OF_TEMPLATE, check_named_tokens, shown_tokens
from ftplan.profiles import model_catalog


class TokenSettings(Struct, frozen=True, kw_only=True):
    """`values` of a plan's settings, as if given; `reasons` of those that were not."""

    values: Mapping[str, Any]
    reasons: Mapping[str, Reason]

    def explained(self, ranking: Ranking) -> Ranking:
        """Its plans with these reasons."""
        if not self.reasons:
            return ranking
        assert ranking.best is not None
        return structs.replace(
            ranking,
            best=self._explained(ranking.best),
            alternatives=tuple(self._explained(other) for other in ranking.alternatives),
        )

    def _explained(self, evaluated: Evaluated) -> Evaluated:
        reasoned = evaluated.reasoned
        reasons = {**reasoned.reasons, **self.reasons}
        return structs.replace(
            evaluated, reasoned=ReasonedPlan(plan=reasoned.plan, reasons=reasons)
        )


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
        why = f"the template writes {shown_tokens(added[len(asked) :])}, which are new to the model"
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


def is_base_model(source: ModelSource) -> bool:
    """Whether the catalog knows it for a model that has learnt no chat."""
    entry = model_catalog().get(source.spec.name)
    return entry is not None and entry.kind == "base"
