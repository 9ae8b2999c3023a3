"""YAML as plain data that knows where each value was written.

A `Located` tree holds what a file and its `key=value` overrides say, with the place of every
value and key, so that a later check can point at what it found.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

_TAG = "tag:yaml.org,2002:"
_MAX_VALUES = 100_000
_MAX_DIGITS = 1000
# What a text stands for in place of a mapping: `model: NAME`.
_SHORT_FORMS = {"model": "name"}

# The scalars of YAML 1.2 (core schema) and the characters that they start with: `1e-3` is a
# number; `no`, `12:30` and `2024-01-01` are text. An int is tried before a float.
SCALARS = {
    "null": (re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")),
    "int": (re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"), list("-+0123456789")),
    "float": (
        re.compile(
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
        ),
        list("-+.0123456789"),
    ),
}


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own form)


for _kind, (_pattern, _first) in SCALARS.items():
    _Loader.add_implicit_resolver(_TAG + _kind, _pattern, _first)


class Place(NamedTuple):
    """Where something was written. Sorts in the order of the file, overrides last."""

    line: int
    column: int
    text: str


class _Mark(NamedTuple):
    """The part of a yaml.Mark that makes a Place."""

    line: int
    column: int


Problem = tuple[Place, str]


@dataclass
class Located:
    """A value and where it was written.

    value: a scalar, a dict or a list of Located. keys: the places of a mapping's keys.
    override: the last override that changed an entry of it.
    broken: it could not be read, which has been reported; nothing more to say about it.
    """

    value: Any
    place: Place
    keys: dict[str, Place] = field(default_factory=dict)
    override: Place | None = None
    broken: bool = False

    def plain(self) -> Any:
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        return self.value


@dataclass(frozen=True)
class Origin:
    """Where a recipe was written, value by value. No part of the recipe: all are equal."""

    source: str = field(default="", compare=False)
    root: Located | None = field(default=None, compare=False, repr=False)

    def place(self, *path: str | int) -> str:
        """`file:line:column` of the value at `path`, as far as it is written; "" if unknown."""
        text, node = self.source, self.root
        for part in path:
            key = inner = None
            if node is not None and isinstance(node.value, dict) and isinstance(part, str):
                key, inner = node.keys.get(part), node.value.get(part)
            elif node is not None and isinstance(node.value, list) and isinstance(part, int):
                inner = node.value[part] if part < len(node.value) else None
            if inner is None:
                break
            text, node = (inner.override or key or inner.place).text, inner
        return text


def problem(place: Place, path: list[str], message: str) -> Problem:
    """One line about the value at `path`."""
    dotted = ".".join(part if part.isprintable() else repr(part)[1:-1] for part in path)
    return place, ": ".join(filter(None, (place.text, dotted, message)))


def read_yaml(text: str, source: str, problems: list[Problem]) -> Located | None:
    """The tree of a YAML document; None if it is empty or no YAML at all."""

    def place(line: int, column: int) -> Place:
        return Place(line + 1, column + 1, f"{source}:{line + 1}:{column + 1}")

    return _read(text, lambda mark: place(mark.line, mark.column), place(0, 0), [], problems)


def override_(root: Located, text: str, problems: list[Problem]) -> Located:
    """Apply one `path.to.key=value` to a tree whose root is a mapping."""
    place = Place(sys.maxsize, 0, f"override {text!r}")
    key, equals, value_text = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        problems.append(problem(place, [], "not KEY=VALUE (allowed e.g. proxy.epochs=3)"))
        return root
    count = len(problems)
    value = _read(value_text, lambda mark: place, place, parts, problems)
    if value is None and len(problems) > count:
        return root
    node = root
    for depth, part in enumerate(parts):
        above, last = parts[:depth], depth == len(parts) - 1
        if node.value is None:
            node.value, node.place = {}, place
        if isinstance(node.value, str) and (name := _SHORT_FORMS.get(".".join(above))):
            node.value = {name: Located(node.value, node.place)}
        if last:
            node.override = place
        if isinstance(node.value, dict):
            if last:
                node.value[part] = value or Located(None, place)
                node.keys[part] = place
            elif part not in node.value:
                node.value[part], node.keys[part] = Located({}, place), place
            node = node.value[part]
        elif isinstance(node.value, list):
            size = len(node.value)
            index = int(part) if re.fullmatch("[0-9]{1,9}", part) else size
            if index >= size:
                allowed = f"allowed 0 to {size - 1}" if size else "the list is empty"
                message = f"not an index of the list (got {part!r}; {allowed})"
                problems.append(problem(place, above, message))
                return root
            if last:
                node.value[index] = value or Located(None, place)
            node = node.value[index]
        else:
            hint = f"override all of it, as in {'.'.join(above)}={{{part}: ...}}"
            message = f"not a mapping, has no {part!r} (got {node.value!r}; {hint})"
            problems.append(problem(place, above, message))
            return root
    return root


def _read(
    text: str,
    place_of: Callable[[Any], Place],
    start: Place,
    path: list[str],
    problems: list[Problem],
) -> Located | None:
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else _Builder(place_of, problems).build(node, path)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        about = ", ".join(filter(None, (error.context, error.problem)))
        place = place_of(mark) if mark else start
        problems.append(problem(place, path, f"not valid YAML ({about})"))
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n"), len(before) - (before.rfind("\n") + 1)
        place = place_of(_Mark(line, column))
        message = f"not valid YAML (the character {chr(error.character)!r} is not allowed)"
        problems.append(problem(place, path, message))
    except RecursionError:
        problems.append(problem(start, path, "nested too deeply"))
    return None


class _Builder:
    def __init__(self, place_of: Callable[[Any], Place], problems: list[Problem]) -> None:
        self.place_of, self.problems = place_of, problems
        self.open: set[int] = set()
        self.size = 0

    def build(self, node: yaml.Node, path: list[str]) -> Located:
        place = self.place_of(node.start_mark)
        self.size += 1
        if id(node) in self.open or self.size > _MAX_VALUES:
            # Aliases of aliases grow without end; either way this is the last thing to say.
            why = "contains itself" if id(node) in self.open else "too many values"
            raise yaml.composer.ComposerError(None, None, why, node.start_mark)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, place, path)
        kind = "map" if isinstance(node, yaml.MappingNode) else "seq"
        if node.tag != _TAG + kind:
            return self._refuse_tag(node, place, path)
        self.open.add(id(node))
        if isinstance(node, yaml.MappingNode):
            located = self._mapping(node, place, path)
        else:
            items = [self.build(item, [*path, str(i)]) for i, item in enumerate(node.value)]
            located = Located(items, place)
        self.open.remove(id(node))
        return located

    def _mapping(self, node: yaml.MappingNode, place: Place, path: list[str]) -> Located:
        located = Located({}, place)
        for key_node, value_node in node.value:
            key_place = self.place_of(key_node.start_mark)
            if key_node.tag != _TAG + "str":
                got = "a list or a mapping"
                if isinstance(key_node, yaml.ScalarNode):
                    got = f"{key_node.value!r} without quotes; put it in quotes"
                self.problems.append(problem(key_place, path, f"a key is not text (got {got})"))
                continue
            key = _unicode(key_node.value)
            if key is None:
                message = f"a key is not Unicode text (got {key_node.value!r})"
                self.problems.append(problem(key_place, path, message))
                continue
            if key in located.keys:
                line = located.keys[key].line
                first = f" (first at line {line})" if line < sys.maxsize else ""
                self.problems.append(problem(key_place, [*path, key], f"key given twice{first}"))
                continue
            located.keys[key] = key_place
            located.value[key] = self.build(value_node, [*path, key])
        return located

    def _scalar(self, node: yaml.ScalarNode, place: Place, path: list[str]) -> Located:
        kind, text = node.tag.removeprefix(_TAG), node.value
        if kind == "str":
            joined = _unicode(text)
            if joined is None:
                return self._broken(place, path, f"not Unicode text (got {text!r})")
            return Located(joined, place)
        if kind not in SCALARS or not node.tag.startswith(_TAG):
            return self._refuse_tag(node, place, path)
        if not SCALARS[kind][0].match(text):
            return self._broken(place, path, f"not a YAML !!{kind} (got {text!r})")
        if len(text) > _MAX_DIGITS:
            message = f"a number of {len(text)} digits (allowed at most {_MAX_DIGITS})"
            return self._broken(place, path, message)
        return Located(_convert(kind, text), place)

    def _refuse_tag(self, node: yaml.Node, place: Place, path: list[str]) -> Located:
        tag = node.tag.replace(_TAG, "!!")
        allowed = "text, numbers, true, false, null, lists and mappings"
        return self._broken(place, path, f"not plain data (got the tag {tag!r}; allowed {allowed})")

    def _broken(self, place: Place, path: list[str], message: str) -> Located:
        self.problems.append(problem(place, path, message))
        return Located(None, place, broken=True)


def _unicode(text: str) -> str | None:
    r"""JSON writes some characters as two escapes, "\ud83d\ude00". None for half of one."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        return None


def _convert(kind: str, text: str) -> Any:
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "float":
        return float(text.replace(".", "") if text[-1] in "fFnN" else text)
    if text[:2] in ("0o", "0x"):
        return int(text[2:], 8 if text[1] == "o" else 16)
    return int(text)
