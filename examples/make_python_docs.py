"""Make a small instruction-tuning data set from Python's own docstrings.

Each row asks about one object of the standard library and answers with its
cleaned docstring behind a uniform lead, such as "`textwrap.dedent(text)`
(function in module `textwrap`): Remove any common leading whitespace ...".
Some are written as pairs, too: the answer with its lead, and the bare docstring.

Only the standard library is needed.  Every choice follows from a hash of the
object's name, so the same Python release always writes the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

# fmt: off
MODULES = [
    "textwrap", "shutil", "pathlib", "collections", "collections.abc", "itertools", "functools",
    "json", "csv", "re", "statistics", "random", "datetime", "os.path", "os", "string",
    "argparse", "logging", "logging.handlers", "heapq", "bisect", "copy", "glob", "fnmatch",
    "tempfile", "zipfile", "tarfile", "subprocess", "threading", "queue", "urllib.parse",
    "urllib.request", "urllib.error", "html", "html.parser", "math", "decimal", "fractions",
    "inspect", "ast", "difflib", "calendar", "socket", "ssl", "email.message", "email.utils",
    "configparser", "contextlib", "dataclasses", "enum", "asyncio", "concurrent.futures",
    "sqlite3", "uuid", "hashlib", "hmac", "base64", "binascii", "struct", "pprint", "reprlib",
    "traceback", "unittest", "unittest.mock", "doctest", "timeit", "time", "typing", "weakref",
    "operator", "io", "gzip", "bz2", "lzma", "zlib", "secrets", "shelve", "pickle", "ipaddress",
    "http.client", "http.cookies", "http.server", "smtplib", "imaplib", "ftplib", "poplib",
    "mailbox", "cmd", "shlex", "locale", "gettext", "types", "array", "sched", "graphlib",
    "numbers", "abc", "selectors", "signal", "socketserver", "linecache", "tokenize", "warnings",
    "importlib", "importlib.util", "importlib.resources", "mimetypes", "filecmp", "fileinput",
    "stat", "getpass", "platform", "codecs", "unicodedata", "zoneinfo", "tomllib",
    "xml.etree.ElementTree", "contextvars", "sys", "tracemalloc", "webbrowser",
]
# fmt: on

MAX_PER_MODULE = 12
MAX_TOP_LEVEL = 8  # of those, at most this many functions and classes; methods fill the rest
MIN_TEXT = 40  # characters of docstring
MAX_TEXT = 1050
SHORT_TEXT, SHORT_SHARE = 160, 8  # of the texts shorter than this, one in so many is kept
MAX_SIGNATURE = 72
MIN_WORDS, MAX_WORDS = 46, 310  # of a whole row, in pieces about as long as a tokenizer's
MAX_OVERLAP = 0.6  # between the words of a held-out text and of any other

# How each kind of object is named in the answer's lead; {owner} is its module or class.
LEADS = {
    "module": "module of the standard library",
    "function": "function in module `{owner}`",
    "class": "class in module `{owner}`",
    "exception": "exception in module `{owner}`",
    "method": "method of class `{owner}`",
    "class method": "class method of `{owner}`",
    "static method": "static method of `{owner}`",
    "property": "property of class `{owner}`",
}

BY_NAME = [
    "What does the {kind} `{name}` do in Python?",
    "Explain the Python {kind} `{name}`.",
    "Describe the {kind} `{name}` from Python's standard library.",
    "What is `{name}` in Python?",
    "Tell me about Python's `{name}` {kind}.",
    "How would you document the Python {kind} `{name}`?",
]
BY_SIGNATURE = [
    "What does this Python {kind} do?",
    "Explain this {kind} from Python's standard library.",
    "Write a short description of this Python {kind}.",
    "Describe the {kind} with this signature.",
]

UNWANTED = re.compile(
    r">>>|[^\x00-\x7f]|\|.*\||See help\(type\(self\)\)|deprecated|An enumeration\."
    r"|Alias for field|Common base class for all|Initialize self|not be called directly"
    r"|`\w+'|patch by|Thanks to|\bXXX\b",
    re.IGNORECASE,
)
NOT_PROSE = re.compile(
    r"^(\s|[-*+#@=~.:%]|\d+[.)]\s|\w+\s*=\s|\w+:$|[A-Z ]+:$|\S+\s+--?\s)"  # lists, fields
    r"|\S {3,}\S|[\[\]{}\\]{2}|::$|\)\s+--?\s|-> |= <|://",  # tables, code, usage lines, links
    re.MULTILINE,
)
SIGNATURE_LINE = re.compile(r"^[\w.]+\(.*\)(\s*-+>.*)?:?$")
SENTENCE_END = re.compile(r"(?<=[a-z0-9)`'\"][.!?])\s+(?=[A-Z`'\"(])")
ANNOUNCEMENT = re.compile(r":$|\b(following|follows|below)\b[^,;]*$")  # of something left out
ROLE = re.compile(r":[a-z:]+:`[~!]?([^`]+)`")


@dataclass(frozen=True)
class Entry:
    """One documented object: its kind, dotted name, owner, signature and cleaned text."""

    module: str
    kind: str
    name: str
    owner: str
    signature: str
    text: str

    @property
    def top_level(self) -> bool:
        """Whether the object is a module or lives directly in one."""
        return self.owner in ("", self.module)


def stable_hash(*parts: str) -> int:
    """Return a number that depends only on the given strings."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big")


