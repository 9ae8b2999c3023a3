"""What a step is made of: calls of torch's functions, and of dynamic layers by their parts.

A step runs once on `meta`. Every function of torch that it calls is one `Call`; a dynamic layer is
one, whatever it does inside, and one of KernelWarehouse two, its attention and its mixing; in
training, a tensor that several calls read has gradients to be added up, and a warehouse one buffer
to be filled. Two calls with one key take as long as each other.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_flatten, tree_leaves

from kwlayers.attention import Attention
from kwlayers.conv import _KWLayer
from kwlayers.dynamic import DynamicLayer, DynamicLinear
from kwlayers.ops.device import standing_for
from kwlayers.ops.dispatch import Choice
from kwlayers.ops.geometry import Blocks
from kwlayers.ops.library import choose_for
from kwlayers.plan import PlanError
from kwsearch.allocations import AsLaidOut
from kwsearch.memory import step_loss
from kwsearch.terminal import talk_to_stderr

# What asks a tensor about itself, and computes nothing.
_ASKED = {
    "__get__", "__set__", "__len__", "dim", "ndimension", "size", "stride", "numel", "data_ptr",
    "is_floating_point", "is_complex", "is_contiguous", "storage_offset", "element_size",
    "requires_grad_", "_is_view",
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """A tensor without its data. kept: a parameter, or a table of whole numbers: it stays where it
    is, and is not written anew before each call. grad: whether it needs a gradient.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    kept: bool
    grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        """Of a tensor on any device."""
        kept = isinstance(tensor, nn.Parameter) or not tensor.is_floating_point()
        grad = tensor.requires_grad
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, kept, grad)

    @property
    def nbytes(self) -> int:
        """As if it were contiguous."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        """16x64x56x56, then what is unusual: layout, dtype, kept (*), gradient (')."""
        text = "x".join(map(str, self.shape)) or "scalar"
        if self.stride != _row_major(self.shape):
            text += f"/{'.'.join(map(str, self.stride))}"
        if self.dtype != torch.float32:
            text += f":{str(self.dtype).removeprefix('torch.')}"
        return text + "*" * self.kept + "'" * self.grad


def _version(args: tuple[Any, ...]) -> int:
    """How often the first argument, if it is a tensor, was written over."""
    return args[0]._version if args and isinstance(args[0], Tensor) else 0


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


@dataclass(frozen=True)
class Call:
    """One call, by what its time depends on.

    family: what is called, with everything but `cells`, the number of cells of a warehouse, on
    which times depend linearly; 0 where there are none. kind: of a fitted model. work: numbers that
    times of one kind grow with: multiply-adds, bytes. what: to call: (function, arguments with
    Specs in place of tensors, their structure, whether the first is written over), (layer on meta,
    Spec of x) or a Spec; it does not count for equality.
    """

    kind: str
    family: str
    cells: int
    work: tuple[int, ...]
    what: Any = field(compare=False, repr=False, default=None)

    @property
    def key(self) -> str:
        """In a table."""
        return f"{self.family} n={self.cells}" if self.cells else self.family


def calls_of(
    model: nn.Module,
    batch: int,
    input_size: tuple[int, ...],
    training: bool,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Counter[Call]:
    """The calls of one step, and how often: all that `calls_by_module` finds."""
    found = calls_by_module(model, batch, input_size, training, device, dtype)
    return sum(found.values(), Counter[Call]())


def calls_by_module(
    model: nn.Module,
    batch: int,
    input_size: tuple[int, ...],
    training: bool,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Counter[Call]]:
    """The calls of one step, and how often, by the innermost module that makes them; "" has the
    rest. model: on `meta`, converted or not, of `dtype`.

    input_size: (C, ...) of an image. Raises PlanError where the step cannot run.
    """
    recorder = _Recorder(training)
    x = torch.empty(batch, *input_size, device="meta", dtype=dtype)
    y = torch.empty(batch, dtype=torch.long, device="meta")
    model.train(training)
    try:
        with (
            talk_to_stderr(),
            standing_for(torch.device(device).type),
            recorder.watching(model),
            AsLaidOut(),  # type: ignore[no-untyped-call]
            torch.set_grad_enabled(training),
        ):
            out = model(x)
            if training:
                step_loss(out, y)
    except (ValueError, RuntimeError) as error:
        raise PlanError(f"a step of {batch} images cannot run: {error}") from error
    return recorder.found()


class _Recorder(TorchFunctionMode):
    def __init__(self, training: bool) -> None:
        super().__init__()
        self.training = training
        self.calls: defaultdict[str, Counter[Call]] = defaultdict(Counter)
        self.names: list[str] = []  # of modules that run, the innermost last
        self.inside: list[nn.Module] = []  # dynamic layers that run
        self.readers: Counter[int] = Counter()  # of tensors, by id
        self.read: dict[int, Tensor] = {}
        self.warehouses: dict[int, Tensor] = {}

    def found(self) -> dict[str, Counter[Call]]:
        """All that was seen."""
        if self.training:
            rest = self.calls[""]
            for key, tensor in self.read.items():
                if self.readers[key] > 1:
                    rest[_sum_call(Spec.of(tensor))] += self.readers[key] - 1
            for cells in self.warehouses.values():
                rest[_buffer_call(Spec.of(cells))] += 1
        return dict(self.calls)

    def _add(self, call: Call) -> None:
        self.calls[self.names[-1] if self.names else ""][call] += 1

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Note the call, and make it."""
        kwargs = kwargs or {}
        if self.inside or getattr(func, "__name__", "") in _ASKED:
            return func(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        for tensor in tensors:
            self._note_reader(tensor)
        specs = [Spec.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        before = _version(args)
        found = func(*args, **kwargs)
        writes = _version(args) != before
        if writes:
            self.readers.pop(id(found), None)  # it is another one now, in the same place
        outs = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        if tensors and outs:
            what = (func, specs, structure, writes)
            self._add(_function_call(what, outs, self.training))
        return found

    def _note_reader(self, tensor: Tensor) -> None:
        if tensor.requires_grad and not isinstance(tensor, nn.Parameter):
            self.readers[id(tensor)] += 1
            self.read[id(tensor)] = tensor  # so that the id stays its own

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, module in model.named_modules():
                enter = partial(self._enter, name)
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(self._leave).remove)
                if isinstance(module, _KWLayer):
                    stack.enter_context(_not_computed(module.attention))
            stack.enter_context(self)
            yield

    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.names.append(name)
        if self.inside:
            return
        self._add(MODULE)
        if not isinstance(module, DynamicLayer):
            return
        x: Tensor = args[0]
        self._note_reader(x)
        self.inside.append(module)  # from here on nothing is a call of its own
        if isinstance(module, _KWLayer):
            self._add(_attention_call(module, Spec.of(x), self.training))
            self._add(_mixing_call(module, x, self.training))
            cells = module.warehouse.cells
            self.warehouses[id(cells)] = cells
        else:
            self._add(_layer_call(module, x, self.training))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        self.names.pop()
        if module in self.inside:
            self.inside.remove(module)


@contextlib.contextmanager
def _not_computed(attention: Attention) -> Iterator[None]:
    """Nothing in it is a call of its own, and its result is known: save half of the time."""
    m, n = attention.num_mixtures, attention.num_cells

    def forward(x: Tensor) -> Tensor:
        wanted = torch.is_grad_enabled()
        return torch.empty(x.shape[0], m, n, dtype=x.dtype, device=x.device, requires_grad=wanted)

    attention.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del attention.forward


# Kinds of calls -----------------------------------------------------------------------------

MODULE = Call("module", "module", 0, ())


def _mode(training: bool) -> str:
    return "training" if training else "inference"


def _function_call(what: tuple[Any, ...], outs: list[Tensor], training: bool) -> Call:
    func, leaves, _, _ = what
    name = (resolve_name(func) or getattr(func, "__name__", str(func))).split(".")[-1]
    specs = [leaf for leaf in leaves if isinstance(leaf, Spec)]
    work = (
        _products(name, specs, outs[0]),
        specs[0].nbytes,
        sum(spec.nbytes for spec in specs[1:]),
        sum(out.nbytes for out in outs),
    )
    family = f"{name} {' '.join(map(str, leaves))} {_mode(training)}"
    return Call(f"{name}{_variant(name, specs)} {_mode(training)}", family, 0, work, what)


def _variant(name: str, specs: list[Spec]) -> str:
    """Convolutions of one channel at a time are a kind of their own, as are those of 1x1."""
    if not name.startswith("conv") or len(specs) < 2:
        return ""
    x, weight = specs[:2]
    if weight.shape[1] < x.shape[1]:
        return " grouped"
    return " 1x1" if set(weight.shape[2:]) == {1} else ""


def _products(name: str, specs: list[Spec], out: Tensor) -> int:
    """Multiply-adds of convolutions, products and torch's attention; 0 for all else."""
    if len(specs) < 2:
        return 0
    x, weight = specs[:2]
    if name.startswith("conv") and len(weight.shape) > 2:
        return out.numel() * math.prod(weight.shape[1:])
    if name in ("linear", "matmul", "__matmul__", "bmm", "mm"):
        return out.numel() * x.shape[-1]
    if name == "scaled_dot_product_attention":
        return 2 * out.numel() * x.shape[-2]
    return 0


def _layer_call(layer: DynamicLayer, x: Tensor, training: bool) -> Call:
    """A whole layer, which its own and borrowed tensors tell from others of its class."""
    spec, kernel = Spec.of(x), layer.geometry.kernel
    modules = (layer, *layer.borrowed)
    tensors = [named for module in modules for named in module.state_dict().items()]
    shapes = " ".join(f"{name} {'x'.join(map(str, t.shape))}" for name, t in tensors)
    name = type(layer).__name__
    positions = math.prod(layer.geometry.out_size(tuple(_given(layer, x).shape[2:])))
    weights, batch = math.prod(kernel), x.shape[0]
    work = (
        batch * positions * weights,
        spec.nbytes + batch * kernel[0] * positions * x.element_size(),
        batch * weights * x.element_size(),
        sum(t.nbytes for _, t in tensors),
        len(tensors),
    )
    mode = _mode(training)
    family = f"layer {name} {_layer_name(layer)} {spec} {shapes} {mode}"
    return Call(f"layer {name} {mode}", family, 0, work, (layer, spec))


def _layer_name(layer: Any) -> str:
    kernel = "x".join(map(str, layer.geometry.kernel))
    steps = "".join(
        f" {letter}{'x'.join(map(str, numbers))}"
        for letter, numbers in zip("spd", layer.geometry[1:4], strict=True)
    )
    padded = "".join(f" {layer.padding_mode}{side}" for side in getattr(layer, "_pad", ()))
    return f"{kernel}{steps}{padded} g{layer.geometry.groups}" + " bias" * (layer.bias is not None)


def _given(layer: Any, x: Tensor) -> Tensor:
    """What is convolved: tokens as positions, and maps with the padding of the layer itself."""
    found: Tensor = layer.tokens(x) if isinstance(layer, DynamicLinear) else layer.padded(x)
    return found


def _attention_call(layer: Any, x: Spec, training: bool) -> Call:
    attention = layer.attention
    m, n, hidden = attention.num_mixtures, attention.num_cells, attention.fc1.out_features
    basis = "" if attention.basis is None else f" basis {attention.basis.width}"
    norm = type(attention.norm).__name__
    batch = x.shape[0]
    outputs = batch * m * n
    work = (x.nbytes, outputs, outputs * hidden)
    kind = f"attention {_mode(training)}"
    family = f"attention {x} m={m} h={hidden}{basis} {norm} {_mode(training)}"
    return Call(kind, family, n, work, (layer, x))


def _mixing_call(layer: Any, x: Tensor, training: bool) -> Call:
    geometry, cells = layer.geometry, layer.warehouse.cells
    spec = Spec.of(x)
    given = _given(layer, x)
    path = choose_for(given, cells, geometry)
    n, batch = cells.shape[0], x.shape[0]
    positions = math.prod(geometry.out_size(tuple(given.shape[2:])))
    maps = spec.nbytes + batch * geometry.kernel[0] * positions * x.element_size()
    work = (
        *_path_work(path, Blocks.of(geometry.kernel, tuple(cells.shape[1:])), batch, positions, n),
        maps,
        cells.nbytes,
    )
    cell = "x".join(map(str, cells.shape[1:]))
    kind = f"mixing {path} {_mode(training)}"
    family = f"mixing {path} {_layer_name(layer)} cell {cell} {spec} {_mode(training)}"
    return Call(kind, family, n, work, (layer, spec))


def _path_work(
    path: Choice, blocks: Blocks, batch: int, positions: int, n: int
) -> tuple[int, int, int]:
    """Multiply-adds of a path's two products, and the numbers between them: kernels, or where no
    kernel is mixed what `kwlayers.ops.inputs` calls U and V.
    """
    outputs, row = blocks.cell[0], blocks.row
    seen = n * batch * positions
    if path.forward == "mix_inputs":
        between = seen * blocks.out * row
        return seen * blocks.mixtures * row, between * outputs, between
    if path.forward == "mix_outputs":
        between = seen * math.prod(blocks.spatial) * blocks.inn * outputs
        return between * row, seen * blocks.mixtures * outputs, between
    kernels = batch * blocks.mixtures * outputs * row
    return kernels * n, kernels * positions, kernels


def _sum_call(spec: Spec) -> Call:
    return Call("sum", f"sum {spec}", 0, (spec.nbytes,), spec)


def _buffer_call(spec: Spec) -> Call:
    return Call("buffer", f"buffer {spec}", 0, (spec.nbytes,), spec)
