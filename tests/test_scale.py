"""Machines on the command line: `--num-machines`, `--interconnect`, `--cluster`, `--scale`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftplan.launcher.cli import main
from ftplan.launcher.scale import read_numbers
from ftplan.planner.cluster import Cluster, Node
from ftplan.planner.errors import InputError
from ftplan.planner.failures import GPU_SECONDS_BETWEEN_FAILURES
from ftplan.planner.plan import TrainingPlan
from ftplan.profiles import (
    NETWORK_KINDS,
    find_gpu,
    find_network,
    gpu_catalog,
    network_names,
    usual_network,
)

DATA = Path(__file__).parent.parent / "examples" / "python_docs.jsonl"
H100 = ("--gpu", "H100 SXM")
MACHINES = (*H100, "--num-gpus", "8", "--num-machines", "4")
FULL = ("--method", "full")

Ftplan = Callable[..., tuple[int, Any, str]]


@pytest.fixture
def ftplan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ftplan:
    """Status, what is printed (JSON as its value) and messages on one line."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> tuple[int, Any, str]:
        status = main(list(words))
        said = capsys.readouterr()
        printed = json.loads(said.out) if "--json" in words and said.out else said.out
        return status, printed, " ".join(said.err.split())

    return run


def cluster(*num_gpus: int, between: float | None = None) -> Cluster:
    entry = find_gpu("H100 SXM")
    return Cluster(
        nodes=tuple(
            Node(
                device=entry.device(),
                num_gpus=number,
                network=find_network("infiniband-ndr", number),
                seconds_between_failures=between,
            )
            for number in num_gpus
        )
    )


# --- networks


def test_every_network_has_a_rate_and_a_hop() -> None:
    assert {name.partition("-")[0] for name in network_names()} == set(NETWORK_KINDS)
    for name in network_names():
        network = find_network(name, 8)
        assert 1e7 < network.bytes_per_second < 1e11 and 1e-6 < network.latency_seconds < 1e-4


def test_ethernet_has_a_card_for_the_machine_and_infiniband_one_for_each_gpu() -> None:
    shared, alone = (find_network("ethernet-100g", n).bytes_per_second for n in (8, 1))
    assert alone == pytest.approx(8 * shared) == pytest.approx(0.4 * 12.5e9)
    assert find_network("InfiniBand NDR", 8) == find_network("infiniband-ndr", 1)


def test_the_usual_network_of_every_gpu_is_known() -> None:
    assert {usual_network(entry) for entry in gpu_catalog().values()} <= set(network_names())
    assert usual_network(find_gpu("A100 80GB SXM")) == "infiniband-hdr"
    assert usual_network(find_gpu("RTX 4090")) == "ethernet-100g"


# --- clusters


def test_a_cluster_fails_with_its_first_machine() -> None:
    assert cluster(8, 8).seconds_between_failures == pytest.approx(
        GPU_SECONDS_BETWEEN_FAILURES / 16
    )
    assert cluster(8, 8, 8, between=600.0).seconds_between_failures == pytest.approx(200)


def test_machines_with_more_gpus_than_the_smallest_leave_some_idle() -> None:
    unlike = cluster(8, 4)
    assert (unlike.gpus_per_machine, unlike.num_gpus, unlike.left_out) == (4, 8, 4)


def test_the_first_machines_of_a_cluster_have_equal_numbers() -> None:
    four = cluster(8, 8, 8, 8)
    assert (four.first(4).num_machines, four.first(4).num_gpus) == (1, 4)
    assert (four.first(24).num_machines, four.first(12).gpus_per_machine) == (3, 6)
    for number in (11, 40):
        with pytest.raises(InputError):
            four.first(number)


def test_a_cluster_without_machines_is_none() -> None:
    with pytest.raises(InputError, match="one machine at least"):
        Cluster(nodes=())


# --- flags


def test_num_gpus_is_of_each_machine_and_a_plans_of_all(ftplan: Ftplan) -> None:
    status, said, err = ftplan("estimate", "7B", *FULL, "--sharding", "fsdp", *MACHINES, "--json")
    assert status == 0 and "infiniband-ndr is taken" in err
    plan = {name: entry["value"] for name, entry in said["plan"].items()}
    assert (plan["num_gpus"], plan["num_machines"]) == (32, 4)
    assert said["cluster"]["num_gpus"] == 32
    assert said["cluster"]["machines"][0]["count"] == 4


