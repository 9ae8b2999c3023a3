"""Put a plan into a model: swap layers in place, with what they share at the root."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from kwlayers import methods
from kwlayers.ops import check_settings
from kwlayers.plan import Plan, PlanError, Site, counted, shown, template_of
from kwlayers.schedule import WAREHOUSES
from kwlayers.sites import CONVERTIBLE, candidates, refuse_wrapped
from kwlayers.warehouse import Warehouse
from kwlayers.warm_start import WarmStart, check

if TYPE_CHECKING:
    from torch import Tensor


class Warehouses(nn.ModuleDict):
    """What the layers of a converted model share, by group, and which layers are in which.

    layers: {group name: module names}; a group whose layers share nothing (no warehouse) has no
    module here. methods: of the groups. warm_start: what it kept, None without one.
    """

    warm_start: WarmStart | None = None

    def __init__(
        self, layers: dict[str, tuple[str, ...]], methods: tuple[str, ...] = ("kernel_warehouse",)
    ) -> None:
        super().__init__()
        self.layers = layers
        self.methods = methods

    def forward(self, x: Tensor) -> Tensor:
        """The identity: a converted nn.Sequential runs over this container, too."""
        return x

    def extra_repr(self) -> str:
        alone = sum(len(names) for group, names in self.layers.items() if group not in self)
        total = sum(map(len, self.layers.values())) - alone
        said = [f"{counted(alone, 'layer')} on {'its' if alone == 1 else 'their'} own"]
        verb = "shares" if total == 1 else "share"
        if total:
            noun = "warehouse" if all(isinstance(m, Warehouse) for m in self.values()) else "module"
            said = [f"{counted(total, 'layer')} {verb} {counted(len(self), noun)}"]
            said += [f"{alone} on their own"] if alone else []
        return ", ".join(said)


def convert_(
    model: nn.Module,
    plan: Plan,
    *,
    warm_start: bool | Literal["cells"] = False,
    backend: str | None = None,
    workspace_mb: float | None = None,
) -> nn.Module:
    """Replace the layers that `plan` groups, in place, and return the model.

    Layers keep their names, device, dtype and mode, and a layer that several parents hold stays
    shared. Bias parameters stay, too, but where a method mixes biases as it does kernels: K new
    ones start as the static one. What layers share (warehouses) is registered once, as
    `model.kw_warehouses`, which says what was changed. The parameters of the result are
    `plan.cost().params.total`. Blocks that a method adds start by torch.nn's defaults, whatever the
    model's own initialisation; by a warm start as copies of those before. backend, workspace_mb: of
    every layer that has a choice, as `kwlayers.ops.kw_conv` takes them; None for the fastest path
    of each.

    warm_start: by default the static weights are dropped, and cells start as published
    (Kaiming-normal per layer). True: cells and attention start so that the model computes what it
    did, at temperature 0. Where a warehouse has fewer cells than mixtures it computes what comes
    closest, and batch norms need some batches in training mode before their statistics fit. A
    `TemperatureSchedule` is not needed: it changes nothing, or with few cells fades the layers in.
    "cells", of KernelWarehouse only: attention starts as published, and the model computes what it
    did at temperature 1, which is set, but not as it falls. Few cells go to the largest parts of
    the kernels, the rest is zero. In both cells that no mixture needs start as published, and those
    of weights that were all frozen are frozen. `model.kw_warehouses.warm_start` is the `WarmStart`,
    which says how close each layer is.

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
    added = _added_blocks(modules, plan, bool(warm_start))
    for name, block in added.items():
        modules |= dict(block.named_modules(prefix=name))
    fixed = {name: reason for name, _, reason in candidates(model) if reason}
    layers = {}
    used = tuple(sorted({group.method for group in plan.groups}))
    for group in plan.groups:
        for name in group.layers:
            layers[name] = _fitting(modules.get(name), plan.extended[name])
            if name in fixed:
                raise PlanError(f"{shown(name)} cannot be converted: {fixed[name]}")
    check_settings(backend, workspace_mb)
    check(warm_start, {name: layer.weight for name, layer in layers.items()})
    if warm_start == "cells" and (others := [name for name in used if name != "kernel_warehouse"]):
        raise PlanError(
            f"warm_start 'cells': of kernel_warehouse only, and the plan has {', '.join(others)}; "
            "True starts every method"
        )
    params = sum(p.numel() for p in model.parameters())
    if params != plan.network.params:
        raise PlanError(
            f"the plan was made for a model of {plan.network.params:,} parameters, this one has "
            f"{params:,}: plan again for this model"
        )
    warehouses = Warehouses({group.name: group.layers for group in plan.groups}, used)
    how = methods.Conversion(warm_start, backend, workspace_mb)
    swaps: dict[nn.Module, nn.Module] = {}
    errors: dict[str, float] = {}
    hooks: dict[nn.Module, tuple[Callable[..., None], Callable[..., None]]] = {}
    for group in plan.groups:
        own = {name: layers[name] for name in group.layers}
        made = methods.find(group.method).convert(plan, group, own, how)
        if made.shared is not None:
            if hasattr(Warehouses, group.name) or group.name in vars(warehouses):
                raise PlanError(
                    f"group {group.name!r}: a container of modules has an attribute of that name; "
                    "choose another"
                )
            warehouses[group.name] = made.shared
        swaps |= made.swaps
        errors |= made.errors
        hooks |= {modules[name]: pair for name, pair in made.hooks.items()}
    for name, block in added.items():
        container: Any = modules[name.rpartition(".")[0]]
        container.append(block)
    if warm_start:
        warehouses.warm_start = WarmStart(errors, 1.0 if warm_start == "cells" else 0.0)
    replace_(model, swaps)
    setattr(model, WAREHOUSES, warehouses)
    for module, (before, after) in hooks.items():
        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, always_call=True)
    expected, built = plan.cost().params.total, sum(p.numel() for p in model.parameters())
    assert built == expected, f"built {built} parameters, planned {expected}"
    return model


