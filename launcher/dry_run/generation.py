"""TRL's GRPOTrainer on tensors without data: completions are generated, scored and trained on.

transformers' own `generate` runs twice on the generated batch: once on the prompts for the first
two tokens (the prompt's pass, and a step with a short cache), and once for the last token, beside a
cache of all tokens before. What lies between holds no more than the last step.
"""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from transformers.generation.utils import StopCheck
from trl.models import unwrap_model_for_generation

from ftplan.launcher.dry_run.case import DryRunCase
from ftplan.launcher.dry_run.layers import renumber
from ftplan.launcher.dry_run.operations import selections
from ftplan.launcher.dry_run.trainers import Dry
from ftplan.launcher.training.online import PlannedGRPOTrainer, PlannedRLOOTrainer
from ftplan.launcher.training.rewards import RewardModel
from ftplan.launcher.training.stacks import Observer
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.step_trace import GENERATION_PHASE, SCORING_PHASE

# Tokens of the first call: the prompt's pass gives one, a step with a cache the other.
_FIRST_TOKENS = 2
# More than a dry run asks for.
_GENERATIONS = 4
_INPUTS = ("input_ids", "attention_mask")


def prompt_rows(plan: TrainingPlan) -> Dataset:
    """Prompts for as many generations as there are; their tokens are made in their place."""
    return Dataset.from_dict({"prompt": [""] * (_GENERATIONS * plan.generated_rows)})


def micro_batches_of_a_generation(plan: TrainingPlan) -> int:
    """Micro-batches whose completions are generated at once."""
    return plan.generated_rows // plan.per_device_train_batch_size


def _no_reward(completions: list[Any], **_: Any) -> list[float]:
    """In the place of a rule, which needs no memory."""
    return [1.0] * len(completions)


class DryReward(RewardModel):
    """A model without data that judges rows of full length."""

    def __init__(self, model: Any, plan: TrainingPlan, row_length: int) -> None:
        self.model, self.rows = model, plan.per_device_train_batch_size
        self.max_length = row_length
        model.config.get_text_config().pad_token_id = 0

    def __call__(self, *, completions: Any, **_: Any) -> list[float]:
        for start in range(0, len(completions), self.rows):
            shape = (min(self.rows, len(completions) - start), self.max_length)
            tokens, mask = (torch.ones(shape, dtype=torch.int64) for _ in _INPUTS)
            self.judge(tokens, mask)
        return [1.0] * len(completions)