def test_the_interconnect_decides_the_step_and_not_the_memory(ftplan: Ftplan) -> None:
    words = ("estimate", "7B", *FULL, "--sharding", "fsdp", *MACHINES, "--json", "--interconnect")
    _, fast, err = ftplan(*words, "infiniband-ndr")
    _, slow, _ = ftplan(*words, "ethernet-10g")
    assert "taken" not in err
    assert slow["step"]["step_seconds"] > 5 * fast["step"]["step_seconds"]
    assert slow["step"]["bound_by"] == "links between GPUs"
    assert slow["per_gpu"] == fast["per_gpu"]


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ((*H100, "--num-machines", "4"), "does not say how many GPUs", "`--num-gpus 8`"),
        ((*H100, "--interconnect", "roce-400g"), "and there is one", "`--num-machines`"),
        ((*MACHINES, "--interconnect", "infinband-ndr"), "unknown interconnect", "infiniband-ndr"),
        (
            (*MACHINES, *FULL, "--tp-size", "32"),
            "divides each layer over machines",
            "`--tp-size 8`",
        ),
        ((*H100, "--num-gpus", "8", "--num-machines", "0"), "must be a finite number above 0", ""),
        ((*MACHINES, "--cluster", "none.yaml"), "names the machines, and so does `--gpu`", "leave"),
        (("--cluster", "none.yaml"), "cannot read `none.yaml`", ""),
    ],
)
def test_flags_that_say_too_little_or_too_much_are_refused(
    words: tuple[str, ...], message: str, hint: str, ftplan: Ftplan
) -> None:
    status, printed, err = ftplan("estimate", "7B", *words)
    assert status == 2 and not printed
    assert message in err and hint in err.partition("hint: ")[2]


def test_unequal_machines_are_refused_in_a_plan_too() -> None:
    with pytest.raises(InputError, match="machines with unlike numbers"):
        TrainingPlan(num_gpus=9, num_machines=2)


# --- cluster.yaml


def test_a_cluster_file_names_the_slowest_of_unlike_machines(
    ftplan: Ftplan, tmp_path: Path
) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "machines:\n- {gpu: H100 SXM, num_gpus: 8}\n"
        "- {gpu: L40S, num_gpus: 4, interconnect: 2.5GB/s, latency: 20us}\n"
    )
    status, said, err = ftplan(
        "estimate", "1B", *FULL, "--sharding", "fsdp", "--cluster", str(path), "--json"
    )
    assert status == 0 and "leave 4 of them idle" in err
    assert said["fits"]["gpu"] == "H100 SXM5 80GB and L40S"
    assert said["plan"]["num_gpus"]["value"] == 8
    assert [m["num_gpus"] for m in said["cluster"]["machines"]] == [8, 4]
    assert said["cluster"]["machines"][1]["latency_seconds"] == pytest.approx(20e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("machines: []", "must be a list of machines"),
        ("machine: [{gpu: L4}]", "did you mean `machines`?"),
        ("machines: [{num_gpus: 8}]", "machine 1: it names no `gpu`"),
        ("machines: [{gpu: L4, gpus: 8}]", "unknown part of a machine"),
        ("machines: [{gpu: L5}]", "machine 1: unknown GPU `L5`"),
        ("machines: [{gpu: L4, count: 0}]", "`count: 0` is no number"),
        ("machines: [{gpu: L4, interconnect: wires}]", "unknown interconnect `wires`"),
        ("machines: [{gpu: L4, latency: soon}]", "`latency: soon` is no time of a hop"),
        ("{machines: [{gpu: L4}], storage: fast}", "`storage: fast` is no rate"),
        ("machines: [{gpu: L4, time_between_failures: never}]", "is no time"),
    ],
)
def test_a_cluster_file_that_cannot_be_is_told_what_and_where(
    text: str, message: str, ftplan: Ftplan, tmp_path: Path
) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    status, _, err = ftplan("estimate", "7B", "--cluster", str(path))
    assert status == 2 and message in err


# --- the scaling table


