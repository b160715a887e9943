"""What it asks of a GPU to generate completions and to judge them, beside training on them.

Each token of a completion is a pass of its own, which reads all weights and what is cached of the
tokens before it; a prompt's tokens, and those that a model scores, go through it together.
"""

from __future__ import annotations

from msgspec import Struct

from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.objectives import asks_reference
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.rewards import reward_bytes
from ftplan.planner.step_trace import StepTrace
from ftplan.planner.weights import weight_memory_bytes


class RolloutWork(Struct, frozen=True, kw_only=True):
    """Of an optimizer step. `kernels`: launched by the host."""

    flops: float = 0.0
    moved_bytes: float = 0.0
    kernels: float = 0.0


def rollout_work(
    model: ModelSpec, plan: TrainingPlan, trace: StepTrace, rows: float, length: float, flops: float
) -> RolloutWork:
    """`flops`: of a forward pass over a micro-batch of so many rows.

    Completions are taken to be as long as they may be. Forward is half of a step's kernels where
    layers are not computed again. The cache is counted at the mean of a completion.
    """
    micro_batches = plan.gradient_accumulation_steps
    generations = plan.effective_batch_size / plan.generated_rows
    completion = plan.max_completion_length
    scores = plan.resolved_objective.scores_always + asks_reference(plan)
    judged = judged_share(model)
    passes = 1 + scores + judged
    weights = weight_memory_bytes(model, plan)
    read = generations * completion * weights + micro_batches * scores * weights
    read += micro_batches * reward_bytes(model, plan)
    cached = (
        micro_batches * rows * completion * (length - completion / 2) * cache_bytes(model, plan)
    )
    forward_kernels = trace.num_kernels / 2
    called = generations * (1 + completion) + micro_batches * (scores + (judged > 0))
    return RolloutWork(
        flops=micro_batches * passes * flops,
        moved_bytes=read + cached,
        kernels=called * forward_kernels,
    )


def judged_share(model: ModelSpec) -> float:
    """Of the model's products, those of the reward model for as many tokens."""
    judge = model.reward_model
    return judge.num_parameters / model.num_parameters if judge else 0.0


def cache_bytes(model: ModelSpec, plan: TrainingPlan) -> int:
    """Keys and values of one token, in the dtype of products."""
    elements = sum(
        2 * layer.attention.num_key_value_heads * layer.attention.head_dim for layer in model.layers
    )
    return elements * plan.compute_bytes
