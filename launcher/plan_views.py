"""What `plan` and `auto` show of a plan: one screen, and more with `--explain`. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.columns import Columns
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ftplan.launcher import views
from ftplan.launcher.costs import usd_for
from ftplan.launcher.token_settings import said_tokens
from ftplan.launcher.ui import StackedBar, facts, table
from ftplan.planner.evaluation_time import EvaluationTime
from ftplan.planner.front import thinned
from ftplan.planner.labels import said_labels
from ftplan.planner.memory import MemoryEstimate, needed_bytes
from ftplan.planner.overlong import said_counts
from ftplan.planner.phases import COMPONENTS
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.run_time import RunTime
from ftplan.planner.sharding import SHARDING_TITLES
from ftplan.planner.tasks import TaskWeighting
from ftplan.planner.units import (
    format_bytes,
    format_count,
    format_energy,
    format_seconds,
)

if TYPE_CHECKING:
    from ftplan.launcher.plan_explained import Explained
    from ftplan.launcher.planning import Planned
    from ftplan.planner.calibration import Calibration
    from ftplan.planner.data_profile import DataProfile
    from ftplan.planner.explain_time import TimeTerm
    from ftplan.planner.failures import Failures
    from ftplan.planner.hardware_spec import Device, Machine
    from ftplan.planner.margin import Margin
    from ftplan.planner.ranking import Evaluated, LeftOut, Ranking

# Components of the peak that the bar tells apart; the others are shown together.
_MOST_PARTS = 4
_MOST_OF_FRONT = 12
_MOST_TASKS = 6


def plan_parts(planned: Planned, explained: Explained | None = None) -> list[RenderableType]:
    """All that a plan shows, `explained` with the formulas and all settings."""
    parts: list[RenderableType] = [
        facts(list(_facts(planned))),
        Text(""),
        *memory_bar(planned),
        Text(""),
        settings_table(planned, all_of_them=explained is not None),
    ]
    if planned.ranking.alternatives:
        parts += [Text(""), alternatives_table(planned)]
    if planned.refused:
        parts += [Text(""), views.rejected_table(planned.refused)]
    return parts + (_explained_parts(planned, explained) if explained else [])


def _facts(planned: Planned) -> Iterator[tuple[str, str]]:
    """What the plan is for, how long it takes, and what it costs."""
    spec, plan, profile = planned.source.spec, planned.chosen.plan, planned.profile
    lengths = profile.summary()
    size = format_count(spec.num_parameters)
    yield "model", f"{spec.name}, {size} parameters: {planned.model_why}"
    if planned.runner_up is not None:
        yield "runner-up", f"{planned.runner_up.name}: {planned.runner_up.why_not}"
    yield "hardware", _hardware(planned)
    test = f", {profile.num_test_rows:,} for a test" if profile.num_test_rows else ""
    yield (
        "data",
        f"{profile.path}: {profile.num_train_rows:,} rows, {profile.num_eval_rows:,} held out"
        f"{test}; {profile.format}",
    )
    if labels := said_labels(profile.labels):
        yield "labels", labels
    measured = "" if profile.exact else "; estimated from characters"
    yield (
        "tokens",
        f"{format_count(profile.total_tokens)}; median {lengths['median']:,} a row, "
        f"{lengths['max']:,} at most{measured}",
    )
    for counts, side in ((profile.train_counts, ""), (profile.eval_counts, "held out: ")):
        if said := said_counts(counts, profile.limit):
            yield "too long", side + said
    if tokens := said_tokens(spec, plan):
        yield "trained", tokens
    if profile.task_lengths:
        yield "tasks", _tasks(profile, TaskWeighting.of(plan))
    yield "time", _time(planned)
    yield "evaluate", _evaluation(planned.evaluation_time)
    speed = [f"{planned.chosen.step.tokens_per_second_per_gpu:,.0f} tokens/s"]
    speed[0] += " a GPU" if plan.num_gpus > 1 else ""
    if planned.chosen.step.mfu is not None:
        speed.append(f"MFU {100 * planned.chosen.step.mfu:.0f} %")
    speed.append(f"bound by {planned.chosen.step.bound_by}")
    yield "speed", f"{', '.join(speed)}; rates: {planned.device.rates_source}"
    if learned := said_calibration(planned.device.calibration):
        yield "calibrated", learned
    yield from _price(planned)
    memory = planned.chosen.memory
    on_gpu = planned.device.kind != "cpu"
    ram = f"{format_bytes(memory.host.peak_bytes)} of RAM, " if on_gpu else ""
    yield "besides", f"{ram}{format_bytes(memory.disk.total)} of disk"


def _tasks(profile: DataProfile, weighting: TaskWeighting) -> str:
    """The tasks with most of an epoch, and how much that is."""
    shares = sorted(weighting.shares(profile.tasks).items(), key=lambda item: -item[1])
    said = [f"{task} {100 * share:.0f} %" for task, share in shares[:_MOST_TASKS]]
    more = f" and {len(shares) - _MOST_TASKS:,} others" if len(shares) > _MOST_TASKS else ""
    at_first = " at first" if weighting.is_dynamic else ""
    return f"{weighting.weighting}: of the rows that are drawn{at_first}, {', '.join(said)}{more}"


def _hardware(planned: Planned) -> str:
    plan, device = planned.chosen.plan, planned.device
    machine = planned.machine
    if machine is None:
        number = f"{plan.num_gpus} x " if plan.num_gpus > 1 else ""
        several = f" in {plan.num_machines} machines" if plan.num_machines > 1 else ""
        if device.network and several:
            several += f" joined by {device.network.name}"
        return f"{number}{device.name}{several}, {_free(device)}"
    host = machine.host
    parts = [
        *_gpus(machine),
        f"{host.cpu_name}, {host.num_cores} cores",
        f"RAM {_of_total(host.ram_available_bytes, host.ram_total_bytes)}",
        f"disk {format_bytes(host.disk_free_bytes)} free",
    ]
    return "; ".join(parts)


def _gpus(machine: Machine) -> Iterator[str]:
    """The machine's GPUs, alike ones together, with the least that is free on one."""
    for name, alike in groupby(machine.gpus, key=lambda gpu: gpu.name):
        members = list(alike)
        number = f"{len(members)} x " if len(members) > 1 else ""
        yield f"{number}{name}, {_free(min(members, key=lambda gpu: gpu.free_bytes))}"
    if not machine.gpus:
        yield "no GPU"


