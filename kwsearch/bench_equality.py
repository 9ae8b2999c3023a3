"""Ours against the published form before anything is timed: outputs and every gradient."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kwlayers.ops import Choice
from kwsearch.bench import BenchFailed, Call, Case, calls, choices, images, networks
from kwsearch.bench_layers import Layer, timeable

# Of the largest value that the published form in float64 has in the same tensor. float32, with
# what a GPU makes of it (TF32), is for paths that have no float64.
TOLERANCE = {"float64": 1e-10, "float32": 1e-2}
CHECK_BATCH, CHECK_SIZE = 2, 64
# At 0 the layers of a fresh network multiply rounding errors: to 1e-8 in resnet101, and halfway
# to 1e-12.
CHECK_TEMPERATURE = 0.5
# MiB; None is the default. In a small one the kernels of a small check come in blocks, too.
CHECK_WORKSPACES = (None, 1)

Errors = dict[str, float]
Paths = tuple[tuple[str, Choice], ...]


class Unequal(BenchFailed):
    """Ours computes something else than the published form: there is nothing to time."""


class Refused(BenchFailed):
    """A backend cannot do a layer, in float64 or float32."""


@dataclass(frozen=True)
class Equality:
    """How far ours is from the published form at most, and in which tensor."""

    what: str
    dtype: str
    batch: int
    size: int
    compared: int
    worst: float
    tensor: str

    def __str__(self) -> str:
        return (
            f"{self.what} equal within {self.worst:.0e} ({self.compared} tensors in "
            f"{self.dtype}, batch {self.batch}, {self.size} px)"
        )


def check(case: Case) -> tuple[Equality, ...]:
    """Compare ours with the published form; raises Unequal.

    The network in float64, on a batch of 2 at no more than 64 px, but each layer by the paths
    that it takes in the case itself. In evaluation mode, where no gradient is lost in norms over
    two samples, and halfway between assignment and attention. Compared are the output and the
    gradients of all parameters. A path that has no float64 is compared layer by layer instead.
    """
    small = replace(
        case,
        batch=CHECK_BATCH,
        size=min(case.size, CHECK_SIZE),
        step="forward",
        dtype="float64",
        backend=None,
    )
    paths = tuple(choices(case).items())
    network, refusing = _check_network(small, paths)
    found = [network]
    for name in refusing:
        layers = {call for layer, call in calls(case).items() if name in dict(paths)[layer]}
        alone = [check_layer(call, case, name) for call in layers]
        worst = max(alone, key=lambda one: one.worst)
        found.append(replace(worst, what=f"layers by {name}", compared=len(alone) * worst.compared))
    return tuple(found)


@functools.cache
def _check_network(case: Case, paths: Paths) -> tuple[Equality, tuple[str, ...]]:
    """And which paths refuse float64: their layers are the published form here."""
    published, ours = networks(case, ("published", "ours"), CHECK_TEMPERATURE).values()
    x = images(case)
    grad = torch.randn_like(published(x))
    expected = _network_tensors(published, x, grad)
    refusing: tuple[str, ...] = ()
    try:
        found = _network_errors(ours, paths, x, grad, expected)
    except ValueError:
        refusing = _refusing(ours, paths, x)
        kept = Choice("published", "published")
        allowed = tuple((n, kept if {*c} & {*refusing} else c) for n, c in paths)
        found = _network_errors(ours, allowed, x, grad, expected)
    used = ", ".join(sorted({str(choice) for _, choice in paths} - {*refusing}))
    what = f"{case.model} b={case.ratio:g} by {used or 'published'}"
    return _equality(found, "float64", case.batch, case.size, what), refusing


def _network_errors(
    ours: nn.Module, paths: Paths, x: Tensor, grad: Tensor, expected: Mapping[str, Tensor]
) -> Errors:
    runs = []
    # First all forward paths for both directions, then all backward paths where they differ.
    for names in dict.fromkeys(zip(*(choice for _, choice in paths), strict=True)):
        for workspace_mb in CHECK_WORKSPACES:
            for (layer, _), name in zip(paths, names, strict=True):
                module: Any = ours.get_submodule(layer)
                module.backend, module.workspace_mb = name, workspace_mb
            runs.append(errors(expected, _network_tensors(ours, x, grad)))
    return _worst(*runs)


def _network_tensors(model: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The output for x (B, C, H, W) and the gradients of all parameters behind it."""
    model.zero_grad(set_to_none=True)
    out = model(x)
    out.backward(grad)
    named = {f"the gradient of {name}": p.grad for name, p in model.named_parameters()}
    kept = {name: found for name, found in named.items() if found is not None}
    model.zero_grad(set_to_none=True)
    return {"the output": out.detach(), **kept}


