"""One pass over a data file: what each row is, how long it is, and what is wrong with it.

Of a row only some numbers are kept, in arrays, so that a file of millions of rows is looked at
within little memory. The parts of a large file are looked at by processes side by side.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b

from msgspec import Struct

from ftplan.launcher.data.checks import TextChecks
from ftplan.launcher.data.lengths import TokenCounter
from ftplan.launcher.data.records import FIRST_NUMBERS, Note, Record, merged
from ftplan.launcher.data.rows import Messages, Row
from ftplan.launcher.data.shapes import SHAPES, Unusable, renamed, row_of, shapes_of
from ftplan.launcher.data.tokens import RowTokenizer

# Characters a token, where no tokenizer is at hand: about 4 in English text (GPT-2's byte-pair
# encoding and its successors); the template adds a few tokens a message.
_CHARACTERS_PER_TOKEN = 4.0
_TEMPLATE_TOKENS_PER_MESSAGE = 5

_ROWS_AT_ONCE = 512
_NUMBER_OF_SHAPE = {shape.name: number for number, shape in enumerate(SHAPES)}

Place = tuple[int, int]
"""(file, number) of a row."""


class Trouble:
    """A kind of trouble: how often, and where first."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[Place] = []

    def add(self, place: Place) -> None:
        self.count += 1
        if len(self.first) < FIRST_NUMBERS:
            self.first.append(place)

    def merge(self, other: Trouble) -> None:
        """What a later part of the file has."""
        self.count += other.count
        self.first = sorted(self.first + other.first)[:FIRST_NUMBERS]


class Lengths(Struct, frozen=True):
    """Tokens of a row, and those of them that carry loss."""

    tokens: int
    trained: int


class RowMeasure:
    """How long rows are in tokens: exactly by a tokenizer, else by their characters."""

    def __init__(self, tokenizer: RowTokenizer | None) -> None:
        self.tokenizer = tokenizer
        self._counter = TokenCounter(tokenizer.tokenizer) if tokenizer else None

    def lengths(self, rows: list[Row]) -> list[Lengths]:
        """Of each row; of a pair, the longer answer's.

        Raises InputError for a row that the chat template refuses.
        """
        if self.tokenizer is None or self._counter is None:
            return [_estimated(row) for row in rows]
        versions = [version for row in rows for version in _versions(row)]
        cut = [self.tokenizer.segments(version) for version in versions]
        counts = iter(self._counter.counts([s.text for segments in cut for s in segments]))
        found = []
        for version, segments in zip(versions, cut, strict=True):
            each = [(next(counts), segment.trained) for segment in segments]
            opening = self.tokenizer.opening_tokens(version, segments)
            tokens = opening + sum(count for count, _ in each)
            found.append(Lengths(tokens, sum(count for count, trained in each if trained)))
        longest = iter(found)
        return [_longer([next(longest) for _ in _versions(row)]) for row in rows]


def _versions(row: Row) -> tuple[Row, ...]:
    """A pair as two conversations; every other row as it is."""
    if not row.rejected:
        return (row,)
    return tuple(
        Row(number=row.number, messages=(*row.messages, *answers), tools=row.tools)
        for answers in (row.chosen, row.rejected)
    )


def _longer(lengths: list[Lengths]) -> Lengths:
    return max(lengths, key=lambda one: one.tokens)


def estimated_tokens(row: Row) -> int:
    """Tokens of a row by its characters."""
    return _estimated(row).tokens


def _estimated(row: Row) -> Lengths:
    return _longer([_estimated_version(version) for version in _versions(row)])


def _estimated_version(row: Row) -> Lengths:
    texts = row.texts
    tokens = max(1, round(sum(map(len, texts)) / _CHARACTERS_PER_TOKEN))
    trained = max(1, round(len(row.answer) / _CHARACTERS_PER_TOKEN))
    return Lengths(tokens + _TEMPLATE_TOKENS_PER_MESSAGE * len(texts), min(trained, tokens))


