"""Options that several commands share, and the values they take."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import click
from click.core import ParameterSource

from kwlayers.methods import NAMES
from kwsearch.passwords import STORAGE, whole


class Parsed(click.ParamType):  # type: ignore[type-arg]
    """A value read by a function of `kwsearch.units`, loaded when the first one is read."""

    def __init__(self, function: str, name: str) -> None:
        self.function = function
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from kwsearch import units

        try:
            return getattr(units, self.function)(value)
        except ValueError as error:
            return self.fail(str(error), param, ctx)


class Pair(click.ParamType):  # type: ignore[type-arg]
    """`0.5` or `0.5,0.25`: one ratio for both, or (out, in)."""

    name = "OUT[,IN]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from kwsearch.units import parse_ratio

        parts = value.split(",") if isinstance(value, str) else list(value)
        try:
            ratios = [parse_ratio(part) for part in parts]
        except ValueError as error:
            return self.fail(str(error), param, ctx)
        if len(ratios) > 2:
            return self.fail(f"{value!r}: one ratio, or two (out,in)", param, ctx)
        return (ratios[0], ratios[-1])


RATIO = Parsed("parse_ratio", "RATIO")
COUNT = Parsed("parse_count", "COUNT")
BYTES = Parsed("parse_bytes", "BYTES")
MS = Parsed("parse_ms", "TIME")
SIZE = Parsed("parse_size", "CxH[xW…]")
Command = Callable[..., Any]


class Several(click.ParamType):  # type: ignore[type-arg]
    """Values of one type, between commas."""

    def __init__(self, kind: click.ParamType) -> None:  # type: ignore[type-arg]
        self.kind = kind
        self.name = f"{kind.name.upper()},…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        parts = value.split(",") if isinstance(value, str) else value
        return [self.kind.convert(part, param, ctx) for part in parts]


def several(
    kind: click.ParamType,  # type: ignore[type-arg]
    name: str,
    default: str | None,
    text: str,
) -> Callable[[Command], Command]:
    """An option that may be given often, or once with commas."""

    def flat(ctx: click.Context, param: click.Parameter, value: Any) -> list[Any]:
        return list(dict.fromkeys(itertools.chain.from_iterable(value)))

    given = [] if default is None else [default]
    return click.option(
        name, type=Several(kind), multiple=True, default=given, callback=flat, help=text
    )


storage_option = click.option(
    "--storage",
    metavar="URL",
    callback=lambda context, parameter, url: None if url is None else whole(url),
    help=f"Database of the study, e.g. postgresql://user@host/name.  [default: ${STORAGE}]",
)
methods_option = several(
    click.Choice(NAMES),
    "--methods",
    "kernel_warehouse",
    f"Whose plans of a MODEL: {', '.join(NAMES)}.  [default: kernel_warehouse]",
)
trust_option = click.option(
    "--trust",
    is_flag=True,
    help="Let the model be code of your own, package.module:function, which is then imported.",
)


def without_trust(overrides: Sequence[str], trust: bool) -> tuple[list[str], bool]:
    """KEY=VALUE changes, and whether --trust or trust=true is among what was given."""
    return [one for one in overrides if one != "trust=true"], trust or "trust=true" in overrides


def target_options(command: Command) -> Command:
    """--ratio, --params, --total-ratio: at most one of them."""
    for option in (
        click.option(
            "--total-ratio", type=RATIO, help="Parameters over those of the static model: 0.5."
        ),
        click.option("--params", type=COUNT, help="Parameters of the whole network: 12.8M."),
        click.option("--ratio", type=RATIO, help="The convolutional budget b = n / m: 0.5."),
    ):
        command = option(command)
    return command


def plan_options(command: Command) -> Command:
    """The method and what changes its plan, whatever its size."""
    for option in (
        click.option(
            "--set",
            "own",
            metavar="KEY=VALUE",
            multiple=True,
            help="Any setting of the method, e.g. num_kernels=4.  [repeatable]",
        ),
        click.option(
            "--spatial-partition/--no-spatial-partition",
            default=None,
            help="Cells of 1x1, or of the whole kernel.  [default: 1x1]",
        ),
        click.option(
            "--norm",
            type=click.Choice(["auto", "batch", "layer"]),
            help="Norm of the attention.  [default: auto]",
        ),
        click.option(
            "--basis-ratio", type=RATIO, help="Nonlocal basis over other cells.  [default: 1]"
        ),
        click.option(
            "--reduction", type=RATIO, help="Attention width over channels.  [default: 1/16]"
        ),
        click.option(
            "--sharing",
            type=click.Choice(["stage", "position", "layer"]),
            help="Which layers share a warehouse.  [default: stage]",
        ),
        click.option("--cell-ratio", type=Pair(), help="Cell over common channels.  [default: 1]"),
        click.option(
            "--method",
            type=click.Choice(NAMES),
            help="What makes layers dynamic.  [default: kernel_warehouse]",
        ),
    ):
        command = option(command)
    return command


RECIPE_ENDINGS = (".yaml", ".yml")


def is_recipe(argument: str) -> bool:
    """Whether a MODEL|RECIPE argument means a file."""
    return argument.endswith(RECIPE_ENDINGS) or "/" in argument or os.path.exists(argument)


def refuse(names: Sequence[str], why: str) -> None:
    """Raise UsageError for the first of these parameters that the command line gives."""
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = next(one.opts[0] for one in context.command.params if one.name == name)
            raise click.UsageError(f"{option}: {why}")
