"""`ftplan plan DATA`: the best plan for a data file on this or a named GPU, with reasons."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import structs

from ftplan.launcher.amounts import parse_seconds, parse_usd
from ftplan.launcher.cluster_flags import (
    add_cluster_flags,
    asked_cluster,
    cluster_to_dict,
    on_cluster,
)
from ftplan.launcher.commands.estimate import named_device
from ftplan.launcher.data.asked import DataAsked, checked_share, read_columns
from ftplan.launcher.data.readings import said_columns
from ftplan.launcher.estimate_json import calibration_to_dict, estimate_to_dict
from ftplan.launcher.plan_cautions import plan_cautions
from ftplan.launcher.plan_file import write_plan_file
from ftplan.launcher.planning import Planned, make_plan
from ftplan.launcher.remote_code import add_trust_argument
from ftplan.launcher.settings_flags import add_setting_flags, command_line, given_settings
from ftplan.launcher.ui import Ui
from ftplan.planner.combination import Caution
from ftplan.planner.errors import InputError
from ftplan.planner.goals import GOALS, Wanted
from ftplan.planner.ranking import Evaluated

if TYPE_CHECKING:
    from ftplan.launcher.plan_explained import Explained
    from ftplan.planner.cluster import Cluster


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_plan_arguments(parser)
    parser.add_argument("--gpu", metavar="NAME", help="plan for this GPU instead of this machine")
    parser.add_argument(
        "--free-memory", metavar="SIZE", help="memory free on it (default: all), such as 22GiB"
    )
    add_cluster_flags(parser)
    _add_scale_argument(parser)
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="write the plan for `ftplan launch FILE`"
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="every setting, the formulas of memory and time, and what else could be chosen",
    )
    add_setting_flags(parser)


def _add_scale_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scale",
        metavar="N,N,...",
        nargs="?",
        const="",
        help="a table of plans on these numbers of GPUs in all (1,2,4,...,1024), on machines of "
        "`--num-gpus` each (8)",
    )


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """What `plan` and `auto` are both told."""
    add_data_arguments(parser)
    parser.add_argument(
        "--model", metavar="MODEL", help="a catalog name, a Hub id, or a folder (default: chosen)"
    )
    parser.add_argument(
        "--then",
        metavar="DATA",
        nargs="+",
        action="append",
        help="a further stage, trained after the one before: its files (may be given again)",
    )
    parser.add_argument(
        "--replay-share",
        metavar="SHARE",
        type=float,
        help="rows of the earlier stages among those of each `--then`, such as 0.05 (none)",
    )
    parser.add_argument(
        "--prefer", choices=GOALS, default=GOALS[0], help="what the plan is best at (quality)"
    )
    parser.add_argument(
        "--time-budget", metavar="TIME", help="a run no longer than this, such as 6h or 90m"
    )
    parser.add_argument(
        "--cost-budget", metavar="MONEY", help="a run no dearer than this, such as 50usd"
    )
    parser.add_argument(
        "--runs-dir", metavar="DIR", type=Path, default=Path("runs"), help="where runs go (runs)"
    )
    add_cpu_argument(parser)
    add_calibration_argument(parser)
    add_trust_argument(parser)


def add_cpu_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="train on the processor, in as many processes as `--num-gpus` says",
    )


def add_calibration_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-calibration",
        dest="calibration",
        action="store_false",
        help="predict without what `ftplan calibrate` has learned of this machine",
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Which rows, and how they are read: what `data`, `plan` and `auto` are told alike."""
    parser.add_argument(
        "data",
        metavar="DATA",
        nargs="+",
        help="files, folders, or datasets on the Hub: JSON, JSON lines, CSV, Parquet, Arrow",
    )
    parser.add_argument(
        "--eval-data", metavar="FILE", nargs="+", help="held-out rows (default: a tenth of DATA)"
    )
    parser.add_argument(
        "--test-share",
        metavar="SHARE",
        type=float,
        default=0.0,
        help="rows that training never sees, such as 0.05 (default: none)",
    )
    parser.add_argument(
        "--columns",
        metavar="OURS=YOURS",
        help="names of your fields: `instruction=question,output=answer`; `label=` ignores yours",
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse the data where a row would be left out"
    )
    parser.add_argument(
        "--yes", "-y", action="store_true", help="answer every question with its default"
    )


def data_asked(arguments: argparse.Namespace, objective: str | None = None) -> DataAsked:
    """Raises InputError for what cannot be meant."""
    return DataAsked(
        paths=tuple(arguments.data),
        eval_paths=tuple(arguments.eval_data or ()),
        columns=read_columns(arguments.columns),
        objective=objective,
        strict=arguments.strict,
        test_share=checked_share(arguments.test_share),
        ask=not arguments.yes,
    )


def check_no_replay(arguments: argparse.Namespace) -> None:
    """Raises InputError where rows are to be replayed and nothing comes before."""
    if arguments.replay_share is not None:
        raise InputError(
            "`--replay-share` mixes in rows of earlier stages, and there is one stage",
            "name the next one's data with `--then FILE`",
        )