def _free(device: Device) -> str:
    return _of_total(device.free_bytes, device.total_bytes)


def _of_total(free_bytes: int, total_bytes: int) -> str:
    return f"{format_bytes(free_bytes)} of {format_bytes(total_bytes)} free"


def _time(planned: Planned) -> str:
    run, plan = planned.run_time, planned.chosen.plan
    step = format_seconds(planned.chosen.step.step_seconds)
    return (
        f"{format_seconds(run.seconds)} ({format_seconds(run.least_seconds)} to "
        f"{format_seconds(run.most_seconds)}): {run.steps:,} steps of {plan.effective_batch_size} "
        f"rows, {step} each"
    )


# Parts of evaluating, as a person reads them.
_EVALUATED = {
    "held_out": "held-out",
    "answers": "answers",
    "general_text": "text",
    "scoring": "scoring of layers",
}


def _evaluation(evaluation: EvaluationTime) -> str:
    """How long is evaluated beside training, before and after it, and on what."""
    whole = evaluation.whole
    parts = [
        f"{_EVALUATED[name]} {format_seconds(part.expected)}"
        for name, part in evaluation.parts.items()
        if part.expected
    ]
    return (
        f"{format_seconds(whole.expected)} ({format_seconds(whole.least)} to "
        f"{format_seconds(whole.most)}): {', '.join(parts)}"
    )


