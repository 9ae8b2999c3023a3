"""The fast paths by name."""

from __future__ import annotations

from kwlayers.ops.convolutions import Grouped, Loop
from kwlayers.ops.dispatch import PUBLISHED, Choice
from kwlayers.ops.gemm import Gemm
from kwlayers.ops.geometry import ConvGeometry
from kwlayers.ops.inputs import InputsPath
from kwlayers.ops.kernels import KernelPath
from kwlayers.ops.path import Path
from kwlayers.ops.triton_path import Implicit

PATHS: dict[str, Path] = {
    "loop": KernelPath(Loop, None),
    "grouped": KernelPath(Grouped, False),
    "gemm": KernelPath(Gemm, True),
    "triton": KernelPath(Implicit, False),
    "mix_inputs": InputsPath(True),
    "mix_outputs": InputsPath(False),
}


def paths_of(choice: Choice, geometry: ConvGeometry, cell: tuple[int, ...]) -> tuple[Path, Path]:
    """The paths of a choice. Raises ValueError where one cannot do it."""
    if choice == PUBLISHED:
        choice = Choice("grouped", "grouped")
    for name in choice:
        reason = PATHS[name].refuses(geometry, cell)
        if reason is not None:
            raise ValueError(f"backend {name!r} cannot do this layer: {reason}")
    return PATHS[choice.forward], PATHS[choice.backward]
