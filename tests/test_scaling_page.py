"""docs/scaling.md has the tables that `python -m benchmarks.scaling` writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from benchmarks import scaling
from benchmarks.pages import filled
from ftplan.launcher.cluster_file import read_cluster

TEXT = scaling.PAGE.read_text(encoding="utf-8")


def test_the_tables_of_scaling_are_current() -> None:
    assert filled(TEXT, scaling.TABLES) == TEXT


def test_the_estimates_bounds_hold_what_is_published() -> None:
    for one in scaling.published():
        step = scaling._step(scaling.require_model(one.model).spec, one.plan, one.device)
        assert step.mfu is not None
        published = one.mfu
        if published is None:
            assert one.tokens_per_second is not None
            published = one.tokens_per_second * step.mfu / step.tokens_per_second_per_gpu
        bounds = [
            step.mfu * step.step_seconds / seconds
            for seconds in (step.most_step_seconds, step.least_step_seconds)
        ]
        assert bounds[0] <= published <= bounds[1], one.what


def test_the_cluster_of_the_page_can_be_read(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    assert yaml.safe_load(block)
    path = tmp_path / "cluster.yaml"
    path.write_text(block)
    cluster = read_cluster(path)
    assert (cluster.num_machines, cluster.gpus_per_machine, cluster.num_gpus) == (5, 8, 40)
    assert cluster.write_bytes_per_second == 20e9
    assert cluster.device.name == "A100 SXM4 80GB and H100 SXM5 80GB"
    network = cluster.device.network
    assert network is not None and network.bytes_per_second == pytest.approx(0.75 * 25e9)
