"""kwsearch bench: how fast ours is, against the published form and the static network."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kwsearch.cli import INTERRUPTED
from kwsearch.cli.options import COUNT, RATIO, several, trust_option

if TYPE_CHECKING:
    from rich.table import Table

    from kwsearch.bench import Case


@click.command("bench")
@click.argument("what", type=click.Choice(["model", "layers", "dymn"]), default="model")
@several(click.STRING, "--model", None, "Models.  [default: resnet18; dymn: dymn10]")
@several(RATIO, "--ratio", "1", "Ratios b, planned as by `budget`.  [default: 1]")
@several(COUNT, "--batch", "16", "Images per step.  [default: 16]")
@several(COUNT, "--size", None, "Pixels on a side; dymn: frames.  [default: the model's]")
@trust_option
@click.option("--train", is_flag=True, help="Training steps, too: forward, loss and backward.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "float64"]),
    default="float32",
    help="The 16-bit ones by autocast.  [default: float32]",
)
@click.option("--device", default="cpu", help="cpu, cuda or cuda:NUMBER.  [default: cpu]")
@click.option("--threads", type=click.IntRange(min=1), help="[default: torch's]")
@click.option("--channels-last", is_flag=True, help="In that memory format, all three.")
@click.option("--backend", help="Ours by this path everywhere.  [default: each layer's fastest]")
@click.option(
    "--tuned-malloc", is_flag=True, help="With glibc's malloc tuned against page faults, all three."
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    help="To time a case for.  [default: 10; a layer: 1]",
)
@click.option("--rounds", type=click.IntRange(min=2), help="[default: by the seconds, at least 5]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write the JSON to a file, too, after every case.",
)
def command(
    what: str,
    seconds: float | None,
    rounds: int | None,
    threads: int | None,
    tuned_malloc: bool,
    as_json: bool,
    output: Path | None,
    **options: Any,
) -> None:
    """Time the static network, the published form and ours, once they are known to be equal.

    First ours is compared with the published form in float64, outputs and every gradient. Then
    every round runs one step of each, in turns; warm-up rounds are not counted. Every case has a
    fresh process: memory that earlier ones freed would spare the published form its page faults.
    Shown are medians and quartiles, and the peak memory of one step. `layers` times every
    backend on each distinct layer instead, in one process, and says whether the best is chosen.
    `dymn` times a DyMN by the published form of its convolutions and Dy-ReLUs and by ours.

    \b
    kwsearch bench --model resnet18,resnet50 --ratio 1 --train
    kwsearch bench --model resnet18 --batch 1,16 --size 32,224 --json -o bench.json
    kwsearch bench layers --model mobilenetv2_100 --threads 1
    kwsearch bench dymn --batch 4 --train
    """
    _check(what, output, options)
    if tuned_malloc:
        _tune_malloc()
    # Before torch is loaded: its profiler, which measures memory, talks.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    import torch

    from kwsearch import timing
    from kwsearch.bench import BenchFailed, check_device

    if threads is not None:
        torch.set_num_threads(threads)
    device = options["device"]
    check_device(device)
    command_line = shlex.join(["kwsearch", *sys.argv[1:]])
    results = _Results(timing.record(device, command_line), what, output)
    problem = None
    try:
        if what == "dymn":
            _bench_dymn(options, results, seconds or 10.0, rounds)
        elif what == "model":
            _bench_models(_cases(options), results, seconds or 10.0, rounds)
        else:
            _bench_layers(_cases(options), results, seconds or 1.0, rounds)
    except KeyboardInterrupt:
        results.interrupt()
    except BenchFailed as error:
        problem = error
    if as_json:
        click.echo(json.dumps(results.data, indent=2))
    elif results.rows or problem is None:
        _print(results)
    if problem is not None:
        raise click.ClickException(str(problem))
    if results.interrupted:
        raise click.exceptions.Exit(INTERRUPTED)


def _check(what: str, output: Path | None, options: Mapping[str, Any]) -> None:
    """Before anything is loaded."""
    if output is not None and not output.parent.is_dir():
        raise click.UsageError(f"-o {output}: there is no folder {output.parent}")
    if what == "layers" and options["backend"]:
        raise click.UsageError("bench layers times every backend: --backend is for bench model")
    if what == "dymn":
        given = [k for k in ("backend", "channels_last", "trust") if options[k]]
        given += [k for k, v in (("dtype", "float32"), ("device", "cpu")) if options[k] != v]
        given += ["ratio"] if options["ratio"] != [1.0] else []
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise click.UsageError(f"bench dymn takes no {names}")


def _tune_malloc() -> None:
    """Start this command again in its place, with malloc tuned, unless it is."""
    from kwsearch import timing

    if timing.malloc() == "tuned":
        return
    if not timing.can_tune_malloc():
        raise click.UsageError("--tuned-malloc: it tunes the malloc of glibc, on Linux only")
    sys.stdout.flush()
    sys.stderr.flush()
    arguments = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, arguments, {**os.environ, **timing.TUNED_MALLOC})


def _cases(options: Mapping[str, Any]) -> list[Case]:
    """Every combination, each known to have a plan and to run."""
    from kwsearch.bench import Case, choices
    from kwsearch.networks import source

    shared = ("dtype", "device", "channels_last", "backend", "trust")
    settings = {name: options[name] for name in shared}
    cases = []
    for model, ratio in itertools.product(options["model"] or ["resnet18"], options["ratio"]):
        default = source(model).input_size
        sizes = options["size"] or (default or ())[-1:]
        if not sizes:
            raise click.UsageError(f"{model}: its input size is not known: give --size")
        for size, batch in itertools.product(sizes, options["batch"]):
            for step in ("forward", "train") if options["train"] else ("forward",):
                cases.append(Case(model, ratio, batch, size, step, **settings))
    for case in cases:
        choices(case)
    return cases


class _Results:
    """What is finished: in the file at once, printed at the end."""

    def __init__(self, record: dict[str, Any], what: str, path: Path | None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.data = {**record, {"model": "cases"}.get(what, what): self.rows}
        self.path = path
        self.interrupted = False

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._write()

    def interrupt(self) -> None:
        self.interrupted = self.data["interrupted"] = True
        click.echo("interrupted; what is finished:", err=True)
        self._write()

    def _write(self) -> None:
        """Replace the file in one go, so that it is whole at any time."""
        if self.path is None:
            return
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps(self.data, indent=2) + "\n")
            partial.replace(self.path)
        finally:
            partial.unlink(missing_ok=True)


def _bench_models(
    cases: Sequence[Case], results: _Results, seconds: float, rounds: int | None
) -> None:
    from kwsearch import timing
    from kwsearch.bench import BenchFailed, measure
    from kwsearch.bench_equality import check

    equal = {}
    for number, case in enumerate(cases, 1):
        click.echo(f"comparing {number}/{len(cases)}: {case}", err=True)
        equal[case] = check(case)
        for found in equal[case]:
            click.echo(f"    {found}", err=True)
    for number, case in enumerate(cases, 1):
        click.echo(f"timing {number}/{len(cases)}: {case}", err=True)
        try:
            row = timing.apart(measure, case, seconds, rounds)
        except ChildProcessError as error:
            raise BenchFailed(f"{case}: {error}") from None
        results.add({**row, "equality": [vars(found) for found in equal[case]]})


def _bench_layers(
    cases: Sequence[Case], results: _Results, seconds: float, rounds: int | None
) -> None:
    from kwsearch.bench_equality import Equality, check_layers
    from kwsearch.bench_layers import distinct, measure_layer

    todo = [(case, call, names) for case in cases for call, names in distinct(case).items()]
    checked = []
    for number, (case, call, names) in enumerate(todo, 1):
        click.echo(f"comparing {number}/{len(todo)}: {names[0]} of {case}", err=True)
        checked.append(check_layers(call, case))
    for number, ((case, call, names), found) in enumerate(zip(todo, checked, strict=True), 1):
        click.echo(f"timing {number}/{len(todo)}: {names[0]} of {case}", err=True)
        equal = {name: one for name, one in found.items() if isinstance(one, Equality)}
        row = measure_layer(call, names, case, list(equal), seconds, rounds)
        row["equality"] = {name: vars(one) for name, one in equal.items()}
        row["refused"] = {name: one for name, one in found.items() if isinstance(one, str)}
        results.add(row)


def _bench_dymn(
    options: Mapping[str, Any], results: _Results, seconds: float, rounds: int | None
) -> None:
    from kwsearch import timing, zoo
    from kwsearch.bench import BenchFailed
    from kwsearch.bench_dymn import Case, check, measure

    models = options["model"] or ["dymn10"]
    if others := [name for name in models if zoo.get(name).builder != "DyMN"]:
        raise click.UsageError(f"--model {', '.join(others)}: bench dymn is of DyMNs")
    for model in models:
        click.echo(f"comparing {model}", err=True)
        check(model)
    steps = ("forward", "train") if options["train"] else ("forward",)
    sizes = options["size"] or [1000]
    for each in itertools.product(models, options["batch"], sizes, steps):
        case = Case(*each)
        click.echo(f"timing {case}", err=True)
        try:
            results.add(timing.apart(measure, case, seconds, rounds))
        except ChildProcessError as error:
            raise BenchFailed(f"{case}: {error}") from None


# Tables -------------------------------------------------------------------------------------


def _print(results: _Results) -> None:
    from kwsearch import terminal

    out = terminal.console()
    for line in _header(results.data):
        out.print(terminal.plain(line), soft_wrap=True)
    if "cases" in results.data:
        out.print(_case_table(results.rows))
        return
    if "dymn" in results.data:
        out.print(_dymn_table(results.rows))
        return
    for _, group in itertools.groupby(results.rows, key=_case_words):
        out.print(_layer_table(list(group)))


def _header(data: Mapping[str, Any]) -> list[str]:
    machine, versions = data["machine"], data["versions"]
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    cores = f"{machine['usable_cores']} of {machine['cores']} cores"
    packages = ", ".join(f"{name} {found}" for name, found in versions.items() if found)
    environment = [f"{name}={value}" for name, value in data["environment"].items()]
    return [
        f"{machine['cpu']}, {cores}{gpu}; threads {data['threads']}, malloc {data['malloc']}",
        f"{packages}; commit {data['commit'] or 'unknown'}",
        " ".join([*environment, data["command"]]),
    ]


def _case_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Three lines per case."""
    table = _table(
        ("case", "network"),
        ("median ms", "quartiles", "CPU ms", "/ static", "published /", "(quartiles)", "peak MB"),
    )
    for row in rows:
        model, ratio, batch, size, step, dtype = _case_words(row)
        rounds = f"{row['rounds']} rounds"
        words = [", ".join(line) for line in ((model, ratio), (batch, size, dtype), (step, rounds))]
        for text, kind in zip(words, ("static", "published", "ours"), strict=True):
            speedup = row["published_s"] / row[f"{kind}_s"]
            ours = kind == "ours"
            table.add_row(
                text,
                kind,
                _ms(row[f"{kind}_s"]),
                _range(row[f"{kind}_s_quartiles"], _ms),
                _ms(row["cpu_s"][kind]),
                f"{row[f'{kind}_s'] / row['static_s']:.2f}",
                f"{speedup:.2f}" if ours else "",
                _range(row["published_over_ours_quartiles"], "{:.2f}".format) if ours else "",
                f"{row['peak_bytes'][kind] / 1e6:,.1f}",
            )
        table.add_section()
    return table