def clean_paragraph(lines: list[str]) -> str | None:
    """Join one hard-wrapped paragraph, or return None where it is not plain prose."""
    if NOT_PROSE.search("\n".join(lines)):
        return None
    for line, following in pairwise(lines):
        if len(line) < 45 and line[-1] not in ".,;:!?" and following[0].isupper():
            return None  # a list laid out by line, not wrapped text
    joined = re.sub(r"(?<=\w-) (?=[a-z])", "", " ".join(line.rstrip() for line in lines))
    joined = re.sub(r"(?<=[.!?:;,)]) +", " ", joined)
    return ROLE.sub(r"`\1`", joined).replace("``", "`")


def leading_prose(doc: str) -> list[str]:
    """Return the paragraphs of plain prose that a docstring begins with."""
    lines = inspect.cleandoc(doc).splitlines()
    while lines and (not lines[0] or SIGNATURE_LINE.match(lines[0])):
        lines = lines[1:]
    paragraphs: list[str] = []
    for block in re.split(r"\n\s*\n", "\n".join(lines)):
        paragraph = clean_paragraph(block.splitlines()) if block.strip() else None
        if paragraph is None:
            break
        paragraphs.append(paragraph)
    return paragraphs


def shorten(paragraphs: Iterable[str], limit: int) -> str:
    """Keep whole sentences up to `limit` characters, and none that announces a dropped list."""
    kept: list[list[str]] = []
    room = limit
    for paragraph in paragraphs:
        kept.append([])
        for sentence in SENTENCE_END.split(paragraph):
            room -= len(sentence) + 1
            if room < 0:
                break
            kept[-1].append(sentence)
        if room < 0:
            break
    while kept and (not kept[-1] or ANNOUNCEMENT.search(kept[-1][-1])):
        kept[-1:] = [kept[-1][:-1]] if kept[-1] else []
    return "\n\n".join(end_sentence(" ".join(sentences)) for sentences in kept)


def end_sentence(paragraph: str) -> str:
    """Give a paragraph its full stop where the docstring left it out."""
    return paragraph if paragraph.endswith((".", "!", "?", ":", ".)")) else paragraph + "."


def clean_doc(doc: object) -> str | None:
    """Return a docstring as readable prose, or None where it is not worth a row."""
    if not isinstance(doc, str) or UNWANTED.search(doc):
        return None
    text = shorten(leading_prose(doc), MAX_TEXT)
    if len(text) < MIN_TEXT or text.count("`") % 2 or text.count("(") != text.count(")"):
        return None
    starts_well = re.match(r"[A-Z][\w'-]* |A ", text)
    return text if starts_well else None


