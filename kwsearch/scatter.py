"""A scatter plot as lines of text, for terminals: marks are letters and signs, not colours."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

# Columns: of the narrowest plot that says something, and of the largest that helps.
LEAST, MOST = 60, 100
# By kind, in falling importance: what a cell with several points shows, and the legend.
_MARKS = {
    "best": ("*", "best"),
    "static": ("S", "static network"),
    "uniform": ("U", "uniform plan"),
    "largest": ("W", "largest architecture"),
    "front": ("o", "on the front"),
    "trial": ("·", "trial"),
}
_PLAIN = {"·": "."}
_LINE, _CROWD = "|", "#"


@dataclass(frozen=True)
class Point:
    """kind: best, static, uniform, largest, front or trial."""

    x: float
    y: float
    kind: str = "trial"


@dataclass(frozen=True)
class Axis:
    """title: what it counts. show: a tick in words, given it and how far ticks are apart.

    least, most: what there can be at all; an axis does not go beyond.
    """

    title: str
    show: Callable[[float, float], str]
    least: float = 0.0
    most: float = math.inf


def show_share(value: float, step: float) -> str:
    """0.825, 0.005 -> 82.5%: as many decimals as ticks differ in."""
    return f"{100 * value:.{_decimals(100 * step)}f}%"


def show_count(value: float, step: float) -> str:
    """544300, 100 -> 544.3k"""
    units = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
    unit, suffix = next((one for one in units if abs(value) >= one[0]), units[-1])
    return f"{value / unit:.{_decimals(step / unit)}f}{suffix}"


def _decimals(step: float) -> int:
    """Enough to tell apart what is so far apart."""
    return max(0, -math.floor(math.log10(step) + 1e-9))


@dataclass(frozen=True)
class _Scale:
    """From low to high over so many cells; ticks at both ends and every `step`."""

    low: float
    high: float
    step: float
    cells: int

    def cell(self, value: float) -> int:
        """The one whose middle is nearest: 0 has low in its middle, the last one high."""
        share = (value - self.low) / (self.high - self.low)
        return math.floor(round(share * (self.cells - 1), 6) + 0.5)

    def ticks(self) -> list[float]:
        count = round((self.high - self.low) / self.step)
        return [self.low + i * self.step for i in range(count + 1)]


def _scale(axis: Axis, values: Sequence[float], cells: int, most: int) -> _Scale:
    """All values, between round numbers: 1, 2 or 5 times a power of ten apart, `most` steps."""
    low, high = min(values), max(values)
    # A single value has a tenth of it around it; what differs by rounding alone is one.
    if high - low <= 1e-9 * abs(high):
        room = abs(high) / 20 or 0.5
        low, high = max(low - room, min(axis.least, low)), min(high + room, max(axis.most, high))
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20):
        first = math.floor(low / (step * factor) + 1e-9)
        last = math.ceil(high / (step * factor) - 1e-9)
        if last - first <= most:
            break
    step *= factor
    return _Scale(first * step, last * step, step, cells)


def scatter(
    points: Sequence[Point],
    *,
    x: Axis,
    y: Axis,
    width: int = 80,
    height: int = 16,
    lines: Iterable[float] = (),
    encoding: str = "utf-8",
) -> list[str]:
    """At most `width` columns and about `height` lines, one more where the legend needs it.

    lines: values of x to draw a line at: budgets. encoding: of the terminal; a sign that it
    lacks has another in its place. Without points there is one line, which says so.
    """
    if not points:
        return [f"no {y.title} to plot yet"]
    marks = _marks_for(encoding)
    limits = sorted(set(lines))
    rows = max(height - 4, 3)
    up = _scale(y, [point.y for point in points], rows, max(rows // 3, 2))
    labels = {up.cell(tick): y.show(tick, up.step) for tick in up.ticks()}
    gutter = max(map(len, labels.values()))
    columns = width - gutter - 2
    values = [*(point.x for point in points), *limits]
    across = _scale(x, values, columns, max(columns // 12, 2))

    cells: dict[tuple[int, int], list[str]] = {}
    for point in points:
        cells.setdefault((up.cell(point.y), across.cell(point.x)), []).append(point.kind)
    shown = {place: _mark(kinds, marks) for place, kinds in cells.items()}
    drawn = {across.cell(limit) for limit in limits}

    found = [f"{y.title} over {x.title}"]
    for row in reversed(range(rows)):
        empty = (_LINE if column in drawn else " " for column in range(columns))
        body = "".join(shown.get((row, column), sign) for column, sign in enumerate(empty))
        found.append(f"{labels.get(row, ''):>{gutter}} {'-' if row in labels else ' '}{body}")
    found += _below(across, x, gutter)
    found += _legend(points, shown.values(), marks, len(limits), width)
    return [line.rstrip() for line in found]


def _marks_for(encoding: str) -> dict[str, str]:
    """The mark of each kind, of those that the encoding has."""

    def writable(mark: str) -> bool:
        try:
            mark.encode(encoding)
        except (UnicodeEncodeError, LookupError):
            return False
        return True

    return {k: m if writable(m) else _PLAIN.get(m, m) for k, (m, _) in _MARKS.items()}


def _mark(kinds: Sequence[str], marks: dict[str, str]) -> str:
    """Of a cell: its most important point; the number of those that are mere trials."""
    first = next(kind for kind in _MARKS if kind in kinds)
    if first != "trial" or len(kinds) == 1:
        return marks[first]
    return str(len(kinds)) if len(kinds) < 10 else _CROWD


def _below(across: _Scale, x: Axis, gutter: int) -> list[str]:
    """The axis of x and what stands at its ticks, as far as there is room."""
    axis, words = ["-"] * across.cells, ""
    for tick in across.ticks():
        column, label = across.cell(tick), x.show(tick, across.step)
        start = max(min(column - len(label) // 2, across.cells - len(label)), 0)
        axis[column] = "+"
        if not words or start > len(words):
            words = words.ljust(start) + label
    indent = " " * (gutter + 2)
    return [f"{indent}{''.join(axis)}", f"{indent}{words}"]


def _legend(
    points: Sequence[Point],
    shown: Iterable[str],
    marks: dict[str, str],
    limits: int,
    width: int,
) -> list[str]:
    """What the marks mean that occur."""
    kinds, signs = {point.kind for point in points}, Counter(shown)
    entries = [f"{marks[k]} {words}" for k, (_, words) in reversed(_MARKS.items()) if k in kinds]
    if any(sign.isdigit() for sign in signs):
        entries.insert(1, "2-9 so many trials")
    if _CROWD in signs:
        entries.insert(1, f"{_CROWD} ten or more")
    if limits:
        entries.append(f"{_LINE} {'the most that is allowed' if limits == 1 else 'budgets'}")
    lines = [""]
    for entry in entries:
        longer = f"{lines[-1]}   {entry}" if lines[-1] else f"  {entry}"
        if len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(f"  {entry}")
    return lines
