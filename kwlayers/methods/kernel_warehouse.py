"""KernelWarehouse: kernels cut into cells, mixed from warehouses that several layers share."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from kwlayers import geometry
from kwlayers.methods import Conversion, Converted, Method
from kwlayers.plan import Plan, counted
from kwlayers.sharing import Settings
from kwlayers.warehouses import WarehouseGroup

log = logging.getLogger("kwlayers")


def _convert(
    plan: Plan, group: WarehouseGroup, layers: Mapping[str, Any], how: Conversion
) -> Converted:
    from kwlayers.conv import like
    from kwlayers.warehouse import Warehouse
    from kwlayers.warm_start import start_

    first = next(iter(layers.values())).weight
    mixtures = group.mixtures(plan.of(group))
    warehouse = Warehouse(
        group.num_cells, group.cell, sum(mixtures), device=first.device, dtype=first.dtype
    )
    dealt = geometry.assign(group.num_cells, mixtures, group.ratio)
    made = {
        name: like(
            layer,
            warehouse,
            ratio=group.ratio,
            reduction=group.reduction,
            basis_ratio=group.basis_ratio,
            norm=group.norm,
            assignment=assignment,
            backend=how.backend,
            workspace_mb=how.workspace_mb,
        )
        for (name, layer), assignment in zip(layers.items(), dealt, strict=True)
    }
    log.info(
        "%s: %s on %s of %s",
        group.name,
        counted(len(layers), "layer"),
        counted(group.num_cells, "cell"),
        "x".join(map(str, group.cell)),
    )
    errors = {}
    if how.warm_start:
        pairs = {name: (made[name].attention, layer.weight) for name, layer in layers.items()}
        errors = start_(how.warm_start, warehouse, pairs)
        log.info("%s: warm start, relative errors to %.2g", group.name, max(errors.values()))
    return Converted({layers[name]: made[name] for name in layers}, warehouse, errors)


METHOD = Method(
    name="kernel_warehouse",
    title="KernelWarehouse",
    paper="Li & Yao, ICML 2024, arXiv 2406.07879",
    group=WarehouseGroup,
    settings=Settings,
    convert=_convert,
)