def signature_of(name: str, target: Any, skip_first: bool) -> str:
    """Return `name(arguments)` without annotations, or '' where unknown, long or unstable."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return ""
    parameters = list(signature.parameters.values())[1 if skip_first else 0 :]
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    text = name + str(inspect.Signature(bare))
    unstable = re.search(r"<|\d{8}", text)  # addresses, the platform's largest integer
    vague = text.endswith("(*args, **kwargs)")
    return "" if unstable or vague or len(text) > MAX_SIGNATURE else text


def method_kind(raw: object) -> str | None:
    """Name the kind of a class attribute, or None where it is not documented on its own."""
    if isinstance(raw, classmethod):
        return "class method"
    if isinstance(raw, staticmethod):
        return "static method"
    if isinstance(raw, property):
        return "property"
    return "method" if inspect.isroutine(raw) else None


def class_entries(module: str, name: str, cls: type) -> Iterator[tuple[object, Entry]]:
    """Yield a class and the public methods and properties it defines itself."""
    kind = "exception" if issubclass(cls, BaseException) else "class"
    if text := clean_doc(vars(cls).get("__doc__")):
        signature = signature_of(name, cls, False) if kind == "class" else ""
        yield cls, Entry(module, kind, name, module, signature, text)
    for attribute, raw in sorted(vars(cls).items()):
        member_kind = None if attribute.startswith("_") else method_kind(raw)
        target = getattr(raw, "__func__", raw)
        text = clean_doc(getattr(target, "__doc__", None)) if member_kind else None
        if member_kind and text:
            dotted = f"{name}.{attribute}"
            skip_first = member_kind in ("method", "class method")
            signature = signature_of(dotted, target, skip_first)
            yield target, Entry(module, member_kind, dotted, name, signature, text)


def belongs(module: ModuleType, name: str, value: object) -> bool:
    """Tell whether a name is part of the module's public interface."""
    if name.startswith("_") or (inspect.isclass(value) and value.__name__ != name):
        return False  # private, or another name for a class
    if exported := getattr(module, "__all__", None):
        return name in exported
    owner = getattr(value, "__module__", None) or ""
    return owner.lstrip("_") == module.__name__


def module_entries(module_name: str) -> Iterator[tuple[object, Entry]]:
    """Yield every documented public object of a module, each with its entry."""
    module = importlib.import_module(module_name)
    if text := clean_doc(module.__doc__):
        yield module, Entry(module_name, "module", module_name, "", "", text)
    for name, value in sorted(vars(module).items()):
        if not belongs(module, name, value):
            continue
        dotted = f"{module_name}.{name}"
        if inspect.isclass(value):
            yield from class_entries(module_name, dotted, value)
        elif inspect.isroutine(value) and (text := clean_doc(value.__doc__)):
            signature = signature_of(dotted, value, False)
            yield value, Entry(module_name, "function", dotted, module_name, signature, text)


