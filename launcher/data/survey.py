"""One pass over a data file: what each row is, how long it is, and what is wrong with it.

Of a row only some numbers are kept, in arrays, so that a file of millions of rows is looked at
within little memory. The parts of a large file are looked at by processes side by side.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b

from msgspec import structs

from ftplan.launcher.data.checks import TextChecks, row_language
from ftplan.launcher.data.labels import LabelCodes
from ftplan.launcher.data.overlong import Lengths, Pieces, Rule, text_pieces, turns_apart
from ftplan.launcher.data.patterns import Segment
from ftplan.launcher.data.records import FIRST_NUMBERS, Note, Record, merged
from ftplan.launcher.data.rows import Messages, Row
from ftplan.launcher.data.shapes import SHAPES, Unusable, renamed, row_of, shapes_of
from ftplan.launcher.data.tokens import RowTokenizer
from ftplan.planner.objectives import OBJECTIVES

# Characters a token, where no tokenizer is at hand: about 4 in English text (GPT-2's byte-pair
# encoding and its successors); the template adds a few tokens a message.
CHARACTERS_PER_TOKEN = 4.0
_TEMPLATE_TOKENS_PER_MESSAGE = 5

_ROWS_AT_ONCE = 512

# Without checks, rows whose language is judged: the first of each file, then one of so many.
_FIRST_ROWS_JUDGED = 256
_ROWS_FOR_ONE_JUDGED = 8
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


class RowMeasure:
    """How long rows are in tokens: exactly by a tokenizer, else by their characters.

    `objective`: what rows train, where that is known; else what their shape is for.
    """

    def __init__(
        self,
        tokenizer: RowTokenizer | None,
        objective: str | None = None,
        rule: Rule = Rule(),  # noqa: B008 - frozen
    ) -> None:
        self.tokenizer = tokenizer
        self.rule = rule
        self._takes_chosen = objective == "sft"
        self._takes_prompts = objective is not None and OBJECTIVES[objective].generates
        self._counter = None
        if tokenizer is not None:
            from ftplan.launcher.data.lengths import TokenCounter  # NumPy comes with tokenizers

            self._counter = TokenCounter(tokenizer.tokenizer)

    def lengths(self, rows: list[Row]) -> list[Lengths]:
        """Of each row; of a pair, with the longer answer.

        Raises InputError for a row that the chat template refuses.
        """
        if self._takes_prompts:
            prompts = self._lengths([row.as_prompt() for row in rows])
            return [self.rule.completed(prompt.tokens) for prompt in prompts]
        return self._lengths([self._trained(row) for row in rows])

    def _trained(self, row: Row) -> Row:
        return row.with_chosen_alone() if self._takes_chosen else row

    def _lengths(self, rows: list[Row]) -> list[Lengths]:
        if self.tokenizer is None or self._counter is None:
            return [_estimated(row) for row in rows]
        cut = [_sequences(self.tokenizer, row) for row in rows]
        texts = [s.text for sequences in cut for segments in sequences for s in segments]
        counts = iter(self._counter.counts(texts))
        found = []
        for row, sequences in zip(rows, cut, strict=True):
            opening = self.tokenizer.opening_tokens(row, sequences[0])
            counted = [[next(counts) for _ in segments] for segments in sequences]
            if row.is_compared:
                asked = opening + counted[0][0]
                answer = max(answer for _, answer in counted)
                found.append(Lengths(asked + answer, answer, asked))
            else:
                trained = [segment.trained for segment in sequences[0]]
                found.append(_of_segments(opening, counted[0], trained, row.is_prompt))
        return found

    def pieces(self, row: Row, whole: Lengths) -> list[Lengths]:
        """Of the rows that it is split into; itself alone where it cannot be split."""
        row, limit = self._trained(row), self.rule.limit
        assert limit is not None, "nothing is too long"
        if row.text:
            return text_pieces(whole, self._opening(row), limit)
        if row.is_compared or row.is_prompt or self._takes_prompts:
            return [whole]
        pieces = turns_apart(row, limit, lambda piece: self.lengths([piece])[0].tokens)
        return self.lengths(pieces) if len(pieces) > 1 else [whole]

    def _opening(self, row: Row) -> int:
        if self.tokenizer is None:
            return 0
        return self.tokenizer.opening_tokens(row, self.tokenizer.segments(row))


def _sequences(tokenizer: RowTokenizer, row: Row) -> list[list[Segment]]:
    """The row's text as it is trained on: whole, or with each of the compared answers."""
    return tokenizer.compared(row) if row.is_compared else [tokenizer.segments(row)]


def _of_segments(
    opening: int, counts: Sequence[int], trained: Sequence[bool], is_prompt: bool
) -> Lengths:
    tokens = opening + sum(counts)
    if is_prompt:
        return Lengths(tokens, 0, 0)
    place, first, carry = opening, tokens, 0
    for count, carries in zip(counts, trained, strict=True):
        if carries and count:
            carry += count
            if place + count > 1:
                first = min(first, max(1, place))
        place += count
    return Lengths(tokens, carry, first)


