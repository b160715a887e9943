"""The recipe: settings that decide what training learns, each with its source.

Sources, short: LoRA = arXiv 2106.09685, QLoRA = 2305.14314, "LoRA Without Regret" (Schulman et
al., Thinking Machines, 2025), LIMA = 2305.11206, Llama 2 = 2307.09288, knowledge capacity =
Allen-Zhu and Li, 2404.05405. docs/policy.md has more.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from msgspec import Struct, structs

from ftplan.planner.data_profile import DataProfile
from ftplan.planner.hardware_spec import DeviceKind
from ftplan.planner.method_rates import METHOD_RATES
from ftplan.planner.methods import METHODS, Method
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.objectives import Objective
from ftplan.planner.trained import MethodSettings
from ftplan.planner.units import format_count

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


# The best rates of adapters beside those of full tuning ("LoRA Without Regret").
ADAPTER_RATE_FACTOR = 10


def learning_rate(method: Method, model: ModelSpec, objective: Objective | None = None) -> Advice:
    """Peak learning rate by objective; of plain fine-tuning by method and size."""
    if objective is not None and objective.learning_rate is not None:
        rate, source = objective.learning_rate, objective.learning_rate_source
        if not method.adapter:
            return Advice(value=rate, why=source)
        why = f"adapters: {ADAPTER_RATE_FACTOR} times {rate:g}, {source}"
        return Advice(value=ADAPTER_RATE_FACTOR * rate, why=why)
    if method.name == "lora-plus":
        rate = 1e-4 if model.num_parameters < 30e9 else 5e-5
        return Advice(value=rate, why="half of LoRA's: B has `loraplus_lr_ratio` times as much")
    if (own := METHOD_RATES.get(method.name)) is not None:
        return Advice(value=own.rate, why=own.source)
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


# Tokens of a completion: TRL's default, and what a processor makes in bearable time.
COMPLETION_LENGTH = 512
COMPLETION_LENGTH_ON_CPU = 64


def max_completion_length(model: ModelSpec | None, kind: DeviceKind) -> Advice:
    """Tokens that a model, or one of any positions, adds to a prompt while it trains. `kind`: of
    the device."""
    length = COMPLETION_LENGTH_ON_CPU if kind == "cpu" else COMPLETION_LENGTH
    why = "a processor makes tokens slowly" if kind == "cpu" else "TRL's default"
    if model is not None and length > model.max_position_embeddings // 2:
        return Advice(value=max(1, model.max_position_embeddings // 2), why="half the positions")
    return Advice(value=length, why=why)


def completions_per_step(num_prompts: int, num_generations: int) -> Advice:
    """Completions an optimizer step, in whole groups of a prompt's."""
    rows: int = effective_batch_size(num_prompts).value
    groups = -(-rows // num_generations)
    prompts = "1 prompt" if groups == 1 else f"{groups} prompts"
    why = f"{prompts} with {num_generations} completions each"
    return Advice(value=groups * num_generations, why=why)


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


# Ranks to choose from. A lower one saves little; QLoRA found 8 to 256 alike (section 4).
LORA_RANKS = (16, 32, 64, 128, 256)

# What trained parameters hold (knowledge capacity), and what data tell: the log-loss of a first
# pass over usual text. That is what learning it by heart takes, so a bound for what learning from
# it does ("LoRA Without Regret").
BITS_PER_PARAMETER = 2.0
BITS_PER_TOKEN = 1.0

QUANTIZED_BASE = "a quantized base was asked for, beside which adapters are trained"

# Settings that only adapters have: who gives one asks for adapters.
_ADAPTER_SETTINGS = ("lora_rank", "lora_alpha", "lora_dropout", "target_modules")


def lora_rank(
    model: ModelSpec,
    data: DataProfile,
    method: Method = METHODS["lora"],
    settings: MethodSettings = MethodSettings(),  # noqa: B008 - frozen
) -> Advice:
    """The lowest rank whose adapters hold what one pass over the data tells.

    `settings`: what else decides what the adapters are. Raises InputError as `Method.count` does.
    """
    if data.trains != "sft":
        why = "a preference or a label tells about a bit a row, which a low rank holds"
        return Advice(value=LORA_RANKS[0], why=why)
    for rank in LORA_RANKS:
        held = _tokens_held(model, method, structs.replace(settings, lora_rank=rank))
        if held >= data.trained_tokens:
            break
    tokens = format_count(data.trained_tokens)
    if held < data.trained_tokens:
        why = f"even so adapters hold about {format_count(held)} of the {tokens} trained tokens"
    elif rank == LORA_RANKS[0]:
        why = f"holds about {format_count(held)} trained tokens; the data have {tokens}"
    else:
        why = f"the lowest rank that holds {tokens} trained tokens"
    return Advice(value=rank, why=why)


def _tokens_held(model: ModelSpec, method: Method, settings: MethodSettings) -> int:
    """Tokens of data that what is trained holds."""
    counted = partial(method.count, model, settings)
    trained = model.remembered(("held", method.name, settings), counted)
    return int(trained.num_trainable_parameters * BITS_PER_PARAMETER / BITS_PER_TOKEN)


def preferred_methods(
    model: ModelSpec, data: DataProfile, kind: DeviceKind, given: Mapping[str, Any]
) -> Advice:
    """Methods that are tried before all others, the best first, and why the first one is.

    `kind`: of the device.
    """
    if "method" in given:
        return Advice(value=(str(given["method"]),), why="asked for")
    if given.get("quantization", "none") != "none":
        return Advice(value=("qlora",), why=QUANTIZED_BASE)
    adapters = ("lora", "qlora")
    if any(name in given for name in _ADAPTER_SETTINGS):
        return Advice(value=adapters, why="adapters, whose settings are asked for")
    most = MethodSettings(lora_rank=LORA_RANKS[-1])
    if data.trains != "sft" or _tokens_held(model, METHODS["lora"], most) >= data.trained_tokens:
        why = "adapters on all linear layers match full tuning on data of this size"
        return Advice(value=adapters, why=why)
    if kind == "cpu":
        return Advice(value=adapters, why="adapters: a processor's run sees little of the data")
    tokens = format_count(data.trained_tokens)
    why = f"adapters of rank {most.lora_rank} hold less than {tokens} trained tokens tell"
    return Advice(value=("full", *adapters), why=why)


# Rows from which on a base model learns to answer from the data alone. Assumed; Llama 2 took
# 27,540 of the best for it (section 3.1), and most people's are not the best.
ROWS_FOR_A_BASE_MODEL = 100_000

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
    if num_rows >= ROWS_FOR_A_BASE_MODEL:
        return Advice(value="base", why=f"{num_rows:,} rows teach answering by themselves")
    return Advice(value="chat", why=f"{num_rows:,} rows change how a model answers that can")


def task_weighting(tasks: Mapping[str, int]) -> Advice:
    """How often each task's rows come: by the square root of their number, so that small ones are
    not lost (temperature 2, T5's best in most cases: arXiv 1910.10683, section 3.5.2)."""
    why = f"{len(tasks)} tasks by the square root of their rows (T = 2), so that small ones count"
    return Advice(value="temperature", why=why)


def data_advice(data: DataProfile, model: ModelSpec) -> dict[str, Advice]:
    """What the data decides, by setting, where `model` is trained."""
    num_rows = data.num_train_rows
    length = max_length(data.longest, model.max_position_embeddings)
    held_out = data.num_eval_rows
    rank = lora_rank(model, data)
    return {
        "max_length": length,
        "num_train_epochs": num_train_epochs(num_rows),
        "effective_batch_size": effective_batch_size(num_rows),
        "lora_rank": structs.replace(rank, why=f"{model.name}: {rank.why}"),
        "packing": packing(data, length.value),
        "validation_rows": Advice(value=held_out, why="no prompt of theirs is trained on"),
        "model": model_kind(num_rows, data.objective),
        **({"task_weighting": task_weighting(data.tasks)} if data.tasks else {}),
    }
