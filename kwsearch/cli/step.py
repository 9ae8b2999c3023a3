"""The options that say what a step is, and what it may take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kwsearch.cli.options import BYTES, MS

if TYPE_CHECKING:
    from torch import nn

    from kwlayers.plan import Plan
    from kwsearch.cli.request import Request
    from kwsearch.latency.plans import PlanLatency
    from kwsearch.latency_report import Latencies
    from kwsearch.memory import Memory, Step
    from kwsearch.step_report import Takes

STEP_OPTIONS = (
    "batch", "memory", "latency", "lut", "force", "inference", "device", "dtype", "optimizer",
    "channels_last", "checkpointing",
)  # fmt: skip


def step_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """A step of so many images, and the memory and time it may take."""
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
            help="Of a step's memory: float32, or autocast. Of --lut: its own.  [default: float32]",
        ),
        click.option(
            "--device", type=click.Choice(["cpu", "cuda"]), help="Of the step.  [default: cpu]"
        ),
        click.option(
            "--inference", is_flag=True, default=None, help="Memory of forward only, not training."
        ),
        click.option(
            "--force", is_flag=True, default=None, help="Take a --lut of another device as it is."
        ),
        click.option(
            "--lut",
            "--latency-table",
            "lut",
            type=click.Path(dir_okay=False, path_type=Path),
            help="Latency table of a device, by `kwsearch profile`.",
        ),
        click.option("--latency", type=MS, help="That a forward pass may take by --lut: 8ms."),
        click.option("--memory", type=BYTES, help="That a step may take: 12GB."),
        click.option("--batch", type=click.IntRange(min=1), help="Images of a step."),
    ):
        command = option(command)
    return command


class StepRequest:
    """What is asked about a step. given: by option, those that were given. beside_latency: whether
    a batch is of memory, too, where there is a table.
    """

    def __init__(self, given: Mapping[str, Any], beside_latency: bool = False) -> None:
        self.given, self.beside_latency = dict(given), beside_latency
        self.batch: int | None = self.given.pop("batch", None)
        self.limit: int | None = self.given.pop("memory", None)
        self.latency: float | None = self.given.pop("latency", None)
        self.lut: Path | None = self.given.pop("lut", None)
        self.force: bool = self.given.pop("force", False)
        if self.lut is None and (self.latency is not None or self.force):
            name = "--force" if self.latency is None else "--latency"
            raise click.UsageError(f"{name}: give --lut, a table by `kwsearch profile`, too")
        if self.given and not self.asked:
            shown = ", ".join("--" + name.replace("_", "-") for name in self.given)
            raise click.UsageError(f"{shown}: of a step; give --batch, --memory or --lut, too")
        if self.lut is not None:
            self._check_of_table()
        if self.given.get("inference"):
            for name in {"optimizer", "checkpointing"} & self.given.keys():
                raise click.UsageError(f"--{name}: of training; leave it or --inference out")

    def _check_of_table(self) -> None:
        """A table is of forward passes, and its dtype is that of weights."""
        idle = [name for name in self.given if name not in ("device", "dtype")]
        if idle and not self.of_memory:
            shown = ", ".join("--" + name.replace("_", "-") for name in idle)
            raise click.UsageError(f"{shown}: of the memory of a step; give --memory, too")
        if self.of_memory and self.given.get("dtype", "float32") != "float32":
            raise click.UsageError(
                f"--dtype {self.given['dtype']}: of autocast for --memory, of weights for --lut; "
                "ask for one at a time"
            )

    @property
    def asked(self) -> bool:
        """Whether anything is."""
        return self.lut is not None or self.of_memory

    @property
    def of_memory(self) -> bool:
        """Whether memory is."""
        beside = self.lut is None or self.beside_latency
        return self.limit is not None or (self.batch is not None and beside)

    def reports(
        self, request: Request, plan: Plan, latency: PlanLatency | None
    ) -> dict[str, Takes | Latencies]:
        """What is asked, of the plan and of the static network, by what it is of."""
        found: dict[str, Takes | Latencies] = {}
        if self.of_memory:
            found["memory"] = self._takes(request, plan)
        if latency is not None:
            from kwsearch.latency_report import Latencies

            found["latency"] = Latencies.of(latency, plan, self.latency)
        return found

    def plan_latency(self, request: Request, input_size: Sequence[int]) -> PlanLatency | None:
        """By --lut, if it is given. Raises latency.table.TableError."""
        if self.lut is None:
            return None
        from kwsearch import networks
        from kwsearch.latency.plans import PlanLatency

        size = tuple(input_size)
        return PlanLatency(
            self.lut,
            partial(
                networks.build_model, request.model, size, request.classes, None, request.trust
            ),
            size,
            self.batch,
            device=self.given.get("device"),
            dtype=self.given.get("dtype"),
            force=self.force,
        )

    def memory_of(self, request: Request, input_size: Sequence[int], plan: Plan | None) -> Memory:
        """Of a step of the plan, or of the static network."""
        from kwsearch.memory import memory_of

        return memory_of(_maker(request), plan, input_size, self._step())

    def _step(self) -> Step:
        from kwsearch.memory import Step

        options = {name: value for name, value in self.given.items() if name != "inference"}
        return Step(self.batch or 1, training="inference" not in self.given, **options)

    def _takes(self, request: Request, plan: Plan) -> Takes:
        from kwsearch.step_report import Takes

        return Takes.of(_maker(request), plan, self._step(), self.batch, self.limit)


def _maker(request: Request) -> Callable[[], nn.Module]:
    """What makes the model without weights."""
    from kwsearch import networks

    return partial(
        networks.planning_model, request.model, request.input_size, request.classes, request.trust
    )
