"""Which GPUs, and how many of them, train a model: what fits, how long it takes, what it costs.

Each choice is a card, a number of them and a method. Its settings are the recipe's; of
micro-batches the largest that fits is taken, with every layer checkpointed, and of ways to divide
the model the first that fits: none at all, then FSDP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct

from ftplan.planner.combinations import check_runs
from ftplan.planner.errors import InputError
from ftplan.planner.hardware_spec import QUANTIZATION_CAPABILITY, Device
from ftplan.planner.memory import estimate_memory, with_margin
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.recipe import estimate_recipe
from ftplan.planner.stack import OWN_STACK, Stack, kernel_capability
from ftplan.planner.step_time import StepTime, StepWork, step_work, time_of
from ftplan.planner.units import SECONDS_PER_HOUR

NUMBERS_OF_GPUS = (1, 2, 4, 8)
MICRO_BATCHES = (16, 4, 1)

# Rows of an optimizer step, over all GPUs: a micro-batch is repeated until it has as many.
ROWS_PER_STEP = 16

Mark = Literal["cheapest", "fastest", "Pareto"]


class Card(Struct, frozen=True, kw_only=True):
    """A GPU of the catalog, and the lowest price of one for an hour that is known, if any; `where`
    it is asked."""

    device: Device
    usd_per_hour: float | None = None
    where: str | None = None


class Work(Struct, frozen=True, kw_only=True):
    """A plan on some number of GPUs of a kind, its work, and the memory that it requires beside
    what a process on the card holds (`context_bytes`)."""

    plan: TrainingPlan
    required_bytes: int
    work: StepWork


class Choice(Struct, frozen=True, kw_only=True):
    """A method on some number of cards. `missing_bytes`: how much more each would have to hold, 0
    where it fits; then `plan`, `step`, `seconds` and `usd` (None without a price) are of the run.
    """

    card: Card
    num_gpus: int
    method: str
    required_bytes: int
    missing_bytes: int
    plan: TrainingPlan | None = None
    step: StepTime | None = None
    seconds: float | None = None
    usd: float | None = None

    @property
    def fits(self) -> bool:
        return self.missing_bytes == 0


def list_choices(
    model: ModelSpec,
    cards: Iterable[Card],
    methods: Sequence[str],
    tokens: float,
    given: Mapping[str, Any],
    stack_on: Callable[[Device], Stack] = lambda device: OWN_STACK,
) -> list[Choice]:
    """Every choice of cards, numbers and methods for a run of so many tokens; none where a card's
    kind, a number or a method cannot be. `stack_on`: the training stack on a card, the same on
    cards of a kind."""
    known: dict[tuple[object, ...], _Works] = {}
    choices = []
    for card in cards:
        kind = _kind(card.device)
        for num_gpus in _numbers(given):
            for method in methods:
                device = card.device
                key = (method, num_gpus, *kind)
                if key not in known:
                    stack = stack_on(device)
                    known[key] = _Works(_works(model, device, num_gpus, method, given, stack))
                choice = _choice(card, num_gpus, method, known[key], tokens)
                if choice is not None:
                    choices.append(choice)
    return choices


class _Works:
    """Works that are worked out when they are asked for: cards on which an earlier one fits need
    no later ones."""

    def __init__(self, coming: Iterator[Work]) -> None:
        self._coming, self._known = coming, list[Work]()

    def __iter__(self) -> Iterator[Work]:
        yield from self._known
        for work in self._coming:
            self._known.append(work)
            yield work


def _kind(device: Device) -> tuple[object, ...]:
    """What a plan's memory and work depend on, of a card."""
    quantizes = tuple(device.supports_quantization(name) for name in QUANTIZATION_CAPABILITY)
    return kernel_capability(device), device.supports_bfloat16, quantizes, device.vendor == "nvidia"


def _numbers(given: Mapping[str, Any]) -> tuple[int, ...]:
    asked = given.get("num_gpus")
    return NUMBERS_OF_GPUS if asked is None else (asked,)


