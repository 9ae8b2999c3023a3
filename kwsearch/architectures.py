"""Between a recipe and architectures of micronas: their space, their limits, what one costs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kwlayers.plan import PlanError
from kwsearch.recipe import MicroNAS, Recipe, Search
from kwsearch.resolve import input_of, located
from kwsearch.trials import ARCHITECTURE, FINGERPRINT, FLASH, LATENCY, PEAK, WAREHOUSE
from kwsearch.zoo import get

if TYPE_CHECKING:
    from kwlayers.plan import Plan
    from kwsearch.data import Images
    from kwsearch.micronas.cycles import CycleTable
    from kwsearch.micronas.feasible import Feasible, Limits
    from kwsearch.micronas.space import Architecture, Space
    from kwsearch.micronas.supernet import Network
    from kwsearch.micronas.warehouses import Warehoused


def space_of(recipe: Recipe) -> Space:
    """The space of a recipe about architectures. Raises PlanError for an input it cannot have."""
    from kwsearch.micronas.space import Space, SpaceError

    size = input_of(recipe)
    if len(size) != 3 or size[0] != 1:
        with located(recipe, "input"):
            raise PlanError(
                f"input {'x'.join(map(str, size))}: micronas takes windows of samples and sensors, "
                "e.g. input: [1, 128, 9]"
            )
    grid = _section(recipe)
    with located(recipe, "micronas"):
        try:
            return Space(
                size[1],
                size[2],
                recipe.model.num_classes or get(recipe.model.name).num_classes,
                grid.time_channels,
                grid.fusion_channels,
                grid.time_limit,
                grid.sensor_limit,
                grid.plain_cells,
            )
        except SpaceError as error:
            raise PlanError(f"micronas: {error}") from None


def check_fit(space: Space, windows: Images) -> None:
    """Raise PlanError for windows or classes that networks of the space do not take."""
    have = tuple(windows.x.shape[1:])
    if have != (1, space.steps, space.sensors):
        raise PlanError(
            f"{windows.name} has examples of {'x'.join(map(str, have))}, the recipe's input is "
            f"1x{space.steps}x{space.sensors}: set input to them"
        )
    if space.classes < windows.num_classes:
        raise PlanError(
            f"{windows.name} has {windows.num_classes} classes, the model {space.classes}: set "
            f"model.num_classes={windows.num_classes}"
        )


def table_of(recipe: Recipe) -> CycleTable | None:
    """Of the operators, by the recipe's limits. Raises latency.table.TableError."""
    limits = (recipe.search or Search()).space.limits
    if limits.lut is None:
        return None
    from kwsearch.latency.operators import load

    with located(recipe, "search", "space", "limits", "lut"):
        return load(Path(limits.lut), force=limits.lut_force)


def feasible_of(recipe: Recipe, table: CycleTable | None = None) -> Feasible:
    """Architectures within the recipe's limits. table: in place of the one that the recipe names,
    which another machine may not have. Raises PlanError, micronas.cycles.CycleError.
    """
    from kwsearch.micronas.feasible import Feasible

    table = table_of(recipe) if table is None else table
    return Feasible(space_of(recipe), limits_of(recipe), table, **counted_how(recipe))


def limits_of(recipe: Recipe) -> Limits:
    """Those of the recipe's search."""
    from kwsearch.micronas.feasible import Limits

    limits = (recipe.search or Search()).space.limits
    return Limits(limits.latency_ms, limits.peak_memory, limits.flash)


def counted_how(recipe: Recipe) -> dict[str, bool]:
    """How memory is counted, as `micronas.peak_memory` takes it."""
    section = _section(recipe)
    return {"in_place_add": section.in_place_add, "conv_scratch": section.conv_scratch}


def architecture_of(recipe: Recipe) -> Architecture | None:
    """The one that the recipe says, if it does. Raises PlanError for one that is none."""
    section = _section(recipe)
    if section.architecture is None:
        return None
    with located(recipe, "micronas", "architecture"):
        return _checked(space_of(recipe), section.architecture.model_dump())


def network(recipe: Recipe, architecture: Mapping[str, Any]) -> Network:
    """Its network, with fresh weights."""
    from kwsearch.micronas.supernet import extract

    space = space_of(recipe)
    return extract(space, _checked(space, architecture))


def facts(
    feasible: Feasible, architecture: Architecture, warehouse: float | None = None
) -> dict[str, Any]:
    """What a trial says of it. warehouse: b of KernelWarehouse on its convolutions.

    Raises PlanError where there is no such plan.
    """
    from kwsearch.micronas.space import macs, operators, params

    plain = operators(feasible.space, architecture)
    # Of the network: what is chosen for a cell that is left out changes nothing.
    what = json.dumps([plain, warehouse])
    found: dict[str, Any] = {
        FINGERPRINT: hashlib.sha256(what.encode()).hexdigest()[:12],
        ARCHITECTURE: architecture.to_dict(),
    }
    if warehouse is not None:
        one = warehoused(feasible, architecture, warehouse)
        took = None if feasible.table is None else one.latency(feasible.table).milliseconds
        found |= {
            WAREHOUSE: warehouse,
            "params": one.params,
            "macs": one.macs,
            PEAK: one.bytes(**feasible.how),
            FLASH: one.flash,
        }
    else:
        took = feasible.milliseconds(architecture)
        found |= {
            "params": params(plain),
            "macs": macs(plain),
            PEAK: feasible.bytes(architecture),
            FLASH: feasible.flash(architecture),
        }
    return found if took is None else {**found, LATENCY: took}


def warehoused(feasible: Feasible, architecture: Architecture, warehouse: float) -> Warehoused:
    """The architecture under its plan at that b. Raises PlanError where there is none."""
    from kwsearch.micronas.warehouses import Warehoused, network_of, plan_of

    plan = plan_of(network_of(feasible.space, architecture), warehouse)
    return Warehoused(feasible.space, architecture, plan)


def broken(feasible: Feasible, costs: Mapping[str, Any]) -> tuple[str, ...]:
    """Which limits what costs that much does not keep, by how much."""
    return feasible.limits.broken(costs.get(LATENCY), costs[PEAK], costs[FLASH])


def plan_of(recipe: Recipe, architecture: Mapping[str, Any], warehouse: float) -> Plan:
    """Of the network of an architecture, at that b."""
    from kwsearch.micronas import warehouses

    space = space_of(recipe)
    network = warehouses.network_of(space, _checked(space, architecture))
    return warehouses.plan_of(network, warehouse)


def _checked(space: Space, said: Mapping[str, Any]) -> Architecture:
    from kwsearch.micronas.space import Architecture, SpaceError

    try:
        found = Architecture.from_dict(said)
        space.check(found)
    except SpaceError as error:
        raise PlanError(f"micronas.architecture: {error}") from None
    return found


def _section(recipe: Recipe) -> MicroNAS:
    return recipe.micronas or MicroNAS()
