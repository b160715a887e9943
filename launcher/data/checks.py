"""What is wrong with the text of rows: repeats, secrets, other languages, remains of other formats.

Rows are looked at some hundred at a time, in several processes, and nothing is left out here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ftplan.launcher.data.findings import Finding, Tallies, finding, tally_of
from ftplan.launcher.data.fingerprints import FIELD_END, NO_HASH, Repeats, digest, near_digest
from ftplan.launcher.data.languages import SAMPLE_BYTES, language
from ftplan.launcher.data.long_rows import Cuts, Lengths
from ftplan.launcher.data.odd_text import repeats_prompt
from ftplan.launcher.data.row_checks import Batch
from ftplan.launcher.data.similar_rows import RowSample

_BATCH_CHARACTERS = 1 << 16
_BATCH_ROWS = 512

_SHORT_ANSWER = 100  # bytes; the language of a shorter one is judged with its prompt


def row_language(prompt: str, answer: str) -> str:
    """The language of one row, as TextChecks judges it."""
    judged = answer if len(answer.encode()) >= _SHORT_ANSWER else f"{prompt} {answer}"
    return language(judged[:SAMPLE_BYTES].encode()[:SAMPLE_BYTES].lower())


class TextChecks:
    """Looks at rows one after the other; states of several processes are merged.

    `number`, here and in findings: a row's line or ordinal, or any other number below 2^64 that
    tells rows apart and grows through the file.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[int, str, str]] = []
        self._waiting_characters = 0
        self._num_rows = 0
        self._tallies, self._languages = Tallies(), Tallies()
        self._repeats, self._sample = Repeats(), RowSample()
        self._lengths, self._cuts = Lengths(), Cuts()

    def look(self, number: int, prompt: str, answer: str) -> None:
        """One row; `prompt` is empty for plain text, and all before the last answer for chats."""
        self._waiting.append((number, prompt, answer))
        self._waiting_characters += len(prompt) + len(answer)
        if self._waiting_characters >= _BATCH_CHARACTERS or len(self._waiting) >= _BATCH_ROWS:
            self._look_at_waiting()

    def merge(self, other: TextChecks, offset: int = 0) -> None:
        """Take in what another process has seen; `offset` is added to its numbers."""
        self._look_at_waiting()
        other._look_at_waiting()
        self._num_rows += other._num_rows
        self._tallies.merge(other._tallies, offset)
        self._languages.merge(other._languages, offset)
        self._repeats.merge(other._repeats, offset)
        self._sample.merge(other._sample, offset)
        self._lengths.merge(other._lengths, offset)
        self._cuts.merge(other._cuts, offset)

    def languages(self) -> Counter[str]:
        """How many rows are plainly in which language."""
        self._look_at_waiting()
        return Counter({name: tally.count for name, tally in self._languages.items()})

    def findings(self) -> list[Finding]:
        """After all rows: warnings, then notes, the most frequent first."""
        self._look_at_waiting()
        found = [*self._rows_like_others(), *self._rows_unlike_others()]
        found += [finding(kind, tally) for kind, tally in self._tallies.items()]
        return sorted(found, key=lambda f: (f.severity != "warning", -f.count, f.kind))

    def _rows_like_others(self) -> Iterator[Finding]:
        for kind, numbers in (
            ("repeats an earlier row", self._repeats.again()),
            (
                "repeats an earlier row but for case, punctuation, blanks or digits",
                self._repeats.nearly_again(),
            ),
            ("the prompt of an earlier row with another answer", self._repeats.answered_again()),
        ):
            if numbers:
                yield finding(kind, tally_of(numbers))
        similar = self._sample.similar()
        if similar:
            looked_at = len(self._sample.rows)
            detail = f"in a sample of {looked_at:,} rows" if looked_at < self._num_rows else ""
            yield finding("shares most of its words with an earlier row", tally_of(similar), detail)

    def _rows_unlike_others(self) -> Iterator[Finding]:
        if len(self._languages) > 1:
            most = max(self._languages, key=lambda name: (self._languages[name].count, name))
            judged = sum(tally.count for tally in self._languages.values())
            share = self._languages[most].count / judged
            for name, tally in self._languages.items():
                if name != most:
                    kind = f"another language than most ({name})"
                    yield finding(kind, tally, f"most are {most}: {share:.1%}")
        yield from self._lengths.findings()
        yield from self._cuts.findings()

    def _look_at_waiting(self) -> None:
        if not self._waiting:
            return
        rows, self._waiting, self._waiting_characters = self._waiting, [], 0
        self._num_rows += len(rows)
        batch = Batch(rows)
        self._remember(batch)
        self._judge_languages(batch)
        for number, prompt, answer in rows:
            self._lengths.add(number, len(prompt) + len(answer))
            if prompt:
                if len(answer) >= self._cuts.characters:
                    self._cuts.add(number, answer)
                if repeats_prompt(prompt, answer):
                    self._tallies.add("the answer repeats the prompt", number)
        for index, kinds in sorted(batch.kinds().items()):
            for kind in kinds:
                self._tallies.add(kind, rows[index][0])

    def _remember(self, batch: Batch) -> None:
        """Hash every row, and keep some for the comparison of words."""
        repeats, sample = self._repeats, self._sample
        start = len(repeats.whole)
        repeats.numbers.extend([number for number, _, _ in batch.rows])
        repeats.whole.frombytes(b"".join(map(digest, batch.parts)))
        repeats.near.frombytes(b"".join(map(near_digest, batch.parts, batch.letters, batch.ascii)))
        repeats.prompts.frombytes(
            b"".join(digest(prompt) if prompt else NO_HASH for prompt in batch.prompts)
        )
        for row, whole, near in zip(
            batch.rows, repeats.whole[start:], repeats.near[start:], strict=True
        ):
            if whole < sample.below:
                sample.add(whole, near, *row)

    def _judge_languages(self, batch: Batch) -> None:
        lowered, starts, ends = batch.lowered, batch.starts, batch.ends
        for index, prompt in enumerate(batch.prompts):
            answer = starts[index] + len(prompt) + 1
            if ends[index] - answer >= _SHORT_ANSWER:
                sample = lowered[answer : min(answer + SAMPLE_BYTES, ends[index])]
            else:
                sample = lowered[starts[index] : min(starts[index] + SAMPLE_BYTES, ends[index])]
                sample = sample.replace(FIELD_END, b" ")
            name = language(sample)
            if name:
                self._languages.add(name, batch.rows[index][0])
