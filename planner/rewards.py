"""What completions are rewarded by: rules that need no model, and a reward model beside the one
that is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from msgspec import structs

from ftplan.planner.errors import InputError
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.objectives import OBJECTIVES, with_score

if TYPE_CHECKING:
    from ftplan.planner.plan import TrainingPlan

# Each gives 1 or 0; case and blanks at the ends do not count.
RULE_REWARDS: Mapping[str, str] = {
    "exact-match": "the completion is the row's answer",
    "contains-answer": "the row's answer stands in the completion",
}


def with_reward_model(model: ModelSpec, reward_model: ModelSpec) -> ModelSpec:
    """The model with the one that judges its completions; that has a score for a head."""
    judge = reward_model if reward_model.scores else with_score(reward_model)
    return structs.replace(model, reward_model=judge)


def reward_bytes(model: ModelSpec, plan: TrainingPlan) -> int:
    """Bytes of the reward model, in the dtype that the plan computes in."""
    judge = model.reward_model
    return judge.num_parameters * plan.compute_bytes + judge.buffer_bytes if judge else 0


def check_rewarded(plan_objective: str, reward_model: str | None, reward: tuple[str, ...]) -> None:
    """Raises InputError where completions would be made and nobody judged them."""
    if OBJECTIVES[plan_objective].generates and not reward_model and not reward:
        raise InputError(
            f"`--objective {plan_objective}` trains on completions of the model's own, and nothing "
            "here rewards them",
            "give `--reward-model RUN_DIR`, which `--objective reward` trains on pairs, or "
            "`--reward exact-match` for rows with answers; or add answers to the rows",
        )
