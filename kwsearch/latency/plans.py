"""The latency of plans, by a table that is of this device or was asked for all the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from kwlayers.plan import Plan
from kwsearch.latency import circumstances
from kwsearch.latency.calls import Call
from kwsearch.latency.predict import Latency, Predictor
from kwsearch.latency.subjects import Mode, Subject, identity
from kwsearch.latency.table import Table, TableError

# What a table has in common with the machine whose latencies it tells, unless forced.
HERE = ("cpu", "gpu", "torch")


class PlanLatency:
    """Called with a plan, None for the static network, tells the latency of a step.

    path: of the table. make_model: makes the network on the current device. batch: images of a
    forward pass; None for the fewest in the table. dtype, device: of the table, if they must be.
    force: take a table of another device, dtype or torch, which `warning` then says. Raises
    TableError for a table that cannot be read or must not be used.
    """

    def __init__(
        self,
        path: Path,
        make_model: Callable[[], nn.Module],
        input_size: tuple[int, ...],
        batch: int | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        force: bool = False,
    ) -> None:
        self.path = path
        self.table = load(path)
        self.warning = _warning(self.table, path, device, dtype, force)
        self._make_model, self._input_size = make_model, input_size
        self._predictor = Predictor(self.table)
        modes = {(whole.training, whole.batch) for whole in self.table.wholes}
        if not modes:
            raise TableError(f"{path}: no whole step in it; let `kwsearch profile` finish")
        self.batch = batch or min(images for _, images in modes)
        self.trains = any(training for training, _ in modes)
        self._known: dict[tuple[str, bool], dict[str, Counter[Call]]] = {}

    def __call__(self, plan: Plan | None, training: bool = False) -> Latency:
        """Raises PlanError where the step cannot run, TableError where the table says nothing."""
        return self._step(self._calls(plan, training), training)

    def by_module(self, plan: Plan) -> dict[str, float]:
        """Milliseconds of a forward pass, by the innermost module whose calls take them."""
        found = self._calls(plan, False)
        return {name: self._predictor.step(c, self.batch, False).ms for name, c in found.items()}

    def of_model(self, make_model: Callable[[], nn.Module]) -> Latency:
        """A forward pass of another network on as large images."""
        return self._step(self._apart(make_model, None, False), False)

    def _step(self, calls: Mapping[str, Counter[Call]], training: bool) -> Latency:
        together = sum(calls.values(), Counter[Call]())
        return self._predictor.step(together, self.batch, training)

    def _calls(self, plan: Plan | None, training: bool) -> dict[str, Counter[Call]]:
        name = (identity(plan), training)
        if name not in self._known:
            self._known[name] = self._apart(self._make_model, plan, training)
        return self._known[name]

    def _apart(
        self, make_model: Callable[[], nn.Module], plan: Plan | None, training: bool
    ) -> dict[str, Counter[Call]]:
        kept = self.table.circumstances
        mode = Mode(self.batch, training, kept["device"], kept["dtype"])
        return Subject("", make_model, self._input_size, plan).calls_by_module(mode)


def load(path: Path) -> Table:
    """The table in a file. Raises TableError if there is none."""
    try:
        return Table.load(path)
    except FileNotFoundError:
        raise TableError(f"{path}: no such file; `kwsearch profile … -o {path}` makes it") from None
    except OSError as error:
        raise TableError(f"{path}: {error.strerror}") from None


def _warning(
    table: Table, path: Path, device: str | None, dtype: str | None, force: bool
) -> str | None:
    here = circumstances.here("cpu", dtype or table.circumstances["dtype"])
    wanted = {name: here[name] for name in HERE}
    if table.circumstances["gpu"] is not None:
        wanted = {"torch": here["torch"], "gpu": circumstances.gpu()}
    wanted |= {"device": device} if device else {}
    wanted |= {"dtype": dtype} if dtype else {}
    found = table.differences(wanted, tuple(wanted))
    if not found:
        return None
    what = f"latencies by {path} are of {'; '.join(found)}"
    if not force:
        raise TableError(f"{what}: profile this device, or --force to take them as they are")
    return what
