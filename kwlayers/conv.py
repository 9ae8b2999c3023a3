"""Layers that read like torch.nn's, plus one argument: the warehouse that they mix from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kwlayers import geometry
from kwlayers.attention import Attention
from kwlayers.dynamic import DynamicConvNd, DynamicLayer, DynamicLinear, like_static
from kwlayers.ops import check_settings, kw_conv
from kwlayers.warehouse import Warehouse


class _KWLayer(DynamicLayer):
    """What convolutions and linear layers share: attention and a borrowed warehouse.

    Settings beside torch.nn's arguments: warehouse. reduction (1/16), basis_ratio (1), norm
    ("batch" or "layer"): its attention. assignment: its cells at temperature 1, by default the next
    ones of the warehouse. ratio: b where one was given. backend, workspace_mb: as
    `kwlayers.ops.kw_conv` takes them. device, dtype: torch.nn's.
    """

    def _build(  # type: ignore[override]  # not any settings, but these
        self,
        in_channels: int,
        bias: bool,
        *,
        warehouse: Warehouse,
        reduction: float = 1 / 16,
        basis_ratio: float = 1.0,
        norm: str = "batch",
        assignment: geometry.Assignment | None = None,
        ratio: float | None = None,
        backend: str | None = None,
        workspace_mb: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_settings(backend, workspace_mb)
        mixtures = geometry.num_mixtures(self.geometry.kernel, warehouse.cell)
        cells = warehouse.next_cells(mixtures) if assignment is None else assignment
        self.borrowed = (warehouse,)
        self.attention = Attention(
            in_channels,
            mixtures,
            warehouse.num_cells,
            cells,
            total_mixtures=warehouse.num_mixtures,
            ratio=ratio,
            reduction=reduction,
            basis_ratio=basis_ratio,
            norm=norm,
            device=device,
            dtype=dtype,
        )
        self._own_bias(bias, device, dtype)
        self.backend = backend
        self.workspace_mb = workspace_mb
        # Last, so that a layer which is refused takes nothing.
        if assignment is None:
            warehouse.hand_out(mixtures)
        warehouse.reset_parameters(cells.start, cells.length)

    def reset_parameters(self) -> None:
        """A bias of zeros: after `to_empty`. The attention and the warehouse have their own."""
        self._reset_bias()

    @property
    def warehouse(self) -> Warehouse:
        """Where the cells are. Not a submodule of the layer."""
        (found,) = self.borrowed
        assert isinstance(found, Warehouse)
        return found

    def convolve(self, x: Tensor) -> Tensor:
        alpha = self.attention(x)
        return kw_conv(
            self.padded(x),
            alpha,
            self.warehouse.cells,
            self.geometry,
            self.backend,
            self.workspace_mb,
        )


class _KWConvNd(_KWLayer, DynamicConvNd):
    pass


class KWConv1d(_KWConvNd):
    """`nn.Conv1d` with kernels mixed from `warehouse`, whose cells are (c_out, c_in, k)."""

    rank = 1


class KWConv2d(_KWConvNd):
    """`nn.Conv2d` with kernels mixed from `warehouse`, whose cells are (c_out, c_in, kh, kw).

    Further settings: reduction, basis_ratio, norm, assignment, ratio, backend, workspace_mb.
    """

    rank = 2


class KWConv3d(_KWConvNd):
    """`nn.Conv3d` with kernels mixed from `warehouse`; cells (c_out, c_in, kd, kh, kw)."""

    rank = 3


class KWLinear(_KWLayer, DynamicLinear):
    """`nn.Linear` with weights mixed from `warehouse`, whose cells are (c_out, c_in, 1).

    One weight per entry of the first axis; the attention sees the mean over the others.
    """


_KINDS: dict[type[nn.Module], Any] = {
    nn.Conv1d: KWConv1d,
    nn.Conv2d: KWConv2d,
    nn.Conv3d: KWConv3d,
    nn.Linear: KWLinear,
}


def like(layer: nn.Module, warehouse: Warehouse, **settings: Any) -> _KWLayer:
    """The KernelWarehouse layer for a static one, which lends it its bias parameter."""
    made: _KWLayer = like_static(_KINDS, layer, warehouse=warehouse, **settings)
    return made
