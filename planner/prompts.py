"""Learned tokens in front of every row on a tape, as PEFT's prompt encoders make them (PEFT 0.21,
`PeftModelForCausalLM.forward` and `get_prompt`)."""

from __future__ import annotations

from collections.abc import Callable

from ftplan.planner import adapter_functions as g
from ftplan.planner import functions as f
from ftplan.planner.peft_options import LENGTHENING, PeftOptions
from ftplan.planner.tape import Tape, Tensor, Weight, constant, per_row
from ftplan.planner.trained import Trained

PromptMaker = Callable[[Tape], Tensor]


def tokens_in_front(options: PeftOptions) -> int:
    """By how many tokens each row gets longer."""
    if options.peft_type not in LENGTHENING:
        return 0
    return options.count("num_virtual_tokens")


def prompt_maker(
    options: PeftOptions, trained: Trained, hidden_size: int, width: int
) -> PromptMaker | None:
    """What makes the learned embeddings of every row, `width` bytes a parameter; None for a method
    without."""
    if options.peft_type not in LENGTHENING:
        return None
    weights = {
        p.name.removeprefix("prompt_encoder."): Weight(p.num_elements, width, trained=True)
        for p in trained.adapters
    }
    size = options.count("num_virtual_tokens") * hidden_size
    if options.peft_type == "PROMPT_TUNING":
        return lambda tape: _repeated(tape, weights["embedding"], size)
    if options.peft_type == "P_TUNING":
        inner = weights["mlp_head.0.bias"].elements[0]
        return lambda tape: _by_network(tape, weights, (hidden_size, inner), size)
    return lambda tape: _of_task(tape, weights, options, size)


def _repeated(tape: Tape, embedding: Weight, size: int) -> Tensor:
    """The prompt, looked up once, for each row."""
    prompt = f.look_up(tape, embedding, constant(size))
    return f.part_copied(tape, prompt, per_row(size))


def _by_network(
    tape: Tape, weights: dict[str, Weight], widths: tuple[int, int], size: int
) -> Tensor:
    """Embeddings, and three linear modules with ReLU between."""
    prompt = f.look_up(tape, weights["embedding"], constant(size))
    prompt = f.part_copied(tape, prompt, per_row(size))
    wide, inner = widths
    for place, (into, out) in enumerate(((wide, inner), (inner, inner), (inner, wide))):
        name = f"mlp_head.{2 * place}"
        prompt = f.product(
            tape,
            f.to_product(tape, prompt),
            tape.cast_weight(weights[f"{name}.weight"]),
            into,
            out,
            weights[f"{name}.bias"],
        )
        if place < 2:
            prompt = f.activate(tape, prompt, "relu")
    return prompt


def _of_task(tape: Tape, weights: dict[str, Weight], options: PeftOptions, size: int) -> Tensor:
    """The shared prompt times the product of the task's column and row."""
    tokens, ranks = options.count("num_virtual_tokens"), options.count("num_ranks")
    hidden_size = size // tokens
    prompt = f.look_up(tape, weights["embedding"], per_row(size))
    columns = f.part_copied(tape, weights["prefix_task_cols"], per_row(tokens * ranks))
    rows = f.part_copied(tape, weights["prefix_task_rows"], per_row(ranks * hidden_size))
    task = g.batched(tape, columns, rows, per_row(size), ranks)
    return f.multiply(tape, prompt, task)
