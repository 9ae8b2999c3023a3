"""Stages, positions and kinds of the papers' backbones, recognised by their module names.

One table: for each family, patterns over module names (torchvision's and timm's forms) and
where the official KernelWarehouse models put the layer. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kwlayers.plan import Site


@dataclass(frozen=True)
class Label:
    """Where a layer stands. `static` says why it stays static by default; else empty.

    stage: the warehouse's stage, which for the first block of a stage is the stage before.
    kind, position: `conv`, 0 is the first `conv` of a block. alone: a warehouse of its own.
    role: stem, head, patch embedding, downsample, shortcut, or "last convolution"; else empty.
    """

    stage: int
    kind: str
    position: int = 0
    alone: str = ""
    static: str = ""
    role: str = ""


Match = re.Match[str]
Rule = tuple[str, Callable[[Match, "_Context"], Label]]


@dataclass(frozen=True)
class _Context:
    bottleneck: bool


def _static(role: str) -> Callable[[Match, _Context], Label]:
    return lambda match, context: Label(0, role, static=f"the {role} stays static", role=role)


def _resnet(match: Match, context: _Context) -> Label:
    stage, block, layer = int(match[1]) - 1, int(match[2]), match[3]
    shortcut = layer.startswith("downsample")
    opens_stage = block == 0 and (layer == "conv1" or shortcut)
    position = 0 if shortcut else int(layer[-1]) - 1
    role = "shortcut" if shortcut else ""
    if not opens_stage:
        return Label(stage, "conv", position, role=role)
    if stage == 0 and (context.bottleneck or layer != "conv1"):
        static = "no stage before the first to share with"
        return Label(0, "conv", position, static=static, role=role)
    return Label(max(stage - 1, 0), "conv", position, role=role)


# MobileNetV2: block groups 0..6 map to these stages; the first block after a change of
# stage belongs, whole, to the stage before.
_MOBILENET_STAGES = (1, 2, 3, 4, 5, 6, 6)
_MOBILENET_DEPTHS = (1, 2, 3, 4, 3, 3, 1)


def _mobilenet(group: int, block: int, layer: str) -> Label:
    stage = _MOBILENET_STAGES[group]
    if block == 0 and group > 0 and _MOBILENET_STAGES[group - 1] != stage:
        stage -= 1
    if layer == "depthwise":
        return Label(stage, "dwconv", 0)
    return Label(stage, "pwconv", 0 if layer == "expand" else 1)


def _mobilenet_timm(match: Match, context: _Context) -> Label:
    group, layer = int(match[1]), match[3]
    roles = {"conv_dw": "depthwise", "conv_pwl": "project"}
    # The first block does not expand: its conv_pw projects.
    roles["conv_pw"] = "project" if group == 0 else "expand"
    return _mobilenet(group, int(match[2]), roles[layer])


def _mobilenet_torchvision(match: Match, context: _Context) -> Label:
    index, layer = int(match[1]) - 1, match[2]
    group = block = 0
    for group, depth in enumerate(_MOBILENET_DEPTHS):  # noqa: B007
        if index < depth:
            block = index
            break
        index -= depth
    if group == 0:
        return _mobilenet(0, block, {"0.0": "depthwise", "1": "project"}[layer])
    return _mobilenet(group, block, {"0.0": "expand", "1.0": "depthwise", "2": "project"}[layer])


def _own(name: str) -> Callable[[Match, _Context], Label]:
    role = name.partition("{")[0]
    return lambda match, context: Label(
        0, "conv", alone=name.format(*(int(g) for g in match.groups())), role=role
    )


def _last(match: Match, context: _Context) -> Label:
    return Label(6, "pwconv", 1, role="last convolution")


def _convnext_timm(match: Match, context: _Context) -> Label:
    layer = match[2]
    if layer == "conv_dw":
        return Label(int(match[1]), "dwconv", 0)
    return Label(int(match[1]), "pwconv", int(layer[-1]))


def _convnext_torchvision(match: Match, context: _Context) -> Label:
    stage = (int(match[1]) - 1) // 2
    if match[2] == "0":
        return Label(stage, "dwconv", 0)
    return Label(stage, "pwconv", {"3": 1, "5": 2}[match[2]])


def _vit(match: Match, context: _Context) -> Label:
    kind, position = {
        "attn.qkv": ("attention", 0),
        "attn.proj": ("attention", 1),
        "mlp.fc1": ("mlp", 0),
        "mlp.fc2": ("mlp", 1),
        "mlp.0": ("mlp", 0),
        "mlp.3": ("mlp", 1),
    }[match[1]]
    return Label(0, kind, position)


_STEM, _HEAD, _PATCH = _static("stem"), _static("head"), _static("patch embedding")

# A family is recognised when every layer of the network matches one of its rules and every
# rule of its blocks (marked by the callable, not by `_static`) could apply.
_FAMILIES: dict[str, Sequence[Rule]] = {
    "resnet": (
        (r"conv1", _STEM),
        (r"fc", _HEAD),
        (r"layer(\d+)\.(\d+)\.(conv[123]|downsample\.0)", _resnet),
    ),
    "mobilenetv2 (timm)": (
        (r"conv_stem", _own("stem")),
        (r"blocks\.([0-6])\.(\d+)\.(conv_pw|conv_dw|conv_pwl)", _mobilenet_timm),
        (r"conv_head", _last),
        (r"classifier", _HEAD),
    ),
    "mobilenetv2 (torchvision)": (
        (r"features\.0\.0", _own("stem")),
        (r"features\.(\d|1[0-7])\.conv\.(0\.0|1|1\.0|2)", _mobilenet_torchvision),
        (r"features\.18\.0", _last),
        (r"classifier\.1", _HEAD),
    ),
    "convnext (timm)": (
        (r"stem\.0", _own("stem")),
        (r"stages\.(\d+)\.downsample\.1", _own("downsample{0}")),
        (r"stages\.(\d+)\.blocks\.\d+\.(conv_dw|mlp\.fc1|mlp\.fc2)", _convnext_timm),
        (r"head\.fc", _HEAD),
    ),
    "convnext (torchvision)": (
        (r"features\.0\.0", _own("stem")),
        (r"features\.([246])\.1", _own("downsample{0}")),
        (r"features\.([1357])\.\d+\.block\.([035])", _convnext_torchvision),
        (r"classifier\.2", _HEAD),
    ),
    "vit": (
        (r"patch_embed\.proj|conv_proj", _PATCH),
        (r"blocks\.\d+\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)", _vit),
        (r"encoder\.layers\.encoder_layer_\d+\.(mlp\.0|mlp\.3)", _vit),
        (r"head(?:_dist)?|heads\.head", _HEAD),
    ),
}


@dataclass(frozen=True)
class Recognised:
    """A network whose layers all have a label, by name."""

    family: str
    labels: dict[str, Label]

    @property
    def variant(self) -> str:
        """Of the published backbones: basic, bottleneck (ResNets), mobilenet; else empty."""
        if self.family == "resnet":
            return "bottleneck" if _has_third(self.labels) else "basic"
        return "mobilenet" if self.family.startswith("mobilenetv2") else ""


def _has_third(names: Iterable[str]) -> bool:
    """Whether a ResNet's layers are those of bottlenecks."""
    return any(name.endswith(".conv3") for name in names)


