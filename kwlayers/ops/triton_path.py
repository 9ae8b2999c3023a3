"""The path of a GPU: cuBLAS mixes kernels, Triton convolves with them as they come out of it."""

from __future__ import annotations

from torch import Tensor

from kwlayers.ops import triton_conv
from kwlayers.ops.geometry import ConvGeometry
from kwlayers.ops.kernels import Convolution
from kwlayers.ops.workspace import Workspace


class Implicit(Convolution):
    """Takes kernels as mixed, (b, T, out, in, c_out, c_in) for T taps, and x in any format."""

    splits = False
    returns = True
    mixed = True

    def __init__(
        self, geometry: ConvGeometry, size: tuple[int, ...], last: bool, workspace: Workspace
    ) -> None:
        super().__init__(geometry, size, last, workspace)
        if not triton_conv.available(workspace.like.device):
            raise ValueError(
                "backend 'triton' needs a CUDA device and the triton package; its interpreter "
                "(TRITON_INTERPRET=1) runs it on a CPU, for tests"
            )

    @classmethod
    def refuses(cls, geometry: ConvGeometry, cell: tuple[int, ...]) -> str | None:
        if geometry.groups != 1:
            return f"it needs groups 1, not {geometry.groups}"
        if max(cell[2:]) > 1:
            return f"it needs cells of one position, not {cell[2:]}"
        return None

    def result(self, source: Tensor, kernels: Tensor) -> Tensor:
        return triton_conv.conv(source, kernels, self.geometry)

    def forward(self, source: Tensor, kernels: Tensor, out: Tensor) -> None:
        out.copy_(self.result(source, kernels))

    def source_grad(
        self, source: Tensor, kernels: Tensor, grad: Tensor, out: Tensor, add: bool
    ) -> None:
        assert not add
        out.copy_(triton_conv.conv_input_grad(grad, kernels, self.geometry, self.size))

    def kernel_grad(self, source: Tensor, grad: Tensor, out: Tensor) -> None:
        out.copy_(triton_conv.conv_kernel_grad(source, grad, out.shape, self.geometry))
