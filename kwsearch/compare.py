"""What a budget buys by each method, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kwlayers.layout import MethodSettings
from kwlayers.methods import NAMES, Method, find
from kwlayers.plan import Network, Plan, PlanError
from kwsearch import published
from kwsearch.budget import Target, meet
from kwsearch.resolve import method_dict
from kwsearch.terminal import new_table, plain
from kwsearch.units import short_count

if TYPE_CHECKING:
    from rich.table import Table

    from kwsearch.latency.plans import PlanLatency
    from kwsearch.memory import Memory


class Unreachable(ValueError):
    """No method meets the target."""


@dataclass(frozen=True)
class Entry:
    """One method. plan: None if it cannot meet the target, which `reason` explains.

    memory: of a training step. ms: of a forward pass by a table. None where nobody knows, and
    `reason` says why.
    """

    method: Method
    settings: MethodSettings
    plan: Plan | None
    reason: str = ""
    memory: Memory | None = None
    ms: float | None = None

    @property
    def sizes(self) -> str:
        """Of its groups, in words: `K = 1 to 4`, or how many cells over how many mixtures."""
        assert self.plan is not None
        found = sorted({group.size for group in self.plan.groups})
        if self.plan.warehouses:
            units = sum(group.unit(self.plan.of(group)) for group in self.plan.groups)
            return f"{sum(group.size for group in self.plan.groups):,} / {units:,} cells"
        shown = {group.describe() for group in self.plan.groups}
        if len(shown) == 1:
            return shown.pop()
        letter = self.plan.groups[0].describe().partition(" = ")[0]
        return f"{letter} = {found[0]} to {found[-1]}" if found[1:] else f"{letter} = {found[0]}"


def compare(
    network: Network,
    target: Target,
    methods: Sequence[str] = (),
    model: str | None = None,
    memory: Callable[[Plan], Memory] | None = None,
    latency: PlanLatency | None = None,
) -> list[Entry]:
    """Each method at the target, or without one at its published settings.

    methods: by default all that the network is for. model: its name, for KernelWarehouse's
    published settings. Raises PlanError for a target that none can meet, whatever it is.
    """
    asked = [find(name) for name in methods or NAMES]
    offered = [method for method in asked if methods or method.settings().suits(network)]
    return [_entry(network, target, method, model, memory, latency) for method in offered]


def _entry(
    network: Network,
    target: Target,
    method: Method,
    model: str | None,
    memory: Callable[[Plan], Memory] | None,
    latency: PlanLatency | None,
) -> Entry:
    settings = method.settings()
    wanted = target if target or settings.sized else Target(ratio=1.0)
    if not settings.sized and wanted.ratio is not None and model is not None:
        entry = published.find(model, wanted.ratio)
        settings = settings if entry is None else entry.settings
    try:
        plan = meet(network, wanted, settings).plan
    except PlanError as error:
        return Entry(method, settings, None, str(error).splitlines()[0])
    took, ms, missing = None, None, _idle(network, wanted, plan)
    try:
        took = None if memory is None else memory(plan)
    except PlanError as error:
        missing.append(f"no memory: {error}")
    try:
        ms = None if latency is None else latency(plan).ms
    except PlanError as error:
        missing.append(f"no latency: {error}")
    return Entry(method, settings, plan, "; ".join(missing), took, ms)


# Less of a budget than this, and a method is said not to use it.
_USED = 0.9


def _idle(network: Network, target: Target, plan: Plan) -> list[str]:
    """That a plan is far below what the target allows, if it is."""
    if not target or target.ratio is not None:
        return []
    deployed, allowed = plan.cost().deployed, target.params_of(network)
    few = deployed < _USED * allowed
    return [f"has use for {deployed:,} of the {allowed:,} parameters only"] if few else []


def table(
    entries: Sequence[Entry],
    network: Network,
    static_memory: Memory | None = None,
    static_ms: float | None = None,
) -> tuple[Table, list[str]]:
    """A line for each method that meets the target, after the static network; and why the others
    do not.
    """
    reached = [entry for entry in entries if entry.plan is not None]
    modulated = any(e.plan.cost().macs.modulation for e in reached if e.plan is not None)
    parts = ("conv", "mixing", "attention", *(("modulation",) if modulated else ()))
    work = ["conv +\nunchanged", *(f"{part}\nMACs" for part in parts[1:])]
    columns = [
        "parameters", "x static", "kernels", "attention\nparams", "MACs", "x static",
        *work,
    ]  # fmt: skip
    further = [
        *(["training\nmemory"] if static_memory is not None else []),
        *(["ms"] if static_ms is not None else []),
    ]
    shown = new_table(
        ("method", "size"),
        (*columns, *further),
        spare=(*reversed(work), "attention\nparams", "kernels"),
    )
    shown.add_row(
        "static",
        "",
        f"{network.params:,}",
        "1.00",
        "",
        "",
        f"{network.macs:,}",
        "1.00",
        short_count(network.macs),
        *("" for _ in parts[1:]),
        *([f"{short_count(static_memory.total)}B"] if static_memory is not None else []),
        *([f"{static_ms:.3g}"] if static_ms is not None else []),
    )
    for entry in reached:
        assert entry.plan is not None
        cost = entry.plan.cost()
        macs = vars(cost.macs) | {"conv": cost.macs.conv + cost.macs.unchanged}
        shown.add_row(
            entry.method.title,
            entry.sizes,
            f"{cost.deployed:,}",
            f"{cost.deployed / network.params:.2f}",
            short_count(cost.deployed_params.kernels),
            short_count(cost.params.attention),
            f"{cost.macs.total:,}",
            f"{cost.macs.total / network.macs:.2f}",
            *(short_count(macs[part]) if macs[part] else "" for part in parts),
            *([_memory(entry)] if static_memory is not None else []),
            *(["" if entry.ms is None else f"{entry.ms:.3g}"] if static_ms is not None else []),
        )
    return shown, [plain(line) for line in reasons(entries)]


def _memory(entry: Entry) -> str:
    return "" if entry.memory is None else f"{short_count(entry.memory.total)}B"


def reasons(entries: Sequence[Entry]) -> list[str]:
    """Of each method that does not meet the target, or whose latency nobody knows; and what is
    trained, if that is more than is deployed.
    """
    whose: dict[str, list[str]] = {}
    for entry in entries:
        if entry.reason:
            whose.setdefault(entry.reason, []).append(entry.method.title)
    found = [f"{', '.join(titles)}: {reason}" for reason, titles in whose.items()]
    for entry in entries:
        cost = None if entry.plan is None else entry.plan.cost()
        if cost is not None and cost.deployed != cost.params.total:
            found.append(
                f"{entry.method.title}: {cost.params.total:,} parameters while it is trained"
            )
    return found


def to_json(entries: Sequence[Entry]) -> dict[str, list[dict[str, Any]]]:
    """`methods`, those that meet the target, and `unreachable`, the others with the reason."""
    found: dict[str, list[dict[str, Any]]] = {"methods": [], "unreachable": []}
    for entry in entries:
        if entry.plan is None:
            found["unreachable"].append({"method": entry.method.name, "reason": entry.reason})
            continue
        cost = entry.plan.cost()
        found["methods"].append(
            {
                "method": entry.method.name,
                "title": entry.method.title,
                "paper": entry.method.paper,
                "settings": _settings(entry),
                "size": entry.sizes,
                "groups": entry.plan.groups_to_list(),
                "params": vars(cost.params),
                "deployed": cost.deployed,
                "macs": vars(cost.macs),
                "train_memory": None if entry.memory is None else entry.memory.total,
                "latency_ms": entry.ms,
                "layers": sum(len(group.layers) for group in entry.plan.groups),
                "notes": list(entry.plan.notes),
            }
        )
    return found


def _settings(entry: Entry) -> Mapping[str, Any]:
    """Without the sizes that the budget has decided."""
    assert entry.plan is not None
    own = entry.settings
    as_laid_out = own.sized and own.lay_out(entry.plan.network).groups == entry.plan.groups
    left_out = {"name", "rules", *(() if as_laid_out else own.sizes)}
    return {k: v for k, v in method_dict(own).items() if k not in left_out}
