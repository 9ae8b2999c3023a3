"""Recipes as YAML text that people read, and files that are never half written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import yaml

from kwsearch.files import write_whole
from kwsearch.recipe.schema import Recipe
from kwsearch.recipe.tree import SCALARS

# PyYAML breaks a line after the entry that passes the width: most lines end before 100.
_WIDTH = 80


class _Dumper(yaml.SafeDumper):
    """Block mappings, lists of plain values in one line, text quoted for YAML 1.1 and 1.2."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML would write some line breaks (\x85, \u2028) so that they read back as a space.
        style = None if data.isprintable() else '"'
        if style and all(line.isprintable() for line in data.split("\n")):
            style = "|"
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    def represent_sequence(
        self, tag: str, sequence: Any, flow_style: bool | None = None
    ) -> yaml.SequenceNode:
        node = super().represent_sequence(tag, sequence, flow_style)
        node.flow_style = not _holds_mapping(node)
        return node


_Dumper.add_representer(str, _Dumper.represent_str)


def _holds_mapping(node: yaml.Node) -> bool:
    if isinstance(node, yaml.SequenceNode):
        return any(_holds_mapping(item) for item in node.value)
    return isinstance(node, yaml.MappingNode)


for _kind, (_pattern, _first) in SCALARS.items():
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _pattern, _first)


def dump_recipe(recipe: Recipe, header: Sequence[str] = ()) -> str:
    """YAML text that `parse_recipe` reads back as the same recipe, below `# ` header lines."""
    comments = [f"# {_printable(line)}".rstrip() for part in header for line in part.split("\n")]
    body = yaml.dump(
        recipe.to_dict(),
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=False,
        allow_unicode=True,
        width=_WIDTH,
    )
    return "\n".join([*comments, body])


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def write_recipe(recipe: Recipe, path: str | os.PathLike[str], header: Sequence[str] = ()) -> None:
    """Write `dump_recipe` to `path`, all or nothing. Follows a link. Raises OSError."""
    write_whole(path, dump_recipe(recipe, header))
