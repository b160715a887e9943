"""The report of a run: made of whatever its directory holds, and safe to open."""

from __future__ import annotations

import builtins
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftplan.launcher import cli
from ftplan.launcher.manifest import seal
from ftplan.launcher.report import pictures
from ftplan.launcher.report.charts import Series, axis, line_chart, smoothed, thinned
from ftplan.launcher.report.elements import escaped, printable, prose, tag
from ftplan.launcher.report.facts import last_lines, outcome_of, read_facts, shown
from ftplan.launcher.report.memory import phase_groups
from ftplan.launcher.report.page import page
from ftplan.launcher.report.style import DARK, LIGHT, NUM_COLOURS
from ftplan.launcher.report.write import report_end
from ftplan.launcher.run_dir import RunDir, write_json, write_yaml
from ftplan.launcher.stages_dir import StagesDir
from ftplan.launcher.ui import Ui
from ftplan.planner.phases import COMPONENTS
from ftplan.planner.units import MIB

SCRIPT = "<script>alert(1)</script>"
QUOTES = "\"'` onload=alert(1) x='"
UNSEEN = "a\x1b[31mb\u202ec\u2066d\x00e\ud800f\u2028g"
HOSTILE = f"{SCRIPT}{QUOTES}</style></title><!--{UNSEEN}"

# A dead process's number: the kernel gives none above this.
NOBODY = 2**22 + 1


def plan(name: str = "tiny") -> dict[str, Any]:
    setting = {"value": "lora", "from": "derived", "why": "by `rule`"}
    usual = {"value": 42, "from": "default", "why": "any fixed number"}
    objective = {"value": "sft", "from": "default", "why": "plain fine-tuning"}
    phases = [
        {"name": phase, "components": {"weights": 40 * MIB, "activations": extra * MIB}}
        for phase, extra in (("load", 0), ("forward", 50), ("loss", 70), ("optimizer step", 10))
    ]
    return {
        "schema": 1,
        "ftplan": "0.1.0",
        "planned_at": "2026-01-01T00:00:00Z",
        "model": {"name": name, "num_parameters": 1000, "why": "asked for"},
        "device": {"name": "L4", "kind": "cuda", "free_bytes": 22 * 2**30},
        "steps": 4,
        "plan": {"method": setting, "seed": usual, "objective": objective},
        "predicted": {
            "allocated_bytes": 110 * MIB,
            "reserved_bytes": 120 * MIB,
            "device_bytes": 400 * MIB,
            "step_seconds": 900.0,
            "tokens_per_second_per_gpu": 100.0,
            "train_seconds": 3600.0,
        },
        "estimate": {"per_gpu": {"phases": phases}},
    }


def step(number: int, loss: float | None, **more: Any) -> dict[str, Any]:
    row = {"step": number, "loss": loss, "seconds": 800.0, "tokens": 80_000, "grad_norm": 1.5}
    return {**row, "learning_rate": 1e-4, "tokens_per_second": 100.0, **more}


def shown_row(text: str) -> dict[str, Any]:
    return {"prompt": text, "reference": text, "answer": text}


def rows(text: str = "What is it?") -> list[dict[str, Any]]:
    general = {"perplexity": 20.0, "num_tokens": 9}
    before = {"event": "evaluation", "when": "before", "eval_loss": 2.5, "general": general}
    return [
        {"event": "memory", "phase": "load", "allocated_bytes": 41 * MIB},
        {**before, "shown": [shown_row(text)]},
        *(step(number, 2.4 - number / 10) for number in range(1, 5)),
        {"event": "memory", "phase": "forward and backward", "allocated_bytes": 108 * MIB},
        {"event": "out of memory", "where": "backward", "requested_bytes": 3 * MIB},
        {"event": "evaluation", "when": "after", "eval_loss": 2.0, "shown": []},
    ]


