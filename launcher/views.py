"""What the commands print: tables made from planner objects. Pure; nothing is computed here
but shares and differences of what is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ftplan.launcher.costs import usd_per_million_tokens
from ftplan.launcher.ui import bar, table
from ftplan.launcher.would_do import named
from ftplan.planner import rules_of_thumb
from ftplan.planner.achieved import SHARE_OF_POWER
from ftplan.planner.memory import MEMORY_MARGIN, MemoryEstimate, fits, needed_bytes
from ftplan.planner.phases import COMPONENTS, STEP_PHASES, Phase
from ftplan.planner.units import (
    FLOAT32_BYTES,
    format_bytes,
    format_count,
    format_energy,
    format_percent,
    format_seconds,
)
from ftplan.profiles import lowest_prices

if TYPE_CHECKING:
    from ftplan.launcher.compared import ComparedMethod
    from ftplan.launcher.would_do import Offered, Refused
    from ftplan.planner.explain import Term
    from ftplan.planner.hardware_spec import Device, Machine
    from ftplan.planner.ladder import Rung
    from ftplan.planner.plan import TrainingPlan
    from ftplan.planner.step_time import StepTime


def hardware_table(machine: Machine) -> Table:
    """GPUs with free and total memory, the processor, RAM and disk."""
    rows: list[list[RenderableType]] = []
    for gpu in machine.gpus:
        holders = ", ".join(
            f"{h.name} {format_bytes(h.used_bytes) if h.used_bytes else ''}".strip()
            for h in gpu.holders
        )
        rows.append(
            [
                f"GPU {gpu.index}",
                format_bytes(gpu.free_bytes),
                format_bytes(gpu.total_bytes),
                f"{gpu.name}{_capability(gpu)}{'; held by ' + holders if holders else ''}",
            ]
        )
    if not machine.gpus:
        rows.append(["GPU", "-", "-", "none found"])
    host = machine.host
    rows.append(
        [
            "RAM",
            format_bytes(host.ram_available_bytes),
            format_bytes(host.ram_total_bytes),
            f"{host.cpu_name}, {host.num_cores} cores",
        ]
    )
    rows.append(["disk", format_bytes(host.disk_free_bytes), "", host.disk_path])
    return table("Hardware", ("", ">free", ">total", "what"), rows)


def _capability(gpu: Device) -> str:
    if gpu.compute_capability is None:
        return ""
    major, minor = gpu.compute_capability
    return f", compute capability {major}.{minor}"


def memory_table(memory: MemoryEstimate, device: Device | None) -> Group:
    """Components of the peak with a bar each, then the totals."""
    phase = memory.peak_phase
    peak = memory.allocated_peak_bytes
    rows: list[list[RenderableType]] = [
        [COMPONENTS[name], format_bytes(size), f"{100 * size / peak:.0f} %", bar(size / peak)]
        for name, size in sorted(phase.components.items(), key=lambda item: -item[1])
        if size
    ]
    title = f"Memory at the peak ({phase.name})"
    components = table(title, ("component", ">size", ">share", ""), rows)
    return Group(components, Text(""), totals_table(memory, device))


def phases_table(phases: Sequence[Phase]) -> Table:
    """The highest moment of each phase."""
    peak = max(phase.allocated_peak_bytes for phase in phases)
    rows: list[list[RenderableType]] = [
        [
            phase.name,
            format_bytes(phase.allocated_peak_bytes),
            bar(phase.allocated_peak_bytes / peak),
        ]
        for phase in phases
    ]
    return table("The peak of each phase", ("phase", ">allocated", ""), rows)


def totals_table(
    memory: MemoryEstimate, device: Device | None, margin: float = MEMORY_MARGIN
) -> Table:
    """Allocated, reserved, device, required, and what that leaves of the free memory."""
    on_cpu = device is not None and device.kind == "cpu"
    rows: list[list[RenderableType]] = [
        ["allocated", format_bytes(memory.allocated_peak_bytes), "tensors alive at the peak"],
    ]
    if on_cpu:
        rows.append(
            ["process", format_bytes(memory.device_peak_bytes), "with Python and its libraries"]
        )
    else:
        rows += [
            ["reserved", format_bytes(memory.reserved_peak_bytes), "what torch's allocator holds"],
            ["device", format_bytes(memory.device_peak_bytes), "what nvidia-smi shows"],
        ]
    rows.append(
        ["required", format_bytes(memory.required_bytes), "free memory the run needs to survive"]
    )
    if device is not None:
        rows += _verdict_rows(memory, device, margin)
    host, disk = memory.host, memory.disk
    if not on_cpu:
        unmapped = f"all processes, {host.peak_phase.name}"
        if host.required_bytes < host.peak_bytes:
            unmapped += f"; {format_bytes(host.required_bytes)} without mapped files"
        rows.append(["host RAM", format_bytes(host.peak_bytes), unmapped])
    rows.append(
        [
            "disk",
            format_bytes(disk.total),
            f"model {format_bytes(disk.weights)}, checkpoints {format_bytes(disk.checkpoints)}, "
            f"result {format_bytes(disk.final_model)}",
        ]
    )
    return table("Totals", ("", ">size", "meaning"), rows)


def _verdict_rows(
    memory: MemoryEstimate, device: Device, margin: float
) -> list[list[RenderableType]]:
    """What is kept free besides, and what is left of the device's free memory then."""
    needed = needed_bytes(memory, margin)
    left = device.free_bytes - needed
    enough = fits(memory, device, margin)
    verdict = Text("fits", "green") if enough else Text("does not fit", "red")
    told = f": {format_bytes(device.free_bytes)} is free on {device.name}"
    return [
        [
            "kept free",
            format_bytes(needed - memory.required_bytes),
            f"{100 * margin:.2g} % of that, for the estimate's own error",
        ],
        [
            "left over" if enough else "missing",
            format_bytes(abs(left)),
            Text.assemble(verdict, told),
        ],
    ]


