"""A network as a tree of layers: where each stands, what it became, what it costs and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kwlayers.layout import MethodSettings
from kwlayers.plan import Plan, shown
from kwlayers.sharing import Settings
from kwlayers.stages import place
from kwsearch import units
from kwsearch.report import Row, layer_row, stages_of
from kwsearch.terminal import new_table, plain

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Layer:
    """One layer of a plan. cost: of one image, by part.

    block: the repeated block that holds it. stage: None for layers outside the stages. warehouse,
    mixtures (m), cells (n): of a dynamic layer. static: why it stays static; empty if it does not.
    """

    name: str
    block: str
    kind: str
    kernel: tuple[int, ...]
    groups: int
    positions: int
    stage: int | None
    warehouse: str | None
    mixtures: int
    cells: int
    static: str
    cost: Row


def layers_of(plan: Plan, settings: MethodSettings | None = None) -> tuple[Layer, ...]:
    """All layers in module order. settings: those that the plan was made with."""
    groups = {group.name: group for group in plan.groups}
    placed, stages = place(plan.extended.sites), stages_of(plan)
    reasons = (settings or Settings()).why_static(plan.network)
    found = []
    for site, cost in zip(plan.extended.sites, plan.cost_by_layer(), strict=True):
        label = placed.labels[site.name]
        group = groups.get(cost.group or "")
        why = "" if group else reasons.get(site.name) or "no warehouse takes it"
        found.append(
            Layer(
                name=site.name,
                block=site.block,
                kind=site.kind if site.kind == "linear" or site.groups == 1 else label.kind,
                kernel=site.kernel,
                groups=site.groups,
                positions=site.out_positions,
                stage=stages[site.name],
                warehouse=group.name if group else None,
                mixtures=cost.mixtures,
                cells=group.size if group else 0,
                static=why,
                cost=layer_row(cost),
            )
        )
    return tuple(found)


def tree(layers: Sequence[Layer], scale: int = 1) -> tuple[Table, list[str]]:
    """A table of the layers under the blocks that hold them, and its notes. scale: 2 for FLOPs."""
    unit = "MACs" if scale == 1 else "FLOPs"
    params = ("attention\nparams", "unchanged\nparams")
    work = tuple(f"{part}\n{unit}" for part in ("conv", "mixing", "attention"))
    table = new_table(
        ("layer", "kernel", "stage", "warehouse"),
        ("m", "n"),
        params,
        work,
        spare=(params[1], work[2], work[0], "kernel", params[0], work[1], "stage"),
    )
    reasons: dict[str, int] = {}
    block = ""
    for layer in layers:
        if layer.block != block and layer.block:
            table.add_row(plain(layer.block))
        block = layer.block
        own = f"  {layer.name[len(block) + 1 :]}" if block else shown(layer.name)
        kernel = "x".join(map(str, layer.kernel))
        row = layer.cost
        counts = (row.conv + row.unchanged_macs, row.mixing, row.attention_macs)
        dynamic = layer.warehouse is not None
        note = "" if dynamic else f"static ({reasons.setdefault(layer.static, len(reasons) + 1)})"
        table.add_row(
            plain(own),
            kernel if layer.groups == 1 else f"{kernel} /{layer.groups}",
            "" if layer.stage is None else str(layer.stage),
            plain(layer.warehouse or note),
            *((str(layer.mixtures), str(layer.cells)) if dynamic else ("", "")),
            *map(_short, (row.attention, row.unchanged)),
            *(_short(scale * count) for count in counts),
        )
    return table, [f"({number}) {reason}" for reason, number in reasons.items()]


def layers_json(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """The same for `--json`, with whole numbers."""
    return [
        {
            **{k: v for k, v in vars(layer).items() if k != "cost"},
            "kernel": list(layer.kernel),
            "params": {"attention": layer.cost.attention, "unchanged": layer.cost.unchanged},
            "macs": {
                "conv": layer.cost.conv,
                "mixing": layer.cost.mixing,
                "attention": layer.cost.attention_macs,
                "unchanged": layer.cost.unchanged_macs,
            },
        }
        for layer in layers
    ]


def _short(count: int) -> str:
    return units.short_count(count) if count else ""
