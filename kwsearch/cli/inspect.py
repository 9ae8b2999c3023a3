"""kwsearch inspect: where every layer of a model stands, what it becomes and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from kwsearch.cli.options import SIZE, plan_options, target_options, trust_option

if TYPE_CHECKING:
    from kwlayers.plan import Plan
    from kwsearch.inspection import Layer


@click.command("inspect")
@click.argument("model", metavar="MODEL|RECIPE.yaml")
@target_options
@plan_options
@click.option("--input", "input_size", type=SIZE, help="Input size.  [default: the model's]")
@click.option("--classes", type=click.IntRange(min=1), help="Number of classes.")
@trust_option
@click.option("--flops", is_flag=True, help="Show FLOPs, two per MAC.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON (always MACs, whole numbers).")
def command(
    model: str,
    ratio: float | None,
    params: int | None,
    total_ratio: float | None,
    input_size: tuple[int, ...] | None,
    classes: int | None,
    trust: bool,
    flops: bool,
    as_json: bool,
    **plan_settings: Any,
) -> None:
    """The layers of MODEL as a tree: stage, warehouse, m and n, parameters and MACs by part, and
    why the static ones stay static. Without a target at b = 1, by other methods as published.

    \b
    kwsearch inspect timm:resnext50_32x4d
    kwsearch inspect recipe.yaml --json
    """
    from kwlayers.plan import Plan
    from kwlayers.rules import NothingToConvert
    from kwlayers.sharing import Settings
    from kwsearch import inspection
    from kwsearch.budget import Target
    from kwsearch.cli.request import Request

    target = Target(ratio, params, total_ratio)
    request = Request(model, input_size, classes, target, trust)
    request.apply({k: v for k, v in plan_settings.items() if v is not None})
    if not request.target and not request.has_plan and not request.sized:
        request.target = Target(ratio=1.0)
    network = request.network()
    try:
        outcome = request.outcome(network)
        plan, settings = outcome.plan, outcome.settings
    except NothingToConvert:
        plan, settings = Plan(network, ()), request.settings or Settings()
    layers = inspection.layers_of(plan, settings)
    if as_json:
        _print_json(request.model, plan, layers)
    else:
        _print(request.model, plan, layers, 2 if flops else 1)


def _print_json(model: str, plan: Plan, layers: Sequence[Layer]) -> None:
    import json

    from kwsearch import inspection, report

    data = {
        "model": model,
        "input": list(plan.network.input_size),
        **report.plan_json(plan),
        "layers": inspection.layers_json(layers),
        "others": [vars(other) for other in plan.network.others],
    }
    click.echo(json.dumps(data, indent=2))


def _print(model: str, plan: Plan, layers: Sequence[Layer], scale: int) -> None:
    from kwlayers.plan import counted
    from kwlayers.rules import static_others
    from kwsearch import inspection, report, terminal

    out = terminal.console()
    size = "x".join(map(str, plan.network.input_size))
    static = sum(layer.warehouse is None for layer in layers)
    noun = "warehouse" if len(plan.warehouses) == len(plan.groups) else "group"
    out.print(
        f"[bold]{terminal.plain(model)}[/bold] at {size}: "
        f"{counted(len(layers) - static, 'layer')} in {counted(len(plan.groups), noun)}, "
        f"{static} static"
    )
    for line in report.summary_lines(plan, scale):
        out.print(terminal.plain(line))
    table, notes = inspection.tree(layers, noun, scale)
    out.print(table)
    for note in [*notes, *static_others(plan.network)]:
        out.print(terminal.plain(note))
