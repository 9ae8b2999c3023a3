"""The backbones of the papers by name: what exists, how to build one, how to load weights.

Importing this package costs nothing: torch loads with the first model that is built.
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

    ModelT = TypeVar("ModelT", bound=torch.nn.Module)

__all__ = ["MODELS", "UnknownModelError", "ZooModel", "create", "get", "load_weights"]

_LISTED = 10  # names per kind of problem in one error message


class UnknownModelError(ValueError):
    """No model of the zoo has this name."""


@dataclass(frozen=True)
class ZooModel:
    """One backbone.

    ``module`` holds what builds it, under ``builder`` or else its own name, with ``arguments``.
    options: positive integers that it takes beside. flags: those that are true or false. static:
    flags that leave out its own dynamic convolutions, so that they can be planned.
    """

    name: str
    input_size: tuple[int, ...]  # (C, H, W), of videos (C, T, H, W), of the published numbers
    num_classes: int
    summary: str
    module: str
    options: tuple[str, ...] = ("num_classes", "in_channels")
    flags: tuple[str, ...] = ()
    static: tuple[str, ...] = ()
    builder: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)


def _imagenet(name: str, summary: str, module: str, *extra_options: str) -> ZooModel:
    options = ("num_classes", "in_channels", *extra_options)
    return ZooModel(name, (3, 224, 224), 1000, summary, module, options)


# Ten seconds of sound as 128 mel bands, and AudioSet's classes.
_MEL, _AUDIOSET = (1, 128, 1000), 527


def _sign(trunk: str, dcac: bool = False) -> ZooModel:
    what = ", DCAC after the last two stages [recon]" if dcac else ""
    return ZooModel(
        f"sign_{trunk}{'_dcac' if dcac else ''}",
        (3, 160, 224, 224),
        1296,  # PHOENIX14's glosses and a blank
        f"sign language from videos: {trunk} per frame, BiLSTM{what}",
        "kwsearch.zoo.sign",
        flags=() if dcac else ("dcac",),
        builder=f"sign_{trunk}",
        arguments={"dcac": True} if dcac else {},
    )


def _mn(tenths: int) -> ZooModel:
    width = tenths / 10
    return ZooModel(
        f"mn{tenths:02}",
        _MEL,
        _AUDIOSET,
        f"MobileNetV3 for spectrograms at width {width:g}",
        "kwsearch.zoo.mn",
        builder="MN",
        arguments={"multiplier": width},
    )


def _dymn(tenths: int, replace_se: bool = False) -> ZooModel:
    width = tenths / 10
    where = "where MN has squeeze-and-excitation" if replace_se else "in every block"
    return ZooModel(
        f"dymn{tenths:02}{'_replace_se' if replace_se else ''}",
        _MEL,
        _AUDIOSET,
        f"DyMN at width {width:g}: dynamic {where}",
        "kwsearch.zoo.dymn",
        ("num_classes", "in_channels", "num_kernels", "relu_pieces", "context_ratio"),
        flags=("no_dyconv", "no_dyrelu", "no_ca", *(() if replace_se else ("replace_se",))),
        static=("no_dyconv",),
        builder="DyMN",
        arguments={"multiplier": width, **({"replace_se": True} if replace_se else {})},
    )


MODELS: dict[str, ZooModel] = {
    model.name: model
    for model in (
        _imagenet("resnet18", "ResNet with 18 layers, basic blocks", "kwsearch.zoo.resnet"),
        _imagenet("resnet34", "ResNet with 34 layers, basic blocks", "kwsearch.zoo.resnet"),
        _imagenet("resnet50", "ResNet with 50 layers, bottlenecks", "kwsearch.zoo.resnet"),
        _imagenet("resnet101", "ResNet with 101 layers, bottlenecks", "kwsearch.zoo.resnet"),
        _imagenet("mobilenetv2_050", "MobileNetV2 at half width", "kwsearch.zoo.mobilenetv2"),
        _imagenet("mobilenetv2_075", "MobileNetV2 at three quarters", "kwsearch.zoo.mobilenetv2"),
        _imagenet("mobilenetv2_100", "MobileNetV2 at full width", "kwsearch.zoo.mobilenetv2"),
        _imagenet("convnext_tiny", "ConvNeXt-T, MLPs as 1x1 convolutions", "kwsearch.zoo.convnext"),
        _imagenet("deit_tiny", "DeiT-Ti on 16x16 patches", "kwsearch.zoo.vit", "img_size"),
        ZooModel("resnet20", (3, 32, 32), 10, "CIFAR ResNet with 20 layers", "kwsearch.zoo.resnet"),
        *(_mn(tenths) for tenths in (1, 2, 4, 5, 10, 20, 30, 40)),
        *(_dymn(tenths) for tenths in (4, 10, 20)),
        *(_dymn(tenths, replace_se=True) for tenths in (4, 10)),
        *(_sign(trunk, dcac) for dcac in (False, True) for trunk in ("resnet18", "resnet34")),
        ZooModel(
            "micronas",
            (1, 128, 9),
            6,
            "largest network of MicroNAS' space for sensors; recipes without a budget search it",
            "kwsearch.micronas.supernet",
            ("num_classes", "in_channels", "steps", "sensors"),
            builder="largest",
        ),
    )
}


def get(name: str) -> ZooModel:
    """The zoo's entry for ``name``; raises `UnknownModelError` with suggestions."""
    if name in MODELS:
        return MODELS[name]
    close = difflib.get_close_matches(name, MODELS, n=2)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise UnknownModelError(f"unknown model {name!r}: {hint}the zoo has {', '.join(MODELS)}")