def make_row(entry: Entry) -> dict[str, str]:
    """Turn an entry into an alpaca row; some rows give a signature as their input."""
    choice = stable_hash("template", entry.name)
    shown = entry.signature or entry.name
    output = f"`{shown}` ({LEADS[entry.kind].format(owner=entry.owner)}): {entry.text}"
    if entry.signature and choice % 5 < 2:
        template = BY_SIGNATURE[choice // 5 % len(BY_SIGNATURE)]
        instruction = template.format(kind=entry.kind)
        return {"instruction": instruction, "input": entry.signature, "output": output}
    template = BY_NAME[choice // 5 % len(BY_NAME)]
    instruction = template.format(kind=entry.kind, name=entry.name)
    return {"instruction": instruction, "output": output}


def worth_a_row(entry: Entry) -> bool:
    """Keep rows of a fitting length, and only a share of the one-liners, which are far more."""
    words = re.findall(r"[A-Za-z]{1,7}|\d|[^A-Za-z\d\s]", " ".join(make_row(entry).values()))
    if not MIN_WORDS <= len(words) <= MAX_WORDS:
        return False
    return len(entry.text) >= SHORT_TEXT or stable_hash("short", entry.name) % SHORT_SHARE == 0


def pick(entries: list[Entry]) -> list[Entry]:
    """Choose one module's share of the rows, in hash order."""
    worthy = filter(worth_a_row, entries)
    ordered = sorted(worthy, key=lambda entry: stable_hash("pick", entry.name))
    chosen = [entry for entry in ordered if entry.top_level][:MAX_TOP_LEVEL]
    rest = [entry for entry in ordered if entry not in chosen]
    return chosen + rest[: MAX_PER_MODULE - len(chosen)]


def collect() -> list[Entry]:
    """Return the chosen entries of all modules, no object and no text twice, shuffled."""
    seen_objects: dict[int, object] = {}  # keeps each object alive, so that its id stays its own
    seen_texts: set[str] = set()
    chosen: list[Entry] = []
    for module_name in MODULES:
        fresh: list[Entry] = []
        for target, entry in module_entries(module_name):
            key = entry.text.lower()
            if id(target) not in seen_objects and key not in seen_texts:
                seen_objects[id(target)] = target
                seen_texts.add(key)
                fresh.append(entry)
        chosen += pick(fresh)
    return sorted(chosen, key=lambda entry: stable_hash("shuffle", entry.name))


def overlap(first: Entry, second: Entry) -> float:
    """Return the share of their different words that two texts have in common."""
    one, other = (set(re.findall(r"\w+", entry.text.lower())) for entry in (first, second))
    return len(one & other) / len(one | other)


def split(entries: list[Entry], heldout: int) -> tuple[list[Entry], list[Entry]]:
    """Part the rows in training and held-out ones, the latter unlike any other row."""
    kept: list[Entry] = []
    for entry in entries:
        if len(kept) == heldout:
            break
        others = (other for other in entries if other is not entry)
        if all(overlap(entry, other) <= MAX_OVERLAP for other in others):
            kept.append(entry)
    return [entry for entry in entries if entry not in kept], kept


def make_pair(entry: Entry) -> dict[str, str]:
    """Turn an entry into two answers to a question: with the uniform lead, and without it."""
    row = make_row(entry)
    prompt = "\n\n".join(row[name] for name in ("instruction", "input") if name in row)
    return {"prompt": prompt, "chosen": row["output"], "rejected": entry.text}


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write rows as JSON Lines."""
    lines = (json.dumps(row) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def main() -> None:
    """Write the training rows, the held-out rows, and pairs of answers."""
    parser = argparse.ArgumentParser(description="Make a data set from Python's docstrings.")
    parser.add_argument("--out-dir", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--rows", type=int, default=480, help="training rows")
    parser.add_argument("--heldout", type=int, default=60, help="held-out rows")
    parser.add_argument("--pairs", type=int, default=160, help="training rows with two answers")
    args = parser.parse_args()
    entries = collect()
    if args.rows + args.heldout > len(entries):
        parser.error(f"only {len(entries)} rows can be made")
    training, heldout = split(entries[: args.rows + args.heldout], args.heldout)
    if len(heldout) < args.heldout:
        parser.error(f"only {len(heldout)} rows are unlike all others; lower --heldout")
    args.out_dir.mkdir(parents=True, exist_ok=True)
    pairs = training[: args.pairs]
    write_rows(args.out_dir / "python_docs.jsonl", map(make_row, training))
    write_rows(args.out_dir / "python_docs.heldout.jsonl", map(make_row, heldout))
    write_rows(args.out_dir / "python_docs.pairs.jsonl", map(make_pair, pairs))
    print(
        f"{len(training)} training rows, {len(heldout)} held-out rows and {len(pairs)} pairs in "
        f"{args.out_dir}"
    )


if __name__ == "__main__":
    main()
