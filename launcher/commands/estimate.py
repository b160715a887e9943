"""`ftplan estimate MODEL`: the memory table of one configuration, at once."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import structs

from ftplan.launcher.cluster_flags import (
    add_cluster_flags,
    asked_cluster,
    cluster_to_dict,
    on_cluster,
)
from ftplan.launcher.compared import METHOD_BOUND, ComparedMethod, compared
from ftplan.launcher.estimate_json import estimate_to_dict, full_step, parameter_counts
from ftplan.launcher.host import read_host
from ftplan.launcher.model_source import find_source
from ftplan.launcher.own_stack import installed_stack
from ftplan.launcher.reward_source import reward_source, rewarded_settings, with_judge
from ftplan.launcher.settings_flags import add_setting_flags, given_settings
from ftplan.launcher.token_settings import said_tokens
from ftplan.launcher.ui import Ui
from ftplan.planner.combination import Caution
from ftplan.planner.combinations import cautions, check_together
from ftplan.planner.errors import InputError
from ftplan.planner.explain import Term, explain
from ftplan.planner.explain_host import explain_host
from ftplan.planner.hardware_spec import Device
from ftplan.planner.host_verdict import lacking_disk, lacking_ram
from ftplan.planner.memory import MemoryEstimate, fits
from ftplan.planner.methods import COMPARED_METHODS, resolve_method
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import ReasonedPlan, TrainingPlan
from ftplan.planner.recipe import estimate_recipe
from ftplan.planner.replayed import replayed_memory
from ftplan.planner.units import format_count, parse_bytes
from ftplan.planner.vocabulary import check_named_tokens

if TYPE_CHECKING:
    from ftplan.planner.cluster import Cluster
    from ftplan.planner.dry_run_summary import DryRunSummary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a size (7B), a catalog name, a Hub id, or a folder"
    )
    parser.add_argument("--gpu", metavar="NAME", help="say whether it fits on this GPU")
    parser.add_argument(
        "--free-memory", metavar="SIZE", help="memory free on it (default: all), such as 22GiB"
    )
    add_cluster_flags(parser)
    parser.add_argument(
        "--exact", action="store_true", help="by a dry run of the real training step: seconds"
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="the formula of each component, with its numbers put in",
    )
    parser.add_argument(
        "--compare",
        metavar="METHODS",
        help="put these methods side by side, such as full,lora,qlora",
    )
    parser.add_argument(
        "--plot", metavar="FILE", type=Path, help="with --exact: the memory curve as PNG"
    )
    add_setting_flags(parser)


def run(arguments: argparse.Namespace, ui: Ui) -> int:
    """Exit status 1 when a GPU was named and the configuration does not fit it."""
    given = given_settings(arguments)
    named = named_device(arguments.gpu, arguments.free_memory)
    cluster = asked_cluster(arguments, ui, given, named)
    device = on_cluster(named, cluster)
    if arguments.plot and not arguments.exact:
        raise InputError("`--plot` draws a dry run", "add `--exact`")
    if arguments.exact and (arguments.explain or arguments.compare):
        raise InputError(
            "`--explain` and `--compare` are of the closed form", "leave out `--exact`"
        )
    check_named_tokens(given)
    given = rewarded_settings(given)
    source = find_source(arguments.model, any_architecture=arguments.exact).with_new_tokens(given)
    source = with_judge(source, reward_source(given))
    model = source.spec
    reasoned = estimate_recipe(model, device, given)
    check_together(model, reasoned.plan)
    warnings = cautions(model, reasoned.plan, device)
    dry_run, stack = None, installed_stack(device)
    if not arguments.exact:
        memory = replayed_memory(model, reasoned.plan, device=device, stack=stack)
    else:
        from ftplan.launcher.exact import case_of, memory_of, shown_dry_runs

        with shown_dry_runs(ui) as runner:
            dry_run = runner.run(case_of(source, reasoned.plan, device))
        memory = memory_of(dry_run, source, reasoned.plan, device)
    if device is not None and cluster is None:
        warnings += _host_cautions(memory, reasoned.plan, device)
    terms = explain(model, reasoned.plan, device, stack) if arguments.explain else None
    compared = _compared(arguments.compare, model, device, given) if arguments.compare else None
    ui.json(
        {
            **estimate_to_dict(model, reasoned, memory, device, warnings, dry_run=dry_run),
            **(_explained(terms, memory, reasoned.plan) if terms else {}),
            **({"cluster": cluster_to_dict(cluster, memory)} if cluster else {}),
            **({"compare": [row.to_dict() for row in compared]} if compared else {}),
        }
    )
    if not ui.as_json and compared:
        from ftplan.launcher import views

        plan = reasoned.plan
        ui.show(
            f"{_model_line(model, model.num_parameters)}; {_tokens(plan)}, "
            f"{_checkpointing(plan)}{_gpus(plan)}",
            "",
            views.compare_table(compared, device),
            "",
            views.COMPARE_NOTE,
        )
    elif not ui.as_json:
        _show(ui, model, reasoned, memory, device, given, dry_run, terms, cluster)
        for warning in warnings:
            ui.warn(str(warning))
    if dry_run and arguments.plot:
        _plot(ui, dry_run, arguments.plot, f"{model.name}, {reasoned.plan.method}")
    return 0 if device is None or fits(memory, device) else 1


def _host_cautions(memory: MemoryEstimate, plan: TrainingPlan, device: Device) -> list[Caution]:
    """Where this machine's RAM or disk does not do; the run may be meant for another one."""
    host = read_host(Path("runs"))
    lacks = (lacking_ram(memory, host, device), lacking_disk(memory, host, plan))
    return [Caution(name="host", text=lack) for lack in lacks if lack is not None]


