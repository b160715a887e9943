"""`ftplan methods`: the ways to fine-tune, and `ftplan methods NAME`: one of them."""

from __future__ import annotations

import argparse
from typing import Any

from rich.text import Text

from ftplan.launcher.compared import ComparedMethod, compared
from ftplan.launcher.model_source import find_source
from ftplan.launcher.own_stack import installed_stack
from ftplan.launcher.ui import Ui, facts, table
from ftplan.planner.combinations import check_together
from ftplan.planner.errors import InputError
from ftplan.planner.method_guide import FAMILIES, GUIDE
from ftplan.planner.methods import METHODS, Method, resolve_method
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.objectives import OBJECTIVES
from ftplan.planner.plan import QUANTIZATIONS, TrainingPlan, flag_name
from ftplan.planner.prequantized import PREQUANTIZED
from ftplan.planner.recipe import estimate_recipe
from ftplan.planner.units import format_bytes, format_count

_DEFAULT_MODEL = "llama-3.1-8b"

# What one method is compared with.
_BESIDE = ("lora", "full")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("method", nargs="?", metavar="METHOD", help="explain this one")
    parser.add_argument(
        "--model",
        default=_DEFAULT_MODEL,
        metavar="MODEL",
        help=f"the model that figures are of: a size, a name, a folder (default: {_DEFAULT_MODEL})",
    )


def run(arguments: argparse.Namespace, ui: Ui) -> int:
    method = resolve_method(arguments.method) if arguments.method else None
    model = find_source(arguments.model).spec
    if method is None:
        _list(ui, model)
    else:
        _explain(ui, method, model)
    return 0


def _list(ui: Ui, model: ModelSpec) -> None:
    figures = {name: _figures(method, model) for name, method in METHODS.items()}
    ui.json(
        {
            "schema": 1,
            "model": model.name,
            "num_parameters": model.num_parameters,
            "families": {
                name: {"title": family.title, "when": family.when}
                for name, family in FAMILIES.items()
            },
            "methods": [_to_dict(METHODS[name], model, row) for name, row in figures.items()],
        }
    )
    columns = ("method", ">share", ">needs", "what is trained")
    for family in FAMILIES:
        names = [name for name, guide in GUIDE.items() if guide.family == family]
        rows = [_line(METHODS[name], model, figures[name]) for name in names]
        title = Text.assemble((FAMILIES[family].title, "bold"), f": {FAMILIES[family].when}.")
        ui.show(title, table("", columns, rows), "")
    ui.show(
        f"Share: trained parameters among those of {model.name}. Needs: memory required on a GPU "
        f"with {_configuration(model)}, by the defaults of each method.",
        "",
        "`ftplan methods NAME` says when to take one; `--model MODEL` gives figures of another "
        "model.",
    )


def _line(method: Method, model: ModelSpec, row: ComparedMethod | InputError) -> list[str]:
    if isinstance(row, InputError):
        return [method.name, "-", "-", method.trains]
    return [
        method.name,
        _share(row, model),
        format_bytes(row.memory.required_bytes),
        method.trains,
    ]


def _explain(ui: Ui, method: Method, model: ModelSpec) -> None:
    row, guide = _figures(method, model), GUIDE[method.name]
    bases, objectives = _bases(method, model), _objectives(method, model)
    ui.json(
        {
            "schema": 1,
            "model": model.name,
            "num_parameters": model.num_parameters,
            **_to_dict(method, model, row),
            "quantizations": bases,
            "objectives": objectives,
            "peft_options": dict(method.peft_options),
        }
    )
    if ui.as_json:
        return
    said = [
        ("trains", method.trains),
        ("family", f"{FAMILIES[guide.family].title}: {FAMILIES[guide.family].when}"),
        ("take it when", guide.when),
        ("but", guide.but),
        ("source", _linked(method.source)),
        ("settings", ", ".join(_settings(method))),
        ("PEFT", _peft_line(method)),
        ("base in", ", ".join(_dtype(base) for base in bases)),
        ("objectives", ", ".join(objectives)),
        ("plan", f"ftplan plan DATA --method {method.name}"),
    ]
    ui.show(
        Text.assemble((method.title, "bold"), f", `--method {method.name}`"),
        "",
        facts([(label, text) for label, text in said if text]),
        "",
    )
    _compare(ui, method, model, row)


