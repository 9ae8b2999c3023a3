"""kwsearch lut: what latency tables hold, several as one, how good they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from kwsearch.cli import INTERRUPTED
from kwsearch.cli.options import RATIO, SIZE, methods_option, several, trust_option

if TYPE_CHECKING:
    from kwsearch.latency.profiling import Step
    from kwsearch.latency.subjects import Mode, Subject
    from kwsearch.latency.table import Check, Table

TABLE = click.Path(dir_okay=False, path_type=Path)
# Small enough to measure in minutes; of several families.
_SHOWN = 10  # records that are left out
CHECKED, CHECKED_SIZE = ("resnet18", "mobilenetv2_050", "convnext_tiny"), (3, 64, 64)


@click.group("lut")
def command() -> None:
    """Latency tables, which `kwsearch profile` measures and budgets and searches use."""


@command.command("show")
@click.argument("table", type=TABLE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every call.")
def show(table: Path, as_json: bool) -> None:
    """Where TABLE was measured, what is in it, and how good it is."""
    from kwsearch import lut_report, terminal
    from kwsearch.latency.plans import load

    loaded = load(table)
    if as_json:
        import json

        click.echo(json.dumps(lut_report.to_json(loaded), indent=2))
        return
    out = terminal.console()
    for part in lut_report.parts(loaded):
        out.print(part)


@command.command("import")
@click.argument("records", metavar="RECORDS...", type=TABLE, nargs=-1, required=True)
@click.option("--device", required=True, help="The microcontroller's name, e.g. NiclaSense.")
@click.option(
    "--clock",
    type=click.FloatRange(min=0, min_open=True),
    help="MHz.  [default: of NiclaSense, NUCLEOL552ZEQ and NUCLEOF446RE theirs]",
)
@click.option("-o", "--output", type=TABLE, required=True, help="The table, for micronas.")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
def import_(
    records: tuple[Path, ...], device: str, clock: float | None, output: Path, force: bool
) -> None:
    """Write cycles that were counted on a microcontroller as a table.

    RECORDS are JSON lists in MicroNAS' form, or a CSV with the columns name, input, output, filter,
    strides, cycles. Later ones replace earlier ones; those of failures are left out.
    """
    from kwlayers.plan import counted
    from kwsearch.latency import operators
    from kwsearch.micronas import cycles

    _check_free(output, force)
    for path in records:
        if not path.is_file():
            raise click.UsageError(f"{path}: no such file")
    lists = [path for path in records if path.suffix.lower() == ".csv"]
    if lists and len(records) > 1:
        raise click.UsageError("RECORDS: one .csv, or several .json")
    if lists:
        found = cycles.load_csv(lists[0], device, clock_mhz=clock)
    else:
        found = cycles.load_records(records, device, clock_mhz=clock)
    if not found.entries and all(one.why == cycles.NOT_COUNTED for one in found.refused):
        raise click.UsageError(
            f"{records[0]}: no operator has cycles: count them on the board, and write them into "
            "the column cycles"
        )
    table = operators.table_of(found)
    table.save(output)
    for one in found.refused[:_SHOWN]:
        click.echo(f"left out: {one.source}: {one.what}: {one.why}", err=True)
    if len(found.refused) > _SHOWN:
        click.echo(f"left out: {len(found.refused) - _SHOWN} more", err=True)
    click.echo(f"wrote {output}: {counted(len(table.entries), 'operator')} of {device}")
    for line in operators.summary(table):
        click.echo(line)


@command.command("needed")
@click.argument("recipe", metavar="RECIPE")
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("-o", "--output", type=TABLE, help="Its file.  [default: printed]")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
def needed(recipe: str, overrides: tuple[str, ...], output: Path | None, force: bool) -> None:
    """List the operators of RECIPE's architectures, or of the one that it has, to be counted on a
    microcontroller.

    As CSV with a column for their cycles, which `kwsearch lut import` reads when it is filled in;
    gaps are fitted. Those that the recipe's own table has are left out.
    """
    from kwlayers.plan import counted
    from kwsearch import architectures
    from kwsearch.files import write_whole
    from kwsearch.micronas import cycles, expected
    from kwsearch.micronas.space import operators
    from kwsearch.recipe import load_recipe

    if output is not None:
        _check_free(output, force)
    loaded = load_recipe(recipe, list(overrides))
    if not loaded.of_architectures:
        raise click.UsageError(f"{recipe}: is about plans; operators are of recipes of micronas")
    known = None
    try:
        known = architectures.table_of(loaded)
    except FileNotFoundError as error:  # the recipe's limits name what is to be made
        click.echo(f"{error.filename}: not there yet, so that everything is listed", err=True)
    space, chosen = architectures.space_of(loaded), architectures.architecture_of(loaded)
    keys = expected.needed(space)
    if chosen is not None:
        keys = frozenset(one.key for one in operators(space, chosen))
    left = [key for key in keys if known is None or key not in known.entries]
    text = cycles.csv_of(left)
    if output is None:
        click.echo(text, nl=False)
        return
    write_whole(output, text)
    click.echo(f"wrote {output}: {counted(len(left), 'operator')}")


def _check_free(output: Path, force: bool) -> None:
    if output.exists() and not force:
        raise click.UsageError(f"-o {output}: the file exists; --force replaces it")


@command.command("merge")
@click.argument("tables", metavar="TABLE...", type=TABLE, nargs=-1, required=True)
@click.option("-o", "--output", type=TABLE, required=True, help="The table of all.")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
def merge(tables: tuple[Path, ...], output: Path, force: bool) -> None:
    """Write several tables of one device as one; of what two have, the later TABLE's is kept."""
    from kwlayers.plan import counted
    from kwsearch.latency.plans import load
    from kwsearch.latency.table import TableError

    _check_free(output, force)
    merged = load(tables[0])
    for path in tables[1:]:
        try:
            merged.merge(load(path))
        except TableError as error:
            raise TableError(f"{path}, {tables[0]}: {error}") from None
    merged.save(output)
    click.echo(
        f"wrote {output}: {counted(len(merged.entries), 'call')} and "
        f"{counted(len(merged.wholes), 'whole step')}"
    )


