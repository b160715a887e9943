"""Trackers that training reports to besides metrics.jsonl, by transformers' own callbacks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.trackers import PROJECT, require_trackers, tracker_settings


def settle_reporting(arguments: Any, report_to: Sequence[str], run: RunDir) -> None:
    """Have the trainer of these arguments report under the run's name, into the run directory
    where the tracker has a folder. Raises InputError where a package is not installed."""
    require_trackers(report_to)
    arguments.report_to = list(report_to)
    arguments.run_name = run.root.resolve().name
    arguments.project = PROJECT
    os.environ.update(tracker_settings(report_to, run, os.environ))
    if report_to:
        run.trackers.mkdir(exist_ok=True)
