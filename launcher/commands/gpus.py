"""`ftplan gpus`: what this machine has, free and total."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from msgspec import structs, to_builtins

from ftplan.launcher.probe import probe_machine
from ftplan.launcher.ui import Ui
from ftplan.planner.hardware_spec import Device, Machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), help="whose disk is looked at (runs)"
    )


def run(arguments: argparse.Namespace, ui: Ui) -> int:
    machine = probe_machine(run_dir=arguments.runs_dir)
    ui.json(machine_to_dict(machine))
    if not ui.as_json:
        from ftplan.launcher import views

        ui.show(views.hardware_table(machine))
        if machine.driver_version:
            ui.say(f"driver {machine.driver_version}")
        for note in machine.notes:
            ui.say(note)
    return 0


def machine_to_dict(machine: Machine) -> dict[str, Any]:
    """The object of `gpus --json`."""
    return {
        "schema": 1,
        "gpus": [device_to_dict(gpu) for gpu in machine.gpus],
        "cpu": device_to_dict(machine.cpu),
        "host": structs.asdict(machine.host),
        "driver_version": machine.driver_version,
        "notes": list(machine.notes),
    }


def device_to_dict(device: Device) -> dict[str, Any]:
    """A device's fields as JSON holds them."""
    fields: dict[str, Any] = to_builtins(device)
    fields["peak_flops_per_second"] = dict(device.peak_flops_per_second)
    return fields