def record(text: str = "What is it?") -> dict[str, Any]:
    both = {"prompt": text, "reference": text, "before": text, "after": text}
    return {
        "schema": 1,
        "name": text,
        "method": "lora",
        "output": "adapter",
        "num_trainable_parameters": 100,
        "predicted": plan()["predicted"],
        "measured": {
            "allocated_bytes": 108 * MIB,
            "reserved_bytes": 111 * MIB,
            "device_bytes": 380 * MIB,
            "step_seconds": 1000.0,
            "tokens_per_second_per_gpu": 100.0,
            "train_seconds": 7200.0,
            "seconds": {"load": 3.0, "train": 7200.0, "total": 8000.0},
            "phases": [{"name": "load", "allocated_bytes": 41 * MIB}],
        },
        "evaluation": {"before": 2.5, "after": 2.0, "num_rows": 5, "num_scored": 0},
        "forgetting": None,
        "samples": [both],
    }


def make(root: Path, text: str = "What is it?", *, finished: bool = True) -> RunDir:
    """A run directory as training leaves it, `text` wherever there is any."""
    run = RunDir(root)
    root.mkdir(parents=True)
    write(run.plan, plan(text))
    write(run.train, {"method": text})
    write(run.accelerate, {})
    write(run.data_profile, {"path": text, "num_rows": 9, "language": text})
    write(run.environment, {"python": text, "packages": {text: text}})
    write(run.status, {"stage": text, "pid": NOBODY})
    odd = {"event": text, text: text, "list": [text]}
    write_rows(run, [*rows(text), odd, {"event": "evaluation of an earlier stage", "stage": text}])
    if finished:
        write(run.record, record(text))
    return run


def write(path: Path, value: Any) -> None:
    """As JSON, which is YAML too: its escapes hold what no file can."""
    path.write_text(json.dumps(value))


def write_rows(run: RunDir, told: list[dict[str, Any]]) -> None:
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in told))