def recognise(sites: Sequence[Site]) -> Recognised | None:
    """The family of a network and the label of each layer, or None if it is unknown."""
    context = _Context(bottleneck=_has_third(site.name for site in sites))
    for family, rules in _FAMILIES.items():
        labels = {}
        for site in sites:
            label = _label(site.name, rules, context)
            if label is None:
                break
            labels[site.name] = label
        else:
            in_blocks = any(not label.static and not label.alone for label in labels.values())
            if in_blocks and _plausible(family, sites):
                return Recognised(family, labels)
    return None


def _label(name: str, rules: Sequence[Rule], context: _Context) -> Label | None:
    for pattern, make in rules:
        if match := re.fullmatch(pattern, name):
            return make(match, context)
    return None


def _plausible(family: str, sites: Sequence[Site]) -> bool:
    """Rule out networks that only borrow a family's names (ResNeXt, EfficientNet-Lite, EVA-02)."""
    grouped = [site for site in sites if site.groups > 1]
    if family == "resnet":
        return not grouped
    if family == "vit":
        inner = [site for site in sites if ".mlp." in site.name]
        return all(site.out_channels % site.in_channels == 0 for site in inner[::2])
    if not family.startswith("mobilenetv2"):
        return True
    return len(grouped) == sum(_MOBILENET_DEPTHS) and all(
        site.kernel_size == (3, 3) for site in grouped
    )