def _explained(terms: Sequence[Term], memory: MemoryEstimate, plan: TrainingPlan) -> dict[str, Any]:
    """What `--explain` adds to the JSON."""
    return {
        "explain": [term.to_dict() for term in terms],
        "explain_host": explain_host(memory, plan),
        "host": memory.host.to_dict(),
        "disk": memory.disk.to_dict(),
    }


def _plot(ui: Ui, dry_run: DryRunSummary, path: Path, title: str) -> None:
    from ftplan.launcher import dry_run_views

    try:
        dry_run_views.plot(dry_run, path, title)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot write `{path}`: {error}", "name a file that ends in .png, in a folder there is"
        ) from error
    ui.say(f"memory curve: {path}")


def named_device(gpu: str | None, free_memory: str | None) -> Device | None:
    """A catalogued GPU, with less free memory if said so; None when none is named."""
    if gpu is None:
        if free_memory is not None:
            raise InputError("`--free-memory` needs `--gpu`", "name the card, such as `--gpu l4`")
        return None
    from ftplan.profiles import find_gpu

    device = find_gpu(gpu).device()
    if free_memory is None:
        return device
    return structs.replace(device, free_bytes=parse_bytes(free_memory))


def _show(
    ui: Ui,
    model: ModelSpec,
    reasoned: ReasonedPlan,
    memory: MemoryEstimate,
    device: Device | None,
    given: Mapping[str, Any],
    dry_run: DryRunSummary | None,
    terms: Sequence[Term] | None,
    cluster: Cluster | None,
) -> None:
    from ftplan.launcher import views

    plan = reasoned.plan
    count, trained = parameter_counts(model, plan, dry_run)
    share = 100 * trained / count
    tokens = None if dry_run else said_tokens(model, plan)
    ui.show(
        _model_line(model, count),
        f"{plan.resolved_method.title} fine-tuning trains {format_count(trained)} of them "
        f"({share:.3g} %); {_configuration(reasoned)}",
        *([f"trained tokens: {tokens}"] if tokens else []),
        "",
        views.memory_table(memory, device),
        "",
    )
    if cluster is not None:
        from ftplan.launcher.cluster_views import cluster_table

        ui.show(cluster_table(cluster, memory), "")
    step = full_step(model, plan, device)
    if step is not None and device is not None:
        ui.show(views.step_table(plan, step, device), "")
    if dry_run:
        from ftplan.launcher import dry_run_views

        ui.show(*dry_run_views.tables(dry_run))
        return
    if plan.resolved_objective.generates:
        ui.show(views.phases_table(memory.phases), "")
    if terms is not None:
        ui.show(views.explain_table(terms), "", views.host_table(explain_host(memory, plan)))
        return
    if plan.method == "full":
        ui.show(views.rule_table(model.num_parameters, memory), "", views.RULE_NOTE, "")
    names = [name for name in COMPARED_METHODS if name != plan.method]
    others = [row for name in names for row in _other_method(model, name, device, given)]
    if others:
        ui.show(views.methods_table(others))


