"""One input through all that reads data: what may happen is a result that adds up, or InputError.

`TestOneInput` is the entry point of coverage-guided fuzzers such as atheris.
"""

from __future__ import annotations

import io
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from ftplan.launcher import cli
from ftplan.launcher.commands import data as data_command
from ftplan.launcher.data import data_file, views
from ftplan.launcher.data.data_file import DataFile, read_data
from ftplan.launcher.data.overlong import Rule, Tally
from ftplan.launcher.data.profiling import make_split, profile_data, profile_to_dict
from ftplan.launcher.data.tokens import RowTokenizer
from ftplan.launcher.training.rows import MAKERS
from ftplan.launcher.ui import Ui
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import InputError
from ftplan.planner.overlong import OVERLONG
from ftplan.profiles import require_model
from tests.fuzz.corpus import NAMES
from tests.fuzz.inputs import Input, Options
from tests.launcher_fixtures import CHATML, tiny_tokenizer

TEMPLATES = {"": None, "plain": None, "chat": CHATML}
OBJECTIVES = ("sft", "dpo", "kto", "reward", "grpo")
_MODEL = "smollm2-135m-instruct"
_MAX_LENGTH = 64
_DIGITS = re.compile(r"[0-9]+|`[^`]*`|0x[0-9a-f]+")


@cache
def _tokenizer(name: str) -> RowTokenizer | None:
    return RowTokenizer(tiny_tokenizer(TEMPLATES[name])) if name else None


def prepare() -> None:
    """Load what every try needs, once, before processes are made."""
    for name in TEMPLATES:
        _tokenizer(name)


def look(folder: Path, options: Options) -> frozenset[str]:
    """Read the folder's files in every way; what it did, in words that alike inputs share.

    Raises AssertionError for a result that does not add up, and whatever the readers should not.
    """
    paths = [folder] if options.folder else sorted(folder.iterdir())
    with ExitStack() as patched:
        # Small files are sampled, and read side by side, like large ones.
        patched.enter_context(mock.patch.object(data_file, "LEAST_BYTES", 0))
        patched.enter_context(mock.patch.object(data_file, "_BYTES_FOR_PROCESSES", 0))
        try:
            data = _read(paths, options)
        except InputError as error:
            said = _checked_error(error)
        else:
            said = frozenset(_checked(data, options, paths))
        if options.command:
            said |= _checked_command(paths, options)
    return said


def _read(paths: list[Path], options: Options) -> DataFile:
    return read_data(
        paths,
        columns=options.columns,
        objective=options.objective,
        tokenizer=_tokenizer(options.tokenizer),
        processes=options.processes,
        sample=options.sample,
    )


def _checked_error(error: InputError) -> frozenset[str]:
    assert error.message and "\n" not in error.message, "an error is one line"
    assert _is_printable(error.message + (error.hint or "")), "an error can be written"
    return frozenset([_alike(f"error: {error.message}")])


def _is_printable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _alike(text: str) -> str:
    """Without numbers and quotations."""
    return _DIGITS.sub("", text)[:100]


def _checked(data: DataFile, options: Options, paths: list[Path]) -> Iterator[str]:
    yield f"{data.format}, {data.kind}, {data.objective}"
    yield from (f"{file.format} {file.compression} {file.encoding}" for file in data.source.files)
    yield from map(_alike, data.troubles)
    yield from map(_alike, data.notes())
    _check_troubles(data)
    if options.sample is None:
        _check_rows_read_again(data)
    if options.processes > 1:
        _check_alone(data, options, paths)
    try:
        split = make_split(data, None, 0.1)
        profile = profile_data(data, split)
    except InputError as error:
        yield from _checked_error(error)
        return
    yield from (_alike(problem.kind) for problem in profile.problems)
    _check_profile(data, profile, options)
    yield from _checked_training(data, options)


def _check_troubles(data: DataFile) -> None:
    used = sum(data.used())
    left_out = sum(trouble.count for trouble in data.troubles.values())
    assert data.num_rows == used + left_out, f"{data.num_rows} != {used} + {left_out}"
    assert used > 0
    first = 0 if data.sample else 1
    for kind, trouble in data.troubles.items():
        assert kind and _is_printable(kind)
        assert 1 <= len(trouble.first) <= trouble.count
        assert all(number >= first for _, number in trouble.first)
        assert data.where(trouble)


def _check_rows_read_again(data: DataFile) -> None:
    left_out = list(data.left_out())
    assert all(why and number >= 1 for (_, number), why in left_out)
    kinds = Counter[str]()
    for kind, trouble in data.troubles.items():
        kinds[_kind(kind)] += trouble.count
    again = Counter(_kind(why) for _, why in left_out)
    assert again == kinds, f"{again} != {kinds}"
    rows = list(data.rows())
    assert len(rows) == len(data.groups()), f"{len(rows)} rows, {len(data.groups())} groups"
    for row in rows:
        assert row.number >= 1 and all(map(_is_printable, row.texts))


def _kind(why: str) -> str:
    return why.partition(",")[0].partition(":")[0]


