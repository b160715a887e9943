"""The formula behind each component of the peak, with its numbers put in.

Equations carry the numbers of docs/memory-model.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import Struct, structs

from ftplan.planner.compiled_step import compiled_step
from ftplan.planner.hardware_spec import Device
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.objectives import trained_part
from ftplan.planner.phases import COMPONENTS
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.stack import OWN_STACK, Stack
from ftplan.planner.step_settings import model_rows, row_length, trained_widths
from ftplan.planner.step_trace import GENERATION_PHASE
from ftplan.planner.tape import Form, value
from ftplan.planner.tensor_parallel import one_rank
from ftplan.planner.trained import num_elements
from ftplan.planner.weights import quantized_bytes_per_weight

# The equation of each component's part that is there throughout.
HELD_EQUATIONS = {
    "weights": 1,
    "reference_model": 1,
    "reward_model": 1,
    "adapters": 2,
    "gradients": 3,
    "optimizer_states": 4,
    "temporaries": 6,
    "communication": 8,
}
# What a bare number of bytes leaves open of what comes and goes.
_PASSING_WORDS = {
    "gradients": "those that backward has made by then: ",
    "autocast_copies": "of the weights that were cast by then: ",
}
# Of all that comes and goes: within the optimizer's step, while completions are generated, and
# anywhere else.
OPTIMIZER_STEP_EQUATION, STEP_EQUATION, GENERATION_EQUATION = 5, 7, 14
_PASSING_EQUATIONS = {
    "optimizer step": OPTIMIZER_STEP_EQUATION,
    GENERATION_PHASE: GENERATION_EQUATION,
}


class Term(Struct, frozen=True, kw_only=True):
    """One summand of a component: `formula` in words and numbers, and what it comes to."""

    component: str
    equation: int
    formula: str
    num_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return structs.asdict(self)


def explain(
    model: ModelSpec,
    plan: TrainingPlan,
    device: Device | None = None,
    stack: Stack = OWN_STACK,
    longest_row: int | None = None,
) -> list[Term]:
    """The terms of the peak, the largest component first; they sum to the allocated peak.

    `longest_row`: the longest row of the data, where known; rows are cut at `max_length`.
    Raises InputError for what the closed form does not model.
    """
    rows, length = model_rows(plan, row_length(plan, longest_row))
    step = compiled_step(model, plan, rows, length, device, stack)
    phase, held, moment = step.peak(rows, length)
    passing = _PASSING_EQUATIONS.get(phase, STEP_EQUATION)
    formulas = _held_formulas(one_rank(model, plan.tp_size), plan, held)
    terms = [
        Term(
            component=name,
            equation=HELD_EQUATIONS[name],
            formula=formulas.get(name, "held throughout"),
            num_bytes=size,
        )
        for name, size in held.items()
        if size
    ]
    for name, form in moment.components.items():
        size = value(form, rows, length)
        if size:
            formula = _PASSING_WORDS.get(name, "") + _spelled(form, rows, length)
            terms.append(Term(component=name, equation=passing, formula=formula, num_bytes=size))
    totals = dict.fromkeys(COMPONENTS, 0)
    for term in terms:
        totals[term.component] += term.num_bytes
    return sorted(terms, key=lambda term: (-totals[term.component], term.equation))


def _spelled(form: Form, rows: int, length: int) -> str:
    """`8,192 B x 2,048 tokens + ...` of a form's parts that are not 0."""
    units = (
        (1, ""),
        (rows, "rows"),
        (length, "places in a row"),
        (rows * length, "tokens"),
        (rows * length * length, "pairs of tokens"),
    )
    parts = [
        f"{number:,} B x {amount:,} {unit}" if unit else f"{number:,} B"
        for number, (amount, unit) in zip(form, units, strict=True)
        if number
    ]
    return " + ".join(reversed(parts)).replace("+ -", "- ")


def _held_formulas(
    model: ModelSpec, plan: TrainingPlan, held: Mapping[str, int]
) -> Mapping[str, str]:
    trained = trained_part(model, plan)
    widths = [
        (num_elements(parameters), width)
        for parameters, width in trained_widths(plan, trained)
        if parameters
    ]
    each = " + ".join(f"{count:,} x {width} B" for count, width in widths)
    count = sum(count for count, _ in widths)
    state_bytes = held.get("optimizer_states", 0) / count
    judge = model.reward_model.num_parameters if model.reward_model else 0
    return {
        "weights": " + ".join(_weight_terms(model, plan)),
        "reward_model": f"{judge:,} parameters x {plan.compute_bytes} B",
        "adapters": " + ".join(f"{c:,} x {w} B" for c, w in widths if trained.added_parameters),
        "gradients": f"one for each trained parameter: {each}",
        "optimizer_states": f"{count:,} trained x {state_bytes:.4g} B, by {plan.optim}",
        "temporaries": "workspaces of cuBLAS, one for each direction",
        "communication": f"copies of gradients, or gathered parameters: {each}",
    }


def _weight_terms(model: ModelSpec, plan: TrainingPlan) -> Iterator[str]:
    if plan.quantization == "none":
        yield f"{model.num_parameters:,} parameters x {plan.weight_bytes} B"
        return
    quantized = model.quantizable_weights
    yield f"{quantized:,} {plan.quantization} weights x {quantized_bytes_per_weight(plan):.4g} B"
    yield f"{model.num_parameters - quantized:,} others x {plan.weight_bytes} B"
