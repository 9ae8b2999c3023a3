"""Fields of a method's settings and groups: what a value may be, said once.

Recipes check values by the same description (`kwsearch.recipe`). No torch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

_KEY = "allowed"


@dataclasses.dataclass(frozen=True)
class Allowed:
    """text: what the field is. least, above, most: bounds of a number. words: of a word."""

    text: str
    kind: type
    least: float | None = None
    above: float | None = None
    most: float | None = None
    words: tuple[str, ...] = ()

    def refuses(self, value: object) -> str:
        """What is allowed, if the value is not; else empty."""
        if self.kind is bool:
            return "" if isinstance(value, bool) else "true or false"
        if self.kind is str:
            fits = isinstance(value, str) and (not self.words or value in self.words)
            return "" if fits else " or ".join(map(repr, self.words)) or "a text"
        numbers = (int,) if self.kind is int else (int, float)
        if isinstance(value, numbers) and not isinstance(value, bool) and self._holds(value):
            return ""
        limits = (("at least", self.least), ("above", self.above), ("at most", self.most))
        bounds = [f"{sign} {bound:g}" for sign, bound in limits if bound is not None]
        noun = "a whole number" if self.kind is int else "a number"
        return " ".join([noun, " and ".join(bounds)]).strip()

    def _holds(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and value - value == 0  # finite
        )


def allow(
    text: str, kind: type, default: Any = dataclasses.MISSING, *words: str, **bounds: float
) -> Any:
    """A dataclass's field of that description. words, bounds: as in `Allowed`."""
    allowed = Allowed(text, kind, words=words, **bounds)
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata={_KEY: allowed})
    return dataclasses.field(default=default, metadata={_KEY: allowed})


MAX_TEMPERATURE = 30.0
NORMS = ("batch", "layer")


def allow_reduction(default: float = 1 / 16) -> Any:
    """Of an attention's hidden width."""
    return allow("attention width as a part of the channels", float, default, above=0, most=1)


def allow_norm(whose: str = "", *, auto: bool = False) -> Any:
    """Of an attention's norm. auto: for settings, where the network may decide."""
    text = f"normalisation in the attention{whose}"
    if auto:
        return allow(f"{text}; auto follows the network", str, "auto", "auto", *NORMS)
    return allow(text, str, "batch", *NORMS)


def allow_max_temperature() -> Any:
    """Of an attention that is nearly even at first."""
    text = "temperature of the attention where the warm-up begins"
    return allow(text, float, MAX_TEMPERATURE, least=1)


def allowed_of(kind: Any) -> dict[str, tuple[Allowed, Any]]:
    """The described fields of a dataclass and their defaults (MISSING without one), by name."""
    return {
        field.name: (field.metadata[_KEY], field.default)
        for field in dataclasses.fields(kind)
        if _KEY in field.metadata
    }


def check_fields(value: Any) -> None:
    """Raise ValueError for the first described field that is not as described."""
    for name, (allowed, _) in allowed_of(type(value)).items():
        given = getattr(value, name)
        if reason := allowed.refuses(given):
            raise ValueError(f"{name} {given!r}: allowed is {reason}")
