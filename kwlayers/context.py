"""A context that one block's input gives, and that steers every dynamic part of the block.

Schmid et al., "Dynamic Convolutional Neural Networks as Efficient Pre-trained Audio Models",
IEEE/ACM TASLP 32, 2024, arXiv 2310.15648. For an input (B, C, F, T), a context of H numbers and a
block of e channels:

    s = the means over T, then those over F               (B, C, F + T)
    u = hardswish(norm(joint_conv(s)))                    (B, H, F + T)
    h = mean of u over its F + T positions                (B, H): of dynamic convolutions, Dy-ReLUs
    gates = sigmoid(conv_f(pool(u_F))), sigmoid(conv_t(pool(u_T)))       coordinate attention

    parameters  C*H + 2H (norm) + 2 (H*e + e)
    MACs        C*H*(F + T) + H*e*(F' + T'), with F', T' after the block's stride
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwlayers.ops.dy_relu import dy_relu


class Context(NamedTuple):
    """vector: (B, H)  gates: (B, e, F', 1) and (B, e, 1, T'), each in (0, 1)."""

    vector: Tensor
    gates: tuple[Tensor, Tensor]


class ContextBlock(nn.Module):
    """A block that makes a context of `context_size` numbers and gives it to its dynamic layers.

    Its convolutions are called through `convolve`, so that any of them may take the context.
    """

    context_size: int

    @staticmethod
    def convolve(layer: nn.Module, x: Tensor, context: Context) -> Tensor:
        """`layer(x)`, or `layer(x, context.vector)` where it takes that."""
        takes = getattr(layer, "takes_context", False)
        out: Tensor = layer(x, context.vector) if takes else layer(x)
        return out


class Steering(nn.Module):
    """A module that makes factors or kernels of its input: its own layers stay static."""


class ContextGenerator(Steering):
    """The `Context` of an input (B, C, F, T).

    in_channels: C. context_size: H. channels: e, of the gates. stride: of the block. norm:
    settings of its batch norm.
    """

    def __init__(
        self, in_channels: int, context_size: int, channels: int, stride: int = 1, **norm: Any
    ) -> None:
        super().__init__()
        self.stride = stride
        self.joint_conv = nn.Conv2d(in_channels, context_size, 1, bias=False)
        self.joint_norm = nn.BatchNorm2d(context_size, **norm)
        self.conv_f = nn.Conv2d(context_size, channels, 1)
        self.conv_t = nn.Conv2d(context_size, channels, 1)

    def forward(self, x: Tensor) -> Context:
        bands, frames = x.shape[2:]
        means = x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)
        u = F.hardswish(self.joint_norm(self.joint_conv(torch.cat(means, 2))))
        by_band, by_frame = torch.split(u, [bands, frames], 2)
        gates = self.conv_f(self._pooled(by_band)), self.conv_t(self._pooled(by_frame))
        return Context(u.mean((2, 3)), (gates[0].sigmoid(), gates[1].sigmoid().transpose(2, 3)))

    def _pooled(self, u: Tensor) -> Tensor:
        """(B, H, L, 1) to the block's stride; zeros beside the ends count in the averages."""
        if self.stride == 1:
            return u
        return F.avg_pool2d(u, (3, 1), (self.stride, 1), (1, 0))


class DyReLUB(Steering):
    """Dy-ReLU-B: y = max_m (slope_m x + offset_m), with coefficients of each sample and channel.

    Chen et al., "Dynamic ReLU", ECCV 2020, arXiv 2003.10027; here of a context (B, H):

        theta = 2 sigmoid(coef_net(h)) - 1                (B, C, 2M), each in (-1, 1)
        slopes = theta[:M] + (1, 0, …)   offsets = theta[M:] / 2

    parameters  2M*C (H + 1); MACs 2M*C*H. `lambdas` and `init_v`, the constants, are buffers, as
    published. Coefficients and gates are cast to x's dtype.
    """

    lambdas: Tensor
    init_v: Tensor

    def __init__(self, channels: int, context_size: int, pieces: int = 2) -> None:
        super().__init__()
        if pieces < 1:
            raise ValueError(f"pieces {pieces}: at least 1")
        self.channels = channels
        self.pieces = pieces
        self.coef_net = nn.Sequential(nn.Linear(context_size, 2 * pieces * channels))
        self.register_buffer("lambdas", torch.empty(2 * pieces))
        self.register_buffer("init_v", torch.empty(2 * pieces))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The constants; weights have `coef_net`'s own."""
        self.lambdas.fill_(1.0)[self.pieces :] = 0.5
        self.init_v.zero_()[0] = 1.0

    def forward(self, x: Tensor, context: Tensor, gates: tuple[Tensor, ...] = ()) -> Tensor:
        """x: (B, C, *S)  context: (B, H)  gates: factors of the result  out: (B, C, *S)."""
        theta = 2 * torch.sigmoid(self.coef_net(context)) - 1
        theta = theta.view(-1, self.channels, 2 * self.pieces) * self.lambdas + self.init_v
        slopes, offsets = theta.to(x.dtype).tensor_split(2, -1)
        return dy_relu(x, slopes, offsets, [gate.to(x.dtype) for gate in gates])

    def extra_repr(self) -> str:
        return f"{self.channels}, pieces={self.pieces}"
