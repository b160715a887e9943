"""Elements of a page. Whatever is shown becomes HTML in `escaped`, and nowhere else."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable
from typing import TypeAlias

from msgspec import Struct

Child: TypeAlias = "Html | str | int | Iterable[Child] | None"

# Kept of the characters that nobody sees: those that join letters and emoji.
_KEPT = frozenset("\n\t\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}")

# Controls, formats (with them what turns the direction of writing), halves of characters, unknown
# ones, and breaks of lines and paragraphs that only Unicode knows.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})

_EMPTY = frozenset({"meta", "line", "path", "polyline", "rect", "br", "col"})


class Html(Struct, frozen=True):
    """Markup that is safe: made by `tag`, `style` and `join` alone."""

    markup: str


def escaped(text: object) -> str:
    """Text as it stands in an element or in a quoted attribute."""
    return html.escape(printable(str(text)), quote=True)


def printable(text: str) -> str:
    """The text with a sign in the place of each character that nobody sees."""
    if text.isprintable():
        return text
    return "".join(
        "\N{REPLACEMENT CHARACTER}"
        if character not in _KEPT and unicodedata.category(character) in _UNSEEN
        else character
        for character in text
    )


def tag(name: str, *children: Child, **attributes: str | int | float | bool | None) -> Html:
    """An element. Attributes: `class_` is `class`, `aria_label` is `aria-label`; without those that
    are None or False."""
    told = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escaped(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _EMPTY:
        return Html(f"<{name}{told}>" if name in ("meta", "br", "col") else f"<{name}{told}/>")
    return Html(f"<{name}{told}>{_inside(children)}</{name}>")


def join(*children: Child) -> Html:
    """Elements and texts in a row."""
    return Html(_inside(children))


def style(css: str) -> Html:
    """A style sheet of ours; never of what was read."""
    assert "<" not in css
    return Html(f"<style>{css}</style>")


def _inside(children: Iterable[Child]) -> str:
    return "".join(map(_markup, children))


def _markup(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child.markup
    if isinstance(child, str | int):
        return escaped(child)
    return _inside(child)


def prose(text: str) -> list[Child]:
    """Text with what stands between backticks as code."""
    pieces = text.split("`")
    if len(pieces) % 2 == 0:  # one is left open
        return [text]
    return [tag("code", piece) if at % 2 else piece for at, piece in enumerate(pieces)]


def table(
    caption: str | None,
    columns: Iterable[str],
    rows: Iterable[Iterable[Child]],
    *,
    class_: str = "",
) -> Html:
    """A table with a row of headers, whose first cells are headers of their rows. A column name
    that starts with `>` is right-aligned."""
    names = list(columns)
    classes = ["number" if name.startswith(">") else None for name in names]
    head = [
        tag("th", name.removeprefix(">"), scope="col", class_=kind)
        if name.strip(">")
        else tag("td", class_=kind)
        for name, kind in zip(names, classes, strict=True)
    ]
    body = [
        tag("tr", [_cell(cell, number, classes[number]) for number, cell in enumerate(row)])
        for row in rows
    ]
    inner = tag(
        "table",
        tag("caption", caption) if caption else None,
        tag("thead", tag("tr", head)),
        tag("tbody", body),
        class_=class_ or None,
    )
    return tag("div", inner, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _cell(cell: Child, number: int, kind: str | None) -> Html:
    if number == 0:
        return tag("th", cell, scope="row")
    return tag("td", cell, class_=kind)
