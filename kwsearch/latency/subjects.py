"""Networks whose steps are taken apart or timed whole: static ones, and under plans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from kwlayers.convert import convert_
from kwlayers.methods import find
from kwlayers.plan import Network, Plan, PlanError
from kwlayers.sharing import Settings
from kwlayers.sites import trace
from kwsearch import networks
from kwsearch.budget import Target, meet
from kwsearch.latency.calls import Call, calls_by_module, calls_of
from kwsearch.resolve import (
    create_model,
    located,
    network_of,
    outcome_of,
    settings_of,
    targets_of,
)
from kwsearch.space import Space, fingerprint
from kwsearch.timing import clock_of
from kwsearch.zoo.convnext import ConvNeXt
from kwsearch.zoo.mobilenetv2 import MobileNetV2
from kwsearch.zoo.resnet import BasicBlock, Bottleneck, CifarResNet, ResNet
from kwsearch.zoo.vit import VisionTransformer

if TYPE_CHECKING:
    from kwsearch.recipe import Recipe
    from kwsearch.recipe import Space as SpaceSection

RATIOS = (0.5, 1.0, 2.0)
GRID_RATIOS = (0.25, 1.0, 4.0)
# Of the grid's networks mixing is measured in cells of three of these sizes each, too, by turns:
# all of them come together with all kinds of blocks. At two ratios, as times are linear in n.
GRID_CELLS = (
    (0.5, 0.5), (0.25, 0.25), (1, 0.25), (0.25, 1), (0.5, 0.25), (0.25, 0.5), (1, 0.5), (0.5, 1),
)  # fmt: skip
_TURNS = (0, 3, 6)
_CELL_RATIOS = (0.25, 2.0)


@dataclass(frozen=True)
class Mode:
    """What a step is: so many images, forward only or with backward, in a dtype, on a device."""

    batch: int
    training: bool
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        """dtype, as torch has it."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def __str__(self) -> str:
        return f"{'training' if self.training else 'inference'}, batch {self.batch}"


@dataclass(frozen=True)
class Subject:
    """A network under a plan, or static (None). build: makes it on the current device.

    input_size: (C, ...) of an image. only_mixing: nothing else of it is to be measured, nor a step
    as a whole.
    """

    name: str
    build: Callable[[], nn.Module]
    input_size: tuple[int, ...]
    plan: Plan | None = None
    only_mixing: bool = False

    def calls(self, mode: Mode) -> Counter[Call]:
        """Of a step; without memory for weights. Raises PlanError where it cannot run."""
        found = calls_of(*self._step(mode))
        if not self.only_mixing:
            return found
        return Counter({call: n for call, n in found.items() if call.kind.startswith("mixing")})

    def calls_by_module(self, mode: Mode) -> dict[str, Counter[Call]]:
        """As `calls`, by the innermost module that makes them."""
        return calls_by_module(*self._step(mode))

    def _step(self, mode: Mode) -> tuple[nn.Module, int, tuple[int, ...], bool, str, torch.dtype]:
        with torch.device("meta"):
            model = self._made(mode)
        size, training = self.input_size, mode.training
        return model, mode.batch, size, training, mode.device, mode.torch_dtype

    def whole(self, mode: Mode) -> WholeStep:
        """The step itself, with fresh weights on random images."""
        with torch.random.fork_rng():
            return WholeStep(self._made(mode).to(mode.device), self.input_size, mode)

    def _made(self, mode: Mode) -> nn.Module:
        model = self.build()
        if self.plan is not None:
            convert_(model, self.plan)
        return model.to(mode.torch_dtype)


class WholeStep:
    """Forward, or forward, loss and backward; the optimizer is no part of it."""

    def __init__(self, model: nn.Module, input_size: Sequence[int], mode: Mode) -> None:
        self.model, self.mode, self.clock = model.train(), mode, clock_of(mode.device)
        self.x = torch.randn(mode.batch, *input_size, device=mode.device, dtype=mode.torch_dtype)
        if not mode.training and mode.batch > 1:
            with torch.no_grad():
                model(self.x)  # so that norms have seen images
        model.train(mode.training)
        with torch.no_grad():
            self.y = model(self.x).argmax(-1)

    def seconds(self) -> float:
        """Of a step that comes after another one of the same network."""
        self._step()
        return self._step()

    def _step(self) -> float:
        if not self.mode.training:
            with torch.no_grad():
                begun = self.clock()
                self.model(self.x)
                return self.clock() - begun
        self.model.zero_grad(set_to_none=True)
        begun = self.clock()
        F.cross_entropy(self.model(self.x), self.y).backward()  # type: ignore[no-untyped-call]
        return self.clock() - begun


def of_model(
    name: str,
    input_size: tuple[int, ...] | None = None,
    num_classes: int | None = None,
    trust: bool = False,
    ratios: Sequence[float] = RATIOS,
    methods: Sequence[str] = ("kernel_warehouse",),
) -> list[Subject]:
    """The static network, and its plans by some methods: at some ratios, as far as there are any,
    and as published, if the method has sizes of its own.
    """
    size = networks.source(name, trust).size(input_size)
    build = partial(networks.build_model, name, size, num_classes, None, trust)
    network = networks.trace_model(name, size, num_classes, trust)
    found = _under_plans(_full_name(name, num_classes), build, network, ratios, name, methods)
    return list({identity(one.plan): one for one in found}.values())


