"""The order of rows that all trainers share, and the tokens that a step computes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch.utils.data import Sampler

from ftplan.launcher.training.checkpoints import DurableCheckpoints
from ftplan.launcher.training.config import MicroBatches
from ftplan.launcher.training.out_of_memory import InPieces
from ftplan.launcher.training.tensor_parallel import DividedMatrices
from ftplan.planner.batching import training_order

if TYPE_CHECKING:
    from ftplan.launcher.training.tasks import TaskMix


class PlannedSampler(Sampler[int]):
    """Rows in `planner.batching.training_order`; the same on every rank and every resume."""

    def __init__(
        self, lengths: Sequence[int], batch_size: int, accumulation_steps: int, seed: int
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.accumulation_steps = accumulation_steps
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(
            training_order(
                self.lengths, self.batch_size, self.accumulation_steps, self.seed, self.epoch
            )
        )

    def __len__(self) -> int:
        return len(self.lengths)


class PlannedOrder(InPieces, DurableCheckpoints, DividedMatrices):
    """For trainers of transformers. `row_lengths`: tokens of each row; None, and the trainer takes
    rows in its own order. `micro_batches`: as planned; None, and they are as the trainer's
    arguments say. `tasks`: a TaskMix, where rows are of several tasks. `step_tokens`: padding
    included, since it was last set to 0; `step_longest`: of the first micro-batch since then, and
    the most of the others, which meet its gradients."""

    def __init__(
        self,
        *args: Any,
        row_lengths: Sequence[int] | None = None,
        micro_batches: MicroBatches | None = None,
        tasks: TaskMix | None = None,
        **kwargs: Any,
    ) -> None:
        self.row_lengths = row_lengths
        self.micro_batches = micro_batches
        self.tasks = tasks
        self.step_tokens = 0
        self.step_longest = [0, 0]
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        trainer: Any = self
        if self.row_lengths is None:
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        cut = self.micro_batches or MicroBatches(
            trainer.args.per_device_train_batch_size,
            trainer.args.world_size,
            trainer.args.gradient_accumulation_steps,
        )
        rows = cut.rows * cut.num_processes
        planned = (self.row_lengths, rows, cut.accumulation_steps, trainer.args.seed)
        if self.tasks is None or self.tasks.weighting.takes_each_row_once:
            return PlannedSampler(*planned)
        return self.tasks.sampler(*planned)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        trainer: Any = self
        tokens, later = inputs["input_ids"].numel(), self.step_tokens > 0
        self.step_longest[later] = max(self.step_longest[later], tokens)
        # GPUs that divide each layer compute on the same tokens.
        self.step_tokens += tokens // trainer.get_tp_size()
        return super().training_step(model, inputs, *args, **kwargs)
