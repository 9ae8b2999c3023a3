"""An architecture whose convolutions are mixed from warehouses (KernelWarehouse, arXiv 2406.07879).

A converted convolution is the same operator, after those that make its kernel. With C_in channels
in and a kernel of m mixtures of n cells, D numbers each, and h hidden numbers in the attention:

    gap        the mean over positions: C_in numbers
    fc1, fc2   1x1 convolutions on one pixel: C_in to h, h to m (n + 1)
    mix        a 1x1 convolution over m pixels, n to D: the kernel

which is what its cycles are fitted as; a mean is as an addition of as many elements, since tables
have only that of the head. The kernel is in memory until the convolution has run. A batch norm is
folded into fc1, a layer norm has a weight and a bias more. Kernels that change with the input are
in no TensorFlow Lite Micro: these are estimates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from kwlayers.geometry import hidden_width
from kwlayers.plan import Network, Plan
from kwlayers.planner import plan_network
from kwlayers.sharing import Settings
from kwlayers.sites import trace
from kwlayers.warehouses import WarehouseGroup
from kwsearch.micronas.cycles import CycleTable, Latency
from kwsearch.micronas.peak_memory import live_bytes
from kwsearch.micronas.space import Architecture, Key, Operator, Space, operators
from kwsearch.micronas.supernet import extract


def network_of(space: Space, architecture: Architecture) -> Network:
    """What tracing its network finds."""
    with torch.device("meta"):
        model = extract(space, architecture)
    return trace(model, (1, space.steps, space.sensors))


def plan_of(network: Network, ratio: float) -> Plan:
    """Warehouses by stage, b cells per mixture. Raises PlanError where there is none."""
    return plan_network(network, Settings(), ratio=ratio)


@dataclass(frozen=True)
class Warehoused:
    """An architecture under a plan of its network."""

    space: Space
    architecture: Architecture
    plan: Plan

    @cached_property
    def operators(self) -> tuple[Operator, ...]:
        """In the order of execution."""
        found: list[Operator] = []
        for one in operators(self.space, self.architecture):
            group = self._groups.get(_site(one))
            if group is None:
                found.append(one)
                continue
            (shape,) = one.key.inputs
            channels = shape[-1]
            numbers = math.prod(group.cell)
            mixtures = _kernel(one) // numbers
            hidden = hidden_width(channels, group.reduction)
            width = mixtures * (group.num_cells + 1)
            cells = (mixtures, 1, group.num_cells)
            parts = {
                "gap": (one.inputs[0], Key("gap2d", (shape,), (channels,))),
                "fc1": ("gap", _product((1, 1, channels), hidden)),
                "fc2": ("fc1", _product((1, 1, hidden), width)),
                "mix": ("fc2", _product(cells, numbers)),
            }
            for name, (source, key) in parts.items():
                read = f"{one.name}.{source}" if source in parts else source
                found.append(Operator(f"{one.name}.{name}", (read,), key))
            found.append(one._replace(inputs=(*one.inputs, f"{one.name}.mix")))
        return tuple(found)

    @property
    def params(self) -> int:
        """As deployed."""
        return self.plan.cost().deployed

    @property
    def macs(self) -> int:
        """Of a window."""
        return self.plan.cost().macs.total

    @property
    def flash(self) -> int:
        """Bytes of cells and weights in int8, biases in int32."""
        total: int = sum(group.num_cells * math.prod(group.cell) for group in self.plan.warehouses)
        for one in self.operators:
            total += one.key.flash if self._has_weights(one) else 4 * self.own_params(one)
            group = self._groups.get(_site(one))
            if group is not None and group.norm == "layer":
                total += 5 * hidden_width(one.key.inputs[0][-1], group.reduction)
        return total

    def own_params(self, one: Operator) -> int:
        """Of an operator, without the cells: of a converted convolution its biases are left."""
        if self._has_weights(one):
            return one.key.params
        return one.key.output[-1] if _site(one) in self._groups else 0

    def _has_weights(self, one: Operator) -> bool:
        """Whether its weights, if it has some, are its own: none that it mixes, or is given."""
        return not one.name.endswith(".mix") and _site(one) not in self._groups

    def bytes(self, *, in_place_add: bool = False, conv_scratch: bool = False) -> int:
        """The peak."""
        how = {"in_place_add": in_place_add, "conv_scratch": conv_scratch}
        return max(live_bytes(self.operators, **how))

    @property
    def timed(self) -> tuple[Operator, ...]:
        """What stands for each operator in a table."""
        return tuple(one._replace(key=_timed(one)) for one in self.operators)

    def latency(self, table: CycleTable) -> Latency:
        """By a table; raises CycleError where it cannot be fitted."""
        return table.latency(self.timed)

    @cached_property
    def _groups(self) -> dict[str, WarehouseGroup]:
        return {layer: group for group in self.plan.warehouses for layer in group.layers}


def _timed(one: Operator) -> Key:
    """What stands for an operator in a table."""
    if one.name.endswith(".gap") and one.cell != "head":
        (shape,) = one.key.inputs
        return Key("add", (shape, shape), shape)
    return one.key


def _product(read: tuple[int, int, int], width: int) -> Key:
    return Key("conv2d", (read,), (*read[:2], width), (1, 1), (1, 1))


def _kernel(one: Operator) -> int:
    """Numbers of its kernel."""
    return math.prod(one.key.kernel) * one.key.inputs[0][-1] * one.key.output[-1]


def _site(one: Operator) -> str:
    """Its convolution's name in the network."""
    return f"convs.{one.name.replace('.', '_')}"
