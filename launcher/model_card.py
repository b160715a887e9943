"""A model card: the README.md of what a run made, as the Hub reads it.

Nothing of the machine's folders and nothing of the person's rows stands in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ftplan.launcher.run_dir import RunDir, read_mapping, write_text
from ftplan.planner.methods import resolve_method
from ftplan.planner.objectives import OBJECTIVES
from ftplan.planner.trained import ALL_LINEAR
from ftplan.planner.units import format_bytes, format_count, format_percent, format_seconds

CARD = "README.md"

# Settings that say how it was trained; those that a method or objective does not have are left out.
_SHOWN_SETTINGS = (
    *("quantization", "dtype", "mixed_precision", "lora_rank", "lora_alpha", "lora_dropout"),
    *("target_modules", "modules_to_save", "peft_config", "num_trainable_layers", "optim"),
    *("learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_gpus", "max_length"),
    *("packing", "loss", "beta", "num_train_epochs", "max_steps", "seed"),
)

_NOTHING: tuple[Any, ...] = (None, "", [], (), "none", "no", False)  # 0 too

_OF_ADAPTERS = ("lora_rank", "lora_alpha", "lora_dropout", "target_modules")

# Labels of record.json's figures.
_RESOURCES = (
    ("memory, allocated", "allocated_bytes", format_bytes),
    ("memory, device", "device_bytes", format_bytes),
    ("a step", "step_seconds", format_seconds),
    ("training", "train_seconds", format_seconds),
)
_MEASURES = (
    ("perplexity", "perplexity"),
    ("chosen over rejected, share", "accuracy"),
    ("reward", "reward"),
    ("exact match, share", "exact_match"),
    ("F1 of words", "f1"),
    ("exact match of always the same label, share", "majority_share"),
    ("F1 of labels, mean", "macro_f1"),
)


def write_card(
    run: RunDir, record: Mapping[str, Any], folder: Path, merged: Mapping[str, Any] | None = None
) -> None:
    """README.md in the folder of an adapter or a model. `merged`: what `ftplan merge` did."""
    plan = run.read_plan()
    environment = read_mapping(run.environment) if run.environment.is_file() else {}
    write_text(folder / CARD, card(record, plan, environment, merged))


def card(
    record: Mapping[str, Any],
    plan: Mapping[str, Any],
    environment: Mapping[str, Any],
    merged: Mapping[str, Any] | None = None,
) -> str:
    """The card's text, front matter first."""
    settings = {name: chosen["value"] for name, chosen in plan["plan"].items()}
    parts = [
        _front_matter(record, settings, merged),
        f"# {record['name']}",
        _opening(record, settings, merged),
        "## Use",
        _use(record, settings, merged),
        "## How good it is",
        _measures(record),
        *_forgetting(record),
        "## How it was trained",
        _settings_table(record, settings),
        _data(record),
        "## Resources",
        _resources(record),
        "## Versions",
        _versions(plan, environment),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(
    record: Mapping[str, Any], settings: Mapping[str, Any], merged: Mapping[str, Any] | None
) -> str:
    from huggingface_hub import ModelCardData  # 0.3 s

    adapter = _is_adapter(record, merged)
    scores = OBJECTIVES[settings["objective"]].scores
    data = ModelCardData(
        base_model=record["model"].get("hub_id"),
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-classification" if scores else "text-generation",
        tags=[record["method"], settings["objective"], "trl", "ftplan"],
    )
    return f"---\n{data.to_yaml()}\n---"


def _is_adapter(record: Mapping[str, Any], merged: Mapping[str, Any] | None) -> bool:
    return record["output"] == "adapter" and merged is None


def _opening(
    record: Mapping[str, Any], settings: Mapping[str, Any], merged: Mapping[str, Any] | None
) -> str:
    method, objective = resolve_method(record["method"]), OBJECTIVES[settings["objective"]]
    model = record["model"]
    base = model.get("hub_id") or model["name"]
    what = "An adapter for" if _is_adapter(record, merged) else "A model tuned from"
    trained = format_count(record["num_trainable_parameters"])
    text = (
        f"{what} `{base}` ({format_count(model['num_parameters'])} parameters), made by "
        f"{objective.title} with {method.title}: {method.trains} ({method.source}). "
        f"{trained} parameters were trained in {record['steps']} steps. "
    )
    if merged is not None:
        text += f"The adapter is merged into the base's weights, in {merged['dtype']}"
        if merged["check"]:
            text += f"; logits differ from unmerged ones by {merged['check']['difference']:.2%}"
        text += ". "
    return text + "The base model's licence applies."


def _use(
    record: Mapping[str, Any], settings: Mapping[str, Any], merged: Mapping[str, Any] | None
) -> str:
    adapter = _is_adapter(record, merged)
    kind = "SequenceClassification" if OBJECTIVES[settings["objective"]].scores else "CausalLM"
    loader = f"AutoPeftModelFor{kind}" if adapter else f"AutoModelFor{kind}"
    package = "peft" if adapter else "transformers"
    lines = [
        "```python",
        f"from {package} import {loader}",
        "from transformers import AutoTokenizer",
        "",
        f'model = {loader}.from_pretrained("FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        "```",
    ]
    return "\n".join(lines)


def _measures(record: Mapping[str, Any]) -> str:
    evaluation = record["evaluation"]
    rows = []
    if evaluation["before"] is not None and evaluation["after"] is not None:
        rows.append(_side_by_side("loss", evaluation))
    rows += [
        _side_by_side(label, values) for label, key in _MEASURES if (values := evaluation.get(key))
    ]
    said = f"On {evaluation['num_rows']} held-out rows"
    if evaluation.get("num_scored"):
        said += f"; greedy answers to {evaluation['num_scored']} of them"
    return f"{said}:\n\n" + _table(("", "before", "after"), rows)


def _side_by_side(label: str, values: Mapping[str, float]) -> tuple[str, ...]:
    return label, f"{values['before']:.4g}", f"{values['after']:.4g}"


def _forgetting(record: Mapping[str, Any]) -> list[str]:
    forgetting = record.get("forgetting")
    if not forgetting:
        return []
    change = format_percent(forgetting["after"] / forgetting["before"] - 1)
    text = (
        f"Perplexity of general text ({forgetting['num_tokens']:,} tokens): "
        f"{forgetting['before']:.2f} before, {forgetting['after']:.2f} after ({change})."
    )
    if forgetting["forgotten"]:
        text += " More than a tenth: the model has forgotten some of what it knew."
    return [text]


def _settings_table(record: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    method, objective = resolve_method(record["method"]), OBJECTIVES[settings["objective"]]
    without = {*(() if method.has_rank else _OF_ADAPTERS)}
    without |= set() if method.name == "freeze" else {"num_trainable_layers"}
    without |= set() if objective.generates else {"beta"}
    rows = [("method", record["method"]), ("objective", settings["objective"])]
    rows += [
        (name, _said(settings[name]))
        for name in _SHOWN_SETTINGS
        if name not in without and settings.get(name) not in _NOTHING
    ]
    return _table(("setting", "value"), rows)


def _said(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)).replace(ALL_LINEAR, "all linear layers")
    return f"{value:g}" if isinstance(value, float) else str(value)


def _data(record: Mapping[str, Any]) -> str:
    trained = record["overlong"]["train"]
    return (
        f"Trained on {trained['num_rows_left']:,} rows, {trained['num_tokens']:,} tokens an epoch. "
        f"SHA-256 of the data: `{record['data_sha256']}`; of the template: "
        f"`{record['template_sha256']}`."
    )


def _resources(record: Mapping[str, Any]) -> str:
    predicted, measured = record["predicted"], record["measured"]
    rows = [
        (label, form(predicted[key]), form(measured[key]))
        for label, key, form in _RESOURCES
        if predicted.get(key) is not None and measured.get(key) is not None
    ]
    table = _table(("", "predicted", "measured"), rows)
    return f"On {record['device']}:\n\n{table}"


def _versions(plan: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    versions = {"ftplan": plan.get("ftplan"), "Python": environment.get("python")}
    versions |= environment.get("packages") or {}
    return ", ".join(f"{name} {number}" for name, number in versions.items() if number)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