class Page(HTMLParser):
    """Elements and attributes of a page as a browser would see them; asserts that it is whole."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((name, dict(attributes)))
        if name not in ("meta", "br", "col"):
            self.open.append(name)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((name, dict(attributes)))

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


ELEMENTS = frozenset(
    ["html", "head", "meta", "title", "style", "body", "header", "main", "footer", "section",
     "article", "small", "h1", "h2", "h3", "p", "a", "b", "i", "strong", "span", "div", "dl", "dt",
     "dd", "code", "pre", "table", "caption", "thead", "tbody", "tr", "th", "td", "details",
     "summary", "figure", "figcaption", "svg", "line", "polyline", "path"]
)  # fmt: skip


def test_the_page_of_a_finished_run_has_all_that_was_asked_of_it(tmp_path: Path) -> None:
    seen = Page(page(read_facts(make(tmp_path / "first"))))
    titles = {"Loss and evaluation", "Memory", "Time and cost", "Events", "Answers", "Plan"}
    assert titles | {"Go on", "Data", "Environment"} <= set(seen.words)
    assert "finished" in seen.text
    assert "2.500 → 2.000" in seen.text
    assert "predicted 400.0 MiB, +5.3 %" in seen.text  # 400 / 380
    assert "out of memory" in seen.text
    assert "requested bytes: 3.00 MiB" in seen.text
    assert "ftplan merge" in seen.text
    assert "cannot be shown" not in seen.text.lower()


def test_the_cost_is_that_of_the_measured_seconds(tmp_path: Path) -> None:
    seen = Page(page(read_facts(make(tmp_path / "first")))).text
    found = re.search(r"cost of training, on-demand ([\d.]+) USD ([\d.]+) USD", seen)
    assert found
    assert float(found[2]) == pytest.approx(2 * float(found[1]), abs=0.011)  # 2 h beside 1 h


@pytest.mark.parametrize("finished", [True, False])
def test_what_a_run_holds_cannot_do_anything(tmp_path: Path, finished: bool) -> None:
    """Dataset, model, paths and events that try to be markup, scripts or terminal codes."""
    run = make(tmp_path / 'it\'s <b>&"quoted"', HOSTILE, finished=finished)
    run.stderr.write_text(f"ValueError: {SCRIPT}{QUOTES}\x1b[2J\u202e\n")
    text = page(read_facts(run))
    seen = Page(text)
    assert {name for name, _ in seen.tags} <= ELEMENTS
    attributes = {name for _, told in seen.tags for name in told}
    assert not [name for name in attributes if name.startswith("on")]
    assert not {"src", "srcset", "action", "formaction", "xlink:href"} & attributes
    links = [told["href"] for _, told in seen.tags if "href" in told]
    assert all(link and link.startswith(("#", "./")) for link in links)
    assert SCRIPT in seen.text  # it is shown, as text
    kept = set("\n")
    assert not [c for c in text if not c.isprintable() and c not in kept]
    text.encode("utf-8")  # no half characters


def test_the_page_needs_no_network_and_runs_nothing(tmp_path: Path) -> None:
    text = page(read_facts(make(tmp_path / "run")))
    assert "<script" not in text
    assert not re.search(r"https?://|url\(|@import|file:", text)
    policies = [told["content"] for _, told in Page(text).tags if "http-equiv" in told]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


@given(st.text(st.characters()))
def test_escaped_text_is_read_back_as_it_was_shown(text: str) -> None:
    seen: list[str] = []

    class Reader(HTMLParser):
        def handle_data(self, data: str) -> None:
            seen.append(data)

        def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
            assert (name, attributes) == ("p", [("title", printable(text))])

    reader = Reader()
    reader.feed(f'<p title="{escaped(text)}">{escaped(text)}</p>')
    reader.close()
    assert "".join(seen) == printable(text)


def test_letters_of_all_writings_stay_and_unseen_ones_are_marked() -> None:
    kept = "naïve 中文 עברית हिन्दी 👩\u200d👩\u200d👧 می\u200cشود\n\tend"
    assert printable(kept) == kept
    marked = "a\ufffd[31mb\ufffdc\ufffdd\ufffde\ufffdf\ufffdg"
    assert printable(UNSEEN) == marked


def test_code_stands_between_backticks_only_where_they_pair() -> None:
    assert tag("p", prose("use `<b>` now")).markup == "<p>use <code>&lt;b&gt;</code> now</p>"
    assert tag("p", prose("one ` alone")).markup == "<p>one ` alone</p>"


# ---------------------------------------------------------------- what is not whole


def test_every_file_may_be_missing(tmp_path: Path) -> None:
    names = [p.name for p in make(tmp_path / "whole").root.iterdir()]
    for missing in names:
        root = tmp_path / f"without {missing}"
        shutil.copytree(tmp_path / "whole", root)
        (root / missing).unlink()
        assert "annot be shown" not in page(read_facts(RunDir(root))), missing
    Page(page(read_facts(RunDir(tmp_path / "nothing"))))


@pytest.mark.parametrize(
    "damage",
    ["", "[]", "{", "null", '{"plan": 3, "measured": [], "evaluation": 7}', "\x00\xff", "a: b: c"],
)
def test_every_file_may_be_damaged(tmp_path: Path, damage: str) -> None:
    whole = make(tmp_path / "whole").root
    for path in sorted(whole.iterdir()):
        root = tmp_path / f"damaged {path.name}"
        shutil.copytree(whole, root)
        (root / path.name).write_bytes(damage.encode("latin-1"))
        Page(page(read_facts(RunDir(root))))


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(
    ["step", "loss", "event", "when", "phase", "eval_loss", "shown", "seconds", "task_losses",
     "allocated_bytes", "general", "stage", "learning_rate"]
)  # fmt: skip


@settings(max_examples=40)
@given(told=st.lists(st.dictionaries(KEYS, ANY, max_size=6), max_size=6))
def test_rows_of_any_kind_make_a_page(told: list[dict[str, Any]], tmp_path_factory: Any) -> None:
    root = tmp_path_factory.mktemp("run")
    run = RunDir(root)
    write_yaml(run.plan, plan())
    write_rows(run, told)
    Page(page(read_facts(run)))


# ---------------------------------------------------------------- how a run stands


@pytest.mark.parametrize(
    ("status", "log", "state"),
    [
        (None, "", "not started"),
        ({"stage": "training", "pid": os.getpid()}, "", "running"),
        ({"stage": "training", "pid": NOBODY}, "", "broken off"),
        ({"stage": "training", "pid": NOBODY}, "ValueError: no", "failed"),
        (None, "error: no rows", "failed"),
        ({"stage": "interrupted", "pid": NOBODY}, "ValueError: no", "interrupted"),
        ({"stage": "training", "pid": -1}, "", "broken off"),
        ({"stage": "training", "pid": 10**30}, "", "broken off"),
    ],
)
def test_the_state_is_told_from_the_files(
    tmp_path: Path, status: dict[str, Any] | None, log: str, state: str
) -> None:
    run = make(tmp_path / "run", finished=False)
    run.status.unlink()
    if status is not None:
        write_json(run.status, status)
    run.stderr.write_text(log)
    assert read_facts(run).outcome.state == state


def test_a_run_with_a_record_is_finished(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    assert outcome_of(run, {"stage": "interrupted"}).state == "finished"


def test_a_failed_run_tells_its_error_and_the_command_that_goes_on(tmp_path: Path) -> None:
    run = make(tmp_path / "runs" / "my run", finished=False)
    write_json(run.status, {"stage": "training", "pid": NOBODY})
    run.stderr.write_text("loading\nRuntimeError: mat1 and mat2\n")
    write_json(run.checkpoints / "checkpoint-2" / "trainer_state.json", {})
    seal(run.checkpoints / "checkpoint-2", {})
    seen = Page(page(read_facts(run))).text
    assert "RuntimeError: mat1 and mat2" in seen
    assert "ftplan resume 'runs/my run'" in seen
    assert "ftplan merge" not in seen
    assert "training so far" in seen


def test_an_unfinished_run_is_measured_by_its_steps(tmp_path: Path) -> None:
    facts = read_facts(make(tmp_path / "run", finished=False))
    assert facts.measured["step_seconds"] == 800.0
    assert facts.measured["tokens_per_second_per_gpu"] == 100.0
    assert facts.measured["allocated_bytes"] == 108 * MIB


# ---------------------------------------------------------------- secrets


def test_keys_and_the_home_folder_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    key = "hf_" + "aBxdEygHzjKwmNvpQusTtvWsyZrbCqdFph"
    run = make(tmp_path / "run", finished=False)
    run.stderr.write_text(f"ValueError: token {key}\nOSError: /home/somebody/data.jsonl\n")
    write_rows(run, [{"event": "skipped", "why": f"see {key}", "file": "/home/somebody/x"}])
    text = page(read_facts(run))
    assert key not in text
    assert "somebody" not in text
    assert "~/data.jsonl" in text
    assert "what looks like a key" in text
    assert shown(f"{key}").startswith("[left out")


def test_only_the_end_of_a_long_log_is_shown(tmp_path: Path) -> None:
    run = make(tmp_path / "run", finished=False)
    run.stderr.write_text("".join(f"line {n}\rbar {n}\n" for n in range(100_000)))
    lines = last_lines(run).splitlines()
    assert lines[-1] == "bar 99999"
    assert len(lines) == 40


# ---------------------------------------------------------------- charts


@given(st.lists(st.floats(-1e12, 1e12), min_size=1))
def test_an_axis_holds_zero_and_all_values(values: list[float]) -> None:
    found = axis(values)
    slack = 1e-6 * (found.high - found.low)
    assert found.low <= 0 <= found.high
    assert found.low <= min(values) + slack
    assert max(values) - slack <= found.high
    assert 2 <= len(found.ticks) <= 9


def test_ticks_of_steps_are_whole() -> None:
    for steps in range(1, 40):
        ticks = axis([float(steps)], to_the_end=True, whole=True).ticks
        assert all(tick == int(tick) for tick in ticks)
        assert ticks[-1] <= steps


def test_a_thinned_line_keeps_its_spikes() -> None:
    points = [(float(x), 1.0) for x in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    few = thinned(points)
    assert len(few) <= 500
    assert (54_321.0, 99.0) in few
    assert few == sorted(few)


def test_what_is_no_number_leaves_a_gap() -> None:
    nan = float("nan")
    points = [(1.0, 1.0), (2.0, 2.0), (3.0, nan), (4.0, float("inf")), (5.0, 1.0), (6.0, 2.0)]
    drawn = line_chart("Loss", [Series(name="loss", points=points)]).markup
    assert drawn.count("<polyline") == 2
    assert "nan" not in drawn
    assert "inf" not in drawn
    assert smoothed([nan, 2.0, nan, 2.0])[1:] == pytest.approx([2.0, 2.0, 2.0])


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    write_rows(run, [step(n, 2.0 + (n % 7) / 10) for n in range(1, 20_001)])
    assert len(page(read_facts(run)).encode()) < 300_000


def test_every_chart_is_told_in_words_and_every_table_has_headers(tmp_path: Path) -> None:
    seen = Page(page(read_facts(make(tmp_path / "run"))))
    charts = [told for name, told in seen.tags if name == "svg" and "role" in told]
    assert charts
    assert all(told.get("aria-label") for told in charts)
    assert "held-out: 2.5 at optimizer step 0, 2 at 4" in str(charts[0]["aria-label"])
    names = [name for name, _ in seen.tags]
    assert names.count("thead") == names.count("table") == names.count("caption")
    assert names.count("h1") == 1


# ---------------------------------------------------------------- memory


def test_what_is_measured_stands_beside_the_phases_that_it_covers(tmp_path: Path) -> None:
    run = make(tmp_path / "run", finished=False)
    groups = {group.name: group for group in phase_groups(read_facts(run))}
    assert list(groups) == ["load", "forward and backward", "optimizer step"]
    passes = groups["forward and backward"]
    assert [phase.name for phase in passes.predicted] == ["forward", "loss"]
    assert passes.predicted_bytes == 110 * MIB
    assert passes.measured_bytes == 108 * MIB
    assert groups["optimizer step"].measured_bytes is None


def test_without_measured_phases_the_whole_run_is_told_of(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    old = record()
    del old["measured"]["phases"]
    write_json(run.record, old)
    write_rows(run, [])
    last = phase_groups(read_facts(run))[-1]
    assert (last.name, last.measured_bytes) == ("whole run", 108 * MIB)


def test_each_task_has_a_line_of_its_own(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    told = [step(n, 2.0, task_losses={"sums": 1.0, "<b>": None if n == 1 else 3.0}) for n in (1, 2)]
    write_rows(run, told)
    seen = Page(page(read_facts(run)))
    labels = [str(told.get("aria-label")) for name, told in seen.tags if name == "svg"]
    (of_tasks,) = [label for label in labels if label.startswith("Loss of each task")]
    assert "sums: 1 at optimizer step 1, 1 at 2; <b>: 3 at optimizer step 2, 3 at 2" in of_tasks


def test_gpus_are_drawn_where_samples_were_taken(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    gpu = {"used_bytes": 2**33, "utilization": 0.9, "temperature_celsius": 60, "power_watts": None}
    told = [
        {"at": 1e9 + 5 * n, "gpus": [{"index": i, **gpu} for i in (0, 1)], "process_bytes": 2**30}
        for n in range(9)
    ]
    (run.root / "samples.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in told) + "[1]\nno\n"
    )
    seen = Page(page(read_facts(run))).text
    assert "Temperature (°C)" in seen
    assert "GPU 0" in seen
    assert "GPU 1" in seen
    assert "Power (W)" not in seen


# ---------------------------------------------------------------- colours


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK])
def test_text_lines_and_bars_have_contrast_enough(colours: dict[str, str]) -> None:
    for ground, word in itertools.product(
        ("page", "panel"), ("text", "dim", "good", "bad", "link")
    ):
        assert contrast(colours[ground], colours[word]) >= 4.5, (ground, word)
    for at in range(NUM_COLOURS):
        assert contrast(colours["page"], colours[f"c{at}"]) >= 3, at


def test_there_is_a_colour_for_every_component() -> None:
    assert len(COMPONENTS) <= NUM_COLOURS
    assert LIGHT.keys() == DARK.keys()


# ---------------------------------------------------------------- the command


def ftplan_report(*words: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = cli.main(["report", *map(str, words)])
    out = capsys.readouterr()
    return status, out.out, " ".join(out.err.split())


def test_the_command_writes_the_page_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path / "run", finished=False)
    out = tmp_path / "elsewhere" / "page.html"
    status, said, _ = ftplan_report(run.root, "--out", out, "--json", capsys=capsys)
    told = json.loads(said)
    assert status == 0
    assert told["report"] == str(out)
    assert told["bytes"] == out.stat().st_size
    assert (told["state"], told["steps"]) == ("broken off", 4)
    assert not run.report.exists()


def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = ftplan_report(tmp_path, capsys=capsys)
    assert status == 2
    assert "is not a run directory: it has no plan.yaml" in err


def test_a_page_that_cannot_be_written_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path / "run")
    status, _, err = ftplan_report(run.root, "--out", tmp_path, capsys=capsys)
    assert status == 2
    assert "cannot write" in err
    assert "--out" in err


def test_the_page_is_shown_in_a_browser_where_there_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address))
    out = tmp_path / "page.html"
    status, _, err = ftplan_report(
        make(tmp_path / "run").root, "--out", out, "--open", capsys=capsys
    )
    assert (status, opened) == (0, [out.as_uri()])
    assert "no browser could be started" in err


def test_commands_name_the_run_from_the_folder_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "runs" / "one")
    for folder, said in ((tmp_path, "runs/one"), (tmp_path / "runs", "one"), (tmp_path, None)):
        monkeypatch.chdir(folder)
        root = Path(said) if said else tmp_path / "runs" / "one"
        text = page(read_facts(RunDir(root)))
        assert "ftplan launch runs/one" in text
        assert "from_pretrained(\n    &quot;runs/one/adapter&quot;" in text
        assert str(tmp_path) not in text


def make_stages(root: Path) -> StagesDir:
    folders = ("1-first", "2-<b>")
    for folder in folders:
        make(root / folder)
    told = [
        {"folder": f, "name": f, "begin": None, "objective": "sft", "method": "lora"}
        for f in folders
    ]
    write(root / "stages.yaml", {"stages": told})
    write(root / "record.json", {"lost": ["1-first"], "what_helps": ["a lower `learning_rate`"]})
    return StagesDir(root)


def test_stages_have_a_page_that_links_theirs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = make_stages(tmp_path / "runs" / "both")
    status, said, _ = ftplan_report(stages.root, "--json", capsys=capsys)
    assert status == 0
    told = json.loads(said)
    assert [Path(path).is_file() for path in told["stages"]] == [True, True]
    seen = Page(stages.report.read_text(encoding="utf-8"))
    links = [attributes["href"] for name, attributes in seen.tags if name == "a"]
    assert links == ["./1-first/report.html", "./2-%3Cb%3E/report.html"]
    assert (
        "Later stages have undone part of 1-first. What helps: a lower learning_rate" in seen.text
    )
    assert "ftplan launch runs/both" in seen.text
    of_one = Page((stages.root / "1-first" / "report.html").read_text(encoding="utf-8")).text
    assert "This is one of several stages" in of_one
    assert "ftplan launch runs/both" in of_one


def test_without_matplotlib_the_report_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path / "run")
    real_import = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    status, out, err = ftplan_report(run.root, capsys=capsys)
    assert status == 0
    assert "report.html" in out
    assert "matplotlib" in err
    Page(run.report.read_text(encoding="utf-8"))


def test_the_command_loads_no_torch(tmp_path: Path) -> None:
    words = ["report", str(make(tmp_path / "run").root), "--out", str(tmp_path / "page.html")]
    code = (
        f"import sys; from ftplan.launcher import cli; assert cli.main({words!r}) == 0; "
        "assert not {'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_report_that_fails_does_not_fail_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ftplan.launcher.report.write.write_text", full)
    monkeypatch.setattr(pictures, "draw_pictures", lambda run: [])
    report_end(Ui(), make(tmp_path / "run"))
    assert "no report.html: " in capsys.readouterr().err


# ---------------------------------------------------------------- pictures


@pytest.fixture
def drawn(tmp_path: Path) -> Iterator[RunDir]:
    pytest.importorskip("matplotlib", reason="pictures need it")
    run = make(tmp_path / "a $run$ <b>")
    told = [*rows(), step(5, None), step(6, float("nan")), step(7, 1.5)]
    write_rows(run, told)
    assert pictures.draw_pictures(run) == [run.loss_plot, run.memory_plot]
    yield run


def test_pictures_are_drawn_and_nothing_lies_beside(drawn: RunDir) -> None:
    for path in (drawn.loss_plot, drawn.memory_plot):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert not list(drawn.root.glob(".*"))


def test_pictures_of_a_run_without_steps_are_of_memory_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need it")
    run = make(tmp_path / "run", finished=False)
    write_rows(run, [])
    assert pictures.draw_pictures(run) == [run.memory_plot]
