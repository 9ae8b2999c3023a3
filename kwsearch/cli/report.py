"""kwsearch report: what came of a study, in short and as a page; also while it runs."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Literal

import click

from kwsearch.cli.pages import check_place
from kwsearch.interrupts import handled, ignored

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from kwsearch.results import Result
    from kwsearch.snapshot import Snapshot

PAGE = "report.html"
_EVERY = 2.0
# Lines of the plot, where the terminal has them, and of the least that is one.
_PLOT, _LEAST = 16, 8


@click.command("report")
@click.argument("run", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"Where to write the page.  [default: RUN/{PAGE}; none with --json]",
)
@click.option(
    "--over",
    type=click.Choice(["params", "macs"]),
    default="params",
    show_default=True,
    help="What the plot here shows accuracy over.",
)
@click.option("--watch", is_flag=True, help="Show and write it anew until the study is over.")
@click.option(
    "--every",
    type=click.FloatRange(min=0.1, max=3600),
    help=f"With --watch: seconds from one look to the next.  [default: {_EVERY:g}]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --watch a line of it each.")
def command(
    run: Path,
    output: Path | None,
    over: Literal["params", "macs"],
    watch: bool,
    every: float | None,
    as_json: bool,
) -> None:
    """The study in RUN, also while it is running: a summary here, and a page with plots.

    The page is one file that loads nothing: open it in any browser, or send it to somebody.

    \b
    kwsearch report runs/quickstart
    kwsearch report runs/quickstart --watch
    """
    from kwsearch import snapshot, terminal

    if every is not None and not watch:
        raise click.UsageError("--every: of --watch; give that, too")
    if output is not None:
        check_place("-o", str(output), ".html", ".htm")
    report = Report(output or (None if as_json else run / PAGE), over, as_json, watch)
    if not watch:
        report.last(snapshot.take(run))
        return
    out, seconds = terminal.console(), every or _EVERY
    if out.is_terminal and not as_json:
        report.last(_watch_live(report, run, seconds, out))
    else:
        report.last(_watch_lines(report, run, seconds))


class Report:
    """Prints a study and writes its page. output: the page's file, if any. lines: a study is one
    line of JSON.
    """

    def __init__(
        self, output: Path | None, over: Literal["params", "macs"], as_json: bool, lines: bool
    ) -> None:
        self.output, self.over, self.as_json, self.lines = output, over, as_json, lines

    def last(self, study: Snapshot) -> None:
        """All of it. Raises ClickException where the page cannot be written, when all is said."""
        from kwsearch import terminal

        problem: click.ClickException | None = None
        try:  # first: whoever reads what is printed may stop reading
            self.write(study)
        except click.ClickException as error:
            problem = error
        if self.as_json:
            click.echo(self.numbers(study))
        else:
            out = terminal.console()
            for part in self.parts(study, out):
                out.print(part)
        if problem is not None:
            raise problem
        if self.output is not None:
            click.echo(f"wrote {self.output}", err=self.as_json)

    def parts(self, study: Snapshot, out: Console) -> list[RenderableType]:
        """What a terminal or a file is shown."""
        from kwsearch import results

        return self._parts(study, results.result_from(study), out, _PLOT, short=False)

    def _parts(
        self, study: Snapshot, result: Result, out: Console, height: int, short: bool
    ) -> list[RenderableType]:
        """Names of files are no markup."""
        from rich.text import Text

        from kwsearch import study_summary

        plot = study_summary.plot(
            result, self.over, width=out.width, height=height, encoding=out.encoding
        )
        found = study_summary.parts(study, result, plot, short)
        return [Text(part) if isinstance(part, str) else part for part in found]

    def fitting(self, study: Snapshot, out: Console) -> list[RenderableType]:
        """As `parts`, with a plot that ends on the screen, and what stands above it shorter if it
        has to.
        """
        from rich.console import Group
        from rich.text import Text

        from kwsearch import results, study_summary

        result = results.result_from(study)
        # Not for the plot: a line of ours, the cursor's, empty ones around it, a longer legend.
        rows = out.height - 5
        for short in (False, True):
            above = Group(*map(Text, study_summary.head(study, result, short)))
            height = rows - len(out.render_lines(above))
            if height >= _LEAST:
                break
        return self._parts(study, result, out, max(min(height, _PLOT), _LEAST), short)

    def numbers(self, study: Snapshot) -> str:
        from kwsearch import results, study_summary

        found = study_summary.summary_json(study, results.result_from(study))
        return json.dumps(found, indent=None if self.lines else 2)

    def line(self, study: Snapshot) -> str:
        """How far it is, for what has no terminal."""
        from kwsearch import results, study_summary

        if self.as_json:
            return self.numbers(study)
        return study_summary.headline(study, results.result_from(study))

    def write(self, study: Snapshot, refresh: int | None = None) -> None:
        """refresh: seconds after which a browser asks for it again."""
        from kwsearch.files import write_whole
        from kwsearch.pages.study import page

        if self.output is None:
            return
        text = page(study, refresh)
        try:
            write_whole(self.output, text)
        except OSError as error:
            raise click.ClickException(
                f"cannot write {self.output}: {error.strerror or error}; -o names another file"
            ) from None


def looks(run: Path, every: float) -> Iterator[Snapshot]:
    """The study now and whenever it has changed; the last time when nobody drives it."""
    from kwsearch import snapshot
    from kwsearch.run_directory import EVENTS, JOURNAL

    def stamp() -> list[tuple[int, int]]:
        found = [run / name for name in (JOURNAL, EVENTS)]
        return [(s.st_mtime_ns, s.st_size) for s in (p.stat() for p in found if p.exists())]

    seen = None
    while True:
        # Both are asked first: what is written from then on is read now or next time.
        running, now = snapshot.is_running(run), stamp()
        if now != seen or not running:
            yield replace(snapshot.take(run), running=running)
        if not running:
            return
        seen = now
        sleep(every)


def _stoppable(found: Iterator[Snapshot]) -> Iterator[Snapshot]:
    """The same; a request to end, as of a terminal that is closed, is raised as SystemExit."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    asked = [name for name in ("SIGTERM", "SIGHUP") if not ignored(name)]  # as nohup asks for
    with handled(end, *asked):
        yield from found


def _watch(report: Report, run: Path, every: float, show: Callable[[Snapshot], None]) -> Snapshot:
    """Show the study and write its page while it runs; how it was found at last."""
    study = None
    try:
        for study in _stoppable(looks(run, every)):
            if not study.running:
                break
            report.write(study, refresh=max(math.ceil(every), 1))
            show(study)
    except BaseException:
        # Nobody writes the page any more: it should not ask for news.
        if study is not None:
            with contextlib.suppress(click.ClickException):
                report.write(study)
        raise
    assert study is not None
    return study


def _watch_live(report: Report, run: Path, every: float, out: Console) -> Snapshot:
    """On a terminal: one view that changes."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    page = "" if report.output is None else f"; {report.output} is kept up to date"
    last = Text(f"watching{page}; Ctrl-C ends")
    with Live(console=out, auto_refresh=False, transient=True) as live:

        def show(study: Snapshot) -> None:
            live.update(Group(last, *report.fitting(study, out)), refresh=True)

        return _watch(report, run, every, show)


def _watch_lines(report: Report, run: Path, every: float) -> Snapshot:
    """Without a terminal: a line whenever something has changed."""
    said = ""

    def show(study: Snapshot) -> None:
        nonlocal said
        line = report.line(study)
        if line != said:
            click.echo(line)
        said = line

    return _watch(report, run, every, show)
