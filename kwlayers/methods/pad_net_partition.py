"""PAD-Net's weights: which are dynamic (Iterative Mode Partition), and what that leaves to store.

He et al., ACL 2023, arXiv 2211.05528; the layers are in `kwlayers.methods.pad_net`. Each of n
rounds scores every weight anew, while the masks of the round before hold, and of all W weights
those of the largest scores become dynamic: kappa * W after the last round, the plan's number, and
after round t, rounded up,

    kappa^(t / n) * W, exponential, or (1 - (1 - kappa) * t / n) * W, linear.

Weights may become dynamic again. Among equal scores the first are taken, in module order: the
published threshold makes all of them static, and fewer stay dynamic than were asked for. Scores:

    snip        |dL / dm|, m the mask as a number, with the loss L added up over all batches: by how
                much it changes if a weight turns from dynamic to static or back
    random      uniform
    magnitude   mean_k |W_k|

dL / dm is the sum over samples of dL / dW * (l_d * sum_k alpha_k W_k - l_s * V). Published is one
round, before training, with scores divided by their sum, which changes no order; the code's own are
random ones. Magnitudes fail there; its GraSP, SynFlow and variance are not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kwlayers.convert import Warehouses
from kwlayers.methods.pad_net import PADLayer, Partition
from kwlayers.plan import PlanError, short
from kwlayers.schedule import WAREHOUSES

Batches = Iterable[tuple[Any, Any]]
Loss = Callable[[Any, Any], Tensor]
Layers = Mapping[str, PADLayer]
Tensors = dict[str, Tensor]

SCHEDULES = ("exponential", "linear")


@dataclass(frozen=True)
class Partitioned:
    """positions: dynamic weights of each layer, by name. weights: of as many."""

    positions: Mapping[str, int]
    weights: Mapping[str, int]

    @property
    def kappa(self) -> dict[str, float]:
        """The part of each layer's weights that is dynamic."""
        return {name: found / self.weights[name] for name, found in self.positions.items()}


@dataclass(frozen=True)
class Deployed:
    """Parameters of the model, before and after."""

    before: int
    after: int


def partition_(
    model: nn.Module,
    batches: Batches = (),
    loss: Loss | None = None,
    *,
    rounds: int = 1,
    schedule: str = "exponential",
    scores: str = "snip",
) -> Partitioned:
    """Leave as many weights of a PAD-Net model dynamic as its plan says, in place.

    batches: (inputs, targets), gone through once in each round; on the model's device. loss: of
    model(inputs) and targets, a number. Both are for snip only, which runs in evaluation mode.
    rounds, schedule: see above. Call it before training, and before an optimizer has made its
    states; but after `TemperatureSchedule`, which sets the temperature that training starts at.
    Published snip, too, sees nearly even kernels (T = 31 there; here the plan's max_temperature,
    30). Only masks change; modes, gradients and random numbers stay as they are, and masks, too,
    if anything fails.

    After a warm start static and dynamic weights are equal, and snip cannot tell them apart: some
    steps of training come first, or other scores.

    Raises PlanError for a model without PAD-Net layers or whose layers are deployed, ValueError for
    arguments that cannot be, and scores that are all zero or not finite.
    """
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise ValueError(f"rounds {rounds!r}: a whole number of at least 1")
    for name, value, words in (
        ("schedule", schedule, SCHEDULES),
        ("scores", scores, tuple(_SCORES)),
    ):
        if value not in words:
            raise ValueError(f"{name} {value!r}: allowed are {', '.join(words)}")
    groups = _groups(model)
    layers = {name: layer for _, own in groups for name, layer in own.items()}
    masks = {name: _mask(name, layer) for name, layer in layers.items()}
    with _evaluating(model):
        for number in range(1, rounds + 1):
            found = _SCORES[scores](model, layers, masks, batches, loss)
            for dynamic, own in groups:
                masks |= _largest(
                    {name: found[name] for name in own},
                    _target(masks, own, dynamic, number, rounds, schedule),
                )
    for name, layer in layers.items():
        _mask(name, layer).copy_(masks[name])
    return Partitioned(
        {name: int(mask.sum()) for name, mask in masks.items()},
        {name: mask.numel() for name, mask in masks.items()},
    )


def deploy_(model: nn.Module) -> Deployed:
    """Drop the weights of a partitioned PAD-Net model that its masks hide, in place.

    The model computes the same, with `plan.cost().deployed` parameters, which are new ones, and an
    index for each weight: `order`, a buffer of integers. Shapes depend on the masks: its state dict
    fits models with as many dynamic weights in each layer, such as one that loads these masks and
    is deployed, too.

    Raises PlanError, before anything is changed, for a model without PAD-Net layers, or whose masks
    do not have as many dynamic weights as its plan.
    """
    groups = _groups(model)
    before = sum(parameter.numel() for parameter in model.parameters())
    for dynamic, layers in groups:
        found = sum(int(_mask(name, layer).sum()) for name, layer in layers.items())
        if found != dynamic:
            raise PlanError(
                f"{found:,} weights are dynamic, {dynamic:,} are planned: partition_ the model"
            )
    for _, layers in groups:
        for layer in layers.values():
            layer.pack_()
    return Deployed(before, sum(parameter.numel() for parameter in model.parameters()))