def identity(plan: Plan | None) -> str:
    """Of a plan, or of the static network."""
    return "static" if plan is None else fingerprint(plan)


def _full_name(model: str, num_classes: int | None) -> str:
    return model if num_classes is None else f"{model} of {num_classes} classes"


def of_recipe(recipe: Recipe, trust: bool = False) -> list[Subject]:
    """The static network; the recipe's plan, and plans that between them have every choice of its
    search space, and both ends of its split.
    """
    network, build = network_of(recipe, trust), partial(create_model, recipe, None, trust)
    plans: list[Plan] = []
    if recipe.plan is not None or recipe.search is None:
        plans.append(outcome_of(recipe, network).plan)
    if recipe.search is not None:
        for target in targets_of(recipe).values():
            with located(recipe):
                space = Space(network, settings_of(recipe), target, _without_latency(recipe))
            plans += space.extremes()
    name = _full_name(recipe.model.name, recipe.model.num_classes)
    size = tuple(network.input_size)
    return [
        Subject(name, build, size),
        *(Subject(f"{name} plan {fingerprint(plan)}", build, size, plan) for plan in plans),
    ]


def _without_latency(recipe: Recipe) -> SpaceSection:
    """The search space without the limit that the table to be measured will tell."""
    assert recipe.search is not None
    section = recipe.search.space
    free = {"latency_ms": None, "lut": None}
    return section.model_copy(update={"limits": section.limits.model_copy(update=free)})


def of_grid(sides: Sequence[int]) -> list[Subject]:
    """Small networks of the usual blocks at the usual widths, for images of these sides."""
    found = []
    for side in sides:
        for place, (name, build) in enumerate(_grid(side)):
            size = (3, side, side)
            with torch.device("meta"):
                network = trace(build(), size)
            name = f"grid {name} {side}x{side}"
            found += _under_plans(name, build, network, GRID_RATIOS, None)
            cells = [GRID_CELLS[(place + turn) % len(GRID_CELLS)] for turn in _TURNS]
            found += _under_cells(name, build, network, cells)
    return found


def _under_cells(
    name: str,
    build: Callable[[], nn.Module],
    network: Network,
    cells: Sequence[tuple[float, float]],
) -> Iterator[Subject]:
    """Plans whose mixing only is measured."""
    for cell_ratio in cells:
        for ratio in _CELL_RATIOS:
            with suppress(PlanError):  # such cells do not fit, or are too coarse
                plan = meet(network, Target(ratio), Settings(cell_ratio=cell_ratio), None).plan
                title = f"{name} cells {cell_ratio[0]:g}x{cell_ratio[1]:g} b = {ratio:g}"
                yield Subject(title, build, tuple(network.input_size), plan, only_mixing=True)


def _under_plans(
    name: str,
    build: Callable[[], nn.Module],
    network: Network,
    ratios: Sequence[float],
    model: str | None,
    methods: Sequence[str] = ("kernel_warehouse",),
) -> list[Subject]:
    size = tuple(network.input_size)
    found = [Subject(name, build, size)]
    for method in methods:
        settings = None if method == "kernel_warehouse" else find(method).settings()
        own = [] if settings is None or not settings.sized else [Target()]
        title = "" if settings is None else f" plan {method}"
        for target in [*own, *map(Target, ratios)]:
            try:
                plan = meet(network, target, settings, model).plan
            except PlanError:  # nothing to convert, or cells are too coarse for so few
                continue
            at = f" b = {target.ratio:g}" if target else " as published"
            found.append(Subject(f"{name}{title}{at}", build, size, plan))
    return found


def _shallow_mobilenet(multiplier: float) -> nn.Module:
    """With at most two blocks in each stage: one that may stride, and one with a shortcut."""
    model = MobileNetV2(multiplier, 100)
    model.blocks = nn.Sequential(*(nn.Sequential(*[*s.children()][:2]) for s in model.blocks))
    return model


def _grid(side: int) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Names of networks without the side of their images, and how they are made."""
    for width in (0.5, 1.0):
        yield f"basic {width:g}", partial(ResNet, BasicBlock, (1, 2, 1, 2), 100, 3, width)
    yield "bottleneck", partial(ResNet, Bottleneck, (1, 2, 1, 2), 100)
    yield "cifar", partial(CifarResNet, 2, 100)
    for multiplier in (0.35, 0.5, 0.75, 1.0):
        yield f"inverted {multiplier:g}", partial(_shallow_mobilenet, multiplier)
    for base in (64, 96, 128):
        widths = (base, 2 * base, 4 * base, 8 * base)
        yield f"convnext {base}", partial(ConvNeXt, (1, 1, 2, 1), widths, 100)
    if side % 16 == 0:
        for heads in (2, 3, 4):
            yield (
                f"vit {heads}",
                partial(VisionTransformer, dim=64 * heads, depth=2, num_heads=heads, img_size=side),
            )
