"""Text of data, files and models on a terminal: shown, never obeyed."""

from __future__ import annotations

import re

# Control characters but tab and line feed: escape sequences begin with one of them, of 7 bits or 8.
# Embeddings, overrides and isolates of bidirectional text change the order in which a line is
# shown (Unicode TR 9, 2); marks of direction alone do not.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def escaped(text: str) -> str:
    """The text with what a terminal would obey written out: `\\x1b`, `\\u202e`."""
    return _COMMANDS.sub(lambda found: ascii(found[0])[1:-1], text)
