"""Sections of a recipe that depend on the method: made from its own fields when it is first named.

KernelWarehouse's are written out in the schema. Those of others are not imported with it, since
their files need torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, create_model
from pydantic_core import CoreSchema, core_schema

from kwlayers.fields import Allowed, allowed_of
from kwlayers.methods import NAMES, find
from kwsearch.recipe.fields import WHOLE, Bool, Name, Patterns

OWN = "kernel_warehouse"


class OfMethod:
    """A section that belongs to the method named under `key`.

    own: KernelWarehouse's, also where none is named. other: the section of another method.
    """

    def __init__(
        self, key: str, own: type[BaseModel], other: Callable[[str], type[BaseModel]]
    ) -> None:
        self.key, self.own, self.other = key, own, other

    def _validate(self, value: Any) -> Any:
        if isinstance(value, BaseModel):
            return value
        name = value.get(self.key, OWN) if isinstance(value, Mapping) else OWN
        known = isinstance(name, str) and name in NAMES and name != OWN
        return (self.other(name) if known else self.own).model_validate(value)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._validate)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        others = (self.other(name) for name in NAMES if name != OWN)
        kinds = [self.own, *others]
        return {"anyOf": [handler(kind.__pydantic_core_schema__) for kind in kinds]}


def method_section(name: str, base: type[BaseModel], rule: type[BaseModel]) -> type[BaseModel]:
    """The section `method` of a recipe for another method: its settings and rules."""
    method = find(name)
    rules = Field(
        default=(),
        description="exceptions, in order: layers that stay static, that become dynamic though "
        "they would stay static, or that have other settings",
    )
    return _section(
        name,
        "Method",
        base,
        f"{method.title} ({method.paper}).",
        {"name": (Literal[name], Field(description="the method"))}
        | _fields(method.settings)
        | {"rules": (tuple[rule, ...], rules)},  # type: ignore[valid-type]
    )


def group_section(name: str, base: type[BaseModel]) -> type[BaseModel]:
    """A group of a recipe's plan by another method: its integers."""
    method = find(name)
    named = {
        "method": (Literal[name], Field(description="the method")),
        "name": (Name, Field(description="name of the group: letters, digits, underscores")),
        "layers": (Patterns, Field(description="names of its layers, or glob patterns over names")),
    }
    return _section(
        name, "Group", base, f"Layers by {method.title}.", named | _fields(method.group)
    )


def _section(
    name: str, kind: str, base: type[BaseModel], text: str, fields: dict[str, Any]
) -> type[BaseModel]:
    title = "".join(part.capitalize() for part in name.split("_"))
    made: type[BaseModel] = create_model(f"{title}{kind}", __base__=base, __doc__=text, **fields)
    return made


def _fields(kind: Any) -> dict[str, Any]:
    """Of pydantic, for the described fields of a dataclass."""
    return {
        name: (
            _type(allowed),
            Field(description=allowed.text)
            if default is dataclasses.MISSING
            else Field(default=default, description=allowed.text),
        )
        for name, (allowed, default) in allowed_of(kind).items()
    }


def _type(allowed: Allowed) -> Any:
    if allowed.kind is bool:
        return Bool
    if allowed.kind is str:
        return Literal[allowed.words] if allowed.words else str
    bounds: dict[str, Any] = {
        key: bound
        for key, bound in (("ge", allowed.least), ("gt", allowed.above), ("le", allowed.most))
        if bound is not None
    }
    if allowed.kind is int:
        return Annotated[int, Field(strict=True, **bounds), WHOLE]
    return Annotated[float, Field(strict=True, allow_inf_nan=False, **bounds)]
