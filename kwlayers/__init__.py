"""kwlayers: dynamic convolutions whose kernels are mixed from shared warehouses of cells."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kwlayers.attention import Attention
    from kwlayers.conv import KWConv1d, KWConv2d, KWConv3d, KWLinear
    from kwlayers.convert import convert_, prepare_
    from kwlayers.cost import Cost
    from kwlayers.methods.pad_net_partition import deploy_, partition_
    from kwlayers.optim import parameter_groups
    from kwlayers.plan import Group, Network, Plan, PlanError, Site
    from kwlayers.planner import BudgetError, plan_model, plan_network
    from kwlayers.rules import Rule, Share
    from kwlayers.schedule import TemperatureSchedule, set_temperature_
    from kwlayers.sharing import Settings
    from kwlayers.sites import trace
    from kwlayers.static import to_static_
    from kwlayers.warehouse import Warehouse
    from kwlayers.warehouses import WarehouseGroup

# Names load on first use: planning from Python data needs no torch.
_HOME = {
    "Attention": "attention",
    "BudgetError": "planner",
    "Cost": "cost",
    "Group": "plan",
    "KWConv1d": "conv",
    "KWConv2d": "conv",
    "KWConv3d": "conv",
    "KWLinear": "conv",
    "Network": "plan",
    "Plan": "plan",
    "PlanError": "plan",
    "Rule": "rules",
    "Settings": "sharing",
    "Share": "rules",
    "Site": "plan",
    "TemperatureSchedule": "schedule",
    "Warehouse": "warehouse",
    "WarehouseGroup": "warehouses",
    "convert_": "convert",
    "deploy_": "methods.pad_net_partition",
    "parameter_groups": "optim",
    "partition_": "methods.pad_net_partition",
    "plan_model": "planner",
    "plan_network": "planner",
    "prepare_": "convert",
    "set_temperature_": "schedule",
    "to_static_": "static",
    "trace": "sites",
}

__all__ = [
    "Attention",
    "BudgetError",
    "Cost",
    "Group",
    "KWConv1d",
    "KWConv2d",
    "KWConv3d",
    "KWLinear",
    "Network",
    "Plan",
    "PlanError",
    "Rule",
    "Settings",
    "Share",
    "Site",
    "TemperatureSchedule",
    "Warehouse",
    "WarehouseGroup",
    "convert_",
    "deploy_",
    "parameter_groups",
    "partition_",
    "plan_model",
    "plan_network",
    "prepare_",
    "set_temperature_",
    "to_static_",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"kwlayers.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
