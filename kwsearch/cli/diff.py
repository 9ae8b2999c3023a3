"""kwsearch diff: what differs between two recipes and their plans."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kwsearch.cli.options import trust_option
from kwsearch.cli.pages import check_place, command_line, write

if TYPE_CHECKING:
    from kwsearch.diff import Side


@click.command("diff")
@click.argument("a", metavar="A.yaml")
@click.argument("b", metavar="B.yaml")
@trust_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON (always all names).")
@click.option(
    "--html", type=click.Path(dir_okay=False, writable=True), help="Write the difference as a page."
)
def command(a: str, b: str, trust: bool, as_json: bool, html: str | None) -> None:
    """What differs between two recipes: settings, parameters and MACs by part and by stage, groups,
    and layers that are dynamic in one only.

    A recipe without a plan is planned by its budget. Where it comes from (provenance) does not
    count. Exits with 0 whether they differ or not; --json says which.

    \b
    kwsearch diff recipes/kw_resnet18_1x.yaml recipes/kw_resnet18_0.5x.yaml
    kwsearch diff recipe.yaml runs/recipe/best.yaml --html diff.html
    """
    from kwsearch import diff_report
    from kwsearch.diff import diff

    if html:
        check_place("--html", html, ".html")
    found = diff(_side(a, trust), _side(b, trust))
    if html:
        from kwsearch.pages import diff as pages
        from kwsearch.resolve import versions

        write(html, pages.page(found, command_line(), versions()))
    if as_json:
        import json

        click.echo(json.dumps(diff_report.to_json(found), indent=2))
        return
    from kwsearch import terminal

    out = terminal.console()
    for part in diff_report.lines(found):
        out.print(part)


def _side(path: str, trust: bool) -> Side:
    from kwsearch.diff import Side
    from kwsearch.recipe import load_recipe
    from kwsearch.resolve import network_of, outcome_of

    recipe = load_recipe(path)
    return Side(path, recipe, outcome_of(recipe, network_of(recipe, trust)).plan)
