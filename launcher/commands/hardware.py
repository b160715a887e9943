"""`ftplan hardware MODEL`: which GPUs of the catalog train it, how long, and what it costs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import structs
from rich.text import Text

from ftplan.launcher.amounts import parse_seconds, parse_usd
from ftplan.launcher.cluster_flags import add_cluster_flags, checked_machines
from ftplan.launcher.model_source import find_source
from ftplan.launcher.own_stack import installed_stack
from ftplan.launcher.settings_flags import add_setting_flags, given_settings
from ftplan.launcher.ui import Ui, table
from ftplan.planner import policy
from ftplan.planner.combinations import check_together
from ftplan.planner.errors import InputError
from ftplan.planner.hardware_spec import Network
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.recipe import estimate_recipe
from ftplan.planner.renting import Card, Choice, Mark, list_choices, marks
from ftplan.planner.units import (
    SECONDS_PER_HOUR,
    format_bytes,
    format_count,
    format_seconds,
    parse_count,
)
from ftplan.planner.vocabulary import check_named_tokens
from ftplan.profiles import (
    GpuEntry,
    Price,
    find_gpu,
    find_network,
    gpu_catalog,
    lowest_prices,
    usual_network,
)

METHODS = ("full", "lora", "qlora")

# Tokens of a run where neither data nor a number is given.
ASSUMED_TOKENS = 10_000_000

_SHOWN = 20

_COLUMNS = ("GPUs", "method", "sharding", ">needs", ">time", ">USD", ">USD/h", "")

_SECONDS = {"s": 1, "m": 60, "h": SECONDS_PER_HOUR, "d": 24 * SECONDS_PER_HOUR}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a size (7B), a catalog name, a Hub id, or a folder"
    )
    parser.add_argument("--gpu", metavar="NAME", help="this GPU only")
    parser.add_argument("--data", metavar="FILE", type=Path, help="its tokens, by characters")
    parser.add_argument(
        "--tokens",
        metavar="N",
        help=f"tokens to train on, such as 20M (default: {ASSUMED_TOKENS:,})",
    )
    parser.add_argument("--within", metavar="TIME", help="no longer than this, such as 6h or 90m")
    parser.add_argument("--under", metavar="MONEY", help="no dearer than this, such as 50usd")
    parser.add_argument("--spot", action="store_true", help="prices of spot instances too")
    parser.add_argument(
        "--all", action="store_true", help="every choice, those without a price too"
    )
    add_cluster_flags(parser, has_file=False)
    add_setting_flags(parser)


def run(arguments: argparse.Namespace, ui: Ui) -> int:
    """Exit status 1 when nothing fits what was asked for."""
    given = given_settings(arguments)
    check_named_tokens(given)
    model = find_source(arguments.model).with_new_tokens(given).spec
    tokens, of_tokens, given = _tokens(arguments, model, given)
    within = parse_seconds("--within", arguments.within) if arguments.within else None
    under = parse_usd("--under", arguments.under) if arguments.under else None
    methods = (given.pop("method"),) if "method" in given else METHODS
    machines = checked_machines(arguments, given)
    for method in methods:  # what no card could run is told at once
        check_together(model, estimate_recipe(model, None, {**given, "method": method}).plan)
    networks = _networks(given, arguments.interconnect) if machines > 1 else None
    cards = [_card(entry, networks, spot=arguments.spot) for entry in _entries(arguments.gpu)]
    found = list_choices(model, cards, methods, tokens, given, installed_stack)
    found = [c for c in found if _is_wanted(c, within, under)]
    found.sort(key=_order)
    marked = marks(found)
    ui.json(_to_dict(model, tokens, of_tokens, found, marked))
    if not ui.as_json:
        _show(ui, model, tokens, of_tokens, found, marked, show_all=arguments.all or arguments.gpu)
    return 0 if any(choice.fits for choice in found) else 1


def _tokens(
    arguments: argparse.Namespace, model: ModelSpec, given: dict[str, Any]
) -> tuple[float, str, dict[str, Any]]:
    """How many tokens are trained on, where the number is from, and settings that data decides."""
    if arguments.data and arguments.tokens:
        raise InputError("`--data` and `--tokens` both say how much is trained on", "give one")
    epochs = given.get("num_train_epochs", 1.0)
    if arguments.data:
        from ftplan.launcher.data.data_file import read_data
        from ftplan.launcher.data.split import Split

        lengths = read_data([arguments.data], checks=False).lengths(Split())
        longest = policy.max_length(max(lengths), model.max_position_embeddings).value
        length = given.setdefault("max_length", longest)
        total = epochs * sum(min(tokens, length) for tokens in lengths)
        return total, f"of {arguments.data.name}, counted by characters", given
    if arguments.tokens is None:
        return (
            epochs * ASSUMED_TOKENS,
            "assumed; `--data FILE` or `--tokens N` says how many",
            given,
        )
    number = parse_count(arguments.tokens) or _plain_number(arguments.tokens)
    return epochs * number, "asked for", given


def _plain_number(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise InputError(f"`--tokens {text}` is no number of tokens", "write 20M or 20000000")
    return int(text)


def _entries(gpu: str | None) -> Sequence[GpuEntry]:
    return [find_gpu(gpu)] if gpu else list(gpu_catalog().values())


def _networks(given: Mapping[str, Any], interconnect: str | None) -> Callable[[GpuEntry], Network]:
    """What joins machines of a GPU: the one that is asked for, else what is usual with it."""
    per_machine = given["num_gpus"] // given["num_machines"]
    if interconnect:
        find_network(interconnect, 1)  # a name that is not known is told at once
    return lambda entry: find_network(interconnect or usual_network(entry), per_machine)


def _card(entry: GpuEntry, networks: Callable[[GpuEntry], Network] | None, *, spot: bool) -> Card:
    """With the lowest price that is known of it."""
    billings = ("on-demand", "spot") if spot else ("on-demand",)
    offered = [p for billing, p in lowest_prices(entry.name).items() if billing in billings]
    best: Price | None = min(offered, key=lambda p: p.usd_per_gpu_hour, default=None)
    return Card(
        device=structs.replace(entry.device(), network=networks(entry) if networks else None),
        usd_per_hour=best.usd_per_gpu_hour if best else None,
        where=f"{best.provider}, {best.billing}, {best.date}" if best else None,
    )


def _is_wanted(choice: Choice, within: float | None, under: float | None) -> bool:
    if within is not None and (choice.seconds is None or choice.seconds > within):
        return False
    return under is None or (choice.usd is not None and choice.usd <= under)


def _order(choice: Choice) -> tuple[bool, float, float, str, int]:
    """What fits first, by price; then what lacks least."""
    price = float("inf") if choice.usd is None else choice.usd
    last = choice.missing_bytes if choice.seconds is None else choice.seconds
    return (not choice.fits, price, last, choice.card.device.name, choice.num_gpus)


def _to_dict(
    model: ModelSpec,
    tokens: float,
    of_tokens: str,
    found: Sequence[Choice],
    marked: Mapping[int, Sequence[Mark]],
) -> dict[str, Any]:
    return {
        "schema": 1,
        "model": {"name": model.name, "num_parameters": model.num_parameters},
        "tokens": {"value": tokens, "why": of_tokens},
        "choices": [
            {
                "gpu": choice.card.device.name,
                "num_gpus": choice.num_gpus,
                "method": choice.method,
                "fits": choice.fits,
                "required_bytes": choice.required_bytes,
                "missing_bytes": choice.missing_bytes,
                "sharding": choice.plan.sharding if choice.plan else None,
                "dp_replicate_size": choice.plan.dp_replicate_size if choice.plan else None,
                "per_device_train_batch_size": (
                    choice.plan.per_device_train_batch_size if choice.plan else None
                ),
                "seconds": choice.seconds,
                "usd": choice.usd,
                "usd_per_gpu_hour": choice.card.usd_per_hour,
                "price_from": choice.card.where,
                "bound_by": choice.step.bound_by if choice.step else None,
                "marks": list(marked.get(number, ())),
            }
            for number, choice in enumerate(found)
        ],
    }


def _show(
    ui: Ui,
    model: ModelSpec,
    tokens: float,
    of_tokens: str,
    found: Sequence[Choice],
    marked: Mapping[int, Sequence[Mark]],
    *,
    show_all: bool,
) -> None:
    ui.show(
        f"{model.name}: {format_count(model.num_parameters)} parameters, "
        f"{format_count(tokens)} tokens ({of_tokens})",
        "",
    )
    fitting = [n for n, choice in enumerate(found) if choice.fits]
    shown = fitting if show_all else _worth_showing(found, fitting, marked)
    if shown:
        rows = [_row(found[n], marked.get(n, ())) for n in shown]
        ui.show(table("What fits, cheapest first", _COLUMNS, rows))
    if len(fitting) > len(shown):
        ui.show("", f"{len(fitting) - len(shown)} more fit; `--all` lists them.")
    misses = [choice for choice in found if not choice.fits]
    if misses and (show_all or not fitting):
        rows = [_missing(choice) for choice in misses[:_SHOWN]]
        ui.show("", table("What does not", ("GPUs", "method", ">lacks", ""), rows))
    if not found:
        ui.say("nothing is within that time and money: allow more, or name another method")
        return
    ui.show(
        "",
        "needs: of each GPU. USD/h: of one, the lowest price known (`--json` says whose). USD: for",
        "the hours of training alone. Pareto: nothing else is both cheaper and faster.",
    )


def _worth_showing(
    found: Sequence[Choice], fitting: Sequence[int], marked: Mapping[int, Sequence[Mark]]
) -> list[int]:
    """The marked ones, and of the others the cheapest number of each card for each method."""
    shown = [number for number in fitting if number in marked]
    seen = {(found[n].card.device.name, found[n].method) for n in shown}
    for number in fitting:
        kind = (found[number].card.device.name, found[number].method)
        if len(shown) < _SHOWN and kind not in seen:
            seen.add(kind)
            shown.append(number)
    return sorted(shown)


def _row(choice: Choice, marked: Sequence[Mark]) -> list[str | Text]:
    plan = choice.plan
    assert plan is not None and choice.seconds is not None
    return [
        _cards(choice),
        choice.method,
        _sharding(plan),
        format_bytes(choice.required_bytes),
        format_seconds(choice.seconds),
        "" if choice.usd is None else f"{choice.usd:.2f}",
        "" if choice.card.usd_per_hour is None else f"{choice.card.usd_per_hour:.2f}",
        Text(", ".join(marked), style="green"),
    ]


def _sharding(plan: TrainingPlan) -> str:
    copies = f" x {plan.dp_replicate_size}" if plan.dp_replicate_size > 1 else ""
    return "" if plan.sharding == "none" else f"{plan.sharding}{copies}"


def _missing(choice: Choice) -> list[str | Text]:
    lacks = format_bytes(choice.missing_bytes)
    return [_cards(choice), choice.method, lacks, ""]


def _cards(choice: Choice) -> str:
    return f"{choice.num_gpus} x {choice.card.device.name}"
