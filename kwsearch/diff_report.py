"""The difference of two recipes for a terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kwlayers.plan import counted
from kwsearch.diff import Count, Difference, GroupChange, value_text
from kwsearch.terminal import new_table, plain

if TYPE_CHECKING:
    from rich.table import Table

_NOTHING = "-"
_MOST_NAMES, _MOST_GROUPS = 8, 20


def lines(found: Difference) -> Iterator[str | Table]:
    """All of it for a terminal: a sentence, then the tables that have something to say."""
    yield plain(f"A  {found.a.name}: {found.a.title}")
    yield plain(f"B  {found.b.name}: {found.b.title}")
    yield plain(found.verdict)
    if found.note:
        yield plain(found.note)
    if not found.same_plan:
        yield _totals_table(found)
        yield _stages_table(found)
    if found.settings:
        table = new_table(("setting", "A", "B"))
        for change in found.settings:
            table.add_row(*map(plain, (change.path, _shown(change.a), _shown(change.b))))
        yield table
    if found.groups:
        yield _groups_table(found.groups[:_MOST_GROUPS])
        if (more := len(found.groups) - _MOST_GROUPS) > 0:
            yield f" and {counted(more, 'group')} more, which --json and --html have"
    for side, layers in (("A", found.dynamic_a), ("B", found.dynamic_b)):
        if layers:
            yield plain(f"dynamic in {side} only: {_some(layers)}")


def _totals_table(found: Difference) -> Table:
    table = new_table(("",), ("A", "B", "B - A", "B / A"))
    for unit, counts in (("parameters", found.params), ("MACs", found.macs)):
        for count in [counts[-1], *counts[:-1]]:
            name = unit if count.name == "total" else f"  {count.name}"
            table.add_row(
                name,
                f"{count.a:,}",
                f"{count.b:,}",
                _signed(count.difference),
                _NOTHING if count.ratio is None else f"{count.ratio:.2f}",
            )
        table.add_section()
    return table


def _stages_table(found: Difference) -> Table:
    params = ("parameters\nof A", "parameters\nof B", "B - A")
    macs = ("MACs\nof A", "MACs\nof B", "B - A ")
    words = ("groups of A", "groups of B")
    table = new_table(("stage", *words), params, macs, spare=(*macs[:2], *params[:2]))
    for stage in found.stages:
        numbers = [
            shown
            for count in (stage.params, stage.macs)
            for shown in (f"{count.a:,}", f"{count.b:,}", _signed(count.difference))
        ]
        table.add_row(*map(plain, (stage.name, stage.a, stage.b)), *numbers)
    return table


def _groups_table(groups: Sequence[GroupChange]) -> Table:
    table = new_table(("group", "A", "B", "what differs"))
    for group in groups:
        said = (group.name, group.a or _NOTHING, group.b or _NOTHING, what_differs(group))
        table.add_row(*map(plain, said))
    return table


def what_differs(group: GroupChange) -> str:
    """Of a group, in words."""
    if not (group.a and group.b):
        return "only in A" if group.a else "only in B"
    said = [f"{f.path} {_shown(f.a)} to {_shown(f.b)}" for f in group.fields]
    for side, layers in (("A", group.only_a), ("B", group.only_b)):
        if layers:
            said.append(f"only in {side}: {_some(layers)}")
    return "; ".join(said) or "layers that the other network has not"


def _shown(value: Any) -> str:
    return _NOTHING if value is None else value_text(value)


def _signed(number: int) -> str:
    return f"{number:+,}" if number else "0"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMES])
    more = len(names) - _MOST_NAMES
    return f"{shown} and {more:,} more" if more > 0 else shown


def to_json(found: Difference) -> dict[str, Any]:
    """The same for `--json`, with every name."""
    return {
        **{
            key: {
                "recipe": side.name,
                "model": side.recipe.model.name,
                "input": list(side.plan.network.input_size),
            }
            for key, side in (("a", found.a), ("b", found.b))
        },
        "same_plan": found.same_plan,
        "note": found.note,
        "settings": [vars(change) for change in found.settings],
        "params": {count.name: _count_json(count) for count in found.params},
        "macs": {count.name: _count_json(count) for count in found.macs},
        "stages": [
            {
                "stage": stage.name,
                "groups": {"a": stage.a, "b": stage.b},
                "params": _count_json(stage.params),
                "macs": _count_json(stage.macs),
            }
            for stage in found.stages
        ],
        "groups": [
            {
                "name": group.name,
                "a": group.a or None,
                "b": group.b or None,
                "fields": [vars(change) for change in group.fields],
                "only_in_a": list(group.only_a),
                "only_in_b": list(group.only_b),
            }
            for group in found.groups
        ],
        "dynamic_in_a_only": list(found.dynamic_a),
        "dynamic_in_b_only": list(found.dynamic_b),
        "layers_in_common": found.common,
    }


def _count_json(count: Count) -> dict[str, Any]:
    return {"a": count.a, "b": count.b, "difference": count.difference, "ratio": count.ratio}
