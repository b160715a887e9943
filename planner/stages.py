"""Sequential tuning: how a stage begins from the one before, and what the earlier ones lose."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct

from ftplan.planner.errors import InputError
from ftplan.planner.forgetting import RISE_NATS
from ftplan.planner.methods import Method
from ftplan.planner.peft_options import PROMPTING
from ftplan.planner.plan import TrainingPlan

Begin = Literal["model", "adapter", "merged"]
"""What a stage begins from: the whole model that the one before has made, its adapter, which goes
on being trained, or its base with the adapter merged."""

# What makes an adapter the one it is, where its method takes it.
_ADAPTER_SETTINGS = (
    *("lora_rank", "lora_alpha", "target_modules", "modules_to_save", "peft_config"),
    *("num_trainable_layers", "trainable_modules"),
)
_OF_THE_METHOD = ("method", "quantization", "double_quant")

# Adapters that PEFT 0.21 cannot merge: prompts have no place in the weights, and two tuners raise.
_UNMERGED = PROMPTING | {"ADAPTION_PROMPT", "POLY", "SHADOW", "LILY"}

# Of losses that are not of tokens: this share of what the stage had gained.
LOST_SHARE = 0.1


def inherited(before: TrainingPlan, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a stage takes over from the one before, so that its adapter goes on being
    trained. Nothing where another method is given, the method alone where another adapter is."""
    if given.get("method", before.method) != before.method:
        return {}
    kept = _OF_THE_METHOD if before.quantization != "none" else _OF_THE_METHOD[:2]
    of_method = {name: getattr(before, name) for name in kept}
    adapter = {name: getattr(before, name) for name in _adapter_settings(before)}
    if any(given.get(name, value) != value for name, value in {**of_method, **adapter}.items()):
        adapter = {}
    taken = {**of_method, **adapter}
    return {name: value for name, value in taken.items() if name not in given}


def _adapter_settings(plan: TrainingPlan) -> list[str]:
    """Those of the plan's method: what it takes, and what is not as it is by default."""
    takes, default = set(plan.resolved_method.takes.values()), TrainingPlan()
    return [
        name
        for name in _ADAPTER_SETTINGS
        if name in takes or getattr(plan, name) != getattr(default, name)
    ]


def begin_of(before: TrainingPlan, plan: TrainingPlan) -> Begin:
    """What a stage begins from.

    An adapter goes on being trained where the next stage has the same. Where the loss compares with
    the model before training, that is the model with the adapter as the stage finds it: its
    log-probabilities are then computed before the first step, or else the adapter is merged first,
    so that the model without the new one is the reference.

    Raises InputError where the stage cannot begin from what is there.
    """
    earlier, method = before.resolved_objective, before.resolved_method
    if earlier.scores and not plan.resolved_objective.scores:
        raise InputError(
            "the stage before trains a reward model, which gives scores and no text",
            "let the reward model be the last stage, or a run of its own",
        )
    if not method.adapter:
        return "model"
    if _same_adapter(before, plan) and not _keeps_reference(plan):
        return "adapter"
    if not merges(method):
        raise InputError(
            f"what method `{before.method}` trains cannot be merged, so the next stage can only "
            "go on training it",
            "leave `method` and its settings out of the next stage, or take `lora` in this one",
        )
    return "merged"


def _same_adapter(before: TrainingPlan, plan: TrainingPlan) -> bool:
    names = {*_OF_THE_METHOD, *_adapter_settings(before), *_adapter_settings(plan)}
    same = all(getattr(before, name) == getattr(plan, name) for name in names)
    return same and before.resolved_objective.scores == plan.resolved_objective.scores


def _keeps_reference(plan: TrainingPlan) -> bool:
    """Whether the reference is asked while training goes on: then it is the model without an
    adapter."""
    objective = plan.resolved_objective
    asks = objective.generates or objective.has_reference
    return asks and not (objective.has_reference and plan.precompute_ref_log_probs)


def would_go_on(before: TrainingPlan, plan: TrainingPlan) -> bool:
    """Whether the adapter would go on being trained if the reference were computed before."""
    return (
        before.resolved_method.adapter
        and _same_adapter(before, plan)
        and _keeps_reference(plan)
        and plan.resolved_objective.has_reference
    )


def merges(method: Method) -> bool:
    """Whether PEFT can merge what the method trains into the base."""
    return method.peft_type is not None and method.peft_type not in _UNMERGED


def evenly(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` places, evenly spaced from the first; all where there are fewer."""
    wanted = min(count, wanted)
    return [place * count // wanted for place in range(wanted)]


def replayed_rows(share: float, num_rows: int, available: Sequence[int]) -> list[int]:
    """How many rows of each earlier stage are mixed into `num_rows` of a stage's own, so that they
    are `share` of all: from each in the ratio of the rows that it has."""
    total = sum(available)
    wanted = min(total, round(num_rows * share / (1 - share)))
    return [round(wanted * rows / total) if total else 0 for rows in available]


class Kept(Struct, frozen=True, kw_only=True):
    """The held-out loss of a stage before it, when it ended, and after a later one."""

    stage: str
    objective: str
    before: float
    at_its_end: float
    after: float

    @property
    def rise(self) -> float:
        """Of the loss; below zero where the later stages helped."""
        return self.after - self.at_its_end

    @property
    def is_lost(self) -> bool:
        """Whether the rise is past the threshold: that of the perplexity, or, of another loss, a
        tenth of what the stage had gained."""
        if self.objective == "sft":
            return self.rise > RISE_NATS
        gained = self.before - self.at_its_end
        return gained > 0 and self.rise > LOST_SHARE * gained


def backward_transfer(kept: Sequence[Kept]) -> dict[str, float]:
    """Mean over the earlier stages of what the later ones did to them, by objective.

    Lopez-Paz & Ranzato 2017 (arXiv 1706.08840), section 2: BWT = sum over i < T of
    (R[T,i] - R[i,i]) / (T - 1). There R is an accuracy, here the loss with its sign turned:
    negative is forgetting. Losses of several objectives have no common unit, so each has its mean.
    """
    by_objective: dict[str, list[float]] = defaultdict(list)
    for one in kept:
        by_objective[one.objective].append(-one.rise)
    return {name: sum(values) / len(values) for name, values in by_objective.items()}


def what_helps(lost: Sequence[str], stages: Mapping[str, TrainingPlan]) -> list[str]:
    """What keeps more of the stages of these names, the strongest first. `stages`: all, in order.

    Replay: Ibrahim et al. 2024 (arXiv 2403.08763) take 5 % of earlier text in continued
    pretraining. Adapters, and lower rates, forget less: Biderman et al. 2024 (arXiv 2405.09673).
    """
    names = list(stages)
    helps = []
    texts = [name for name in names if stages[name].objective == "sft"]
    if any(name in lost for name in texts[:-1]):
        helps.append("rows of earlier stages among those of later ones: `--replay-share 0.05`")
    later = [stages[name] for name in names[min(map(names.index, lost), default=0) + 1 :]]
    if any(not plan.resolved_method.adapter for plan in later):
        helps.append("adapters in the later stages: `method: lora`")
    helps.append("a lower `learning_rate` or fewer `num_train_epochs` in the later stages")
    return helps
