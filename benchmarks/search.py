"""How many plans the search goes over, and how long it takes: `python -m benchmarks.search`.

Each case is searched by a process of its own, so that nothing has been worked out before. `plan` is
the whole command, from the start of Python to the last line. Exit status 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, structs

from ftplan.launcher.ui import Ui, table
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.hardware_spec import Device
from ftplan.planner.search import choose_plan
from ftplan.profiles import find_gpu, find_network, require_model, usual_network

BAR_SECONDS = 1.0

_ROWS = 20_000
_SEED = 7


class Case(Struct, frozen=True):
    """`num_gpus` of one kind, of which any number may train; on several machines all of them, with
    what is usual between. `barred`: BAR_SECONDS holds."""

    model: str
    gpu: str
    num_gpus: int
    barred: bool = False
    num_machines: int = 1


CASES = (
    Case("llama-3.1-8b", "RTX 4090", 1, barred=True),
    Case("llama-3.1-8b", "H100 SXM", 8, barred=True),
    Case("llama-3.1-8b", "H100 SXM", 512, barred=True),
    Case("llama-3.1-8b", "H100 SXM", 512, barred=True, num_machines=64),
    Case("llama-3.3-70b-instruct", "H100 SXM", 512, barred=True, num_machines=64),
    Case("llama-3.3-70b-instruct", "H100 SXM", 8),
    Case("mixtral-8x7b-v0.1", "A100 80GB SXM", 8),
    Case("llama-3.1-405b", "RTX 4090", 1),
)


class Measured(Struct, frozen=True, kw_only=True):
    """Of one search. `num_timed` of `num_plans` had their time worked out, `num_evaluated` their
    memory; the others are bounded by these. `seconds`: of the processor, in the search alone."""

    model: str
    gpu: str
    num_gpus: int
    chosen: str
    num_plans: int
    num_timed: int
    num_evaluated: int
    seconds: float
    barred: bool
    num_machines: int

    @property
    def plans_per_second(self) -> float:
        return self.num_plans / self.seconds

    @property
    def within(self) -> bool:
        return not self.barred or self.seconds <= BAR_SECONDS


def rows() -> DataProfile:
    """Rows with log-normal lengths, as instruction data has."""
    rng = random.Random(_SEED)
    drawn = [round(rng.lognormvariate(math.log(250), 0.6)) for _ in range(_ROWS)]
    lengths = sorted((min(2048, 10 + length) for length in drawn), reverse=True)
    return DataProfile(
        path="rows.jsonl",
        sha256="0" * 64,
        format="instruction",
        objective="supervised",
        num_rows=_ROWS,
        num_usable_rows=_ROWS,
        num_eval_rows=_ROWS // 10,
        lengths=tuple(lengths),
        exact=True,
    )


def measure(case: Case) -> Measured:
    """Search once."""
    model, data = require_model(case.model).spec, rows()
    gpus: Device | list[Device] = _gpus(case)
    given = {}
    if case.num_machines > 1:
        gpus = _joined(case)
        given = {"num_gpus": case.num_gpus, "num_machines": case.num_machines}
    began = time.process_time()
    ranking = choose_plan(model, data, gpus, given)
    seconds = time.process_time() - began
    best = ranking.best
    return Measured(
        **structs.asdict(case),
        chosen=f"{best.plan.method} on {best.plan.num_gpus}" if best else "nothing fits",
        num_plans=ranking.num_plans,
        num_timed=ranking.num_timed,
        num_evaluated=ranking.num_evaluated,
        seconds=seconds,
    )


def _gpus(case: Case) -> list[Device]:
    device = find_gpu(case.gpu).device()
    return [structs.replace(device, index=index) for index in range(case.num_gpus)]


def _joined(case: Case) -> Device:
    """One of the GPUs of several machines."""
    entry = find_gpu(case.gpu)
    network = find_network(usual_network(entry), case.num_gpus // case.num_machines)
    return structs.replace(entry.device(), network=network)


def _in_a_process(case: Case) -> Measured:
    command = [sys.executable, "-m", "benchmarks.search", "--case", str(CASES.index(case))]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Measured(**json.loads(printed))


def plan_seconds() -> float:
    """Processor time of `ftplan plan` for 8B on a named GPU: start, data, search, tables."""
    lines = [
        json.dumps(
            {"instruction": f"What is {n} and {n}?", "output": f"It is {2 * n}. " * (n % 40)}
        )
        for n in range(1, 1000)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("\n".join(lines))
        words = ["plan", str(path), "--model", "llama-3.1-8b", "--gpu", "RTX 4090"]
        return _processor_seconds(lambda: _ftplan(words))


def _ftplan(words: Sequence[str]) -> None:
    subprocess.run([sys.executable, "-m", "ftplan", *words], check=True, capture_output=True)


def _processor_seconds(run: Callable[[], None]) -> float:
    """Of the processes that are run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.case is not None:
        print(json.dumps(structs.asdict(measure(CASES[arguments.case]))))
        return 0
    ui = Ui(as_json=arguments.json)
    measured = []
    for case in CASES:
        ui.say(f"searching plans of {case.model} on {case.num_gpus} x {case.gpu} ...")
        measured.append(_in_a_process(case))
    whole = plan_seconds()
    within = all(one.within for one in measured) and whole <= BAR_SECONDS
    ui.json(_to_dict(measured, whole, within=within))
    ui.show(_table(measured))
    said = f"`ftplan plan` for 8B on an RTX 4090: {whole:.2f} s of the processor"
    ui.say(f"{said}; bar {BAR_SECONDS:g} s: {'reached' if within else 'MISSED'}")
    return 0 if within else 1


def _to_dict(measured: Sequence[Measured], whole: float, *, within: bool) -> dict[str, Any]:
    return {
        "schema": 1,
        "within": within,
        "bar_seconds": BAR_SECONDS,
        "plan_seconds": whole,
        "searches": [
            {**structs.asdict(one), "plans_per_second": one.plans_per_second} for one in measured
        ],
    }


def _table(measured: Sequence[Measured]) -> Any:
    heads = ("model", "GPUs", "chosen", ">plans", ">timed", ">memory", ">seconds", ">plans/s")
    return table(
        "searches, each in a process of its own",
        heads,
        [
            [
                one.model,
                f"{one.num_gpus} x {one.gpu}"
                + (f", {one.num_machines} machines" if one.num_machines > 1 else ""),
                one.chosen,
                f"{one.num_plans:,}",
                f"{one.num_timed:,}",
                f"{one.num_evaluated:,}",
                f"{one.seconds:.2f}",
                f"{one.plans_per_second:,.0f}",
            ]
            for one in measured
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
