"""Counts, ratios and sizes as people write them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kwsearch.units import (
    format_count,
    parse_budget,
    parse_bytes,
    parse_count,
    parse_ratio,
    parse_size,
    short_count,
)


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ("12.8M", 12_800_000),
        ("0.1M", 100_000),
        ("1.1k", 1_100),
        ("3K", 3_000),
        ("2G", 2_000_000_000),
        ("2.5B", 2_500_000_000),
        ("17638264", 17_638_264),
        ("17_638_264", 17_638_264),
        ("17,638,264", 17_638_264),
        ("12.8 M", 12_800_000),
        (" 7 ", 7),
        ("1e6", 1_000_000),
        ("1.0", 1),
        ("0.000000001G", 1),
        ("123456789012345678901.2345M", 123_456_789_012_345_678_901_234_500),
        (5, 5),
        (1e6, 1_000_000),
        (10**40, 10**40),
    ],
)
def test_a_count_is_read_exactly(given: object, count: int) -> None:
    assert parse_count(given) == count
    assert type(parse_count(given)) is int


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("1.5", "'1.5'"),
        ("1.0005k", "'1.0005k'"),
        ("0", "'0'"),
        ("-3", "'-3'"),
        ("", "''"),
        ("M", "'M'"),
        ("1m", "'1m'"),
        ("1,2", "'1,2'"),
        ("1__0", "'1__0'"),
        ("12.8MB", "'12.8MB'"),
        ("٣", "'٣'"),
        ("1e-3", "'1e-3'"),
        (0, "0"),
        (-1, "-1"),
        (1.5, "1.5"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (True, "True"),
        (None, "None"),
        ([1], "[1]"),
    ],
)
def test_what_is_no_count_is_refused_with_what_is_allowed(given: object, shown: str) -> None:
    with pytest.raises(ValueError, match=r"^not a count") as raised:
        parse_count(given)
    assert str(raised.value) == (
        f"not a count (got {shown}; allowed a whole number, at least 1, "
        "that may end in k, M, G or B, e.g. 12.8M)"
    )


def test_a_huge_number_is_refused_quickly_and_shortly() -> None:
    with pytest.raises(ValueError, match=r"^not a count") as raised:
        parse_count("9" * 100_000)
    assert len(str(raised.value)) < 200
    with pytest.raises(ValueError, match="thousands of digits"):
        parse_count(-(10**5000))
    with pytest.raises(ValueError, match=r"^not a count"):
        parse_count("1e999999999")


@pytest.mark.parametrize(
    ("given", "ratio"),
    [
        ("0.5x", 0.5),
        ("0.5X", 0.5),
        ("1/2", 0.5),
        ("3 / 4", 0.75),
        ("1/2x", 0.5),
        ("0.5", 0.5),
        (".5", 0.5),
        ("2", 2.0),
        ("5e-1", 0.5),
        ("1/3", 1 / 3),
        (0.5, 0.5),
        (2, 2.0),
    ],
)
def test_a_ratio_is_read_from_a_number_a_multiple_or_a_fraction(
    given: object, ratio: float
) -> None:
    assert parse_ratio(given) == ratio
    assert type(parse_ratio(given)) is float


@pytest.mark.parametrize(
    "given",
    [
        *("0", "0x", "-1", "nan", "inf", "1/0", "0/1", "", "x", "1/2/3", "50%", "two"),
        *(0, -0.5, math.nan, math.inf, 10**400, True, None, [0.5]),
    ],
)
def test_what_is_no_ratio_is_refused_with_what_is_allowed(given: object) -> None:
    with pytest.raises(ValueError, match=r"^not a ratio") as raised:
        parse_ratio(given)
    shown = repr(given) if len(repr(given)) < 60 else repr(given)[:57] + "..."
    assert str(raised.value) == (
        f"not a ratio (got {shown}; allowed a finite number above 0 or a fraction, "
        "e.g. 0.5, 0.5x or 1/2)"
    )


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ("3x224x224", (3, 224, 224)),
        ("1x28x32", (1, 28, 32)),
        ("224", (3, 224, 224)),
        (224, (3, 224, 224)),
        ([3, 224, 192], (3, 224, 192)),
        ((1, 1, 1), (1, 1, 1)),
        ("1x16000", (1, 16000)),
        ([3, 16, 112, 96], (3, 16, 112, 96)),
    ],
)
def test_a_size_is_read_from_text_a_number_or_a_list(given: object, size: object) -> None:
    assert parse_size(given) == size


@pytest.mark.parametrize(
    "given",
    [
        *("3x", "3x0x224", "0", "3x2x2x2x1", "axbxc", "", "3*2*2", 0, -1, True, None, 2.0),
        *([3, 2, 2, 2, 1], [224], [3, 224, 0], [3, 224, 2.0], [3, True, 2], {"a": 1}),
    ],
)
def test_what_is_no_size_is_refused_with_what_is_allowed(given: object) -> None:
    with pytest.raises(ValueError, match=r"^not an input size") as raised:
        parse_size(given)
    assert str(raised.value) == (
        f"not an input size (got {given!r}; allowed channels and one to three sizes, each at least "
        "1, e.g. 3x224x224, [3, 224, 224] or 224, 1x16000, 3x16x112x112)"
    )


@pytest.mark.parametrize(
    ("given", "nbytes"),
    [
        (500, 500),
        ("500B", 500),
        ("500MB", 500_000_000),
        ("1.5 GB", 1_500_000_000),
        ("12kB", 12_000),
        ("12KB", 12_000),
        ("12KiB", 12_288),
        ("1GiB", 2**30),
        ("0.5MiB", 524_288),
    ],
)
def test_memory_is_read_in_decimal_and_binary_units(given: object, nbytes: int) -> None:
    assert parse_bytes(given) == nbytes


@pytest.mark.parametrize("given", ["12G", "12", "GB", "-1MB", "0B", 0, 0.5, True, None, "1e99B B"])
def test_what_is_no_memory_is_refused_with_what_is_allowed(given: object) -> None:
    with pytest.raises(ValueError, match=r"not an amount of memory .* e\.g\. 500MB"):
        parse_bytes(given)


def test_a_budget_is_a_ratio_or_a_count() -> None:
    given = [0.5, "0.5x", "1/4", 2, "12.8M", "1_000"]
    assert [parse_budget(value) for value in given] == [0.5, 0.5, 0.25, 2, 12_800_000, 1000]
    for wrong in (0, -1, "M", "half", True, math.inf):
        with pytest.raises(ValueError, match=r"not a budget .* 12\.8M"):
            parse_budget(wrong)


def test_a_count_is_written_with_commas() -> None:
    assert format_count(17_638_264) == "17,638,264"
    assert format_count(999) == "999"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00k"),
        (1005, "1.01k"),
        (17_638_264, "17.64M"),
        (999_994, "999.99k"),
        (999_995, "1.00M"),
        (999_995_000, "1.00G"),
        (4_000_000_000_000, "4000.00G"),
        (-12_345, "-12.35k"),
    ],
)
def test_a_count_is_shortened_to_two_decimals_rounded_half_up(count: int, text: str) -> None:
    assert short_count(count) == text


@given(st.integers(1, 10**15))
def test_a_short_count_reads_back_within_half_a_hundredth_of_its_unit(count: int) -> None:
    unit = {"k": 10**3, "M": 10**6, "G": 10**9}.get(short_count(count)[-1], 0)
    assert abs(parse_count(short_count(count)) - count) <= unit / 200