def _check_alone(data: DataFile, options: Options, paths: list[Path]) -> None:
    """Processes side by side find what one does. Rows within a comment of several lines deceive
    what looks for a row's beginning."""
    if any(b"/*" in path.read_bytes() for path in paths if path.is_file()):
        return
    alone = _read(paths, Options(**{**_fields(options), "processes": 1}))
    for name in ("files", "numbers", "shapes", "groups", "tokens", "trained"):
        assert getattr(alone.survey, name) == getattr(data.survey, name), name
    assert _troubles(alone) == _troubles(data)
    assert alone.odd_rows() == data.odd_rows()


def _fields(options: Options) -> dict[str, Any]:
    return {name: getattr(options, name) for name in options.__struct_fields__}


def _troubles(data: DataFile) -> dict[str, tuple[int, list[tuple[int, int]]]]:
    return {kind: (trouble.count, trouble.first) for kind, trouble in data.troubles.items()}


def _check_profile(data: DataFile, profile: DataProfile, options: Options) -> None:
    described = profile_to_dict(profile, require_model(_MODEL).spec)
    assert json.loads(json.dumps(described, allow_nan=False)) is not None
    if options.sample is None:
        parts = profile.num_train_rows + profile.num_eval_rows + profile.num_test_rows
        assert parts == profile.num_usable_rows == sum(data.used())
        assert profile.num_train_rows == len(profile.lengths)
        assert 0 <= profile.trained_tokens <= profile.total_tokens == sum(profile.lengths)
    printed = io.StringIO()
    Ui(stdout=printed, width=80).show(*views.report(profile, described, ""))
    assert printed.getvalue()


def _checked_training(data: DataFile, options: Options) -> Iterator[str]:
    """Training sees as many tokens as were counted, and no row longer than it may be."""
    tokenizer = _tokenizer(options.tokenizer)
    if tokenizer is None or options.sample is not None or data.objective == "grpo":
        return
    rows = list(data.rows())
    counted = [n for n, used in zip(data.survey.tokens, data.used(), strict=True) if used]
    single = [(row, n) for row, n in zip(rows, counted, strict=True) if not row.rejected]
    tokenized = list(tokenizer.tokenize([row for row, _ in single]))
    lengths = [len(one.input_ids) for one in tokenized]
    assert lengths == [n for _, n in single], f"{lengths[:9]} tokens, counted {counted[:9]}"
    mode = OVERLONG[len(rows) % len(OVERLONG)]
    tally = Tally(Rule(mode, _MAX_LENGTH))
    made = list(MAKERS[data.objective](tokenizer, tally).rows(rows))
    assert tally.counts.num_rows == len(rows)
    assert tally.counts.num_rows_left == len(made)
    assert all(0 < length <= _MAX_LENGTH for _, length in made)
    yield f"{mode}: {sorted(tally.happened)}"


def _checked_command(paths: list[Path], options: Options) -> frozenset[str]:
    """`ftplan data --json` and `ftplan data`: one JSON object, or an error for people."""
    words = ["data", *map(str, paths)]
    if options.objective:
        words += ["--objective", options.objective]
    if options.sample is not None and options.sample >= 100:
        words += ["--sample", str(options.sample)]
    said = set()
    for more in (["--json"], []):
        out, err = io.StringIO(), io.StringIO()
        tokenizer = mock.Mock(return_value=_tokenizer(options.tokenizer))
        with (
            mock.patch.object(data_command, "tokenizer_of", tokenizer),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            status = cli.main([*words, *more])
        assert status in (0, 2), f"exit status {status}"
        if status == 2:
            assert err.getvalue().startswith("error: ") and not out.getvalue()
        elif more:
            assert json.loads(out.getvalue())["num_rows"] > 0
        said.add(f"{' '.join(more)} {status}")
    return frozenset(said)


def options_of(rng: Random) -> Options:
    """How an input is read: mostly simply, sometimes in every other way."""

    def sometimes(share: float, value: Any, otherwise: Any) -> Any:
        return value if rng.random() < share else otherwise

    return Options(
        tokenizer=sometimes(0.35, rng.choice(("plain", "chat")), ""),
        processes=sometimes(0.02, 2, 1),
        sample=sometimes(0.05, rng.choice((1, 3, 100)), None),
        objective=sometimes(0.1, rng.choice(OBJECTIVES), None),
        columns=sometimes(
            0.1, rng.choice(({"output": "text"}, {"text": "output", "prompt": "question"})), {}
        ),
        command=sometimes(0.03, True, False),
        folder=sometimes(0.1, True, False),
    )


def TestOneInput(data: bytes) -> None:
    """For a fuzzer that gives bytes: the first two choose the file's name and how it is read.

    atheris.Setup(sys.argv, TestOneInput); atheris.Fuzz()
    """
    chosen, content = data[:2].ljust(2, b"\0"), data[2:]
    tried = Input(((NAMES[chosen[0] % len(NAMES)], content),), options_of(Random(chosen[1])))
    with tempfile.TemporaryDirectory() as folder:
        tried.save(Path(folder))
        look(Path(folder) / "data", tried.options)
