"""Every choice of one cell, numbered, and the operators of each at every width of its input.

A cell's choices are few (12, or 960 beside being left out), and neither its memory nor its cycles
depend on other cells but for the width of its input. So the expectation of a peak over a space is a
chain of sums, and the best architecture within limits is a path.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from kwsearch.micronas.space import FusionPlace, Key, Operator, TimePlace


class Choices:
    """All L choices of the cell at a place but to leave it out.

    options: by decision, the number of the option (L,) that each choice has. out: that of its
    width. I is the number of widths that the input may have.
    """

    def __init__(self, place: TimePlace | FusionPlace) -> None:
        self.place = place
        self.skippable = isinstance(place, FusionPlace) and not place.reducing
        self.decisions = [one for one in place.decisions() if one.name != f"{place.name}.keep"]
        numbers = [torch.arange(len(one.options)) for one in self.decisions]
        rows = torch.cartesian_prod(*numbers)
        if isinstance(place, FusionPlace):
            rows = rows[rows[:, 2:].any(1)]  # a branch or the residual
        self.options = {one.name: rows[:, i].clone() for i, one in enumerate(self.decisions)}
        self.out = self.options[f"{place.name}.channels"]

    def __len__(self) -> int:
        return len(self.out)

    def products(self, mixture: Mapping[str, Tensor]) -> Tensor:
        """(L,) probabilities of the choices, of a cell that is kept."""
        return self._reduced(operator.mul, mixture)

    def sums(self, scores: Mapping[str, Tensor]) -> Tensor:
        """(L,) sums of the scores of each choice's options."""
        return self._reduced(operator.add, scores)

    def chosen(self, number: int) -> dict[str, int]:
        """The options of a choice, as `Space.architecture` takes them."""
        picked = {
            one.name: one.options[int(self.options[one.name][number])] for one in self.decisions
        }
        return {**picked, f"{self.place.name}.keep": 1} if self.skippable else picked

    def groups(self) -> list[tuple[Tensor, tuple[Operator, ...]]]:
        """Choices that differ in widths only: their numbers (G,), and the operators of one."""
        widths = (f"{self.place.name}.bottleneck", f"{self.place.name}.channels")
        rest = [index for name, index in self.options.items() if name not in widths]
        alike: dict[tuple[int, ...], list[int]] = {}
        for number, kind in enumerate(torch.stack(rest, 1).tolist()):
            alike.setdefault(tuple(kind), []).append(number)
        found = []
        for numbers in alike.values():
            cell: Any = self.place.cell(self.chosen(numbers[0]))
            found.append((torch.tensor(numbers), self.place.operators(cell, 1, "input")))
        return found

    def grid(self, tensor: str) -> tuple[int, ...]:
        """The widths that a tensor may have: the input, or an operator's output."""
        return self.place.in_channels if tensor == "input" else self.place.channels

    def option(self, tensor: str, numbers: Tensor) -> Tensor:
        """Which of them it has: (I, 1) for the input, (1, G) for others."""
        if tensor == "input":
            return torch.arange(len(self.place.in_channels))[:, None]
        bottleneck = f"{self.place.name}.bottleneck"
        return (self.options[bottleneck] if tensor == bottleneck else self.out)[None, numbers]

    def channels(self, tensor: str, numbers: Tensor) -> Tensor:
        """The width itself: (I, 1) or (1, G)."""
        return torch.tensor(self.grid(tensor))[self.option(tensor, numbers)]

    def costs(self, cost: Callable[[Key], float]) -> Tensor:
        """(I, L) sums of what the operators of each choice cost at each width of the input."""
        found = torch.zeros(len(self.place.in_channels), len(self), dtype=torch.float64)
        for numbers, operators in self.groups():
            for one in operators:
                read, written = self.option(one.inputs[0], numbers), self.option(one.name, numbers)
                found[:, numbers] += self.matrix(one, cost)[read, written]
        return found

    def matrix(self, one: Operator, cost: Callable[[Key], float]) -> Tensor:
        """(widths of its input, widths of its output) costs of an operator.

        Those of an addition are on the diagonal.
        """
        read, written = self.grid(one.inputs[0]), self.grid(one.name)
        found = torch.zeros(len(read), len(written), dtype=torch.float64)
        for i, channels in enumerate(read):
            for j, others in enumerate(written):
                if one.key.kind != "add" or channels == others:
                    found[i, j] = cost(one.key.at(channels, others))
        return found

    def _reduced(
        self, with_: Callable[[Tensor, Tensor], Tensor], by: Mapping[str, Tensor]
    ) -> Tensor:
        return reduce(with_, (by[name][index] for name, index in self.options.items()))