def _dymn_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """A line for each kind."""
    from kwsearch.bench_dymn import KINDS

    table = _table(("case", "form"), ("median ms", "quartiles", "/ ours", "(quartiles)", "peak MB"))
    for row in rows:
        words = [row["model"], f"batch {row['batch']}, {row['frames']} frames"]
        words.append(f"{row['step']}, {row['rounds']} rounds")
        for text, kind in zip(words, KINDS, strict=True):
            found = row[kind]
            ours = kind == "ours"
            table.add_row(
                text,
                kind,
                _ms(found["seconds"]),
                _range(found["quartiles"], _ms),
                "" if ours else f"{found['over_ours']:.2f}",
                "" if ours else _range(found["over_ours_quartiles"], "{:.2f}".format),
                f"{found['peak_bytes'] / 1e6:,.1f}",
            )
        table.add_section()
    return table


def _layer_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Two lines per distinct layer of a case; its backends in ms, the chosen one marked."""
    timed = (name for row in rows for name, seconds in row["backends"].items() if seconds)
    backends = list(dict.fromkeys(timed))
    table = _table(("layers; ms, * is chosen",), ("static", *backends, "regret"))
    table.title = ", ".join(_case_words(rows[0]))
    for row in rows:
        count = f"{row['count']} x " if row["count"] > 1 else ""
        stride = f" / {max(row['stride'])}" if max(row["stride"]) > 1 else ""
        kernel, size = ("x".join(map(str, row[name])) for name in ("kernel", "input"))
        table.add_row(
            f"{count}{row['layers'][0]}\n  {kernel}{stride} on {size}",
            _ms(row["static_s"]),
            *(_marked(row, name) for name in backends),
            f"{row['regret']:.2f}",
        )
    static = sum(row["count"] * row["static_s"] for row in rows)
    chosen = sum(row["count"] * row["backends"][row["chosen"]] for row in rows)
    best = sum(row["count"] * row["backends"][row["best"]] for row in rows)
    table.add_section()
    words = f"all: chosen {_ms(chosen)}, best {_ms(best)}"
    table.add_row(words, _ms(static), *[""] * len(backends), f"{chosen / best:.2f}")
    return table


def _marked(row: Mapping[str, Any], backend: str) -> str:
    """A backend's time: bold if it is the best, with a star if it is chosen."""
    seconds = row["backends"].get(backend)
    if seconds is None:
        return "-"
    text = _ms(seconds)
    if backend == row["best"]:
        text = f"[bold]{text}[/bold]"
    return f"{text}*" if backend == row["chosen"] else text


def _case_words(row: Mapping[str, Any]) -> tuple[str, ...]:
    layout = " channels_last" if row["channels_last"] else ""
    return (
        row["model"],
        f"b = {row['ratio']:g}",
        f"batch {row['batch']}",
        f"{row['size']} px",
        row["step"],
        row["dtype"] + layout,
    )


def _table(words: Sequence[str], numbers: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title_justify="left")
    for name in words:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _range(quartiles: Sequence[float], text: Callable[[float], str]) -> str:
    return "–".join(map(text, quartiles))


def _ms(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
