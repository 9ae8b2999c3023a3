"""Find the convolutions and linear layers of any model by running a copy of it on `meta`."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kwlayers.counter import MacCounter
from kwlayers.plan import Network, PlanError, Site

# Exact types only: a subclass may compute something else from its weight.
CONVERTIBLE: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.Linear: "linear",
}

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Their fast paths take the weights of their children.
_READ_WEIGHTS = (nn.TransformerEncoderLayer, nn.MultiheadAttention)

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)


def trace(model: nn.Module, input_size: Sequence[int]) -> Network:
    """The sites of `model` and its static totals, for one image of `input_size` = (C, ...).

    The model may be on any device and is not changed: a copy without data runs on `meta`
    in evaluation mode. Raises PlanError if it does not run on such an input.
    """
    if not isinstance(model, nn.Module):
        raise PlanError(f"model: expected an nn.Module, got {type(model).__name__}")
    if not isinstance(input_size, Sequence) or not all(isinstance(s, int) for s in input_size):
        raise PlanError(f"input_size {input_size!r}: a tuple (C, H, W), without batch")
    size = tuple(input_size)
    if not size or min(size) < 1:
        raise PlanError(f"input_size {size}: positive sizes (C, H, W), without batch")
    refuse_wrapped(model)
    twin = _meta_copy(model).eval()
    params = sum(parameter.numel() for parameter in model.parameters())
    counter, calls = MacCounter(), _Calls()
    for name, module in twin.named_modules():
        if type(module) in CONVERTIBLE:
            module.register_forward_hook(calls.hook(name), with_kwargs=True)
    dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.float32)
    try:
        with torch.no_grad(), _no_fast_path(), counter:
            twin(torch.empty(1, *size, dtype=dtype, device="meta"))
    except Exception as error:
        shown = "x".join(map(str, size))
        raise PlanError(
            f"the model does not run on an input of {shown} (on meta): {error}"
        ) from error
    sites = tuple(_site(name, module, calls, reason) for name, module, reason in candidates(model))
    macs_of_sites = sum(site.positions * math.prod(site.kernel) for site in sites)
    assert counter.macs >= macs_of_sites, (counter.macs, macs_of_sites)
    has_batch_norm = any(isinstance(module, _BATCH_NORMS) for module in model.modules())
    return Network(sites, params, counter.macs, size, has_batch_norm)


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
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch.jit.ScriptModule)
    if isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        raise PlanError(
            f"the model is wrapped in {type(model).__name__}: plan and convert it before wrapping"
        )
    from kwlayers.warehouse import Warehouse

    if any(isinstance(module, Warehouse) for module in model.modules()):
        raise PlanError("the model is already converted: it holds warehouses")


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


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    if nn.parameter.is_lazy(tensor):
        raise PlanError("the model has lazy layers: run it once on real data first")
    # Not empty_like: on meta it imports a second's worth of symbolic shapes.
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def candidates(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """(name, layer, why it cannot be converted) for each layer, in module order."""
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
    found = []
    for name, module in model.named_modules():
        if type(module) not in CONVERTIBLE:
            continue
        reason = ""
        if not name:
            reason = "it is the model itself: wrap it in nn.Sequential"
        elif uses[id(module.weight)] > 1:
            reason = "its weight is tied to another layer's"
        elif id(module) in inside:
            reason = f"{inside[id(module)]} reads its weight without calling it"
        elif any(getattr(module, hooks) for hooks in _HOOKS):
            reason = "it carries hooks"
        found.append((name, module, reason))
    return found


def _site(name: str, module: nn.Module, calls: _Calls, reason: str) -> Site:
    if name not in calls.samples:
        reason = reason or "the forward never calls it"
    kind = CONVERTIBLE[type(module)]
    work = {"positions": calls.positions[name], "samples": calls.samples[name]}
    if isinstance(module, nn.Linear):
        return Site(
            name,
            kind,
            module.in_features,
            module.out_features,
            (1,),
            bias=module.bias is not None,
            fixed=reason,
            **work,
        )
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return Site(
        name,
        kind,
        module.in_channels,
        module.out_channels,
        tuple(module.kernel_size),
        groups=module.groups,
        bias=module.bias is not None,
        fixed=reason,
        **work,
    )


class _Calls:
    """Output positions and kernels needed of each layer, summed over its calls."""

    def __init__(self) -> None:
        self.positions: Counter[str] = Counter()
        self.samples: Counter[str] = Counter()

    def hook(self, name: str) -> Any:
        def record(module: nn.Module, args: Any, kwargs: Any, out: torch.Tensor) -> None:
            x = args[0] if args else kwargs["input"]
            weight = module.weight
            assert isinstance(weight, torch.Tensor)
            self.positions[name] += out.numel() // weight.shape[0]
            # A convolution's batched input has its weight's rank; a linear's at least 2 axes.
            batched = x.dim() > 1 if isinstance(module, nn.Linear) else x.dim() == weight.dim()
            self.samples[name] += x.shape[0] if batched else 1

        return record