def create(name: str, *, width: float = 1.0, **kwargs: int | bool) -> torch.nn.Module:
    """Build the model ``name`` with fresh weights.

    ``num_classes`` and ``in_channels`` are accepted everywhere, ``img_size`` (the side of the
    square input) by deit_tiny; DyMNs take ``num_kernels``, ``relu_pieces``, ``context_ratio`` and
    the flags ``replace_se``, ``no_dyconv``, ``no_dyrelu`` and ``no_ca``, networks for sign language
    ``dcac``, micronas ``steps`` and ``sensors`` of its windows. ``width`` scales every model's
    channels, each to a whole number of at least 1. Under ``torch.device("meta")`` only the
    structure is built.

    Raises `UnknownModelError`, `TypeError` for an option the model does not have, and
    `ValueError` for a value that is not a positive integer (``width``: a positive number).
    """
    entry = get(name)
    allowed = (*entry.options, *entry.flags)
    unknown = [option for option in kwargs if option not in allowed]
    if unknown:
        raise TypeError(
            f"{name} has no option {', '.join(map(repr, unknown))}; it accepts {', '.join(allowed)}"
        )
    for option, value in kwargs.items():
        if option in entry.flags:
            if not isinstance(value, bool):
                raise ValueError(f"{name}: {option} must be True or False, not {value!r}")
        elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: {option} must be a positive integer, not {value!r}")
    if not 0 < width < math.inf:
        raise ValueError(f"{name}: width must be a positive number, not {width!r}")
    build = getattr(importlib.import_module(entry.module), entry.builder or name)
    model: torch.nn.Module = build(**entry.arguments, **kwargs, width=width)
    return model


def load_weights(model: ModelT, state_dict: Mapping[str, Any]) -> ModelT:
    """Copy ``state_dict`` into ``model`` and return it; nothing is copied unless all of it fits.

    Shapes may differ by trailing 1s, so a Linear weight (O, I) fills a 1x1 convolution
    (O, I, 1, 1). Every name must match; only ``num_batches_tracked``, which old checkpoints
    lack, may be missing. Raises `ValueError` that lists what is missing, unexpected or misshapen.
    """
    import torch

    translate = getattr(model, "from_published", None)
    if translate is not None:
        state_dict = translate(state_dict)
    own = model.state_dict()
    if any(tensor.is_meta for tensor in own.values()):
        raise ValueError(
            "the model is on the meta device and cannot hold weights; "
            'call model.to_empty(device="cpu") first'
        )
    missing = [
        key for key in own if key not in state_dict and not key.endswith(".num_batches_tracked")
    ]
    unexpected = [str(key) for key in state_dict if key not in own]
    misshapen: list[str] = []
    fitted: dict[str, torch.Tensor] = {}
    for key, target in own.items():
        value = state_dict.get(key)
        if isinstance(value, torch.Tensor):
            if _without_trailing_ones(value.shape) == _without_trailing_ones(target.shape):
                fitted[key] = value.reshape(target.shape)
            else:
                misshapen.append(f"{key} {tuple(value.shape)} instead of {tuple(target.shape)}")
        elif key in state_dict:
            misshapen.append(f"{key} is a {type(value).__name__} instead of a tensor")

    problems = [
        f"  {kind} ({len(found)}): {_shortened(found)}"
        for kind, found in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("mismatching", misshapen),
        )
        if found
    ]
    if problems:
        raise ValueError(
            "the weights do not fit the model:\n"
            + "\n".join(problems)
            + "\nresnets use torchvision's names, networks for sound their authors', the others "
            "timm's; num_classes, "
            "in_channels and img_size must be those of the weights"
        )
    model.load_state_dict(fitted)
    return model


def _without_trailing_ones(shape: torch.Size) -> tuple[int, ...]:
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)


def _shortened(found: list[str]) -> str:
    more = len(found) - _LISTED
    return ", ".join(found[:_LISTED]) + (f", and {more} more" if more > 0 else "")
