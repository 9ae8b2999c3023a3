"""Reading pages and plots back: tables, ids, and numbers by the ticks of an axis."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from xml.etree.ElementTree import Element

SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """ids: all of them. tables: by id, rows of the body as lists of (text, value). opened: tags.

    What is opened must be closed, in its order.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.opened: list[str] = []
        self.links: list[str] = []
        self.tables: dict[str, list[list[tuple[str, str | None]]]] = {}
        self.text = ""
        self._table = ""
        self._stack: list[str] = []
        self.feed(text)
        self.close()
        assert not self._stack, self._stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.opened.append(tag)
        if tag not in VOID:
            self._stack.append(tag)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        for name in ("href", "src", "data", "action"):
            if found.get(name):
                self.links.append(str(found[name]))
        if tag == "table":
            self._table = str(found.get("id"))
            self.tables[self._table] = []
        elif tag == "tr" and "tbody" in self._stack:
            self.tables[self._table].append([])
        elif tag in ("td", "th") and "tbody" in self._stack:
            self.tables[self._table][-1].append(("", found.get("data-v")))

    def handle_endtag(self, tag: str) -> None:
        assert self._stack, tag
        assert self._stack.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script", "title"} & set(self._stack):
            self.text += data
        if {"td", "th"} & set(self._stack) and "tbody" in self._stack:
            shown, value = self.tables[self._table][-1][-1]
            self.tables[self._table][-1][-1] = (shown + data, value)

    def row(self, table: str, name: str) -> list[int]:
        """The whole numbers of the row that has this text."""
        (row,) = (row for row in self.tables[table] if any(shown == name for shown, _ in row))
        return [int(value) for _, value in row if value and re.fullmatch("-?[0-9]+", value)]


def loads_nothing(text: str) -> bool:
    """Whether a file has no address in it but the name of SVG."""
    plain = text.replace("http://www.w3.org/2000/svg", "")
    return not re.search(
        r"""(?:src|href|action)\s*=\s*(?!["']?#)|url\((?!#)|@import|https?:""", plain
    )


def scale(figure: Element, along: str) -> Callable[[float], float]:
    """From a value to its pixel on an even axis of counts, by two of its ticks. along: x or y."""
    at: dict[float, float] = {}
    (axes,) = (g for g in figure.iter(f"{SVG}g") if g.get("class") == "axes")
    for text in axes.findall(f"{SVG}text"):
        if text.get("class") == "title":
            continue
        if (text.get("text-anchor") == "middle") == (along == "x"):
            at[_value(text.text or "")] = float(text.get(along) or 0)
    assert len(at) >= 2, at
    low, *_, high = sorted(at)
    each = (at[high] - at[low]) / (high - low)
    # Texts of ticks are a little below their lines.
    offset = 4.0 if along == "y" else 0.0
    return lambda value: at[low] - offset + (value - low) * each


def _value(text: str) -> float:
    units = {"k": 1e3, "M": 1e6, "G": 1e9}
    above, _, below = text.rstrip("kMG").partition("/")
    return float(above) / float(below or 1) * units.get(text[-1], 1.0)


def areas(figure: Element) -> dict[str, list[tuple[float, float]]]:
    """Corners by the class of the part."""
    found = {}
    for path in figure.iter(f"{SVG}path"):
        kind = path.get("class") or ""
        if kind.startswith("part "):
            corners = re.findall(r"([-\d.]+),([-\d.]+)", path.get("d") or "")
            found[kind.removeprefix("part ")] = [(float(x), float(y)) for x, y in corners]
    return found


def marks(figure: Element, kind: str) -> list[tuple[float, float]]:
    """Where the marks of a kind are."""
    return [
        (float(use.get("x") or 0), float(use.get("y") or 0))
        for use in figure.iter(f"{SVG}use")
        if use.get("class") == f"mark {kind}"
    ]
