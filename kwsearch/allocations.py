"""What torch would allocate, step by step, while a model runs on tensors without data.

On a CPU, oneDNN's copies of a convolution's operands are allocated by torch, too, within one
operator: blocks of 16 channels (8 without AVX-512) for x and the result, where they are not
channels_last, and for the weight. Which convolutions are oneDNN's is torch's own rule (`use_mkldnn`
in its aten/src/ATen/native/Convolution.cpp); the others are im2col and a product.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kwlayers.ops.path import format_of

_aten = torch.ops.aten
_BLOCK = 8 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 16  # channels
_HALVES = {  # whether oneDNN has them on this processor
    torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
    torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
}
_POINTWISE = {_aten.add, _aten.add_, _aten.sub, _aten.mul, _aten.mul_, _aten.div, _aten.div_}


class Event(NamedTuple):
    """nbytes: allocated, or if negative, freed. number: of the tensor's memory; 0 in passing."""

    nbytes: int
    number: int


class AsLaidOut(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Convolutions on `meta` give channels_last where those of the devices do."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing here is compiled; the default would import the compiler, too.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _as_laid_out(func, args, func(*args, **(kwargs or {})))


class Allocations(AsLaidOut):
    """Counts memory that is allocated while it is active, until it is freed.

    events: in order. labels: {number: the label under which it was allocated}. scratch: of an
    operator, beside its results: (operator, arguments) -> bytes.
    """

    def __init__(self, scratch: Callable[[Any, tuple[Any, ...]], int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scratch = scratch
        self.events: list[Event] = []
        self.labels: dict[int, str] = {}
        self.label = ""
        self._numbers: dict[int, int] = {}  # by address of the memory's record
        self._count = 0
        self._adding_up = False
        # Where the events of an addition begin, and its left operand.
        self._added: tuple[int, int] | None = None

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Memory that is there already."""
        for tensor in tensors:
            self._numbers[tensor.untyped_storage()._cdata] = 0

    @contextmanager
    def adding_up(self) -> Iterator[None]:
        """Within it, during backward, gradients are added up in place where nobody else has them.

        So autograd does, but not while it is watched: such sums take new memory then.
        """
        self._adding_up = True
        try:
            yield
        finally:
            self._adding_up = False

    def number(self, tensor: Tensor) -> int:
        """Of its memory; 0 if it was there before."""
        return self._numbers.get(tensor.untyped_storage()._cdata, 0)

    def alive(self) -> set[int]:
        """The memory allocated and not freed."""
        return {number for number in self._numbers.values() if number}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        extra = self.scratch(func, args)
        if extra:
            self.events += [Event(extra, 0), Event(-extra, 0)]
        self._added = None
        if self._adding_up and func is _aten.add.Tensor and not args[0]._is_view():
            self._added = len(self.events), self.number(args[0])
        found = super().__torch_dispatch__(func, types, args, kwargs)
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return found

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._numbers:
            return
        self._count += 1
        nbytes = storage.nbytes()
        self._numbers[address] = self._count
        self.labels[self._count] = self.label
        self.events.append(Event(nbytes, self._count))
        weakref.finalize(storage, self._free, address, nbytes)

    def _free(self, address: int, nbytes: int) -> None:
        number = self._numbers.pop(address)
        at = len(self.events)
        if self._added is not None and self._added[1] == number:
            at = self._added[0]
        self.events.insert(at, Event(-nbytes, number))


def _as_laid_out(func: Any, args: tuple[Any, ...], found: Any) -> Any:
    """channels_last where the devices' convolutions give that, and those on `meta` do not."""
    packet = getattr(func, "overloadpacket", None)
    if packet is _aten.convolution and any(map(_channels_last, args[:2])):
        return _to_channels_last(found)
    if packet is _aten.convolution_backward and any(map(_channels_last, args[:3])):
        return tuple(f if f is None or f.dim() < 4 else _to_channels_last(f) for f in found)
    return found


def _to_channels_last(tensor: Tensor) -> Tensor:
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    return tensor if layout is None else torch.empty_like(tensor, memory_format=layout)


def no_scratch(func: Any, args: tuple[Any, ...]) -> int:
    """Of libraries that do not allocate through torch."""
    return 0


def cpu_scratch(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that an operator on the CPU takes at a time beside what it returns.

    Those of convolutions, and operands of other dtypes than the result's, which are copied.
    """
    packet = getattr(func, "overloadpacket", None)
    if packet in _POINTWISE:
        operands = [a for a in args[:2] if isinstance(a, Tensor) and a.dim() > 0]
        wide = max((a.element_size() for a in operands), default=0)
        return sum(a.numel() * wide for a in operands if a.element_size() < wide)
    if packet is _aten.convolution:
        x, weight, _, stride, padding, dilation, transposed, _, groups = args
        return 0 if transposed else _Convolution(x, weight, stride, padding, dilation, groups).ahead
    if packet is _aten.convolution_backward:
        _, x, weight, _, stride, padding, dilation, transposed, _, groups, mask = args
        if transposed:
            return 0
        return _Convolution(x, weight, stride, padding, dilation, groups).back(mask)
    return 0


class _Convolution:
    """One call on the CPU. x: (B, C, *S)  weight: (C_out, C / groups, *K)."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
    ) -> None:
        rank = x.dim() - 2
        spread = [v if len(v) == rank else v * rank for v in (stride, padding, dilation)]
        self.x, self.weight, self.groups = x, weight, groups
        self.kernel: tuple[int, ...] = tuple(weight.shape[2:])
        self.out_size = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(x.shape[2:], self.kernel, *spread, strict=True)
        ]
        self.plain = all(k == 1 for k in self.kernel)
        self.strided = max(spread[0]) > 1 or max(spread[2]) > 1
        self.padded = max(spread[1]) > 0
        self.itemsize: int = x.element_size()
        out = x.shape[0] * math.prod(self.out_size)
        self.out: int = out * weight.shape[0] * self.itemsize
        self.out_blocked: int = out * _rounded(weight.shape[0]) * self.itemsize
        few = x.shape[1] < _BLOCK and groups == 1 and not self.plain
        channels = x.shape[1] if few else _rounded(x.shape[1])
        positions = x.shape[0] * math.prod(x.shape[2:])
        self.x_blocked: int = positions * channels * self.itemsize
        self.x_copied: int = 0 if few else self.x_blocked
        inputs = weight.shape[1] if groups > 1 or few else _rounded(weight.shape[1])
        weights = _rounded(weight.shape[0]) * inputs * math.prod(self.kernel)
        self.weight_blocked: int = weights * self.itemsize

    @property
    def by_onednn(self) -> bool:
        """As torch decides."""
        x, kernel = self.x, self.kernel
        if x.dtype != torch.float32:
            return x.dtype in _HALVES and bool(_HALVES[x.dtype]())
        pays = self.strided or x.shape[0] >= 16 or not self.plain or torch.get_num_threads() > 1
        large = len(kernel) > 1 and min(kernel[-2:]) > 3
        return pays and (self.groups > 1 or large or x.shape[0] > 1 or x.numel() > 20480)

    @property
    def channels_last(self) -> bool:
        """Whether oneDNN then works in that layout."""
        return any(map(_channels_last, (self.x, self.weight)))

    @property
    def to_channels_last(self) -> int:
        """Of the copies of x and weight, where one is not so yet."""
        given = (self.x, self.weight)
        return sum(int(t.nbytes) for t in given if t.is_contiguous() and not _channels_last(t))

    @property
    def columns(self) -> int:
        """Of im2col, where oneDNN does not take over: a group's."""
        given = (self.x, self.weight)
        copied = sum(int(t.nbytes) for t in given if not (t.is_contiguous() or _channels_last(t)))
        if self.plain and not (self.strided or self.padded):
            return copied
        row = math.prod(self.weight.shape[1:])
        positions = self.x.shape[0] * math.prod(self.out_size)
        return copied + int(row * positions * self.itemsize)

    def by_columns(self, results: int, *operands: int) -> int:
        """Without oneDNN. One group after the other, its operands copied; then all the results
        together once more."""
        if self.groups == 1:
            return results + self.columns
        copied = self.x.shape[0] > 1 or self.channels_last
        copies = sum(operands) // self.groups if copied else 0
        return max(2 * results, results + copies + self.columns)

    @property
    def ahead(self) -> int:
        """Of the convolution itself."""
        if not self.by_onednn:
            return self.by_columns(self.out, self.x.nbytes)
        if self.channels_last:
            return self.out + self.weight_blocked + self.to_channels_last
        operands = self.x_copied + self.weight_blocked + self.out_blocked
        return max(operands, self.out_blocked + self.out)

    def back(self, mask: list[bool]) -> int:
        """Of its gradients by x and weight, those that are asked for."""
        x_grad = int(self.x.nbytes) if mask[0] else 0
        weight_grad = int(self.weight.nbytes) if mask[1] else 0
        if not self.by_onednn:
            return self.by_columns(x_grad + weight_grad, self.x.nbytes, self.out)
        wide = self.groups == self.x.shape[1] and max(self.kernel) > 3
        if self.channels_last:
            parts = _BLOCK**2 * weight_grad if wide else 0  # a block for each channel
            return x_grad + 3 * self.weight_blocked + parts + self.to_channels_last
        operands = self.out_blocked + self.weight_blocked + self.x_blocked
        times = 2 if self.strided and self.groups == 1 else 1
        first = max(operands, self.x_blocked + times * x_grad) if mask[0] else 0
        if not mask[1]:
            return first
        maps = 0 if wide else self.out_blocked + self.x_copied
        return max(first, x_grad + self.weight_blocked + max(maps, weight_grad))


def _channels_last(tensor: Tensor) -> bool:
    return format_of(tensor) != torch.contiguous_format


def _rounded(channels: int) -> int:
    return -(-channels // _BLOCK) * _BLOCK
