"""The inverse of `convert_`: a converted model as the plain network that computes the same."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kwlayers.conv import KWLinear, _KWConvNd, _KWLayer
from kwlayers.convert import Warehouses, replace_
from kwlayers.ops.published import assemble
from kwlayers.plan import PlanError
from kwlayers.schedule import WAREHOUSES
from kwlayers.sites import _HOOKS

ModelT = TypeVar("ModelT", bound=nn.Module)

_PLAIN: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def to_static_(model: ModelT) -> ModelT:
    """Replace the KernelWarehouse layers of a converted model by torch.nn's, in place.

    Layers keep their names, bias parameters, device, dtype and mode, and one that several parents
    hold stays shared; weights need a gradient where their cells did. `kw_warehouses` goes. That
    changes nothing where kernels do not depend on the input: at temperature 1, and after
    `convert_(model, plan, warm_start=True)` as long as the attention has not been trained.

    Raises PlanError, before anything is changed, for other models. `set_temperature_(model, 1)`
    makes any model one of these, without its attention and what that has learned.
    """
    if not isinstance(model, nn.Module):
        raise PlanError(f"model: expected an nn.Module, got {type(model).__name__}")
    if not isinstance(model._modules.get(WAREHOUSES), Warehouses):
        raise PlanError(
            f"the model ({type(model).__name__}) has no {WAREHOUSES}: pass the one that convert_ "
            "returned, out of any wrapper"
        )
    if others := set(model._modules[WAREHOUSES].methods) - {"kernel_warehouse"}:  # type: ignore
        raise PlanError(
            f"the model is dynamic by {', '.join(sorted(others))}, whose kernels depend on the "
            "input whatever the temperature; only kernel_warehouse has a static equal"
        )
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _KWLayer)}
    for name, layer in layers.items():
        _check_static(name, layer)
    replace_(model, {layer: _plain(layer) for layer in layers.values()})
    delattr(model, WAREHOUSES)
    return model


def _check_static(name: str, layer: _KWLayer) -> None:
    attention = layer.attention
    if any(getattr(layer, hooks) for hooks in _HOOKS):
        raise PlanError(f"{name} carries hooks, which would be lost: remove them first")
    if attention.temperature.is_meta:
        raise PlanError(f"{name} is on the meta device: its temperature and cells have no values")
    temperature = float(attention.temperature)
    if temperature != 1 and attention.fc2.weight.any():
        raise PlanError(
            f"{name} is at temperature {temperature:g}: its kernel depends on the input, and no "
            "static layer computes the same; one trained at temperature 1 has a static equal"
        )


def _plain(layer: _KWLayer) -> nn.Module:
    has_bias = layer.bias is not None
    plain: Any
    if isinstance(layer, KWLinear):
        plain = nn.Linear(layer.in_features, layer.out_features, has_bias, device="meta")
    else:
        assert isinstance(layer, _KWConvNd)
        plain = _PLAIN[layer.rank](
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            has_bias,
            layer.padding_mode,
            device="meta",
        )
    kernel = tuple(plain.weight.shape) + (1,) * isinstance(layer, KWLinear)
    weight = _kernel(layer, kernel).view(plain.weight.shape)
    plain.weight = nn.Parameter(weight, requires_grad=layer.warehouse.cells.requires_grad)
    plain.bias = layer.bias
    made: nn.Module = plain.train(layer.training)
    return made


@torch.no_grad()
def _kernel(layer: _KWLayer, shape: tuple[int, ...]) -> Tensor:
    """out: (C_out, C_in / groups, *K), the kernel for any input."""
    cells = layer.warehouse.cells
    alpha = layer.attention(cells.new_zeros(1, layer.attention.in_channels))
    used = alpha[0].any(dim=0)
    # In float64 a product with zeros and ones is exact, also where float32's uses TF32.
    alpha, exact = (t.to("cpu", torch.float64) for t in (alpha[..., used], cells[used]))
    return assemble(alpha, exact, shape)[0].to(cells)