def _groups(model: nn.Module) -> list[tuple[int, Layers]]:
    """How many weights are to be dynamic, and of which layers."""
    if not isinstance(model, nn.Module):
        raise PlanError(f"model: expected an nn.Module, got {type(model).__name__}")
    container = model._modules.get(WAREHOUSES)
    found: list[tuple[int, Layers]] = []
    if isinstance(container, Warehouses):
        for name, part in container.items():
            if isinstance(part, Partition):
                layers: Any = {one: model.get_submodule(one) for one in container.layers[name]}
                found.append((part.dynamic, layers))
    if not found:
        raise PlanError(
            f"the model ({type(model).__name__}) has no layers of PAD-Net: pass the one that "
            "convert_ returned for a pad_net plan, out of any wrapper"
        )
    return found


def _mask(name: str, layer: PADLayer) -> Tensor:
    if layer.mask is None:
        raise PlanError(f"{name}: the model is deployed, what its mask hid is gone")
    if layer.mask.is_meta:
        raise PlanError(f"{name} is on the meta device: its mask and weights have no values")
    return layer.mask


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, with gradients; modes and random numbers are put back."""
    modes = {module: module.training for module in model.modules()}
    devices = list({p.device for p in model.parameters() if p.device.type != "cpu"})
    kind = devices[0].type if devices else "cuda"
    try:
        with torch.random.fork_rng(devices, device_type=kind), torch.enable_grad():
            model.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _target(
    masks: Mapping[str, Tensor], own: Layers, dynamic: int, number: int, rounds: int, schedule: str
) -> int:
    """Dynamic weights after a round. number: of the round, from 1."""
    weights = sum(masks[name].numel() for name in own)
    if number == rounds:
        return dynamic
    if schedule == "linear":
        return weights - (weights - dynamic) * number // rounds
    return weights - int(weights * (1 - (dynamic / weights) ** (number / rounds)))


def _largest(scores: Mapping[str, Tensor], count: int) -> Tensors:
    """Masks of the `count` largest of all scores; of equal ones the first."""
    flat = torch.cat([score.flatten().cpu() for score in scores.values()])
    if not flat.isfinite().all():
        raise ValueError("scores are not all finite: the loss or its gradients overflow")
    least = flat.kthvalue(len(flat) - count + 1).values
    chosen = flat > least
    ties = (flat == least).nonzero().flatten()
    chosen[ties[: count - int(chosen.sum())]] = True
    parts = torch.split(chosen, [score.numel() for score in scores.values()])
    return {
        name: part.view(score.shape).to(score.device)
        for (name, score), part in zip(scores.items(), parts, strict=True)
    }


def _snip(
    model: nn.Module,
    layers: Layers,
    masks: Mapping[str, Tensor],
    batches: Batches,
    loss: Loss | None,
) -> Tensors:
    if loss is None:
        raise ValueError("loss: snip needs one, and batches; other scores are random, magnitude")
    _tell_apart(layers)
    numbers = {
        f"{name}.mask": masks[name].to(layer.kernels.dtype).requires_grad_()
        for name, layer in layers.items()
    }
    total = {name: torch.zeros(mask.shape, device=mask.device) for name, mask in masks.items()}
    none = True
    for inputs, targets in batches:
        none = False
        value = loss(functional_call(model, numbers, (inputs,)), targets)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise ValueError(f"loss {short(value)}: one number that depends on the model's outputs")
        found = torch.autograd.grad(value, list(numbers.values()), materialize_grads=True)
        for name, grad in zip(layers, found, strict=True):
            total[name] = total[name] + grad  # in float32, or what is wider
    if none:
        raise ValueError("batches: none; rounds go through them again, which takes a list")
    if not any(bool(sum_.any()) for sum_ in total.values()):
        raise ValueError("scores are all zero: does the loss depend on the dynamic layers?")
    return {name: sum_.abs() for name, sum_ in total.items()}


@torch.no_grad()
def _tell_apart(layers: Layers) -> None:
    """Raise ValueError if static and dynamic kernels are equal, but for rounding."""
    for layer in layers.values():
        apart = (layer.kernels.mean(0, keepdim=True) - layer.static).norm()
        if apart > 16 * torch.finfo(layer.kernels.dtype).eps * layer.kernels.norm():
            return
    raise ValueError(
        "after a warm start static and dynamic weights are equal, and no score of snip tells them "
        "apart: train some steps first, or take scores='magnitude' or 'random'"
    )


def _random(
    model: nn.Module, layers: Layers, masks: Mapping[str, Tensor], *unused: object
) -> Tensors:
    return {name: torch.rand(mask.shape).to(mask.device) for name, mask in masks.items()}


@torch.no_grad()
def _magnitude(model: nn.Module, layers: Layers, *unused: object) -> Tensors:
    return {name: layer.kernels.abs().mean(0, keepdim=True) for name, layer in layers.items()}


_SCORES: dict[str, Callable[..., Tensors]] = {
    "snip": _snip,
    "random": _random,
    "magnitude": _magnitude,
}
