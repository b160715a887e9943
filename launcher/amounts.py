"""Times and sums of money as people write them on the command line."""

from __future__ import annotations

import re

from ftplan.planner.errors import InputError

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_seconds(flag: str, text: str) -> float:
    """Seconds of 90m, 6h or 2d; raises InputError that names the flag."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])\w*", text.strip().casefold())
    if not found or not float(found[1]):
        raise InputError(f"`{flag} {text}` is no time", "write 90m, 6h or 2d")
    return float(found[1]) * _SECONDS[found[2]]


def parse_usd(flag: str, text: str) -> float:
    """US dollars of 50, $50 or 50usd; raises InputError that names the flag."""
    found = re.fullmatch(r"\$?(\d+(?:\.\d+)?)\s*(?:usd|\$)?", text.strip().casefold())
    if not found:
        raise InputError(f"`{flag} {text}` is no sum of money", "write 50usd")
    return float(found[1])
