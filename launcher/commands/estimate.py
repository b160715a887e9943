"""`ftplan estimate MODEL`: the memory table of one configuration, at once."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftplan.launcher.estimate_json import estimate_to_dict, parameter_counts
from ftplan.launcher.host import read_host
from ftplan.launcher.model_source import find_source
from ftplan.launcher.settings_flags import add_setting_flags, given_settings
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError
from ftplan.planner.explain import Term, explain
from ftplan.planner.explain_host import explain_host
from ftplan.planner.hardware_spec import QUANTIZATION_CAPABILITY, Device
from ftplan.planner.host_verdict import lacking_disk, lacking_ram
from ftplan.planner.memory import MemoryEstimate, estimate_memory, fits, needed_bytes
from ftplan.planner.methods import COMPARED_METHODS, resolve_method
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import ReasonedPlan, TrainingPlan
from ftplan.planner.recipe import estimate_recipe
from ftplan.planner.sharding import ZERO
from ftplan.planner.units import format_bytes, format_count, parse_bytes

if TYPE_CHECKING:
    from ftplan.planner.dry_run_summary import DryRunSummary

# Settings that make sense for one method only; left out when others are compared.
_METHOD_BOUND = ("method", "quantization", "dtype", "mixed_precision")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a size (7B), a catalog name, a Hub id, or a folder"
    )
    parser.add_argument("--gpu", metavar="NAME", help="say whether it fits on this GPU")
    parser.add_argument(
        "--free-memory", metavar="SIZE", help="memory free on it (default: all), such as 22GiB"
    )
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
    device = named_device(arguments.gpu, arguments.free_memory)
    if arguments.plot and not arguments.exact:
        raise InputError("`--plot` draws a dry run", "add `--exact`")
    if arguments.exact and (arguments.explain or arguments.compare):
        raise InputError(
            "`--explain` and `--compare` are of the closed form", "leave out `--exact`"
        )
    source = find_source(arguments.model, any_architecture=arguments.exact)
    model = source.spec
    reasoned = estimate_recipe(model, device, given)
    warnings = plan_warnings(model, reasoned, device)
    dry_run = None
    if not arguments.exact:
        memory = estimate_memory(model, reasoned.plan, device=device)
    else:
        from ftplan.launcher.exact import case_of, memory_of, shown_dry_runs

        with shown_dry_runs(ui) as runner:
            dry_run = runner.run(case_of(source, reasoned.plan, device))
        memory = memory_of(dry_run, source, reasoned.plan, device)
    if device is not None:
        warnings += _host_warnings(memory, reasoned.plan, device)
    terms = explain(model, reasoned.plan, device) if arguments.explain else None
    compared = _compared(arguments.compare, model, device, given) if arguments.compare else None
    ui.json(
        {
            **estimate_to_dict(model, reasoned, memory, device, warnings, dry_run=dry_run),
            **(_explained(terms, memory, reasoned.plan) if terms else {}),
            **({"compare": [row.to_dict() for row in compared]} if compared else {}),
        }
    )
    if not ui.as_json and compared:
        from ftplan.launcher import views

        ui.show(views.compare_table(compared, device))
    elif not ui.as_json:
        _show(ui, model, reasoned, memory, device, given, dry_run, terms)
        for warning in warnings:
            ui.warn(warning)
    if dry_run and arguments.plot:
        _plot(ui, dry_run, arguments.plot, f"{model.name}, {reasoned.plan.method}")
    return 0 if device is None or fits(memory, device) else 1


def _host_warnings(memory: MemoryEstimate, plan: TrainingPlan, device: Device) -> list[str]:
    """Where this machine's RAM or disk does not do; the run may be meant for another one."""
    host = read_host(Path("runs"))
    lacks = (lacking_ram(memory, host, device), lacking_disk(memory, host, plan))
    return [lack for lack in lacks if lack is not None]


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
    return dataclasses.replace(device, free_bytes=parse_bytes(free_memory))


def plan_warnings(model: ModelSpec, reasoned: ReasonedPlan, device: Device | None) -> list[str]:
    """Combinations that are known to disappoint, and numbers that are not what they seem."""
    plan, warnings = reasoned.plan, []
    if plan.max_length > model.max_position_embeddings:
        warnings.append(
            f"{model.name} knows {model.max_position_embeddings} positions, "
            f"`--max-length {plan.max_length}` is beyond them"
        )
    if device is not None:
        warnings += _device_lacks(device, plan)
    fp16 = plan.mixed_precision == "fp16" or plan.dtype == "float16"
    if fp16 and model.native_dtype == "bfloat16":
        warnings.append(
            f"{model.name} was trained in bf16, and fp16 holds nothing above 65,504: activations "
            "may overflow. Should the loss become nan, use `--dtype float32 --mixed-precision no`"
        )
    if plan.quantization != "none" and plan.sharding in ZERO:
        warnings.append(
            f"`--sharding {plan.sharding}` leaves the whole quantized base on each GPU; "
            "`--sharding fsdp` divides it"
        )
    if plan.num_gpus > 1 and plan.sharding == "none":
        warnings.append(
            "the figures are per GPU: under data parallelism more GPUs save time, not memory"
        )
    return warnings


