"""Find the convolutions and linear layers of any model by running a copy of it on `meta`."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kwlayers.blocks import blocks_of
from kwlayers.counter import MacCounter
from kwlayers.plan import Block, Network, Other, PlanError, Site, short, shown

# Exact types only: a subclass may compute something else.
CONVERTIBLE: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.Linear: "linear",
}

_LAYERS = tuple(CONVERTIBLE)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Their fast paths take the weights of their children.
_READ_WEIGHTS = (nn.TransformerEncoderLayer, nn.MultiheadAttention)

_QUANTISED = ("torch.ao.nn.", "torch.nn.quantized", "torch.nn.qat", "torch.nn.intrinsic")

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def trace(model: nn.Module, input_size: Sequence[int]) -> Network:
    """The sites of `model` and its static totals, for one image of `input_size` = (C, ...).

    The model may be on any device and is not changed: a copy without data runs on `meta`
    in evaluation mode. Raises PlanError if it does not run on such an input.
    """
    refuse_wrapped(model)
    if not isinstance(input_size, Sequence) or not all(isinstance(s, int) for s in input_size):
        raise PlanError(f"input_size {short(input_size)}: a tuple (C, H, W), without batch")
    size = tuple(input_size)
    if not size or min(size) < 1:
        raise PlanError(f"input_size {size}: positive sizes (C, H, W), without batch")
    twin = _meta_copy(model).eval()
    params = sum(parameter.numel() for parameter in model.parameters())
    counter = MacCounter()
    found = candidates(model)
    blocks = blocks_of(model, [name for name, _, _ in found])
    watched = _Blocks(twin, {name for name in blocks.values() if name}, counter)
    try:
        with counter, watched:
            calls = _Calls.of(twin, 1, size)
    except Exception as error:
        raise PlanError(
            f"the model does not run on an input of {'x'.join(map(str, size))} (traced without "
            f"data, on meta): {_explained(error)}{error}"
        ) from error
    constant = _constant(twin, size, calls)
    contexts = _contexts(model, [name for name, _, _ in found])
    sites = tuple(
        replace(
            _site(name, module, calls, reason),
            block=blocks[name],
            constant=name in constant,
            context=contexts.get(name, 0),
            followed=calls.positions[name] > 0 and calls.first[name]["order"] < calls.weighed,
        )
        for name, module, reason in found
    )
    macs_of_sites = sum(site.positions * math.prod(site.kernel) for site in sites)
    assert counter.macs >= macs_of_sites, (counter.macs, macs_of_sites)
    has_batch_norm = any(isinstance(module, _BATCH_NORMS) for module in model.modules())
    others = tuple(_others(model, {name for name, _, _ in found}))
    return Network(sites, params, counter.macs, size, has_batch_norm, others, watched.found())


def _explained(error: Exception) -> str:
    """What torch's words mean for a forward that cannot be traced; empty for other errors."""
    text = str(error)
    if re.search("index|indices", text) and re.search(r"\b(long|int|int32/int64)\b|Long", text):
        return (
            "its forward takes integers, such as tokens or classes; only networks of real numbers "
            "are supported. torch says: "
        )
    if re.search(r"\bmeta\b|Meta tensors|data-independent", text):
        return (
            "its forward reads the values of its input or of a result, which is not supported. "
            "torch says: "
        )
    return ""


def _others(model: nn.Module, sites: set[str]) -> Iterator[Other]:
    """Modules besides the sites that hold weights of two axes or more."""
    for name, module in model.named_modules():
        if name in sites or isinstance(module, _NORMS):
            continue
        own = [p for p in module._parameters.values() if p is not None]
        if any(sum(size > 1 for size in p.shape) > 1 for p in own):
            yield Other(name, type(module).__name__, sum(p.numel() for p in own))


def _contexts(model: nn.Module, layers: Sequence[str]) -> dict[str, int]:
    """The size of the context that a layer's block offers it, by name."""
    from kwlayers.context import ContextBlock

    return {
        layer: module.context_size
        for name, module in model.named_modules()
        if isinstance(module, ContextBlock)
        for layer in layers
        if layer.startswith(f"{name}.")
    }