@command.command("check")
@click.argument("table", type=TABLE)
@click.argument("models", metavar="[MODEL]...", nargs=-1)
@several(RATIO, "--ratio", "0.5,1,2", "Ratios b of their plans.  [default: 0.5,1,2]")
@methods_option
@click.option("--input", "input_size", type=SIZE, help="Input size.  [default: the model's]")
@click.option("--classes", type=click.IntRange(min=1), help="Number of classes.")
@trust_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(
    table: Path,
    models: tuple[str, ...],
    ratio: list[float],
    methods: list[str],
    input_size: tuple[int, ...] | None,
    classes: int | None,
    trust: bool,
    as_json: bool,
) -> None:
    """Measure whole MODELs, which TABLE was not made from, against its predictions.

    Each as it is and under plans, in the batches of the table, forward and in training if the
    table has that; steps that it was made from are left out. The errors are written to TABLE.
    Without a MODEL it is resnet18, mobilenetv2_050 and convnext_tiny on 3x64x64.
    """
    import torch

    from kwsearch.latency import circumstances
    from kwsearch.latency.operators import MCU
    from kwsearch.latency.plans import load
    from kwsearch.latency.profiling import steps_of
    from kwsearch.latency.subjects import Mode, of_model
    from kwsearch.latency.table import TableError, sole_writer

    loaded = load(table)
    kept = loaded.circumstances
    if kept["device"] == MCU:
        raise TableError(
            f"{table} is of a microcontroller: what runs there cannot be measured here; its "
            "operators' times are exact, and `kwsearch lut show` says how good its fits are"
        )
    torch.set_num_threads(kept["threads"])
    if found := loaded.differences(circumstances.here(kept["device"], kept["dtype"])):
        raise TableError(f"{table} cannot be checked here, it is of {'; '.join(found)}")
    found_modes = sorted({(whole.batch, whole.training) for whole in loaded.wholes})
    modes = [Mode(b, training, kept["device"], kept["dtype"]) for b, training in found_modes]
    if not modes:
        raise TableError(f"{table}: no whole step in it; let `kwsearch profile` finish")
    if not models:
        models, input_size = CHECKED, input_size or CHECKED_SIZE
    with sole_writer(table):
        subjects = [
            s for m in models for s in of_model(m, input_size, classes, trust, ratio, methods)
        ]
        checks = _measured(loaded, table, list(steps_of(subjects, modes, _note)))
    if not checks:
        raise TableError(
            f"{table}: there is no step to check that it was not made from: name another MODEL"
        )
    _print(checks, as_json)


def _measured(loaded: Table, path: Path, steps: list[Step]) -> list[Check]:
    """Each is written to the table as soon as it is there."""
    from kwsearch.latency.checking import check
    from kwsearch.terminal import tracked

    checks: list[Check] = []
    try:
        with tracked("measuring", len(steps)) as advance:
            for one in check(loaded, steps, _note):
                checks.append(one)
                loaded.add_checks([one])
                loaded.save(path)
                advance(len(checks))
    except KeyboardInterrupt:
        click.echo(f"interrupted; {len(checks)} checks are in {path}", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    return checks


def _note(subject: Subject, mode: Mode, reason: str) -> None:
    click.echo(f"note: {subject.name}, {mode}: left out: {reason}", err=True)


def _print(checks: list[Check], as_json: bool) -> None:
    from kwsearch import lut_report, terminal

    if as_json:
        import json

        click.echo(json.dumps(lut_report.checks_json(checks), indent=2))
        return
    out = terminal.console()
    out.print(lut_report.checks_table(checks))
    out.print(lut_report.sentence(checks))
