"""What becomes of rows that are longer than `max_length`: counted in the profile, done in training.

Plain text is split anywhere, conversations before a question, each part with the system message:
so every answer is trained once, after the questions of its part. What cannot be split so is cut.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from msgspec import Struct, structs

from ftplan.launcher.data.rows import Row
from ftplan.planner.overlong import RowCounts


class Lengths(Struct, frozen=True):
    """Tokens of a row, and those of them that carry loss. `first`: tokens before the first that
    does; all, where none does. The very first token never does: nothing comes before it."""

    tokens: int
    trained: int
    first: int = 1


class Rule(Struct, frozen=True):
    """`mode`: one of `planner.overlong.OVERLONG`. `limit`: tokens of the longest row that is taken
    whole; None for any. `completion_length`: tokens that the model adds to each prompt."""

    mode: str = "truncate"
    limit: int | None = None
    completion_length: int = 0

    def completed(self, prompt: int) -> Lengths:
        """Of a prompt of so many tokens. Where that is too long there is no room for an answer."""
        tokens = prompt + self.completion_length
        return Lengths(tokens, self.completion_length, max(0, tokens - 1))

    def splits(self, row: Lengths) -> bool:
        return self.mode == "split" and self.limit is not None and row.tokens > self.limit


class Tally:
    """Decides about rows one by one, and counts. `happened`: to the latest row, by names of
    RowCounts."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.happened: set[str] = set()
        self._counts = dict.fromkeys(RowCounts.__struct_fields__, 0)

    @property
    def counts(self) -> RowCounts:
        return RowCounts(**self._counts)

    def take(self, whole: Lengths, pieces: Sequence[Lengths]) -> list[int]:
        """Tokens that are left of each piece, 0 of those that are left out. A row that is not split
        is its own and only piece."""
        limit = whole.tokens if self.rule.limit is None else self.rule.limit
        self._counts["num_rows"] += 1
        self.happened = set()
        if whole.tokens > limit:
            self._add("num_too_long")
            if self.rule.mode == "drop":
                self._add("num_dropped")
                return [0]
        if len(pieces) > 1:
            self._add("num_split")
            self._add("num_pieces", len(pieces))
        return [self._left(piece, limit) for piece in pieces]

    def take_whole(self, num_rows: int, num_tokens: int) -> None:
        """So many rows of which nothing is changed."""
        for name, more in (
            ("num_rows", num_rows),
            ("num_rows_left", num_rows),
            ("num_tokens", num_tokens),
        ):
            self._counts[name] += more

    def _left(self, piece: Lengths, limit: int) -> int:
        left = min(piece.tokens, limit)
        if piece.first >= left:
            self._add("num_without_answer")
            return 0
        if left < piece.tokens:
            self._add("num_cut")
            self._add("num_cut_tokens", piece.tokens - left)
        self._add("num_rows_left")
        self._add("num_tokens", left)
        return left

    def _add(self, name: str, more: int = 1) -> None:
        self._counts[name] += more
        self.happened.add(name)


def text_sizes(tokens: int, opening: int, limit: int) -> list[int]:
    """Into how many tokens each a text of so many is split: as few parts as hold it, of like size.

    `opening`: tokens that stand before each part; `tokens` counts them once.
    """
    room, text = limit - opening, tokens - opening
    if room < 1:
        return [text]
    parts = -(-text // room)
    return [text // parts + (number < text % parts) for number in range(parts)]


def text_pieces(whole: Lengths, opening: int, limit: int) -> list[Lengths]:
    """Lengths of the parts of a text."""
    sizes = text_sizes(whole.tokens, opening, limit)
    return [Lengths(opening + size, size, max(1, opening)) for size in sizes]


def turns_apart(row: Row, limit: int, tokens_of: Callable[[Row], int]) -> list[Row]:
    """A conversation as several, each with as many of the next turns as have room.

    A turn is a question with all that follows up to the next one. `tokens_of` is asked for the
    length of a conversation; more turns are taken to be more tokens.
    """
    system = row.messages[:1] if row.messages[0].role == "system" else ()
    turns = row.messages[len(system) :]
    begins = [number for number, message in enumerate(turns) if message.role == "user"]
    ends = [*begins[1:], len(turns)]

    def piece(first: int, last: int) -> Row:
        return structs.replace(row, messages=(*system, *turns[begins[first] : ends[last]]))

    pieces, first = [], 0
    while first < len(begins):
        least, most = first, len(begins) - 1  # the last turn: certainly and possibly
        while least < most:
            middle = (least + most + 1) // 2
            if tokens_of(piece(first, middle)) <= limit:
                least = middle
            else:
                most = middle - 1
        pieces.append(piece(first, least))
        first = least + 1
    return pieces


class Pieces:
    """Lengths of the pieces of some rows, by the row's place among those of a survey."""

    def __init__(self) -> None:
        self._rows, self._ends = array("Q"), array("Q")
        self._tokens, self._first = array("I"), array("I")

    def add(self, row: int, pieces: Sequence[Lengths]) -> None:
        """Rows come in order."""
        self._rows.append(row)
        self._tokens.extend(piece.tokens for piece in pieces)
        self._first.extend(piece.first for piece in pieces)
        self._ends.append(len(self._tokens))

    def merge(self, later: Pieces, rows_before: int) -> None:
        """Add those of rows that stand behind so many."""
        before = len(self._tokens)
        self._rows.extend(row + rows_before for row in later._rows)
        self._ends.extend(end + before for end in later._ends)
        self._tokens.extend(later._tokens)
        self._first.extend(later._first)

    def by_row(self) -> dict[int, list[Lengths]]:
        """All of them."""
        found, begin = {}, 0
        for row, end in zip(self._rows, self._ends, strict=True):
            each = zip(self._tokens[begin:end], self._first[begin:end], strict=True)
            found[row] = [Lengths(tokens, tokens - first, first) for tokens, first in each]
            begin = end
        return found


class Fate(Struct, frozen=True):
    """What becomes of the rows of one side. `lengths`: before; `left`: of what goes into training,
    and `owners` of which of the survey's rows those are. The others are the survey's rows to which
    each thing happens."""

    counts: RowCounts
    lengths: list[int]
    left: list[int]
    owners: array[int]
    too_long: array[int]
    split: array[int]
    cut: array[int]
    dropped: array[int]
    without_answer: array[int]
