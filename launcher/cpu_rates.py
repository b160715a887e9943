"""How fast the processor trains: measured in a child process in about four seconds, or assumed.

`python -m ftplan.launcher.cpu_rates` measures and prints one JSON object. A closed-form step time
divides FLOPs by a matrix product's rate and bytes by a memory rate; for GPUs both come from data
sheets, but no data sheet foretells them for a processor: cores are shared, throttled and limited,
libraries choose kernels by instruction set, and the C library decides whether memory is reused.

Measured, as medians of repetitions after a warm-up, with torch's own number of threads:

- `float32`: FLOP/s of a linear layer's three products (output, gradient of the input, gradient
  of the weight) for two shapes of small transformers; their FLOPs over their seconds, which is
  the harmonic mean weighted by FLOPs.
- `bfloat16`: the same, only where the processor multiplies bf16 natively; else null.
- `memory_bandwidth_bytes_per_second`: bytes read and written by a gated activation and a residual
  (silu, multiply, add; eight tensors' worth) into fresh outputs, allocation included, because
  autograd keeps outputs and cannot reuse them. Half of the bytes move in blocks below 32 MiB,
  which glibc's allocator hands out again, half in blocks above, which it maps anew each time, so
  that every page is first zeroed by the kernel. The two differ threefold (18 and 6.5 GB/s on a
  two-core virtual machine), and training does both: in a step of a 135M-class Llama there,
  residual additions ran at 16 GB/s, silu and multiply at 9 to 12, log-softmax over the vocabulary
  at 4.5. Equal shares are assumed; they give 8 to 9.5 GB/s.

The child keeps torch out of the command line's process, and a crash or a hang away from it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Struct

from ftplan.launcher.host import CPU_THREADS, cpu_flags

# Assumed for a processor that nobody measured: every core multiplies and adds 8 float32 in each
# of two vector units (AVX2), 32 FLOPs a cycle, at 2 GHz, and half of that is reached.
ASSUMED_CYCLES_PER_SECOND = 2.0e9
ASSUMED_FLOPS_PER_CYCLE = 32
ASSUMED_SHARE_OF_PEAK = 0.5
ASSUMED_BANDWIDTH_BYTES_PER_SECOND = 10e9

MEASUREMENT_TIMEOUT_SECONDS = 60

# Rows, in-features, out-features: the feed-forward of a 135M model, a square layer of a 1B model.
PRODUCT_SHAPES = ((512, 576, 1536), (512, 2048, 2048))

# Sequences of 512 x 1536 float32 in a block: 24 and 48 MiB, either side of glibc's 32 MiB.
CHAIN_SEQUENCES = (8, 16)

NATIVE_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


class CpuRates(Struct, frozen=True, kw_only=True):
    """What training on the processor reaches; FLOP/s keyed by dtype name."""

    flops_per_second: Mapping[str, float]
    memory_bandwidth_bytes_per_second: float
    source: str


class MeasurementFailed(Exception):
    """The child measured nothing; the text says why."""


def assumed_rates(num_cores: int) -> CpuRates:
    """Rates of `num_cores` ordinary cores that were not measured."""
    per_core = ASSUMED_CYCLES_PER_SECOND * ASSUMED_FLOPS_PER_CYCLE * ASSUMED_SHARE_OF_PEAK
    return CpuRates(
        flops_per_second={"float32": num_cores * per_core},
        memory_bandwidth_bytes_per_second=ASSUMED_BANDWIDTH_BYTES_PER_SECOND,
        source="assumed",
    )


def measured_rates(num_cores: int, environ: Mapping[str, str]) -> CpuRates:
    """Rates that a child process measures now. Raises MeasurementFailed."""
    try:
        child = subprocess.run(
            [sys.executable, "-m", "ftplan.launcher.cpu_rates"],
            env=_child_environ(num_cores, environ),
            capture_output=True,
            text=True,
            check=False,
            timeout=MEASUREMENT_TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise MeasurementFailed(f"no result after {MEASUREMENT_TIMEOUT_SECONDS} s") from None
    except OSError as error:
        raise MeasurementFailed(str(error)) from error
    if child.returncode != 0:
        last_line = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise MeasurementFailed(f"exit status {child.returncode}, {last_line}")
    return _parse(child.stdout)


def _child_environ(num_cores: int, environ: Mapping[str, str]) -> dict[str, str]:
    # torch counts the machine's cores, not those a container's quota leaves.
    limited = num_cores < (os.cpu_count() or 1)
    threads = {"OMP_NUM_THREADS": str(num_cores)} if limited else {}
    return {**threads, **CPU_THREADS, **environ, "PYTHONSAFEPATH": "1"}


def _parse(output: str) -> CpuRates:
    try:
        result = json.loads(output.strip().splitlines()[-1])
        flops = {dtype: result[dtype] for dtype in ("float32", "bfloat16") if result[dtype]}
        return CpuRates(
            flops_per_second={dtype: float(rate) for dtype, rate in flops.items()},
            memory_bandwidth_bytes_per_second=float(result["memory_bandwidth_bytes_per_second"]),
            source="measured on this machine",
        )
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise MeasurementFailed("its output could not be read") from error


def median_seconds(call: Callable[[], object], *, warm_up: float, budget: float) -> float:
    """Median time of `call`, repeated at least three times and for `budget` seconds."""
    _repeat(call, budget=warm_up, at_least=1)
    return statistics.median(_repeat(call, budget=budget, at_least=3))


def _repeat(call: Callable[[], object], *, budget: float, at_least: int) -> list[float]:
    durations: list[float] = []
    end = time.perf_counter() + budget
    while len(durations) < at_least or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        durations.append(time.perf_counter() - start)
    return durations


def product_flops_per_second(torch: Any, dtype: Any, *, budget: float) -> float:
    """FLOP/s of forward and backward products of linear layers, `budget` seconds a shape."""
    flops = seconds = 0.0
    for rows, in_features, out_features in PRODUCT_SHAPES:
        inputs = torch.randn(rows, in_features, dtype=dtype)
        weight = torch.randn(out_features, in_features, dtype=dtype)
        gradient = torch.randn(rows, out_features, dtype=dtype)

        def step(x: Any = inputs, w: Any = weight, dy: Any = gradient) -> object:
            return x @ w.T, dy @ w, dy.T @ x

        flops += 3 * 2 * rows * in_features * out_features
        seconds += median_seconds(step, warm_up=budget / 4, budget=budget)
    return flops / seconds


def chain_bytes_per_second(torch: Any, *, budget: float) -> float:
    """Bytes a second moved by element-wise work, `budget` seconds a size of block."""
    seconds_per_byte = 0.0
    for sequences in CHAIN_SEQUENCES:
        gate, up, residual = (torch.randn(sequences, 512, 1536) for _ in range(3))
        kept: list[Any] = []

        def step(
            gate: Any = gate, up: Any = up, residual: Any = residual, kept: list[Any] = kept
        ) -> None:
            activated = torch.nn.functional.silu(gate)
            product = activated * up
            # The last repetition's outputs live until here, as autograd's do until backward.
            kept[:] = [activated, product, product + residual]

        moved = 8 * gate.nbytes
        seconds_per_byte += median_seconds(step, warm_up=budget / 4, budget=budget) / moved
    return len(CHAIN_SEQUENCES) / seconds_per_byte


def measure() -> dict[str, float | int | None]:
    """All rates. Imports torch."""
    import torch

    native = bool(NATIVE_BFLOAT16_FLAGS & cpu_flags())
    with torch.inference_mode():
        return {
            "float32": product_flops_per_second(torch, torch.float32, budget=0.6),
            "bfloat16": product_flops_per_second(torch, torch.bfloat16, budget=0.3)
            if native
            else None,
            "memory_bandwidth_bytes_per_second": chain_bytes_per_second(torch, budget=0.6),
            "num_threads": torch.get_num_threads(),
        }


def main() -> int:
    """Measure and print."""
    print(json.dumps(measure()))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
