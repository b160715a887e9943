"""What was planned and why, what it was planned for, what happened, and the commands to go on."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ftplan.launcher.report.elements import Child, Html, join, prose, table, tag
from ftplan.launcher.report.facts import RunFacts, mapping, number, said, shown, without_home
from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.stages_dir import is_stages_dir
from ftplan.planner.units import format_bytes, format_count

# The order in which settings are looked for; what else was chosen or given follows.
_FIRST = (
    "method", "quantization", "lora_rank", "dtype", "mixed_precision", "num_gpus", "sharding",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_length",
    "gradient_checkpointing", "optim", "attn_implementation", "loss", "learning_rate",
    "num_train_epochs", "max_steps",
)  # fmt: skip

_MOST_EVENTS = 200
_SETTINGS = ("setting", "value", "from", "why")


def plan_section(facts: RunFacts) -> Html | None:
    settings = mapping(facts.plan.get("plan"))
    if not settings:
        return None
    names = [*(name for name in _FIRST if name in settings)]
    names += [name for name in settings if name not in names]
    rows = [_setting(str(name), mapping(settings[name])) for name in names]
    told = [row for row in rows if row[2] != "default"]
    usual = [row for row in rows if row[2] == "default"]
    return join(
        _opening(facts),
        table("Chosen or given", _SETTINGS, told, class_="settings"),
        tag(
            "details",
            tag("summary", f"{len(usual)} settings by default"),
            table("By default", _SETTINGS, usual, class_="settings"),
        )
        if usual
        else None,
    )


def _opening(facts: RunFacts) -> Html:
    model, device = mapping(facts.plan.get("model")), mapping(facts.plan.get("device"))
    parameters, free = number(model.get("num_parameters")), number(device.get("free_bytes"))
    trained = number(facts.record.get("num_trainable_parameters"))
    trained = trained or number(
        mapping(facts.estimate.get("model")).get("num_trainable_parameters")
    )
    rows = [
        ("model", f"{model.get('name')}: {said(parameters, format_count)} parameters"),
        ("why this model", str(model.get("why") or "-")),
        ("trained", f"{said(trained, format_count)} parameters"),
        ("device", f"{device.get('name')}, {said(free, format_bytes)} free when planned"),
        ("planned", f"{facts.plan.get('planned_at')} by ftplan {facts.plan.get('ftplan')}"),
    ]
    return _facts(row for row in rows if row[1] != "-")


def _facts(rows: Any) -> Html:
    """Labels, and what belongs to each."""
    return tag(
        "dl",
        [tag("div", tag("dt", label), tag("dd", without_home(str(told)))) for label, told in rows],
        class_="facts",
    )


def _setting(name: str, setting: Mapping[str, Any]) -> tuple[Child, Child, Child, Child]:
    why = prose(shown(setting.get("why")))
    return name, _value(setting.get("value")), str(setting.get("from")), why


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == []:
        return "-"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return shown(value)


def data_section(facts: RunFacts) -> Html | None:
    """Rows and their lengths, and what became of those that are too long."""
    profile = facts.profile
    if not profile:
        return None
    lengths = mapping(profile.get("token_lengths"))
    rows = [
        ("data", shown(Path(str(profile.get("path"))).name)),
        ("rows", _counts(profile, "num_rows", "num_train_rows", "num_eval_rows", "num_test_rows")),
        ("tokens", said(profile.get("total_tokens"), format_count)),
        ("trained on", f"{said(profile.get('trained_tokens'), format_count)} tokens"),
        ("tokens a row", ", ".join(_lengths(lengths))),
        ("language", str(profile.get("language") or "-")),
    ]
    problems = profile.get("problems")
    troubles = [
        (str(one.get("kind")), said(one.get("count"), format_count))
        for one in map(mapping, problems if isinstance(problems, list) else [])
    ]
    fates = mapping(facts.record.get("overlong")) or mapping(profile.get("overlong"))
    return join(
        _facts(row for row in rows if row[1] not in ("-", "")),
        table("Problems", ("what", ">rows"), troubles) if troubles else None,
        _too_long(fates),
    )


def _counts(profile: Mapping[str, Any], *names: str) -> str:
    labels = ("in all", "trained on", "held out", "kept for a test")
    counts = [number(profile.get(name)) for name in names]
    return ", ".join(
        f"{count:,.0f} {label}" for count, label in zip(counts, labels, strict=True) if count
    )


def _lengths(lengths: Mapping[str, Any]) -> Iterator[str]:
    for name in ("min", "median", "p95", "max"):
        if (value := number(lengths.get(name))) is not None:
            yield f"{name} {value:,.0f}"


def _too_long(fates: Mapping[str, Any]) -> Html | None:
    sides = [(label, mapping(fates.get(key))) for label, key in _SIDES]
    if not any(number(fate.get("num_too_long")) for _, fate in sides):
        return None
    rows = [
        (label, *(said(fate.get(key), format_count) for key in _FATES.values()))
        for label, fate in sides
    ]
    caption = f"Rows longer than {fates.get('max_length')} tokens: `{fates.get('mode')}`"
    return table(caption, ("", *(f">{name}" for name in _FATES)), rows)


_SIDES = (("trained on", "train"), ("held out", "held_out"))
_FATES = {
    "too long": "num_too_long",
    "split": "num_split",
    "cut": "num_cut",
    "tokens cut off": "num_cut_tokens",
    "dropped": "num_dropped",
    "left": "num_rows_left",
}


def events_section(facts: RunFacts) -> Html | None:
    """What was told of between steps: what ran out of memory, was skipped, merged, ..."""
    rows = [
        (said(row.get("step"), "{:.0f}".format), shown(row["event"]), _details(row))
        for row in facts.events
    ]
    if not rows:
        return None
    left = len(rows) - _MOST_EVENTS
    note = tag("p", f"{left:,} more are in metrics.jsonl", class_="note") if left > 0 else None
    return join(table("By step", (">step", "event", "details"), rows[:_MOST_EVENTS]), note)


def _details(row: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{name.replace('_', ' ')}: {_detail(name, value)}"
        for name, value in row.items()
        if name not in ("event", "step") and value is not None
    )


def _detail(name: str, value: object) -> str:
    known = number(value)
    if known is not None and name.endswith("_bytes"):
        return format_bytes(known)
    if isinstance(value, dict | list):
        return shown(json.dumps(value))
    return _value(value)


def environment_section(facts: RunFacts) -> Html | None:
    environment = facts.environment
    if not environment:
        return None
    packages = mapping(environment.get("packages"))
    rows = [
        ("Python", environment.get("python")),
        ("platform", environment.get("platform")),
        ("GPU", environment.get("gpu")),
        ("threads", environment.get("num_threads")),
        *packages.items(),
    ]
    return _facts((str(label), shown(told)) for label, told in rows if told is not None)


def shown_root(root: Path) -> Path:
    """The run as commands name it, from the folder above `runs`: where that is, a report that is
    passed on need not say."""
    levels = 3 if _is_stage(root) else 2
    return Path(*root.resolve().parts[-levels:])


def _is_stage(root: Path) -> bool:
    return is_stages_dir(root.resolve().parent)


def commands_section(facts: RunFacts) -> Html:
    root = shown_root(facts.run.root)
    of_stage = _is_stage(facts.run.root)
    use = _use(facts, root)
    return join(
        tag("p", "This is one of several stages: they go on together.") if of_stage else None,
        commands(root.parent if of_stage else root, list(_verbs(facts, root, of_stage))),
        (tag("h3", "Use the result"), tag("pre", use, tabindex=0)) if use else None,
    )


def commands(root: Path, verbs: Sequence[tuple[str, str]]) -> Html:
    """What can be done, and the command that does it to a run's folder."""
    name = shlex.quote(str(root))
    rows = [
        tag("div", tag("dt", label), tag("dd", tag("code", f"ftplan {verb} {name}")))
        for label, verb in verbs
    ]
    return join(
        tag("p", "In the folder that holds ", tag("code", f"{root.parent}/"), ":"),
        tag("dl", rows, class_="commands"),
    )


def _verbs(facts: RunFacts, root: Path, of_stage: bool) -> Iterator[tuple[str, str]]:
    state = facts.outcome.state
    if state not in ("finished", "running") and (of_stage or facts.run.last_checkpoint()):
        yield "go on from the last checkpoint", "resume"
    if any("ftplan merge" in line for line in _result_lines(facts, root)) and not of_stage:
        yield "one model of base and adapter", "merge"
    if state != "running":
        yield "start it" if state == "not started" else "repeat it from the beginning", "launch"
    yield "make this report again", "report"


def _use(facts: RunFacts, root: Path) -> str:
    """Python that loads what was trained."""
    lines = _result_lines(facts, root)
    if "use it" not in lines:
        return ""
    return "\n".join(line.removeprefix("    ") for line in lines[lines.index("use it") + 1 :])


def _result_lines(facts: RunFacts, root: Path) -> list[str]:
    from ftplan.launcher.launching import result_lines

    return result_lines(RunDir(root), facts.record) if facts.record else []
