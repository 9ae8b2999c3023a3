"""Plots as SVG: marks, lines, areas, bars over axes. What they look like is `assets/figure.css`.

Every series has a shape or a hatch of its own beside its colour, and every plot a title and a
description for those who do not see it. Texts are escaped where the tree is written.
"""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup

from kwsearch.pages.axes import Axis, axis, count_axis, percent_axis

__all__ = [
    "PARTS",
    "SHAPES",
    "SMALL",
    "Axis",
    "Bars",
    "Box",
    "Drawing",
    "Figure",
    "axis",
    "count_axis",
    "percent_axis",
    "series",
    "stacked",
    "style",
]

WIDTH, HEIGHT = 640, 400
SMALL = (420, 300)  # of plots of which several stand side by side
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 18, 14, 52
# Shapes of marks around (0, 0), by their kind: told apart without colour, too.
SHAPES = {
    "trial": "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "front": "M0,-6.5L6.5,0L0,6.5L-6.5,0z",
    "best": "M0,-9L2.4,-3.1L8.6,-2.8L3.8,1.2L5.3,7.3L0,3.9L-5.3,7.3L-3.8,1.2L-8.6,-2.8L-2.4,-3.1z",
    "uniform": "M-5,-5H5V5H-5z",
    "largest": "M-5,-5H5V5H-5z",
    "static": "M0,-6L5.8,4.5H-5.8z",
    "published": "M-5,-1.7H-1.7V-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5z",
    "stopped": "M-3.5,-3.5L3.5,3.5M-3.5,3.5L3.5,-3.5",
    "running": "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
}
_COLOURS = 6  # of series, and as many dashes
# Hatches of parts, by their number: lines of a 6x6 tile; the first is plain.
_HATCHES = (
    "",
    "M0,6L6,0M-1,1L1,-1M5,7L7,5",
    "M0,0L6,6M-1,5L1,7M5,-1L7,1",
    "M0,3H6",
    "M3,0V6",
    "M1.5,1.5h1M4.5,4.5h1",
)
PARTS = len(_HATCHES)


def series(number: int) -> str:
    """A kind of line that tells a series from 35 others, by its colour, its dashes or both."""
    turn, colour = divmod(number, _COLOURS)
    return f"s{colour} d{(colour + turn) % _COLOURS}"


@dataclass(frozen=True)
class Box:
    """A place in a plot, in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def around(cls, x: float, y: float, room: float = 8) -> Box:
        """Of a mark."""
        return cls(x - room, y - room, x + room, y + room)

    @classmethod
    def of_text(cls, text: str, x: float, y: float, anchor: str) -> Box:
        """About where a text is."""
        wide = 7.0 * len(text)
        left = x - wide if anchor == "end" else x
        return cls(left, y - 11, left + wide, y + 3)

    def within(self, other: Box) -> bool:
        """Whether all of it is in the other."""
        return (
            other.left <= self.left
            and self.right <= other.right
            and other.top <= self.top
            and self.bottom <= other.bottom
        )

    def covers(self, other: Box) -> bool:
        """Whether they have a place in common."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )


class Drawing:
    """What plots of both kinds have. name: begins the ids of its parts, unique on a page. title,
    description: for those who do not see it. size: width and height in pixels.
    """

    def __init__(self, name: str, title: str, description: str, size: tuple[int, int]) -> None:
        self.name, self.title, self.description = name, title, description
        self.width, self.height = size
        self.shapes: dict[str, Element] = {}
        self.hatches: set[int] = set()
        self.legend: dict[str, tuple[str, int | None]] = {}
        self.axes = Element("g", {"class": "axes"})
        self.plot = Element("g", {"class": "plot"})

    def explain(self, kind: str, text: str, part: int | None = None) -> None:
        """An entry of the legend, in the order of calls. part: of an area, instead of a mark."""
        self.legend[text] = (kind, part)
        self._hatched(part)

    def _hatched(self, part: int | None) -> None:
        if part is not None and _HATCHES[part]:
            self.hatches.add(part)

    def _filled(self, tag: str, attributes: dict[str, str], part: int) -> Element:
        group = SubElement(self.plot, "g")
        group.extend(_hatched_shapes(self.name, tag, attributes, part))
        self._hatched(part)
        return group

    def svg(self, alone: bool = False) -> Markup:
        """The plot. alone: as a file of its own, with its style and its legend."""
        found = self.element(alone)
        return Markup(tostring(found, encoding="unicode")) if alone else _short(found)

    def element(self, alone: bool = False) -> Element:
        """`svg` as a tree."""
        height = self.height + (22 * len(self.legend) if alone else 0)
        size = "figure" if self.width >= WIDTH else "figure small"
        ids = {"aria-labelledby": f"{self.name}-t {self.name}-d", "role": "img", "class": size}
        root = Element("svg", {"viewBox": f"0 0 {self.width} {height}", "id": self.name, **ids})
        SubElement(root, "title", {"id": f"{self.name}-t"}).text = self.title
        SubElement(root, "desc", {"id": f"{self.name}-d"}).text = self.description
        if alone:
            root.attrib |= {
                "xmlns": "http://www.w3.org/2000/svg",
                "width": str(self.width),
                "height": str(height),
            }
            SubElement(root, "style").text = style()
            SubElement(root, "rect", {"class": "paper", "width": "100%", "height": "100%"})
        if self.shapes or self.hatches:
            defs = SubElement(root, "defs")
            defs.extend(self.shapes.values())
            defs.extend(_hatch(self.name, part) for part in sorted(self.hatches))
        root.extend([self.axes, self.plot])
        for i, (text, (kind, part)) in enumerate(self.legend.items() if alone else ()):
            place = {"transform": f"translate({_LEFT} {self.height + 22 * i})", "class": "plot"}
            entry = SubElement(root, "g", place)
            entry.extend(_symbol(self.name, kind, part))
            _text(entry, "28", "13", text, kind="said")
        return root

    @property
    def key(self) -> list[tuple[Markup, str]]:
        """The legend, for the page to lay out: a small picture and a text each."""
        found = []
        for text, (kind, part) in self.legend.items():
            root = Element(
                "svg", {"viewBox": "0 0 22 18", "class": "sample", "aria-hidden": "true"}
            )
            root.extend(_symbol(self.name, kind, part))
            found.append((_short(root), text))
        return found


