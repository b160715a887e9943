"""The fuzzer of data files: a short run of it, and that it finds what is planted."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftplan.launcher.data.data_file import DataFile
from tests.fuzz import __main__ as fuzz
from tests.fuzz import corpus, runner, target
from tests.fuzz.inputs import Input, Options, load
from tests.fuzz.runner import Fuzzer, Limits, minimized

LIMITS = Limits(seconds=20.0)


def test_a_short_run_finds_nothing() -> None:
    fuzzer = Fuzzer(seed=1, limits=LIMITS)
    fuzzer.run(tries=250)
    assert fuzzer.num_tries == 250
    assert {finding.kind: finding.details for finding in fuzzer.findings.values()} == {}
    assert len(fuzzer.seen) > 100


@settings(max_examples=60)
@given(st.binary(max_size=200) | st.sampled_from([content for _, content in corpus.seeds()]))
def test_the_entry_point_of_other_fuzzers_takes_any_bytes(data: bytes) -> None:
    target.TestOneInput(data)


def test_every_format_of_the_corpus_is_read() -> None:
    """Each format, compression and encoding gives rows to train on somewhere."""
    found = set()
    with tempfile.TemporaryDirectory() as folder:
        for name, content in corpus.seeds():
            Input(((name, content),)).save(Path(folder))
            found |= target.look(Path(folder) / "data", Options())
    plain = {"JSON lines", "JSON", "CSV", "TSV", "Parquet", "Arrow"}
    packed = {f"JSON lines {packing} utf-8" for packing in ("gzip", "bzip2", "xz", "zstd")}
    coded = {f"JSON lines  {name}-{end}" for name in ("utf-16", "utf-32") for end in ("le", "be")}
    assert {f"{kind}  utf-8" for kind in plain} | packed | coded <= found


class TestWhatIsPlanted:
    """Whatever goes wrong for rows that hold a word, which stands in a seventh of the corpus."""

    WORD = b"Weather?"

    def look(self, folder: Path, options: Options) -> frozenset[str]:
        if any(self.WORD in path.read_bytes() for path in folder.iterdir()):
            self.go_wrong()
        return frozenset()

    def go_wrong(self) -> None:
        raise KeyError("planted")

    def kinds(self, monkeypatch: pytest.MonkeyPatch, wrong: Any, **limits: Any) -> set[str]:
        monkeypatch.setattr(self, "go_wrong", wrong)
        fuzzer = Fuzzer(seed=0, limits=Limits(**limits), look=self.look)
        fuzzer.run(tries=20)
        assert fuzzer.num_tries >= 20  # it went on behind what it found
        return set(fuzzer.findings)

    def test_an_exception(self, monkeypatch: pytest.MonkeyPatch) -> None:
        (kind,) = self.kinds(monkeypatch, self.go_wrong)
        assert kind.startswith("KeyError at test_fuzz.py")

    def test_a_hang(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def wrong() -> None:
            while True:
                pass

        assert self.kinds(monkeypatch, wrong, seconds=0.2) == {"hang"}

    def test_a_crash(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def wrong() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        assert self.kinds(monkeypatch, wrong) == {"crash: SIGKILL"}

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems keep no limit of memory")
    def test_too_much_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        (kind,) = self.kinds(monkeypatch, lambda: bytearray(2**31), memory_bytes=2**30)
        assert kind.startswith("MemoryError")

    def test_it_is_made_small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runner, "_SECONDS_TO_MINIMIZE", 600.0)  # a slow machine needs them
        fuzzer = Fuzzer(seed=0, limits=LIMITS, look=self.look)
        fuzzer.run(tries=20)
        (finding,) = fuzzer.findings.values()
        small = minimized(finding, LIMITS, self.look)
        assert [content for _, content in small.files] == [self.WORD]
        assert small.options == Options()


def test_a_result_that_does_not_add_up_is_kept_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = DataFile.left_out

    def one_less(self: DataFile) -> Iterator[Any]:
        return iter(list(whole(self))[1:])

    monkeypatch.setattr(DataFile, "left_out", one_less)
    monkeypatch.setattr(runner, "_TRIES_TO_MINIMIZE", 40)
    assert fuzz.main(["--tries", "12", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "12 inputs" in said and "AssertionError at target.py" in said
    (place,) = tmp_path.iterdir()
    assert load(place / "minimized").size <= load(place / "as_found").size
    text = (place / "finding.txt").read_text()
    assert "seed 0, try" in text and f"--again {place / 'minimized'}" in text
    with pytest.raises(AssertionError):
        fuzz.main(["--again", str(place / "minimized")])
    monkeypatch.undo()
    assert fuzz.main(["--again", str(place / "minimized")]) == 0


def test_a_seed_gives_the_same_inputs() -> None:
    one, two, other = Fuzzer(seed=3), Fuzzer(seed=3), Fuzzer(seed=4)
    assert [one.made(n) for n in range(30)] == [two.made(n) for n in range(30)]
    assert [one.made(n) for n in range(30)] != [other.made(n) for n in range(30)]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sys.monitoring is of Python 3.12")
def test_new_lines_of_code_count_as_something_new() -> None:
    lines = runner._Lines()
    try:
        with tempfile.TemporaryDirectory() as folder:
            Input((("a.jsonl", b'{"text": "a"}\n{"text": "b"}\n'),)).save(Path(folder))
            target.look(Path(folder) / "data", Options())
            first = lines.new()
            target.look(Path(folder) / "data", Options())
        assert any(line.startswith("shapes.py:") for line in first)
        assert not lines.new()
    finally:
        getattr(sys, "monitoring").free_tool_id(runner._Lines._TOOL)  # noqa: B009