def _works(
    model: ModelSpec,
    device: Device,
    num_gpus: int,
    method: str,
    given: Mapping[str, Any],
    stack: Stack,
) -> Iterator[Work]:
    """From the fastest to the smallest: what is tried in this order on a card."""
    for sharding, copies in _divided(num_gpus, given):
        for rows in _micro_batches(given):
            settings = {
                "per_device_train_batch_size": rows,
                "gradient_accumulation_steps": max(1, ROWS_PER_STEP // (rows * num_gpus)),
                **given,
                **{"method": method, "num_gpus": num_gpus, "sharding": sharding},
                "dp_replicate_size": copies,
            }
            try:
                plan = estimate_recipe(model, device, settings).plan
                check_runs(model, plan, device)
                work = _work(model, plan, device, stack)
            except InputError:
                continue  # not on this card, or not so many of them
            yield work


def _divided(num_gpus: int, given: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Ways to divide the model, and how many copies there are of what is divided: among the GPUs
    of a machine where there are several machines, then among all."""
    copies = given.get("dp_replicate_size", 1)
    if "sharding" in given or num_gpus == 1:
        return [(given.get("sharding", "none"), copies)]
    machines = given.get("num_machines", 1)
    hybrid = [("fsdp", machines)] if 1 < machines < num_gpus and copies == 1 else []
    return [("none", 1), *hybrid, ("fsdp", copies)]


def _micro_batches(given: Mapping[str, Any]) -> tuple[int, ...]:
    asked = given.get("per_device_train_batch_size")
    return MICRO_BATCHES if asked is None else (asked,)


def _work(model: ModelSpec, plan: TrainingPlan, device: Device, stack: Stack) -> Work:
    rows, length = plan.per_device_train_batch_size, plan.max_length
    return Work(
        plan=plan,
        required_bytes=estimate_memory(model, plan, device=device, stack=stack).required_bytes
        - device.context_bytes,
        work=step_work(
            model,
            plan,
            device,
            tokens_per_micro_batch=rows * length,
            mean_length=length,
            stack=stack,
        ),
    )


def _choice(card: Card, num_gpus: int, method: str, works: _Works, tokens: float) -> Choice | None:
    """None where there is no work at all."""
    free, context = card.device.free_bytes, card.device.context_bytes
    lacking = []
    for of in works:
        required = of.required_bytes + context
        if with_margin(required) <= free:
            break
        lacking.append(required)
    else:
        if not lacking:
            return None
        return Choice(
            card=card,
            num_gpus=num_gpus,
            method=method,
            required_bytes=min(lacking),
            missing_bytes=with_margin(min(lacking)) - free,
        )
    step = time_of(of.work, card.device)
    seconds = tokens / (num_gpus * step.tokens_per_second_per_gpu)
    price = card.usd_per_hour
    return Choice(
        card=card,
        num_gpus=num_gpus,
        method=method,
        required_bytes=required,
        missing_bytes=0,
        plan=of.plan,
        step=step,
        seconds=seconds,
        usd=None if price is None else num_gpus * price * seconds / SECONDS_PER_HOUR,
    )


def marks(choices: Iterable[Choice]) -> dict[int, list[Mark]]:
    """By place among the choices: the cheapest, the fastest, and those that nothing is both cheaper
    and faster than (the Pareto front). A choice without a price can only be the fastest."""
    fitting = [(n, c) for n, c in enumerate(choices) if c.fits]
    priced = [(n, c) for n, c in fitting if c.usd is not None]
    found: dict[int, list[Mark]] = {}
    if priced:
        found.setdefault(min(priced, key=_by_price)[0], []).append("cheapest")
    if fitting:
        found.setdefault(min(fitting, key=_by_time)[0], []).append("fastest")
    fastest = float("inf")
    for number, choice in sorted(priced, key=_by_price):
        assert choice.seconds is not None
        if choice.seconds < fastest:
            fastest = choice.seconds
            found.setdefault(number, []).append("Pareto")
    return found


def _by_price(numbered: tuple[int, Choice]) -> tuple[float, float]:
    choice = numbered[1]
    assert choice.usd is not None and choice.seconds is not None
    return choice.usd, choice.seconds


def _by_time(numbered: tuple[int, Choice]) -> tuple[float, float]:
    choice = numbered[1]
    assert choice.seconds is not None
    return choice.seconds, choice.usd if choice.usd is not None else float("inf")
