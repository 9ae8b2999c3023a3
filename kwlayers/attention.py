"""The contrasting-driven attention: which cells, with which sign, for each mixture.

arXiv 2406.07879, section 3.3. For an input x with C channels, hidden width h, m mixtures and
n cells plus one zero cell:

    u = relu(norm(fc1(mean of x over positions)))       (B, h)
    z = fc2(u), viewed (B, m, n + 1)
    alpha = z / (sum_j |z_ij| + 1e-3)                   signed, no softmax
    alpha = (1 - tau) * alpha + tau * beta              tau: temperature, beta: assignment
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwlayers import geometry
from kwlayers.dcac import valid_frames
from kwlayers.dynamic import kaiming_normal_
from kwlayers.ops import triton_attention
from kwlayers.ops.device import device_type
from kwlayers.ops.dispatch import triton_available
from kwlayers.ops.triton_conv import DTYPES as TRITON_DTYPES
from kwlayers.schedule import Tempered


class Attention(Tempered):
    """alpha (B, m, n) for an input (B, C, *S).

    in_channels: C. num_mixtures: m. num_cells: n. assignment: the cell that each mixture
    equals at temperature 1 (n is the zero cell). total_mixtures, ratio: of the warehouse; they
    decide which columns are the layer's own when basis_ratio < 1.
    norm: "batch" or "layer". `temperature` is a buffer, 0 until something sets it.
    """

    assignment: Tensor

    def __init__(
        self,
        in_channels: int,
        num_mixtures: int,
        num_cells: int,
        assignment: geometry.Assignment,
        *,
        total_mixtures: int,
        ratio: float | None = None,
        reduction: float = 1 / 16,
        basis_ratio: float = 1.0,
        norm: str = "batch",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"reduction": reduction, "basis_ratio": basis_ratio}.items():
            if not value > 0:
                raise ValueError(f"{name} {value}: it must be above 0")
        kwargs: Any = {"device": device, "dtype": dtype}
        self.in_channels = in_channels
        self.num_mixtures = num_mixtures
        self.num_cells = num_cells
        hidden = geometry.hidden_width(in_channels, reduction)
        self.fc1 = nn.Linear(in_channels, hidden, bias=norm == "layer", **kwargs)
        self.norm = norm_of(norm, hidden, device, dtype)
        columns = num_cells + 1
        self.basis: geometry.Basis | None = None
        if basis_ratio >= 1:
            self.fc2 = nn.Linear(hidden, num_mixtures * columns, **kwargs)
        else:
            split = geometry.basis(num_mixtures, num_cells, total_mixtures, ratio, basis_ratio)
            self.basis = split
            width = split.local + split.width + 1
            self.fc2 = nn.Linear(hidden, num_mixtures * width, bias=False, **kwargs)
            with warnings.catch_warnings():
                # A warehouse without other layers' cells has an empty expansion.
                warnings.filterwarnings("ignore", "Initializing zero-element tensors")
                self.fc3 = nn.Linear(split.width, split.nonlocal_cells, bias=False, **kwargs)
            self.bias = nn.Parameter(torch.zeros(num_mixtures * columns, **kwargs))
            self.start = min(assignment.start, split.nonlocal_cells)
        self._beta = assignment.cells
        self._add_temperature(**kwargs)
        self.register_buffer("assignment", torch.tensor(assignment.cells, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-normal (fan out) weights, zero biases; norms at one and zero; buffers as made."""
        self.temperature.zero_()
        self.assignment.copy_(torch.tensor(self._beta))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if module.weight.numel():
                    kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.norm.reset_parameters()
        if self.basis is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, *S)  out: (B, m, n)."""
        fused = _fuses(x)
        padded = bool(_lengths) and x.dim() == 3
        plain = self.basis is None and x.dtype in TRITON_DTYPES and not padded
        if fused and plain and not self.training and not torch.is_grad_enabled():
            return triton_attention.attention_eval(self, x)
        hidden = F.relu(self.norm(self.fc1(pooled(x))))
        z = self._columns(self.fc2(hidden).unflatten(-1, (self.num_mixtures, -1)))
        if fused:
            return triton_attention.normalise(z, self.temperature, self.assignment)
        # The zero cell's own column is in the norm, but mixes nothing.
        alpha = z[..., :-1] / (torch.linalg.vector_norm(z, 1, dim=-1, keepdim=True) + 1e-3)
        columns = torch.arange(self.num_cells, device=z.device)
        beta = (self.assignment[:, None] == columns).to(alpha.dtype)
        return torch.lerp(alpha, beta, self.temperature.to(alpha.dtype))

    def _columns(self, z: Tensor) -> Tensor:
        """Expand the basis to one column per cell, in warehouse order, the zero cell last."""
        if self.basis is None:
            return z
        local, width = self.basis.local, self.basis.width
        own, shared, zero = torch.split(z, [local, width, 1], dim=-1)
        others = self.fc3(shared)
        before, after = others[..., : self.start], others[..., self.start :]
        z = torch.cat((before, own, after, zero), dim=-1)
        return z + self.bias.view(self.num_mixtures, -1)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, num_mixtures={self.num_mixtures}, num_cells={self.num_cells}"


# Of sequences that are padded, the lengths; the last holds.
_lengths: list[Tensor] = []


@contextmanager
def pooling_over(lengths: Tensor | None) -> Iterator[None]:
    """While it lasts, means over sequences (B, C, T) are of the first `lengths` (B,) of their
    positions: what follows is padding. None changes nothing.

    It is of the process, not of a thread. A checkpoint around a layer runs it again without.
    """
    if lengths is None:
        yield
        return
    _lengths.append(lengths)
    try:
        yield
    finally:
        _lengths.pop()


def pooled(x: Tensor) -> Tensor:
    """(B, C, *S) -> (B, C): the mean over positions (of sequences see `pooling_over`)."""
    if x.dim() == 2:
        return x
    if _lengths and x.dim() == 3:
        lengths = _lengths[-1].to(x.device)
        kept = x.masked_fill(~valid_frames(lengths, x.shape[0], x.shape[2])[:, None], 0)
        total = (kept.float() if x.element_size() < 4 else kept).sum(2)
        return total.div(lengths[:, None]).to(x.dtype)
    positions = tuple(range(2, x.dim()))
    if x.element_size() < 4:
        return x.mean(positions)  # a sum may leave the range of float16
    # The gradient of a mean is as large as x; that of a sum is a view.
    return x.sum(positions) / x.shape[2:].numel()


def pooled_parts(x: Tensor, parts: int) -> Tensor:
    """(B, C, T) -> (B, C * parts): means over parts of the positions (see `pooling_over`)."""
    if not _lengths:
        return F.adaptive_avg_pool1d(x, parts).flatten(1)
    own = (row[None, :, :n] for row, n in zip(x, _lengths[-1].tolist(), strict=True))
    return torch.cat([F.adaptive_avg_pool1d(one, parts).flatten(1) for one in own])


def _fuses(x: Tensor) -> bool:
    """Whether Triton's kernels take over: on a GPU; a compiled graph is fused by its compiler."""
    on_gpu = device_type(x) == "cuda"
    return on_gpu and triton_available() and not torch.compiler.is_compiling()


class _BatchNorm1d(nn.BatchNorm1d):
    """Trains on a batch of one, too: with running statistics, which it leaves alone."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[0] <= 1:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(x)


def norm_of(
    name: str, width: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.BatchNorm1d | nn.LayerNorm:
    if name == "batch":
        return _BatchNorm1d(width, device=device, dtype=dtype)
    if name == "layer":
        return nn.LayerNorm(width, device=device, dtype=dtype)
    raise ValueError(f"norm {name!r}: allowed are 'batch' and 'layer'")
