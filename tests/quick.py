"""What takes most of the time of runs on tiny models, and less in tests that are not about it."""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from ftplan.launcher.cpu_rates import CpuRates, measured_rates


@contextmanager
def little_asked() -> Iterator[None]:
    """Runs within this process read the beginning of the general text, and answer in few tokens."""
    text = sys.modules.get("ftplan.launcher.training.general_text")
    evaluation = sys.modules.get("ftplan.launcher.training.evaluation")
    if text is None or evaluation is None:  # nothing trains here
        yield
        return
    whole = text.general_pieces
    with (
        mock.patch.object(text, "general_pieces", lambda t: whole(t)[: text.LEAST_PIECES]),
        mock.patch.multiple(evaluation, SHOWN_NEW_TOKENS=8, MOST_SCORED_TOKENS=8),
    ):
        yield


@contextmanager
def libraries_left_alone() -> Iterator[None]:
    """What is there already, most of it torch's and transformers', is not looked through whenever
    garbage is collected."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def measured_once() -> Iterator[None]:
    """Plans made within this process for the processor share one measurement of it."""
    with mock.patch("ftplan.launcher.probe.measured_rates", lambda cores, _: _rates(cores)):
        yield


@functools.cache
def _rates(num_cores: int) -> CpuRates:
    return measured_rates(num_cores, os.environ)