RULE_NOTE = (
    "Each part is shown where it is highest. That is not at one time: together they come to more "
    "than the total, which is the peak.\n"
    "The rule counts 16-bit parameters; autocast keeps the trained parameters in fp32 and casts "
    "16-bit copies. Activations depend on batch, length and checkpointing, not on parameters. "
    "Framework is what the allocator holds beyond tensors, the CUDA context, and temporaries."
)


def rule_table(num_parameters: int, memory: MemoryEstimate) -> Table:
    """The 17.5-bytes rule, part by part, beside the most that each part takes in any phase."""
    overhead = memory.device_peak_bytes - memory.allocated_peak_bytes
    rows: list[list[RenderableType]] = []
    for part, width in rules_of_thumb.PARTS_BYTES_PER_PARAMETER.items():
        size, phase = _highest(memory, rules_of_thumb.COMPONENTS_OF_PART[part])
        size += overhead if part == "framework" else 0
        rows.append(
            [
                part.replace("_", " "),
                f"{width:g}",
                format_bytes(width * num_parameters),
                format_bytes(size),
                f"{size / num_parameters:.2f}",
                phase,
            ]
        )
    rows.append(
        [
            Text("total", "bold"),
            f"{rules_of_thumb.BYTES_PER_PARAMETER:g}",
            format_bytes(rules_of_thumb.rule_bytes(num_parameters)),
            format_bytes(memory.device_peak_bytes),
            f"{memory.device_peak_bytes / num_parameters:.2f}",
            memory.peak_phase.name,
        ]
    )
    return table(
        "The 17.5-bytes-a-parameter rule, beside what was computed",
        ("part", ">B/param", ">by the rule", ">at most", ">B/param", "in"),
        rows,
    )


def _highest(memory: MemoryEstimate, components: Sequence[str]) -> tuple[int, str]:
    """The most that components take together, and the first phase in which they do."""
    sizes = {
        phase.name: sum(phase.components[name] for name in components) for phase in memory.phases
    }
    highest = max(sizes.values())
    there = [name for name, size in sizes.items() if size == highest]
    return highest, "throughout" if {*STEP_PHASES} <= {*there} else there[0]


def explain_table(terms: Iterable[Term]) -> Table:
    """Each component's summands, with the equations of docs/memory-model.md."""
    rows: list[list[RenderableType]] = []
    before = None
    for term in terms:
        name = "" if term.component == before else COMPONENTS[term.component]
        rows.append([name, format_bytes(term.num_bytes), f"({term.equation})", term.formula])
        before = term.component
    return table(
        "Where it comes from (equations of docs/memory-model.md)",
        ("component", ">size", ">eq.", "formula"),
        rows,
    )


COMPARE_NOTE = (
    "Components are what is there at each method's own peak, in the phase named below them, and "
    "sum to what is allocated. What is 0 B or left out there may be there at another time: "
    "gradients, for one, come as activations go."
)


