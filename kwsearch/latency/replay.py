"""A call by itself, on data of its own, timed as it would run within a network.

Several copies of the call's tensors take turns, so that weights are as far from the caches as they
are after the rest of a step, but inputs are written right before the call, as the call before it
would have done. In training, all copies run forward first and keep what backward needs, so that
memory is touched for the first time where it would be in a network.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from kwlayers.conv import KWLinear, _KWLayer
from kwlayers.dynamic import DynamicLayer
from kwsearch.latency.calls import MODULE, Call, Spec
from kwsearch.timing import clock_of

# Copies of a call's tensors, and bytes of all of them.
_COPIES, _BYTES = 16, 64 * 2**20
# Copies of a dynamic layer and its warehouse, two if they are large; and uses of each in a round.
_COPIES_OF_LAYERS, _LARGE, _USES = 4, 2**23, 2
# Seconds that a round of functions should not take longer than, with two copies at least.
_ROUND = 0.1
# Results that are still there when the next call writes its own, as inputs of layers are.
_ALIVE = 2
_MODULES, _STARTS = 200, 3


@dataclass(frozen=True)
class _Run:
    """One copy: what is called, with what leaves; own: its parameters that need gradients."""

    call: Callable[[list[Any]], Any]
    leaves: Sequence[Any]
    held: Sequence[Any]
    own: Sequence[Tensor] = ()


class Replay:
    """A call that can be timed: `seconds()` is one round, the mean over its copies."""

    def __init__(self, call: Call, device: str = "cpu") -> None:
        self.device, self.clock = device, clock_of(device)
        self.training = call.kind.endswith("training")
        # Of dynamic layers. The buffer in which they add up its gradient is a call by itself.
        self.warehouses: list[Tensor] = []
        self.shares = False
        self.writes = False
        self.runs = self._runs(call)

    def seconds(self) -> float:
        """Of one call in one round."""
        with torch.set_grad_enabled(self.training):
            begun = self.clock()
            found = self._round()
            took = self.clock() - begun
        if took > _ROUND and not self.shares:
            del self.runs[max(2, int(len(self.runs) * _ROUND / took)) :]
        return found

    def _runs(self, call: Call) -> list[_Run]:
        what: Any = call.what
        if call == MODULE:
            return self._copies([torch.zeros(1)], partial(_called, nn.Identity()), _MODULES)
        if call.kind == "sum":
            return self._copies([what, what], lambda given: given[0].add_(given[1]))
        if call.kind == "buffer":
            options: Any = {"dtype": what.dtype, "device": self.device}
            return self._copies([], lambda given: torch.zeros(what.shape, **options))
        if call.kind.startswith("attention"):
            layer, x = what
            return self._layers(layer, x, _Attention)
        if call.kind.startswith("mixing"):
            layer, x = what
            return self._layers(layer, x, _mixing_of)
        if call.kind.startswith("layer "):
            layer, x = what
            return self._layers(layer, x, _whole)
        function, leaves, structure, self.writes = what

        def called(given: list[Any]) -> Any:
            args, kwargs = tree_unflatten(given, structure)
            return function(*args, **kwargs)

        return self._copies(leaves, called)

    def _copies(
        self, leaves: Sequence[Any], call: Callable[[list[Any]], Any], most: int = _COPIES
    ) -> list[_Run]:
        nbytes = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Spec))
        count = max(2, min(most, _BYTES // max(nbytes, 1)))
        return [
            _Run(call, leaves, [_made(leaf, self.device) for leaf in leaves]) for _ in range(count)
        ]

    def _layers(
        self, layer: DynamicLayer, x: Spec, part: Callable[[Any, Spec], nn.Module]
    ) -> list[_Run]:
        modules = (layer, *layer.borrowed)
        size = sum(p.nbytes for one in modules for p in one.parameters()) + x.nbytes
        self.shares, runs = True, []
        for _ in range(2 if size > _LARGE else _COPIES_OF_LAYERS):
            module = part(_real(layer, self.device, self.training), x)
            borrowed = module.borrowed if isinstance(module, DynamicLayer) else ()
            own = [p for one in (module, *borrowed) for p in one.parameters() if p.requires_grad]
            if isinstance(module, _KWLayer):
                self.warehouses.append(module.warehouse.cells)
            held = [_made(x, self.device)]
            runs.append(_Run(partial(_called, module), [x], held, own))
        return runs * _USES

    def _round(self) -> float:
        total = 0.0
        kept: list[tuple[Any, list[Tensor]]] = []
        alive: deque[Any] = deque(maxlen=_ALIVE)
        for run in self.runs:
            given = [_fresh(leaf, one) for leaf, one in zip(run.leaves, run.held, strict=True)]
            needed = [t for t in given if isinstance(t, Tensor) and t.requires_grad]
            if self.writes and given[0].requires_grad:
                given[0] = given[0].clone()  # a leaf of the graph cannot be written over
            begun = self.clock()
            out = run.call(given)
            total += self.clock() - begun
            if self.training:
                kept.append((out, [*needed, *run.own]))
            else:
                alive.append((out, given))
        # In a network backward starts once; here for each call, or for all layers together.
        start = self._start() if self.training else 0.0
        if self.shares:
            total += max(self._backward(kept) - self._buffers() - start, 0.0)
        while kept and not self.shares:
            total += max(self._backward([kept.pop()]) - start, 0.0)
        return total / len(self.runs)

    def _start(self) -> float:
        """What a backward pass through nothing takes."""
        took = []
        for _ in range(_STARTS):
            x = torch.zeros(1, device=self.device, requires_grad=True)
            took.append(self._backward([(x.view(1), [x])]))
        return min(took)

    def _backward(self, steps: Sequence[tuple[Any, list[Tensor]]]) -> float:
        outs = [out for made, _ in steps for out in _differentiable(made)]
        needed = list({id(tensor): tensor for _, some in steps for tensor in some}.values())
        if not outs or not needed:
            return 0.0
        grads = [torch.rand_like(out) for out in outs]
        begun = self.clock()
        torch.autograd.grad(outs, needed, grads, allow_unused=True)
        return self.clock() - begun

    def _buffers(self) -> float:
        begun = self.clock()
        for cells in self.warehouses if self.training else ():
            torch.zeros_like(cells)
        return self.clock() - begun


def _called(module: nn.Module, given: list[Any]) -> Any:
    return module(given[0])


def _made(leaf: Any, device: str) -> Any:
    """A tensor with data for a Spec; other arguments as they are, but for places."""
    if isinstance(leaf, torch.device):
        return torch.device(device)
    if not isinstance(leaf, Spec):
        return leaf
    reach = sum((size - 1) * step for size, step in zip(leaf.shape, leaf.stride, strict=True)) + 1
    if not leaf.dtype.is_floating_point:
        whole = torch.zeros(reach, dtype=leaf.dtype, device=device)
        return whole.as_strided(leaf.shape, leaf.stride)
    values = torch.rand(max(reach, 1), device=device).sub_(0.5).to(leaf.dtype)
    return values.as_strided(leaf.shape, leaf.stride)


def _fresh(leaf: Any, made: Any) -> Any:
    """The tensor for one call: written anew unless it stays where it is."""
    if not isinstance(leaf, Spec):
        return made
    tensor = made.detach()
    if not leaf.kept and 0 not in leaf.stride:
        tensor = torch.empty_strided(
            leaf.shape, leaf.stride, dtype=leaf.dtype, device=tensor.device
        ).copy_(tensor)
    wanted = leaf.grad and leaf.dtype.is_floating_point and torch.is_grad_enabled()
    return tensor.requires_grad_(wanted)


def _differentiable(out: Any) -> list[Tensor]:
    tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    return [tensor for tensor in tensors if tensor.requires_grad][:1]


def _real(layer: DynamicLayer, device: str, training: bool) -> DynamicLayer:
    """The layer with memory and data, and what it borrows as its own."""
    made = copy.deepcopy(layer)
    for part in (made, *made.borrowed):
        part.to_empty(device=device).train(training)
        for module in reversed([*part.modules()]):  # a layer knows better than its parts
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    return made


def _whole(layer: DynamicLayer, x: Spec) -> DynamicLayer:
    layer.alone_(x.shape[0])
    return layer


class _Given(nn.Module):
    """An attention that was computed before."""

    def __init__(self, alpha: Tensor) -> None:
        super().__init__()
        self.alpha = nn.Parameter(alpha)

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha


class _Attention(nn.Module):
    """Of a layer, on what the layer is given."""

    def __init__(self, layer: _KWLayer, x: Spec) -> None:
        super().__init__()
        self.attention, self.tokens = layer.attention, isinstance(layer, KWLinear)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.attention(KWLinear.tokens(x) if self.tokens else x)
        return found


def _mixing_of(layer: _KWLayer, x: Spec) -> nn.Module:
    attention = layer.attention
    cells = layer.warehouse.cells
    shape = (x.shape[0], attention.num_mixtures, attention.num_cells)
    alpha = torch.randn(shape, device=cells.device, dtype=cells.dtype)
    layer.attention = _Given(alpha / alpha.abs().sum(-1, keepdim=True))  # type: ignore[assignment]
    return layer
