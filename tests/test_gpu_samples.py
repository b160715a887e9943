"""What is sampled of GPUs and the training process, and what is kept of it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from ftplan.launcher import gpu_samples
from ftplan.launcher.gpu_samples import (
    GpuSample,
    Meter,
    Sample,
    SampleRows,
    Sampling,
    read_samples,
    sampled_peaks,
    together,
)
from ftplan.launcher.run_dir import RunDir, write_json
from ftplan.planner.hardware_spec import Device
from ftplan.planner.units import GIB
from tests.fake_nvml import (
    FakeGpu,
    FakeNvml,
    FakeProcess,
    NVMLError_GpuIsLost,
    NVMLError_NotSupported,
)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    write_json(tmp_path / "status.json", {"stage": "training", "pid": os.getpid()})
    return RunDir(tmp_path)


def device(**changes: Any) -> Device:
    told: dict[str, Any] = {
        "name": "NVIDIA L4",
        "kind": "cuda",
        "index": 0,
        "total_bytes": 24 * GIB,
        "free_bytes": 23 * GIB,
        "memory_bandwidth_bytes_per_second": 3e11,
        "peak_flops_per_second": {"bfloat16": 1e14},
    }
    return Device(**{**told, **changes})


def metered(run: RunDir, gpu: FakeGpu, **changes: Any) -> GpuSample:
    nvml = FakeNvml(gpus=[gpu])
    nvml.nvmlInit()
    meter = Meter(run, [device(**changes)], nvml)
    (sample,) = meter.sample().gpus
    return sample


class TestMeter:
    def test_one_gpu(self, run: RunDir) -> None:
        processes = (FakeProcess(os.getpid(), 17 * GIB), FakeProcess(1, 2 * GIB))
        gpu = FakeGpu(free=3 * GIB, compute=processes, power=65_400, power_limit=72_000)
        assert metered(run, gpu) == GpuSample(
            index=0,
            name="NVIDIA L4",
            total_bytes=24 * GIB,
            used_bytes=21 * GIB,
            run_bytes=17 * GIB,
            utilization=0.97,
            temperature_celsius=60.0,
            power_watts=65.4,
            power_limit_watts=72.0,
        )

    def test_a_gpu_is_found_by_its_uuid_whatever_its_number(self, run: RunDir) -> None:
        nvml = FakeNvml(gpus=[FakeGpu(uuid="GPU-a", free=1), FakeGpu(uuid=b"GPU-b", free=2)])
        nvml.nvmlInit()
        (sample,) = Meter(run, [device(index=0, uuid="GPU-b")], nvml).sample().gpus
        assert sample.used_bytes == 24 * GIB - 2

    def test_what_a_driver_does_not_tell_is_left_out(self, run: RunDir) -> None:
        fails = {
            name: NVMLError_NotSupported
            for name in ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetUtilizationRates")
        }
        sample = metered(run, FakeGpu(fails=fails))
        assert sample.power_watts is None and sample.utilization is None
        assert sample.temperature_celsius == 60.0 and sample.run_bytes is None

    def test_a_lost_gpu_costs_its_figures_only(self, run: RunDir) -> None:
        lost = {"nvmlDeviceGetMemoryInfo": NVMLError_GpuIsLost}
        assert metered(run, FakeGpu(fails=lost)).used_bytes is None
        gone = {"nvmlDeviceGetHandleByIndex": NVMLError_GpuIsLost}
        assert metered(run, FakeGpu(fails=gone)) == GpuSample(index=0, name="NVIDIA L4")

    def test_the_training_process_is_measured(self, run: RunDir) -> None:
        meter = Meter(run, [])
        first = meter.sample(step=3)
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass
        second = meter.sample(step=4)
        assert first.cores is None and second.cores is not None and second.cores > 0
        assert first.process_bytes is not None and first.process_bytes > 10**7
        assert (first.step, second.step) == (3, 4)

    def test_before_the_process_is_known_nothing_is_told(self, tmp_path: Path) -> None:
        assert Meter(RunDir(tmp_path), []).sample().process_bytes is None


def sample(at: float, **changes: Any) -> Sample:
    gpu = GpuSample(
        index=0,
        name="L4",
        used_bytes=int(at),
        temperature_celsius=60 + at % 3,
        power_watts=100.0 + at,
        utilization=0.5,
    )
    told: dict[str, Any] = {"at": at, "step": int(at), "process_bytes": 5, "gpus": (gpu,)}
    return Sample(**{**told, **changes})


class TestRows:
    def test_a_row_has_the_highest_memory_and_the_mean_power(self) -> None:
        row = together([sample(10.0), sample(11.0), sample(12.0)])
        assert (row.at, row.seconds, row.step) == (12.0, 3.0, 12)
        (gpu,) = row.gpus
        assert (gpu.used_bytes, gpu.temperature_celsius, gpu.power_watts) == (12, 62.0, 111.0)

    def test_a_row_every_five_seconds(self, run: RunDir) -> None:
        rows = SampleRows(run)
        for second in range(12):
            rows.add(sample(1000.0 + second))
        rows.flush()
        assert [(row.at, row.seconds) for row in read_samples(run)] == [
            (1004.0, 5.0),
            (1009.0, 5.0),
            (1011.0, 2.0),
        ]

    def test_a_week_is_some_thousand_rows(self, run: RunDir) -> None:
        """Counted with a sample a minute, which is enough of the later, longer rows."""
        rows = SampleRows(run)
        count = 0
        rows.flush = lambda: None  # type: ignore[method-assign]
        week, at = 7 * 86_400, 1.0
        while at < week:
            rows._began = 1.0
            at += rows._row_seconds(at)
            count += 1
        assert 5_000 < count < 12_000

    def test_nothing_known_is_no_row(self, run: RunDir) -> None:
        rows = SampleRows(run)
        rows.add(Sample(at=1.0))
        rows.flush()
        assert not run.samples.exists()

    def test_damaged_rows_are_left_out(self, run: RunDir) -> None:
        run.samples.write_text('{"at": 1.0}\n{"at": "x"}\n[]\n{"at": 2.0, "gp', encoding="utf-8")
        assert [row.at for row in read_samples(run)] == [1.0]

    def test_a_full_disk_costs_the_row(self, run: RunDir) -> None:
        run.samples.mkdir()
        rows = SampleRows(run)
        rows.add(sample(1.0))
        rows.flush()


class TestPeaks:
    def test_of_all_rows(self, run: RunDir) -> None:
        gpu = {"index": 0, "name": "L4", "used_bytes": 7, "power_watts": 100.0, "utilization": 1.0}
        hot = {**gpu, "used_bytes": 9, "power_watts": 40.0, "utilization": 0.4}
        rows = [
            {"at": 5.0, "seconds": 5.0, "process_bytes": 3, "gpus": [gpu]},
            {"at": 6.0, "seconds": 1.0, "process_bytes": 2, "gpus": [hot]},
        ]
        run.samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert sampled_peaks(run) == {
            "seconds": 6.0,
            "process_peak_bytes": 3,
            "gpus": [
                {
                    "index": 0,
                    "name": "L4",
                    "used_peak_bytes": 9,
                    "run_peak_bytes": None,
                    "utilization_mean": 0.9,
                    "temperature_peak_celsius": None,
                    "power_mean_watts": 90.0,
                    "energy_joules": 540,
                }
            ],
        }

    def test_none_without_samples(self, run: RunDir) -> None:
        assert sampled_peaks(run) is None


class TestSampling:
    def test_samples_come_and_are_kept(self, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_samples, "SAMPLE_SECONDS", 0.02)
        nvml = FakeNvml(gpus=[FakeGpu()])
        monkeypatch.setattr(gpu_samples, "import_nvml", lambda notes: nvml)
        with Sampling(run, [device()]) as sampling:
            deadline = time.monotonic() + 10
            while sampling.at_step(5) is None and time.monotonic() < deadline:
                time.sleep(0.01)
        assert sampling.latest is not None and sampling.latest.gpus[0].utilization == 0.97
        assert read_samples(run)[-1].gpus[0].power_watts == 300.0
        assert nvml.open_sessions == 0

    def test_a_run_on_a_processor_needs_no_nvml(
        self, run: RunDir, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gpu_samples, "import_nvml", lambda notes: pytest.fail("asked"))
        with Sampling(run, [device(kind="cpu")], writes=False):
            pass
        assert not run.samples.exists()
