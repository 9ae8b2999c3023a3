"""kwsearch profile: measure a latency table on this device."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kwsearch.cli import INTERRUPTED, architecture
from kwsearch.cli.options import (
    COUNT,
    RATIO,
    SIZE,
    is_recipe,
    methods_option,
    refuse,
    several,
    trust_option,
)

if TYPE_CHECKING:
    from kwsearch.latency.profiling import Profile
    from kwsearch.latency.subjects import Mode, Subject
    from kwsearch.latency.table import Table
    from kwsearch.recipe import Recipe

_OF_MODEL = ("input_size", "ratio", "methods", "classes")
_OF_NETWORKS = (*_OF_MODEL, "size", "dtype", "trust")


@click.command("profile")
@click.argument("models", metavar="[MODEL|RECIPE.yaml]...", nargs=-1)
@click.option("--grid", is_flag=True, help="Usual blocks at usual widths, for networks to come.")
@several(COUNT, "--size", "64", "Pixels on a side, of --grid.  [default: 64]")
@several(RATIO, "--ratio", "0.5,1,2", "Ratios b of a MODEL's plans.  [default: 0.5,1,2]")
@methods_option
@click.option("--input", "input_size", type=SIZE, help="Input size.  [default: the model's]")
@click.option("--classes", type=click.IntRange(min=1), help="Number of classes.")
@trust_option
@several(COUNT, "--batch", "1", "Images per step.  [default: 1]")
@click.option("--train", is_flag=True, help="Training steps, too: forward, loss and backward.")
@click.option("--device", default="cpu", help="cpu, cuda or cuda:NUMBER.  [default: cpu]")
@click.option("--threads", type=click.IntRange(min=1), help="[default: torch's]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    help="Of weights and maps.  [default: float32]",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="The table; one that exists is added to.",
)
def command(
    models: tuple[str, ...],
    grid: bool,
    size: list[int],
    ratio: list[float],
    methods: list[str],
    input_size: tuple[int, ...] | None,
    classes: int | None,
    trust: bool,
    batch: list[int],
    train: bool,
    device: str,
    threads: int | None,
    dtype: str,
    output: Path,
) -> None:
    """Measure what steps consist of, on this device, for latencies of plans anywhere.

    Of a MODEL, all calls of the static network and of its plans at some ratios (and of methods that
    published sizes, at those); of a RECIPE, of every choice of its search space; --grid is for
    networks that are not known yet.
    Of a RECIPE of micronas it is every operator of its space.
    Every call is timed by itself, in turns with others, and steps as wholes, too. Interrupt it at
    any time: the same command goes on. What was measured while the machine was slow is measured
    again. Leave the device alone meanwhile.

    \b
    kwsearch profile resnet18 --batch 1,16 -o device.lut.yaml
    kwsearch profile resnet18 --methods odconv,dcd -o device.lut.yaml
    kwsearch profile recipe.yaml --threads 1 -o device.lut.yaml
    kwsearch profile --grid --size 32,64 --train -o device.lut.yaml
    """
    found = map(architecture.recipe_of, models)
    if (recipe := next(filter(None, found), None)) is not None:
        if grid or len(models) > 1 or train or batch != [1]:
            raise click.UsageError(
                f"{models[0]}: is about architectures, whose operators are measured by themselves: "
                "leave out other models, --grid, --train and --batch"
            )
        refuse(_OF_NETWORKS, "of networks; operators of architectures are timed as they are")
        _check_folder(output)
        _profile_operators(recipe, device, threads, output)
        return
    if not models and not grid:
        raise click.UsageError("nothing to profile: give a MODEL, a RECIPE.yaml or --grid")
    _check_used(models, grid)
    _check_folder(output)
    import torch

    from kwsearch.bench import check_device
    from kwsearch.latency import circumstances
    from kwsearch.latency.profiling import Profile
    from kwsearch.latency.subjects import Mode, of_grid
    from kwsearch.latency.table import sole_writer

    if threads is not None:
        torch.set_num_threads(threads)
    check_device(device)
    modes = [Mode(b, training, device, dtype) for b in batch for training in _trainings(train)]
    subjects: list[Subject] = []
    for model in models:
        subjects += _subjects(model, input_size, classes, trust, ratio, methods)
    if grid:
        subjects += of_grid(size)
    with sole_writer(output):
        table = _table(output, circumstances.here(device, dtype))
        profile = Profile(table, _steps(subjects, modes), lambda: table.save(output))
        _run(profile, output)


def _profile_operators(recipe: Recipe, device: str, threads: int | None, output: Path) -> None:
    """All that an architecture of the recipe's space may consist of, on this machine."""
    import torch

    from kwlayers.plan import counted
    from kwsearch.architectures import space_of
    from kwsearch.bench import check_device
    from kwsearch.latency import circumstances, operators
    from kwsearch.latency.table import sole_writer
    from kwsearch.micronas.expected import needed
    from kwsearch.terminal import tracked

    if threads is not None:
        torch.set_num_threads(threads)
    check_device(device)
    with sole_writer(output):
        table = _table(output, circumstances.here(device))
        left = operators.missing(table, sorted(needed(space_of(recipe))))
        try:
            with tracked("measuring", len(left)) as advance:
                for done, total in operators.profile(table, left):
                    table.save(output)
                    advance(done, total)
        except KeyboardInterrupt:
            click.echo("interrupted: the same command goes on", err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None
    click.echo(f"{output}: {counted(len(table.entries), 'operator')}")
    for line in operators.summary(table):
        click.echo(line)


def _check_used(models: tuple[str, ...], grid: bool) -> None:
    """Refuse options of what is not profiled."""
    if not grid:
        refuse(("size",), "of --grid; a MODEL takes --input")
    if all(map(is_recipe, models)):
        why = "of a MODEL; a recipe says it itself, --grid has sizes (--size) and ratios"
        refuse(_OF_MODEL, why)


def _check_folder(output: Path) -> None:
    if not output.absolute().parent.is_dir():
        raise click.UsageError(f"-o {output}: there is no folder {output.parent}")


def _trainings(train: bool) -> tuple[bool, ...]:
    return (False, True) if train else (False,)


def _table(path: Path, here: dict[str, Any]) -> Table:
    from kwsearch.latency.table import Table, TableError

    if not path.exists():
        return Table(here)
    table = Table.load(path)
    if found := table.differences(here):
        raise TableError(
            f"{path} is of other circumstances: {'; '.join(found)}; write to another file, or "
            "measure as it was measured"
        )
    return table


def _subjects(
    model: str,
    input_size: tuple[int, ...] | None,
    classes: int | None,
    trust: bool,
    ratios: list[float],
    methods: list[str],
) -> list[Subject]:
    from kwsearch.latency.subjects import of_model

    if not is_recipe(model):
        return of_model(model, input_size, classes, trust, ratios, methods)
    if input_size or classes:
        raise click.UsageError("--input, --classes: a recipe says them itself")  # beside a MODEL
    from kwsearch.latency.subjects import of_recipe
    from kwsearch.recipe import load_recipe

    return of_recipe(load_recipe(model), trust)


def _steps(subjects: list[Subject], modes: list[Mode]) -> list[Any]:
    """Take the steps apart, and say once for each mode which cannot run."""
    from kwsearch.latency.profiling import steps_of
    from kwsearch.terminal import tracked

    left_out: dict[str, list[str]] = {}

    def note(subject: Subject, mode: Mode, reason: str) -> None:
        left_out.setdefault(f"{mode}: {reason}", []).append(subject.name)

    with tracked("taking steps apart", len(subjects) * len(modes)) as advance:
        steps = []
        for step in steps_of(subjects, modes, note):
            steps.append(step)
            advance(len(steps) + sum(map(len, left_out.values())))
    if not steps:
        raise click.UsageError(f"no step can run: {next(iter(left_out))}")
    for reason, names in left_out.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        click.echo(f"note: {names[0]}{more} left out in {reason}", err=True)
    return steps


def _run(profile: Profile, output: Path) -> None:
    from kwlayers.plan import counted
    from kwsearch.terminal import tracked

    calls, wholes = profile.missing()
    table = profile.table
    if not calls and not wholes:
        click.echo(f"{output} has all of it: {counted(len(profile.calls), 'call')}")
        return
    click.echo(
        f"to measure: {counted(len(calls), 'call')} and {counted(len(wholes), 'whole step')}; "
        f"{output} has {counted(len(table.entries), 'call')}",
        err=True,
    )
    try:
        with tracked("measuring", len(calls) + len(wholes)) as advance:
            for progress in profile.run():
                advance(progress.done, progress.total)
    except KeyboardInterrupt:
        left = sum(map(len, profile.missing()))
        click.echo(f"interrupted; {left} left to measure: the same command goes on", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    for reason, count in Counter(profile.failed.values()).items():
        click.echo(f"note: {counted(count, 'measurement')} left out: {reason}", err=True)
    slow = sum(map(len, profile.missing()))
    if slow:
        click.echo(
            f"note: {slow} were measured while the machine was more than a tenth slower than "
            "usual, again and again; the same command tries once more",
            err=True,
        )
    click.echo(
        f"wrote {output}: {counted(len(table.entries), 'call')} and "
        f"{counted(len(table.wholes), 'whole step')}"
    )