def wanted(arguments: argparse.Namespace) -> Wanted:
    """Raises InputError for what is no time or money."""
    time, cost = arguments.time_budget, arguments.cost_budget
    return Wanted(
        goal=arguments.prefer,
        seconds=parse_seconds("--time-budget", time) if time else None,
        usd=parse_usd("--cost-budget", cost) if cost else None,
    )


def run(arguments: argparse.Namespace, ui: Ui) -> int:
    if arguments.then:
        _check_one_machine(arguments)
        from ftplan.launcher.stage_commands import run_plan

        return run_plan(arguments, ui)
    check_no_replay(arguments)
    if arguments.scale is not None:
        from ftplan.launcher.scale import run_scale

        return run_scale(arguments, ui)
    given = given_settings(arguments)
    named = named_device(arguments.gpu, arguments.free_memory)
    cluster = asked_cluster(arguments, ui, given, named)
    planned = make_plan(
        ui,
        asked=data_asked(arguments),
        model_name=arguments.model,
        named_device=on_cluster(named, cluster),
        given=given,
        wanted=wanted(arguments),
        runs_dir=arguments.runs_dir,
        for_launch=False,
        calibrate=arguments.calibration,
        on_processor=arguments.cpu,
    )
    if arguments.out is not None:
        write_plan_file(planned, arguments.out)
    said = _explained(planned, cluster) if arguments.explain else None
    ui.json(
        {
            **planned_to_dict(planned),
            **(said.to_dict(planned) if said else {}),
            **({"cluster": cluster_to_dict(cluster, planned.chosen.memory)} if cluster else {}),
        }
    )
    show_plan(ui, planned, said)
    if cluster is not None and not ui.as_json:
        from ftplan.launcher.cluster_views import cluster_table

        ui.show("", cluster_table(cluster, planned.chosen.memory))
    settled = {"columns": said_columns(planned.asked.columns) or None}
    again = command_line("plan", add_arguments, arguments, settled, leave_out=("out", "explain"))
    ui.show_lines([f"\nagain: {again}"])
    if arguments.out is not None:
        shown = shlex.quote(str(arguments.out))
        ui.say(f"written to {arguments.out}; carry it out with `ftplan launch {shown}`")
    return 0


def _check_one_machine(arguments: argparse.Namespace) -> None:
    """Raises InputError for several machines, or numbers of them, and several stages."""
    for name in ("scale", "cluster", "interconnect", "num_machines"):
        if getattr(arguments, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise InputError(
                f"`{flag}` with `--then` is not planned: stages are of one machine",
                f"leave out `{flag}`, or plan each stage by itself",
            )


def _explained(planned: Planned, cluster: Cluster | None) -> Explained:
    from ftplan.launcher.plan_explained import explained

    return explained(planned, cluster)


def show_plan(ui: Ui, planned: Planned, explained: Explained | None = None) -> None:
    """The tables of a plan, and what is to be noted about it."""
    if ui.as_json:
        return
    from ftplan.launcher import plan_views

    ui.show(*plan_views.plan_parts(planned, explained))
    for note in planned.machine.notes if planned.machine else ():
        ui.say(note)
    for caution in plan_cautions(planned):
        ui.warn(str(caution))


def planned_to_dict(planned: Planned) -> dict[str, Any]:
    """The object of `plan --json`."""
    warnings = plan_cautions(planned)
    return {
        "schema": 1,
        "model": {
            "name": planned.source.spec.name,
            "hub_id": planned.source.hub_id,
            "why": planned.model_why,
            "runner_up": structs.asdict(planned.runner_up) if planned.runner_up else None,
        },
        "plan": planned.chosen.reasoned.to_dict(),
        "estimate": _estimate(planned, planned.chosen, warnings),
        "run": {
            **planned.run_time.to_dict(),
            "usd": planned.usd,
            "evaluation": planned.evaluation_time.to_dict(),
        },
        "overlong": planned.profile.overlong_to_dict(planned.chosen.plan.max_length),
        "hashes": planned.hashes.to_dict() if planned.hashes else None,
        "alternatives": [
            {
                "plan": other.reasoned.to_dict(),
                "estimate": _estimate(planned, other, []),
                "why_not": planned.why_not(other),
            }
            for other in planned.ranking.alternatives
        ],
        "rejected": [one.to_dict() for one in planned.refused],
        "search": {
            "num_plans": planned.ranking.num_plans,
            "num_timed": planned.ranking.num_timed,
            "num_evaluated": planned.ranking.num_evaluated,
        },
        "margin": structs.asdict(planned.offer.margin),
        "calibration": calibration_to_dict(planned.device),
        "left_out": [structs.asdict(left) for left in planned.ranking.left_out],
        "warnings": [caution.to_dict() for caution in warnings],
    }


def _estimate(
    planned: Planned, evaluated: Evaluated, warnings: Sequence[Caution]
) -> dict[str, Any]:
    return estimate_to_dict(
        planned.source.spec,
        evaluated.reasoned,
        evaluated.memory,
        planned.device,
        warnings,
        evaluated.step,
        confirmed=planned.confirmed and evaluated is planned.chosen,
        margin=planned.ranking.margin,
    )
