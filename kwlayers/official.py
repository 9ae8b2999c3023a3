"""The official repository's JSON configs as plans, and back; its state dicts (`official_weights`).

The official repository is the papers' own, OSVAI/KernelWarehouse. Its releases run here:

    plan = official.plan("kw1x_resnet18.json", model)
    model = kwlayers.convert_(model, plan)
    official.from_official_(model, torch.load("kw1x_resnet18.pth"))

and what `write_config` and `to_official` make of a plan and a model runs there. No torch.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kwlayers import geometry
from kwlayers.official_models import Backbone, backbone_of, buildable, shared, shortened
from kwlayers.official_weights import from_official_, to_official
from kwlayers.plan import Network, Plan, PlanError
from kwlayers.planner import lay_out, plan_ratio
from kwlayers.rules import Share
from kwlayers.sharing import SHARING, Settings
from kwlayers.warehouses import WarehouseGroup

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Config", "from_official_", "plan", "read_config", "to_official", "write_config"]

# Layers, and parameters without the last one: what tells a model from those of other widths.
_MODELS = {
    "resnet18": ("resnet", 21, 11_176_512),
    "resnet50": ("resnet", 54, 23_508_032),
    "mobilenetv2_050": ("mobilenetv2", 53, 687_680),
    "mobilenetv2_100": ("mobilenetv2", 53, 2_223_872),
    "convnext_tiny": ("convnext", 59, 27_820_128),
}
_NAMES = (
    *_MODELS,
    *(f"kw_{name}" for name in _MODELS),
    *(f"kw1d2x_{name}" for name in _MODELS if name.startswith("mobilenetv2")),
)

# The options of the official main.py that do not touch the plan.
# fmt: off
_TRAINING = frozenset((
    "aa", "auto_resume", "batch_size", "clip_grad", "color_jitter", "crop_pct", "cutmix",
    "cutmix_minmax", "data_path", "data_set", "device", "disable_eval", "dist_eval",
    "dist_on_itp", "dist_url", "drop_path", "dropout", "enable_wandb", "epochs", "eval",
    "eval_data_path", "finetune", "head_init_scale", "imagenet_default_mean_and_std",
    "input_size", "kw_config", "layer_decay", "layer_scale_init_value", "local_rank", "log_dir",
    "lr", "min_lr", "mixup", "mixup_mode", "mixup_prob", "mixup_switch_prob", "model_ema",
    "model_ema_decay", "model_ema_eval", "model_ema_force_cpu", "model_key", "model_prefix",
    "momentum", "nb_classes", "num_workers", "opt", "opt_betas", "opt_eps", "output_dir",
    "pin_mem", "project", "recount", "remode", "reprob", "resplit", "resume", "save_ckpt",
    "save_ckpt_freq", "save_ckpt_num", "seed", "smoothing", "start_epoch", "temp_epoch",
    "temp_init_value", "traditional_preprocess", "train_interpolation", "update_freq",
    "use_amp", "wandb_ckpt", "warmup_epochs", "warmup_steps", "weight_decay",
    "weight_decay_end", "world_size",
))
# fmt: on
_LISTS = ("reduction", "cell_num_ratio", "cell_inplane_ratio", "cell_outplane_ratio")
_SETTINGS = (*_LISTS, "sharing_range", "nonlocal_basis_ratio")


@dataclass(frozen=True)
class Config:
    """The settings of an official config.

    reduction, cell_num_ratio, cell_inplane_ratio, cell_outplane_ratio: one value, or one for
    each warehouse in the order in which the model asks for them. sharing_range: prefixes of
    parts of warehouse names; a string in JSON stands for its letters, as it does there.
    nonlocal_basis_ratio: 1 or more for no basis. training: the other options, as they are.
    The norm of the attention and the spatial partition are the model's: layer norm in ConvNeXt,
    batch norm elsewhere, and always cells of 1x1.
    """

    model: str
    reduction: tuple[float, ...] = (0.0625,)
    cell_num_ratio: tuple[float, ...] = (1,)
    cell_inplane_ratio: tuple[float, ...] = (1,)
    cell_outplane_ratio: tuple[float, ...] = (1,)
    sharing_range: tuple[str, ...] = ()
    nonlocal_basis_ratio: float = 1
    training: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.model not in _NAMES:
            raise PlanError(f"config: {_no_model(self.model)}")

    @property
    def backbone(self) -> str:
        """The static model: `resnet18` of `kw_resnet18`."""
        return self.model.split("_", 1)[1] if self.model.startswith("kw") else self.model

    @property
    def is_static(self) -> bool:
        """Whether it is a model without warehouses."""
        return not self.model.startswith("kw")

    @property
    def is_half(self) -> bool:
        """Whether it is a 1/2x MobileNetV2, whose settings are fixed."""
        return self.model.startswith("kw1d2x")


# The settings of both models kw1d2x_mobilenetv2, which their configs do not hold.
_HALF: dict[str, Any] = {
    "reduction": (0.03125,),
    "cell_num_ratio": (1, 1, 1, 1, 1, 1, 0.5, 1, 0.5, 0.5),
    "cell_inplane_ratio": (1, 1, 1, 1, 1, 1, 0.5, 1, 0.5, 0.025),
    "cell_outplane_ratio": (1, 1, 1, 1, 1, 1, 0.5, 1, 0.5, 1),
    "sharing_range": tuple("layer"),
}


def read_config(source: str | Path | Mapping[str, Any]) -> Config:
    """A config from a JSON file, or from what is in one.

    What the file leaves out is as the official main.py has it. Raises PlanError that lists every
    problem: unknown keys, which the official code ignores, and values it cannot use.
    """
    if not isinstance(source, (str, Path, Mapping)):
        raise PlanError(f"config: expected a path or a mapping, got {type(source).__name__}")
    where = "config" if isinstance(source, Mapping) else str(source)
    data = source if isinstance(source, Mapping) else _load(Path(source))
    problems = []
    model = data.get("model")
    if model not in _NAMES:
        problems.append(_no_model(model))
        model = ""
    fixed = not model.startswith("kw_") and model
    values: dict[str, Any] = dict(_HALF) if model.startswith("kw1d2x") else {}
    for key, value in data.items():
        if key == "model" or key in _TRAINING:
            continue
        if key not in _SETTINGS:
            problems.append(_unknown(key))
        elif fixed:
            problems.append(f"{key}: {model} ignores it, its settings are fixed; leave it out")
        else:
            try:
                values[key] = _setting(key, value)
            except ValueError as error:
                problems.append(f"{key} {value!r}: {error}")
    if problems:
        raise PlanError(
            "\n  ".join([f"{where}: this is no config of the official code:", *problems])
        )
    training = {key: value for key, value in data.items() if key in _TRAINING}
    return Config(model, **values, training=training)


def _load(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise PlanError(f"{path}: this is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise PlanError(f"{path}: expected an object of settings, got {type(data).__name__}")
    return data


def _no_model(model: object) -> str:
    given = "no model" if model is None else f"unknown model {model!r}"
    return f"{given}: there are {', '.join(_NAMES)}"


def _unknown(key: object) -> str:
    known = ["model", *_SETTINGS, *sorted(_TRAINING)]
    if close := difflib.get_close_matches(str(key), known, n=1):
        return f"unknown key {key!r}: did you mean {close[0]!r}?"
    return (
        f"unknown key {key!r}: the plan has {', '.join(_SETTINGS)}; all others are options of the "
        "official main.py"
    )


def _setting(key: str, value: Any) -> Any:
    if key == "sharing_range":
        prefixes = tuple(value) if isinstance(value, (str, list, tuple)) else (None,)
        if not all(isinstance(prefix, str) and prefix for prefix in prefixes):
            raise ValueError('prefixes of warehouse names, such as ["layer", "conv"]')
        return prefixes
    if key == "nonlocal_basis_ratio":
        if not _is_number(value) or value <= 0:
            raise ValueError("one number above 0 for all warehouses")
        return value
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    high = math.inf if key == "cell_num_ratio" else 1
    if not values or not all(_is_number(v) and 0 < v <= high for v in values):
        allowed = "above 0" if high > 1 else "in (0, 1]"
        raise ValueError(f"a number {allowed}, or a list of one for each warehouse")
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def plan(
    config: Config | str | Path | Mapping[str, Any],
    network: Network | nn.Module,
    input_size: Sequence[int] | None = None,
) -> Plan:
    """The plan of a config, which is read if need be, on its backbone.

    network: traced, or a model to trace at `input_size` (C, H, W), by default the config's. The
    number of classes and the width may differ from the official model's. Warehouses have the
    names that `plan_network` gives, or the official ones if no level of sharing has them all.
    Raises PlanError for another network.
    """
    if not isinstance(config, Config):
        config = read_config(config)
    if not isinstance(network, Network):
        from kwlayers.sites import trace

        side = config.training.get("input_size", 224)
        network = trace(network, input_size if input_size is not None else (3, side, side))
    return _plan(config, network)


def _plan(config: Config, network: Network) -> Plan:
    backbone = backbone_of(network.sites)
    named = _model_of(network, backbone)
    architecture, layers, _ = _MODELS[config.backbone]
    if (architecture, layers) != (backbone.architecture, len(network.sites)) or (
        named not in (None, config.backbone)
    ):
        raise PlanError(
            f"the config is for {config.backbone} ({architecture} of {layers} layers), the network "
            f"is {named or 'another'} ({backbone.architecture} of {len(network.sites)} layers)"
        )
    if config.is_static:
        return Plan(network, ())
    reserved = shared(
        backbone.half if config.is_half else backbone.warehouses, config.sharing_range
    )
    names = _our_names(network, reserved)
    each = {key: _spread(key, getattr(config, key), list(reserved)) for key in _LISTS}
    shares = {
        names[warehouse]: Share(
            tuple(layers),
            ratio=each["cell_num_ratio"][index],
            cell_ratio=(each["cell_outplane_ratio"][index], each["cell_inplane_ratio"][index]),
            reduction=each["reduction"][index],
        )
        for index, (warehouse, layers) in enumerate(reserved.items())
    }
    settings = Settings(
        sharing=shares, basis_ratio=min(config.nonlocal_basis_ratio, 1), norm=_norm(backbone)
    )
    return plan_ratio(network, settings, 1)


def _norm(backbone: Backbone) -> str:
    return "layer" if backbone.architecture == "convnext" else "batch"


def _model_of(network: Network, backbone: Backbone) -> str | None:
    """The official model that a network is, at its width, on images of three channels."""
    head = network.sites[-1]
    rest = network.params - math.prod(head.kernel) - head.bias * head.out_channels
    size = (backbone.architecture, len(network.sites), rest)
    return next((name for name, known in _MODELS.items() if known == size), None)


def _our_names(network: Network, reserved: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Our names for official warehouses, where a level of sharing has them all; else theirs."""
    for level in SHARING:
        groups = lay_out(network, Settings(sharing=level)).groups
        ours = {frozenset(group.layers): group.name for group in groups}
        names = {name: ours.get(frozenset(layers), "") for name, layers in reserved.items()}
        if all(names.values()) or [name for name in names if not names[name]] == ["classifier"]:
            return {name: ours or name for name, ours in names.items()}
    return {name: name for name in reserved}


