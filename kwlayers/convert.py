"""Put a plan into a model: swap layers in place, with their warehouses at the root."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from torch import nn

from kwlayers import geometry
from kwlayers.conv import like
from kwlayers.ops import check_settings
from kwlayers.plan import Group, Plan, PlanError, Site
from kwlayers.sites import CONVERTIBLE, candidates, refuse_wrapped
from kwlayers.warehouse import Warehouse

if TYPE_CHECKING:
    from torch import Tensor

WAREHOUSES = "kw_warehouses"

log = logging.getLogger("kwlayers")


class Warehouses(nn.ModuleDict):
    """All warehouses of a converted model, by name, and which layers use them.

    layers: {warehouse name: module names}.
    """

    def __init__(self, layers: dict[str, tuple[str, ...]]) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        """The identity: a converted nn.Sequential runs over this container, too."""
        return x

    def extra_repr(self) -> str:
        total = sum(map(len, self.layers.values()))
        return f"{total} layers share {len(self.layers)} warehouses"


def convert_(
    model: nn.Module,
    plan: Plan,
    *,
    backend: str | None = None,
    workspace_mb: float | None = None,
) -> nn.Module:
    """Replace the layers that `plan` groups, in place, and return the model.

    Layers keep their names, their bias parameters, device, dtype and mode; a layer that
    several parents hold stays shared. The warehouses are registered once, as
    `model.kw_warehouses`, which says what was changed. The parameters of the result are
    `plan.cost().params.total`. Cells start as published (Kaiming-normal per layer): the static
    weights are dropped. backend, workspace_mb: of every layer, as `kwlayers.ops.kw_conv` takes
    them; None for the fastest path of each layer.

    Raises PlanError, before anything is changed, if the model does not fit the plan.
    """
    if not isinstance(plan, Plan):
        raise PlanError(f"plan: expected a kwlayers.Plan, got {type(plan).__name__}")
    refuse_wrapped(model)
    if not plan.groups:
        raise PlanError("the plan has no groups: nothing to convert")
    if hasattr(model, WAREHOUSES):
        raise PlanError(f"the model has an attribute {WAREHOUSES!r} already")
    modules = dict(model.named_modules())
    fixed = {name: reason for name, _, reason in candidates(model) if reason}
    layers = {}
    for group in plan.groups:
        for name in group.layers:
            layers[name] = _fitting(modules.get(name), plan.network[name])
            if name in fixed:
                raise PlanError(f"{name} cannot be converted: {fixed[name]}")
        if hasattr(Warehouses, group.name) or group.name in vars(Warehouses({})):
            raise PlanError(
                f"group {group.name!r}: a container of modules has an attribute of that name; "
                "choose another"
            )
    check_settings(backend, workspace_mb)
    params = sum(p.numel() for p in model.parameters())
    if params != plan.network.params:
        raise PlanError(
            f"the plan was made for a model of {plan.network.params:,} parameters, this one has "
            f"{params:,}: plan again for this model"
        )
    warehouses = Warehouses({group.name: group.layers for group in plan.groups})
    swaps: dict[nn.Module, nn.Module] = {}
    for group in plan.groups:
        first = layers[group.layers[0]].weight
        mixtures = plan.mixtures(group)
        warehouse = Warehouse(
            group.num_cells, group.cell, sum(mixtures), device=first.device, dtype=first.dtype
        )
        warehouses[group.name] = warehouse
        dealt = geometry.assign(group.num_cells, mixtures, group.ratio)
        for name, assignment in zip(group.layers, dealt, strict=True):
            swaps[layers[name]] = _converted(
                layers[name],
                group,
                warehouse,
                assignment=assignment,
                backend=backend,
                workspace_mb=workspace_mb,
            )
        log.info(
            "%s: %d layers share %d cells of %s",
            group.name,
            len(group.layers),
            group.num_cells,
            "x".join(map(str, group.cell)),
        )
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in swaps:
                parent._modules[name] = swaps[child]
    setattr(model, WAREHOUSES, warehouses)
    expected, built = plan.cost().params.total, sum(p.numel() for p in model.parameters())
    assert built == expected, f"built {built} parameters, planned {expected}"
    return model


def _converted(layer: nn.Module, group: Group, warehouse: Warehouse, **settings: Any) -> nn.Module:
    return like(
        layer,
        warehouse,
        ratio=group.ratio,
        reduction=group.reduction,
        basis_ratio=group.basis_ratio,
        norm=group.norm,
        **settings,
    )


def _fitting(module: nn.Module | None, site: Site) -> nn.Conv2d:
    """The module, checked to be the layer that was planned for."""
    if module is None:
        raise PlanError(f"the model has no layer {site.name!r}: was the plan made for it?")
    kind = CONVERTIBLE.get(type(module))
    if kind != site.kind:
        raise PlanError(
            f"{site.name}: planned as {site.kind}, but the model has {type(module).__name__}"
        )
    shape = tuple(module.weight.shape) + ((1,) if kind == "linear" else ())  # type: ignore
    groups = 1 if kind == "linear" else module.groups
    if (shape, groups, module.bias is not None) != (site.kernel, site.groups, site.bias):
        raise PlanError(
            f"{site.name}: planned for a kernel {site.kernel} in {site.groups} groups with "
            f"bias={site.bias}, but the model has {shape} in {groups} groups with "
            f"bias={module.bias is not None}: plan again for this model"
        )
    return module  # type: ignore[return-value]