def _refusing(ours: nn.Module, paths: Paths, x: Tensor) -> tuple[str, ...]:
    """The paths that raise ValueError for x."""
    found = []
    for name in sorted({name for _, choice in paths for name in choice}):
        for layer, choice in paths:
            module: Any = ours.get_submodule(layer)
            module.backend = name if name in choice else "published"
        try:
            with torch.no_grad():
                ours(x)
        except ValueError:
            found.append(name)
    return tuple(found)


def check_layers(call: Call, case: Case) -> dict[str, Equality | str]:
    """Every backend's equality with the published form, or why it refuses the layer.

    Raises Unequal.
    """
    results: dict[str, Equality | str] = {}
    for backend in timeable():
        try:
            results[backend] = check_layer(call, case, backend)
        except Refused as refused:
            results[backend] = str(refused)
    return results


def check_layer(call: Call, case: Case, backend: str) -> Equality:
    """One layer by one backend; raises Unequal and Refused.

    In float64, or where it refuses that in float32, on a batch of 2 of the layer's own size.
    """
    small = call._replace(batch=min(call.batch, CHECK_BATCH), needs_grad=True)
    return _check_layer(small, replace(case, step="forward", dtype="float32"), backend)


@functools.cache
def _check_layer(small: Call, case: Case, backend: str) -> Equality:
    expected = _layer_tensors(Layer(small, case, torch.float64), "published", None)
    kernel, size = ("x".join(map(str, sizes)) for sizes in (small.geometry.kernel, small.size))
    what = f"a kernel {kernel} on {size} by {backend}"
    reason = ""
    for dtype in TOLERANCE:
        layer = Layer(small, case, getattr(torch, dtype))
        try:
            runs = [_layer_tensors(layer, backend, given) for given in CHECK_WORKSPACES]
        except ValueError as error:
            reason = str(error)
            continue
        found = _worst(*(errors(expected, run) for run in runs))
        return _equality(found, dtype, small.batch, max(small.size), what)
    raise Refused(reason)


def _layer_tensors(layer: Layer, backend: str, workspace_mb: float | None) -> dict[str, Tensor]:
    out = layer.mixed(backend, workspace_mb)
    torch.manual_seed(1)
    grad = torch.randn(out.shape, dtype=torch.float64, device=out.device).to(out.dtype)
    grads = torch.autograd.grad(out, list(layer.tensors.values()), grad)
    named = (f"the gradient of {name}" for name in layer.tensors)
    return {"the output": out.detach(), **dict(zip(named, grads, strict=True))}


def errors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Errors:
    """The largest difference in each tensor, relative to the largest value that is expected.

    Infinite where a tensor is missing, or is not zero as expected; NaN where there is one.
    """
    result = {}
    for name, right in expected.items():
        if not right.numel():
            continue
        if name not in found:
            result[name] = math.inf
            continue
        largest = float(right.abs().max())
        difference = float((found[name].to(right.dtype) - right).abs().max())
        if largest == 0:
            result[name] = math.inf if difference else 0.0
        else:
            result[name] = difference / largest
    return result


def _worst(*runs: Errors) -> Errors:
    return {name: max((run[name] for run in runs), key=_badness) for name in runs[0]}


def _badness(error: float) -> tuple[bool, float]:
    """NaN is worse than any number."""
    return (math.isnan(error), error)


def _equality(found: Errors, dtype: str, batch: int, size: int, what: str) -> Equality:
    order = sorted(found, key=lambda name: _badness(found[name]), reverse=True)
    wrong = [name for name in order if not found[name] <= TOLERANCE[dtype]]
    if wrong:
        wrong.sort(key=lambda name: name != "the output")
        shown = "\n".join(f"  {name} by {found[name]:.1e}" for name in wrong[:3])
        more = f"\n  and {len(wrong) - 3} more tensors" if len(wrong) > 3 else ""
        raise Unequal(
            f"{what} differs from the published form ({dtype}, batch {batch}, {size} px), relative "
            f"to each tensor's largest value (allowed {TOLERANCE[dtype]:.0e}):\n"
            f"{shown}{more}\nnothing was timed"
        )
    return Equality(what, dtype, batch, size, len(found), found[order[0]], order[0])
