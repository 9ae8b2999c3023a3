"""Axes of plots: from where to where, and ticks at round numbers, written as briefly as they can be
told apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Axis:
    """From low to high, evenly or by logarithm. ticks: values and how they are written."""

    title: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def at(self, value: float) -> float:
        """0 at low, 1 at high."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log(max(v, 1e-300)) for v in (value, low, high))
        return (value - low) / (high - low)


def axis(
    title: str,
    values: Iterable[float],
    show: Callable[[float], str] = "{:g}".format,
    *,
    log: bool = False,
    zero: bool = False,
    ticks: Sequence[float] | None = None,
) -> Axis:
    """One on which all values are, with room beside them. zero: begin there. ticks: where they are,
    if not at round numbers.
    """
    known = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    low, high = (min(known), max(known)) if known else (1.0, 10.0) if log else (0.0, 1.0)
    if log:
        room = max(math.log(high / low) * 0.05, 0.05)
        low, high = low * math.exp(-room), high * math.exp(room)
        places = list(ticks) if ticks is not None else _log_places(low, high)
    else:
        if zero:
            low, high = min(low, 0.0), max(high, 0.0)
        room = (high - low) * 0.05 or abs(high) * 0.05 or 0.5
        low, high = (low if zero and low == 0 else low - room), high + room
        places = list(ticks) if ticks is not None else _places(low, high)
    shown = tuple((place, show(place)) for place in places if low <= place <= high)
    return Axis(title, low, high, shown, log)


def count_axis(
    title: str, values: Iterable[float], *, log: bool = False, zero: bool = False
) -> Axis:
    """An axis of counts, written as 12.5M: with as many digits as tell its ticks apart."""
    found = axis(title, values, log=log, zero=zero)
    return replace(found, ticks=_written([value for value, _ in found.ticks], log))


def percent_axis(title: str, values: Iterable[float]) -> Axis:
    """An axis of shares of 1, written as percents without the sign, which is for the title."""
    known = [*values]
    found = axis(title, known)
    least = -math.inf if min(known, default=0.0) < 0 else 0.0
    places = [value for value, _ in found.ticks if least <= value <= 1]
    digits = _digits([100 * value for value in places])
    return replace(found, ticks=tuple((v, f"{100 * v:.{digits}f}") for v in places))


def _written(places: Sequence[float], apart: bool) -> tuple[tuple[float, str], ...]:
    """Counts with one unit for all of them, or apart: each with its own."""

    def unit_of(value: float) -> tuple[float, str]:
        known = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
        return next((one for one in known if abs(value) >= one[0]), (1.0, ""))

    if apart:
        return tuple((v, f"{v / unit_of(v)[0]:g}{unit_of(v)[1]}") for v in places)
    unit, suffix = unit_of(max(map(abs, places), default=0.0))
    digits = _digits([value / unit for value in places])
    if digits > 3:
        return tuple((v, f"{v:,.{_digits(places)}f}") for v in places)
    return tuple((v, f"{v / unit:.{digits}f}{suffix}" if v else "0") for v in places)


def _digits(values: Sequence[float]) -> int:
    """As few decimals as write all of them exactly, but at most 4."""
    exact = (d for d in range(4) if all(abs(round(v, d) - v) < 1e-7 for v in values))
    return next(exact, 4)


def _places(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high: 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * s for s in (1, 2, 5, 10) if power * s >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_places(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        found = [d * 10.0**e for e in decades for d in digits if low <= d * 10.0**e <= high]
        if len(found) >= 3:
            return found
    return _places(low, high)