def _compare(ui: Ui, method: Method, model: ModelSpec, row: ComparedMethod | InputError) -> None:
    if isinstance(row, InputError):
        ui.show(f"No figures for {model.name}: {row.message}.", *([row.hint] if row.hint else []))
        return
    from ftplan.launcher import views

    others = [_figures(METHODS[name], model) for name in _BESIDE if name != method.name]
    beside = [other for other in others if isinstance(other, ComparedMethod)]
    ui.show(
        f"On {model.name}, {format_count(model.num_parameters)} parameters, with "
        f"{_configuration(model)}; it trains {_share(row, model)} of them.",
        "",
        views.compare_table([row, *beside], None),
    )


def _figures(method: Method, model: ModelSpec) -> ComparedMethod | InputError:
    """What it takes; why that is not known where it does not go with the model."""
    try:
        return compared(method, model, None, {}, installed_stack(None), exactly=False)
    except InputError as error:
        return error


def _to_dict(method: Method, model: ModelSpec, row: ComparedMethod | InputError) -> dict[str, Any]:
    guide = GUIDE[method.name]
    known = {
        "name": method.name,
        "title": method.title,
        "family": guide.family,
        "trains": method.trains,
        "when": guide.when,
        "but": guide.but or None,
        "source": method.source,
    }
    if isinstance(row, InputError):
        return {
            **known,
            "num_trainable_parameters": None,
            "share": None,
            "per_gpu": None,
            "refused": row.message,
        }
    return {
        **known,
        "num_trainable_parameters": row.num_trainable_parameters,
        "share": row.num_trainable_parameters / model.num_parameters,
        "per_gpu": row.memory.to_dict(),
        "refused": None,
    }


def _share(row: ComparedMethod, model: ModelSpec) -> str:
    share = 100 * row.num_trainable_parameters / model.num_parameters
    return f"{share:.2g} %" if share < 99.5 else "all"


def _configuration(model: ModelSpec) -> str:
    plan = estimate_recipe(model, None, {}).plan
    checkpointing = "" if plan.gradient_checkpointing else "no "
    return (
        f"{plan.per_device_train_batch_size}x{plan.max_length} tokens and "
        f"{checkpointing}gradient checkpointing"
    )


def _bases(method: Method, model: ModelSpec) -> list[str]:
    """How a frozen base may be held beside the method."""
    return [
        quantization
        for quantization in QUANTIZATIONS
        if quantization not in PREQUANTIZED and _goes(method, model, quantization=quantization)
    ]


def _objectives(method: Method, model: ModelSpec) -> list[str]:
    return [name for name in OBJECTIVES if _goes(method, model, objective=name)]


def _goes(method: Method, model: ModelSpec, **given: Any) -> bool:
    try:
        check_together(model, estimate_recipe(model, None, {"method": method.name, **given}).plan)
    except InputError:
        return False
    return True


def _dtype(quantization: str) -> str:
    return "16 or 32 bits" if quantization == "none" else quantization


def _settings(method: Method) -> list[str]:
    """Flags of the plan that change what is trained, with their defaults."""
    defaults = TrainingPlan()
    names = [name for name in dict.fromkeys(method.takes.values()) if hasattr(defaults, name)]
    if method.name == "bottleneck":
        names = ["lora_rank"]
    if method.name == "freeze":
        names = ["num_trainable_layers", "trainable_modules"]
    return [_flag(name, getattr(defaults, name)) for name in names]


def _flag(name: str, value: Any) -> str:
    shown = " ".join(value) if isinstance(value, tuple) else str(value)
    return f"{flag_name(name)} {shown}".strip()


def _peft_line(method: Method) -> str:
    if method.peft_type is None:
        return ""
    options = [f"{name}={value}" for name, value in method.peft_options.items()]
    fixed = f" with {', '.join(options)}" if options else ""
    return f"{method.peft_type}{fixed}; other options by --peft-config name=value"


def _linked(source: str) -> str:
    return source.replace("arXiv ", "https://arxiv.org/abs/")