class Figure(Drawing):
    """A plot over two axes. name, title, description, size: as `Drawing` has them."""

    def __init__(
        self,
        name: str,
        title: str,
        description: str,
        x: Axis,
        y: Axis,
        size: tuple[int, int] = (WIDTH, HEIGHT),
    ) -> None:
        super().__init__(name, title, description, size)
        self.x, self.y = x, y
        self.taken: list[Box] = []  # by marks and texts
        self._draw_axes()

    def _x(self, value: float) -> float:
        return _LEFT + self.x.at(value) * (self.width - _LEFT - _RIGHT)

    def _y(self, value: float) -> float:
        return self.height - _BOTTOM - self.y.at(value) * (self.height - _TOP - _BOTTOM)

    def _draw_axes(self) -> None:
        axes, bottom, right = self.axes, self.height - _BOTTOM, self.width - _RIGHT
        for i, (value, text) in enumerate(self.x.ticks):
            at = _n(self._x(value))
            _line(axes, at, _n(_TOP), at, _n(bottom), "grid")
            _text(axes, at, _n(bottom + 18), text, anchor="middle", kind=_tick(i, self.x))
        for value, text in self.y.ticks:
            level = self._y(value)
            _line(axes, _n(_LEFT), _n(level), _n(right), _n(level), "grid")
            _text(axes, _n(_LEFT - 8), _n(level + 4), text, anchor="end")
        _line(axes, _n(_LEFT), _n(bottom), _n(right), _n(bottom), "edge")
        middle = (_LEFT + right) / 2
        _text(axes, _n(middle), _n(self.height - 10), self.x.title, anchor="middle", kind="title")
        up = _text(axes, "0", "0", self.y.title, anchor="middle", kind="title")
        up.set("transform", f"translate(19 {_n((_TOP + bottom) / 2)}) rotate(-90)")

    def mark(self, x: float, y: float, kind: str, href: str = "", text: str = "") -> None:
        """A mark of `SHAPES`. href: where a click goes. text: shown by those who hover."""
        self._define(kind)
        parent = self.plot
        if href:  # the table has the same for the keyboard
            parent = SubElement(self.plot, "a", {"href": href, "tabindex": "-1"})
        place = {"x": _n(self._x(x)), "y": _n(self._y(y))}
        self.taken.append(Box.around(self._x(x), self._y(y)))
        used = SubElement(
            parent, "use", {"href": f"#{self.name}-{kind}", **place, "class": f"mark {kind}"}
        )
        if text:
            SubElement(used, "title").text = text

    def _define(self, kind: str) -> None:
        """The shape that marks of a kind use."""
        if kind not in self.shapes:
            self.shapes[kind] = Element("path", {"id": f"{self.name}-{kind}", "d": SHAPES[kind]})

    def marks(self, points: Iterable[tuple[float, float, str]], kind: str) -> None:
        """Many marks, (x, y, href) each, in few bytes: what links lead to says what they are."""
        found = list(points)
        if not found:
            return
        group = SubElement(self.plot, "g", {"class": f"mark {kind}"})
        if kind not in ("trial", "stopped"):
            self._define(kind)
        for x, y, href in found:
            at, top = self._x(x), self._y(y)
            self.taken.append(Box.around(at, top, 5))
            link = SubElement(group, "a", {"href": href})
            if kind == "trial":  # these two may be hundreds; the style has the radius
                SubElement(link, "circle", {"cx": str(round(at)), "cy": str(round(top))})
            elif kind == "stopped":
                cross = f"M{round(at) - 3},{round(top) - 3}l6,6m0,-6l-6,6"
                SubElement(link, "path", {"d": cross})
            else:
                place = {"x": _n(at), "y": _n(top)}
                SubElement(link, "use", {"href": f"#{self.name}-{kind}", **place})

    def dots(self, points: Iterable[tuple[float, float]], kind: str = "dot") -> None:
        """Many marks that lead nowhere, as one shape: round, or of kind "dash"."""
        places = ((round(self._x(x)), round(self._y(y))) for x, y in points)
        path = "".join(f"M{x - 3},{y}h6" if kind == "dash" else f"M{x},{y}h0" for x, y in places)
        if path:
            SubElement(self.plot, "path", {"class": f"dots {kind}", "d": path})

    def line(self, points: Sequence[tuple[float, float]], kind: str, *, step: bool = False) -> None:
        """Through points. step: level up to each next point, as a best-so-far is."""
        if not points:
            return
        places = [(_n(self._x(x)), _n(self._y(y))) for x, y in points]
        path = f"M{places[0][0]},{places[0][1]}"
        for x, y in places[1:]:
            path += f"H{x}V{y}" if step else f"L{x},{y}"
        SubElement(self.plot, "path", {"class": f"line {kind}", "d": path})

    def area(
        self, low: Sequence[tuple[float, float]], high: Sequence[tuple[float, float]], part: int
    ) -> None:
        """Between two lines over the same x. part: its number, for colour and hatch."""
        places = [(_n(self._x(x)), _n(self._y(y))) for x, y in [*low, *reversed(high)]]
        path = "M" + "L".join(f"{x},{y}" for x, y in places) + "z"
        self._filled("path", {"d": path}, part)

    def rule(
        self, *, x: float | None = None, y: float | None = None, text: str, level: int = 0
    ) -> None:
        """A line across the plot, and what it is. level: of the text of an upright one, from the
        top, where several are.
        """
        bottom, right = self.height - _BOTTOM, self.width - _RIGHT
        if x is not None:
            at = self._x(x)
            _line(self.plot, _n(at), _n(_TOP), _n(at), _n(bottom), "rule")
            self.taken.append(Box(at - 1, _TOP, at + 1, bottom))
            sides = [(at + 5, "start"), (at - 5, "end")]
            if at >= (_LEFT + right) / 2:
                sides.reverse()
            top = _TOP + 13 + 20 * level
            heights = (top, top + 20, bottom - 8 - 20 * level)
            self._say(text, [(place, y, anchor) for y in heights for place, anchor in sides])
        if y is not None:
            at = self._y(y)
            _line(self.plot, _n(_LEFT), _n(at), _n(right), _n(at), "rule")
            self.taken.append(Box(_LEFT, at - 1, right, at + 1))
            sides = [(right - 4, "end"), (_LEFT + 4, "start")]
            self._say(
                text, [(place, y, anchor) for y in (at - 5, at + 19) for place, anchor in sides]
            )

    def note(self, x: float, y: float, text: str) -> None:
        """A text beside a mark that has been drawn."""
        sides = [(self._x(x) - 9, "end"), (self._x(x) + 9, "start")]
        top = self._y(y)
        self._say(
            text, [(place, y, anchor) for y in (top - 7, top + 16) for place, anchor in sides]
        )

    def _say(self, text: str, places: Sequence[tuple[float, float, str]]) -> None:
        """A text at the first of the places where it covers nothing; else at the first of all."""
        inside = Box(_LEFT, _TOP - 4, self.width - _RIGHT, self.height - _BOTTOM)
        boxes = [Box.of_text(text, *place) for place in places]
        free = (
            i
            for i, box in enumerate(boxes)
            if box.within(inside) and not any(box.covers(other) for other in self.taken)
        )
        chosen = next(free, 0)
        x, y, anchor = places[chosen]
        self.taken.append(boxes[chosen])
        _text(self.plot, _n(x), _n(y), text, anchor, "said")