def estimated_tokens(row: Row) -> int:
    """Tokens of a row by its characters."""
    return _estimated(row).tokens


def _estimated(row: Row) -> Lengths:
    """Of a pair, with the longer answer."""
    if not row.rejected:
        return _estimated_version(row)
    versions = (
        structs.replace(row, messages=(*row.messages, *answers), chosen=(), rejected=())
        for answers in (row.chosen, row.rejected)
    )
    return max(map(_estimated_version, versions), key=lambda one: one.tokens)


def _estimated_version(row: Row) -> Lengths:
    texts = row.texts
    tokens = max(1, round(sum(map(len, texts)) / CHARACTERS_PER_TOKEN))
    trained = min(tokens, max(1, round(len(row.answer) / CHARACTERS_PER_TOKEN)))
    tokens += _TEMPLATE_TOKENS_PER_MESSAGE * len(texts)
    first = 0 if row.is_prompt else 1 if row.text else tokens - trained
    return Lengths(tokens, trained, first)


class Survey:
    """What a pass found. Arrays have an entry for each readable row, in the file's order.

    `groups`: 64 bits that rows with the same prompt share. `shapes`: index into SHAPES. `tokens`,
    `trained`, `first`: a row's `Lengths`. `pieces`: of rows that are to be split. `tasks`: how
    often each task is named; `task_codes`: a row's place among them from 1, 0 for none.
    """

    def __init__(self, checks: bool = True) -> None:
        self.num_rows = 0
        self.files = array("H")
        self.numbers = array("Q")
        self.shapes = array("B")
        self.groups = array("Q")
        self.tokens = array("I")
        self.trained = array("I")
        self.first = array("I")
        self.task_codes = array("I")
        self.labels = LabelCodes()
        self.pieces = Pieces()
        self.troubles: dict[str, Trouble] = {}
        self.readings: Counter[tuple[str, str]] = Counter()
        self.tasks: dict[str, int] = {}
        self._task_places: dict[str, int] = {"": 0}
        self.num_margins = 0
        self.checks = TextChecks() if checks else None
        self._languages: Counter[str] = Counter()
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
        self._name_task(row.task)
        self.labels.take(row)
        self.num_margins += row.margin is not None
        self.files.append(record.file)
        self.numbers.append(record.number)
        self.shapes.append(_NUMBER_OF_SHAPE[shape.name])
        prompt = row.prompt
        self.groups.append(_group(prompt, row.text))
        if self.checks is not None:
            self.checks.look(code_of(place), _joined(prompt), row.answer)
        elif record.number <= _FIRST_ROWS_JUDGED or not self.groups[-1] % _ROWS_FOR_ONE_JUDGED:
            self._languages[row_language(_joined(prompt), row.answer)] += 1
        self._pending.append(row)
        if len(self._pending) == _ROWS_AT_ONCE:
            self.measure(measure)

    def _name_task(self, task: str) -> None:
        """Of the next row; empty for none."""
        self.task_codes.append(self._place_of_task(task))
        if task:
            self.tasks[task] += 1

    def _place_of_task(self, task: str) -> int:
        place = self._task_places.setdefault(task, len(self._task_places))
        if place > len(self.tasks):
            self.tasks[task] = 0
        return place

    def measure(self, measure: RowMeasure) -> None:
        """The lengths of the rows that were taken since."""
        for row, lengths in zip(self._pending, measure.lengths(self._pending), strict=True):
            if measure.rule.splits(lengths):
                self.pieces.add(len(self.tokens), measure.pieces(row, lengths))
            self.tokens.append(lengths.tokens)
            self.trained.append(lengths.trained)
            self.first.append(lengths.first)
        self._pending = []

    def _trouble(self, kind: str, place: Place) -> None:
        self.troubles.setdefault(kind, Trouble()).add(place)

    @property
    def language(self) -> str:
        """The language of most rows in which it is plain; empty where it is in none."""
        found = self._languages if self.checks is None else self.checks.languages()
        plain = {name: count for name, count in found.items() if name}
        return max(plain, key=lambda name: (plain[name], name), default="")

    def places(self, shape: int) -> Iterator[Place]:
        """Where rows of a shape stand."""
        for number, found in enumerate(self.shapes):
            if found == shape:
                yield self.files[number], self.numbers[number]

    def merge(self, later: Survey) -> None:
        """Add what the next part of the source has."""
        self.num_rows += later.num_rows
        self.pieces.merge(later.pieces, rows_before=len(self.tokens))
        for name in ("files", "numbers", "shapes", "groups", "tokens", "trained", "first"):
            getattr(self, name).extend(getattr(later, name))
        for kind, trouble in later.troubles.items():
            self.troubles.setdefault(kind, Trouble()).merge(trouble)
        self.readings += later.readings
        place_here = [0, *map(self._place_of_task, later.tasks)]
        self.task_codes.extend(place_here[code] for code in later.task_codes)
        for task, count in later.tasks.items():
            self.tasks[task] += count
        self.labels.merge(later.labels)
        self.num_margins += later.num_margins
        self._languages += later._languages
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
