"""The kinds of values in a recipe: types that validate themselves and know their JSON Schema."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from kwsearch import units

NAME_PATTERN = "^[A-Za-z0-9_]+$"


def _whole(value: Any) -> Any:
    """1e3 is a whole number too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number_or_auto(value: Any) -> Any:
    value = _whole(value)
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise PydanticCustomError("number_or_auto", "not a whole number or auto")


def _as_pair(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        if len(value) != 2:
            raise PydanticCustomError("pair", "not a number or a pair of numbers")
        return value
    return (value, value)


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    repeats = [i for i, value in enumerate(values) if value in values[:i]]
    if repeats:
        error = PydanticCustomError("duplicate", "given twice")
        raise ValidationError.from_exception_data(
            "list", [InitErrorDetails(type=error, loc=(i,), input=values[i]) for i in repeats]
        )
    return values


def _finite(value: Any) -> Any:
    """JSON has no nan and no inf."""
    error = PydanticCustomError("finite_number", "not a finite number")
    found: list[InitErrorDetails] = []
    pending: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    for loc, item in pending:
        if isinstance(item, float) and not math.isfinite(item):
            found.append(InitErrorDetails(type=error, loc=loc, input=item))
        elif isinstance(item, dict):
            pending.extend(((*loc, key), inner) for key, inner in item.items())
        elif isinstance(item, list):
            pending.extend(((*loc, index), inner) for index, inner in enumerate(item))
    if found:
        raise ValidationError.from_exception_data("value", found)
    return value


_PORTION: dict[str, Any] = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
_COUNT: dict[str, Any] = {
    "anyOf": [
        {"type": "integer", "minimum": 1},
        {"type": "string", "pattern": units.COUNT_PATTERN, "examples": ["12.8M"]},
    ]
}
_MEMORY: dict[str, Any] = {
    "anyOf": [
        {"type": "integer", "minimum": 1},
        {"type": "string", "pattern": units.BYTES_PATTERN, "examples": ["500MB"]},
    ]
}
_RATIO: dict[str, Any] = {
    "anyOf": [
        {"type": "number", "exclusiveMinimum": 0},
        {"type": "string", "pattern": units.RATIO_PATTERN, "examples": ["0.5x"]},
    ]
}
_SIZE: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "pattern": units.SIZE_PATTERN, "examples": ["3x224x224"]},
        {"type": "integer", "minimum": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 2, "maxItems": 4},
    ]
}
_PAIR: dict[str, Any] = {
    "anyOf": [_PORTION, {"type": "array", "items": _PORTION, "minItems": 2, "maxItems": 2}]
}

WHOLE = BeforeValidator(_whole)
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Bool = Annotated[bool, Field(strict=True)]
AtLeast1 = Annotated[int, Field(strict=True, ge=1), WHOLE]
AtLeast4 = Annotated[int, Field(strict=True, ge=4), WHOLE]
AutoOrAtLeast1 = Annotated[
    Annotated[int, Field(ge=1)] | Literal["auto"], BeforeValidator(_number_or_auto)
]
NotNegative = Annotated[int, Field(strict=True, ge=0), WHOLE]
NotNegativeFloat = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0)]
Positive = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0)]
Portion = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=1)]
CellRatio = Annotated[tuple[Portion, Portion], BeforeValidator(_as_pair), WithJsonSchema(_PAIR)]
Count = Annotated[int, BeforeValidator(units.parse_count), WithJsonSchema(_COUNT)]
Ratio = Annotated[float, BeforeValidator(units.parse_ratio), WithJsonSchema(_RATIO)]
Memory = Annotated[int, BeforeValidator(units.parse_bytes), WithJsonSchema(_MEMORY)]
AnyBudget = Annotated[
    float,
    BeforeValidator(units.parse_budget),
    WithJsonSchema({"anyOf": [*_RATIO["anyOf"], _COUNT["anyOf"][1]]}),
]
Size = Annotated[tuple[int, ...], BeforeValidator(units.parse_size), WithJsonSchema(_SIZE)]
Patterns = Annotated[tuple[Text, ...], Field(min_length=1)]
SharingRule = Literal["stage", "position", "layer"]
_Rule = Annotated[SharingRule, Tag("<rule>")]
_Mapping = Annotated[dict[Name, Patterns], Field(min_length=1), Tag("<mapping>")]
Sharing = Annotated[
    _Rule | _Mapping,
    Discriminator(lambda value: "<mapping>" if isinstance(value, dict) else "<rule>"),
]
Scalar = Annotated[
    Annotated[bool, Field(strict=True)]
    | Annotated[int, Field(strict=True)]
    | Annotated[float, Field(strict=True, allow_inf_nan=False)]
    | Annotated[str, Field(strict=True)],
    Field(union_mode="left_to_right"),
]
Json = Annotated[JsonValue, AfterValidator(_finite)]
UNIQUE = Field(json_schema_extra={"uniqueItems": True})
DISTINCT = AfterValidator(_distinct)