def test_the_scaling_table_says_where_more_gpus_stop_paying(ftplan: Ftplan) -> None:
    words = ("plan", str(DATA), "--model", "llama-3.1-8b", *H100, *FULL, "--yes")
    numbers = ("--scale", "1,8,16,32,100000", "--interconnect", "ethernet-25g")
    status, said, _ = ftplan(*words, *numbers, "--json")
    assert status == 0 and said["method"] == "full"
    points = {point["num_gpus"]: point for point in said["scale"]}
    assert [point["fits"] for point in points.values()] == [False, True, True, True, False]
    assert "does not fit: needs" in points[1]["refused"]
    assert "more GPUs than the" in points[100_000]["refused"]
    assert points[8]["efficiency"] == 1 > points[16]["efficiency"]
    assert said["stops_paying_num_gpus"] == 8
    assert points[16]["num_machines"] == 2
    assert points[16]["usd"] == pytest.approx(
        16 * said["usd_per_gpu_hour"] * points[16]["seconds"] / 3600
    )
    lost = points[32]["failures"]["lost_share"]
    run = points[32]["steps"] * points[32]["step_seconds"]
    assert points[32]["seconds"] == pytest.approx(run / (1 - lost))


def test_the_table_is_shown_and_tells_what_the_recipe_loses(ftplan: Ftplan) -> None:
    status, printed, err = ftplan(
        *("plan", str(DATA), "--model", "llama-3.1-8b", *H100, "--scale", "4,64", "--yes")
    )
    assert status == 0 and "infiniband-ndr is taken" in err
    text = " ".join(printed.split())
    assert "The same run on more GPUs" in text and "From 64 GPUs on a step has more rows" in text


def test_scale_alone_takes_the_usual_numbers_and_others_are_read() -> None:
    assert read_numbers("") == [2**power for power in range(11)]
    assert read_numbers("8, 1,8") == [1, 8]
    with pytest.raises(InputError, match="`x` is no number of GPUs"):
        read_numbers("8,x")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "none is named"),
        ((*MACHINES,), "`--num-machines` says so too"),
        ((*H100, "--explain"), "is of one plan"),
        ((*H100, "--out", "plan.yaml"), "is of one plan"),
        ((*H100, "--then", str(DATA)), "stages are of one machine"),
    ],
)
def test_what_does_not_go_with_scale_is_refused(
    words: tuple[str, ...], message: str, ftplan: Ftplan
) -> None:
    status, _, err = ftplan("plan", str(DATA), "--scale", "1,8", *words)
    assert status == 2 and message in err


def test_a_plan_on_machines_warns_of_larger_steps_and_refuses_too_few_rows(
    ftplan: Ftplan, tmp_path: Path
) -> None:
    words = ("--model", "smollm2-135m", *MACHINES, "--yes")
    status, said, _ = ftplan("plan", str(DATA), *words, "--json", "--explain")
    assert status == 0 and said["cluster"]["num_machines"] == 4
    assert said["failures"]["daly_seconds"] > 0
    assert "rows-of-a-step" in [warning["name"] for warning in said["warnings"]]
    few = tmp_path / "few.jsonl"
    lines = DATA.read_text(encoding="utf-8").splitlines()[:20]
    few.write_text("\n".join(lines), encoding="utf-8")
    status, _, err = ftplan("plan", str(few), *words)
    assert status == 2 and "not each has one" in err


def test_hardware_takes_machines_too(ftplan: Ftplan) -> None:
    words = ("hardware", "70B", *FULL, *MACHINES, "--json", "--interconnect")
    status, fast, _ = ftplan(*words, "infiniband-ndr")
    assert status == 0
    _, slow, _ = ftplan(*words, "ethernet-25g")
    (one,), (other,) = fast["choices"], slow["choices"]
    assert one["num_gpus"] == 32 and one["fits"]
    assert other["seconds"] > 5 * one["seconds"]


def test_what_would_fit_names_its_machines(ftplan: Ftplan) -> None:
    words = ("--model", "smollm2-1.7b", *FULL, "--gpu", "T4", "--num-gpus", "2", "--yes")
    several = ("--num-machines", "2", "--sharding", "none", "--max-length", "256")
    status, _, err = ftplan("plan", str(DATA), *words, *several)
    assert status == 1 and "does not fit on 4 GPUs of T4" in err
    assert "--num-gpus 1 --num-machines 1" in err