def _constant(twin: nn.Module, size: tuple[int, ...], calls: _Calls) -> set[str]:
    """Layers whose input is as large for two images as for one, as tables of positions are."""
    try:
        with MacCounter():  # for its shape rules
            twice = _Calls.of(twin, 2, size)
    except Exception:  # it takes one image at a time: nothing can be said
        return set()
    return {name for name, entries in calls.entries.items() if twice.entries[name] == entries}


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """torch.nn's transformers by their single operators, which can be counted."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def refuse_wrapped(model: nn.Module) -> None:
    """Raise PlanError for what cannot be planned or converted in place."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise PlanError(f"model: expected an nn.Module, got {what}")
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch.jit.ScriptModule)
    if isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        raise PlanError(
            f"the model is wrapped in {type(model).__name__}: plan and convert it before wrapping"
        )
    for name, module in model.named_modules():
        if type(module).__module__.startswith(_QUANTISED):
            raise PlanError(
                f"the model is quantised ({shown(name)} is a {type(module).__module__}."
                f"{type(module).__name__}): plan and convert the floating-point model"
            )
    from kwlayers.dynamic import DynamicLayer
    from kwlayers.warehouse import Warehouse

    if any(isinstance(module, (DynamicLayer, Warehouse)) for module in model.modules()):
        raise PlanError("the model is already converted: it has dynamic layers")


def _meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose tensors have no data; the original's are never copied."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = nn.Parameter(_empty(parameter), requires_grad=False)
        for buffer in module._buffers.values():
            if buffer is not None:
                memo[id(buffer)] = _empty(buffer)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise PlanError(f"the model cannot be copied for tracing: {error}") from error


def _empty(tensor: Tensor) -> Tensor:
    if nn.parameter.is_lazy(tensor):
        raise PlanError("the model has lazy layers: run it once on real data first")
    # Not empty_like: on meta it imports a second's worth of symbolic shapes.
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def candidates(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """(name, layer, why it cannot be converted) for each layer, in module order."""
    from kwlayers.context import Steering

    uses = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    inside = {
        id(child): type(parent).__name__
        for parent in model.modules()
        if isinstance(parent, _READ_WEIGHTS)
        for child in parent.children()
    }
    steering = {
        id(child): type(parent).__name__
        for parent in model.modules()
        if isinstance(parent, Steering)
        for child in parent.modules()
    }
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, _LAYERS):
            continue
        reason = ""
        if not name:
            reason = "it has no parent to be swapped in: wrap it in nn.Sequential"
        elif uses[id(module.weight)] > 1:
            reason = "its weight is tied to another layer's"
        elif id(module) in inside:
            reason = f"{inside[id(module)]} reads its weight without calling it"
        elif id(module) in steering:
            reason = f"{steering[id(module)]} makes factors or kernels with it"
        elif any(getattr(module, hooks) for hooks in _HOOKS):
            reason = "it carries hooks"
        elif type(module.weight) not in (nn.Parameter, Tensor):
            reason = f"its weight is no plain tensor but of type {type(module.weight).__name__}"
        elif type(module) not in CONVERTIBLE:
            reason = f"{type(module).__name__} may compute something else from its weight"
        found.append((name, module, reason))
    return found


def _site(name: str, module: nn.Module, calls: _Calls, reason: str) -> Site:
    if name not in calls.samples:
        reason = reason or "the forward never calls it"
    if name in calls.weights_read:
        reason = reason or "something else reads its weight"
    work: dict[str, Any] = {
        "positions": calls.positions[name],
        "samples": calls.samples[name],
        "bias": module.bias is not None,
        "fixed": reason,
        **calls.first.get(name, {}),
    }
    kind = next(kind for layer, kind in CONVERTIBLE.items() if isinstance(module, layer))
    if isinstance(module, nn.Linear):
        return Site(name, kind, module.in_features, module.out_features, (1,), **work)
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return Site(
        name,
        kind,
        module.in_channels,
        module.out_channels,
        tuple(module.kernel_size),
        groups=module.groups,
        **work,
    )