def _device_lacks(device: Device, plan: TrainingPlan) -> list[str]:
    """What the plan uses and the device does not have."""
    lacks = []
    bf16 = plan.mixed_precision == "bf16" or plan.dtype == "bfloat16"
    if bf16 and not device.supports_bfloat16:
        lacks.append(f"{device.name} has no bf16; use `--mixed-precision fp16`")
    flash = plan.attn_implementation == "flash_attention_2"
    if flash and (device.compute_capability or (0, 0)) < (8, 0):
        lacks.append(f"FlashAttention-2 does not run on {device.name}; use sdpa")
    kind = plan.quantization
    if kind != "none" and not device.supports_quantization(kind):
        major, minor = QUANTIZATION_CAPABILITY[kind]
        lacks.append(
            f"{kind} bases need compute capability {major}.{minor}, which {device.name} has not"
        )
    return lacks


def _show(
    ui: Ui,
    model: ModelSpec,
    reasoned: ReasonedPlan,
    memory: MemoryEstimate,
    device: Device | None,
    given: Mapping[str, Any],
    dry_run: DryRunSummary | None,
    terms: Sequence[Term] | None,
) -> None:
    from ftplan.launcher import views

    plan = reasoned.plan
    count, trained = parameter_counts(model, plan, dry_run)
    share = 100 * trained / count
    ui.show(
        f"{model.name}: {format_count(count)} parameters"
        + (f" ({model.approximate})" if model.approximate else f", {model.architecture}"),
        f"{plan.resolved_method.title} fine-tuning trains {format_count(trained)} of them "
        f"({share:.3g} %); {_configuration(reasoned)}",
        "",
        views.memory_table(memory, device),
        "",
    )
    if dry_run:
        from ftplan.launcher import dry_run_views

        ui.show(*dry_run_views.tables(dry_run))
        return
    if terms is not None:
        ui.show(views.explain_table(terms), "", views.host_table(explain_host(memory, plan)))
        return
    if plan.method == "full":
        ui.show(views.rule_table(model.num_parameters, memory), "", views.RULE_NOTE, "")
    others = [
        (name, *_other_method(model, name, device, given))
        for name in COMPARED_METHODS
        if name != plan.method
    ]
    ui.show(views.methods_table(others))


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedMethod:
    """A method beside others on the same model: its memory, and what it trains."""

    method: str
    num_trainable_parameters: int
    memory: MemoryEstimate
    card: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "num_trainable_parameters": self.num_trainable_parameters,
            "per_gpu": self.memory.to_dict(),
        }


def _compared(
    methods: str, model: ModelSpec, device: Device | None, given: Mapping[str, Any]
) -> list[ComparedMethod]:
    """Each method of a comma-separated list, all other given settings kept."""
    kept = {key: value for key, value in given.items() if key not in _METHOD_BOUND}
    rows = []
    for name in dict.fromkeys(part.strip() for part in methods.split(",") if part.strip()):
        method = resolve_method(name)
        plan = estimate_recipe(model, device, {**kept, "method": method.name}).plan
        memory = estimate_memory(model, plan, device=device)
        trained = method.count(model, plan.method_settings)
        rows.append(
            ComparedMethod(
                method=method.name,
                num_trainable_parameters=trained.num_trainable_parameters,
                memory=memory,
                card=smallest_card(needed_bytes(memory)),
            )
        )
    if not rows:
        raise InputError("`--compare` names no method", "for example `--compare full,lora,qlora`")
    return rows


def _configuration(reasoned: ReasonedPlan) -> str:
    """The settings that memory depends on, in one line."""
    plan = reasoned.plan
    autocast = f", {plan.mixed_precision} autocast" if plan.autocast else ""
    base = plan.dtype if plan.quantization == "none" else f"{plan.quantization} base"
    checkpointing = "" if plan.gradient_checkpointing else "no "
    objective = plan.resolved_objective
    what = "" if objective.name == "sft" else f"{objective.title}, "
    each_row = f" each for {objective.each_row}" if objective.each_row else ""
    tokens = f"{plan.per_device_train_batch_size}x{plan.max_length} tokens{each_row}"
    packed = " packed" if plan.packing else ""
    return (
        f"{what}{base}{autocast}, {tokens}{packed}, "
        f"{plan.optim}, {checkpointing}gradient checkpointing, {plan.loss} loss{_gpus(plan)}"
    )


def _gpus(plan: TrainingPlan) -> str:
    """Among how many GPUs the work is divided, and how."""
    if plan.num_gpus == 1 and plan.sharding == "none":
        return ""
    how = "DDP" if plan.sharding == "none" else plan.sharding
    offloaded = f", {plan.offload} on the host" if plan.offload != "none" else ""
    return f"; one of {plan.num_gpus} GPUs, {how}{offloaded}"


def _other_method(
    model: ModelSpec, name: str, device: Device | None, given: Mapping[str, Any]
) -> tuple[int, int, str]:
    """(trained parameters, required bytes, cards it fits on) of the model by another method."""
    kept = {key: value for key, value in given.items() if key not in _METHOD_BOUND}
    plan = estimate_recipe(model, device, {**kept, "method": name}).plan
    trained = plan.resolved_method.count(model, plan.method_settings)
    memory = estimate_memory(model, plan, device=device)
    card = smallest_card(needed_bytes(memory))
    return trained.num_trainable_parameters, memory.required_bytes, card


def smallest_card(free_bytes: int) -> str:
    """The catalogued GPU with the least memory of those that have so much, and how much it has."""
    from ftplan.profiles import gpu_catalog

    enough = [g for g in gpu_catalog().values() if g.memory_bytes >= free_bytes]
    if not enough:
        return "no single GPU of the catalog"
    smallest = min(enough, key=lambda g: (g.memory_bytes, g.name))
    return f"{smallest.name} ({format_bytes(smallest.memory_bytes)}) and larger"
