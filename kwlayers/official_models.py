"""The official KernelWarehouse models: what they call each layer, and what they can build.

Facts read from the papers' repository (OSVAI/KernelWarehouse: models/, modules/). No torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kwlayers import geometry
from kwlayers.families import recognise
from kwlayers.plan import PlanError, Site


@dataclass(frozen=True)
class Backbone:
    """A network that the official repository has, at any depth and width.

    warehouses: the official warehouse of each dynamic layer before sharing
    (`stage0_layer1_conv0`), by our layer name, in the order in which the model asks for them.
    half: the same for the 1/2x model of MobileNetV2; empty for the others.
    """

    architecture: str
    family: str
    warehouses: dict[str, str]
    half: dict[str, str]

    def official_name(self, name: str) -> str | None:
        """The official name of one of our modules or tensors; None if it has none."""
        return _official_name(self.family, name)

    def misfit(self, dynamic: Sequence[str]) -> str:
        """What the official model does otherwise than make just `dynamic` dynamic."""
        missing = [name for name in self.warehouses if name not in dynamic]
        extra = [name for name in dynamic if name not in self.warehouses]
        said = [f"it makes {shortened(missing)} dynamic"] if missing else []
        said += [f"it keeps {shortened(extra)} static"] if extra else []
        return " and ".join(said)


def shortened(found: Sequence[str], most: int = 8) -> str:
    """The first of a long list, and how many more there are."""
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def backbone_of(sites: Sequence[Site]) -> Backbone:
    """The official model that has these layers. Raises PlanError if there is none."""
    known = recognise(sites)
    architecture = known.family.split()[0] if known else ""
    stages = {site.name.split(".")[0] for site in sites if site.name.startswith("layer")}
    if known is None or architecture == "vit" or (architecture == "resnet" and len(stages) != 4):
        raise PlanError(
            "the official repository has ResNets of four stages, MobileNetV2 and ConvNeXt: this "
            "network's layers are none of theirs by torchvision's or timm's names"
        )
    warehouses: dict[str, str] = {}
    blocks: dict[int, list[str]] = {}
    official = {site.name: _official_name(known.family, site.name) or "" for site in sites}
    for site in sites:
        label, name = known.labels[site.name], official[site.name]
        if label.static:
            continue
        if match := re.match(r"downsample_layers\.(\d)", name):
            stem = match[1] == "0"
            warehouse = "stagestem_conv0" if stem else f"stage{int(match[1]) - 1}_layerds_conv0"
        elif label.alone:
            warehouse = "stage0_conv0"
        else:
            # A layer's number is its block's among those of its stage; a ResNet's downsample
            # counts as a block.
            block = re.match(r"layer\d\.\d+(\.downsample)?|features\.\d+|stages\.\d\.\d+", name)
            assert block is not None, name
            stage = blocks.setdefault(label.stage, [])
            if block[0] not in stage:
                stage.append(block[0])
            number = stage.index(block[0])
            warehouse = f"stage{label.stage}_layer{number}_{label.kind}{label.position}"
        warehouses[site.name] = warehouse
    ordered = dict(sorted(warehouses.items(), key=lambda item: _turn(official[item[0]])))
    half = {}
    if architecture == "mobilenetv2":
        half = {
            name: warehouse
            for name, warehouse in ordered.items()
            if "pwconv" not in warehouse or warehouse.startswith("stage6")
        } | {sites[-1].name: "classifier"}
    return Backbone(architecture, known.family, ordered, half)


def _turn(name: str) -> tuple[int, ...]:
    """Sorts layers, stably: downsamples are made before their ResNet block, or before all."""
    if match := re.match(r"layer(\d)\.(\d+)\.(downsample)?", name):
        return int(match[1]), int(match[2]), match[3] is None
    return (not name.startswith("downsample_layers"),)


def shared(warehouses: dict[str, str], prefixes: Sequence[str]) -> dict[str, list[str]]:
    """Layers by the warehouse that they share, in the official order.

    Every part of a name between underscores that starts with a prefix becomes that prefix.
    """
    found: dict[str, list[str]] = {}
    for layer, name in warehouses.items():
        parts = name.split("_")
        for prefix in prefixes:
            parts = [prefix if part.startswith(prefix) else part for part in parts]
        found.setdefault("_".join(parts), []).append(layer)
    return found


def buildable(
    num_cells: int, mixtures: Sequence[int], ratio: float | None = None
) -> Iterator[tuple[float, tuple[geometry.Assignment, ...]]]:
    """Values of cell_num_ratio that give `num_cells` there, with how these are handed out.

    The official code asserts that all of them are handed out to the layers, which have m =
    `mixtures`. ratio: tried first. Of less than sqrt(M) cells some values may be left out.
    """
    total = sum(mixtures)
    exact = num_cells / total
    near = [exact, 1 / max(round(1 / exact), 1), (num_cells + 0.5) / total]
    for b in dict.fromkeys([ratio, *near] if ratio else near):
        if geometry.cells_for_ratio(total, b) == num_cells:
            dealt = geometry.published_assignment(num_cells, mixtures, b)
            if dealt is not None:
                yield b, dealt


Rule = tuple[str, str | Callable[[re.Match[str]], str]]


def _official_name(family: str, name: str) -> str | None:
    for pattern, official in _NAMES[family]:
        if match := re.match(rf"(?:{pattern})(?![^.])", name):
            start = match.expand(official) if isinstance(official, str) else official(match)
            return start + name[match.end() :]
    return None


# timm's names within a block of MobileNetV2; the first block does not expand.
_FIRST = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1", "bn2": "2"}
_BLOCK = {
    "conv_pw": "0.0",
    "bn1": "0.1",
    "conv_dw": "1.0",
    "bn2": "1.1",
    "conv_pwl": "2",
    "bn3": "3",
}
_MOBILENET_STARTS = (1, 2, 4, 7, 11, 14, 17)
_CONVNEXT = {
    "conv_dw": "dwconv",
    "norm": "norm",
    "mlp.fc1": "pwconv1",
    "mlp.fc2": "pwconv2",
    "gamma": "gamma",
    "block.0": "dwconv",
    "block.2": "norm",
    "block.3": "pwconv1",
    "block.5": "pwconv2",
    "layer_scale": "gamma",
}


def _mobilenet_block(match: re.Match[str]) -> str:
    group, block = int(match[1]), int(match[2])
    inside = _BLOCK if group else _FIRST
    return f"features.{_MOBILENET_STARTS[group] + block}.conv.{inside[match[3]]}"


# By family: patterns over our names, and the official ones.
_NAMES: dict[str, Sequence[Rule]] = {
    "resnet": ((r"conv1|bn1|fc|layer\d\.\d+\.(?:(?:conv|bn)[123]|downsample\.[01])", r"\g<0>"),),
    "mobilenetv2 (timm)": (
        (r"conv_stem", "features.0.0"),
        (r"bn1", "features.0.1"),
        (r"blocks\.(\d)\.(\d)\.(conv_pw|conv_dw|conv_pwl|bn[123])", _mobilenet_block),
        (r"conv_head", "features.18.0"),
        (r"bn2", "features.18.1"),
        (r"classifier", "classifier"),
    ),
    "mobilenetv2 (torchvision)": (
        (r"features\.\d+(?:\.conv)?(?:\.\d)+", r"\g<0>"),
        (r"classifier\.1", "classifier"),
    ),
    "convnext (timm)": (
        (r"stem\.([01])", r"downsample_layers.0.\1"),
        (r"stages\.(\d)\.downsample\.([01])", r"downsample_layers.\1.\2"),
        (
            r"stages\.(\d)\.blocks\.(\d+)\.(conv_dw|norm|mlp\.fc1|mlp\.fc2|gamma)",
            lambda match: f"stages.{match[1]}.{match[2]}.{_CONVNEXT[match[3]]}",
        ),
        (r"head\.norm", "norm"),
        (r"head\.fc", "head"),
    ),
    "convnext (torchvision)": (
        (
            r"features\.([0246])\.([01])",
            lambda match: f"downsample_layers.{int(match[1]) // 2}.{match[2]}",
        ),
        (
            r"features\.([1357])\.(\d+)\.(block\.[0235]|layer_scale)",
            lambda match: f"stages.{int(match[1]) // 2}.{match[2]}.{_CONVNEXT[match[3]]}",
        ),
        (r"classifier\.0", "norm"),
        (r"classifier\.2", "head"),
    ),
}
