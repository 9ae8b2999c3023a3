"""The 15 published KernelWarehouse settings, as data.

Li & Yao, ICML 2024 (arXiv 2406.07879) and its official code: per backbone and ratio the
sharing, cell ratios, attention settings, schedule and ImageNet top-1 accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kwlayers.plan import Network, Plan
from kwlayers.planner import plan_ratio
from kwlayers.rules import Share
from kwlayers.sharing import Settings

PAPER = "Li & Yao, KernelWarehouse: Rethinking the Design of Dynamic Convolution, ICML 2024"

# Official accuracy of the static backbones, ImageNet top-1 in per cent.
STATIC_TOP1 = {
    "resnet18": 70.44,
    "resnet50": 78.44,
    "convnext_tiny": 82.07,
    "mobilenetv2_100": 72.04,
    "mobilenetv2_050": 64.32,
}


@dataclass(frozen=True)
class Published:
    """One setting. top1: in per cent. epochs and temperature_epochs: of its training."""

    model: str
    ratio: float
    top1: float
    settings: Settings = field(default_factory=Settings)
    epochs: int = 300
    temperature_epochs: int = 20

    @property
    def name(self) -> str:
        """As in the papers: `ResNet50 1/2x`."""
        return f"{TITLES[self.model]} {fraction(self.ratio)}x"

    @property
    def static_top1(self) -> float:
        """Accuracy of the static backbone, in per cent."""
        return STATIC_TOP1[self.model]

    @property
    def slug(self) -> str:
        """The recipe's file name without ending."""
        return f"kw_{self.model}_{self.ratio:g}x"

    def plan(self, network: Network) -> Plan:
        """The setting on the traced backbone, whatever its classes and input size."""
        return plan_ratio(network, self.settings, self.ratio)


TITLES = {
    "resnet18": "ResNet18",
    "resnet50": "ResNet50",
    "convnext_tiny": "ConvNeXt-Tiny",
    "mobilenetv2_100": "MobileNetV2 (1.0x)",
    "mobilenetv2_050": "MobileNetV2 (0.5x)",
}


def fraction(ratio: float) -> str:
    """1/4 for 0.25, 2 for 2.0."""
    return f"{ratio:g}" if ratio >= 1 else f"1/{1 / ratio:g}"


_PLAIN = Settings()
_HALF_CELLS = Settings(cell_ratio=(0.5, 0.5))
_POSITION = Settings(sharing="position")


# MobileNetV2 at 1/2x: depthwise layers and stem at ratio 1, the 1x1 layers of stage 6 and the
# classifier at 1/2; the other 1x1 layers stay static.
_MOBILENET_HALF = Settings(
    reduction=1 / 32,
    sharing={
        "stem": Share(["conv_stem"], ratio=1),
        "stage1_dwconv0": Share(["blocks.0.0.conv_dw", "blocks.1.0.conv_dw"], ratio=1),
        "stage2_dwconv0": Share(["blocks.1.1.conv_dw", "blocks.2.0.conv_dw"], ratio=1),
        "stage3_dwconv0": Share(["blocks.2.[12].conv_dw", "blocks.3.0.conv_dw"], ratio=1),
        "stage4_dwconv0": Share(["blocks.3.[123].conv_dw", "blocks.4.0.conv_dw"], ratio=1),
        "stage5_dwconv0": Share(["blocks.4.[12].conv_dw", "blocks.5.0.conv_dw"], ratio=1),
        "stage6_pwconv0": Share(
            ["blocks.5.[12].conv_pw", "blocks.6.0.conv_pw"], ratio=0.5, cell_ratio=(0.5, 0.5)
        ),
        "stage6_dwconv0": Share(["blocks.5.[12].conv_dw", "blocks.6.0.conv_dw"], ratio=1),
        "stage6_pwconv1": Share(
            ["blocks.5.[12].conv_pwl", "blocks.6.0.conv_pwl", "conv_head"],
            ratio=0.5,
            cell_ratio=(0.5, 0.5),
        ),
        "classifier": Share(["classifier"], ratio=0.5, cell_ratio=(1, 0.025)),
    },
)

PUBLISHED: tuple[Published, ...] = (
    Published("resnet18", 0.25, 72.73, _HALF_CELLS),
    Published("resnet18", 0.5, 73.33, _HALF_CELLS),
    Published("resnet18", 1, 74.77, _PLAIN),
    Published("resnet18", 2, 75.19, _PLAIN),
    Published("resnet18", 4, 76.05, _PLAIN),
    Published("resnet50", 0.5, 79.30, Settings(cell_ratio=(0.5, 0.5), basis_ratio=1 / 16)),
    Published("resnet50", 1, 80.38, _PLAIN),
    Published("resnet50", 4, 81.05, _PLAIN),
    Published("convnext_tiny", 1, 82.51, _PLAIN),
    Published("mobilenetv2_100", 0.5, 72.59, _MOBILENET_HALF, 150, 15),
    Published("mobilenetv2_100", 1, 74.68, _PLAIN, 150, 15),
    Published("mobilenetv2_100", 4, 75.92, _POSITION, 150, 15),
    Published("mobilenetv2_050", 0.5, 65.20, _MOBILENET_HALF, 150, 15),
    Published("mobilenetv2_050", 1, 68.29, _PLAIN, 150, 15),
    Published("mobilenetv2_050", 4, 70.26, _POSITION, 150, 15),
)


def of_model(model: str) -> tuple[Published, ...]:
    """The published settings of a backbone, the smallest first."""
    return tuple(entry for entry in PUBLISHED if entry.model == model)


def find(model: str, ratio: float) -> Published | None:
    """The published setting of `model` at `ratio`, if there is one."""
    return next((entry for entry in of_model(model) if entry.ratio == ratio), None)
