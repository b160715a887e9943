"""The live view of a run directory, and following a run that another process has started."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftplan.launcher.gpu_samples import Sampling
from ftplan.launcher.live import LiveView
from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.ui import Ui


def live_view(
    ui: Ui,
    run: RunDir,
    written: Mapping[str, Any],
    samples: Sampling,
    elapsed_seconds: float = 0.0,
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
    )