def host_table(terms: Iterable[Mapping[str, Any]]) -> Table:
    """Host RAM and disk, summand by summand."""
    rows: list[list[RenderableType]] = []
    before = None
    for term in terms:
        where = "" if term["where"] == before else term["where"]
        equation = f"({term['equation']})"
        rows.append([where, format_bytes(term["num_bytes"]), equation, term["formula"]])
        before = term["where"]
    return table("Around the GPU", ("", ">size", ">eq.", "formula"), rows)


def compare_table(compared: Sequence[ComparedMethod], device: Device | None) -> Table:
    """Methods side by side: components of each one's peak, and its totals."""
    peaks = [row.memory.peak_phase.components for row in compared]

    def cells(title: str, of: Callable[[ComparedMethod], str]) -> list[RenderableType]:
        return [title, *(of(row) for row in compared)]

    def sizes(title: str, of: Callable[[ComparedMethod], int]) -> list[RenderableType]:
        return cells(title, lambda row: format_bytes(of(row)))

    rows = [
        cells("trained parameters", lambda row: format_count(row.num_trainable_parameters)),
        cells("weights in", lambda row: _weights_in(row.plan)),
    ]
    for name, title in COMPONENTS.items():
        if any(peak[name] for peak in peaks):
            rows.append([title, *(format_bytes(peak[name]) for peak in peaks)])
    rows += [
        cells("in", lambda row: row.memory.peak_phase.name),
        sizes("allocated", lambda row: row.memory.allocated_peak_bytes),
        sizes("device", lambda row: row.memory.device_peak_bytes),
        sizes("required", lambda row: row.memory.required_bytes),
    ]
    if device is None:
        rows.append(cells("fits on", lambda row: row.card))
    else:
        fitting = cells(f"fits {device.name}", lambda r: "yes" if fits(r.memory, device) else "no")
        rows.append(fitting)
    columns = ("", *(f">{row.method}" for row in compared))
    return table("Memory at the peak by method", columns, rows, folds=True)


def _weights_in(plan: TrainingPlan) -> str:
    return plan.dtype if plan.quantization == "none" else plan.quantization


def methods_table(rows: Iterable[tuple[str, int, int, str]]) -> Table:
    """(method, trained parameters, required bytes, smallest card) for each method."""
    return table(
        "The same model by other methods",
        ("method", ">trained", ">required", "fits on"),
        [[name, format_count(n), format_bytes(size), card] for name, n, size, card in rows],
    )


def step_table(plan: TrainingPlan, step: StepTime, device: Device) -> Table:
    """Speed of a GPU, energy and cost, with full rows."""
    rows = plan.gradient_accumulation_steps * plan.per_device_train_batch_size
    rows *= plan.resolved_objective.sequences_per_row
    where, whose = (" on each GPU", "of each GPU; ") if plan.num_gpus > 1 else ("", "")
    full = f"{rows:,} full {'row' if rows == 1 else 'rows'} of {plan.max_length:,} tokens{where}"
    speed = f"{step.tokens_per_second_per_gpu:,.0f}"
    return table(
        f"Time on {device.name}",
        ("", ">expected", ""),
        [
            ["a step", format_seconds(step.step_seconds), f"{bounds(step)}; {full}"],
            ["tokens/s", speed, f"{whose}bound by {step.bound_by}"],
            *_efficiency_rows(plan, step, device),
        ],
    )


def bounds(step: StepTime) -> str:
    """The least and the most that a step takes."""
    least, most = step.least_step_seconds, step.most_step_seconds
    return f"{format_seconds(least)} to {format_seconds(most)}"


def _efficiency_rows(
    plan: TrainingPlan, step: StepTime, device: Device
) -> list[list[RenderableType]]:
    """MFU, energy and cost, what is not known left out."""
    rows: list[list[RenderableType]] = []
    if step.mfu is not None:
        peak = device.peak_flops_per_second[plan.compute_dtype] / 1e12
        of = f"of {peak:,.0f} TFLOP/s in {plan.compute_dtype}; recomputation not counted"
        rows.append(["MFU", f"{100 * step.mfu:.0f} %", of])
    if step.joules_per_token is not None and device.power_watts is not None:
        energy = format_energy(1e6 * step.joules_per_token)
        drawn = f"{100 * SHARE_OF_POWER:.0f} % of the GPU's {device.power_watts:,.0f} W"
        rows.append(["energy", energy, f"a million tokens; {drawn}"])
    costs = usd_per_million_tokens(device, step)
    if any(costs.values()):
        rows.append(["cost", *_million(costs, device)])
    return rows


