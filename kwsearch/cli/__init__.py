"""The `kwsearch` command: one small file per subcommand, loaded when it is called."""

from __future__ import annotations

import importlib
import io
import os
import sys
from typing import Any

import click

from kwsearch.cli.passwords import hide_password

# name -> the line that `kwsearch --help` shows; the module has the same name.
COMMANDS = {
    "bench": "Time ours against the published form and the static network.",
    "budget": "Exact parameters and MACs of a model under a budget.",
    "compare": "What a budget buys by each dynamic convolution.",
    "diff": "What differs between two recipes and their plans.",
    "export": "A recipe as a training script, ONNX, or a config of other code.",
    "inspect": "The layers of a model, what they become and why.",
    "lut": "Show, merge or check latency tables.",
    "models": "The models that kwsearch knows by name.",
    "optimize": "Search n, cells and sharing under the recipe's budget.",
    "profile": "Measure a latency table on this device.",
    "report": "A study in short, and as a page with plots; also live.",
    "show": "One trial of a study, and its recipe.",
    "status": "How far a study is, also while it runs.",
    "trials": "The table of a study's trials.",
    "slurm": "Print a job script: workers of a study in a SLURM array.",
    "study": "Copy a study from its journal to a database, or back.",
    "worker": "Run trials of a study that is in a database.",
    "schema": "Print the JSON Schema of a recipe.",
    "validate": "Check a recipe and list every problem.",
}

OK, FAILED, USAGE, NO_PLAN, INTERRUPTED = 0, 1, 2, 3, 130


class LazyGroup(click.Group):
    """Knows its commands by name and imports one when it runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"kwsearch.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kwsearch", prog_name="kwsearch")
def cli() -> None:
    """Plan and search the parameter budget of dynamic convolutions.

    \b
    kwsearch budget resnet50 --ratio 0.5     what does half the kernels buy, and cost?
    kwsearch optimize recipe.yaml            find cells and sharing under that budget
    """


def main(args: list[str] | None = None) -> None:
    """Run the command; every foreseen problem is one message and its exit code."""
    hide_password()
    # Signs that an encoding lacks are no failure.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(run(args))


def run(args: list[str] | None = None) -> int:
    """`main` without leaving: returns the exit code."""
    try:
        result: Any = cli.main(args, prog_name="kwsearch", standalone_mode=False)
        return result if isinstance(result, int) else OK
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:  # nobody reads on; nor does anybody what is left to be flushed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:
        click.echo(f"Error: {error}", err=True)
        return FAILED
    except ValueError as error:
        code = _exit_code(error)
        if code is None:
            raise
        click.echo(f"Error: {error}", err=True)
        return code


def _exit_code(error: ValueError) -> int | None:
    """The exit code of an error of ours that the user can mend; None for a bug."""
    if type(error).__module__.split(".")[0] not in ("kwlayers", "kwsearch"):
        return None
    codes = {
        "BudgetError": NO_PLAN,
        "DoesNotFit": NO_PLAN,
        "ExportFailed": FAILED,
        "NothingFits": NO_PLAN,
        "StudyFailed": FAILED,
        "Unreachable": NO_PLAN,
    }
    return codes.get(type(error).__name__, USAGE)
