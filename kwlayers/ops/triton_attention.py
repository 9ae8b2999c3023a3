"""The attention branch in few Triton kernels: all of it for inference, its end for training.

    attention_eval    mean; fc1, norm, relu, fc2 and `normalise`      two kernels, no gradients
    normalise         alpha = (1 - tau) z / (sum_j |z_j| + 1e-3) + tau beta      one kernel each way

They compute in float32, `normalise` of float64 in float64. Nothing waits for the GPU: temperature
and assignment are read there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, no_type_check

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kwlayers.ops.triton_conv import DTYPES, jit, launch

if TYPE_CHECKING:
    from kwlayers.attention import Attention

tl: Any = None  # triton.language, which `jit` puts here


# Inference ---------------------------------------------------------------------------


def attention_eval(module: Attention, x: Tensor) -> Tensor:
    """What `module.eval()` makes of x. x: (B, C, *S) or (B, C)  out: (B, m, n), as x's dtype.

    No gradients. Batch norm uses running statistics whatever the mode. Raises ValueError for a
    module with a basis (basis_ratio < 1), and for dtypes other than `DTYPES`.
    """
    if module.basis is not None:
        raise ValueError("basis_ratio below 1: the fused attention needs one column per cell")
    if x.dtype not in DTYPES:
        raise ValueError(f"{x.dtype}: allowed are {', '.join(map(str, DTYPES))}")
    with torch.no_grad():
        return _head(module, _mean(x), x.dtype)


def _mean(x: Tensor) -> Tensor:
    """x: (B, C, *S)  out: (B, C), float32."""
    batch, channels = x.shape[:2]
    x = x.flatten(2) if x.dim() > 2 else x[..., None]  # a view, but of exotic strides
    out = torch.empty(batch, channels, dtype=torch.float32, device=x.device)
    positions = x.shape[2]
    # Neighbouring threads read neighbouring numbers, and few programs are to be too few.
    along_channels = x.stride(1) == 1
    block_c = min(_power(channels), 32) if along_channels else min(_power(channels), 4)
    block_p = min(_power(positions), 128 if along_channels else 512)
    tiles = -(-channels // block_c)
    if out.numel():
        launch(
            functools.partial(_compiled, _mean_kernel),
            lambda _: (batch * tiles,),
            x,
            out,
            C=channels,
            P=positions,
            x_b=x.stride(0),
            x_c=x.stride(1),
            x_p=x.stride(2),
            BLOCK_C=block_c,
            BLOCK_P=block_p,
        )
    return out


def _head(module: Attention, pooled: Tensor, dtype: torch.dtype) -> Tensor:
    """pooled: (B, C)  out: (B, m, n)."""
    batch, channels = pooled.shape
    mixtures, cells = module.num_mixtures, module.num_cells
    out = torch.empty(batch, mixtures, cells, dtype=dtype, device=pooled.device)
    norm, first, second = module.norm, module.fc1, module.fc2
    batch_norm = isinstance(norm, nn.BatchNorm1d)
    mean, variance = first.weight, first.weight  # of no meaning, for layer norm
    if isinstance(norm, nn.BatchNorm1d):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, variance = norm.running_mean, norm.running_var
    columns = _power(cells + 1)
    block_m = min(_power(mixtures), max(256 // columns, 1))
    tiles = -(-mixtures // block_m)
    if out.numel():
        launch(
            functools.partial(_compiled, _head_kernel),
            lambda _: (batch * tiles,),
            pooled,
            first.weight.contiguous(),
            first.weight if first.bias is None else first.bias,
            norm.weight,
            norm.bias,
            mean,
            variance,
            second.weight.contiguous(),
            second.bias,
            module.temperature,
            module.assignment,
            out,
            C=channels,
            H=first.out_features,
            M=mixtures,
            N=cells,
            EPS=norm.eps,
            BATCH_NORM=batch_norm,
            FIRST_BIAS=first.bias is not None,
            BLOCK_C=min(_power(channels), 64),
            HIDDEN=_power(first.out_features),
            BLOCK_H=min(_power(first.out_features), 16),
            BLOCK_M=block_m,
            COLUMNS=columns,
        )
    return out


# Training ----------------------------------------------------------------------------


def normalise(z: Tensor, temperature: Tensor, assignment: Tensor) -> Tensor:
    """z: (B, m, n + 1)  temperature: ()  assignment: (m,)  out: (B, m, n), as z's dtype.

    Differentiable once, by z only.
    """
    out: Tensor = _Normalise.apply(z, temperature, assignment)  # type: ignore[no-untyped-call]
    return out


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: Tensor, assignment: Tensor) -> Tensor:
        z = z.contiguous()
        ctx.save_for_backward(z, temperature)
        out = z.new_empty(*z.shape[:-1], z.shape[-1] - 1)
        _rows(_normalise_kernel, z, temperature, assignment, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        z, temperature = ctx.saved_tensors
        out = torch.empty_like(z)
        _rows(_normalise_grad_kernel, z, temperature, grad.contiguous(), out)
        return out, None, None


def _rows(
    kernel: Callable[..., Any], z: Tensor, temperature: Tensor, third: Tensor, out: Tensor
) -> None:
    """Launch over all rows of z (B, m, n + 1)."""
    batch, mixtures, columns = z.shape
    rows = batch * mixtures
    block_j = _power(columns)
    block_r = min(_power(rows), max(1024 // block_j, 1))
    if out.numel():
        launch(
            functools.partial(_compiled, kernel),
            lambda _: (-(-rows // block_r),),
            z,
            temperature,
            third,
            out,
            ROWS=rows,
            M=mixtures,
            N=columns - 1,
            DOUBLE=z.dtype == torch.float64,
            BLOCK_R=block_r,
            BLOCK_J=block_j,
        )


# Triton ------------------------------------------------------------------------------


@no_type_check
def _mean_kernel(x, out, C, P, x_b, x_c, x_p, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """One sample's BLOCK_C channels."""
    tiles = tl.cdiv(C, BLOCK_C)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for first in range(0, P, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        total += tl.load(
            x + sample * x_b + (p * x_p)[:, None] + (c * x_c)[None, :],
            mask=(p < P)[:, None] & (c < C)[None, :],
            other=0.0,
        ).to(tl.float32)
    tl.store(out + sample * C + c, tl.sum(total, axis=0) / P, mask=c < C)


@no_type_check
def _head_kernel(
    pooled,
    first,
    first_bias,
    norm_weight,
    norm_bias,
    norm_mean,
    norm_variance,
    second,
    second_bias,
    temperature,
    assignment,
    out,
    C,
    H,
    M,
    N,
    EPS,
    BATCH_NORM: tl.constexpr,
    FIRST_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One sample's BLOCK_M mixtures. Each program has fc1 to itself: it is small."""
    tiles = tl.cdiv(M, BLOCK_M)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    h = tl.arange(0, HIDDEN)
    hidden = tl.zeros((HIDDEN,), dtype=tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mean = tl.load(pooled + sample * C + c, mask=c < C, other=0.0)
        weights = tl.load(
            first + (h * C)[:, None] + c[None, :],
            mask=(h < H)[:, None] & (c < C)[None, :],
            other=0.0,
        )
        hidden += tl.sum(weights.to(tl.float32) * mean[None, :], axis=1)
    if FIRST_BIAS:
        hidden += tl.load(first_bias + h, mask=h < H, other=0.0).to(tl.float32)
    if BATCH_NORM:
        centre = tl.load(norm_mean + h, mask=h < H, other=0.0).to(tl.float32)
        variance = tl.load(norm_variance + h, mask=h < H, other=1.0).to(tl.float32)
    else:
        centre = tl.sum(hidden, axis=0) / H  # hidden is 0 beyond H
        variance = tl.sum(tl.where(h < H, (hidden - centre) * (hidden - centre), 0.0), axis=0) / H
    scale = tl.load(norm_weight + h, mask=h < H, other=0.0).to(tl.float32)
    shift = tl.load(norm_bias + h, mask=h < H, other=0.0).to(tl.float32)
    hidden = tl.maximum((hidden - centre) * tl.rsqrt(variance + EPS) * scale + shift, 0.0)

    # Rows of fc2 in a tile: a power of two of columns for each mixture.
    row = tl.arange(0, BLOCK_M * COLUMNS)
    mixture = tl.program_id(0) % tiles * BLOCK_M + row // COLUMNS
    inside = (mixture < M) & (row % COLUMNS <= N)
    from_row = mixture * (N + 1) + row % COLUMNS
    z = tl.load(second_bias + from_row, mask=inside, other=0.0).to(tl.float32)
    for start in range(0, HIDDEN, BLOCK_H):
        part = start + tl.arange(0, BLOCK_H)
        # A tensor in registers has no slices: the sum picks this part of it.
        picked = tl.sum(tl.where(h[:, None] == part[None, :], hidden[:, None], 0.0), axis=0)
        weights = tl.load(
            second + (from_row * H)[:, None] + part[None, :],
            mask=inside[:, None] & (part < H)[None, :],
            other=0.0,
        )
        z += tl.sum(weights.to(tl.float32) * picked[None, :], axis=1)

    z = tl.reshape(z, (BLOCK_M, COLUMNS))
    j = tl.arange(0, COLUMNS)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    tau = tl.load(temperature).to(tl.float32)
    chosen = tl.load(assignment + m, mask=m < M, other=0)
    beta = (chosen[:, None] == j[None, :]).to(tl.float32)
    norm = tl.sum(tl.abs(z), axis=1) + 1e-3
    tl.store(
        out + (sample * M + m)[:, None] * N + j[None, :],
        ((1 - tau) * z / norm[:, None] + tau * beta).to(out.dtype.element_ty),
        mask=(m < M)[:, None] & (j < N)[None, :],
    )


@no_type_check
def _normalise_kernel(
    z,
    temperature,
    assignment,
    out,
    ROWS,
    M,
    N,
    DOUBLE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """BLOCK_R rows of z (ROWS, N + 1), which is contiguous."""
    wide: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    j = tl.arange(0, BLOCK_J)
    values = tl.load(
        z + (r * (N + 1))[:, None] + j[None, :],
        mask=(r < ROWS)[:, None] & (j <= N)[None, :],
        other=0.0,
    ).to(wide)
    tau = tl.load(temperature).to(wide)
    chosen = tl.load(assignment + r % M)
    beta = (chosen[:, None] == j[None, :]).to(wide)
    norm = tl.sum(tl.abs(values), axis=1) + 1e-3
    tl.store(
        out + (r * N)[:, None] + j[None, :],
        ((1 - tau) * values / norm[:, None] + tau * beta).to(out.dtype.element_ty),
        mask=(r < ROWS)[:, None] & (j < N)[None, :],
    )


@no_type_check
def _normalise_grad_kernel(
    z,
    temperature,
    grad,
    out,
    ROWS,
    M,
    N,
    DOUBLE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """dz_j = (1 - tau) (g_j - sign(z_j) sum_k g_k z_k / norm) / norm, for the same rows."""
    wide: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    j = tl.arange(0, BLOCK_J)
    at = (r * (N + 1))[:, None] + j[None, :]
    inside = (r < ROWS)[:, None] & (j <= N)[None, :]
    values = tl.load(z + at, mask=inside, other=0.0).to(wide)
    slopes = tl.load(
        grad + (r * N)[:, None] + j[None, :],
        mask=(r < ROWS)[:, None] & (j < N)[None, :],
        other=0.0,
    ).to(wide)
    tau = tl.load(temperature).to(wide)
    norm = tl.sum(tl.abs(values), axis=1) + 1e-3
    along = tl.sum(slopes * values, axis=1) / norm
    sign = (values > 0).to(wide) - (values < 0).to(wide)
    result = (1 - tau) * (slopes - sign * along[:, None]) / norm[:, None]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@functools.cache
def _compiled(kernel: Callable[..., Any]) -> Any:
    return jit(kernel)


def _power(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(number - 1, 0).bit_length()
