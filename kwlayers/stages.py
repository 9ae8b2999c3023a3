"""Where each layer of a network stands: by its family's table, else inferred from what tracing saw.

Inferred: a stage is a run of repeated blocks with one output size and width. In the first block of
a stage, layers that read the output of the stage before, or have the kernels of its layers, belong
to that, as in the official ResNets and MobileNets. No torch.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kwlayers.families import Label, Recognised, recognise
from kwlayers.plan import plain_name

if TYPE_CHECKING:
    from kwlayers.plan import Site

INFERRED = "inferred"
_HEAD, _STEM = "the last layer stays static", "the first convolution stays static"
_ROLES = {_HEAD: "head", _STEM: "stem"}
_SHORTCUT = re.compile(r"downsample|shortcut|skip", re.IGNORECASE)


@functools.lru_cache(maxsize=4)
def place(sites: tuple[Site, ...]) -> Recognised:
    """The label of every layer. `family` is INFERRED where the names are of no known family."""
    return recognise(sites) or Recognised(INFERRED, _infer(sites))


def _infer(sites: Sequence[Site]) -> dict[str, Label]:
    order = {site.name: site.order for site in sites}
    called = sorted(
        (site for site in sites if not site.fixed),
        # Parallel layers together, in module order: whichever the forward calls first.
        key=lambda site: order.get(_reader(site), site.order),
    )
    labels = {site.name: Label(0, "fixed") for site in sites}
    labels |= {
        name: Label(0, "static", static=why, role=_ROLES.get(why, ""))
        for name, why in _static(called, _last(sites)).items()
    }
    left = [site for site in called if not labels[site.name].static]
    has_blocks = any(site.block for site in left)
    blocks: dict[str, list[Site]] = {}
    for site in left:
        blocks.setdefault(site.block or site.name, []).append(site)
    positions = _positions(left)
    stage, before = 0, (0, 0)
    shapes: set[tuple[int, str, int, int]] = set()
    for block in blocks.values():
        first, last = block[0], block[-1]
        if has_blocks and not first.block:
            alone = plain_name(first.name)
            labels[first.name] = Label(stage, kind_of(first), alone=alone)
            continue
        reads_before = (first.in_positions, first.in_channels) == before
        after = (last.out_positions, last.out_channels)
        opens = before not in ((0, 0), after)
        stage += opens
        for site in block:
            kind, (outputs, inputs) = kind_of(site), site.kernel[:2]
            reads_input = reads_before and _reader(site) == _reader(first)
            behind = opens and (reads_input or (stage - 1, kind, outputs, inputs) in shapes)
            pointwise = math.prod(site.kernel_size) == 1
            role = "shortcut" if pointwise and _SHORTCUT.search(_role(site)) else ""
            labels[site.name] = Label(stage - behind, kind, positions[site.name], role=role)
            shapes.add((stage - behind, kind, outputs, inputs))
        before = after
    return labels


def _last(sites: Sequence[Site]) -> Site | None:
    """The layer that is called last, convertible or not; None if other weights follow it."""
    called = sorted((site for site in sites if site.positions), key=lambda site: site.order)
    return called[-1] if called and not called[-1].followed else None


def _static(called: Sequence[Site], last: Site | None) -> dict[str, str]:
    """Why layers stay static by default, by name. called: in the order of their calls."""
    reasons: dict[str, str] = {}
    mapped = {site.block for site in called if site.out_positions > 1}
    on_maps = {_role(s) for s in called if s.block in mapped and s.in_positions > 1}
    pooled = {_role(s) for s in called if s.block in mapped and s.in_positions == 1} - on_maps
    for site in called:
        if site.block and _role(site) in pooled:
            reasons[site.name] = "its input is pooled to one position, as in squeeze-and-excitation"
        if site.kernel[:2] == (1, 1):
            reasons[site.name] = "it has a single channel in and out"
        if site.constant:
            reasons[site.name] = "its input does not depend on the image"
    if last is not None and not last.block:
        for site in called:
            same = (site.kind, site.out_channels) == (last.kind, last.out_channels)
            if site is last or (same and site.kind == "linear" and not site.block):
                reasons[site.name] = _HEAD
    stem = next((site for site in called if site.kind != "linear" and not site.block), None)
    if stem is not None:
        reasons[stem.name] = _STEM
    return reasons


def kind_of(site: Site) -> str:
    """Layers of one kind may share: depthwise, grouped and other convolutions, parts of a block."""
    if site.kind == "linear":
        part, _, rest = _role(site).partition(".")
        return part if site.block and rest else "linear"
    if site.groups == 1:
        return "conv"
    return "dwconv" if site.groups == site.in_channels else "gconv"


def _positions(called: Sequence[Site]) -> dict[str, int]:
    """The place among the layers of its kind in a block, by name. Parallel layers have one."""
    roles: dict[str, list[str]] = {}
    found: dict[str, int] = {}
    parallel: dict[str, int] = {}
    for site in called:
        if kind_of(site) == "conv" and _reader(site) in parallel:
            found[site.name] = parallel[_reader(site)]
            continue
        known = roles.setdefault(kind_of(site), [])
        if _role(site) not in known:
            known.append(_role(site))
        found[site.name] = known.index(_role(site))
        if kind_of(site) == "conv":
            parallel[_reader(site)] = found[site.name]
    return found


def _reader(site: Site) -> str:
    """The first layer to read the tensor that this one reads."""
    return site.beside or site.name


def _role(site: Site) -> str:
    """The name inside its block: the same in every block."""
    return site.name[len(site.block) + 1 :] if site.block else ""
