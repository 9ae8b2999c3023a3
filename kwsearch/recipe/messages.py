"""Pydantic's errors as one plain line each: what was given, what is allowed, and where.

What is allowed is read from the JSON Schema, so that it cannot differ from what is checked.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from pydantic_core import ErrorDetails

from kwsearch.recipe import schema
from kwsearch.recipe.fields import NAME_PATTERN
from kwsearch.recipe.tree import Located, Problem, problem

Schema = dict[str, Any]

_SIGNS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_REASONS = {
    "bool_type": "not true or false",
    "dict_type": "not a mapping",
    "duplicate": "given twice",
    "finite_number": "not a finite number",
    "float_type": "not a number",
    "greater_than": "too small",
    "greater_than_equal": "too small",
    "int_from_float": "not a whole number",
    "int_parsing_size": "too large",
    "int_type": "not a whole number",
    "less_than": "too large",
    "less_than_equal": "too large",
    "literal_error": "unknown value",
    "model_type": "not a mapping",
    "pair": "not a number or a pair of numbers",
    "string_pattern_mismatch": "not a name",
    "string_too_short": "empty",
    "string_type": "not text",
    "taken": "the name of another group",
    "too_long": "too many values",
    "too_short": "too few values",
    "tuple_type": "not a list",
}


def to_problems(errors: Iterable[ErrorDetails], root: Located) -> list[Problem]:
    """One problem for each of pydantic's errors about `root.plain()`."""
    known = list(errors)
    # Of a section of an unknown method nobody knows which keys it may have.
    unknown = {
        error["loc"][:-1]
        for error in known
        if error["type"] == "literal_error" and error["loc"][-1:] in (("name",), ("method",))
    }
    found = [
        _to_problem(error, root)
        for error in known
        if error["type"] not in ("extra_forbidden", "missing") or error["loc"][:-1] not in unknown
    ]
    return [one for one in found if one is not None]


def _to_problem(error: ErrorDetails, root: Located) -> Problem | None:
    kind, loc, context = error["type"], error["loc"], error.get("ctx", {})
    if kind == "section":
        node, _, path = _find(root, loc[:-1])
        return problem(node.override or node.place, path, context["message"])
    about_key = loc[-1:] == ("[key]",)
    node, parent, path = _find(root, loc[:-1] if about_key else loc)
    if node.broken:
        return None
    missing = [item for item in loc[-1:] if path[-1:] != [str(item)] and _is_key(item, node)]
    path += [str(item) for item in missing if not about_key]
    given = error["input"] if missing else node.plain()
    # What is wrong with a list or a mapping as a whole is due to the override of an entry.
    place = node.place if kind == "missing" else node.override or node.place
    if kind == "missing":
        needed = f"{_description(path, root)}; allowed {_in_words(_schemas(path, root))}"
        return problem(place, path, f"missing ({needed})")
    if kind == "value_error":
        return problem(place, path, str(context["error"]))
    if kind == "extra_forbidden" or about_key:
        place = parent.keys.get(path[-1], place)
        given = path[-1]
    if kind == "extra_forbidden":
        names = list(_properties(_schemas(path[:-1], root)))
        message = f"unknown key{_did_you_mean(given, names)} (allowed {', '.join(names)})"
        return problem(place, path, message)
    if kind == "too_short" and len(given) >= context["min_length"]:
        return None  # only short of the entries that have problems of their own
    reason = _REASONS.get(kind, error["msg"])
    schemas = [{"pattern": NAME_PATTERN}] if about_key else _schemas(path, root)
    if kind == "literal_error":
        values = [v for option in schemas for v in (*option.get("enum", ()), option.get("const"))]
        reason += _did_you_mean(given, values)
    if kind == "string_type" and not isinstance(given, (list, dict)):
        reason += ", put it in quotes"
    return problem(place, path, f"{reason} (got {_shown(given)}; allowed {_in_words(schemas)})")


def _is_key(item: str | int, node: Located) -> bool:
    """Whether `item` of pydantic's loc is a key, not a branch of a union."""
    return isinstance(item, str) and isinstance(node.value, dict) and not item.startswith("<")


def _find(root: Located, loc: Sequence[str | int]) -> tuple[Located, Located, list[str]]:
    """Follow pydantic's loc as far as it goes: the value, its mapping or list, and its path."""
    node, parent, path = root, root, []
    for item in loc:
        inner: Located | None = None
        if isinstance(node.value, dict) and isinstance(item, str):
            inner = node.value.get(item)
        elif isinstance(node.value, list) and isinstance(item, int):
            inner = node.value[item]
        if inner is not None:
            node, parent = inner, node
            path.append(str(item))
    return node, parent, path


