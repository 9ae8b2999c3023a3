"""kwsearch budget: what a parameter budget buys in a model, and what it costs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from kwsearch.cli.options import (
    RECIPE_ENDINGS,
    SIZE,
    plan_options,
    target_options,
    trust_option,
)
from kwsearch.cli.pages import check_place, command_line, write
from kwsearch.cli.step import STEP_OPTIONS, StepRequest, step_options

if TYPE_CHECKING:
    from kwlayers.layout import MethodSettings
    from kwlayers.plan import Network
    from kwsearch.budget import Outcome
    from kwsearch.cli.request import Request
    from kwsearch.latency.plans import PlanLatency
    from kwsearch.latency_report import Latencies
    from kwsearch.pages.curve import Point
    from kwsearch.step_report import Takes

    Reports = Mapping[str, Takes | Latencies]


@click.command("budget")
@click.argument("model", metavar="MODEL|RECIPE.yaml")
@target_options
@plan_options
@click.option("--input", "input_size", type=SIZE, help="Input size.  [default: the model's]")
@click.option("--classes", type=click.IntRange(min=1), help="Number of classes.")
@trust_option
@click.option(
    "--by", type=click.Choice(["stage", "layer"]), default="stage", help="Lines of the table."
)
@step_options
@click.option("--flops", is_flag=True, help="Show FLOPs, two per MAC.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON (always MACs).")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, writable=True), help="Write a recipe."
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, writable=True),
    help="Draw parameters and MACs over the budget: a picture, .svg, or a page, .html.",
)
@click.option(
    "--check", is_flag=True, help="Recount with PyTorch's FlopCounterMode and fvcore, and explain."
)
def command(
    model: str,
    ratio: float | None,
    params: int | None,
    total_ratio: float | None,
    input_size: tuple[int, ...] | None,
    classes: int | None,
    trust: bool,
    by: str,
    flops: bool,
    as_json: bool,
    output: str | None,
    plot: str | None,
    check: bool,
    **settings: Any,
) -> None:
    """Exact parameters and MACs of MODEL under a budget, by part.

    Give one target: --ratio (cells over mixtures, the papers' b), --params or --total-ratio
    (of the whole network), or none to see the published settings. A recipe with a plan is
    counted as it stands. A recipe of micronas without a budget is about architectures: its own,
    cell by cell, or what its limits leave.

    \b
    kwsearch budget resnet50 --ratio 0.5
    kwsearch budget resnet18 --params 8M --sharing layer -o recipe.yaml
    kwsearch budget recipes/kw_resnet18_1x.yaml --by layer
    kwsearch budget resnet50 --ratio 0.5 --plot budget.html
    kwsearch budget resnet50 --ratio 0.5 --batch 64 --memory 12GB
    kwsearch budget resnet18 --ratio 0.5 --latency 80ms --lut device.lut.yaml
    """
    from kwsearch.budget import Target
    from kwsearch.cli import architecture
    from kwsearch.cli.request import Request

    target = Target(ratio, params, total_ratio)
    if not target and (recipe := architecture.recipe_of(model)) is not None:
        architecture.check_used()
        architecture.show(recipe, as_json)
        return
    request = Request(model, input_size, classes, target, trust)
    given = {name: value for name, value in settings.items() if value is not None}
    step = StepRequest({name: given.pop(name) for name in STEP_OPTIONS if name in given})
    request.apply(given)
    if output:
        _check_output(output)
    if plot:
        check_place("--plot", plot, ".svg", ".html")
    network = request.network()
    latency = step.plan_latency(request, network.input_size)
    if not request.target and not request.has_plan and not request.sized:
        if output or check or step.of_memory or step.latency is not None:
            raise click.UsageError(
                "-o, --check, --batch, --memory and --latency need a target: --ratio, --params, "
                "--total-ratio"
            )
        if plot:
            _draw(request, network, None, plot)
        _show_settings(request, network, as_json, latency)
        return
    outcome = request.outcome(network)
    _note_published(request)
    reports = step.reports(request, outcome.plan, latency)
    if output:  # first: whoever reads what is printed may stop reading
        _write(request, outcome, output)
    if plot:
        _draw(request, network, outcome, plot)
    if as_json:
        _print_json(request, outcome, by, reports, latency)
    else:
        _print(request, outcome, by, 2 if flops else 1, reports, latency)
    if check:
        _print_check(request, outcome, as_json)
    for report in reports.values():
        report.check()


def _print(
    request: Request,
    outcome: Outcome,
    by: str,
    scale: int,
    reports: Reports,
    latency: PlanLatency | None,
) -> None:
    from kwsearch import report, terminal

    out = terminal.console()
    size = "x".join(map(str, outcome.plan.network.input_size))
    out.print(f"[bold]{request.model}[/bold] at {size}, {_how(request, outcome)}")
    for line in report.summary_lines(outcome.plan, scale):
        out.print(terminal.plain(line))
    for note in outcome.plan.notes:
        click.echo(f"note: {note}", err=True)
    make_tables = report.stage_tables if by == "stage" else report.layer_tables
    ms = None if latency is None else latency.by_module(outcome.plan)
    for table in make_tables(outcome.plan, scale, ms):
        out.print(table)
    if len(outcome.candidates) > 1:
        out.print(report.trade_table(outcome.candidates))
    for step in reports.values():
        for part in step.parts():
            out.print(part)


def _how(request: Request, outcome: Outcome) -> str:
    """The plan's origin, in words."""
    if outcome.published is not None:
        entry = outcome.published
        accuracy = f" ({entry.top1:.2f} % ImageNet top-1)" if request.as_published else ""
        return f"published setting {entry.name}{accuracy}"
    if request.has_plan:
        return f"the recipe's plan, b = {outcome.ratio:.4g} overall"
    from kwlayers.methods import find

    method = find(outcome.settings.method)
    if outcome.settings.sized and outcome.target.params is outcome.target.total_ratio is None:
        sizes = sorted({group.describe() for group in outcome.plan.groups})
        return f"{method.title}, {', '.join(sizes) if len(sizes) < 4 else 'sizes as published'}"
    if outcome.target.ratio is not None:
        return f"KernelWarehouse at b = {outcome.ratio:.4g}"
    allowed = outcome.target.params_of(outcome.plan.network)
    unused = allowed - outcome.plan.cost().deployed
    reached = f"b = {outcome.ratio:.4g} overall"
    if outcome.settings.sized:
        reached = f"{method.title}, {outcome.ratio:.4g} of the usual size overall"
    return f"at most {allowed:,} parameters: {reached}, {unused:,} unused"


def _note_published(request: Request) -> None:
    """A plan option replaces all of a published setting: say so."""
    from kwsearch import published

    if request.settings is None or request.target.ratio is None or request.source is not None:
        return
    if request.settings.sized:
        return
    entry = published.find(request.model, request.target.ratio)
    if entry is not None:
        click.echo(
            f"note: options given, so the published setting {entry.name} is not used", err=True
        )


def _print_json(
    request: Request, outcome: Outcome, by: str, reports: Reports, latency: PlanLatency | None
) -> None:
    import json

    from kwsearch import report

    data: dict[str, Any] = {
        "model": request.model,
        "input": list(outcome.plan.network.input_size),
        "ratio": outcome.ratio,
        **report.plan_json(outcome.plan),
    }
    if outcome.published is not None:
        data["published"] = outcome.published.name
    if outcome.candidates:
        data["candidates"] = [
            {"why": c.why, "spread": c.solution.spread, **report.plan_json(c.plan)}
            for c in outcome.candidates
        ]
    if outcome.plan.notes:
        data["notes"] = list(outcome.plan.notes)
    data.update({name: step.to_json() for name, step in reports.items()})
    if by == "layer":
        ms = {} if latency is None else latency.by_module(outcome.plan)
        data["layers"] = [
            {**vars(layer), **({"ms": ms.get(layer.name, 0.0)} if ms else {})}
            for layer in outcome.plan.cost_by_layer()
        ]
    click.echo(json.dumps(data, indent=2))


def _show_settings(
    request: Request, network: Network, as_json: bool, latency: PlanLatency | None
) -> None:
    """Without a target: the published settings, or the usual ratios where there are none."""
    from kwlayers.sharing import Settings
    from kwsearch import latency_report, published, report, terminal
    from kwsearch.budget import Target, meet

    entries = published.of_model(request.model) if request.settings is None else ()
    if entries:
        shown = "{:.2f} %" if request.as_published else ""
        rows = [(e.name, e.ratio, e.plan(network), shown.format(e.top1)) for e in entries]
    else:
        settings = request.settings or Settings()
        rows = [
            (f"b = {published.fraction(b)}", b, meet(network, Target(b), settings).plan, "")
            for b in (0.25, 0.5, 1.0, 2.0, 4.0)
        ]
    plans = [None, *(plan for _, _, plan, _ in rows)]
    ms = [] if latency is None else [latency(plan).ms for plan in plans]
    if as_json:
        import json

        settings_json = [
            {"name": name, "ratio": b, **report.plan_json(plan), **({"ms": ms[i]} if ms else {})}
            for i, (name, b, plan, _) in enumerate(rows, 1)
        ]
        data = {
            "model": request.model,
            "input": list(network.input_size),
            "static": {
                "params": network.params,
                "macs": network.macs,
                **({"ms": ms[0]} if ms else {}),
            },
            "settings": settings_json,
            "published": bool(entries),
        }
        click.echo(json.dumps(data, indent=2))
        return
    out = terminal.console()
    size = "x".join(map(str, network.input_size))
    what = "published settings" if entries else "no published setting; usual ratios"
    out.print(f"[bold]{request.model}[/bold] at {size}: {what}")
    static = (network.params, network.macs)
    shown_rows = [(name, plan, accuracy) for name, _, plan, accuracy in rows]
    out.print(report.published_table(shown_rows, static, ms))
    if latency is not None:
        out.print(latency_report.headline(latency))
    out.print(_floor(request, network))


def _floor(request: Request, network: Network) -> str:
    """The smallest plan under the settings, in words."""
    from kwlayers.planner import lay_out
    from kwlayers.sharing import Settings

    floor = lay_out(network, request.settings or Settings()).floor().cost().deployed
    return f"smallest reachable with these options: {floor:,} parameters (one cell per warehouse)"


def _print_check(request: Request, outcome: Outcome, as_json: bool) -> None:
    from kwsearch import report
    from kwsearch.recount import recount_plan

    checks = recount_plan(
        request.model, outcome.plan, request.input_size, request.classes, request.trust
    )
    for line in report.recount_lines(checks):
        click.echo(line, err=as_json)
    if not all(check.explained for check in checks):
        raise click.ClickException("a count differs without an explanation; please report this")


def _check_output(output: str) -> None:
    """Before the work: a place that cannot be written, a name that is no recipe's."""
    folder = os.path.dirname(output) or "."
    if not os.path.isdir(folder):
        raise click.UsageError(f"-o {output}: there is no folder {folder}")
    if not output.endswith(RECIPE_ENDINGS):
        raise click.UsageError(f"-o {output}: a recipe's name ends in .yaml")


def _write(request: Request, outcome: Outcome, output: str) -> None:
    from kwsearch.published import PAPER
    from kwsearch.recipe import write_recipe
    from kwsearch.report import params_text
    from kwsearch.resolve import recipe_of, versions

    sections: dict[str, Any] = {
        "provenance": {"command": command_line(), "versions": versions()},
    }
    if request.source is not None:
        kept = request.source.to_dict()
        sections |= {k: kept[k] for k in ("search", "proxy", "training") if k in kept}
        if request.has_plan and "budget" in kept:
            sections["budget"] = kept["budget"]
    title = f"{request.model}: {_how(request, outcome)}."
    if (entry := outcome.published) is not None:
        title = f"{entry.name}: KernelWarehouse at b = {entry.ratio:g}, as published"
        if request.as_published:
            top1, static = f"{entry.top1:.2f} % ImageNet top-1", f"{entry.static_top1:.2f} %"
            title += f" ({top1}; static {static})"
        title += "."
        sections["training"] = {
            "epochs": entry.epochs,
            "temperature_epochs": entry.temperature_epochs,
        }
        sections["provenance"]["paper"] = PAPER
    recipe = recipe_of(outcome, request.model, request.input_size, request.classes, sections)
    size = "x".join(map(str, outcome.plan.network.input_size))
    header = [
        title,
        f"{params_text(outcome.plan)}, {outcome.plan.cost().macs.total:,} MACs at {size}.",
        "",
        f"    kwsearch budget {output}" + (" --trust" if request.trust else ""),
    ]
    write_recipe(recipe, output, header)
    click.echo(f"wrote {output}", err=True)


def _draw(request: Request, network: Network, outcome: Outcome | None, path: str) -> None:
    """Budgets from the smallest on, with the one that is asked for."""
    from kwlayers.sharing import Settings
    from kwsearch.pages import budget as pages
    from kwsearch.pages.curve import curve_of
    from kwsearch.resolve import versions

    settings = outcome.settings if outcome else request.settings or Settings()
    chosen = None if outcome is None else _point(request, outcome)
    plan = outcome.plan if outcome and request.has_plan else None
    curve = curve_of(network, settings, request.model, chosen, plan)
    asked = _with_settings(settings) if outcome is None else _how(request, outcome)
    if path.lower().endswith(".svg"):
        made = ", ".join(f"{name} {number}" for name, number in versions().items())
        write(path, pages.svg(curve, request.model, asked, f"{command_line()} ({made})"))
    else:
        write(path, pages.page(curve, request.model, asked, command_line(), versions()))


def _with_settings(settings: MethodSettings) -> str:
    """A method, and what is not as by default."""
    from kwlayers.methods import find

    method = find(settings.method)
    default = method.settings()
    changed = [
        f"{name} {getattr(settings, name)}"
        for name in settings.names
        if getattr(settings, name) != getattr(default, name)
    ]
    rules = ["rules of the recipe"] if settings.rules else []
    return ", ".join([method.title, *changed, *rules])


def _point(request: Request, outcome: Outcome) -> Point:
    """The plan that is asked for, named as it was."""
    from kwlayers.methods import find
    from kwsearch.pages.curve import Point

    target = outcome.target
    if request.has_plan:
        name, short = "the recipe's plan", "the recipe's plan"
    elif target.ratio is not None:
        given = f"{'ratio' if outcome.settings.sized else 'b ='} {target.ratio:g}"
        kept = f"{outcome.ratio:.3g}" == f"{target.ratio:.3g}"
        short = f"asked: {given}" + ("" if kept else f", {outcome.ratio:.3g} overall")
        name = outcome.published.name if outcome.published else f"the plan for {given}"
    elif target:
        allowed = target.params_of(outcome.plan.network)
        name, short = f"at most {allowed:,} parameters", f"asked: at most {allowed:,}"
    else:
        method = find(outcome.settings.method)
        usual = outcome.settings == method.settings()
        name = f"{method.title} {'as published' if usual else 'by these settings'}"
        short = name
    return Point.of(outcome.plan, name, short)