_PITCH = 50  # from one bar to the next


class Bars(Drawing):
    """Horizontal bars, one below the other, of parts side by side.

    rows: the name of each, and the size of each of its parts. show: how a sum is written.
    """

    def __init__(
        self,
        name: str,
        title: str,
        description: str,
        x: Axis,
        rows: Sequence[tuple[str, Sequence[float]]],
        show: Callable[[float], str],
    ) -> None:
        super().__init__(name, title, description, (WIDTH, _PITCH * len(rows) + 46))
        self.x = x
        # The bars of each part, and their sizes: what they say under the pointer.
        self._sized: dict[int, list[tuple[Element, float]]] = {}
        axes = self.axes
        bottom = self.height - 42
        for i, (value, text) in enumerate(x.ticks):
            at = _n(self._x(value))
            _line(axes, at, "4", at, _n(bottom), "grid")
            _text(axes, at, _n(bottom + 17), text, "middle", _tick(i, x))
        _text(axes, _n(self.width / 2), _n(self.height - 5), x.title, "middle", "title")
        for i, (row, sizes) in enumerate(rows):
            top = _PITCH * i + 24  # the name is above its bar, where it has room at any width
            _text(axes, "12", _n(top - 6), row)
            edges = [0.0, *itertools.accumulate(sizes)]
            for part, (left, right) in enumerate(itertools.pairwise(edges)):
                if right > left:
                    begin, end = self._x(left), self._x(right)
                    box = {"x": _n(begin), "y": _n(top), "width": _n(end - begin), "height": "20"}
                    bar = self._filled("rect", box, part)
                    self._sized.setdefault(part, []).append((bar, sizes[part]))
            _text(self.plot, _n(self._x(edges[-1]) + 5), _n(top + 15), show(edges[-1]), kind="said")

    def _x(self, value: float) -> float:
        return 12 + self.x.at(value) * (self.width - 12 - 96)

    def explain(self, kind: str, text: str, part: int | None = None) -> None:
        """As of any plot; the part's bars say it, too, with exact counts."""
        super().explain(kind, text, part)
        if part is not None:
            for bar, size in self._sized.get(part, ()):
                SubElement(bar, "title").text = f"{size:,.0f} {text}"

    def line(self, x: float, kind: str) -> None:
        """An upright one across all bars; the legend says what it is."""
        at = _n(self._x(x))
        path = f"M{at},4L{at},{_n(self.height - 42)}"
        below = Element("path", {"class": f"line {kind}", "d": path})
        self.plot.insert(0, below)  # under the texts


