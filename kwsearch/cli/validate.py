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

    Prints every problem with its line and column, and exits with 2 if there is one.
    """
    from kwsearch.recipe import RecipeError, load_recipe

    settings, trust = without_trust(overrides, trust)
    try:
        loaded = load_recipe(recipe, settings)
    except RecipeError as error:
        click.echo(str(error), err=True)
        ctx.exit(2)
    _resolve(recipe, loaded, trust)
    click.echo(f"{recipe}: ok ({', '.join(_summary(loaded))})")


def _resolve(path: str, recipe: Recipe, trust: bool) -> None:
    """What only the model can tell: its name, the plan's layers, whether a plan fits."""
    from kwlayers.plan import PlanError
    from kwsearch.networks import source
    from kwsearch.resolve import network_of, outcome_of, target_of
    from kwsearch.zoo import UnknownModelError

    try:
        source(recipe.model.name, trust)
        if recipe.plan is not None and not recipe.plan.groups:
            raise PlanError("plan: it has no groups; delete the section to plan by the budget")
        network = network_of(recipe, trust)
        total = outcome_of(recipe, network).plan.cost().params.total
        target = target_of(recipe)
        if target and target.ratio is None and total > (allowed := target.params_of(network)):
            raise PlanError(f"plan: {total:,} parameters, over the budget of {allowed:,}")
    except (UnknownModelError, PlanError) as error:
        raise PlanError(f"{path}: {error}") from None


def _summary(recipe: Recipe) -> list[str]:
    from kwsearch.units import format_count

    parts = [recipe.model.name]
    if recipe.budget is not None:
        for key in ("ratio", "total_ratio"):
            value = getattr(recipe.budget, key)
            parts += [] if value is None else [f"{key} {value:g}"]
        if recipe.budget.params is not None:
            parts.append(f"params {format_count(recipe.budget.params)}")
    if recipe.plan is not None:
        count = len(recipe.plan.groups)
        parts.append(f"{count} group" if count == 1 else f"{count} groups")
    return parts