class _DryOnline(Dry):
    """Completions of full length are generated in both optimizer steps. `reward_model`: what judges
    them, where a model does."""

    _step: Any
    args: Any
    generation_config: Any
    generation_kwargs: Any
    max_completion_length: Any
    model: Any
    model_wrapped: Any
    accelerator: Any

    def __init__(
        self, *, plan: TrainingPlan, row_length: int, reward_model: Any = None, **kwargs: Any
    ) -> None:
        self.plan, self.row_length = plan, row_length
        self.judged = reward_model is not None
        judge = DryReward(reward_model, plan, row_length) if self.judged else _no_reward
        super().__init__(reward_funcs=judge, **kwargs)  # type: ignore[call-arg]

    @property
    def _trainer(self) -> Any:
        """TRL's own, with the methods that are overridden here."""
        return super()

    def observe(self, observer: Observer) -> None:
        super().observe(observer)
        renumber(self.model)

    def begin_micro_batch(self) -> None:
        """What comes next may be another generation."""
        self.observer.recorder.between_steps = False

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        begins = 0 if self._step == self._generates_again_at else self._step
        with mock.patch.object(self, "_step", begins):
            inputs = self._trainer._prepare_inputs(generation_batch)
        super().begin_micro_batch()
        return inputs

    @property
    def _generates_again_at(self) -> int:
        """The micro-batch of the second optimizer step at which completions are used up: its first,
        but where fewer than a step's are generated, or no whole steps', gradients are there."""
        in_step: int = self.args.gradient_accumulation_steps
        steps = micro_batches_of_a_generation(self.plan)
        meets_gradients = steps % self.plan.gradient_accumulation_steps != 0
        return in_step + meets_gradients

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """Whether the policy is asked for its log-probabilities depends on the run's own
        accumulation."""
        self.reward_weights = torch.ones(1)  # the trainer is made without data
        planned = self.plan.gradient_accumulation_steps
        with mock.patch.object(self.args, "gradient_accumulation_steps", planned):
            return self._trainer._generate_and_score_completions(inputs)

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        """What the trainer's own method returns: numbers of prompt and completion, and texts."""
        completion = self.max_completion_length
        prompt = self.row_length - completion
        self.observer.draft.begin_phase(GENERATION_PHASE)
        self._generate_twice(len(prompts), prompt, completion)
        ids = ([[1] * length for _ in prompts] for length in (prompt, completion))
        return self._generated_as(list(ids), [""] * len(prompts))

    def _generated_as(self, ids: list[Any], texts: list[str]) -> tuple[Any, ...]:
        """`ids`: of prompts and of completions."""
        raise NotImplementedError

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        if self.judged:
            self.observer.draft.begin_phase(SCORING_PHASE)
        return self._trainer._calculate_rewards(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            self.observer.draft.begin_phase(SCORING_PHASE)
        return self._trainer._get_per_token_logps_and_entropies(*args, **kwargs)

    def _generate_twice(self, rows: int, prompt: int, completion: int) -> None:
        """Within what `_generate_single_turn` calls `generate` in."""
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                generation_kwargs=self.generation_kwargs,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
        ):
            cache = self._generated(model, rows, prompt, min(_FIRST_TOKENS, completion), None)
            if completion > _FIRST_TOKENS:
                length = prompt + completion - 1
                self._lengthen(cache, length - 1)
                self._generated(model, rows, length, 1, cache)

    def _generated(self, model: Any, rows: int, length: int, more: int, cache: Any) -> Any:
        """The cache behind so many more tokens."""
        settings = copy.deepcopy(self.generation_config)
        settings.update(max_new_tokens=more, return_dict_in_generate=True)
        given = {name: torch.ones((rows, length), dtype=torch.int64) for name in _INPUTS}
        if cache is not None:
            given["past_key_values"] = cache
        with mock.patch.object(StopCheck, "__call__", _stops_at(length + more)):
            return model.generate(**given, generation_config=settings).past_key_values

    def _lengthen(self, cache: Any, length: int) -> None:
        """Make the cache one of so many tokens, as if they had been generated."""
        recorder = self.observer.recorder
        recorder.between_steps = True  # a layer's cache stays the layer's
        for layer in cache.layers:
            window = getattr(layer, "sliding_window", None)
            kept = length if window is None else min(length, window - 1)
            layer.keys, layer.values = _longer(layer.keys, kept), _longer(layer.values, kept)
            if window is not None:
                layer.cumulative_length = length
        recorder.between_steps = False


class DryGRPOTrainer(_DryOnline, PlannedGRPOTrainer):
    """TRL's, relative to a group."""

    def _generated_as(self, ids: list[Any], texts: list[str]) -> tuple[Any, ...]:
        return (*ids, None, texts, None, {}, None, [])


class DryRLOOTrainer(_DryOnline, PlannedRLOOTrainer):
    """TRL's, against the others of a group."""

    def _generated_as(self, ids: list[Any], texts: list[str]) -> tuple[Any, ...]:
        return (*ids, texts)


def completions_alone(case: DryRunCase) -> dict[Any, Any]:
    """Operations by which masks of a row's predicting places select completions, which alone have
    labels."""

    def count(mask: torch.Tensor) -> int:
        rows, *places = mask.shape
        of_labels = places == [case.row_length - 1]
        return int(rows) * case.plan.max_completion_length if of_labels else mask.numel()

    return selections(count)


def _longer(states: torch.Tensor, length: int) -> torch.Tensor:
    """Of (rows, heads, tokens, head dimension)."""
    return states.new_empty((*states.shape[:2], length, states.shape[3]))


def _stops_at(length: int) -> Any:
    """In the place of transformers' check, which asks data whether all rows have ended."""

    def check(self: Any, unfinished: Any, tokens: Any, so_far: int) -> bool:
        return so_far >= length

    return check