def stacked(
    name: str, title: str, below: str, description: str, figures: Sequence[Drawing]
) -> Markup:
    """One file of several plots, one below the other, each under its title, with its legend.

    below: a text under the title of all.
    """
    width = max(figure.width for figure in figures)
    ids = {"aria-labelledby": f"{name}-t {name}-d", "role": "img", "class": "figure"}
    root = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "id": name, **ids})
    SubElement(root, "title", {"id": f"{name}-t"}).text = title
    SubElement(root, "desc", {"id": f"{name}-d"}).text = description
    SubElement(root, "style").text = style()
    SubElement(root, "rect", {"class": "paper", "width": "100%", "height": "100%"})
    _text(root, "15", "24", title, kind="headline")
    top = 24
    for line in textwrap.wrap(below, width // 7):
        top += 20
        _text(root, "15", str(top), line)
    top += 20
    for figure in figures:
        part = figure.element(alone=True)
        del part.attrib["xmlns"]
        for child in part.findall("style") + part.findall("rect"):
            part.remove(child)
        _text(root, "15", str(top + 14), figure.title, kind="title")
        part.set("y", str(top + 22))
        root.append(part)
        top += 22 + int(part.attrib["height"]) + 18
    root.attrib |= {"viewBox": f"0 0 {width} {top}", "width": str(width), "height": str(top)}
    return Markup(tostring(root, encoding="unicode"))


def _hatched_shapes(name: str, tag: str, attributes: dict[str, str], part: int) -> list[Element]:
    """A shape in the part's colour, and its hatch over it."""
    found = [Element(tag, {**attributes, "class": f"part p{part}"})]
    if _HATCHES[part]:
        found.append(Element(tag, {**attributes, "fill": f"url(#{name}-h{part})"}))
    return found


def _symbol(name: str, kind: str, part: int | None) -> list[Element]:
    """A mark, a line, or a part's box, about 22x18."""
    if part is not None:
        box = {"x": "1", "y": "2", "width": "20", "height": "14"}
        return _hatched_shapes(name, "rect", box, part)
    if kind in ("dot", "dash"):
        path = "M11,9h0" if kind == "dot" else "M8,9h6"
        return [Element("path", {"d": path, "class": f"dots {kind}"})]
    if kind in SHAPES:
        place = {"transform": "translate(11 9)"}
        return [Element("path", {**place, "d": SHAPES[kind], "class": f"mark {kind}"})]
    return [Element("path", {"d": "M1,9H21", "class": f"line {kind}"})]


def _hatch(name: str, part: int) -> Element:
    size = {"width": "6", "height": "6", "patternUnits": "userSpaceOnUse"}
    pattern = Element("pattern", {"id": f"{name}-h{part}", **size})
    SubElement(pattern, "path", {"d": _HATCHES[part], "class": "tile"})
    return pattern


def _short(root: Element) -> Markup:
    """For a page, which has thousands: values that HTML takes without quotes have none."""
    return Markup(re.sub(r"(<[^<>]*>)", _unquoted, tostring(root, encoding="unicode")))


def _unquoted(tag: re.Match[str]) -> str:
    return re.sub(r'="([#\w.-]+)"', r"=\1", tag[0]).replace('" />', '"/>')


def _tick(place: int, axis: Axis) -> str:
    """The class of a tick's text: every other one of many gives way where there is little room."""
    return "odd" if place % 2 and len(axis.ticks) > 4 else ""


def _line(parent: Element, x1: str, y1: str, x2: str, y2: str, kind: str) -> None:
    SubElement(parent, "path", {"class": kind, "d": f"M{x1},{y1}L{x2},{y2}"})


def _text(
    parent: Element, x: str, y: str, text: str, anchor: str = "start", kind: str = ""
) -> Element:
    found = SubElement(parent, "text", {"x": x, "y": y})
    if anchor != "start":
        found.set("text-anchor", anchor)
    if kind:
        found.set("class", kind)
    found.text = text
    return found


def _n(value: float) -> str:
    """A coordinate: one decimal is a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


@cache
def style() -> str:
    """CSS of figures, on a page or alone."""
    return (files("kwsearch.pages") / "assets" / "figure.css").read_text(encoding="utf-8")
