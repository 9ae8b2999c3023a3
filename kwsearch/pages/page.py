"""Pages from templates: one file with style, script and plots in it, that loads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from kwsearch.pages.figure import style
from kwsearch.units import format_count, short_count

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, context: Mapping[str, Any]) -> str:
    """The page of a template in `assets`. Every text in context is escaped, Markup is not."""
    return _environment().get_template(template).render(**context)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(
        loader=PackageLoader("kwsearch.pages", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"count": format_count, "short": short_count, "percent": percent}
    found.globals |= {
        "figure_css": Markup(_brief(style())),
        "page_css": Markup(_brief(_asset("page.css"))),
        "page_js": Markup(_brief(_asset("page.js"))),
    }
    return found


def _asset(name: str) -> str:
    return (files("kwsearch.pages") / "assets" / name).read_text(encoding="utf-8")


def _brief(text: str) -> str:
    """Without indents and lines that are comments: every page has it."""
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("//"))


def percent(share: float) -> str:
    """0.8251 -> 82.51 %"""
    return f"{100 * share:.2f} %"