def said_calibration(calibration: Calibration) -> str | None:
    """What predictions are corrected by, and how to do without; None without a calibration."""
    if not calibration.in_force:
        return None
    factors = said_factors(calibration.factors) or "the margin alone"
    return (
        f"on {calibration.num_runs} runs, {calibration.fitted_on}: {factors}; "
        "`--no-calibration` leaves it out"
    )


def said_factors(factors: Mapping[str, float]) -> str:
    """Those that change something: `arithmetic x 0.91, traffic x 1.2`."""
    return ", ".join(f"{name} x {value:.3g}" for name, value in factors.items() if value != 1)


def _price(planned: Planned) -> Iterator[tuple[str, str]]:
    """Cost and energy, where they are known."""
    device, joules = planned.device, planned.run_time.joules
    parts = []
    if any(planned.usd.values()):
        parts.append(": ".join(views.cost_cells(planned.usd, device)))
    if joules is not None:
        parts.append(format_energy(joules))
    if parts:
        yield "cost", "; ".join(parts)


def memory_bar(planned: Planned) -> list[RenderableType]:
    """The components of the peak, and what is kept and left free, in a bar of the free memory."""
    memory, device, margin = planned.chosen.memory, planned.device, planned.offer.margin
    parts = bar_parts(memory, device.free_bytes, margin.share)
    each = (
        f" on each of {planned.chosen.plan.num_gpus} GPUs"
        if planned.chosen.plan.num_gpus > 1
        else ""
    )
    by = ", by a dry run of the longest batch" if planned.confirmed else ""
    required, free = format_bytes(memory.required_bytes), format_bytes(device.free_bytes)
    bar = StackedBar([size for _, size in parts])
    legend = [
        Text.assemble(bar.key(number), f" {name} ", (format_bytes(size), "bold"))
        for number, (name, size) in enumerate(parts)
    ]
    title = f"{required} required of {free} free{each}, in {memory.peak_phase.name}{by}"
    return [
        Text.assemble(("Memory: ", "bold"), title),
        bar,
        Columns(legend, padding=(0, 3)),
        *([Text(margin_line(margin), style="dim")] if margin.num_runs else []),
    ]


def bar_parts(memory: MemoryEstimate, free_bytes: int, margin: float) -> list[tuple[str, int]]:
    """(what, bytes) from the peak's largest component to what is left, which comes last; they sum
    to what is free."""
    sizes = sorted(memory.peak_phase.components.items(), key=lambda item: -item[1])
    named = [(COMPONENTS[name], size) for name, size in sizes[:_MOST_PARTS] if size]
    others = sum(size for _, size in sizes[_MOST_PARTS:])
    beside = memory.required_bytes - memory.allocated_peak_bytes
    needed = needed_bytes(memory, margin)
    parts = [
        *named,
        ("other tensors", others),
        ("allocator and process", beside),
        (f"{format_margin(margin)} margin", needed - memory.required_bytes),
    ]
    left = ("left over", max(0, free_bytes - needed))
    return [*((name, size) for name, size in parts if size > 0), left]


def margin_line(margin: Margin) -> str:
    """What is kept free for the estimate's own error, and where that is known from."""
    return f"margin {format_margin(margin.share)}: {margin.num_runs} runs on this GPU"


def format_margin(share: float) -> str:
    return f"{100 * share:.2g} %"


# Shown first, in this order; what else was chosen or given follows.
_FIRST = (
    "method", "quantization", "lora_rank", "dtype", "mixed_precision",
    "num_gpus", "num_machines", "sharding", "dp_replicate_size",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_length",
    "gradient_checkpointing", "every_n_layers", "optim", "attn_implementation", "loss",
    "learning_rate", "num_train_epochs", "max_steps",
)  # fmt: skip