class _Blocks:
    """Blocks of a model on `meta`, watched while it runs: their MACs, and shapes in and out."""

    def __init__(self, twin: nn.Module, names: set[str], counter: MacCounter) -> None:
        self.modules = {name: module for name, module in twin.named_modules() if name in names}
        self.counter = counter
        self.macs: Counter[str] = Counter()
        self.even: dict[str, bool] = {}
        self.given: dict[str, set[tuple[int, ...]]] = {name: set() for name in self.modules}
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for name, module in self.modules.items():
            begun: list[int] = []

            def before(
                module: nn.Module,
                args: Any,
                kwargs: Any,
                begun: list[int] = begun,
                name: str = name,
            ) -> None:
                begun.append(self.counter.macs)
                x = next(iter((*args, *kwargs.values())), None)
                # Of one image, as the whole model's input.
                shape = tuple(x.shape) if isinstance(x, Tensor) else ()
                self.given[name].add(shape[1:] if shape[:1] == (1,) else ())

            def after(
                module: nn.Module, args: Any, out: Any, name: str = name, begun: list[int] = begun
            ) -> None:
                self.macs[name] += self.counter.macs - begun.pop()
                shapes = [x.shape for x in (*args[:1], out) if isinstance(x, Tensor)]
                same = len(shapes) == 2 and shapes[0] == shapes[1]
                self.even[name] = self.even.get(name, True) and same

            self._handles += [
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after),
            ]

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def found(self) -> tuple[Block, ...]:
        return tuple(
            Block(
                name,
                sum(parameter.numel() for parameter in module.parameters()),
                self.macs[name],
                self.even.get(name, False),
                next(iter(self.given[name])) if len(self.given[name]) == 1 else (),
            )
            for name, module in self.modules.items()
        )


class _Calls:
    """What the layers of a model are called with.

    positions, samples: output positions and kernels needed, summed over calls. entries: numbers
    of the inputs. first: of the first call, as `Site` has it. weights_read: layers whose weight
    something other than their own call asked for. weighed: how many layers had been called when
    another module with weights last ran.
    """

    def __init__(self) -> None:
        self.positions: Counter[str] = Counter()
        self.samples: Counter[str] = Counter()
        self.entries: Counter[str] = Counter()
        self.first: dict[str, dict[str, Any]] = {}
        self.weights_read: set[str] = set()
        self.weighed = 0
        # Kept, so that no other tensor gets the same identity.
        self._inputs: dict[int, tuple[Tensor, str]] = {}

    @classmethod
    def of(cls, twin: nn.Module, batch: int, size: tuple[int, ...]) -> _Calls:
        """Run a model on `meta` and watch its layers."""
        calls = cls()
        layers = {n: m for n, m in twin.named_modules() if isinstance(m, _LAYERS)}
        classes = {module: type(module) for module in layers.values()}
        handles = [
            module.register_forward_hook(calls.hook(name), with_kwargs=True)
            for name, module in layers.items()
        ]
        for other in _others(twin, set(layers)):
            module = twin.get_submodule(other.name)
            if not any(isinstance(child, _LAYERS) for child in module.modules()):
                handles.append(module.register_forward_hook(calls.weigh))
        for name, module in layers.items():
            module.__class__ = _watched(type(module), name, calls.weights_read)
        dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.float32)
        try:
            with torch.no_grad(), _no_fast_path():
                twin(torch.empty(batch, *size, dtype=dtype, device="meta"))
        finally:
            for module, own in classes.items():
                module.__class__ = own
            for handle in handles:
                handle.remove()
        return calls

    def weigh(self, module: nn.Module, args: Any, out: Any) -> None:
        self.weighed = len(self.first)

    def hook(self, name: str) -> Any:
        def record(module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> None:
            x = args[0] if args else kwargs["input"]
            weight = module.weight
            assert isinstance(weight, Tensor)
            linear = isinstance(module, nn.Linear)
            channels = weight.shape[1] if linear else module.in_channels
            assert isinstance(channels, int)
            out_positions = out.numel() // weight.shape[0]
            _, reader = self._inputs.setdefault(id(x), (x, name))
            if name not in self.first:
                self.first[name] = {
                    "in_positions": x.numel() // channels,
                    "out_positions": out_positions,
                    "order": len(self.first),
                    "beside": "" if reader == name else reader,
                }
            self.positions[name] += out_positions
            self.entries[name] += x.numel()
            # A convolution's batched input has its weight's rank; a linear's at least 2 axes.
            batched = x.dim() > 1 if linear else x.dim() == weight.dim()
            self.samples[name] += x.shape[0] if batched else 1

        return record


def _watched(kind: type[nn.Module], name: str, weights_read: set[str]) -> type[nn.Module]:
    """The class of a layer that notes its name when its weight is read from outside."""

    class Watched(kind):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            self.__dict__["_called"] = True
            try:
                return super().__call__(*args, **kwargs)
            finally:
                self.__dict__["_called"] = False

        def __getattr__(self, key: str) -> Any:
            if key == "weight" and not self.__dict__.get("_called"):
                weights_read.add(name)
            return super().__getattr__(key)

    Watched.__name__ = kind.__name__
    return Watched
