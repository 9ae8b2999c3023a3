"""The options that say what a step is, and what it may take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from kwsearch.cli.options import BYTES

if TYPE_CHECKING:
    from kwlayers.plan import Plan
    from kwsearch.cli.request import Request
    from kwsearch.step_report import Takes

STEP_OPTIONS = (
    "batch", "memory", "inference", "device", "dtype", "optimizer", "channels_last",
    "checkpointing",
)  # fmt: skip


def step_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """A step of so many images, and the memory it may take."""
    for option in (
        click.option(
            "--checkpointing", is_flag=True, default=None, help="Repeated blocks run again."
        ),
        click.option("--channels-last", is_flag=True, default=None, help="Memory format."),
        click.option(
            "--optimizer", type=click.Choice(["sgd", "adamw"]), help="Of training.  [default: sgd]"
        ),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16", "float16"]),
            help="float32, or autocast.  [default: float32]",
        ),
        click.option(
            "--device", type=click.Choice(["cpu", "cuda"]), help="Of the step.  [default: cpu]"
        ),
        click.option("--inference", is_flag=True, default=None, help="Forward only, not training."),
        click.option("--memory", type=BYTES, help="That a step may take: 12GB."),
        click.option("--batch", type=click.IntRange(min=1), help="Images of a step."),
    ):
        command = option(command)
    return command


class StepRequest:
    """What is asked about a step. given: by option, those that were given."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = dict(given)
        self.batch: int | None = self.given.pop("batch", None)
        self.limit: int | None = self.given.pop("memory", None)
        if self.given and not self.asked:
            shown = ", ".join("--" + name.replace("_", "-") for name in self.given)
            raise click.UsageError(f"{shown}: of a step; give --batch or --memory, too")
        if self.given.get("inference"):
            for name in {"optimizer", "checkpointing"} & self.given.keys():
                raise click.UsageError(f"--{name}: of training; leave it or --inference out")

    @property
    def asked(self) -> bool:
        """Whether anything is."""
        return self.batch is not None or self.limit is not None

    def takes(self, request: Request, plan: Plan) -> Takes:
        """The memory of a step of the plan, and of the static network."""
        from kwsearch import networks
        from kwsearch.memory import Step
        from kwsearch.step_report import Takes

        options = {name: value for name, value in self.given.items() if name != "inference"}
        step = Step(self.batch or 1, training="inference" not in self.given, **options)
        make_model = partial(
            networks.planning_model,
            request.model,
            request.input_size,
            request.classes,
            request.trust,
        )
        return Takes.of(make_model, plan, step, self.batch, self.limit)
