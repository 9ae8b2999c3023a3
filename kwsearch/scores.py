"""Zero-cost scores: what one mini-batch through a fresh network says about its accuracy.

Abdelfattah et al. 2021 (arXiv 2101.08134) compare them. Each runs on a copy in double or its own
precision, so that parameters, their gradients, buffers and mode stay as they are. Temperatures are
as the model has them: at 0, fresh attentions give gradients that are orders of magnitude larger
than at 1, where training begins. Whether a score ranks trials is for the study to measure.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def grad_norm(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Sum over parameters of the L2 norm of the cross-entropy's gradient.

    x: (B, C, H, W)  y: (B,) classes. In training mode. As in arXiv 2101.08134, section 3.2, but
    over all parameters, as kernels mixed by an attention have no gradients of their own; a shared
    one counts once.
    """
    model = copy.deepcopy(model).train()
    _, grads = _gradients(model, F.cross_entropy(model(x), y))
    return sum(float(torch.linalg.vector_norm(grad)) for grad in grads)


def synflow(model: nn.Module, size: tuple[int, ...]) -> float:
    """Tanaka et al. 2020 (arXiv 2006.05467): sum over parameters of |theta * dR / dtheta|.

    size: (C, H, W). R: the sum of the outputs for an input of ones, with the absolute values of
    all parameters. In float64, as R grows exponentially with depth, and in evaluation mode, where
    a fresh batch norm passes signals through. R is a sum over paths in static networks of ReLUs
    (of ReLU6, too, whose ceiling is lifted); an attention, a layer norm or another
    nonlinearity rescales them.
    """
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    first = next(model.parameters())
    ones = torch.ones(1, *size, dtype=first.dtype, device=first.device)
    with _NoCeiling():
        flow = model(ones).sum()
    parameters, grads = _gradients(model, flow)
    return sum(
        float((parameter.detach() * grad).abs().sum())
        for parameter, grad in zip(parameters, grads, strict=True)
    )


class _NoCeiling(TorchFunctionMode):
    """ReLU6 as ReLU: signals that grow with depth would all end at 6, and their gradients at 0."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (F.relu6, F.hardtanh):
            return F.relu(args[0])
        return func(*args, **(kwargs or {}))


def jacob_cov(model: nn.Module, x: Tensor) -> float:
    """How differently a network reacts to different images: -sum(log(v + k) + 1 / (v + k)).

    x: (B, C, H, W), at least 2. v: eigenvalues of the (B, B) correlation matrix of the gradients
    of the summed outputs for each image; k = 1e-5. At most about -B, when all are uncorrelated.
    In training mode, as published. Mellor et al. 2020 (arXiv 2006.04647, version 1), as in
    arXiv 2101.08134. nan where an image's gradient is constant, as of a dead network.
    """
    model = copy.deepcopy(model).train()
    x = x.detach().clone().requires_grad_()
    (jacobian,) = torch.autograd.grad(model(x).sum(), x)
    correlation = torch.corrcoef(jacobian.flatten(1).double())
    if not correlation.isfinite().all():
        return math.nan
    v = torch.linalg.eigvalsh(correlation) + 1e-5
    return -float((v.log() + 1 / v).sum())


def _gradients(model: nn.Module, value: Tensor) -> tuple[list[nn.Parameter], tuple[Tensor, ...]]:
    """The parameters and their gradients, zero where the value does not depend on one."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return parameters, torch.autograd.grad(
        value, parameters, allow_unused=True, materialize_grads=True
    )


SCORES: dict[str, Callable[[nn.Module, Tensor, Tensor], float]] = {
    "grad_norm": grad_norm,
    "synflow": lambda model, x, y: synflow(model, tuple(x.shape[1:])),
    "jacob_cov": lambda model, x, y: jacob_cov(model, x),
}


def score_all(
    make_model: Callable[[], nn.Module], x: Tensor, y: Tensor, seed: int
) -> dict[str, float]:
    """All `SCORES` of the network that `make_model` makes under this seed, by name.

    x: (B, C, H, W)  y: (B,) classes; the network moves to their device. Random numbers outside
    go on as if nothing had been drawn.
    """
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        torch.manual_seed(seed)
        model = make_model().to(x.device)
        found = {}
        for name, score in SCORES.items():
            torch.manual_seed(seed)  # of dropout, whatever was scored before
            found[name] = score(model, x, y)
    return found
