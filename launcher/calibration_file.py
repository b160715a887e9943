"""The calibrations of this user's machines, in a JSON file beside the history."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct, structs

from ftplan.launcher.own_stack import torch_release
from ftplan.launcher.run_dir import read_mapping, write_json
from ftplan.launcher.ui import Ui
from ftplan.launcher.user_data import data_folder, locked
from ftplan.planner.calibration import Calibration, out_of_bounds
from ftplan.planner.errors import InputError
from ftplan.planner.hardware_spec import Device, Machine

FILE_NAME = "calibrations.json"
SCHEMA = 1

# Of a processor whose rates were measured before planning; assumed ones are another matter.
_MEASURED = "measured"


class MachineStack(Struct, frozen=True, order=True):
    """What a calibration is of: a GPU with the driver's major version, or a processor, and the
    release of torch, `2.13`."""

    device: str
    kind: str
    driver: str | None
    torch: str

    def __str__(self) -> str:
        driver = f", driver {self.driver}" if self.driver else ""
        return f"{self.device}{driver}, torch {self.torch}"


class Stored(Struct, frozen=True, kw_only=True):
    """A calibration, of which version of ftplan's formulas, and what was found when it was fitted:
    runs held out, and factors that were refused."""

    stack: MachineStack
    ftplan: str
    calibration: Calibration
    held_out: tuple[dict[str, Any], ...] = ()
    refused: dict[str, float] = {}
    by_configuration: bool = False


def major(version: str | None) -> str | None:
    """`580` of `580.65.06`."""
    return version.partition(".")[0] if version else None


def release(version: str | None) -> str | None:
    """`2.13` of `2.13.0+cpu`."""
    return ".".join(version.split("+")[0].split(".")[:2]) if version else None


def read_calibrations(folder: Path) -> dict[MachineStack, Stored]:
    """By what they are of; none where there is no file. Raises InputError for a damaged one."""
    path = folder / FILE_NAME
    if not path.exists():
        return {}
    raw = read_mapping(path)
    if raw.get("schema") != SCHEMA:
        raise InputError(
            f"`{path}` has schema {raw.get('schema')!r}, and this ftplan reads {SCHEMA}",
            "make it anew with `ftplan calibrate --reset` and `ftplan calibrate`",
        )
    try:
        stored = msgspec.convert(raw["calibrations"], list[Stored])
        for one in stored:
            if bad := out_of_bounds(one.calibration.factors):
                raise ValueError(f"`{bad[0]}` is out of bounds")
    except (KeyError, ValueError) as error:
        raise InputError(
            f"`{path}` is damaged: {error}",
            "make it anew with `ftplan calibrate --reset` and `ftplan calibrate`",
        ) from error
    return {one.stack: one for one in stored}


def keep_calibrations(folder: Path, found: Iterable[Stored]) -> None:
    """Put these into the file, in the place of earlier ones of the same. Raises InputError where
    that cannot be."""

    def change(stored: dict[MachineStack, Stored]) -> dict[MachineStack, Stored]:
        return stored | {one.stack: one for one in found}

    _rewrite(folder, lambda: change(read_calibrations(folder)))


def forget_calibrations(folder: Path) -> int:
    """Take all out of the file, damaged or not; returns how many there were."""
    try:
        count = len(read_calibrations(folder))
    except InputError:
        count = 1
    if (folder / FILE_NAME).exists():
        _rewrite(folder, dict)
    return count


def _rewrite(folder: Path, make: Callable[[], Mapping[MachineStack, Stored]]) -> None:
    try:
        with locked(folder):
            stored = make()
            listed = [msgspec.to_builtins(stored[stack]) for stack in sorted(stored, key=str)]
            write_json(folder / FILE_NAME, {"schema": SCHEMA, "calibrations": listed})
    except OSError as error:
        raise InputError(
            f"cannot write `{folder / FILE_NAME}`: {error.strerror}",
            "look at the folder's permissions, or set XDG_DATA_HOME to another",
        ) from error


def calibrated(ui: Ui, machine: Machine, folder: Path | None = None) -> Machine:
    """The machine, its devices with what was learned of each. A file that cannot be used is told
    and left aside."""
    folder = folder or data_folder()
    try:
        stored = read_calibrations(folder)
    except InputError as error:
        ui.warn(f"planned without a calibration: {error.message}")
        return machine
    if not stored:
        return machine
    from ftplan.launcher.version import version

    def of(device: Device) -> Device:
        found = stored.get(stack_of(device, machine.driver_version))
        if found is None or not found.calibration.in_force or not _is_measured(device):
            return device
        if found.ftplan != version():
            ui.say(f"the calibration is of ftplan {found.ftplan}: `ftplan calibrate` makes it anew")
            return device
        return structs.replace(device, calibration=found.calibration)

    gpus = tuple(map(of, machine.gpus))
    cpu = of(machine.cpu) if not gpus else machine.cpu
    return structs.replace(machine, gpus=gpus, cpu=cpu)


def stack_of(device: Device, driver: str | None) -> MachineStack:
    """What a calibration for the device is found by."""
    torch = ".".join(map(str, torch_release()))
    on_gpu = device.kind != "cpu"
    return MachineStack(device.name, device.kind, major(driver) if on_gpu else None, torch)


def _is_measured(device: Device) -> bool:
    return device.kind != "cpu" or are_measured(device.rates_source)


def are_measured(rates_source: str | None) -> bool:
    """Whether a processor's rates were measured and not assumed."""
    return (rates_source or "").startswith(_MEASURED)