def _spread(key: str, values: Sequence[float], warehouses: Sequence[str]) -> Sequence[float]:
    if len(values) == 1:
        return [values[0]] * len(warehouses)
    if len(values) != len(warehouses):
        raise PlanError(
            f"{key} has {len(values)} values: give one, or one for each of the "
            f"{len(warehouses)} warehouses ({shortened(warehouses)})"
        )
    return values


def write_config(plan: Plan) -> dict[str, Any]:
    """The official config of a plan, for JSON: what makes the model, not how it is trained.

    `plan(write_config(p), p.network)` has the warehouses of p, with the ratio that stands for
    solved numbers of cells. The classes come from the data there. Raises PlanError that says why,
    if the official code cannot build the plan.
    """
    if not isinstance(plan, Plan):
        raise PlanError(f"plan: expected a kwlayers.Plan, got {type(plan).__name__}")
    network = plan.network
    backbone = backbone_of(network.sites)
    model = _model_of(network, backbone)
    if model is None:
        raise PlanError(
            f"the official repository has {', '.join(_MODELS)}, on images of three channels; this "
            f"{backbone.architecture} of {len(network.sites)} layers is none of them"
        )
    side = network.input_size[-1]
    square = network.input_size == (3, side, side)
    extra = {"input_size": side} if square and side != 224 else {}
    if not plan.groups:
        return {"model": model, **extra}
    for group in plan.groups:
        if group.method != "kernel_warehouse":
            raise PlanError(
                f"group {group.name!r}: the official repository has no method {group.method!r}"
            )
    if set(backbone.half) == {name for group in plan.groups for name in group.layers}:
        data: dict[str, Any] = {"model": f"kw1d2x_{model}"}
        if not _same(plan, _plan(read_config(data), network)):
            raise PlanError(
                f"the official kw1d2x_{model} has fixed settings, and they are not this plan's: "
                "only the published 1/2x plan can be written"
            )
        return data | extra
    data = {"model": f"kw_{model}", **_settings(plan, backbone)}
    assert _same(plan, _plan(read_config(data), network))
    return data | extra


