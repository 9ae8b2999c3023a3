"""Peak memory of activations in int8, so that elements are bytes: exact, expected, and published.

`peak_bytes` is true liveness: of every operator, all tensors that were made and are still to be
read, and its output; the largest sum is the peak. Two things depend on the runtime:

- in_place_add: an addition writes into an input that nothing else reads.
- conv_scratch: a convolution has 4 kh kw C_in bytes beside its tensors, as CMSIS-NN does for two
  columns of the input as int16.

Without both it is the liveness that was measured of the exported TensorFlow Lite files. What an
interpreter keeps in its arena for itself comes on top.

`ExpectedPeak` is the expectation of exactly that over independent choices. Given the width of its
input, a cell's peak depends on its own choices only, so the chance that the whole peak is at most m
is a product of one matrix for each cell (from input widths to output widths), and

    E[peak] = m_K - sum_k (m_k+1 - m_k) P(peak <= m_k)        m_1 < ... < m_K: all peaks there are

is a polynomial in the probabilities: at one architecture it is its peak, and every choice that
makes a difference to the peak of any architecture that may be drawn has a gradient. A cell with
neither branch nor residual, which is no network, counts as left out.

`published_peak` is the surrogate of the published code, for comparison. It forgets that a cell's
input lives on until the residual (which may put it below the truth), adds for a branch though there
is nothing to add it to, measures an accumulator by the most probable width's number, from 0, of the
cell's input, and takes time cells' channels for fusion cells' at the first residual. Its values are
the published ones; gradients are those of the formula, where the published code has cut some, and
as its outermost step is a maximum, they reach the largest cell only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor

from kwsearch.micronas.choices import Choices
from kwsearch.micronas.mixture import Mixture, as_double, of_cell
from kwsearch.micronas.space import KERNELS, FusionPlace, Operator, Space, TimePlace, head

Size = TypeVar("Size", int, Tensor)


def live_bytes(
    network: Sequence[Operator], *, in_place_add: bool = False, conv_scratch: bool = False
) -> list[int]:
    """Of each operator: bytes that are in use while it runs."""
    sizes: dict[str, int] = {}
    scratch: dict[str, int] = {}
    for one in network:
        # A kernel that is made beside is read, too: its size is that of what made it.
        for name, shape in zip(one.inputs, one.key.inputs, strict=False):
            sizes[name] = math.prod(shape)
        sizes[one.name] = math.prod(one.key.output)
        if conv_scratch and one.key.kind == "conv2d":
            scratch[one.name] = 4 * math.prod(one.key.kernel) * one.key.inputs[0][-1]
    return _live(network, sizes, scratch, in_place_add)


def peak_bytes(
    network: Sequence[Operator], *, in_place_add: bool = False, conv_scratch: bool = False
) -> int:
    """The largest of them."""
    return max(live_bytes(network, in_place_add=in_place_add, conv_scratch=conv_scratch))


def _live(
    network: Sequence[Operator],
    sizes: Mapping[str, Size],
    scratch: Mapping[str, Size],
    in_place_add: bool,
) -> list[Size]:
    last = {name: i for i, one in enumerate(network) for name in one.inputs}
    made = ["input"]
    found: list[Size] = []
    for i, one in enumerate(network):
        alive = [name for name in made if last.get(name, -1) >= i]
        reused = in_place_add and one.key.kind == "add" and any(last[n] == i for n in one.inputs)
        total = sum((sizes[name] for name in alive[1:]), sizes[alive[0]])
        if not reused:
            total = total + sizes[one.name]
        if one.name in scratch:
            total = total + scratch[one.name]
        found.append(total)
        made.append(one.name)
    return found


def peaks(choices: Choices, *, in_place_add: bool = False, conv_scratch: bool = False) -> Tensor:
    """(I, L) peaks of a cell by itself: of each choice, at each width of its input."""
    place = choices.place
    found = torch.zeros(len(place.in_channels), len(choices), dtype=torch.int64)
    for numbers, network in choices.groups():
        sizes = {"input": place.steps * place.sensors * choices.channels("input", numbers)}
        scratch = {}
        for one in network:
            sizes[one.name] = math.prod(one.key.output[:-1]) * choices.channels(one.name, numbers)
            if conv_scratch and one.key.kind == "conv2d":
                read = choices.channels(one.inputs[0], numbers)
                scratch[one.name] = 4 * math.prod(one.key.kernel) * read
        live = _live(network, sizes, scratch, in_place_add)
        found[:, numbers] = reduce(torch.maximum, live)
    return found


class ExpectedPeak:
    """Bytes of a mixture: E[peak], differentiable. in_place_add, conv_scratch: as above."""

    def __init__(
        self, space: Space, *, in_place_add: bool = False, conv_scratch: bool = False
    ) -> None:
        how: Any = {"in_place_add": in_place_add, "conv_scratch": conv_scratch}
        self.space = space
        self.choices = [Choices(place) for place in space.cells]
        cells = [peaks(one, **how) for one in self.choices]
        widths = space.cells[-1].channels
        ends = torch.tensor([peak_bytes(head(space, width, "input"), **how) for width in widths])
        values = {value for cell in (*cells, ends) for value in cell.flatten().tolist()}
        self.values = torch.tensor(sorted(values))
        self._ranks = [torch.searchsorted(self.values, cell) for cell in cells]
        self._fits = (ends <= self.values[:, None]).double()  # (K, widths)

    def __call__(self, mixture: Mixture) -> Tensor:
        """mixture: of every decision of the space. out: () in float64"""
        mixture = as_double(self.space, mixture)
        below = torch.ones(len(self.values), 1, dtype=torch.float64)  # (K, widths so far)
        for choices, ranks in zip(self.choices, self._ranks, strict=True):
            below = self._through(choices, ranks, below, mixture)
        below = (below * self._fits).sum(1)
        values = self.values.double()
        expected: Tensor = values[-1] - (values.diff() * below[:-1]).sum()
        return expected

    def _through(self, choices: Choices, ranks: Tensor, below: Tensor, mixture: Mixture) -> Tensor:
        """below: (K, I) chances of each width and a peak of at most m_k  out: (K, O)"""
        chances = choices.products(mixture)
        widths = len(choices.place.channels)
        flat = torch.zeros(len(ranks), len(self.values) * widths, dtype=torch.float64)
        flat = flat.scatter_add(1, ranks * widths + choices.out, chances.expand(ranks.shape))
        kept = flat.view(len(ranks), len(self.values), widths).cumsum(1)  # (I, K, O)
        if isinstance(choices.place, FusionPlace):
            kept = kept + self._empty(choices.place, mixture)
        found: Tensor = torch.einsum("ki,iko->ko", below, kept)
        if choices.skippable:
            skip, keep = mixture[f"{choices.place.name}.keep"]
            found = skip * below + keep * found
        return found

    @staticmethod
    def _empty(place: FusionPlace, mixture: Mixture) -> Tensor:
        """(O,) chances of neither branch nor residual, and of each width."""
        parts = (*(f"branch{kernel}" for kernel in KERNELS), "residual")
        off = torch.stack([mixture[f"{place.name}.{part}"][0] for part in parts]).prod()
        return off * mixture[f"{place.name}.channels"]


def published_peak(space: Space, mixture: Mixture) -> Tensor:
    """Bytes of a mixture by the published surrogate. out: () in float64"""
    mixture = as_double(space, mixture)
    found: list[Tensor] = []
    before = torch.ones(1, dtype=torch.float64)
    for place in space.cells:
        widths = torch.tensor(place.in_channels, dtype=torch.float64)
        own = of_cell(mixture, place.name)
        if isinstance(place, TimePlace):
            found.append(_published_time(place, own, before, widths))
            before = own["channels"]
            continue
        peak = _published_fusion(place, own, before, widths)
        if place.reducing:
            before = own["channels"]
        else:
            skip, keep = own["keep"]
            peak = keep * peak
            before = skip * before + keep * own["channels"]
        found.append(peak)
    last = space.cells[-1]
    assert isinstance(last, FusionPlace)
    area, classes = last.steps * last.out_sensors, space.classes
    mean = before @ torch.tensor(last.channels, dtype=torch.float64)
    found.append((4 + area) * mean + area * classes)
    found.append(mean.new_tensor(area * classes + classes))
    found.append(mean.new_tensor(2 * classes))
    return torch.stack(found).max()


def _published_time(place: TimePlace, own: Mixture, before: Tensor, widths: Tensor) -> Tensor:
    """Outputs and scratch of each kernel in its share, and the expected input."""
    area = place.steps * place.sensors
    written = -(-place.steps // 2) * place.sensors * (own["channels"] @ _double(place.channels))
    read = before @ widths
    kernels = own["kernel"] @ _double(KERNELS)
    return 4 * kernels * read + written + area * read


def _published_fusion(place: FusionPlace, own: Mixture, before: Tensor, widths: Tensor) -> Tensor:
    """The largest of the bottleneck, the branches with their sums, and the residual."""
    grid = _double(place.channels)
    read_area, area = place.steps * place.sensors, place.steps * place.out_sensors
    read, narrow, written = before @ widths, own["bottleneck"] @ grid, own["channels"] @ grid
    add = 3 * area * written
    bottleneck = 4 * place.sensors * read + area * narrow + read_area * read
    on = [own[f"branch{kernel}"][1] for kernel in KERNELS]
    branches = [4 * kernel * narrow + area * written for kernel in KERNELS]
    in1 = area * narrow
    accumulator = area * place.channels[0] * own["bottleneck"].argmax()
    peaks = [bottleneck, on[0] * branches[0] + in1]
    for k in (1, 2):
        most = torch.stack(on[: k + 1]).max()
        later = on[2] if k == 1 else 0.0
        peaks.append(on[k] * branches[k] + in1 + accumulator * most)
        peaks.append(on[k] * add + in1 * later)
    # Channels of the input by the steps of this cell's grid, whichever cell it came from.
    steps = place.channels[0] * torch.arange(1, len(before) + 1).double()
    in2 = read_area * (before @ steps)
    r = own["residual"][1]
    none = torch.stack([own[f"branch{kernel}"][0] for kernel in KERNELS]).prod()
    residual_kernel = 2 if place.reducing else 1
    residual = 4 * residual_kernel * read + area * written + read_area * read
    return torch.stack([r * residual, *peaks, (add + in2) * r * (1 - none)]).max()


def _double(sizes: Sequence[int]) -> Tensor:
    return torch.tensor(sizes, dtype=torch.float64)
