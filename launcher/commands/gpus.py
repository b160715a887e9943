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
        show(machine, ui)
        for note in machine.notes:
            ui.say(note)
    return 0


def show(machine: Machine, ui: Ui) -> None:
    """The machine for a person."""
    from ftplan.launcher import gpu_views, views

    ui.show(views.hardware_table(machine))
    cards = gpu_views.cards_table(machine.gpus)
    if cards is not None:
        ui.show("", cards)
    between = list(gpu_views.between_gpus(machine))
    if between:
        ui.show("", *between)
    if machine.driver_version:
        cuda = machine.cuda_version
        runs = f", which runs CUDA up to {cuda[0]}.{cuda[1]}" if cuda else ""
        ui.say(f"driver {machine.driver_version}{runs}")


def machine_to_dict(machine: Machine) -> dict[str, Any]:
    """The object of `gpus --json`."""
    return {
        "schema": 1,
        "gpus": [device_to_dict(gpu) for gpu in machine.gpus],
        "cpu": device_to_dict(machine.cpu),
        "host": structs.asdict(machine.host),
        "links": to_builtins(machine.links),
        "driver_version": machine.driver_version,
        "cuda_version": to_builtins(machine.cuda_version),
        "notes": list(machine.notes),
    }


def device_to_dict(device: Device) -> dict[str, Any]:
    """A device's fields as JSON holds them."""
    fields: dict[str, Any] = to_builtins(device)
    fields["peak_flops_per_second"] = dict(device.peak_flops_per_second)
    del fields["calibration"]  # of plans; `ftplan calibrate --show` has it
    return fields
