"""How long a run evaluates, before training and after it: Eq. (T12) of docs/time-model.md.

An evaluation is passes without gradients: over the held-out rows, over a few questions with a pass
for each token of the answers, and over pieces of general text. Each is priced as a step is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from msgspec import Struct, structs

from ftplan.planner import evaluating
from ftplan.planner.batching import mean_padded_rows
from ftplan.planner.cycles import scoring_steps
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.evaluating import Questions
from ftplan.planner.exchanges import forward_collectives
from ftplan.planner.hardware_spec import Device
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.objectives import asks_reference, trained_model
from ftplan.planner.overlong import RowCounts
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.rollout_work import cache_bytes, judged_share
from ftplan.planner.stack import OWN_STACK, Stack
from ftplan.planner.step_settings import in_front_of_rows
from ftplan.planner.step_time import (
    FORWARD_PASSES_OVER_LOGITS,
    StepTime,
    StepWork,
    expanded_bytes,
    time_of,
    trace_of,
)
from ftplan.planner.step_trace import Segment, StepTrace
from ftplan.planner.tape import added, value
from ftplan.planner.tensor_parallel import one_rank
from ftplan.planner.units import FLOAT32_BYTES
from ftplan.planner.weights import weight_memory_bytes

# How often a pass without gradients moves each logit by the stock loss: written, and log-softmax
# read and written.
_STOCK_FORWARD_PASSES = 3

_Segments = Sequence[Sequence[Segment]]


class Seconds(Struct, frozen=True):
    """Of a part of a run, between bounds."""

    expected: float = 0.0
    least: float = 0.0
    most: float = 0.0

    @staticmethod
    def of(step: StepTime) -> Seconds:
        return Seconds(step.step_seconds, step.least_step_seconds, step.most_step_seconds)

    def map(self, function: Callable[[float], float]) -> Seconds:
        return Seconds(function(self.expected), function(self.least), function(self.most))

    def times(self, number: float) -> Seconds:
        return self.map(lambda seconds: number * seconds)


class EvaluationTime(Struct, frozen=True, kw_only=True):
    """What a run spends beside training on learning what the model can do, before training and
    after it together.

    `held_out`: the loss on the held-out rows; `answers`: those to some of them; `general_text`: the
    loss on it. `scoring`: LoRA-drop's steps that find the layers that matter, before training.
    """

    held_out: Seconds = Seconds()
    answers: Seconds = Seconds()
    general_text: Seconds = Seconds()
    scoring: Seconds = Seconds()

    @property
    def parts(self) -> dict[str, Seconds]:
        return {name: getattr(self, name) for name in self.__struct_fields__}

    @property
    def whole(self) -> Seconds:
        parts = self.parts.values()
        return Seconds(
            sum(part.expected for part in parts),
            sum(part.least for part in parts),
            sum(part.most for part in parts),
        )

    def to_dict(self) -> dict[str, Any]:
        whole = self.whole
        return {
            "seconds": whole.expected,
            "least_seconds": whole.least,
            "most_seconds": whole.most,
            "parts": {name: part.expected for name, part in self.parts.items()},
        }


def evaluation_time(
    model: ModelSpec,
    plan: TrainingPlan,
    device: Device,
    data: DataProfile,
    step: StepTime,
    *,
    steps: int,
    num_pieces: int,
    stack: Stack = OWN_STACK,
) -> EvaluationTime:
    """Of a run of so many optimizer steps. `num_pieces`: of the general text."""
    scoring = Seconds()
    if plan.method == "lora-drop":
        scoring = Seconds.of(step).times(scoring_steps(steps))
    asking = _Asking.of(model, plan, device, data, stack)
    held_out = asking.held_out(data).times(2)
    if plan.resolved_objective.scores:  # that model gives a number
        return EvaluationTime(held_out=held_out, scoring=scoring)
    return EvaluationTime(
        held_out=held_out,
        answers=asking.answers(data.questions).times(2),
        general_text=asking.general_text(num_pieces).times(2),
        scoring=scoring,
    )


class _Asking(Struct, frozen=True, kw_only=True):
    """A model on a device, and what its passes without gradients ask of it. `evaluated`: the
    segments of an evaluation's passes, with the reference's and what else its loss asks for;
    `row_length`: padded, of the held-out rows."""

    model: ModelSpec
    plan: TrainingPlan
    device: Device
    trace: StepTrace
    row_length: float

    @staticmethod
    def of(
        model: ModelSpec, plan: TrainingPlan, device: Device, data: DataProfile, stack: Stack
    ) -> _Asking:
        length = _held_out_length(plan, data)
        tokens = plan.per_device_train_batch_size * length
        trace, _, _ = trace_of(model, plan, device, tokens, length, stack)
        return _Asking(model=model, plan=plan, device=device, trace=trace, row_length=length)

    def held_out(self, data: DataProfile) -> Seconds:
        """Of one evaluation's loss. The rows are divided among the GPUs of a copy each."""
        plan = self.plan
        size = plan.per_device_train_batch_size
        rows = -(-data.num_eval_rows // plan.data_parallel_size)
        if not rows:
            return Seconds()
        batches, sequences = rows / size, size * plan.resolved_objective.sequences_per_row
        length = self.row_length
        if plan.resolved_objective.generates:
            return self._completed(size, length).times(batches)
        passes = [self._own_pass, *self.trace.further]
        return self._seconds(self._pass(passes, sequences, length)).times(batches)

    def answers(self, questions: Questions) -> Seconds:
        """Of one evaluation's answers: those that are scored, while there is time, or those that
        are shown. One may end at its first token; that is the lower bound."""
        if not questions.num_rows:
            return Seconds()
        plan = self.plan
        short = questions.are_short and plan.objective == "sft"
        rows, prompt = questions.num_rows, questions.prompt_tokens
        tokens = evaluating.SHOWN_NEW_TOKENS
        if short:
            longest = questions.answer_tokens + evaluating.SPARE_TOKENS
            tokens = min(longest, evaluating.MOST_SCORED_TOKENS)
        else:
            rows = min(rows, evaluating.SHOWN_ROWS)
            prompt = questions.shown_prompt_tokens
        at_once = evaluating.tokens_at_once(plan.per_device_train_batch_size, plan.max_length)
        longest = questions.longest_prompt_tokens + tokens if short else round(prompt) + tokens
        size = min(rows, evaluating.rows_at_once(at_once, longest))
        batches = math.ceil(rows / size)
        batch = self._seconds(self._generating(rows / batches, prompt, tokens))
        shortest = self._seconds(self._generating(rows / batches, prompt, 1))
        batch = structs.replace(batch, least=shortest.least)
        if not short:
            return batch.times(batches)
        return batch.map(partial(_until, number=batches, limit=evaluating.SCORING_SECONDS))

    def general_text(self, num_pieces: int) -> Seconds:
        """Of reading it once, as many pieces as there is time for."""
        work = self._pass([self._own_pass], 1, evaluating.PIECE_TOKENS, stock=True)
        return self._seconds(work).map(
            partial(
                _until,
                number=num_pieces,
                limit=evaluating.GENERAL_TEXT_SECONDS,
                least=evaluating.LEAST_PIECES,
            )
        )

    def _completed(self, rows: float, length: float) -> Seconds:
        """Of a batch of held-out prompts that are completed, scored and judged."""
        completion = self.plan.max_completion_length
        generated = self._seconds(self._generating(rows, length - completion, completion))
        passed = self._seconds(self._pass([self._own_pass], rows, length))
        scores = self.plan.resolved_objective.scores_always + asks_reference(self.plan)
        passes = 1 + scores + judged_share(self.model)
        return Seconds(
            generated.expected + passes * passed.expected,
            generated.least + passes * passed.least,
            generated.most + passes * passed.most,
        )

    @property
    def _own_pass(self) -> Sequence[Segment]:
        """The segments of the model's own pass."""
        return self.trace.evaluation[0] if self.trace.evaluation else self.trace.segments

    def _seconds(self, work: StepWork) -> Seconds:
        return Seconds.of(time_of(work, self.device))

    def _pass(
        self, passes: _Segments, rows: float, length: float, *, stock: bool = False
    ) -> StepWork:
        """`stock`: logits are made whole, whatever the loss of training."""
        return self._work(passes, rows, length, predicted=length, calls=1, stock=stock)

    def _generating(self, rows: float, prompt: float, new: int) -> StepWork:
        """Of answers of `new` tokens: the prompts' pass gives the first, each other token is a pass
        that reads all weights and what is cached of the tokens before."""
        length = prompt + new
        work = self._work([self._own_pass], rows, length, predicted=new, calls=new, stock=True)
        cached = rows * new * (prompt + new / 2) * cache_bytes(self._share, self.plan)
        return structs.replace(work, moved_bytes=work.moved_bytes + cached)

    @property
    def _share(self) -> ModelSpec:
        return one_rank(trained_model(self.model, self.plan), self.plan.tp_size)

    def _work(
        self,
        passes: _Segments,
        rows: float,
        length: float,
        *,
        predicted: float,
        calls: float,
        stock: bool,
    ) -> StepWork:
        """`predicted`: tokens of a row that logits are made of; `calls`: in how many calls of the
        model the tokens go through it, each of which reads the weights."""
        plan, device, share = self.plan, self.device, self._share
        inside = length + in_front_of_rows(plan)
        bodies = [segment for one in passes for segment in one[:-1]]
        heads = [one[-1] for one in passes]
        flops = value(added(s.forward_flops for s in bodies), rows, inside)
        flops += value(added(s.forward_flops for s in heads), rows, predicted)
        float32 = value(added(s.float32_flops for s in bodies), rows, inside)
        # What is there for any batch are copies of weights, which are counted with these.
        (_, *moved) = added(s.forward_moved for s in bodies)
        reads = calls * len(passes)
        weights = weight_memory_bytes(share, plan) + expanded_bytes(share, plan, 1, 0)
        logits = len(passes) * rows * predicted * share.vocab_size * FLOAT32_BYTES
        beside, waited = forward_collectives(share, plan, rows * length / calls, reads)
        copies = plan.offload == "parameters"
        return StepWork(
            kind=device.kind,
            dtype=plan.compute_dtype,
            tokens=rows * length,
            forward_flops=flops,
            flops=flops,
            model_flops=flops,
            float32_flops=min(float32, flops),
            moved_bytes=value((0, *moved), rows, inside)
            + reads * weights
            + self._passes_over_logits(stock=stock) * logits,
            optimizer_bytes=0.0,
            collectives=beside,
            overlapping=1.0,
            copied_bytes=copies * reads * weights / plan.dp_shard_size,
            host_bytes=0.0,
            kernels=round(calls * _kernels([*bodies, *heads])),
            optimizer_kernels=0,
            hooked=False,
            waited=waited,
        )

    def _passes_over_logits(self, *, stock: bool) -> float:
        if self.plan.resolved_objective.scores:
            return 0.0
        if stock or self.plan.loss == "stock":
            return _STOCK_FORWARD_PASSES
        if self.plan.loss == "trl-fused":
            return FORWARD_PASSES_OVER_LOGITS[self.device.kind]
        return FORWARD_PASSES_OVER_LOGITS["cuda"]


def _kernels(segments: Iterable[Segment]) -> int:
    return sum(segment.forward_kernels for segment in segments)


def _held_out_length(plan: TrainingPlan, data: DataProfile) -> float:
    """Padded tokens of the mean held-out row: as the training rows' but for its own mean."""
    lengths, size = data.trained_lengths, plan.per_device_train_batch_size
    padded = mean_padded_rows(lengths, size, plan.max_length)
    trained, held_out = _mean(data.train_counts), _mean(data.eval_counts)
    if trained and held_out:
        padded *= held_out / trained
    return min(padded, plan.max_length)


def _mean(counts: RowCounts) -> float | None:
    return counts.num_tokens / counts.num_rows_left if counts.num_rows_left else None


def _until(seconds: float, *, number: int, limit: float, least: int = 1) -> float:
    """Of `number` parts one after the other, none of which but the first few is begun after the
    limit."""
    begun = max(least, math.floor(limit / seconds) + 1) if seconds else number
    return min(number, begun) * seconds
