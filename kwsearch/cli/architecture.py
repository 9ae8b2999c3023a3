"""Recipes about architectures, where others are about plans."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kwsearch.cli.options import is_recipe, refuse

if TYPE_CHECKING:
    from kwsearch.recipe import Recipe


def recipe_of(model: str) -> Recipe | None:
    """The recipe, if it is one about architectures."""
    if not is_recipe(model):
        return None
    from kwsearch.recipe import load_recipe

    found = load_recipe(model)
    return found if found.of_architectures else None


def check_used() -> None:
    """Refuse options that are of plans."""
    params = click.get_current_context().params
    refuse(
        [name for name, given in params.items() if given and name not in ("model", "as_json")],
        "is of plans; the recipe is about architectures, which take none but --json",
    )


def show(recipe: Recipe, as_json: bool) -> None:
    """Its architecture operator by operator; without one, what there is within the limits."""
    import json

    from kwsearch import architecture_report, architectures, terminal

    feasible = architectures.feasible_of(recipe)
    found = architectures.architecture_of(recipe)
    warehouse = recipe.micronas.warehouse if recipe.micronas else None
    counted = None
    if found is not None:
        counted = architecture_report.count(feasible, found, warehouse)
    if as_json:
        data = architecture_report.to_json(feasible, counted)
        click.echo(json.dumps(data, indent=2))
    else:
        out = terminal.console()
        for part in architecture_report.parts(feasible, counted):
            out.print(part if not isinstance(part, str) else terminal.plain(part))
    architecture_report.check(feasible, counted)