def _settings(plan: Plan, backbone: Backbone) -> dict[str, Any]:
    owner: dict[str, WarehouseGroup] = {n: group for group in plan.warehouses for n in group.layers}
    if misfit := backbone.misfit(list(owner)):
        raise PlanError(f"the official model is another: {misfit}")
    prefixes = _sharing_range(plan, backbone)
    groups = [owner[layers[0]] for layers in shared(backbone.warehouses, prefixes).values()]
    norm = _norm(backbone)
    for group in groups:
        where = f"group {group.name!r}"
        if group.norm != norm:
            raise PlanError(
                f"{where}: norm {group.norm!r}; the official {backbone.architecture} has {norm!r}"
            )
        if math.prod(group.cell[2:]) > 1:
            raise PlanError(
                f"{where}: cells of {group.cell}; the official models always partition kernels "
                "into cells of 1x1"
            )
    bases = sorted({group.basis_ratio for group in groups})
    if len(bases) > 1:
        raise PlanError(
            f"basis_ratio {', '.join(f'{q:g}' for q in bases)}: the official code takes one for "
            "all warehouses"
        )
    each = {
        "reduction": [group.reduction for group in groups],
        "cell_num_ratio": [_num_ratio(plan, group) for group in groups],
        "cell_inplane_ratio": [_cell_ratio(plan, group, 1) for group in groups],
        "cell_outplane_ratio": [_cell_ratio(plan, group, 0) for group in groups],
    }
    data: dict[str, Any] = {key: _joined(values) for key, values in each.items()}
    data["sharing_range"] = list(prefixes)
    if bases[0] < 1:
        data["nonlocal_basis_ratio"] = bases[0]
    return data


