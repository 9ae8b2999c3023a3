"""Counts, ratios and input sizes as people write them: `12.8M`, `0.5x`, `3x224x224`.

The arithmetic is exact. Every error is a ValueError that says what was given and what is allowed.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

# Digits are bounded, so that no text costs more than a moment.
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,9}|[0-9]{1,30}(?:_[0-9]{1,30}){0,9})"
_NUMBER = r"(?:[0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})(?:[eE][-+]?[0-9]{1,2})?"
COUNT_PATTERN = rf"^\s*(?:{_DIGITS}(?:\.[0-9]{{1,30}})?(?:[eE]\+?[0-9]{{1,2}})?)\s*[kKMGB]?\s*$"
BYTES_PATTERN = rf"^\s*{_NUMBER}\s*(?:[kKMG]i?)?B\s*$"
RATIO_PATTERN = rf"^\s*{_NUMBER}(?:\s*/\s*{_NUMBER})?\s*[xX]?\s*$"
MS_PATTERN = rf"^\s*({_NUMBER})\s*(us|ms|s)?\s*$"
SIZE_PATTERN = r"^\s*[0-9]{1,9}(?:x[0-9]{1,9}){0,3}\s*$"

_MS = {"us": Fraction(1, 1000), "ms": Fraction(1), "s": Fraction(1000)}
_UNITS = {"k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


def parse_count(value: object) -> int:
    """A count of at least 1: 12800000, "12_800_000", "12,800,000", "12.8M", 1e6."""
    number = _count_as_fraction(value)
    if number is None or number.denominator != 1 or number < 1:
        raise ValueError(
            f"not a count (got {_shown(value)}; allowed a whole number, at least 1, "
            "that may end in k, M, G or B, e.g. 12.8M)"
        )
    return int(number)


def _count_as_fraction(value: object) -> Fraction | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return Fraction(value)
    if isinstance(value, float):
        return Fraction(value) if math.isfinite(value) else None
    if not isinstance(value, str) or not re.fullmatch(COUNT_PATTERN, value):
        return None
    text = value.strip().replace(",", "").replace("_", "")
    unit = _UNITS.get(text[-1], 1)
    return Fraction(text.rstrip("kKMGB").strip()) * unit


def parse_ratio(value: object) -> float:
    """A finite number above 0: 0.5, "0.5", "0.5x", "1/2"."""
    ratio = _ratio_as_float(value)
    if ratio is None or not (0 < ratio < math.inf):
        raise ValueError(
            f"not a ratio (got {_shown(value)}; allowed a finite number above 0 "
            "or a fraction, e.g. 0.5, 0.5x or 1/2)"
        )
    return ratio


def _ratio_as_float(value: object) -> float | None:
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str) and re.fullmatch(RATIO_PATTERN, value):
            above, _, below = value.strip().rstrip("xX").partition("/")
            return float(Fraction(above.strip()) / Fraction(below.strip() or "1"))
    except (OverflowError, ZeroDivisionError):
        pass
    return None


def parse_bytes(value: object) -> int:
    """Bytes, at least 1: 500000000, "500MB" (10^6 each), "12GB", "1.5GiB" (2^30 each)."""
    number = _bytes_as_fraction(value)
    if number is None or number < 1:
        raise ValueError(
            f"not an amount of memory (got {_shown(value)}; allowed whole bytes or a number with "
            "kB, MB, GB, KiB, MiB or GiB, e.g. 500MB)"
        )
    return int(number)


def _bytes_as_fraction(value: object) -> Fraction | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return Fraction(value)
    if not isinstance(value, str) or not (found := re.fullmatch(BYTES_PATTERN, value)):
        return None
    text = found.group().strip().removesuffix("B").strip()
    binary = text.endswith("i")
    text = text.removesuffix("i")
    scale = 1
    if text[-1] in "kKMG":
        power = "kMG".index(text[-1].replace("K", "k")) + 1
        scale = 1024**power if binary else 1000**power
        text = text[:-1].strip()
    return Fraction(text) * scale


def parse_ms(value: object) -> float:
    """Milliseconds above 0: 8, "8ms", "800us", "0.5s"."""
    found = re.fullmatch(MS_PATTERN, value) if isinstance(value, str) else None
    if found is not None:
        number = float(Fraction(found[1]) * _MS[found[2] or "ms"])
    else:
        number = float(value) if type(value) in (int, float) else 0.0  # type: ignore[arg-type]
    if not 0 < number < math.inf:
        raise ValueError(
            f"not a time (got {_shown(value)}; allowed milliseconds above 0, or a number with us, "
            "ms or s, e.g. 8ms)"
        )
    return number


def parse_budget(value: object) -> float:
    """A ratio or a count: 0.5, "0.5x", "12.8M"."""
    ratio = _ratio_as_float(value)
    if ratio is not None and 0 < ratio < math.inf:
        return ratio
    count = _count_as_fraction(value)
    if count is not None and count.denominator == 1 and count >= 1:
        return float(count)
    raise ValueError(
        f"not a budget (got {_shown(value)}; allowed a ratio, e.g. 0.5 or 0.5x, or a count, "
        "e.g. 12.8M)"
    )


def parse_size(value: object) -> tuple[int, ...]:
    """(channels, *sizes): "3x224x224", [3, 224, 224]; "224" means 3x224x224; one to three sizes."""
    sizes: object = value
    if isinstance(value, str) and re.fullmatch(SIZE_PATTERN, value):
        sizes = [int(part) for part in value.split("x")]
    elif isinstance(value, int):
        sizes = [value]
    if isinstance(sizes, (list, tuple)) and all(type(size) is int and size >= 1 for size in sizes):
        if len(sizes) in (2, 3, 4):
            return tuple(sizes)
        if len(sizes) == 1 and not isinstance(value, (list, tuple)):
            return (3, sizes[0], sizes[0])
    raise ValueError(
        f"not an input size (got {_shown(value)}; allowed channels and one to three sizes, each "
        "at least 1, e.g. 3x224x224, [3, 224, 224] or 224, 1x16000, 3x16x112x112)"
    )


def format_count(count: int) -> str:
    """17638264 -> 17,638,264"""
    return f"{count:,}"


def short_count(count: int) -> str:
    """17638264 -> 17.64M. Two decimals, rounded half up; below 1000 the number itself."""
    sign, size = ("-" if count < 0 else ""), abs(count)
    if size < 1000:
        return f"{sign}{size}"
    for suffix in ("k", "M", "G"):
        unit = _UNITS[suffix]
        hundredths = (100 * size + unit // 2) // unit
        if hundredths < 100_000 or suffix == "G":
            break
    return f"{sign}{hundredths // 100}.{hundredths % 100:02d}{suffix}"


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
