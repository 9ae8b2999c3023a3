"""kwsearch compare: what a budget buys by each method."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from kwlayers.methods import NAMES
from kwsearch.cli.options import SIZE, refuse, several, target_options, trust_option
from kwsearch.cli.pages import check_place, command_line, write
from kwsearch.cli.step import STEP_OPTIONS, StepRequest, step_options

if TYPE_CHECKING:
    from kwlayers.plan import Network
    from kwsearch.cli.request import Request


@click.command("compare")
@click.argument("model", metavar="MODEL|RECIPE.yaml")
@target_options
@several(
    click.Choice(NAMES),
    "--methods",
    None,
    f"Which methods: {', '.join(NAMES)}.  [default: all that the model is for]",
)
@click.option("--input", "input_size", type=SIZE, help="Input size.  [default: the model's]")
@click.option("--classes", type=click.IntRange(min=1), help="Number of classes.")
@trust_option
@step_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--html", type=click.Path(dir_okay=False, writable=True), help="Write the comparison as a page."
)
def command(
    model: str,
    ratio: float | None,
    params: int | None,
    total_ratio: float | None,
    methods: list[str],
    input_size: tuple[int, ...] | None,
    classes: int | None,
    trust: bool,
    as_json: bool,
    html: str | None,
    **step_settings: Any,
) -> None:
    """MODEL by every dynamic convolution, exactly counted, under one budget.

    Give one target, or none for the settings that each method published. --batch adds the memory
    of a training step of so many images, --lut the latency by a device's table (`kwsearch profile
    MODEL --methods …` makes it). Of a recipe only the model counts, and its budget if no target is
    given.

    \b
    kwsearch compare resnet18 --params 12M
    kwsearch compare resnet50 --total-ratio 2 --methods odconv,dyconv --batch 32
    kwsearch compare resnet18 --total-ratio 1 --html compare.html
    """
    from kwsearch import compare
    from kwsearch.budget import Target
    from kwsearch.cli.request import Request

    target = Target(ratio, params, total_ratio)
    request = Request(model, input_size, classes, target, trust, replans=False)
    given = {k: step_settings[k] for k in STEP_OPTIONS if step_settings[k] is not None}
    refuse(
        ("memory", "latency"), "a limit of `kwsearch budget`; --batch and --lut say what is taken"
    )
    refuse(("inference",), "of `kwsearch budget`; here memory is that of training")
    step = StepRequest(given, beside_latency=True)
    if html:
        check_place("--html", html, ".html")
    network = request.network()
    latency = step.plan_latency(request, network.input_size)
    memory = partial(step.memory_of, request, network.input_size) if step.of_memory else None
    entries = compare.compare(network, request.target, methods, request.model, memory, latency)
    static_memory = None if memory is None else memory(None)
    static_ms = None if latency is None else latency(None).ms
    if html:
        from kwsearch.pages import compare as pages
        from kwsearch.resolve import versions

        text = pages.page(
            entries,
            network,
            request.model,
            _asked(request),
            _allowed(request, network),
            command_line(),
            versions(),
            static_memory.total if static_memory else None,
            static_ms,
        )
        write(html, text)
    if as_json:
        import json

        data = {
            "model": request.model,
            "input": list(network.input_size),
            "target": {k: v for k, v in vars(request.target).items() if v is not None} or None,
            "static": {
                "params": network.params,
                "macs": network.macs,
                "train_memory": static_memory.total if static_memory else None,
                "latency_ms": static_ms,
            },
            **compare.to_json(entries),
        }
        click.echo(json.dumps(data, indent=2))
    else:
        from kwsearch import terminal

        out = terminal.console()
        size = "x".join(map(str, network.input_size))
        out.print(f"[bold]{terminal.plain(request.model)}[/bold] at {size}, {_asked(request)}")
        shown, reasons = compare.table(entries, network, static_memory, static_ms)
        out.print(shown)
        for line in reasons:
            out.print(line)
        if any(entry.plan is None for entry in entries):
            out.print("`kwsearch budget MODEL --method NAME` with this target says what is near")
    if all(entry.plan is None for entry in entries):
        raise compare.Unreachable("no method meets the target")


def _allowed(request: Request, network: Network) -> int | None:
    """Parameters under the target, where it says so."""
    target = request.target
    if not target or target.ratio is not None:
        return None
    return target.params_of(network)


def _asked(request: Request) -> str:
    target = request.target
    if not target:
        return "each method as published"
    ((name, value),) = ((k, v) for k, v in vars(target).items() if v is not None)
    if name == "params":
        return f"at most {value:,} parameters"
    if name == "total_ratio":
        return f"at most {value:g} x the static parameters"
    return f"at ratio {value:g}"
