"""The latency of a plan beside the static network's, by a table, under a limit."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kwlayers.plan import PlanError, counted
from kwsearch.latency.plans import PlanLatency
from kwsearch.latency.predict import PARTS, Latency
from kwsearch.step_report import DoesNotFit
from kwsearch.terminal import new_table

if TYPE_CHECKING:
    from rich.table import Table

    from kwlayers.plan import Plan

_SOURCES = {
    "measured": "of calls that were measured",
    "lines": "by the number of cells",
    "fitted": "fitted",
    "guessed": "guessed",
}


@dataclass(frozen=True)
class Latencies:
    """Of the plan and of the static network, by what a step does. limit: milliseconds of a forward
    pass, None without one.
    """

    latency: PlanLatency
    plan: dict[str, Latency]
    static: dict[str, Latency]
    limit: float | None

    @classmethod
    def of(cls, latency: PlanLatency, plan: Plan, limit: float | None) -> Latencies:
        """Forward passes, and training steps as far as the table tells them."""
        own, static = {"inference": latency(plan)}, {"inference": latency(None)}
        if latency.trains:
            with contextlib.suppress(PlanError):  # norms of one image, calls that are not in it
                both = latency(plan, True), latency(None, True)
                own["training"], static["training"] = both
        return cls(latency, own, static, limit)

    def parts(self) -> list[str | Table]:
        """A headline, the times, and where they are from."""
        head = f"{headline(self.latency)}: {_shown(self.plan['inference'])} ms"
        table = new_table(("milliseconds",), ("plan", "90 %", "static", "90 %", "plan / static"))
        for name, own in self.plan.items():
            static = self.static[name]
            table.add_row(
                name,
                _shown(own),
                _interval(own),
                _shown(static),
                _interval(static),
                f"{own.ms / static.ms:.2f}",
            )
        own = self.plan["inference"]
        shares = [f"{getattr(own, p):.0%} {_SOURCES[p]}" for p in PARTS if getattr(own, p) > 0.005]
        return [head, table, f"the plan's inference is {', '.join(shares)}"]

    def check(self) -> None:
        """Raise DoesNotFit for a plan that may be over the limit."""
        own, static = self.plan["inference"], self.static["inference"]
        if self.limit is None or own.high <= self.limit:
            return
        may = "takes" if own.low > self.limit else "may take"
        raise DoesNotFit(
            f"a forward pass {may} {_shown(own)} ms ({_interval(own)}), over --latency "
            f"{self.limit:g}ms; the static network takes {_shown(static)} ms; try a smaller "
            "--ratio or --input"
        )

    def to_json(self) -> dict[str, Any]:
        """Milliseconds, and parts of the estimates."""
        return {
            "table": str(self.latency.path),
            "circumstances": self.latency.table.circumstances,
            "warning": self.latency.warning,
            "batch": self.latency.batch,
            "plan": {name: asdict(one) for name, one in self.plan.items()},
            "static": {name: asdict(one) for name, one in self.static.items()},
            "limit_ms": self.limit,
        }


def headline(latency: PlanLatency) -> str:
    """What the milliseconds are of; a warning first, where they are not of this machine."""
    kept = latency.table.circumstances
    where = kept["gpu"] or f"{kept['cpu']}, {counted(kept['threads'], 'thread')}"
    head = f"latency of a forward pass, batch {latency.batch}, {kept['dtype']} on {where}"
    return head if latency.warning is None else f"warning: {latency.warning}\n{head}"


def _shown(one: Latency) -> str:
    return f"{one.ms:.3g}"


def _interval(one: Latency) -> str:
    return f"{one.low:.3g} to {one.high:.3g}"
