"""The live view of a run directory, and following a run that another process has started."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftplan.launcher import processes
from ftplan.launcher.gpu_samples import Sampling, read_samples
from ftplan.launcher.live import LiveView
from ftplan.launcher.metrics_tail import MetricsTail
from ftplan.launcher.run_dir import RunDir, open_run
from ftplan.launcher.run_states import RunSummary, summary_of
from ftplan.launcher.ui import Ui
from ftplan.planner.hardware_spec import Device

_POLL_SECONDS = 0.25

# How often all of the run's files are asked whether it still goes on.
_STATE_SECONDS = 1.0

# Between two stages an adapter may be merged, and the next process has to start.
_BETWEEN_STAGES_SECONDS = 300.0

_EXIT_STATUS = {"finished": 0, "interrupted": 130}


def live_view(
    ui: Ui,
    run: RunDir,
    written: Mapping[str, Any],
    samples: Sampling,
    elapsed_seconds: float = 0.0,
    *,
    resumes: bool = False,
) -> LiveView:
    """What shows a run. `written`: its plan.yaml."""
    return LiveView(
        ui,
        total_steps=int(written.get("steps", 0)),
        name=run.root.resolve().name,
        predicted=written["predicted"],
        run=run,
        sampled=samples.at_step,
        elapsed_seconds=elapsed_seconds,
        resumes=resumes,
    )


def follow(ui: Ui, path: Path) -> int:
    """Show a run until it ends; returns the exit status that it ends with: 0 finished, 1 failed,
    130 interrupted. Ctrl-C ends the view, and not the run."""
    try:
        ended = _until_end(ui, path)
    except KeyboardInterrupt:
        ui.say(f"the run goes on; `ftplan runs show {path} --follow` shows it again")
        return 130
    ui.json({"schema": 1, "run_dir": str(path), "state": ended.state, "why": ended.why})
    why = f": {ended.why}" if ended.why else ""
    ui.say(f"{ended.name}: {ended.state}{why}; `ftplan runs show {path}` tells more")
    return _EXIT_STATUS.get(ended.state, 1)


def _until_end(ui: Ui, path: Path) -> RunSummary:
    """Of several stages each in turn."""
    quiet_since: float | None = None
    while True:
        summary = summary_of(path)
        going = next((part for part in summary.stages if part.state == "running"), summary)
        if going.state == "running":
            _follow_one(ui, open_run(going.path))
            quiet_since = None
            continue
        quiet_since = quiet_since or time.monotonic()
        waited = time.monotonic() - quiet_since
        if not _comes_more(summary) or waited > _BETWEEN_STAGES_SECONDS:
            return summary
        time.sleep(_STATE_SECONDS)


def _comes_more(summary: RunSummary) -> bool:
    """Whether the launcher may be between two stages: some have finished, none was broken off."""
    states = [part.state for part in summary.stages]
    return (
        summary.state != "finished"
        and "finished" in states
        and {*states}
        <= {
            "finished",
            "not started",
        }
    )


def _follow_one(ui: Ui, run: RunDir) -> None:
    """Show one run until its process ends."""
    metrics, written = MetricsTail(run.metrics), run.read_plan()
    pid = run.read_status().get("pid")
    elapsed = processes.running_seconds(pid) if isinstance(pid, int) else None
    with (
        Sampling(run, _sampled_gpus(run), writes=False) as samples,
        live_view(ui, run, written, samples, elapsed or 0.0) as live,
    ):
        goes_on, asked = True, time.monotonic()
        while goes_on:
            time.sleep(_POLL_SECONDS)
            if time.monotonic() - asked > _STATE_SECONDS:
                goes_on, asked = _goes_on(run), time.monotonic()
            live.update(run.read_status(), metrics.rows())


def _goes_on(run: RunDir) -> bool:
    return summary_of(run.root).state == "running"


def _sampled_gpus(run: RunDir) -> Sequence[Device]:
    """The GPUs that the launcher samples, by its last row."""
    from ftplan.launcher.probe import probe_machine

    rows = read_samples(run)
    indices = {gpu.index for gpu in rows[-1].gpus} if rows else set()
    if not indices:
        return ()
    return [gpu for gpu in probe_machine(run_dir=run.root).gpus if gpu.index in indices]
