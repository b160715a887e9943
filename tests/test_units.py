"""Sizes, counts and durations: what is read, and what is printed."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftplan.planner.errors import InputError
from ftplan.planner.units import (
    GIB,
    KIB,
    MIB,
    TIB,
    format_bytes,
    format_count,
    format_energy,
    format_percent,
    format_seconds,
    parse_bytes,
    parse_count,
    resolve_dtype,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("7B", 7_000_000_000),
        ("0.5b", 500_000_000),
        (" 135M ", 135_000_000),
        ("1.1 B", 1_100_000_000),
        ("2T", 2_000_000_000_000),
        ("64k", 64_000),
    ],
)
def test_parse_count(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "7", "B", "-7B", "7BB", "7 billion", "llama-7b", "1e3B", "."])
def test_what_is_no_count_is_none(text: str) -> None:
    assert parse_count(text) is None


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * GIB),
        ("80 GB", 80 * 10**9),
        ("512MiB", 512 * MIB),
        ("1.5 tib", round(1.5 * TIB)),
        ("8kib", 8 * KIB),
        ("100kb", 100_000),
        ("1234", 1234),
        ("12 B", 12),
        ("0", 0),
    ],
)
def test_parse_bytes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "24 gigs", "1e9", "12 GiBs", "nan", "1,000"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"`{text}`")) as refused:
        parse_bytes(text)
    assert "24GiB" in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KIB, "1.00 KiB"),
        (512 * MIB, "512.0 MiB"),
        (round(13.4 * GIB), "13.4 GiB"),
        (80 * GIB, "80.0 GiB"),
        (-3 * GIB, "-3.00 GiB"),
        (5000 * TIB, "5000 TiB"),
    ],
)
def test_format_bytes(size: int, text: str) -> None:
    assert format_bytes(size) == text


@given(st.integers(min_value=0, max_value=1000 * TIB))
def test_a_printed_size_reads_back_within_half_a_percent(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.005)


@given(st.integers(min_value=0, max_value=2000 * TIB))
def test_gb_is_never_printed_for_1024_based_sizes(size: int) -> None:
    assert re.fullmatch(r"\d+(\.\d+)? ([KMGT]iB|B)", format_bytes(size))


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (7_241_732_096, "7.24 B"),
        (134_515_008, "134.5 M"),
        (1234, "1,234"),
        (70_553_706_496, "70.6 B"),
        (2e12, "2.00 T"),
        (0, "0"),
    ],
)
def test_format_count(number: float, text: str) -> None:
    assert format_count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.42 s"),
        (12, "12 s"),
        (200, "3 min 20 s"),
        (2 * 3600 + 5 * 60, "2 h 05 min"),
        (3.1 * 86400, "3.1 days"),
    ],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("show", "number", "text"),
    [
        (format_bytes, GIB - 1, "1.00 GiB"),
        (format_bytes, 9.999 * GIB, "10.0 GiB"),
        (format_count, 999_999_999, "1.00 B"),
        (format_seconds, 3599.7, "1 h 00 min"),
        (format_seconds, 48 * 3600 - 1, "2.0 days"),
    ],
)
def test_a_number_rounded_up_to_the_next_unit_is_printed_in_it(
    show: Callable[[float], str], number: float, text: str
) -> None:
    assert show(number) == text


def test_format_energy() -> None:
    assert [format_energy(3600 * hours) for hours in (0.424, 26, 3100, 1.25e6)] == [
        *("0.42 Wh", "26.0 Wh", "3.10 kWh", "1.25 MWh")
    ]


def test_format_percent() -> None:
    assert format_percent(0.0321) == "+3.2 %"
    assert format_percent(-0.05) == "-5.0 %"


def test_dtypes_have_short_names() -> None:
    assert resolve_dtype("bf16") == "bfloat16"
    assert resolve_dtype("fp32") == "float32"
    assert resolve_dtype("float16") == "float16"
    assert resolve_dtype("something") == "something"
