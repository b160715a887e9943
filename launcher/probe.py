"""What this machine has: its GPUs, by what their drivers tell, and the processor.

A query that fails costs its own field; what is missing, and why, stands in `Machine.notes`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from msgspec import structs

from ftplan.launcher.cpu_rates import MeasurementFailed, assumed_rates, measured_rates
from ftplan.launcher.host import read_host
from ftplan.launcher.probing import apple
from ftplan.launcher.probing.amd import amd_gpus
from ftplan.launcher.probing.nvidia import nvidia_gpus
from ftplan.launcher.probing.nvml import (
    NO_DRIVER,
    NO_LIBRARY,
    NvmlModule,
    import_nvml,
    session,
)
from ftplan.planner.hardware_spec import Device, Host, Machine


def probe_machine(
    *,
    run_dir: Path = Path("."),
    nvml: NvmlModule | None = None,
    environ: Mapping[str, str] = os.environ,
    measure_cpu: bool = False,
    root: Path = Path("/"),
) -> Machine:
    """Everything a plan needs to know of this machine.

    `run_dir`: where the run would be written, for the free disk. `environ` decides which GPUs are
    visible, as CUDA or ROCm would. `measure_cpu` spends some seconds on the processor's real
    rates. GPUs stand in the runtime's order; `index` is the number that the vendor's tools give
    the card. They are of one vendor, NVIDIA's before AMD's: no build of torch computes on two.

    Raises InputError where NVIDIA's driver reports visible GPUs and the catalog knows none of them.
    """
    notes: list[str] = []
    host = read_host(run_dir, root)
    chip = apple.read_chip() if apple.is_apple_silicon() else None
    host = apple.apple_host(chip, host) if chip else host
    machine = Machine(gpus=(), cpu=_processor(host, measure_cpu, environ, notes), host=host)
    machine = _with_nvidia(machine, nvml or import_nvml(notes), environ, root, notes)
    if not machine.gpus:
        gpus, links = amd_gpus(root, environ, notes)
        machine = structs.replace(machine, gpus=gpus, links=links)
    if not machine.gpus and chip:
        gpu = apple.apple_gpu(chip, host, notes)
        machine = structs.replace(machine, gpus=(gpu,) if gpu else ())
    if machine.gpus and machine.gpus[0].vendor != "nvidia":
        notes = [note for note in notes if note not in (NO_DRIVER, NO_LIBRARY)]
    return structs.replace(machine, notes=tuple(dict.fromkeys(notes)))


def _with_nvidia(
    machine: Machine,
    nvml: NvmlModule | None,
    environ: Mapping[str, str],
    root: Path,
    notes: list[str],
) -> Machine:
    if nvml is None:
        return machine
    with session(nvml, root, notes) as started:
        if started is None:
            return machine
        version, cuda = started.driver_version(), started.cuda_version()
        gpus, links = nvidia_gpus(started, environ)
        return structs.replace(
            machine, gpus=gpus, links=links, driver_version=version, cuda_version=cuda
        )


def _processor(host: Host, measure: bool, environ: Mapping[str, str], notes: list[str]) -> Device:
    rates = assumed_rates(host.num_cores)
    if measure:
        try:
            rates = measured_rates(host.num_cores, environ)
        except MeasurementFailed as reason:
            notes.append(
                f"the processor's rates are assumed, since measuring them failed: {reason}"
            )
    return Device(
        name=host.cpu_name,
        kind="cpu",
        total_bytes=host.ram_total_bytes,
        free_bytes=host.ram_available_bytes,
        memory_bandwidth_bytes_per_second=rates.memory_bandwidth_bytes_per_second,
        peak_flops_per_second=rates.flops_per_second,
        context_bytes=0,
        rates_source=rates.source,
    )
