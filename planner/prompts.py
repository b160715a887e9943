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
        inner = options.optional_count("encoder_hidden_size", hidden_size)
        if options.values["encoder_reparameterization_type"] == "LSTM":
            layers = options.count("encoder_num_layers")
            return lambda tape: _by_lstm(tape, weights, (hidden_size, inner), layers, size)
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
    wide, inner = widths
    prompt = _embedded(tape, weights, size)
    return _by_head(tape, weights, prompt, ((wide, inner), (inner, inner), (inner, wide)))


def _by_lstm(
    tape: Tape, weights: dict[str, Weight], widths: tuple[int, int], layers: int, size: int
) -> Tensor:
    """Embeddings, an LSTM in both directions, and two linear modules with ReLU between. The gates
    of all tokens are taken together: what torch's kernels keep for backward is of that size, and
    small beside the weights."""
    wide, inner = widths
    tokens = size // wide
    x, into = _embedded(tape, weights, size), wide
    for layer in range(layers):
        ways = [
            _one_way(tape, weights, x, (into, inner), tokens, f"l{layer}{direction}")
            for direction in ("", "_reverse")
        ]
        x, into = f.join(tape, ways), 2 * inner
        del ways
    return _by_head(tape, weights, x, ((2 * inner, 2 * inner), (2 * inner, wide)))


def _one_way(
    tape: Tape,
    weights: dict[str, Weight],
    x: Tensor,
    sides: tuple[int, int],
    tokens: int,
    end: str,
) -> Tensor:
    """The states of one direction: four gates of each token's input and of the state before."""
    into, inner = sides
    states = x
    for name, side in (("ih", into), ("hh", inner)):
        gates = f.product(
            tape,
            f.to_product(tape, states),
            tape.cast_weight(weights[f"lstm_head.weight_{name}_{end}"]),
            side,
            4 * inner,
            weights[f"lstm_head.bias_{name}_{end}"],
        )
        states = f.part_copied(tape, gates, per_row(tokens * inner))
    return states


def _embedded(tape: Tape, weights: dict[str, Weight], size: int) -> Tensor:
    """The learned embeddings, for each row."""
    prompt = f.look_up(tape, weights["embedding"], constant(size))
    return f.part_copied(tape, prompt, per_row(size))


def _by_head(
    tape: Tape,
    weights: dict[str, Weight],
    prompt: Tensor,
    sides: tuple[tuple[int, int], ...],
) -> Tensor:
    """Linear modules with ReLU between."""
    for place, (into, out) in enumerate(sides):
        name = f"mlp_head.{2 * place}"
        prompt = f.product(
            tape,
            f.to_product(tape, prompt),
            tape.cast_weight(weights[f"{name}.weight"]),
            into,
            out,
            weights[f"{name}.bias"],
        )
        if place < len(sides) - 1:
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
