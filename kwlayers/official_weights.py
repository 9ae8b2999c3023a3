"""State dicts of the official KernelWarehouse models, from and to converted models.

Both hold the same numbers in the same order: only names differ, and axes of length 1. What the
official code keeps outside its state dict, temperature and assignment, is not in one; it runs a
loaded model at temperature 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from kwlayers.official_models import Backbone, backbone_of, buildable, shortened
from kwlayers.plan import PlanError, Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kwlayers.conv import _KWLayer

    ModelT = TypeVar("ModelT", bound=nn.Module)

_BUFFERS = (".attention.temperature", ".attention.assignment")


def to_official(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of `model`, converted or static, for the official model of its config.

    The config is `write_config` of its plan. The tensors share the model's memory. Raises
    PlanError for a model that is none of the official ones, and for a temperature above 0, which
    an official state dict cannot say.
    """
    layers = _dynamic(model)
    for name, layer in layers.items():
        temperature = layer.attention.temperature
        if not temperature.is_meta and temperature != 0:
            raise PlanError(
                f"{name} is at temperature {float(temperature):g}, the official code would run it "
                "at 0: finish the warm-up, or kwlayers.set_temperature_(model, 0) if you mean that"
            )
    state = model.state_dict()
    return {e.official: state[e.ours].reshape(e.shape) for e in _entries(model, layers)}


def from_official_(model: ModelT, state_dict: Mapping[str, Any]) -> ModelT:
    """Copy an official state dict into `model`, which has the plan of its config; returns it.

    state_dict: as it is, from DDP (`module.…`), or a checkpoint that has it under "model" or
    "state_dict" (for an average, pass checkpoint["model_ema"]). A checkpoint of the official
    main.py loads with `torch.load(path, weights_only=True)` under
    `torch.serialization.safe_globals([argparse.Namespace])`. The temperature becomes 0.

    Raises PlanError, before anything is copied, that lists every tensor that is missing,
    unexpected or misshapen. Only `num_batches_tracked` may be missing.
    """
    from torch import Tensor

    from kwlayers.schedule import set_temperature_

    entries = _entries(model, _dynamic(model))
    own = model.state_dict()
    if any(tensor.is_meta for tensor in own.values()):
        raise PlanError("the model is on the meta device: model.to_empty(device='cpu') first")
    given = _unwrapped(state_dict)
    known = {entry.official: entry for entry in entries}
    missing = [k for k in known if k not in given and not k.endswith(".num_batches_tracked")]
    unexpected = [key for key in given if key not in known]
    misshapen, fitting = [], {}
    for key, entry in known.items():
        value = given.get(key)
        if isinstance(value, Tensor) and tuple(value.shape) == entry.shape:
            fitting[entry.ours] = value.reshape(own[entry.ours].shape)
        elif key in given:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            misshapen.append(f"{key} {shape} instead of {entry.shape}")
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    problems = [f"{kind} ({len(f)}): {shortened(f)}" for kind, f in kinds.items() if f]
    if problems:
        raise PlanError(
            "\n  ".join(
                ["the weights are not those of this model in its official form:", *problems]
            )
            + "\nconvert a model of as many classes by the plan of the weights' own config "
            "(kwlayers.official.plan)"
        )
    model.load_state_dict(fitting, strict=False)
    set_temperature_(model, 0)
    return model