def _model_line(model: ModelSpec, num_parameters: int) -> str:
    what = f" ({model.approximate})" if model.approximate else f", {model.architecture}"
    return f"{model.name}: {format_count(num_parameters)} parameters{what}"


def _compared(
    methods: str, model: ModelSpec, device: Device | None, given: Mapping[str, Any]
) -> list[ComparedMethod]:
    """Each method of a comma-separated list, all other given settings kept."""
    kept = {key: value for key, value in given.items() if key not in METHOD_BOUND}
    names = dict.fromkeys(part.strip() for part in methods.split(",") if part.strip())
    if not names:
        raise InputError("`--compare` names no method", "for example `--compare full,lora,qlora`")
    stack = installed_stack(device)
    return [compared(resolve_method(name), model, device, kept, stack) for name in names]


def _configuration(reasoned: ReasonedPlan) -> str:
    """The settings that memory depends on, in one line."""
    plan = reasoned.plan
    autocast = f", {plan.mixed_precision} autocast" if plan.autocast else ""
    base = plan.dtype if plan.quantization == "none" else f"{plan.quantization} base"
    objective = plan.resolved_objective
    what = "" if objective.name == "sft" else f"{objective.title}, "
    return (
        f"{what}{base}{autocast}, {_tokens(plan)}, "
        f"{plan.optim}, {_checkpointing(plan)}, {plan.loss} loss{_gpus(plan)}"
    )


def _tokens(plan: TrainingPlan) -> str:
    """Rows and places of a micro-batch."""
    each_row = plan.resolved_objective.each_row
    each = f" each for {each_row}" if each_row else ""
    packed = " packed" if plan.packing else ""
    rows = f"{plan.per_device_train_batch_size}x{plan.max_length} tokens{each}{packed}"
    if not plan.resolved_objective.generates:
        return rows
    generated = f"{plan.max_completion_length} of them generated"
    return f"{rows}, {generated}, {plan.generated_rows} rows at once"


def _checkpointing(plan: TrainingPlan) -> str:
    some = f" of one layer in {plan.every_n_layers}" if plan.every_n_layers > 1 else ""
    return f"{'' if plan.gradient_checkpointing else 'no '}gradient checkpointing{some}"


def _gpus(plan: TrainingPlan) -> str:
    """Among how many GPUs the work is divided, and how."""
    if plan.num_gpus == 1 and plan.sharding == "none":
        return ""
    how = "DDP" if plan.sharding == "none" else plan.sharding
    if plan.tp_size > 1:
        how = "tensor parallel"
    if plan.cp_size > 1:
        how += f", {plan.cp_size} to a row"
    if plan.dp_replicate_size > 1:
        how += f" of {plan.dp_replicate_size} copies"
    offloaded = f", {plan.offload} on the host" if plan.offload != "none" else ""
    return f"; one of {plan.num_gpus} GPUs, {how}{offloaded}"


def _other_method(
    model: ModelSpec, name: str, device: Device | None, given: Mapping[str, Any]
) -> list[tuple[str, int, int, str]]:
    """(method, trained parameters, required bytes, cards it fits on) of the model by another
    method; nothing where the given settings are not for it."""
    kept = {key: value for key, value in given.items() if key not in METHOD_BOUND}
    stack = installed_stack(device)
    try:
        row = compared(resolve_method(name), model, device, kept, stack, exactly=False)
    except InputError:
        return []
    return [(name, row.num_trainable_parameters, row.memory.required_bytes, row.card)]
