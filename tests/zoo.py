"""Which networks of the zoo tests of all of them sweep over."""

from __future__ import annotations

from kwlayers.methods import NAMES
from kwsearch import zoo

# Of MobileNetV2 two of three widths.
IMAGES = [
    name
    for name, model in zoo.MODELS.items()
    if len(model.input_size) == 3 and model.input_size[0] == 3 and name != "mobilenetv2_075"
]
assert "resnet18" in IMAGES

# Methods that take networks of any kind; the others want a block of their own kind.
ANYWHERE = [name for name in NAMES if name != "dymn"]


def network_for(method: str) -> tuple[str, tuple[int, int, int]]:
    """A network that the method makes dynamic, and a small input."""
    return ("resnet18", (3, 32, 32)) if method in ANYWHERE else ("dymn04", (1, 32, 40))