def _unwrapped(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Any = state_dict
    for key in ("model", "state_dict"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping):
        raise PlanError(f"expected an official state dict, got {type(found).__name__}")
    wrapped = bool(found) and all(str(key).startswith("module.") for key in found)
    return {str(key)[len("module.") * wrapped :]: value for key, value in found.items()}


@dataclass(frozen=True)
class _Entry:
    """One tensor: its names in both state dicts, its shape in the official one."""

    ours: str
    official: str
    shape: tuple[int, ...]


def _dynamic(model: nn.Module) -> dict[str, _KWLayer]:
    """The KernelWarehouse layers of a model, by name."""
    from torch import nn

    from kwlayers.conv import _KWLayer

    if not isinstance(model, nn.Module):
        raise PlanError(f"model: expected an nn.Module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod") or isinstance(
        model, (nn.DataParallel, nn.parallel.DistributedDataParallel)
    ):
        raise PlanError(f"the model is wrapped in {type(model).__name__}: pass the one inside")
    return {name: m for name, m in model.named_modules() if isinstance(m, _KWLayer)}


def _entries(model: nn.Module, layers: Mapping[str, _KWLayer]) -> list[_Entry]:
    backbone = backbone_of(_sites(model, layers))
    half = bool(layers) and set(layers) == set(backbone.half)
    if layers and not half and (misfit := backbone.misfit(list(layers))):
        raise PlanError(f"the official model is another: {misfit}")
    cells = _warehouses(model, layers, backbone.half if half else backbone.warehouses)
    entries = []
    for ours, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if ours in cells:
            # All but the classifier are 2-D convolutions there.
            name, layer = cells[ours]
            ones = (1,) if len(shape) == 4 and backbone.warehouses.get(layer) else ()
            entries.append(_Entry(ours, name, shape + ones))
        elif not ours.endswith(_BUFFERS):
            name = _official_key(ours, backbone, half, dynamic=bool(layers))
            entries.append(_Entry(ours, name, _official_shape(name, shape, dynamic=bool(layers))))
    return entries


def _official_key(ours: str, backbone: Backbone, half: bool, dynamic: bool) -> str:
    name = backbone.official_name(ours)
    if name is None:
        raise PlanError(f"{ours}: the official {backbone.architecture} has no such tensor")
    if backbone.architecture == "mobilenetv2" and (half or not dynamic):
        name = re.sub(r"^classifier", "classifier.1.conv" if half else "classifier.1", name)
    name = re.sub(r"\.attention\.norm\.", ".attention.norm1.", name)
    return re.sub(r"\.attention\.bias$", ".attention.basis_bias", name)


def _official_shape(name: str, shape: tuple[int, ...], dynamic: bool) -> tuple[int, ...]:
    """ConvNeXt has maps with channels first if it is dynamic, else linear layers on tokens."""
    if re.fullmatch(r"stages\.\d\.\d+\.gamma", name):
        channels = math.prod(shape)
        return (1, channels, 1, 1) if dynamic else (channels,)
    if re.fullmatch(r"stages\.\d\.\d+\.pwconv[12]\.weight", name):
        return shape[:2]
    return shape


def _warehouses(
    model: nn.Module, layers: Mapping[str, _KWLayer], reserved: Mapping[str, str]
) -> dict[str, tuple[str, str]]:
    """Official name and first layer of each tensor of cells, by our name."""
    names = {id(module): name for name, module in model.named_modules()}
    users: dict[int, list[str]] = {}
    for name in layers:
        users.setdefault(id(layers[name].warehouse), []).append(name)
    order = {id(layers[name].warehouse): None for name in reserved if name in layers}
    found = {}
    for index, key in enumerate(order):
        first = users[key][0]
        if key not in names:
            raise PlanError(f"the warehouse of {first} is no module of the model")
        _check_handed_out(names[key], [layers[name] for name in users[key]])
        found[f"{names[key]}.cells"] = (f"warehouse_manager.weights.{index}", first)
    return found


def _check_handed_out(name: str, layers: list[_KWLayer]) -> None:
    """The official code must build such a warehouse, and with a basis put its columns likewise."""
    mixtures = [layer.attention.num_mixtures for layer in layers]
    num_cells = layers[0].warehouse.num_cells
    for ratio, dealt in buildable(num_cells, mixtures):
        for layer, run in zip(layers, dealt, strict=True):
            basis = layer.attention.basis
            if basis is not None and (
                basis.local != min(int(ratio * layer.attention.num_mixtures), num_cells)
                or layer.attention.start != min(run.start, basis.nonlocal_cells)
            ):
                break
        else:
            return
    raise PlanError(
        f"{name}: {num_cells:,} cells for {sum(mixtures):,} mixtures; the official code, which "
        "hands out whole multiples or fractions layer by layer, has no such model"
    )


def _sites(model: nn.Module, layers: Mapping[str, _KWLayer]) -> list[Site]:
    """The layers of a converted model as they were before."""
    from torch import nn

    sites = []
    for name, module in model.named_modules():
        if name in layers:
            geometry: Any = layers[name].geometry
            kernel, groups = geometry.kernel, geometry.groups
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
            if any(name.startswith(f"{layer}.attention.") for layer in layers):
                continue
            kernel, groups = tuple(module.weight.shape), getattr(module, "groups", 1)
        else:
            continue
        sites.append(Site(name, "", kernel[1] * groups, kernel[0], kernel[2:], groups))
    return sites