def _did_you_mean(given: Any, names: Sequence[Any]) -> str:
    words = [name for name in names if isinstance(name, str)]
    close = difflib.get_close_matches(given, words, n=1) if isinstance(given, str) else []
    return f", did you mean {close[0]!r}?" if close else ""


def _shown(value: Any) -> str:
    """As it would be written in YAML, shortened."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


@lru_cache(maxsize=1)
def _root() -> Schema:
    return schema.json_schema()


def _options(found: Schema) -> list[Schema]:
    """The alternatives of a schema, references resolved."""
    if "$ref" in found:
        return _options(_root()["$defs"][found["$ref"].rpartition("/")[2]])
    # pydantic before 2.9 puts a reference that has a description of its own into an allOf.
    branches = found.get("anyOf") or found.get("oneOf") or found.get("allOf", ())
    if branches and "properties" not in found:
        return [option for branch in branches for option in _options(branch)]
    return [found]


def _schemas(path: Sequence[str], root: Located | None = None) -> list[Schema]:
    """What the JSON Schema says about the value at `path`; of a method's section, for the method
    that is named there.
    """
    options = _options(_root())
    node = root
    for part in path:
        if not any("const" in option.get("properties", {}).get(part, {}) for option in options):
            options = _of_named(options, node)
        inner: list[Schema] = []
        for option in options:
            if part in option.get("properties", {}):
                inner += _options(option["properties"][part])
            elif not option:
                inner.append(option)  # anything goes
            elif "items" in option:
                inner += _options(option["items"])
            for named in _of_any_name(option):
                inner += _options(named)
        options, node = inner, _child(node, part)
    return _of_named(options, node)


def _child(node: Located | None, part: str) -> Located | None:
    value = None if node is None else node.value
    if isinstance(value, dict):
        return value.get(part)
    index = int(part) if part.isdigit() else -1
    return value[index] if isinstance(value, list) and 0 <= index < len(value) else None


def _of_named(options: list[Schema], node: Located | None) -> list[Schema]:
    """Those of the name that a mapping gives, where some are for one name only; without a known
    name those that need none.
    """
    names = {
        (key, found["const"]): "default" in found
        for option in options
        for key, found in option.get("properties", {}).items()
        if "const" in found
    }
    if len(names) < 2:
        return options
    given = node.value if node is not None and isinstance(node.value, dict) else {}
    chosen = {one for one in names if one[0] in given and given[one[0]].value == one[1]}
    chosen = chosen or {one for one, by_default in names.items() if by_default}
    return [
        option
        for option in options
        if any(option.get("properties", {}).get(k, {}).get("const") == v for k, v in chosen)
    ]


def _of_any_name(option: Schema) -> list[Schema]:
    named = [*option.get("patternProperties", {}).values(), option.get("additionalProperties")]
    return [one for one in named if isinstance(one, dict)]


def _properties(options: Sequence[Schema]) -> Schema:
    return {key: value for option in options for key, value in option.get("properties", {}).items()}


def _description(path: Sequence[str], root: Located) -> str:
    return str(_properties(_schemas(path[:-1], root))[path[-1]]["description"])


def _in_words(options: Sequence[Schema]) -> str:
    return ", or ".join(dict.fromkeys(_option_in_words(option) for option in options))


def _option_in_words(option: Schema) -> str:
    if "const" in option:
        return _plain_value(option["const"])
    if "enum" in option:
        *first, last = [_plain_value(value) for value in option["enum"]]
        return f"{', '.join(first)} or {last}"
    if option.get("pattern") == NAME_PATTERN:
        return "letters, digits and underscores"
    if "pattern" in option:
        return f"text like {option['examples'][0]}"
    kind = option.get("type")
    if kind in ("integer", "number"):
        noun = "a whole number" if kind == "integer" else "a number"
        bounds = [f"{sign} {option[key]:.15g}" for key, sign in _SIGNS.items() if key in option]
        return f"{noun} {' and '.join(bounds)}".strip()
    if kind == "array":
        least, most = option.get("minItems", 0), option.get("maxItems")
        size = "" if most is None else f"{least} " if least == most else f"{least} to {most} "
        size = size or ("1 or more " if least else "")
        items = _of_named(_options(option["items"]), None)
        of = _in_words(items).replace("a whole number", "whole numbers", 1)
        return f"a list of {size}{of.replace('a number', 'numbers', 1)}"
    if kind == "object" and "properties" in option:
        return f"a mapping with keys {', '.join(option['properties'])}"
    if kind == "object":
        inner = [_in_words(_options(one)) for one in _of_any_name(option)]
        return " to ".join(["a mapping of names", *inner])
    if kind == "string":
        return "text that is not empty" if option.get("minLength") else "text"
    return {"null": "null", "boolean": "true or false"}.get(str(kind), "finite numbers and text")


def _plain_value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
