"""A call by itself, on data of its own, timed as it would run within a network.

Several copies of the call's tensors take turns, so that weights are as far from the caches as they
are after the rest of a step, but inputs are written right before the call, as the call before it
would have done. In training, all copies run forward first and keep what backward needs, so that
memory is touched for the first time where it would be in a network.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from kwlayers.conv import KWLinear, _KWLayer
from kwlayers.warehouse import Warehouse
from kwsearch.latency.calls import MODULE, Call, Spec

# Copies of a call's tensors, and bytes of all of them.
_COPIES, _BYTES = 16, 64 * 2**20
# Results that are still there when the next call writes its own, as inputs of layers are.
_ALIVE = 2
_MODULES = 200

Clock = Callable[[], float]


class Replay:
    """A call that can be timed: `seconds()` is one round, the mean over its copies."""

    def __init__(self, call: Call, training: bool, clock: Clock = time.perf_counter) -> None:
        self.call, self.training, self.clock = call, training, clock
        self.round: Callable[[], float] = self._made()

    def seconds(self) -> float:
        """Of one call in one round."""
        with torch.set_grad_enabled(self.training):
            return self.round()

    def _made(self) -> Callable[[], float]:
        call, what = self.call, self.call.what
        layer: _KWLayer
        if call == MODULE:
            return self._modules
        if call.kind == "sum":
            return self._writing([what, what], lambda tensors: tensors[0].add_(tensors[1]))
        if call.kind == "buffer":
            return self._writing([], lambda _: torch.zeros(what.shape, dtype=what.dtype))
        if call.kind.startswith("attention"):
            layer, x = what
            return self._layers(layer, x, _Attention)
        if call.kind.startswith("mixing"):
            layer, x = what
            return self._layers(layer, x, _mixing_of)
        return self._function(*what)

    def _modules(self) -> float:
        """Of a module that does nothing."""
        module, x = nn.Identity(), torch.zeros(1)
        begun = self.clock()
        for _ in range(_MODULES):
            module(x)
        return (self.clock() - begun) / _MODULES

    def _writing(
        self, specs: Sequence[Spec], run: Callable[[Sequence[Any]], Any]
    ) -> Callable[[], float]:
        """Without gradients."""
        copies = _copies_of(specs)

        def round_() -> float:
            alive: deque[Any] = deque(maxlen=_ALIVE)
            total = 0.0
            with torch.no_grad():
                for held in copies:
                    tensors = [_fresh(spec, one) for spec, one in zip(specs, held, strict=True)]
                    begun = self.clock()
                    alive.append(run(tensors))
                    total += self.clock() - begun
            return total / len(copies)

        return round_

    def _function(
        self, function: Callable[..., Any], leaves: Sequence[Any], structure: Any, writes: bool
    ) -> Callable[[], float]:
        copies = _copies_of(leaves)

        def round_() -> float:
            total = 0.0
            kept: list[tuple[Any, list[Tensor]]] = []
            alive: deque[Any] = deque(maxlen=_ALIVE)
            for held in copies:
                given = [_fresh(leaf, one) for leaf, one in zip(leaves, held, strict=True)]
                needed = [t for t in given if isinstance(t, Tensor) and t.requires_grad]
                if writes and given[0].requires_grad:
                    given[0] = given[0].clone()  # a leaf of the graph cannot be written over
                args, kwargs = tree_unflatten(given, structure)
                begun = self.clock()
                out = function(*args, **kwargs)
                total += self.clock() - begun
                if self.training:
                    kept.append((out, needed))
                else:
                    alive.append((out, given))
            while kept:
                out, needed = kept.pop()
                total += self._backward(_differentiable(out), needed)
            return total / len(copies)

        return round_

    def _backward(self, outs: Sequence[Tensor], needed: Sequence[Tensor]) -> float:
        if not outs or not needed:
            return 0.0
        grads = [torch.rand_like(out) for out in outs]
        begun = self.clock()
        torch.autograd.grad(outs, needed, grads, allow_unused=True)
        return self.clock() - begun

    def _layers(
        self, layer: _KWLayer, x: Spec, part: Callable[[_KWLayer, Spec], nn.Module]
    ) -> Callable[[], float]:
        """Calls of dynamic layers, which add up the gradients of their warehouse together."""
        size = layer.warehouse.cells.nbytes + x.nbytes
        count = max(2, min(4, _BYTES // max(size, 1)))
        modules = [part(_real(layer, self.training), x) for _ in range(count)]
        held = [_made(x) for _ in modules]
        repeats = 2  # of each warehouse in a step

        def round_() -> float:
            total = 0.0
            kept: list[tuple[Any, Tensor, Tensor]] = []
            alive: deque[Any] = deque(maxlen=_ALIVE)
            for module, one in [*zip(modules, held, strict=True)] * repeats:
                given = _fresh(x, one)
                begun = self.clock()
                out = module(given)
                total += self.clock() - begun
                (kept if self.training else alive).append((module, given, out))
            if kept:
                outs = [out for _, _, out in kept]
                needed = [given for _, given, _ in kept if given.requires_grad]
                for module in modules:
                    needed += [p for p in _parameters(module) if p.requires_grad]
                total += self._backward(outs, needed)
                buffers = sum(_zeros_seconds(module, self.clock) for module in modules)
                total = max(total - buffers, 0.0)
            return total / (len(modules) * repeats)

        return round_


def _copies_of(leaves: Sequence[Any]) -> list[list[Any]]:
    nbytes = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Spec))
    count = max(2, min(_COPIES, _BYTES // max(nbytes, 1)))
    return [[_made(leaf) for leaf in leaves] for _ in range(count)]


def _made(leaf: Any) -> Any:
    """A tensor with data for a Spec; other arguments as they are."""
    if not isinstance(leaf, Spec):
        return leaf
    reach = sum((size - 1) * step for size, step in zip(leaf.shape, leaf.stride, strict=True)) + 1
    if not leaf.dtype.is_floating_point:
        return torch.zeros(reach, dtype=leaf.dtype).as_strided(leaf.shape, leaf.stride)
    values = torch.rand(max(reach, 1)).sub_(0.5).to(leaf.dtype)
    return values.as_strided(leaf.shape, leaf.stride)


def _fresh(leaf: Any, made: Any) -> Any:
    """The tensor for one call: written anew unless it stays where it is."""
    if not isinstance(leaf, Spec):
        return made
    tensor = made.detach()
    if not leaf.kept and 0 not in leaf.stride:
        tensor = torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype).copy_(tensor)
    wanted = leaf.grad and leaf.dtype.is_floating_point and torch.is_grad_enabled()
    return tensor.requires_grad_(wanted)


def _differentiable(out: Any) -> list[Tensor]:
    tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    return [tensor for tensor in tensors if tensor.requires_grad][:1]


def _real(layer: _KWLayer, training: bool) -> _KWLayer:
    """The layer with memory and data, and a warehouse of its own."""
    made = copy.deepcopy(layer).to_empty(device="cpu")
    old = layer.warehouse
    warehouse = Warehouse(old.num_cells, old.cell, old.num_mixtures)
    nn.init.normal_(warehouse.cells)
    made._warehouse = (warehouse,)
    made.reset_parameters()
    for module in made.attention.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    return made.train(training)


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
    alpha = torch.randn(x.shape[0], attention.num_mixtures, attention.num_cells)
    layer.attention = _Given(alpha / alpha.abs().sum(-1, keepdim=True))  # type: ignore[assignment]
    return layer


def _parameters(module: nn.Module) -> list[Tensor]:
    own: list[Tensor] = list(module.parameters())
    return [*own, module.warehouse.cells] if isinstance(module, _KWLayer) else own


def _zeros_seconds(module: nn.Module, clock: Clock) -> float:
    """Of the buffer of a warehouse's gradient, which is a call of its own."""
    if not isinstance(module, _KWLayer):
        return 0.0
    begun = clock()
    torch.zeros_like(module.warehouse.cells)
    return clock() - begun