def settings_table(planned: Planned, *, all_of_them: bool) -> Table:
    """Settings that were given or chosen, with a reason each; or all, and where each is from."""
    reasoned = planned.chosen.reasoned
    names = sorted(
        reasoned.reasons, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST)
    )
    if not all_of_them:
        names = [name for name in names if _is_told(planned, name)]
    rows: list[list[RenderableType]] = []
    before = None
    for name in names:
        reason = reasoned.reasons[name]
        why = "as above" if reason.why == before else reason.why
        origin = [reason.origin] if all_of_them else []
        value = _shown(getattr(reasoned.plan, name))
        rows.append([name, Text(value, "bold"), *origin, why])
        before = reason.why
    heads = ("setting", "value", *(["from"] if all_of_them else []), "why")
    return table("", heads, rows)


# Derived values that go without saying, and a setting that follows from another.
_USUAL = {"num_gpus": 1, "every_n_layers": 1, "attn_implementation": "sdpa"}
_FOLLOWS = "lora_alpha"


def _is_told(planned: Planned, name: str) -> bool:
    """Whether a setting was chosen or given, and says something."""
    reasoned = planned.chosen.reasoned
    origin, value = reasoned.reasons[name].origin, getattr(reasoned.plan, name)
    if origin == "given":
        return True
    if name == "lora_rank" and not reasoned.plan.resolved_method.adapter:
        return False
    if origin == "default" or value is None or value == "none" or name == _FOLLOWS:
        return False
    return bool(value != _USUAL.get(name))


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def alternatives_table(planned: Planned) -> Table:
    """Methods that fit too; with the time of a step where the chosen one's run is cut short."""
    others = planned.ranking.alternatives
    several = any(e.plan.num_gpus > 1 for e in (planned.chosen, *others))
    rows = []
    for e in others:
        run = RunTime.of(e.plan, e.step, planned.profile.num_train_rows)
        rows.append(
            [
                e.plan.method,
                *([gpus_of(e.plan)] if several else []),
                format_bytes(e.memory.required_bytes),
                format_seconds(e.step.step_seconds if planned.ends_early else run.seconds),
                planned.why_not(e),
            ]
        )
    time = ">a step" if planned.ends_early else ">training"
    heads = ("fits too", *(["GPUs"] if several else []), ">required", time, "why not")
    return table("", heads, rows)


def gpus_of(plan: TrainingPlan) -> str:
    """How many GPUs, and what they divide."""
    divides = plan.num_gpus > 1 or plan.sharding != "none"
    return f"{plan.num_gpus}, {SHARDING_TITLES[plan.sharding]}" if divides else str(plan.num_gpus)


# --- with --explain


def _explained_parts(planned: Planned, explained: Explained) -> list[RenderableType]:
    memory, device = planned.chosen.memory, planned.device
    parts: list[RenderableType] = [
        views.totals_table(memory, device, planned.offer.margin.share),
        *([views.explain_table(explained.memory)] if explained.memory else []),
        views.host_table(explained.host),
        time_table(planned, explained.time),
        *([failures_table(explained.failures)] if explained.failures else []),
        *front_parts(planned, explained.front),
        *search_parts(planned.ranking),
    ]
    return [line for part in parts for line in (Text(""), part)]


def time_table(planned: Planned, terms: Sequence[TimeTerm]) -> Table:
    """The parts of a step, with the equations of docs/time-model.md."""
    step = planned.chosen.step
    rows: list[list[RenderableType]] = [
        [term.part, _shown_part(term.seconds), f"({term.equation})", term.formula] for term in terms
    ]
    bounds = f"{views.bounds(step)}; bound by {step.bound_by}"
    rows.append([Text("a step", "bold"), format_seconds(step.step_seconds), "(T1)", bounds])
    return table(
        "The time of a step (equations of docs/time-model.md)", ("", ">time", ">eq.", "of"), rows
    )