def _sharing_range(plan: Plan, backbone: Backbone) -> tuple[str, ...]:
    kind = "conv" if backbone.architecture == "resnet" else "pwconv"
    wanted = {frozenset(group.layers) for group in plan.groups}
    for layer in (("layer",), ()):
        for stage in ((), ("stage",)):
            for kinds in ((kind,), ()):
                prefixes = (*stage, *layer, *kinds)
                found = shared(backbone.warehouses, prefixes)
                if {frozenset(layers) for layers in found.values()} == wanted:
                    return prefixes
    listed = shortened([f"{g.name} of {len(g.layers)} layers" for g in plan.groups])
    raise PlanError(
        "sharing: prefixes of warehouse names (stage0_layer1_conv0) cannot say these groups: "
        f"{listed}; plan with sharing 'stage', 'position' or 'layer'"
    )


def _num_ratio(plan: Plan, group: WarehouseGroup) -> float:
    """A cell_num_ratio that gives the group's cells, handed out as here."""
    mixtures = group.mixtures(plan.of(group))
    found = list(buildable(group.num_cells, mixtures, group.ratio))
    for ratio, dealt in found:
        if dealt == geometry.assign(group.num_cells, mixtures, group.ratio) and (
            _bases(plan, group, ratio) == _bases(plan, group, group.ratio)
        ):
            return ratio
    where = f"group {group.name!r}: {group.num_cells:,} cells for {sum(mixtures):,} mixtures"
    if found:
        raise PlanError(
            f"{where}; the official code shares them out among the layers otherwise: plan with "
            f"ratio {found[0][0]}, which gives as many"
        )
    raise PlanError(
        f"{where}; the official code builds whole multiples or fractions only: plan with a ratio "
        "such as 1/4, 1/2, 1 or 2"
    )


def _bases(plan: Plan, group: WarehouseGroup, ratio: float | None) -> list[geometry.Basis]:
    """How the columns of each layer split, if the group has a basis."""
    mixtures = group.mixtures(plan.of(group))
    return [
        geometry.basis(m, group.num_cells, sum(mixtures), ratio, group.basis_ratio)
        for m in mixtures
        if group.basis_ratio < 1
    ]


def _cell_ratio(plan: Plan, group: WarehouseGroup, axis: int) -> float:
    """A ratio of the layers' common channels that truncates to the cell's."""
    common = math.gcd(*(plan.network[name].kernel[axis] for name in group.layers))
    ratio = group.cell[axis] / common
    return ratio if int(common * ratio) == group.cell[axis] else (group.cell[axis] + 0.5) / common


def _joined(values: Sequence[float]) -> Any:
    """One number if all are the same; whole ones as integers."""
    plain = [int(value) if value == int(value) else value for value in values]
    return plain[0] if len(set(plain)) == 1 else plain


def _same(one: Plan, other: Plan) -> bool:
    """Whether two plans of one network build the same model, whatever their groups are called."""

    def built(plan: Plan) -> list[object]:
        return [
            (
                (group.cell, group.num_cells, group.layers, group.reduction, group.norm),
                (group.basis_ratio, _bases(plan, group, group.ratio)),
                geometry.assign(group.num_cells, group.mixtures(plan.of(group)), group.ratio),
            )
            for group in sorted(plan.warehouses, key=lambda group: group.layers)
        ]

    return built(one) == built(other)
