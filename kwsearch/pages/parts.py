"""Parts of parameters and MACs, as plots and tables show them: one order, one colour each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kwlayers.plan import Plan

# The number of a part's colour and hatch, by the name of the part (see `figure.PARTS`).
NUMBERS = {
    "kernels": 0,
    "conv": 0,
    "attention": 1,
    "mixing": 2,
    "modulation": 3,
    "unchanged": 5,
}
# What a part is, in a legend.
WORDS = {
    "kernels": "kernels",
    "conv": "convolutions of dynamic layers",
    "attention": "attention",
    "mixing": "mixing of kernels",
    "modulation": "products of feature maps with attention",
    "unchanged": "unchanged: static layers, norms",
}


def params_of(plan: Plan) -> dict[str, int]:
    """Parameters by part, without those that are only there for training."""
    params = plan.cost().deployed_params
    return {part: getattr(params, part) for part in ("kernels", "attention", "unchanged")}


def macs_of(plan: Plan) -> dict[str, int]:
    """MACs of one input by part."""
    macs = plan.cost().macs
    return {part: getattr(macs, part) for part in NUMBERS if part != "kernels"}


def there(found: Iterable[Mapping[str, int]]) -> list[str]:
    """The parts that any of them has, in the order of the first."""
    every = list(found)
    return [part for part in (every[0] if every else ()) if any(one[part] for one in every)]


def words(part: str, warehouses: bool) -> str:
    """What a part is. warehouses: whether kernels are made of their cells."""
    return "cells of warehouses" if part == "kernels" and warehouses else WORDS[part]


def numbered(parts: Mapping[str, int]) -> list[float]:
    """Sizes by the number of their colour, for a bar."""
    sizes = [0.0] * (1 + max(NUMBERS.values()))
    for part, size in parts.items():
        sizes[NUMBERS[part]] = float(size)
    return sizes
