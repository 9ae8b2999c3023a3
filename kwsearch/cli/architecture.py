"""Recipes about architectures, where others are about plans."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from kwsearch.cli.options import is_recipe

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
    context = click.get_current_context()
    for name, given in context.params.items():
        source = context.get_parameter_source(name)
        if source is ParameterSource.COMMANDLINE and name not in ("model", "as_json") and given:
            option = next(one.opts[0] for one in context.command.params if one.name == name)
            raise click.UsageError(
                f"{option}: is of plans; the recipe is about architectures, which take none but "
                "--json"
            )


def show(recipe: Recipe, as_json: bool) -> None:
    """Its architecture operator by operator; without one, what there is within the limits."""
    import json

    from kwsearch import architecture_report, architectures, terminal

    feasible = architectures.feasible_of(recipe)
    found = architectures.architecture_of(recipe)
    warehouse = recipe.micronas.warehouse if recipe.micronas else None
    if as_json:
        data = architecture_report.to_json(feasible, found, warehouse)
        click.echo(json.dumps(data, indent=2))
    else:
        out = terminal.console()
        for part in architecture_report.parts(feasible, found, warehouse):
            out.print(part if not isinstance(part, str) else terminal.plain(part))
    architecture_report.check(feasible, found, warehouse)
