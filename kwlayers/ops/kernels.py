"""Mixing kernels block by block: in reused memory, convolved with at once, and dropped.

What differs between the paths that mix kernels is the convolution; blocks, mixing and the
gradients of attention and cells are the same. With a row per sample and mixture:

    W = A E             (rows, columns) = (rows, n) (n, columns)
    dA = dW E^T         dE += A^T dW
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kwlayers.ops.device import turns
from kwlayers.ops.geometry import FEW_POSITIONS, Blocks, ConvGeometry
from kwlayers.ops.path import Needs, Path, add_product_, format_of, wide
from kwlayers.ops.workspace import Workspace

# With fewer output channels at a time convolutions slow down, with fewer rows mixing does. Which
# counts more depends on how many multiply-adds mixing has for one of the convolution.
_CHANNELS, _FEW_CHANNELS, _ROWS = 64, 32, 72
_MUCH_MIXING = 0.7
# Numbers in the widest vectors of a CPU.
_VECTOR = 16


class Convolution(ABC):
    """One kernel per sample: (b, o, *K, i) if `last`, else (b, o, i, *K), for i inputs a group."""

    # Whether it may be given a part of the output channels.
    splits = True
    # Whether it makes its result itself: `forward` copies it.
    returns = False
    # Whether it takes kernels as mixed: (b, T, out, in, c_out, c_in), for cells of one position.
    mixed = False

    @classmethod
    def refuses(cls, geometry: ConvGeometry, cell: tuple[int, ...]) -> str | None:
        """Why it cannot do it; None where it can."""
        return None

    def __init__(
        self, geometry: ConvGeometry, size: tuple[int, ...], last: bool, workspace: Workspace
    ) -> None:
        self.geometry = geometry
        self.size = size
        self.out_size = geometry.out_size(size)
        self.last = last
        self.workspace = workspace

    def format(self, x: Tensor) -> torch.memory_format:
        """That it wants x (b, C, *S) in, and gives its results in."""
        if self.mixed:
            return format_of(x)
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        plain = torch.contiguous_format
        return formats.get(x.dim(), plain) if self.last else plain

    def source_shape(self) -> tuple[int, ...] | None:
        """Of what `source` makes of one sample; None where the products take x itself."""
        return None

    def source(self, x: Tensor) -> Tensor:
        """What the products take for x (b, C, *S)."""
        return x

    @abstractmethod
    def forward(self, source: Tensor, kernels: Tensor, out: Tensor) -> None:
        """Write out (b, o, *S')."""

    def result(self, source: Tensor, kernels: Tensor) -> Tensor:
        """The same as a new tensor, where `returns`."""
        raise NotImplementedError

    @abstractmethod
    def source_grad(
        self, source: Tensor, kernels: Tensor, grad: Tensor, out: Tensor, add: bool
    ) -> None:
        """Write the gradient of the source, or add it. grad: (b, o, *S')."""

    @abstractmethod
    def kernel_grad(self, source: Tensor, grad: Tensor, out: Tensor) -> None:
        """Write the gradient of the kernels."""

    def x_grad(self, source_grad: Tensor, out: Tensor) -> None:
        """Write out, the gradient of x (b, C, *S), where there is a `source_shape`."""
        raise NotImplementedError


class KernelPath(Path):
    """Kernels of a block at a time, with the convolution of one kind.

    last: the layout that it works in; None for that of the larger of x and the kernels.
    """

    def __init__(self, kind: type[Convolution], last: bool | None) -> None:
        self.kind = kind
        self.last = last

    def refuses(self, geometry: ConvGeometry, cell: tuple[int, ...]) -> str | None:
        return self.kind.refuses(geometry, cell)

    def forward(
        self,
        geometry: ConvGeometry,
        x: Tensor,
        attention: Tensor,
        cells: Tensor,
        workspace: Workspace,
    ) -> Tensor:
        conv = self._convolution(geometry, x, workspace)
        mixing = _Mixing(conv, attention, cells, passes=1)
        given, own = format_of(x), conv.format(x)
        x = x.contiguous(memory_format=own)
        shape = (x.shape[0], geometry.kernel[0], *conv.out_size)
        start = workspace.mark()
        if conv.returns and mixing.one_block:
            kernels = mixing.kernels(slice(0, shape[0]), slice(0, mixing.blocks.cell[0]))
            out = conv.result(conv.source(x), kernels)
            workspace.release(start)
        else:
            out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=own)
            for samples, channels in mixing.sequence():
                if channels.start == 0 or conv.source_shape() is None:
                    workspace.release(start)
                    source = conv.source(x[samples])
                inner = workspace.mark()
                kernels = mixing.kernels(samples, channels)
                for cell, part in mixing.parts(out[samples], channels):
                    conv.forward(source, kernels[:, cell], part)
                workspace.release(inner)
            workspace.release(start)
        return out.contiguous(memory_format=given)

    def backward(
        self,
        geometry: ConvGeometry,
        grad: Tensor,
        x: Tensor,
        attention: Tensor,
        cells: Tensor,
        workspace: Workspace,
        needs: Needs,
        cells_grad: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        conv = self._convolution(geometry, x, workspace)
        mixing = _Mixing(conv, attention, cells, passes=3 / 2)
        given, own = format_of(x), conv.format(x)
        x = x.contiguous(memory_format=own)
        grad = grad.contiguous(memory_format=own)
        x_grad = torch.empty_like(x, memory_format=own) if needs.x else None
        attention_grad = mixing.attention_grad() if needs.attention else None
        source_shape = conv.source_shape()
        start = workspace.mark()
        for samples, channels in mixing.sequence():
            if channels.start == 0 or source_shape is None:
                workspace.release(start)
                source = conv.source(x[samples])
                target = None if x_grad is None else x_grad[samples]
                if target is not None and source_shape is not None:
                    target = workspace.take(source.shape[0], *source_shape)
            inner = workspace.mark()
            parts = mixing.parts(grad[samples], channels)
            if target is not None:
                kernels = mixing.kernels(samples, channels)
                for number, (cell, part) in enumerate(parts):
                    add = number > 0 or channels.start > 0
                    conv.source_grad(source, kernels[:, cell], part, target, add)
                workspace.release(inner)
            if needs.attention or needs.cells:
                found = workspace.take(*mixing.shape(samples, channels))
                for cell, part in parts:
                    conv.kernel_grad(source, part, found[:, cell])
                mixing.backward(found, samples, channels, attention_grad, cells_grad)
                workspace.release(inner)
            whole = channels.stop == mixing.blocks.cell[0]
            if x_grad is not None and target is not None and source_shape is not None and whole:
                conv.x_grad(target, x_grad[samples])
        workspace.release(start)
        return (
            None if x_grad is None else x_grad.contiguous(memory_format=given),
            None if attention_grad is None else mixing.as_attention(attention_grad),
        )

    def _convolution(self, geometry: ConvGeometry, x: Tensor, workspace: Workspace) -> Convolution:
        last = self.last
        if last is None:
            # Kernels are copied by rows into this layout, by single numbers into the other.
            last = format_of(x) != torch.contiguous_format or (
                math.prod(geometry.kernel) > math.prod(x.shape[1:])
            )
        return self.kind(geometry, tuple(x.shape[2:]), last, workspace)


class _Mixing:
    """Kernels of blocks of samples and output channels, and the gradients behind them."""

    def __init__(self, conv: Convolution, attention: Tensor, cells: Tensor, passes: float) -> None:
        """passes: products with the cells for one with the kernels."""
        geometry = conv.geometry
        self.conv = conv
        self.workspace = conv.workspace
        self.blocks = Blocks.of(geometry.kernel, tuple(cells.shape[1:]))
        self.batch = attention.shape[0]
        self.attention = attention.contiguous().flatten(0, 1)  # (rows, n)
        self.cells = cells.contiguous().flatten(1)  # (n, columns)
        order = _last(self.blocks) if conv.last else _first(self.blocks)
        if conv.mixed:
            order = list(range(len(order)))
        self.order = order
        self.back = sorted(range(len(order)), key=order.__getitem__)
        shape = conv.source_shape()
        self.step, self.width = block_size(
            self.batch,
            self.blocks,
            0 if shape is None else math.prod(shape),
            math.prod(conv.out_size),
            self.workspace.nbytes // attention.element_size(),
            copied=not _stays(self._mixed_shape(slice(0, 2)), order),
            splits=conv.splits,
            mixing=passes * self.cells.shape[0] / math.prod(conv.out_size),
        )

    @property
    def one_block(self) -> bool:
        """Whether all samples and channels go together."""
        return (self.step, self.width) == (self.batch, self.blocks.cell[0])

    def sequence(self) -> list[tuple[slice, slice]]:
        """Blocks: samples, and output channels within every cell.

        All channels of a sample one after the other where a source is made for it; otherwise
        all samples, so that a part of the cells is read once.
        """
        samples = turns(_slices(self.batch, self.step))
        channels = _slices(self.blocks.cell[0], self.width)
        if self.conv.source_shape() is None:
            return [(s, c) for c in channels for s in samples]
        return [(s, c) for s in samples for c in channels]

    def shape(self, samples: slice, channels: slice) -> tuple[int, ...]:
        """Of the kernels of a block."""
        if self.conv.mixed:
            blocks = self.blocks
            taps = math.prod(blocks.spatial)
            return (samples.stop - samples.start, taps, blocks.out, blocks.inn, *blocks.cell[:2])
        outputs = self.blocks.out * (channels.stop - channels.start)
        inputs, *spatial = self.conv.geometry.kernel[1:]
        inner = (*spatial, inputs) if self.conv.last else (inputs, *spatial)
        return (samples.stop - samples.start, outputs, *inner)

    def parts(self, outputs: Tensor, channels: slice) -> list[tuple[slice, Tensor]]:
        """Where a block's kernels lie in (b, C_out, *S'): (output channels of the block, part)."""
        width, cell = channels.stop - channels.start, self.blocks.cell[0]
        if width == cell:
            return [(slice(None), outputs)]
        return [
            (
                slice(block * width, (block + 1) * width),
                outputs[:, block * cell + channels.start : block * cell + channels.stop],
            )
            for block in range(self.blocks.out)
        ]

    def kernels(self, samples: slice, channels: slice) -> Tensor:
        """A block's kernels, in the layout of the convolution."""
        columns = self._columns(channels)
        rows = self._rows(samples)
        mixed = self.workspace.take(rows.stop - rows.start, columns.stop - columns.start)
        torch.mm(self.attention[rows], self.cells[:, columns], out=mixed)
        return self._arranged(
            mixed.view(self._mixed_shape(channels)), self.order, self.shape(samples, channels)
        )

    def attention_grad(self) -> Tensor:
        """Zeros (n, rows), in which `backward` adds up."""
        # Transposed: E dW^T runs 1.5 times as fast as dW E^T.
        shape = (self.cells.shape[0], self.attention.shape[0])
        return torch.zeros(shape, dtype=wide(self.attention.dtype), device=self.attention.device)

    def as_attention(self, found: Tensor) -> Tensor:
        """(n, rows) as (B, m, n)."""
        found = found.t().to(self.attention.dtype)
        return found.reshape(self.batch, self.blocks.mixtures, -1)

    def backward(
        self,
        kernel_grad: Tensor,
        samples: slice,
        channels: slice,
        attention_grad: Tensor | None,
        cells_grad: Tensor | None,
    ) -> None:
        """Add a block's share to the gradients of attention (n, rows) and cells."""
        columns, rows = self._columns(channels), self._rows(samples)
        arranged = [self._mixed_shape(channels)[axis] for axis in self.order]
        mixed = self._arranged(
            kernel_grad.reshape(-1, *arranged[1:]),
            self.back,
            (rows.stop - rows.start, columns.stop - columns.start),
        )
        if attention_grad is not None:
            add_product_(attention_grad[:, rows], self.cells[:, columns], mixed.t())
        if cells_grad is not None:
            found = cells_grad.flatten(1)[:, columns]
            add_product_(found, self.attention[rows].t(), mixed)

    def _rows(self, samples: slice) -> slice:
        return slice(samples.start * self.blocks.mixtures, samples.stop * self.blocks.mixtures)

    def _columns(self, channels: slice) -> slice:
        return slice(channels.start * self.blocks.row, channels.stop * self.blocks.row)

    def _mixed_shape(self, channels: slice) -> tuple[int, ...]:
        blocks = self.blocks
        cell = (channels.stop - channels.start, *blocks.cell[1:])
        return (-1, *blocks.spatial, blocks.out, blocks.inn, *cell)

    def _arranged(self, kernels: Tensor, order: list[int], shape: tuple[int, ...]) -> Tensor:
        """With other axes and that shape, copied only where that needs a copy."""
        kernels = kernels.permute(order)
        if kernels.is_contiguous():
            return kernels.view(shape)
        copy = self.workspace.take(*kernels.shape)
        copy.copy_(kernels)
        return copy.view(shape)


def block_size(
    batch: int,
    blocks: Blocks,
    source: int,
    positions: int,
    capacity: int,
    copied: bool,
    splits: bool,
    mixing: float,
) -> tuple[int, int]:
    """Samples, and output channels within every cell, of a block.

    source: numbers per sample that the convolution makes of x. positions: of the output.
    capacity: of the workspace, in numbers. copied: whether kernels are held twice. splits:
    whether channels may be split. mixing: multiply-adds of it for one of the convolution.
    """
    share = capacity // (2 if copied else 1)
    near = source > 0 or positions < FEW_POSITIONS
    if near:
        share //= 2
    cell = blocks.cell[0]
    per_channel = blocks.mixtures * blocks.row
    most = min(batch, max(1, capacity // (2 * source))) if source else batch
    samples = min(most, max(1, share // (per_channel * cell)))
    if not splits or samples == batch or samples * blocks.mixtures >= _ROWS:
        return _even(batch, samples), cell
    # Few rows make mixing slow: rather more samples, and fewer channels.
    least = min(cell, _CHANNELS)
    wanted = -(-share // (per_channel * least))
    if near and wanted * blocks.mixtures < _ROWS and mixing > _MUCH_MIXING:
        least = min(cell, _FEW_CHANNELS)
        wanted = -(-share // (per_channel * least))
    samples = min(most, max(samples, wanted))
    # A few samples more than fit beat another turn.
    samples = batch if samples < batch <= 1.2 * samples <= 1.2 * most else _even(batch, samples)
    width = _even(cell, min(cell, -(-share // (per_channel * samples))))
    return samples, min(cell, -(-width // _VECTOR) * _VECTOR)


def _even(length: int, step: int) -> int:
    """The step that needs as many steps and makes them even."""
    return -(-length // -(-length // step))


def _stays(shape: tuple[int, ...], order: list[int]) -> bool:
    """Whether an array of that shape is contiguous in another order of its axes."""
    moved = [axis for axis in order if shape[axis] != 1]
    return moved == sorted(moved)


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(length, start + step)) for start in range(0, length, step)]


def _axes(blocks: Blocks) -> tuple[list[int], list[int], list[int]]:
    """Axes of (b, *s, out, in, c_out, c_in, *k): outputs, inputs, positions."""
    rank = len(blocks.spatial)
    out = 1 + rank
    positions = [axis for d in range(rank) for axis in (1 + d, out + 4 + d)]
    return [out, out + 2], [out + 1, out + 3], positions


def _first(blocks: Blocks) -> list[int]:
    outputs, inputs, positions = _axes(blocks)
    return [0, *outputs, *inputs, *positions]


def _last(blocks: Blocks) -> list[int]:
    outputs, inputs, positions = _axes(blocks)
    return [0, *outputs, *positions, *inputs]
