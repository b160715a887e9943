"""Parsing and printing of quantities.

Inside ftplan numbers are bytes, FLOPs and seconds, always in the name.
"""

from __future__ import annotations

import re

from ftplan.planner.errors import InputError

KIB = 1024
MIB = 1024**2
GIB = 1024**3
TIB = 1024**4

BYTES_PER_DTYPE: dict[str, int] = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8": 1,
    "int8": 1,
}

SECONDS_PER_HOUR = 3600
FLOAT32_BYTES = BYTES_PER_DTYPE["float32"]

DTYPE_SHORT_NAMES: dict[str, str] = {
    "fp32": "float32",
    "float": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
}

_COUNT = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMBT])\s*$", re.IGNORECASE)
_COUNT_FACTORS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_BYTES = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB|TiB|KB|MB|GB|TB|B)?\s*$", re.IGNORECASE)
_BYTE_FACTORS = {
    "B": 1,
    "KIB": KIB,
    "MIB": MIB,
    "GIB": GIB,
    "TIB": TIB,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


def parse_count(text: str) -> int | None:
    """Read a parameter count such as `7B`, `0.5b`, `135M`; None if it is not one."""
    match = _COUNT.match(text)
    if match is None:
        return None
    return round(float(match[1]) * _COUNT_FACTORS[match[2].upper()])


def parse_bytes(text: str) -> int:
    """Read a size such as `24GiB`, `80 GB`, `512MiB`; a bare number is bytes.

    Raises InputError for anything else.
    """
    match = _BYTES.match(text)
    if match is None:
        raise InputError(f"`{text}` is not a size in bytes", "write for example `24GiB` or `80GB`")
    return round(float(match[1]) * _BYTE_FACTORS[(match[2] or "B").upper()])


def resolve_dtype(name: str) -> str:
    """The Hugging Face name (`bfloat16`) of a dtype given in long or short form (`bf16`)."""
    return DTYPE_SHORT_NAMES.get(name, name)


def format_bytes(num_bytes: float) -> str:
    """`13.4 GiB`, `512.0 MiB`, `0 B`: 1024-based, three significant digits or so."""
    sign = "-" if num_bytes < 0 else ""
    size = abs(num_bytes)
    if round(size) < KIB:
        return f"{sign}{size:.0f} B"
    scales = (("KiB", KIB), ("MiB", MIB), ("GiB", GIB), ("TiB", TIB))
    return f"{sign}{_scaled(size, scales, 1024)}"


def format_count(number: float) -> str:
    """`7.24 B`, `134.5 M`, `1,234`: for counts of parameters and tokens."""
    if round(number) < 10**6:
        return f"{number:,.0f}"
    return _scaled(number, (("M", 10**6), ("B", 10**9), ("T", 10**12)), 1000)


def _scaled(number: float, scales: tuple[tuple[str, int], ...], base: int) -> str:
    """The number in the first unit in which, as printed, it stays below `base`."""
    text = ""
    for unit, factor in scales:
        value = number / factor
        digits = 2 if round(value, 2) < 10 else 1 if round(value, 1) < 1000 else 0
        text = f"{value:.{digits}f} {unit}"
        if round(value, digits) < base:
            break
    return text


def format_seconds(seconds: float) -> str:
    """`0.42 s`, `12 s`, `3 min 20 s`, `2 h 05 min`, `3.1 days`."""
    if round(seconds, 2) < 10:
        return f"{seconds:.2f} s"
    if round(seconds) < 120:
        return f"{seconds:.0f} s"
    if round(seconds) < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    if round(seconds / 60) < 48 * 60:
        hours, rest = divmod(round(seconds / 60), 60)
        return f"{hours} h {rest:02d} min"
    return f"{seconds / 86400:.1f} days"


def format_energy(joules: float) -> str:
    """`0.42 Wh`, `12.5 Wh`, `3.10 kWh`, `1.25 MWh`."""
    hours = joules / SECONDS_PER_HOUR
    return _scaled(hours, (("Wh", 1), ("kWh", 10**3), ("MWh", 10**6)), 1000)


def format_percent(fraction: float) -> str:
    """`+3.2 %`, for relative errors."""
    return f"{100 * fraction:+.1f} %"
