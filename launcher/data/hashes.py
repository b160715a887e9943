"""Short names for how rows are read, divided and rendered: what a run checks before it trains."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

from msgspec import Struct, structs

from ftplan.launcher.data.data_file import DataFile
from ftplan.launcher.data.split import Split
from ftplan.launcher.data.tokens import RowTokenizer


class RowHashes(Struct, frozen=True, kw_only=True):
    """SHA-256 sums that decide, beside the files' own, which tokens are trained on.

    `reading_sha256`: columns and objective, by which rows are read. `split_sha256`: the prompts
    that are held out and those kept for a test, or the file of held-out rows. `template_sha256`:
    the text of the template.
    """

    reading_sha256: str
    split_sha256: str
    template_sha256: str

    def differing(self, planned: RowHashes) -> str | None:
        """What is not as planned, in words; None where all is."""
        for name, words in _WORDS.items():
            if getattr(self, name) != getattr(planned, name):
                return words
        return None

    def to_dict(self) -> dict[str, str]:
        return structs.asdict(self)


_WORDS = {
    "reading_sha256": "the columns or the objective by which rows are read are others",
    "split_sha256": "other rows are held out",
    "template_sha256": "the template is another one",
}


def row_hashes(
    data: DataFile, split: Split, eval_data: DataFile | None, tokenizer: RowTokenizer
) -> RowHashes:
    """Of a run, as it is planned and as it is trained."""
    return RowHashes(
        reading_sha256=_of({"columns": dict(data.columns), "objective": data.objective}),
        split_sha256=_of(
            {
                "held_out": sorted(split.held_out),
                "test": sorted(split.test),
                "eval_data": eval_data.sha256 if eval_data else None,
            }
        ),
        template_sha256=_of({"chat": tokenizer.has_chat_template, "text": tokenizer.template_text}),
    )


def _of(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
