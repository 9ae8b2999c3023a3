"""The methods that make layers dynamic, by name; each is in the file of its name.

A file has everything about its method: settings (`MethodSettings`), groups with their exact cost
(`Group`), layers, and `METHOD`, which says so. It is loaded when the method is first used.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from kwlayers.layout import MethodSettings
from kwlayers.plan import Group, Plan, PlanError, short

if TYPE_CHECKING:
    from torch import nn

NAMES = (
    "kernel_warehouse",
    "condconv",
    "dyconv",
    "odconv",
    "dcd",
    "fdconv",
    "kernel_dna",
    "pad_net",
    "dymn",
)


@dataclass(frozen=True)
class Conversion:
    """How layers are converted. Fields as in `convert_`."""

    warm_start: bool | Literal["cells"] = False
    backend: str | None = None
    workspace_mb: float | None = None


@dataclass(frozen=True)
class Converted:
    """What becomes of a group's layers.

    swaps: {static layer: dynamic layer}. shared: what these share, to be registered at the
    model's root. errors: of a warm start, by layer, as in `WarmStart`. hooks: {module name: what is
    called before its forward (with keyword arguments), and after it, whatever it raised}.
    """

    swaps: dict[nn.Module, nn.Module]
    shared: nn.Module | None = None
    errors: dict[str, float] = field(default_factory=dict)
    hooks: dict[str, tuple[Callable[..., None], Callable[..., None]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """One method.

    title: as its paper writes it. paper: where it is from. convert: layers by name to dynamic
    ones, which take over their bias parameters, device, dtype and mode. prepare: what it does with
    data before training, as `kwlayers.prepare_` is given it.
    """

    name: str
    title: str
    paper: str
    group: type[Group]
    settings: type[MethodSettings]
    convert: Callable[[Plan, Any, Mapping[str, nn.Module], Conversion], Converted]
    prepare: Callable[[nn.Module, Iterable[Any], Callable[..., Any]], object] | None = None


def find(name: str) -> Method:
    """The method of that name. Raises PlanError for one that does not exist."""
    if not isinstance(name, str) or name not in NAMES:
        close = difflib.get_close_matches(str(name), NAMES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise PlanError(f"unknown method {short(name)}: {hint}allowed are {', '.join(NAMES)}")
    method: Method = importlib.import_module(f"kwlayers.methods.{name}").METHOD
    return method
