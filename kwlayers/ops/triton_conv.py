"""Convolution with one kernel per sample, and its two gradients, as implicit products in Triton.

    conv                y[b, o, p]      = sum_tc  W[b, t, o, c]  x[b, c, p * stride + t]
    conv_input_grad     dx[b, c, q]     = sum_to  W[b, t, o, c]  dy[b, o, (q - t) / stride]
    conv_kernel_grad    dW[b, t, o, c]  = sum_p   dy[b, o, p]    x[b, c, p * stride + t]

Kernels are (B, T, go, gi, co, ci): T taps in row-major order, output channel o = go index * co +
co index, input channel likewise. That is how a matrix product writes them where cells are 1x1.
Each tile of a result belongs to one program, so results repeat bit by bit. No autograd in here.

Triton is imported by the first call and not before: Triton kernels here are plain functions until
`jit` compiles them. TRITON_INTERPRET=1 in the environment before that runs them on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, no_type_check

import torch
from torch import Tensor

from kwlayers.ops.device import stands
from kwlayers.ops.geometry import ConvGeometry
from kwlayers.ops.path import format_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

tl: Any = None  # triton.language, which `jit` puts here


def available(device: torch.device) -> bool:
    """Whether kernels can run there: Triton is installed, and it is a GPU or interpreted."""
    if stands():
        return True
    if importlib.util.find_spec("triton") is None:
        return False
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


# The three products ------------------------------------------------------------------


def conv(x: Tensor, kernels: Tensor, geometry: ConvGeometry) -> Tensor:
    """x: (B, C, *S)  kernels: (B, T, go, gi, co, ci)  out: (B, go * co, *S'), laid out as x.

    Any strides. Raises ValueError for groups, and for dtypes other than `DTYPES`.
    """
    _check(geometry, tuple(kernels.shape), x.shape[0], x, kernels)
    out = _empty(x, geometry.kernel[0], geometry.out_size(tuple(x.shape[2:])))
    axes = [
        _Axis(taps, stride, -padding, dilation)
        for taps, stride, padding, dilation in zip(
            geometry.kernel[2:], geometry.stride, geometry.padding, geometry.dilation, strict=True
        )
    ]
    _product(x, _by_axis(kernels, geometry), out, axes)
    return out


def conv_input_grad(
    grad: Tensor, kernels: Tensor, geometry: ConvGeometry, size: tuple[int, ...]
) -> Tensor:
    """grad: (B, C_out, *S')  kernels: (B, T, go, gi, co, ci)  out: (B, C, *size), laid out as grad.

    size: positions of x.
    """
    _check(geometry, tuple(kernels.shape), grad.shape[0], grad, kernels)
    _check_grad(geometry, size, grad)
    # A stride sees the positions of x in turns, each turn with taps of its own, at distances that
    # divide evenly: every turn is a convolution of `grad` without a stride.
    turns = [
        _turns(*numbers)
        for numbers in zip(
            geometry.kernel[2:], geometry.stride, geometry.padding, geometry.dilation, strict=True
        )
    ]
    out = _empty(grad, geometry.kernel[1], size)
    if not all(turn.axis.taps for turn in itertools.chain(*turns)):
        out.zero_()
    whole = _by_axis(kernels, geometry).transpose(4, 5).transpose(6, 7)
    every = slice(None)
    for turn in itertools.product(*turns):
        taps = (every,) * (4 - len(turn)) + tuple(axis_turn.taps for axis_turn in turn)
        positions = (every, every, *(axis_turn.positions for axis_turn in turn))
        _product(grad, whole[taps], out[positions], [axis_turn.axis for axis_turn in turn])
    return out


def conv_kernel_grad(
    x: Tensor, grad: Tensor, kernels_shape: Sequence[int], geometry: ConvGeometry
) -> Tensor:
    """x: (B, C, *S)  grad: (B, C_out, *S')  out: kernels_shape, (B, T, go, gi, co, ci), dense."""
    shape = tuple(kernels_shape)
    _check(geometry, shape, x.shape[0], x, grad)
    _check_grad(geometry, tuple(x.shape[2:]), grad)
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    x, grad = _three_axes(x), _three_axes(grad)
    _check_offsets(x, grad, out)
    batch, taps, _, _, out_cell, in_cell = shape
    channels = geometry.kernel[:2]
    sizes = tuple(grad.shape[2:])
    arguments = {
        "OUT": geometry.kernel[0],
        "IN": geometry.kernel[1],
        "OUT_CELL": out_cell,
        "IN_CELL": in_cell,
        "U0": sizes[0],
        "U1": sizes[1],
        "U2": sizes[2],
        **_numbers("S", x.shape[2:]),
        **_numbers("K", _padded(geometry.kernel[2:], 1)),
        **_numbers("STEP", _padded(geometry.stride, 1)),
        **_numbers("START", [-padding for padding in _padded(geometry.padding, 0)]),
        **_numbers("DILATION", _padded(geometry.dilation, 1)),
        **_strides("x", x, "bc012"),
        **_strides("grad", grad, "bc012"),
        **_strides("out", out, ("b", "t", "out_block", "in_block", "out_cell", "in_cell")),
        "PRECISION": _precision(x.dtype),
    }

    def grid(meta: Mapping[str, int]) -> tuple[int]:
        tiles = -(-channels[0] // meta["BLOCK_O"]) * -(-channels[1] // meta["BLOCK_C"])
        return (batch * taps * tiles,)

    launch(functools.partial(_compiled, "kernel_grad"), grid, x, grad, out, **arguments)
    return out


class _Axis(NamedTuple):
    """Along one axis, output u sees position u * step + start + tap * dilation of the source."""

    taps: int
    step: int
    start: int
    dilation: int


class _Turn(NamedTuple):
    """Every stride-th position of x along one axis, and the taps that reach those."""

    positions: slice
    taps: slice
    axis: _Axis


def _turns(kernel: int, stride: int, padding: int, dilation: int) -> list[_Turn]:
    """q = u * stride + phase is seen by tap t from (q + padding - t * dilation) / stride."""
    found = []
    for phase in range(stride):
        taps = [t for t in range(kernel) if (phase + padding - t * dilation) % stride == 0]
        first = taps[0] if taps else 0
        between = taps[1] - taps[0] if len(taps) > 1 else stride
        axis = _Axis(
            len(taps),
            1,
            (phase + padding - first * dilation) // stride,
            -between * dilation // stride,
        )
        last = first + between * (len(taps) - 1) + 1 if taps else first
        found.append(_Turn(slice(phase, None, stride), slice(first, last, between), axis))
    return found


def _product(source: Tensor, kernels: Tensor, out: Tensor, axes: Sequence[_Axis]) -> None:
    """out[b, n, u] = sum over t and k of source[b, k, axes(u, t)] kernels[b, t, n, k].

    source: (B, K, *S)  kernels: (B, *T, n blocks, k blocks, n cell, k cell), always three T
    out: (B, N, *U)
    """
    if not out.numel() or not kernels.numel():
        return  # an empty batch, or a turn that no tap reaches
    source, out = _three_axes(source), _three_axes(out)
    _check_offsets(source, kernels, out)
    axes = [_Axis(1, 1, 0, 1)] * (3 - len(axes)) + list(axes)
    batch, *taps, out_blocks, in_blocks, out_cell, in_cell = kernels.shape
    arguments = {
        "N": out_blocks * out_cell,
        "N_CELL": out_cell,
        "K_BLOCKS": in_blocks,
        "K_CELL": in_cell,
        **_numbers("U", out.shape[2:]),
        **_numbers("S", source.shape[2:]),
        **_numbers("STEP", [axis.step for axis in axes]),
        **_numbers("START", [axis.start for axis in axes]),
        **_numbers("DILATION", [axis.dilation for axis in axes]),
        **_strides("source", source, "bc012"),
        **_strides("kernels", kernels, ("b", *"012", "n_block", "k_block", "n_cell", "k_cell")),
        **_strides("out", out, "bc012"),
        **_numbers("T", taps),
        **_numbers("EDGES", map(_sees_edges, axes, source.shape[2:], out.shape[2:])),
        "PRECISION": _precision(source.dtype),
    }
    channels, positions = out.shape[1], math.prod(out.shape[2:])

    def grid(meta: Mapping[str, int]) -> tuple[int]:
        tiles = -(-positions // meta["BLOCK_P"]) * -(-channels // meta["BLOCK_N"])
        return (batch * tiles,)

    launch(functools.partial(_compiled, "product"), grid, source, kernels, out, **arguments)


def _sees_edges(axis: _Axis, size: int, outputs: int) -> bool:
    """Whether any tap of any output falls outside the source."""
    ends = (0, (outputs - 1) * axis.step), (0, (axis.taps - 1) * axis.dilation)
    seen = [axis.start + sum(end) for end in itertools.product(*ends)]
    return min(seen) < 0 or max(seen) >= size


# Triton ------------------------------------------------------------------------------


@no_type_check
def _product_kernel(
    source,
    kernels,
    out,
    N,
    K_BLOCKS,
    U0,
    U1,
    U2,
    S0,
    S1,
    S2,
    STEP0,
    STEP1,
    STEP2,
    START0,
    START1,
    START2,
    DILATION0,
    DILATION1,
    DILATION2,
    source_b,
    source_c,
    source_0,
    source_1,
    source_2,
    kernels_b,
    kernels_0,
    kernels_1,
    kernels_2,
    kernels_n_block,
    kernels_k_block,
    kernels_n_cell,
    kernels_k_cell,
    out_b,
    out_c,
    out_0,
    out_1,
    out_2,
    N_CELL: tl.constexpr,
    K_CELL: tl.constexpr,
    T0: tl.constexpr,
    T1: tl.constexpr,
    T2: tl.constexpr,
    EDGES0: tl.constexpr,
    EDGES1: tl.constexpr,
    EDGES2: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One sample's (BLOCK_P positions, BLOCK_N channels)."""
    # Programs of one sample, and of one slice of its kernels, are neighbours: both stay in L2.
    P = U0 * U1 * U2
    p_tiles = tl.cdiv(P, BLOCK_P)
    n_tiles = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    p = program % p_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    n = program // p_tiles % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    sample = (program // (p_tiles * n_tiles)).to(tl.int64)  # a batch may exceed 2^31 elements
    source += sample * source_b
    kernels += sample * kernels_b
    out += sample * out_b

    row = p // U2
    u0 = row // U1 if U0 != 1 else row * 0  # divisions are what programs of one tile wait for
    u1, u2 = row - u0 * U1, p - row * U2
    at0 = u0 * STEP0 + START0
    at1 = u1 * STEP1 + START1
    at2 = u2 * STEP2 + START2
    from_u = at0 * source_0 + at1 * source_1 + at2 * source_2
    from_n = n // N_CELL * kernels_n_block + n % N_CELL * kernels_n_cell
    PARTS: tl.constexpr = (K_CELL + BLOCK_K - 1) // BLOCK_K
    TAPS: tl.constexpr = T0 * T1 * T2
    total = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    # One loop over all, since Triton pipelines only innermost loops, and those want to be long.
    # Taps change fastest: neighbouring taps see almost the same positions.
    for i in range(K_BLOCKS * PARTS * TAPS):
        t0, t1, t2 = i % TAPS // (T1 * T2), i % TAPS // T2 % T1, i % T2
        block = i // (TAPS * PARTS)
        k = i // TAPS % PARTS * BLOCK_K + tl.arange(0, BLOCK_K)
        d0, d1, d2 = t0 * DILATION0, t1 * DILATION1, t2 * DILATION2
        inside = p < P
        if EDGES0:
            inside = inside & (at0 + d0 >= 0) & (at0 + d0 < S0)
        if EDGES1:
            inside = inside & (at1 + d1 >= 0) & (at1 + d1 < S1)
        if EDGES2:
            inside = inside & (at2 + d2 >= 0) & (at2 + d2 < S2)
        from_p = from_u + (d0 * source_0 + d1 * source_1 + d2 * source_2)
        from_k = (block * K_CELL + k) * source_c
        seen = tl.load(
            source + from_p[:, None] + from_k[None, :],
            mask=inside[:, None] & (k < K_CELL)[None, :],
            other=0.0,
        )
        from_t = t0 * kernels_0 + t1 * kernels_1 + t2 * kernels_2 + block * kernels_k_block
        weights = tl.load(
            kernels + from_t + (k * kernels_k_cell)[:, None] + from_n[None, :],
            mask=(k < K_CELL)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        if INTERPRETED:  # it multiplies the bits of bfloat16
            seen, weights = seen.to(tl.float32), weights.to(tl.float32)
        total = tl.dot(seen, weights, total, input_precision=PRECISION)

    to_p = u0 * out_0 + u1 * out_1 + u2 * out_2
    tl.store(
        out + to_p[:, None] + (n * out_c)[None, :],
        total.to(out.dtype.element_ty),
        mask=(p < P)[:, None] & (n < N)[None, :],
    )


@no_type_check
def _kernel_grad_kernel(
    x,
    grad,
    out,
    OUT,
    IN,
    OUT_CELL,
    IN_CELL,
    S0,
    S1,
    S2,
    STEP0,
    STEP1,
    STEP2,
    START0,
    START1,
    START2,
    DILATION0,
    DILATION1,
    DILATION2,
    x_b,
    x_c,
    x_0,
    x_1,
    x_2,
    grad_b,
    grad_c,
    grad_0,
    grad_1,
    grad_2,
    out_b,
    out_t,
    out_out_block,
    out_in_block,
    out_out_cell,
    out_in_cell,
    U0: tl.constexpr,
    U1: tl.constexpr,
    U2: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One sample's and tap's (BLOCK_O output channels, BLOCK_C input channels).

    The output's size is known to the compiler: the loop divides by it, which is slow otherwise.
    """
    # Neighbours see the same positions and channels at another tap: those stay in L2.
    P: tl.constexpr = U0 * U1 * U2
    TAPS: tl.constexpr = K0 * K1 * K2
    c_tiles = tl.cdiv(IN, BLOCK_C)
    o_tiles = tl.cdiv(OUT, BLOCK_O)
    program = tl.program_id(0)
    tap = program % TAPS
    c = program // TAPS % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    o = program // (TAPS * c_tiles) % o_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    sample = (program // (TAPS * c_tiles * o_tiles)).to(tl.int64)
    x += sample * x_b
    grad += sample * grad_b
    out += sample * out_b

    at0 = START0 + tap // (K1 * K2) * DILATION0
    at1 = START1 + tap // K2 % K1 * DILATION1
    at2 = START2 + tap % K2 * DILATION2
    total = tl.zeros((BLOCK_O, BLOCK_C), dtype=tl.float32)
    for first in range(0, P, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        row = p // U2
        u0 = row // U1 if U0 != 1 else row * 0
        u1, u2 = row - u0 * U1, p - row * U2
        s0, s1, s2 = u0 * STEP0 + at0, u1 * STEP1 + at1, u2 * STEP2 + at2
        inside = (s0 >= 0) & (s0 < S0) & (s1 >= 0) & (s1 < S1) & (s2 >= 0) & (s2 < S2)
        slopes = tl.load(
            grad + (o * grad_c)[:, None] + (u0 * grad_0 + u1 * grad_1 + u2 * grad_2)[None, :],
            mask=(o < OUT)[:, None] & (p < P)[None, :],
            other=0.0,
        )
        seen = tl.load(
            x + (s0 * x_0 + s1 * x_1 + s2 * x_2)[:, None] + (c * x_c)[None, :],
            mask=(inside & (p < P))[:, None] & (c < IN)[None, :],
            other=0.0,
        )
        if INTERPRETED:
            slopes, seen = slopes.to(tl.float32), seen.to(tl.float32)
        total = tl.dot(slopes, seen, total, input_precision=PRECISION)

    to_o = o // OUT_CELL * out_out_block + o % OUT_CELL * out_out_cell
    to_c = c // IN_CELL * out_in_block + c % IN_CELL * out_in_cell
    tl.store(
        out + tap * out_t + to_o[:, None] + to_c[None, :],
        total.to(out.dtype.element_ty),
        mask=(o < OUT)[:, None] & (c < IN)[None, :],
    )


# Tile sizes in the order of the kernel's last arguments, warps and pipeline stages. The first is
# the interpreter's, and that of sizes which fill no other.
_TILES = {
    "product": [
        (32, 32, 16, 4, 3),
        (64, 64, 16, 4, 4),
        (128, 32, 16, 4, 4),
        (16, 64, 64, 4, 4),
        (64, 32, 32, 4, 4),
        (64, 64, 32, 4, 4),
        (64, 64, 64, 4, 4),
        (64, 128, 64, 4, 3),
        (128, 64, 64, 4, 3),
        (128, 128, 32, 8, 4),
        (128, 128, 64, 8, 3),
    ],
    "kernel_grad": [
        (32, 32, 16, 4, 3),
        (64, 64, 16, 4, 4),
        (32, 32, 32, 4, 4),
        (64, 64, 32, 4, 4),
        (64, 64, 64, 4, 4),
        (64, 128, 64, 4, 3),
        (128, 64, 64, 4, 3),
        (128, 128, 32, 8, 4),
        (128, 128, 64, 8, 3),
    ],
}


@functools.cache
def _compiled(name: str) -> Any:
    """The kernel of that name, which tunes its tiles for each size that it meets. Not the batch:
    the last batch of an epoch would tune again."""
    if name == "product":
        return jit(
            _product_kernel,
            _configs(name, ("BLOCK_P", "BLOCK_N", "BLOCK_K")),
            key=[
                *("N", "K_BLOCKS", "K_CELL", "U0", "U1", "U2", "T0", "T1", "T2", "PRECISION"),
                *("STEP0", "STEP1", "STEP2", "source_c", "out_c", "kernels_k_cell"),
            ],
            fitting=_fitting_product,
        )
    return jit(
        _kernel_grad_kernel,
        _configs(name, ("BLOCK_O", "BLOCK_C", "BLOCK_P")),
        key=[
            *("OUT", "IN", "U0", "U1", "U2", "K0", "K1", "K2", "PRECISION"),
            *("STEP0", "STEP1", "STEP2", "x_c", "grad_c"),
        ],
        fitting=_fitting_kernel_grad,
    )


def _fitting_product(configs: list[Any], named: Mapping[str, Any], **more: Any) -> list[Any]:
    numbers = {**named, **more}
    positions = numbers["U0"] * numbers["U1"] * numbers["U2"]
    return _fitting(
        configs, {"BLOCK_P": positions, "BLOCK_N": numbers["N"], "BLOCK_K": numbers["K_CELL"]}
    )


def _fitting_kernel_grad(configs: list[Any], named: Mapping[str, Any], **more: Any) -> list[Any]:
    numbers = {**named, **more}
    positions = numbers["U0"] * numbers["U1"] * numbers["U2"]
    return _fitting(
        configs, {"BLOCK_O": numbers["OUT"], "BLOCK_C": numbers["IN"], "BLOCK_P": positions}
    )


def _fitting(configs: list[Any], sizes: Mapping[str, int]) -> list[Any]:
    """Those whose tiles are not mostly empty."""
    found = [
        config
        for config in configs
        if all(config.kwargs[block] < 2 * max(size, 9) for block, size in sizes.items())
    ]
    return found or configs[:1]


def _configs(name: str, blocks: tuple[str, ...]) -> list[Any]:
    triton = importlib.import_module("triton")
    return [
        triton.Config(dict(zip(blocks, tile, strict=True)), num_warps=warps, num_stages=stages)
        for *tile, warps, stages in _TILES[name]
    ]


def jit(
    kernel: Callable[..., Any],
    configs: Sequence[Any] = (),
    key: Sequence[str] = (),
    fitting: Callable[..., list[Any]] | None = None,
) -> Any:
    """A function as a Triton kernel, tuned over `configs`, if any, for each value of `key`.

    fitting: which configs to try. The interpreter takes the first: it has nothing to time.
    """
    triton = importlib.import_module("triton")
    kernel.__globals__["tl"] = importlib.import_module("triton.language")
    made = triton.jit(kernel)
    if not configs:
        return made
    options: dict[str, Any] = {"prune_configs_by": {"early_config_prune": fitting}}
    if _interpreted(made):
        configs, options = configs[:1], {}
    # Kept on disk between processes, where Triton knows how.
    if "cache_results" in inspect.signature(triton.autotune).parameters:
        options["cache_results"] = True
    return triton.autotune(configs=list(configs), key=list(key), **options)(made)


def launch(
    compiled: Callable[[], Any],
    grid: Callable[[Mapping[str, int]], tuple[int]],
    *tensors: Tensor,
    **more: Any,
) -> None:
    """Run what `jit` made, on the device of its tensors; not where they have no data."""
    if stands():
        return
    kernel = compiled()
    if "INTERPRETED" in kernel.arg_names:
        more["INTERPRETED"] = _interpreted(kernel.fn)
    device = tensors[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        # Triton 3.9 warns that a later one will no longer fuse by itself.
        kernel[grid](*tensors, **more, enable_fp_fusion=True)


def _interpreted(kernel: Any) -> bool:
    return type(kernel).__name__ == "InterpretedFunction"


# Shapes, strides and checks ----------------------------------------------------------


def _three_axes(x: Tensor) -> Tensor:
    """(B, C, *S) with three axes, the first of them of size 1 as needed."""
    while x.dim() < 5:
        x = x.unsqueeze(2)
    return x


def _by_axis(kernels: Tensor, geometry: ConvGeometry) -> Tensor:
    """(B, T, go, gi, co, ci) as (B, T0, T1, T2, go, gi, co, ci)."""
    batch, _, *rest = kernels.shape
    return kernels.view(batch, *_padded(geometry.kernel[2:], 1), *rest)


def _padded(numbers: Sequence[int], first: int) -> tuple[int, ...]:
    return (first,) * (3 - len(numbers)) + tuple(numbers)


def _empty(like: Tensor, channels: int, size: tuple[int, ...]) -> Tensor:
    out = torch.empty(like.shape[0], channels, *size, dtype=like.dtype, device=like.device)
    return out.contiguous(memory_format=format_of(like))


def _numbers(name: str, values: Iterable[int]) -> dict[str, int]:
    return {f"{name}{axis}": value for axis, value in enumerate(values)}


def _strides(name: str, x: Tensor, axes: Sequence[str]) -> dict[str, int]:
    return {f"{name}_{axis}": stride for axis, stride in zip(axes, x.stride(), strict=True)}


def _precision(dtype: torch.dtype) -> str:
    """Triton's name for how float32 is multiplied: as torch's own matrix products do."""
    matmul = torch.backends.cuda.matmul
    # The name since torch 2.9: the older one raises where a program has used the newer.
    allowed = getattr(matmul, "fp32_precision", None)
    tf32 = matmul.allow_tf32 if allowed is None else allowed == "tf32"
    return "tf32" if tf32 and dtype == torch.float32 else "ieee"


def _check(
    geometry: ConvGeometry, shape: tuple[int, ...], batch: int, first: Tensor, second: Tensor
) -> None:
    """shape: of the kernels."""
    if geometry.groups != 1:
        raise ValueError(f"groups {geometry.groups}: the Triton kernels need groups 1")
    if first.dtype not in DTYPES or first.dtype != second.dtype:
        allowed = ", ".join(map(str, DTYPES))
        raise ValueError(f"{first.dtype} with {second.dtype}: both must be the same of {allowed}")
    out, inn, *spatial = geometry.kernel
    blocks = shape[2] * shape[4], shape[3] * shape[5]
    if (*shape[:2], *blocks) != (batch, math.prod(spatial), out, inn):
        raise ValueError(
            f"kernels of {shape}: {batch} samples with kernels of {geometry.kernel} need "
            f"({batch}, {math.prod(spatial)}, go, gi, co, ci), go * co {out} and gi * ci {inn}"
        )


def _check_grad(geometry: ConvGeometry, size: tuple[int, ...], grad: Tensor) -> None:
    expected = geometry.out_size(size)
    if tuple(grad.shape[1:]) != (geometry.kernel[0], *expected):
        raise ValueError(
            f"a gradient of {tuple(grad.shape)}: inputs of {size} positions need "
            f"({grad.shape[0]}, {geometry.kernel[0]}, {', '.join(map(str, expected))})"
        )


def _check_offsets(*tensors: Tensor) -> None:
    """Within a sample, positions are counted in 32 bits, which divide faster."""
    for tensor in tensors:
        sample = zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
        reach = sum((size - 1) * stride for size, stride in sample)
        if reach >= 2**31:
            raise ValueError(f"a sample of {reach + 1:,} elements: the limit is {2**31:,}")
