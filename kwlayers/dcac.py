"""DCAC: a depthwise temporal convolution whose kernel is made for every frame. [recon]

The paper (Liu et al., DESign, arXiv 2507.03339) has no public code, and its equations were not at
hand: this is our reconstruction from the abstract, which says that kernels adapt to each frame by
context and by motion between frames. For x (B, C, T, N), N positions of a frame, k taps, G groups
of channels and h = max(C // reduction, 16):

    d = mean of x over N                                             (B, C, T)
    m_t = d_t - d_{t-1}, m_0 = 0                                     motion
    a = relu(norm(conv3([d; m])) + linear(mean of d over T))         (B, h, T), conv3 without bias
    D = conv1(a)                                                     (B, G, k, T), starts at zero
    y_t = sum_j W_cj (1 + D_gjt) x_{t+j-k//2}                        zeros before and after
    out = x + norm(y)                                                its scale starts at zero

    parameters  C*k + 6*C*h + 2*h + (C*h + h) + h*G*k + G*k + 2*C
    MACs        T * (6*C*h + h*G*k) + C*h + k*C*T*N

The C*k*T products that modulate W are not counted as MACs. The sum over taps is elementwise, so
counters that see only convolutions and matrix products leave out k*C*T*N, too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwlayers.context import Steering

_LEAST_WIDTH = 16  # of the context


def dcac_params(
    channels: int, kernel_size: int = 5, reduction: int = 4, groups: int | None = None
) -> int:
    """Parameters of a `DCAC` with these settings. [recon]"""
    h = _context_width(channels, reduction)
    taps = (channels if groups is None else groups) * kernel_size
    context = 6 * channels * h + 2 * h + (channels * h + h)
    return channels * kernel_size + context + (h + 1) * taps + 2 * channels


def dcac_macs(
    channels: int,
    frames: int,
    positions: int = 1,
    kernel_size: int = 5,
    reduction: int = 4,
    groups: int | None = None,
) -> int:
    """MACs of a `DCAC` for one sequence. positions: H * W of a frame. [recon]"""
    h = _context_width(channels, reduction)
    taps = (channels if groups is None else groups) * kernel_size
    context = frames * (6 * channels * h + h * taps) + channels * h
    return context + kernel_size * channels * frames * positions


def _context_width(channels: int, reduction: int) -> int:
    return max(channels // reduction, _LEAST_WIDTH)


class DCAC(Steering):
    """A residual block over time, for sequences and for maps; the identity when it is new. [recon]

    kernel_size: taps, k. reduction: of the context's width. groups: channels of a group have the
    same modulation; None for a group each.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 5,
        reduction: int = 4,
        groups: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        groups = channels if groups is None else groups
        sizes = {
            "channels": channels, "kernel_size": kernel_size, "reduction": reduction,
            "groups": groups,
        }  # fmt: skip
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} {size}: at least 1")
        if channels % groups:
            raise ValueError(f"groups {groups} must divide channels {channels}")
        self.channels = channels
        self.kernel_size = kernel_size
        self.reduction = reduction
        self.groups = groups
        to: Any = {"device": device, "dtype": dtype}
        h = _context_width(channels, reduction)
        self.local_context = nn.Conv1d(2 * channels, h, 3, padding=1, bias=False, **to)
        self.context_norm = nn.BatchNorm1d(h, **to)
        self.global_context = nn.Linear(channels, h, **to)
        self.modulation = nn.Conv1d(h, groups * kernel_size, 1, **to)
        self.weight = nn.Parameter(torch.empty(channels, kernel_size, **to))
        self.norm = nn.BatchNorm2d(channels, **to)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kernels that pass the frame on, without modulation, at a scale of zero."""
        for layer in (self.local_context, self.context_norm, self.global_context, self.norm):
            layer.reset_parameters()
        nn.init.zeros_(self.modulation.weight)
        assert self.modulation.bias is not None
        nn.init.zeros_(self.modulation.bias)
        nn.init.zeros_(self.norm.weight)
        with torch.no_grad():
            self.weight.zero_()
            self.weight[:, self.kernel_size // 2] = 1

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x: (B, C, T) or (B, C, T, H, W)  lengths: (B,)  out: as x.

        With lengths, frames past a sequence's own length change nothing and come out as zeros, and
        norms in training see the others only.
        """
        if x.dim() not in (3, 5) or x.shape[1] != self.channels:
            raise ValueError(
                f"input of shape {tuple(x.shape)}: expected (B, {self.channels}, T) or "
                f"(B, {self.channels}, T, H, W)"
            )
        valid = None
        if lengths is not None:
            valid = valid_frames(lengths.to(x.device), x.shape[0], x.shape[2])
        frames = x[..., None] if x.dim() == 3 else x.flatten(3)
        if valid is not None:
            frames = frames.masked_fill(~valid[:, None, :, None], 0)
        kernels = self._kernels(frames.mean(3), valid).to(frames.dtype)
        y = _convolved(frames, kernels)
        return (frames + normed(self.norm, y, valid)).view_as(x)

    def _kernels(self, d: Tensor, valid: Tensor | None) -> Tensor:
        """d: (B, C, T), zero where not valid  out: (B, C, k, T)."""
        batch, channels, frames = d.shape
        motion = F.pad(d[..., 1:] - d[..., :-1], (1, 0))
        if valid is None:
            mean = d.mean(2)
        else:
            motion = motion.masked_fill(~valid[:, None], 0)
            mean = d.sum(2) / valid.sum(1, keepdim=True)
        local = self.local_context(torch.cat([d, motion], 1))
        local = normed(self.context_norm, local, valid)
        a = F.relu(local + self.global_context(mean)[..., None])
        modulation = self.modulation(a).view(batch, self.groups, 1, self.kernel_size, frames)
        weight = self.weight.view(self.groups, -1, self.kernel_size, 1)
        kernels: Tensor = weight * (1 + modulation)
        return kernels.view(batch, channels, self.kernel_size, frames)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, reduction={self.reduction}, "
            f"groups={self.groups}"
        )