def _million(costs: Mapping[str, float | None], device: Device) -> list[str]:
    cost, words = cost_cells(costs, device)
    return [cost, f"a million tokens; {words}"]


def cost_cells(costs: Mapping[str, float | None], device: Device) -> tuple[str, str]:
    """The cost on demand, or spot where nothing else is known, and the other beside it."""
    known = lowest_prices(device.name)
    (billing, cost), *others = [(name, usd) for name, usd in costs.items() if usd is not None]
    price = known[billing]
    words = f"{billing} at {price.provider}, {price.date}"
    for other, usd in others:
        words += f"; {other} {usd:.2g} USD at {known[other].provider}"
    return f"{cost:.2g} USD", words


def rejected_table(refused: Iterable[Refused]) -> Table:
    """Methods that were not taken, what stopped each, and what would do."""
    rows: list[list[RenderableType]] = []
    for one in refused:
        item, nearest = one.rejection, one.rejection.nearest
        why = item.reason
        if nearest is not None:
            needs, free = item.needs_bytes or 0, nearest.device.free_bytes
            number = nearest.plan.num_gpus
            each = f" on each of {number} GPUs" if number > 1 else ""
            why = f"needs {format_bytes(needs)}{each}, {format_bytes(free)} free"
        if one.would_do:
            why += "; would do: " + "; ".join(map(_offered, one.would_do))
        rows.append([item.method, why])
    return table("Not possible here", ("method", "why"), rows)


def _offered(offered: Offered) -> str:
    usd = offered.usd_per_hour
    price = f", {usd:.2f} USD/h" if usd is not None else ""
    return f"{named(offered.remedy)}{price}"


def ladder_table(rungs: Iterable[Rung], device: Device) -> Table:
    """What to give up so that something fits."""
    rows: list[list[RenderableType]] = []
    for rung in rungs:
        lacks = f"misses {format_bytes(rung.needed_bytes - device.free_bytes)}"
        then = ("or " if rung.alone else "and ") if rows else ""
        rows.append(
            [
                f"{then}{rung.gives_up}",
                format_bytes(rung.needed_bytes),
                "fits" if rung.fits else lacks,
                format_seconds(rung.seconds) if rung.seconds is not None else "",
                f"{rung.usd:.2g}" if rung.usd is not None else "",
            ]
        )
    heads = ("giving up", ">needs", "", ">training", ">USD")
    result = table("Nothing fits as asked for: what would", heads, rows)
    result.columns[0].no_wrap = False  # it has the words
    return result


def report(record: Mapping[str, Any]) -> Group:
    """Predicted beside measured, what the model could do before and after, some answers."""
    parts: list[RenderableType] = [comparison_table(record)]
    if said := said_unmet(record):
        parts.append(Text(said, style="dim"))
    parts += [Text(""), evaluation_table(record)]
    return Group(*parts, Text(""), samples_view(record.get("samples") or []))


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


# Measures of record.json's `evaluation`: label, form, and which way is better.
_MEASURES: tuple[tuple[str, str, Callable[[float], str], str], ...] = (
    ("perplexity", "perplexity", "{:.2f}".format, "lower is better"),
    ("accuracy", "chosen over rejected", _share, "higher is better"),
    ("reward", "reward", "{:.3f}".format, "higher is better"),
    ("exact_match", "exact match", _share, "higher is better"),
    ("f1", "F1 of words", _share, "higher is better"),
    ("majority_share", "always the same label", _share, "exact match has to exceed it"),
    ("macro_f1", "F1 of labels, mean", _share, "higher is better"),
)


def evaluation_table(record: Mapping[str, Any]) -> Table:
    """What was measured on the held-out rows, and the perplexity of general text."""
    return table("On held-out rows", EVALUATION_COLUMNS, evaluation_rows(record))


EVALUATION_COLUMNS = ("", ">before", ">after", ">change", "")


def evaluation_rows(record: Mapping[str, Any]) -> list[list[str]]:
    evaluation, forgetting = record["evaluation"], record.get("forgetting")
    num_scored = evaluation.get("num_scored") or 0
    rows: list[list[str]] = []
    if evaluation["before"] is not None and evaluation["after"] is not None:
        name = f"loss, {evaluation['num_rows']} rows"
        rows.append(_before_and_after(name, evaluation, "{:.3f}".format, "lower is better"))
    rows += _task_rows(record.get("tasks") or {})
    for key, label, form, better in _MEASURES:
        if values := evaluation.get(key):
            name = f"{label}, {num_scored} answers" if key == "exact_match" else label
            rows.append(_before_and_after(name, values, form, better))
    if forgetting:
        name = "perplexity of general text"
        rows.append(_before_and_after(name, forgetting, "{:.2f}".format, "a rise is forgetting"))
    return rows


