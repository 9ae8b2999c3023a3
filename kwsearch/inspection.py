"""A network as a tree of layers: where each stands, what it became, what it costs and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kwlayers.layout import MethodSettings
from kwlayers.plan import Plan, shown, template_of
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

    block: the repeated block that holds it. stage: None for layers outside the stages. warehouse
    (by other methods its group), mixtures (m), cells (n, or what else the group's size is): of a
    dynamic layer. static: why it stays static; empty if it does not.
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
    reasons = _reasons(plan, settings or Settings())
    found = []
    for site, cost in zip(plan.extended.sites, plan.cost_by_layer(), strict=True):
        label = placed.labels[site.name]
        group = groups.get(cost.group or "")
        why = "" if group else reasons[site.name] or "no group has it"
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


def _reasons(plan: Plan, settings: MethodSettings) -> dict[str, str]:
    """Why layers stay static; those of an added block as the one it is like."""
    found = settings.why_static(plan.network)
    for group in plan.groups:
        for block in group.added:
            like = template_of(block)
            same = {k: why for k, why in found.items() if k.startswith(f"{like}.")}
            found |= {f"{block}{name[len(like) :]}": why for name, why in same.items()}
    return found


def tree(layers: Sequence[Layer], groups: str, scale: int = 1) -> tuple[Table, list[str]]:
    """A table of the layers under the blocks that hold them, and its notes.

    groups: what they are called, "warehouse" or "group". scale: 2 for FLOPs.
    """
    unit = "MACs" if scale == 1 else "FLOPs"
    parts = {
        "kernels": [layer.cost.kernels for layer in layers],
        "attention": [layer.cost.attention for layer in layers],
        "unchanged": [layer.cost.unchanged for layer in layers],
    }
    work = {
        "conv": [layer.cost.conv + layer.cost.unchanged_macs for layer in layers],
        "mixing": [layer.cost.mixing for layer in layers],
        "attention": [layer.cost.attention_macs for layer in layers],
        "modulation": [layer.cost.modulation for layer in layers],
    }
    for found, name in ((parts, "kernels"), (work, "modulation")):
        if not any(found[name]):
            del found[name]
    named = {f"{part}\nparams": counts for part, counts in parts.items()}
    named |= {f"{part}\n{unit}": [scale * one for one in counts] for part, counts in work.items()}
    mixed = ("m", "n") if groups == "warehouse" else ("size",)
    spared = (
        "unchanged\nparams", f"attention\n{unit}", f"modulation\n{unit}", f"conv\n{unit}",
        "kernel", "attention\nparams", f"mixing\n{unit}", "stage", "kernels\nparams",
    )  # fmt: skip
    table = new_table(
        ("layer", "kernel", "stage", groups),
        mixed,
        tuple(named),
        spare=[name for name in spared if name in named or "\n" not in name],
    )
    reasons: dict[str, int] = {}
    block = ""
    for number, layer in enumerate(layers):
        if layer.block != block and layer.block:
            table.add_row(plain(layer.block))
        block = layer.block
        own = f"  {layer.name[len(block) + 1 :]}" if block else shown(layer.name)
        kernel = "x".join(map(str, layer.kernel))
        sizes = (layer.mixtures, layer.cells)[-len(mixed) :]
        dynamic = layer.warehouse is not None
        note = "" if dynamic else f"static ({reasons.setdefault(layer.static, len(reasons) + 1)})"
        table.add_row(
            plain(own),
            kernel if layer.groups == 1 else f"{kernel} /{layer.groups}",
            "" if layer.stage is None else str(layer.stage),
            plain(layer.warehouse or note),
            *(f"{size:,}" if dynamic else "" for size in sizes),
            *(_short(counts[number]) for counts in named.values()),
        )
    return table, [f"({number}) {reason}" for reason, number in reasons.items()]


def layers_json(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """The same for `--json`, with whole numbers."""
    return [
        {
            **{k: v for k, v in vars(layer).items() if k != "cost"},
            "kernel": list(layer.kernel),
            "params": {
                "kernels": layer.cost.kernels,
                "attention": layer.cost.attention,
                "unchanged": layer.cost.unchanged,
            },
            "macs": {
                "conv": layer.cost.conv,
                "mixing": layer.cost.mixing,
                "attention": layer.cost.attention_macs,
                "modulation": layer.cost.modulation,
                "unchanged": layer.cost.unchanged_macs,
            },
        }
        for layer in layers
    ]


def _short(count: int) -> str:
    return units.short_count(count) if count else ""
