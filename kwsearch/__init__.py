"""kwsearch: plan and search the parameter budget of dynamic convolutions."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kwsearch.recipe import Recipe, RecipeError, load_recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "RecipeError", "load_recipe"]

# pydantic and yaml load with the first recipe, so that `kwsearch --help` answers at once.
_HOME = dict.fromkeys(__all__, "kwsearch.recipe")


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
