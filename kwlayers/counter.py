"""Count the multiply-adds of a forward on `meta`, without torch's compiler.

torch's own shape rules for `meta` import its compiler, which takes longer than everything
else that planning does. So the commonest operators have theirs here; the rest take torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class MacCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """MACs of every convolution and matrix product that runs inside it, module or not."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing here is compiled; the default would import the compiler, too.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        operator = func.overloadpacket
        if operator in _PRODUCTS:
            left, right = args[_PRODUCTS[operator] :][:2]
            if left.is_meta and right.is_meta:
                out = left.new_empty(_product(left.shape, right.shape))
            else:
                out = func(*args, **(kwargs or {}))
            self.macs += out.numel() * left.shape[-1]
            return out
        if operator is torch.ops.aten.convolution:
            x, weight, transposed = args[0], args[1], args[6]
            if x.is_meta and weight.is_meta:
                out = x.new_empty(_convolution(*args))
            else:
                out = func(*args, **(kwargs or {}))
            positions = (x if transposed else out).numel()
            self.macs += positions * (weight.numel() // weight.shape[0])
            return out
        if operator in _RULES and not kwargs:
            lists = (a if isinstance(a, list) else [a] for a in args)
            tensors = [a for one in lists for a in one if isinstance(a, Tensor)]
            if all(t.is_meta and t.dtype == tensors[0].dtype for t in tensors):
                return _RULES[operator](*args)
        return func(*args, **(kwargs or {}))


def _product(left: Sequence[int], right: Sequence[int]) -> tuple[int, ...]:
    """(…, i, k) @ (…, k, j), or a vector on the right."""
    *rows, inner = left
    columns = tuple(right[-1:]) if len(right) > 1 else ()
    if inner != (right[-2] if columns else right[-1]):
        raise ValueError(f"a product of {tuple(left)} and {tuple(right)}")
    return (*rows, *columns)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> tuple[int, ...]:
    """The output's shape. Lists of one number count for every axis."""
    outputs, inputs, *kernel = weight.shape
    if transposed:
        outputs, inputs = inputs * groups, outputs
    else:
        inputs *= groups
    if x.shape[1] != inputs:
        raise ValueError(f"a convolution over {inputs} channels got {x.shape[1]}")
    if not transposed:
        sizes = _windows(x.shape[2:], kernel, stride, padding, dilation)
    else:
        rank = len(kernel)
        steps = (_every(a, rank) for a in (stride, padding, dilation, output_padding))
        sizes = [
            (size - 1) * s - 2 * p + d * (k - 1) + extra + 1
            for size, k, s, p, d, extra in zip(x.shape[2:], kernel, *steps, strict=True)
        ]
    return (x.shape[0], outputs, *sizes)


def _windows(
    sizes: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """How many windows fit along each axis."""
    rank = len(sizes)
    axes = zip(sizes, *(_every(a, rank) for a in (kernel, stride, padding, dilation)), strict=True)
    counts = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in axes]
    if min(counts) < 1:
        raise ValueError(f"a window of {tuple(kernel)} does not fit on {tuple(sizes)}")
    return counts


def _every(values: Sequence[int], rank: int) -> Sequence[int]:
    return values if len(values) == rank else [*values] * rank


def _in_place(x: Tensor, *args: Any) -> Tensor:
    return x


def _same(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


def _norm(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _same(x), x, x


def _elementwise(x: Tensor, y: Any, *args: Any) -> Tensor:
    if not isinstance(y, Tensor) or x.shape == y.shape:
        return _same(x)
    rank = max(x.dim(), y.dim())
    left, right = ((1,) * (rank - len(s)) + tuple(s) for s in (x.shape, y.shape))
    if any(a != b and 1 not in (a, b) for a, b in zip(left, right, strict=True)):
        raise ValueError(f"shapes {tuple(x.shape)} and {tuple(y.shape)} do not broadcast")
    return x.new_empty([b if a == 1 else a for a, b in zip(left, right, strict=True)])


def _mean(
    x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, *args: Any
) -> Tensor:
    gone = {d % x.dim() for d in dims} if dims else set(range(x.dim()))
    kept = [(1 if d in gone else size, d in gone) for d, size in enumerate(x.shape)]
    return x.new_empty([size for size, reduced in kept if keepdim or not reduced])


def _max_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    if ceil_mode:
        pool: Any = torch.ops.aten.max_pool2d_with_indices.default
        found: tuple[Tensor, Tensor] = pool(x, kernel, stride, padding, dilation, ceil_mode)
        return found
    counts = _windows(x.shape[-2:], _every(kernel, 2), stride or kernel, padding, dilation)
    out = x.new_empty((*x.shape[:-2], *counts))
    return out, out


def _avg_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    *args: Any,
) -> Tensor:
    if ceil_mode:
        pool: Any = torch.ops.aten.avg_pool2d.default
        found: Tensor = pool(x, kernel, stride, padding, ceil_mode, *args)
        return found
    counts = _windows(x.shape[-2:], _every(kernel, 2), stride or kernel, padding, (1,))
    return x.new_empty((*x.shape[:-2], *counts))


def _addcmul(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return _elementwise(x, _elementwise(left, right))


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    first = tensors[0]
    axis = dim % first.dim()
    shapes = [list(tensor.shape) for tensor in tensors]
    if any(s[:axis] + s[axis + 1 :] != shapes[0][:axis] + shapes[0][axis + 1 :] for s in shapes):
        raise ValueError(f"shapes {', '.join(map(str, shapes))} cannot be joined along {dim}")
    shape = list(first.shape)
    shape[axis] = sum(s[axis] for s in shapes)
    return first.new_empty(shape)


_aten = torch.ops.aten
_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((_aten.relu_, _aten.hardtanh_, _aten.silu_, _aten.hardswish_), _in_place),
    **dict.fromkeys((_aten.relu, _aten.hardtanh, _aten.gelu, _aten.silu, _aten.hardswish), _same),
    **dict.fromkeys((_aten.sigmoid, _aten._softmax), _same),
    **dict.fromkeys((_aten.native_batch_norm, _aten.native_layer_norm), _norm),
    **dict.fromkeys((_aten.native_group_norm,), _norm),
    **dict.fromkeys((_aten.add, _aten.sub, _aten.mul, _aten.maximum), _elementwise),
    _aten.addcmul: _addcmul,
    **dict.fromkeys((_aten.add_, _aten.sub_, _aten.mul_), _in_place),
    _aten.max_pool2d_with_indices: _max_pool2d,
    _aten.avg_pool2d: _avg_pool2d,
    _aten.cat: _cat,
    _aten.mean: _mean,
}
# Which argument is the left factor.
_PRODUCTS = {
    _aten.mm: 0, _aten.bmm: 0, _aten.mv: 0, _aten.dot: 0,
    _aten.addmm: 1, _aten.baddbmm: 1, _aten.addmv: 1,
}  # fmt: skip
