"""`kwsearch validate`: is this recipe right? If not, everything that is wrong with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kwsearch.cli.options import trust_option, without_trust

if TYPE_CHECKING:
    from kwsearch.recipe import Recipe


@click.command("validate")
@click.argument("recipe", metavar="RECIPE")
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@trust_option
@click.pass_context
def command(ctx: click.Context, recipe: str, overrides: tuple[str, ...], trust: bool) -> None:
    """Check a recipe file, with KEY=VALUE changes such as proxy.epochs=3.

    Prints every problem with its line and column, and exits with 2 if there is one, with 3 if
    all that is wrong is a budget that no plan meets.
    """
    from kwsearch.recipe import RecipeError, load_recipe
    from kwsearch.resolve import network_of, outcome_of

    settings, trust = without_trust(overrides, trust)
    try:
        loaded = load_recipe(recipe, settings)
    except RecipeError as error:
        click.echo(str(error), err=True)
        ctx.exit(2)
    if loaded.of_architectures:
        from kwsearch import architectures

        architectures.feasible_of(loaded)
        architectures.architecture_of(loaded)
    else:  # What only the model can tell: its name, the plan's layers, whether a plan fits.
        outcome_of(loaded, network_of(loaded, trust))
    click.echo(f"{recipe}: ok ({', '.join(_summary(loaded))})")


def _summary(recipe: Recipe) -> list[str]:
    from kwlayers.plan import counted
    from kwsearch.units import format_count

    parts = [recipe.model.name]
    if recipe.budget is not None:
        for key in ("ratio", "total_ratio"):
            value = getattr(recipe.budget, key)
            parts += [] if value is None else [f"{key} {value:g}"]
        if recipe.budget.params is not None:
            parts.append(f"params {format_count(recipe.budget.params)}")
    if recipe.micronas is not None and recipe.micronas.architecture is not None:
        parts.append("an architecture")
    if recipe.plan is not None:
        parts.append(counted(len(recipe.plan.groups), "group"))
    return parts