def _convolved(x: Tensor, kernels: Tensor) -> Tensor:
    """x: (B, C, T, N)  kernels: (B, C, k, T)  out: (B, C, T, N).

    Tap by tap over shifted views: windows of all taps together would take k times the input.
    """
    frames, taps = x.shape[2], kernels.shape[2]
    padded = F.pad(x, (0, 0, taps // 2, taps - 1 - taps // 2))
    y = kernels[:, :, 0, :, None] * padded[:, :, :frames]
    for j in range(1, taps):
        y = torch.addcmul(y, kernels[:, :, j, :, None], padded[:, :, j : j + frames])
    return y


def valid_frames(lengths: Tensor, batch: int, frames: int) -> Tensor:
    """Whether a frame belongs to its sequence. lengths: (B,)  out: (B, frames), bool."""
    if lengths.shape != (batch,) or lengths.is_floating_point():
        raise ValueError(
            f"lengths of shape {tuple(lengths.shape)} and type {lengths.dtype}: expected whole "
            f"numbers ({batch},), the frames of each sequence"
        )
    if bool(((lengths < 1) | (lengths > frames)).any()):
        raise ValueError(f"lengths {lengths.tolist()}: each from 1 to the {frames} frames given")
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


def normed(norm: nn.Module, x: Tensor, valid: Tensor | None = None) -> Tensor:
    """`norm(x)`; in training its statistics are those of valid frames, and others become zeros.

    norm: a batch norm of x's rank. x: (B, C, T, *S)  valid: (B, T)  out: (B, C, T, *S)
    """
    out: Tensor
    if valid is None:
        out = norm(x)
    elif norm.training:
        frames = x.movedim(2, 1)
        seen = norm(frames[valid].unsqueeze(2)).squeeze(2)
        out = seen.new_zeros(frames.shape).index_put((valid,), seen).movedim(1, 2)
    else:
        padded = ~valid.view(len(valid), 1, -1, *(1,) * (x.dim() - 3))
        out = norm(x).masked_fill(padded, 0)
    return out
