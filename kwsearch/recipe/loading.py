"""Reading recipes. Every problem of a file and its overrides comes in one RecipeError."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError

from kwsearch.recipe.messages import to_problems
from kwsearch.recipe.schema import Recipe
from kwsearch.recipe.tree import Origin, Problem, override_, problem, read_yaml

_NEEDED = "a recipe has at least format, model, and a budget or a plan"


class RecipeError(ValueError):
    """What is wrong with a recipe. problems: one line each, in the order of the file."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[RecipeError], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file. `overrides` are `path.to.key=value`, applied in order.

    Raises RecipeError, and nothing else, for whatever is wrong with the file.
    """
    source = os.fspath(path)
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise RecipeError([f"{source}: no such file"]) from None
    except IsADirectoryError:
        raise RecipeError([f"{source}: a directory, not a recipe file"]) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError([f"{source}: cannot be read ({reason})"]) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        got = f"got the byte 0x{data[error.start]:02x}"
        raise RecipeError([f"{source}:{line}:{column}: not UTF-8 text ({got})"]) from None
    return parse_recipe(text, source, overrides)


def parse_recipe(text: str, source: str = "<string>", overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from YAML text; `source` is its name in messages. Raises RecipeError."""
    problems: list[Problem] = []
    root = read_yaml(text, source, problems)
    if root is None or (root.value is None and not root.broken):
        raise RecipeError([line for _, line in problems] or [f"{source}: empty; {_NEEDED}"])
    if not isinstance(root.value, dict):
        if not problems:
            kind = "a list" if isinstance(root.value, list) else repr(root.value)
            problems.append(problem(root.place, [], f"not a mapping (got {kind}); {_NEEDED}"))
        raise RecipeError(line for _, line in problems)
    for override in overrides:
        override_(root, override, problems)
    try:
        recipe = Recipe.model_validate(root.plain())
    except ValidationError as error:
        problems += to_problems(error.errors(include_url=False), root)
    except RecursionError:
        problems.append(problem(root.place, [], "nested too deeply"))
    if problems:
        in_order = sorted(problems, key=lambda one: one[0][:2])
        raise RecipeError(line for _, line in in_order)
    recipe._origin = Origin(source, root)
    return recipe