def _before_and_after(
    label: str, values: Mapping[str, Any], form: Callable[[float], str], better: str
) -> list[str]:
    before, after = values["before"], values["after"]
    is_share = form is _share
    if is_share:
        change = f"{100 * (after - before):+.0f} points"
    else:
        change = format_percent(after / before - 1) if before > 0 else f"{after - before:+.3f}"
    return [label, form(before), form(after), change, better]


def said_forgetting(record: Mapping[str, Any]) -> str | None:
    """What was forgotten and what helps; None where little was."""
    forgetting = record.get("forgetting")
    if not forgetting or not forgetting["forgotten"]:
        return None
    rise = format_percent(forgetting["after"] / forgetting["before"] - 1).lstrip("+")
    helps = "; ".join(forgetting["what_helps"])
    return (
        f"the model has forgotten: the perplexity of general text rose by {rise}, more than "
        f"{_share(forgetting['threshold'])}. What helps: {helps}"
    )


def _change(before: float, after: float) -> str:
    """A share of what was; a difference where that was not above 0, as rewards may be."""
    return format_percent(after / before - 1) if before > 0 else f"{after - before:+.3f}"


def _task_rows(tasks: Mapping[str, Any]) -> Iterator[list[str]]:
    """Of each task: its held-out loss, and its share of the rows that were drawn."""
    for name, told in tasks.items():
        before, after = told["before"], told["after"]
        if before and after is not None:
            change = format_percent(after / before - 1)
            drawn = f"{100 * told['share']:.0f} % of the rows trained on"
            yield [f"- {name}", f"{before:.3f}", f"{after:.3f}", change, drawn]


def comparison_table(record: Mapping[str, Any]) -> Table:
    """What was predicted, what was measured, and how far off it was."""
    predicted, measured = record["predicted"], record["measured"]
    rows: list[list[RenderableType]] = []
    for label, key, form in (
        ("memory, allocated", "allocated_bytes", format_bytes),
        ("memory, device", "device_bytes", format_bytes),
        ("seconds a step", "step_seconds", format_seconds),
        ("training time", "train_seconds", format_seconds),
        ("evaluation", "evaluation_seconds", format_seconds),
    ):
        guess, real = predicted.get(key), measured.get(key)
        if guess is None or real is None:
            continue
        rows.append([label, form(guess), form(real), format_percent(guess / real - 1)])
    return table("Predicted and measured", ("", ">predicted", ">measured", ">off by"), rows)


# How far below the prediction measured memory is before it is said why.
_SAID_SHARE = 0.03


def said_unmet(record: Mapping[str, Any]) -> str | None:
    """Why measured memory is below the prediction, where the run has not met its longest
    micro-batch together with gradients; None elsewhere."""
    predicted, measured = record["predicted"], record["measured"]
    tokens = measured.get("micro_batch_tokens")
    guess, real = predicted.get("allocated_bytes"), measured.get("allocated_bytes")
    if not tokens or not guess or not real or not 0 < tokens["later"] < tokens["first"]:
        return None
    gap, gradients = guess - real, FLOAT32_BYTES * record["num_trainable_parameters"]
    if gap < _SAID_SHARE * real or gap > 2 * gradients:
        return None
    return (
        f"The longest micro-batch, of {tokens['first']:,} tokens, was the first of its step, when "
        f"there are no gradients; the longest one beside them had {tokens['later']:,}. Memory is "
        "predicted for the longest beside gradients."
    )


def samples_view(samples: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Held-out questions with the answers before and after training."""
    lines: list[RenderableType] = []
    for sample in samples:
        if lines:
            lines.append(Text(""))
        for label, key in (
            ("question", "prompt"),
            ("before", "before"),
            ("after", "after"),
            ("reference", "reference"),
        ):
            lines.append(Text.assemble((f"{label}: ", "dim"), _clipped(sample[key] or "")))
    if not lines:
        return Text("")
    title = "A held-out question" if len(samples) == 1 else "Held-out questions"
    return Panel(Group(*lines), title=title, title_align="left", border_style="dim")


def _clipped(text: str, limit: int = 240) -> str:
    """Printable, of bounded length: a model's output may hold anything."""
    clean = "".join(c if c.isprintable() or c == "\n" else "�" for c in text).strip()
    return clean if len(clean) <= limit else clean[:limit].rstrip() + " ..."