class Survey:
    """What a pass found. Arrays have an entry for each readable row, in the file's order.

    `groups`: 64 bits that rows with the same prompt share. `shapes`: index into SHAPES.
    """

    def __init__(self, checks: bool = True) -> None:
        self.num_rows = 0
        self.files = array("H")
        self.numbers = array("Q")
        self.shapes = array("B")
        self.groups = array("Q")
        self.tokens = array("I")
        self.trained = array("I")
        self.troubles: dict[str, Trouble] = {}
        self.readings: Counter[tuple[str, str]] = Counter()
        self.tasks: Counter[str] = Counter()
        self.num_margins = 0
        self.checks = TextChecks() if checks else None
        self.notes: tuple[Note, ...] = ()
        self._pending: list[Row] = []

    def take(self, record: Record, columns: Mapping[str, str], measure: RowMeasure) -> None:
        """Look at one more row."""
        self.num_rows += 1
        place = (record.file, record.number)
        if record.broken:
            self._trouble(record.broken.partition(",")[0].partition(":")[0], place)
            return
        try:
            value = renamed(record.value, columns) if columns else record.value
            shape, *others = shapes_of(value)
            row = row_of(record.number, value, shape, record.file)
        except Unusable as why:
            self._trouble(str(why), place)
            return
        for other in others:
            self.readings[shape.name, other.name] += 1
        if row.task:
            self.tasks[row.task] += 1
        self.num_margins += row.margin is not None
        self.files.append(record.file)
        self.numbers.append(record.number)
        self.shapes.append(_NUMBER_OF_SHAPE[shape.name])
        prompt = row.prompt
        self.groups.append(_group(prompt, row.text))
        if self.checks is not None:
            self.checks.look(code_of(place), _joined(prompt), row.answer)
        self._pending.append(row)
        if len(self._pending) == _ROWS_AT_ONCE:
            self.measure(measure)

    def measure(self, measure: RowMeasure) -> None:
        """The lengths of the rows that were taken since."""
        for lengths in measure.lengths(self._pending):
            self.tokens.append(lengths.tokens)
            self.trained.append(lengths.trained)
        self._pending = []

    def _trouble(self, kind: str, place: Place) -> None:
        self.troubles.setdefault(kind, Trouble()).add(place)

    def places(self, shape: int) -> Iterator[Place]:
        """Where rows of a shape stand."""
        for number, found in enumerate(self.shapes):
            if found == shape:
                yield self.files[number], self.numbers[number]

    def merge(self, later: Survey) -> None:
        """Add what the next part of the source has."""
        self.num_rows += later.num_rows
        for name in ("files", "numbers", "shapes", "groups", "tokens", "trained"):
            getattr(self, name).extend(getattr(later, name))
        for kind, trouble in later.troubles.items():
            self.troubles.setdefault(kind, Trouble()).merge(trouble)
        self.readings += later.readings
        self.tasks += later.tasks
        self.num_margins += later.num_margins
        self.notes = merged((*self.notes, *later.notes))
        if self.checks is not None and later.checks is not None:
            self.checks.merge(later.checks)


def prompt_text(row: Row) -> str:
    """All that is asked, as checks take it."""
    return _joined(row.prompt)


def _joined(prompt: Messages) -> str:
    if len(prompt) == 1:
        return prompt[0].content
    return "\n".join([message.content for message in prompt])


# Numbers of rows, within one that has the file's number above them.
_BITS_OF_NUMBER = 40


def code_of(place: Place) -> int:
    """One number that grows through all files."""
    return place[0] << _BITS_OF_NUMBER | place[1]


def place_of(code: int) -> Place:
    """The place that checks were told as one number."""
    return code >> _BITS_OF_NUMBER, code & ((1 << _BITS_OF_NUMBER) - 1)


def group_of(row: Row) -> int:
    """64 bits that rows with the same prompt share, and rows of the same text without a prompt.
    Keyed, so that sorting by them shuffles, always alike."""
    return _group(row.prompt, row.text)


def _group(prompt: Messages, text: str) -> int:
    if len(prompt) == 1:
        text = f"{prompt[0].role}\0{prompt[0].content}"
    elif prompt:
        text = "\0".join([f"{message.role}\0{message.content}" for message in prompt])
    hashed = _KEYED.copy()
    hashed.update(text.encode())
    return int.from_bytes(hashed.digest(), "little")


_KEYED = blake2b(digest_size=8, key=b"ftplan")


def survey_records(
    records: Iterable[Record],
    columns: Mapping[str, str],
    measure: RowMeasure,
    *,
    checks: bool = True,
) -> Survey:
    """One pass, in this process."""
    survey = Survey(checks)
    for record in records:
        survey.take(record, columns, measure)
    survey.measure(measure)
    return survey