def failures_table(failures: Failures) -> Table:
    """How often checkpoints are worth writing, and what failing GPUs take of the time (T11)."""
    rows: list[list[RenderableType]] = [
        ["between failures", format_seconds(failures.seconds_between_failures), "of any machine"],
        ["to save", format_seconds(failures.save_seconds), "a checkpoint, training waits"],
        ["to go on", format_seconds(failures.restart_seconds), "from a failure to the next step"],
        ["saved every", format_seconds(failures.daly_seconds), "as Daly says is best"],
        ["", format_seconds(failures.young_seconds), "as Young does"],
        ["lost", f"{100 * failures.lost_share:.2g} %", "of the time, to all of that"],
    ]
    return table("What failures cost (docs/scaling.md)", ("", ">time", ""), rows)


def _shown_part(seconds: float) -> str:
    """Parts of a step may take microseconds."""
    return format_seconds(seconds) if seconds >= 0.1 else f"{1e3 * seconds:.2g} ms"


def front_parts(planned: Planned, front: Sequence[Evaluated]) -> list[RenderableType]:
    """The table of the Pareto front, and what it leaves out."""
    best = planned.ranking.best
    assert best is not None, "a plan that is shown was found"
    shown = thinned(front, _MOST_OF_FRONT, best)
    parts: list[RenderableType] = [front_table(planned, shown)]
    if len(shown) < len(front):
        parts.append(Text(f"{len(shown)} of {len(front)}, evenly spaced", "dim"))
    if planned.ends_early:
        parts.append(Text("training without the time budget", "dim"))
    return parts


def front_table(planned: Planned, front: Sequence[Evaluated]) -> Table:
    """Plans that no other is better than in memory, time and method at once."""
    several = any(one.plan.num_gpus > 1 for one in front)
    rows: list[list[RenderableType]] = []
    for one in front:
        run = RunTime.of(one.plan, one.step, planned.profile.num_train_rows)
        usd = usd_for(one.device, one.plan.num_gpus * run.seconds)
        rows.append(
            [
                "*" if one is planned.ranking.best else "",
                one.plan.method,
                str(one.plan.per_device_train_batch_size),
                checkpointing_of(one.plan),
                *([gpus_of(one.plan)] if several else []),
                format_bytes(one.memory.required_bytes),
                format_seconds(run.seconds),
                *([_cheapest(usd)] if any(planned.usd.values()) else []),
            ]
        )
    heads = (
        "",
        "method",
        ">micro-batch",
        "checkpointing",
        *(["GPUs"] if several else []),
        ">required",
        ">training",
        *([">USD"] if any(planned.usd.values()) else []),
    )
    title = "Pareto front of memory, time and method (*: chosen)"
    return table(title, heads, rows)


def _cheapest(usd: Mapping[str, float | None]) -> str:
    known = [cost for cost in usd.values() if cost is not None]
    return f"{min(known):.2g}" if known else ""


def checkpointing_of(plan: TrainingPlan) -> str:
    """Which layers are computed again."""
    if not plan.gradient_checkpointing:
        return "none"
    return "every layer" if plan.every_n_layers == 1 else f"1 layer of {plan.every_n_layers}"


def search_parts(ranking: Ranking) -> list[RenderableType]:
    """How many plans were looked at, and which could not be."""
    counts = Text(
        f"{ranking.num_plans:,} plans; {ranking.num_timed:,} of them timed, the others bounded by "
        f"those; memory looked at for {ranking.num_evaluated:,}"
    )
    return [counts, *([left_out_table(ranking.left_out)] if ranking.left_out else [])]


def left_out_table(left_out: Sequence[LeftOut]) -> Table:
    """Candidates that cannot be estimated or run."""
    rows: list[list[RenderableType]] = [
        [left.method, f"{left.count:,}", left.reason] for left in left_out
    ]
    return table("Left out", ("method", ">plans", "why"), rows)
