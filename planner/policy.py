"""The recipe: settings that decide what training learns, each with its source.

Sources, short: LoRA = arXiv 2106.09685, QLoRA = 2305.14314, "LoRA Without Regret" (Schulman et
al., Thinking Machines, 2025), LIMA = 2305.11206, Llama 2 = 2307.09288. docs/policy.md has more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from ftplan.planner.data_profile import DataProfile
from ftplan.planner.methods import Method
from ftplan.planner.model_spec import ModelSpec

# Held-out share of the rows.
EVAL_SHARE = 0.10

# What a run on the processor may take unless told otherwise: long enough to see the loss fall.
CPU_TIME_BUDGET_SECONDS = 100.0

# When nobody named a model, the largest whose training stays within this is taken.
MODEL_CHOICE_SECONDS = 6 * 3600.0


# `max_length` follows the data: the longest row, rounded up to a multiple of this.
_LENGTH_STEP = 64


class Advice(Struct, frozen=True, kw_only=True):
    """A recommended value and the line of why."""

    value: Any
    why: str


def learning_rate(method: Method, model: ModelSpec) -> Advice:
    """Peak learning rate by method and size."""
    if method.adapter:
        rate = 2e-4 if model.num_parameters < 30e9 else 1e-4
        return Advice(value=rate, why="QLoRA's rate: 2e-4 up to 13B, 1e-4 from 33B (table 9)")
    if model.num_parameters < 1e9:
        return Advice(value=5e-5, why="small models bear more than the 1e-5 to 2e-5 of 7B")
    return Advice(value=2e-5, why="the rate of Llama 2's fine-tuning (section 3.1)")


def max_length(longest_row: int, max_position_embeddings: int) -> Advice:
    """Tokens that a row is cut at: none is cut that the model can take."""
    if longest_row > max_position_embeddings:
        why = f"the model's positions; the longest row has {longest_row:,} tokens"
        return Advice(value=max_position_embeddings, why=why)
    rounded = -(-longest_row // _LENGTH_STEP) * _LENGTH_STEP
    why = f"the longest row has {longest_row:,} tokens"
    return Advice(value=min(rounded, max_position_embeddings), why=why)


def num_train_epochs(num_rows: int) -> Advice:
    """Passes over the data: few rows are seen more often."""
    if num_rows < 2_000:
        return Advice(value=3.0, why="under 2,000 rows; LIMA-like sets are seen several times")
    if num_rows < 20_000:
        return Advice(value=2.0, why="2,000 to 20,000 rows; Llama 2 tuned for two epochs")
    return Advice(value=1.0, why="from 20,000 rows one pass is enough")


def effective_batch_size(num_rows: int) -> Advice:
    """Rows an optimizer step: small, since LoRA tolerates large batches less."""
    if num_rows < 1_000:
        return Advice(value=8, why="under 1,000 rows: enough steps to learn from")
    if num_rows < 10_000:
        return Advice(value=16, why="QLoRA's batch (table 9)")
    return Advice(value=32, why="above 10,000 rows; LoRA likes batches of 32 and below")


def lora_rank(num_rows: int) -> Advice:
    """Adapter capacity by the amount of data."""
    if num_rows < 10_000:
        return Advice(value=16, why="under 10,000 rows a low rank holds what they teach")
    return Advice(value=64, why="from 10,000 rows; QLoRA's rank")


# Rows from which on a base model learns to answer from the data alone. Assumed; Llama 2 took
# 27,540 of the best for it (section 3.1), and most people's are not the best.
_ROWS_FOR_A_BASE_MODEL = 100_000

# Padding worth a word, and the micro-batch at which it is told.
_NOTICED_PADDING = 0.10
_PADDED_ROWS = 8


def packing(data: DataProfile, max_length: int) -> Advice:
    """Whether rows are worth packing: what padding costs at a common micro-batch."""
    share = data.padded_share(_PADDED_ROWS, max_length)
    said = f"{100 * share:.0f} % of a batch of {_PADDED_ROWS} rows would be padding"
    if share < _NOTICED_PADDING:
        return Advice(value=False, why=f"{said}: rows of like length are batched together")
    return Advice(value=True, why=f"{said}; it takes FlashAttention, so that rows stay apart")


def model_kind(num_rows: int, kind: str) -> Advice:
    """Whether to begin with a base model or one that has learnt to chat."""
    if kind == "pretraining":
        return Advice(value="base", why="plain text goes on with what base models learn from")
    if num_rows >= _ROWS_FOR_A_BASE_MODEL:
        return Advice(value="base", why=f"{num_rows:,} rows teach answering by themselves")
    return Advice(value="chat", why=f"{num_rows:,} rows change how a model answers that can")


def task_weights(tasks: Mapping[str, int]) -> Advice:
    """How often each task's rows should come: by the square root of their number, so that small
    ones are not lost (temperature 2; T5's mixing, arXiv 1910.10683, section 3.5.2)."""
    roots = {task: math.sqrt(count) for task, count in tasks.items()}
    weights = {task: round(root / sum(roots.values()), 3) for task, root in sorted(roots.items())}
    return Advice(value=weights, why="square root of each task's rows, so that small ones count")


def data_advice(data: DataProfile, max_position_embeddings: int) -> dict[str, Advice]:
    """What the data alone decides, by setting."""
    num_rows = data.num_train_rows
    length = max_length(data.longest, max_position_embeddings)
    held_out = data.num_eval_rows
    return {
        "max_length": length,
        "num_train_epochs": num_train_epochs(num_rows),
        "effective_batch_size": effective_batch_size(num_rows),
        "lora_rank": lora_rank(num_rows),
        "packing": packing(data, length.value),
        "validation_rows": Advice(value=held_out, why="no prompt of theirs is trained on"),
        "model": model_kind(num_rows, data.objective),
        **({"task_weights": task_weights(data.tasks)} if len(data.tasks) > 1 else {}),
    }
