"""What a run's GPUs and its training process do, once a second: memory, utilization, temperature,
power. The latest is for the live view; of some seconds together one row goes to samples.jsonl.

NVML is asked in a thread of its own: a query of a driver that is busy takes its time.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from ftplan.launcher import processes
from ftplan.launcher.probing.nvml import NvmlModule, import_nvml
from ftplan.launcher.run_dir import RunDir, parsed_row
from ftplan.planner.hardware_spec import Device

T = TypeVar("T")

SAMPLE_SECONDS = 1.0

# A row is of at least so many seconds, and of a longer time the longer the run has taken: 2,000
# rows of the first three hours, 10,000 of a week.
ROW_SECONDS = 5.0
_ROWS_OF_ALL_BEFORE = 2000

_TEMPERATURE_GPU = 0  # NVML_TEMPERATURE_GPU


class GpuSample(Struct, frozen=True, kw_only=True):
    """One GPU at one moment, or over a row's seconds. What a driver does not tell is None.

    `used_bytes` is what `nvidia-smi` shows of the whole card, `run_bytes` what the run's processes
    hold of it; `utilization` is the share of the time in which a kernel ran.
    """

    index: int
    name: str
    total_bytes: int | None = None
    used_bytes: int | None = None
    run_bytes: int | None = None
    utilization: float | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None


class Sample(Struct, frozen=True, kw_only=True):
    """All GPUs of a run, and its training process: the first one where there are several.

    `at` is in seconds since 1970, `cores` how many the process keeps busy.
    """

    at: float
    seconds: float = 0.0
    step: int = 0
    process_bytes: int | None = None
    cores: float | None = None
    gpus: tuple[GpuSample, ...] = ()


class Meter:
    """Takes samples of a run's GPUs and its training process."""

    def __init__(
        self,
        run: RunDir,
        devices: Sequence[Device],
        nvml: NvmlModule | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.run, self.clock = run, clock
        self.nvml = nvml
        self.gpus = [(device, self._handle(device)) for device in devices] if nvml else []
        self._spent: tuple[int, float, float] | None = None

    def sample(self, step: int = 0) -> Sample:
        pid = self.run.read_status().get("pid")
        pid = pid if isinstance(pid, int) else None
        ours = _of_run(pid)
        return Sample(
            at=self.clock(),
            step=step,
            process_bytes=processes.resident_bytes(pid) if pid else None,
            cores=self._cores(pid) if pid else None,
            gpus=tuple(self._gpu(device, handle, ours) for device, handle in self.gpus),
        )

    def _handle(self, device: Device) -> object:
        assert self.nvml
        if device.uuid:
            return self._ask(self.nvml.nvmlDeviceGetHandleByUUID, device.uuid.encode())
        return self._ask(self.nvml.nvmlDeviceGetHandleByIndex, device.index or 0)

    def _gpu(self, device: Device, handle: object, ours: frozenset[int]) -> GpuSample:
        known = GpuSample(index=device.index or 0, name=device.name)
        if handle is None:
            return known
        assert self.nvml
        nvml, ask = self.nvml, self._ask
        memory = ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        rates = ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        power = ask(nvml.nvmlDeviceGetPowerUsage, handle)
        limit = ask(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        temperature = ask(nvml.nvmlDeviceGetTemperature, handle, _TEMPERATURE_GPU)
        there = ask(nvml.nvmlDeviceGetComputeRunningProcesses, handle) or ()
        held = [process.usedGpuMemory or 0 for process in there if process.pid in ours]
        return msgspec.structs.replace(
            known,
            total_bytes=memory.total if memory else None,
            used_bytes=memory.total - memory.free if memory else None,
            run_bytes=sum(held) or None,
            utilization=None if rates is None else rates.gpu / 100,
            temperature_celsius=None if temperature is None else float(temperature),
            power_watts=None if power is None else power / 1000,
            power_limit_watts=None if limit is None else limit / 1000,
        )

    def _ask(self, query: Callable[..., T], *words: Any) -> T | None:
        """None of what the driver will not tell, and of a GPU that it has lost."""
        assert self.nvml
        try:
            return query(*words)
        except self.nvml.NVMLError:
            return None

    def _cores(self, pid: int) -> float | None:
        """Cores that the process has kept busy since the last sample."""
        spent, now = processes.processor_seconds(pid), time.monotonic()
        before, self._spent = self._spent, None if spent is None else (pid, spent, now)
        if before is None or spent is None or before[0] != pid or now <= before[2]:
            return None
        return (spent - before[1]) / (now - before[2])


def _of_run(pid: int | None) -> frozenset[int]:
    """The training process and those beside it: all that the same launcher has started."""
    if pid is None:
        return frozenset()
    parent = processes.parent_of(pid)
    beside = processes.descendants(parent) if parent and parent > 1 else []
    return frozenset((pid, *beside))


class Sampling(AbstractContextManager["Sampling"]):
    """Samples while it is open. `latest` is the last one; rows go to samples.jsonl where `writes`.

    `devices`: the GPUs of the run; a processor is not one of them.
    """

    def __init__(self, run: RunDir, devices: Sequence[Device], *, writes: bool = True) -> None:
        self.run = run
        self.devices = [device for device in devices if device.kind == "cuda"]
        self.writes = writes
        self.latest: Sample | None = None
        self.step = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="samples", daemon=True)

    def __enter__(self) -> Sampling:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join(timeout=2 * SAMPLE_SECONDS)  # a driver may hang: the run has ended

    def at_step(self, step: int) -> Sample | None:
        """The latest sample; the next ones are of this step."""
        self.step = step
        return self.latest

    def _run(self) -> None:
        nvml = self._nvml()
        meter = Meter(self.run, self.devices, nvml)
        rows = SampleRows(self.run) if self.writes else None
        try:
            while not self._ended.wait(SAMPLE_SECONDS):
                self.latest = meter.sample(self.step)
                if rows:
                    rows.add(self.latest)
        finally:
            if rows:
                rows.flush()
            if nvml:
                with suppress(nvml.NVMLError):
                    nvml.nvmlShutdown()

    def _nvml(self) -> NvmlModule | None:
        """NVML, started; None where no GPU is asked about, or it does not start."""
        nvml = import_nvml([]) if self.devices else None
        if nvml is None:
            return None
        try:
            nvml.nvmlInit()
        except nvml.NVMLError:
            return None
        return nvml


class SampleRows:
    """Puts samples together into rows of samples.jsonl: few enough, however long a run takes."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self._samples: list[Sample] = []
        self._began: float | None = None

    def add(self, sample: Sample) -> None:
        self._began = self._began or sample.at
        self._samples.append(sample)
        if sample.at - self._samples[0].at + SAMPLE_SECONDS >= self._row_seconds(sample.at):
            self.flush()

    def _row_seconds(self, now: float) -> float:
        return max(ROW_SECONDS, (now - (self._began or now)) / _ROWS_OF_ALL_BEFORE)

    def flush(self) -> None:
        """Write what there is. A full disk costs the row, and nothing else."""
        samples, self._samples = self._samples, []
        if not any(sample.process_bytes or sample.gpus for sample in samples):
            return
        row = json.dumps(msgspec.to_builtins(together(samples)))
        with suppress(OSError), self.run.samples.open("a", encoding="utf-8") as file:
            file.write(row + "\n")


def together(samples: Sequence[Sample]) -> Sample:
    """One row of several samples: the highest memory and temperature, mean utilization and power.
    `at` is its end."""
    first, last = samples[0], samples[-1]
    return Sample(
        at=round(last.at, 1),
        seconds=round(last.at - first.at + SAMPLE_SECONDS, 1),
        step=last.step,
        process_bytes=_highest(sample.process_bytes for sample in samples),
        cores=_mean(sample.cores for sample in samples),
        gpus=tuple(_one_gpu(moments) for moments in zip(*(s.gpus for s in samples), strict=True)),
    )


def _one_gpu(moments: Sequence[GpuSample]) -> GpuSample:
    return msgspec.structs.replace(
        moments[-1],
        used_bytes=_highest(moment.used_bytes for moment in moments),
        run_bytes=_highest(moment.run_bytes for moment in moments),
        utilization=_mean(moment.utilization for moment in moments),
        temperature_celsius=_highest(moment.temperature_celsius for moment in moments),
        power_watts=_mean(moment.power_watts for moment in moments),
    )


def _highest(values: Iterable[T | None]) -> T | None:
    known: list[Any] = [value for value in values if value is not None]
    return max(known, default=None)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.fmean(known), 3) if known else None


def read_samples(run: RunDir) -> list[Sample]:
    """The rows of samples.jsonl; damaged ones are left out."""
    try:
        lines = run.samples.read_bytes().splitlines()
    except OSError:
        return []
    found = (_sample(parsed_row(line)) for line in lines)
    return [sample for sample in found if sample is not None]


def _sample(row: Mapping[str, Any] | None) -> Sample | None:
    try:
        return msgspec.convert(row, Sample)
    except msgspec.ValidationError:
        return None


def sampled_peaks(run: RunDir) -> dict[str, Any] | None:
    """What record.json keeps of the samples of all attempts; None where there are none, as when
    the command was started by hand."""
    samples = read_samples(run)
    if not samples:
        return None
    by_index: dict[int, list[tuple[float, GpuSample]]] = {}
    for sample in samples:
        for gpu in sample.gpus:
            by_index.setdefault(gpu.index, []).append((sample.seconds, gpu))
    return {
        "seconds": round(sum(sample.seconds for sample in samples), 1),
        "process_peak_bytes": _highest(sample.process_bytes for sample in samples),
        "gpus": [_gpu_peaks(moments) for _, moments in sorted(by_index.items())],
    }


def _gpu_peaks(moments: Sequence[tuple[float, GpuSample]]) -> dict[str, Any]:
    powers = [(seconds, gpu.power_watts) for seconds, gpu in moments if gpu.power_watts is not None]
    return {
        "index": moments[-1][1].index,
        "name": moments[-1][1].name,
        "used_peak_bytes": _highest(gpu.used_bytes for _, gpu in moments),
        "run_peak_bytes": _highest(gpu.run_bytes for _, gpu in moments),
        "utilization_mean": _weighted(moments, "utilization"),
        "temperature_peak_celsius": _highest(gpu.temperature_celsius for _, gpu in moments),
        "power_mean_watts": _weighted(moments, "power_watts"),
        "energy_joules": round(sum(s * watts for s, watts in powers)) if powers else None,
    }


def _weighted(moments: Sequence[tuple[float, GpuSample]], name: str) -> float | None:
    """Mean over time."""
    known = [(s, value) for s, gpu in moments if (value := getattr(gpu, name)) is not None]
    seconds = sum(s for s, _ in known)
    return round(sum(s * value for s, value in known) / seconds, 3) if seconds else None
