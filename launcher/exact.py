"""Dry runs from the command line: torch runs in a process of its own, which sees no GPU.

One process serves many cases, so that torch is loaded once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from types import TracebackType
from typing import IO, Any

from msgspec import structs

from ftplan.launcher.dry_run.case import DryRunCase
from ftplan.launcher.model_source import ModelSource
from ftplan.launcher.own_stack import installed_stack
from ftplan.launcher.packages import INSTALL_TRAINING, missing_packages
from ftplan.launcher.ui import Ui
from ftplan.planner.dry_run_summary import DryRunSummary
from ftplan.planner.errors import InputError, RunFailedError
from ftplan.planner.hardware_spec import Device
from ftplan.planner.memory import MemoryEstimate, memory_from_phases
from ftplan.planner.optimizers import OPTIMIZER_PACKAGES
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.prequantized import PREQUANTIZED
from ftplan.planner.stack import DEFAULT_CAPABILITY
from ftplan.planner.trained import target_names

_SERVER = "ftplan.launcher.dry_run.serve"


class DryRunner:
    """Carries out dry runs; a context manager. `say` is told what goes on."""

    def __init__(self, say: Callable[[str], None] = lambda _: None) -> None:
        self.say = say
        self._process: subprocess.Popen[str] | None = None
        self._open = ExitStack()
        self._log: IO[str] | None = None

    def __enter__(self) -> DryRunner:
        missing = missing_packages()
        if missing:
            raise InputError(
                f"a dry run needs {', '.join(missing)}, which this Python does not have",
                f"{INSTALL_TRAINING}, or leave out `--exact`",
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._open.close()

    def run(self, case: DryRunCase) -> DryRunSummary:
        """The case's summary.

        Raises InputError for what cannot be built or run, RunFailedError when the process dies.
        """
        _check_packages(case.plan)
        process = self._process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(case.to_dict()) + "\n")
            process.stdin.flush()
        except OSError:
            raise self._died() from None
        for line in process.stdout:
            message: dict[str, Any] = json.loads(line)
            if "say" in message:
                self.say(message["say"])
            elif "error" in message:
                raise InputError(message["error"], message["hint"])
            else:
                return DryRunSummary.from_dict(message["result"])
        raise self._died()

    def _start(self) -> subprocess.Popen[str]:
        opened = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._log = self._open.enter_context(opened)
        return subprocess.Popen(
            [sys.executable, "-m", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=server_environment(os.environ),
        )

    def _died(self) -> RunFailedError:
        assert self._process is not None and self._log is not None
        status = self._process.wait()
        self._process = None
        self._log.seek(0)
        last = self._log.read().strip().splitlines()[-1:]
        return RunFailedError(
            f"the dry run's process ended with status {status}" + "".join(f": {t}" for t in last),
            "there may be too little RAM; the closed form needs none: leave out `--exact`",
        )


def _check_packages(plan: TrainingPlan) -> None:
    """Raises InputError for a package that the plan's base or optimizer comes from."""
    needed = {} if plan.quantization == "none" else {"bitsandbytes": f"a {plan.quantization} base"}
    if plan.optimizer.module:
        needed.setdefault(plan.optimizer.module, f"`--optim {plan.optim}`")
    for module, who in needed.items():
        if find_spec(module) is None:
            package = OPTIMIZER_PACKAGES[module]
            raise InputError(
                f"{who} needs {package}, which this Python has not",
                f"install it with `pip install {package}`",
            )


@contextmanager
def shown_dry_runs(ui: Ui) -> Iterator[DryRunner]:
    """A runner; what it does is shown on stderr, where that is a terminal."""
    if not ui.err.is_terminal:
        with DryRunner() as runner:
            yield runner
        return
    status = ui.err.status("dry run")
    with status, DryRunner(lambda text: status.update(f"dry run: {text}")) as runner:
        yield runner


def server_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The parent's environment, without GPUs and without the network."""
    return {
        **environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }


def case_of(
    source: ModelSource, plan: TrainingPlan, device: Device | None, **more: Any
) -> DryRunCase:
    """The dry run of a plan. `more`: further fields of DryRunCase.

    Raises InputError for a training stack that does not have the plan's loss, and for a base whose
    kernels are not known.
    """
    if plan.loss == "trl-fused" and plan.trainer != "trl":
        raise InputError(
            f"`--loss trl-fused` is TRL's own: `--trainer {plan.trainer}` has it not",
            "use `--loss stock`, `--loss liger` or `--trainer trl`",
        )
    if plan.resolved_method.adapter and not source.stand_in:
        # As the launcher does: PEFT's own `all-linear` takes more modules than ftplan counts.
        plan = plan.replace(target_modules=target_names(source.spec, plan.target_modules))
    if plan.quantization in PREQUANTIZED:
        raise InputError(
            f"a dry run knows no {plan.quantization} kernels",
            "leave out `--exact`, or use `--quantization nf4`",
        )
    capability = device.compute_capability if device else None
    return DryRunCase(
        **{
            "config": dict(source.config),
            "reward_config": source.reward_model and dict(source.reward_model.config),
            "plan": plan,
            "kind": device.kind if device else "cuda",
            "capability": capability or DEFAULT_CAPABILITY,
            "row_length": plan.max_length,
            **structs.asdict(installed_stack(device)),
            **more,
        }
    )


def memory_of(
    summary: DryRunSummary, source: ModelSource, plan: TrainingPlan, device: Device | None
) -> MemoryEstimate:
    """The dry run as an estimate: what the device shows, and what the run requires."""
    # The launcher turns expandable segments on; people's own stacks seldom do.
    peaks = summary.expandable if plan.trainer == "trl" else summary.allocator
    return memory_from_phases(
        summary.phases,
        source.spec,
        plan,
        device,
        trained_weight_bytes=summary.trained_weight_bytes,
        reserved_bytes=peaks.reserved_peak_bytes,
        required_reserved_bytes=peaks.required_bytes,
    )
