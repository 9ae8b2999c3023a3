"""What may vary of a plan before its sizes: the choices that a search space lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kwlayers.layout import MethodSettings
from kwlayers.methods import find
from kwlayers.plan import PlanError

if TYPE_CHECKING:
    from kwsearch.recipe import Space as SpaceSection

METHOD = "method"


@dataclass(frozen=True)
class Shape:
    """How the network is cut into warehouses, or by another method made dynamic.

    keep_static: glob patterns of layers left out. stage_sharing: (stage, sharing rule) of
    each stage; empty if `settings.sharing` holds for all.
    """

    settings: MethodSettings
    keep_static: tuple[str, ...] = ()
    stage_sharing: tuple[tuple[int, str], ...] = ()


def choices_around(own: Shape, section: SpaceSection) -> dict[str, list[Any]]:
    """What each dimension may be: `own`'s value first, then the section's others."""
    listed: dict[str, Sequence[Any]] = {
        METHOD: section.method,
        "cell_ratio": section.cell_ratio,
    }
    if own.stage_sharing:
        listed.update({f"sharing/stage{stage}": section.sharing for stage, _ in own.stage_sharing})
    else:
        listed["sharing"] = section.sharing
    for name in ("reduction", "basis_ratio", "spatial_partition", "keep_static"):
        listed[name] = getattr(section, name)
    for method in (own.settings.method, *section.method):
        settings = own.settings if method == own.settings.method else find(method).settings()
        for key, wanted in section.methods.get(method, {}).items():
            _check_values(settings, method, key, wanted)
            listed[f"{method}/{key}"] = wanted
    if strangers := sorted(set(section.methods) - {own.settings.method, *section.method}):
        raise PlanError(f"search.space.methods.{strangers[0]}: list it in search.space.method, too")
    starts = [changed(own, {METHOD: name}) for name in (own.settings.method, *section.method)]
    for name, values in list(listed.items()):
        if not any(applies(start, name) for start in starts):
            if values and any(name in start.settings.sizes for start in starts):
                raise PlanError(f"search.space.{name}: {_DECIDED}")
            if values:
                raise PlanError(f"search.space.{name}: {own.settings.method} has no {name}")
            del listed[name]
    found: dict[str, list[Any]] = {}
    for name, values in listed.items():
        first = value_of(next(start for start in starts if applies(start, name)), name)
        found[name] = [first, *(value for value in values if value != first)]
    return found


def value_of(shape: Shape, name: str) -> Any:
    """What a shape has in a dimension; None where its method has none."""
    if name == METHOD:
        return shape.settings.method
    if name.startswith("sharing/stage"):
        return dict(shape.stage_sharing)[int(name.removeprefix("sharing/stage"))]
    if name == "keep_static":
        return shape.keep_static
    method, _, key = name.rpartition("/")
    if method and method != shape.settings.method:
        return None
    return getattr(shape.settings, key, None)


def applies(shape: Shape, name: str) -> bool:
    """Whether a dimension says anything about a shape, by its method."""
    if name in (METHOD, "keep_static"):
        return True
    if name.startswith("sharing/stage"):
        return bool(shape.stage_sharing)
    method, _, key = name.rpartition("/")
    own = key in shape.settings.names and not _decided(shape.settings, key)
    return own and method in ("", shape.settings.method)


# Of settings that do nothing under a budget.
_DECIDED = "it is what the budget decides; search.space.split varies it between layers"


def _decided(settings: MethodSettings, key: str) -> bool:
    """Whether a setting is a size that any budget decides."""
    # Groups that do not grow have their own sizes where the budget has room for them.
    return key in settings.sizes and find(settings.method).group.grows


def _check_values(settings: MethodSettings, method: str, key: str, values: Sequence[Any]) -> None:
    """Raise PlanError for values that a setting cannot have."""
    if key not in settings.names:
        raise PlanError(
            f"search.space.methods.{method}: there is no {key}; its settings are "
            f"{', '.join(settings.names)}"
        )
    if _decided(settings, key):
        raise PlanError(f"search.space.methods.{method}.{key}: {_DECIDED}")
    for value in values:
        try:
            settings.changed(**{key: value})
        except PlanError as error:
            raise PlanError(f"search.space.methods.{method}: {error}") from None


def changed(shape: Shape, values: Mapping[str, Any]) -> Shape:
    """`shape` with other values in some dimensions. By another method settings are its own, as
    published, besides what the values say.
    """
    if (method := values.get(METHOD, shape.settings.method)) != shape.settings.method:
        shape = Shape(find(method).settings(), shape.keep_static)
    by_stage = {
        int(name.removeprefix("sharing/stage")): rule
        for name, rule in values.items()
        if name.startswith("sharing/stage")
    }
    own = {name.removeprefix(f"{method}/"): value for name, value in values.items()}
    fields = [name for name in shape.settings.names if name in own]
    return Shape(
        shape.settings.changed(**{name: own[name] for name in fields}),
        values.get("keep_static", shape.keep_static),
        tuple((stage, by_stage.get(stage, rule)) for stage, rule in shape.stage_sharing),
    )
