"""A network as a tree of layers: where each stands, what it became, what it costs and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kwlayers.plan import Plan
from kwlayers.stages import place
from kwsearch import units
from kwsearch.report import Row, layer_row
from kwsearch.terminal import new_table, plain

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Layer:
    """One layer of a plan. cost: of one image, by part.

    stage: None for layers outside the stages. warehouse, mixtures (m), cells (n): of a dynamic
    layer. static: why it stays static; empty if it does not.
    """

    name: str
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


def layers_of(plan: Plan) -> tuple[Layer, ...]:
    """All layers in module order."""
    groups = {group.name: group for group in plan.groups}
    placed = place(plan.network.sites)
    found = []
    for site, cost in zip(plan.network.sites, plan.cost_by_layer(), strict=True):
        label = placed.labels[site.name]
        group = groups.get(cost.group or "")
        why = "" if group else site.fixed or label.static or "no warehouse takes it"
        found.append(
            Layer(
                name=site.name,
                kind=site.kind if site.kind == "linear" or site.groups == 1 else label.kind,
                kernel=site.kernel,
                groups=site.groups,
                positions=site.out_positions,
                stage=None if why and not group or label.alone else label.stage,
                warehouse=group.name if group else None,
                mixtures=cost.mixtures,
                cells=group.num_cells if group else 0,
                static=why,
                cost=layer_row(cost),
            )
        )
    return tuple(found)


def tree_table(layers: Sequence[Layer], scale: int = 1) -> Table:
    """One line per layer under the lines of the modules that hold it. scale: 2 for FLOPs."""
    unit = "MACs" if scale == 1 else "FLOPs"
    table = new_table(
        ("layer", "kernel", "stage", "warehouse, or why not"),
        ("m", "n", "attention", "unchanged", f"conv {unit}", "mixing", "attention"),
    )
    for depth, name, layer in _tree(layers):
        shown = plain("  " * depth + name)
        if layer is None:
            table.add_row(shown)
            continue
        row = layer.cost
        kernel = "x".join(map(str, layer.kernel))
        static = layer.warehouse is None
        table.add_row(
            shown,
            kernel if layer.groups == 1 else f"{kernel} /{layer.groups}",
            "" if layer.stage is None else str(layer.stage),
            plain(layer.warehouse or layer.static),
            *(("", "") if static else (str(layer.mixtures), str(layer.cells))),
            *map(_short, (row.attention, row.unchanged)),
            *map(_short, (scale * (row.conv + row.unchanged_macs),)),
            *map(_short, (scale * row.mixing, scale * row.attention_macs)),
        )
    return table


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


def _tree(layers: Sequence[Layer]) -> Iterator[tuple[int, str, Layer | None]]:
    """(depth, name, layer) in module order; None for a module that holds layers."""
    opened: list[str] = []
    for layer in layers:
        *parents, own = layer.name.split(".")
        while opened != parents[: len(opened)]:
            opened.pop()
        for parent in parents[len(opened) :]:
            yield len(opened), parent, None
            opened.append(parent)
        yield len(opened), own, layer


def _short(count: int) -> str:
    return units.short_count(count) if count else ""