def prepare_(
    model: nn.Module, batches: Iterable[Any], loss: Callable[[Any, Any], Tensor]
) -> nn.Module:
    """What a method does with data before training, once after `convert_`; most do nothing.

    batches: (inputs, targets), on the model's device. loss: of model(inputs) and targets, a number.
    PAD-Net decides which weights are dynamic (`kwlayers.partition_`). The random numbers stay as
    they are. Raises PlanError for a model that is not converted.
    """
    held = getattr(model, WAREHOUSES, None)
    if not isinstance(held, Warehouses):
        raise PlanError("the model is not converted: convert_ it first")
    for name in held.methods:
        prepare = methods.find(name).prepare
        if prepare is not None:
            prepare(model, batches, loss)
    return model


def _added_blocks(
    modules: Mapping[str, nn.Module], plan: Plan, keep_weights: bool
) -> dict[str, nn.Module]:
    """The blocks that groups add, by name: each like the one before, with weights of its own."""
    found: dict[str, nn.Module] = {}
    for name in [name for group in plan.groups for name in group.added]:
        parent, _, index = name.rpartition(".")
        container = modules.get(parent)
        before = found.get(template_of(name), modules.get(template_of(name)))
        if before is None or not isinstance(container, (nn.Sequential, nn.ModuleList)):
            raise PlanError(f"block {name!r} cannot be added: {shown(parent)} is no list of blocks")
        length = len(container) + sum(one.rpartition(".")[0] == parent for one in found)
        if int(index) != length:
            raise PlanError(
                f"block {name!r} cannot be added: {shown(parent)} has {length} modules, and what "
                "follows its last block would come before"
            )
        found[name] = copy.deepcopy(before)
        for module in found[name].modules():
            reset = getattr(module, "reset_parameters", None)
            on_meta = any(parameter.is_meta for parameter in module.parameters())
            if reset is not None and not keep_weights and not on_meta:
                reset()
    return found


def replace_(model: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> None:
    """Put the new modules where the old ones are, under every parent."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in swaps:
                parent._modules[name] = swaps[child]


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
    groups: Any = 1 if kind == "linear" else module.groups
    if (shape, groups, module.bias is not None) != (site.kernel, site.groups, site.bias):
        raise PlanError(
            f"{site.name}: planned for a kernel {site.kernel} in {counted(site.groups, 'group')} "
            f"with bias={site.bias}, but the model has {shape} in {counted(groups, 'group')} with "
            f"bias={module.bias is not None}: plan again for this model"
        )
    return module  # type: ignore[return-value]
