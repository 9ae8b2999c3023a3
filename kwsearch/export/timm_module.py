"""A recipe as a Python module that registers its converted network in timm, for timm's training."""

from __future__ import annotations

import importlib
import keyword
import os
import pprint
import re
import textwrap
import unicodedata
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, NamedTuple

from kwlayers.plan import Network
from kwlayers.sites import trace
from kwsearch import __version__, zoo
from kwsearch.export.errors import ExportError, ExportFailed
from kwsearch.resolve import network_of, outcome_of, outputs_of

if TYPE_CHECKING:
    from kwsearch.recipe import Recipe

# The zoo's networks as timm builds them, with equal layers under equal names.
TIMM_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet18": ("resnet18", {}),
    "resnet34": ("resnet34", {}),
    "resnet50": ("resnet50", {}),
    "resnet101": ("resnet101", {}),
    "mobilenetv2_050": ("mobilenetv2_050", {}),
    "mobilenetv2_075": ("mobilenetv2_075", {}),
    "mobilenetv2_100": ("mobilenetv2_100", {}),
    "convnext_tiny": ("convnext_tiny", {"conv_mlp": True}),
    "deit_tiny": ("deit_tiny_patch16_224", {}),
}

# What timm's data loading and heads want to know of a network, beside its input and classes.
_CONFIG = ("fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std",
           "first_conv", "classifier")  # fmt: skip

_MODULE = Template('''\
"""$source with kernels from shared warehouses, as a network of timm's called $name.

$params parameters (the static network has $static);
$macs MACs, multiply-adds, for one image of $size (static: $static_macs).

    import timm, $name
    model = timm.create_model("$name", num_classes=10)

timm's train.py takes it by name once this module is imported:

    python -c "import runpy, $name; runpy.run_path('train.py', run_name='__main__')" \\
        --model $name --model-kwargs temperature_steps=25000 ...

temperature_steps: the batches of training over which the temperature falls from 1 to 0, e.g. 20
epochs of them; without it the temperature is 0, or what `kwlayers.TemperatureSchedule` says.

Written by kwsearch $version. Needs torch, kwlayers and $needs.
"""

from __future__ import annotations

from typing import Any

import kwlayers
$imports
from kwlayers.schedule import Tempered
from timm.models import generate_default_cfgs, register_model
from torch import nn

INPUT = $input
GROUPS: list[dict[str, Any]] = $groups

default_cfgs = generate_default_cfgs(
    {
        "$name":
$config
    }
)


@register_model
def $name(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    *,
    num_classes: int = $classes,
    in_chans: int = INPUT[0],
    temperature_steps: int = 0,
    **kwargs: Any,
) -> nn.Module:
    """kwargs go to the static network. There are no pretrained weights."""
    if pretrained:
        raise RuntimeError("$name has no pretrained weights; load yours by checkpoint_path")
    if temperature_steps < 0:
        raise ValueError(f"temperature_steps {temperature_steps}: at least 0")
$make
    side = kwargs.get("img_size") or INPUT[1:]
    size = (in_chans, *((side, side) if isinstance(side, int) else side))
    try:
        plan = kwlayers.Plan.from_groups(kwlayers.trace(model, size), GROUPS)
    except kwlayers.PlanError as error:
        raise kwlayers.PlanError(
            f"$name was planned for num_classes=$classes, in_chans={INPUT[0]}, not for "
            f"num_classes={num_classes}, in_chans={in_chans}, {kwargs}: {error}; plan the recipe "
            "again for these"
        ) from error
    kwlayers.convert_(model, plan)
    if temperature_steps:
        kwlayers.set_temperature_(model, 1)
        model.register_forward_pre_hook(_Cooling(temperature_steps))
    model.num_classes = num_classes
    model.default_cfg = model.pretrained_cfg = default_cfgs["$name"].default.to_dict()
    return model


class _Cooling:
    """Before each forward of training: the temperature falls by 1 / steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, model: nn.Module, args: Any) -> None:
        if model.training:
            for module in model.modules():
                if isinstance(module, Tempered):
                    if module.temperature.element_size() < 4:
                        raise TypeError(
                            f"a temperature in {module.temperature.dtype} cannot fall in small "
                            "steps: keep the model in float32, under autocast (--amp)"
                        )
                    module.temperature.sub_(1 / self.steps).clamp_(min=0)
''')


# For networks that are not timm's.
_REFUSAL = Template("""\
if refused := {key: value for key, value in kwargs.items() if value}:
    raise TypeError(f"$model takes num_classes and in_chans, not {refused}")
""")


def module_name(stem: str) -> str:
    """A name for the model and its module, after a file: `resnet18-0.5x` -> `kw_resnet18_0_5x`."""
    name = re.sub(r"[^a-zA-Z0-9]+", "_", stem).strip("_")
    return name if name.startswith("kw_") else f"kw_{name}"


def write_timm_module(
    recipe: Recipe,
    path: str | os.PathLike[str],
    name: str | None = None,
) -> None:
    """Write the module of `timm_module` to `path`.

    name: of the model, by default that of the file without .py. Raises what `timm_module`
    raises, and OSError.
    """
    text = timm_module(recipe, Path(path).stem if name is None else name)
    Path(path).write_text(text, encoding="utf-8")


def timm_module(recipe: Recipe, name: str) -> str:
    """Python source that registers the recipe's converted network in timm as `name`.

    A network of the zoo is built by timm where timm has the same, else by kwsearch. Raises
    ExportError for a name that cannot be registered, a network of the user's own code, or a
    missing timm; PlanError as planning does.
    """
    model = recipe.model.name
    kind, colon, _ = model.partition(":")
    if colon and kind not in ("timm", "torchvision"):
        raise ExportError(
            f"{model} is code of your own: call kwlayers.convert_ in it, and put "
            "timm.models.register_model above the function"
        )
    timm = _timm()
    _check_name(timm, name)
    network = network_of(recipe)
    size = network.input_size
    if len(size) != 3:
        raise ExportError(f"timm trains on images (C, H, W), not on inputs {size}")
    plan, classes = outcome_of(recipe, network).plan, outputs_of(recipe, size)
    static = _static(timm, model, network, classes)
    cost = plan.cost()
    groups = [textwrap.indent(_literal(group), "    ") for group in plan.groups_to_list()]
    return _MODULE.substitute(
        name=name,
        source=model,
        params=f"{cost.params.total:,}",
        static=f"{network.params:,}",
        macs=f"{cost.macs.total:,}",
        static_macs=f"{network.macs:,}",
        size="x".join(map(str, size)),
        version=__version__,
        needs=static.needs,
        imports=static.imports,
        input=size,
        groups="[\n" + ",\n".join(groups) + ",\n]",
        config=textwrap.indent(_literal(_config(timm, static.base, size, classes)), " " * 12),
        classes=classes,
        make=textwrap.indent(static.code, "    ").rstrip("\n"),
    )


class _Static(NamedTuple):
    """How the module makes the static network. base: its name in timm, if it has one."""

    needs: str
    imports: str
    code: str
    base: str | None = None


def _static(timm: Any, model: str, network: Network, classes: int) -> _Static:
    kind, colon, rest = model.partition(":")
    if colon:
        if kind == "timm":
            return _of_timm(timm, rest, {}, network, classes)[0]
        return _of_torchvision(rest)
    if model in TIMM_NAMES:
        found, twin = _of_timm(timm, *TIMM_NAMES[model], network, classes)
        if _layers(twin) == _layers(network):
            return found
    entry = zoo.get(model)
    call = f'zoo.create("{model}", num_classes=num_classes, in_channels=in_chans'
    call += "".join(f", {flag}=True" for flag in entry.static)
    call += ", img_size=INPUT[1])" if "img_size" in entry.options else ")"
    code = f"{_REFUSAL.substitute(model=model)}model = {call}"
    return _Static("timm and kwsearch", "from kwsearch import zoo", code)


def _of_timm(
    timm: Any, model: str, options: dict[str, Any], network: Network, classes: int
) -> tuple[_Static, Network]:
    """And what tracing finds in it."""
    import torch

    size = network.input_size
    shown = [f'"{key}": {value!r}' for key, value in options.items()]
    given = {"num_classes": classes, "in_chans": size[0], **options}
    with torch.device("meta"):
        made = None
        if size[1:] != _known(timm, model).get("input_size", (3, 224, 224))[1:]:
            try:  # Some networks are built for one size of images.
                made = timm.create_model(model, img_size=size[1:], **given)
                shown.append('"img_size": INPUT[1:]')
            except TypeError as error:
                if "'img_size'" not in str(error):
                    raise
        made = made or timm.create_model(model, **given)
    code = f"kwargs = {{{', '.join(shown)}, **kwargs}}\n" if shown else ""
    code += f'model = timm.create_model(\n    "{model}", '
    code += "num_classes=num_classes, in_chans=in_chans, **kwargs\n)"
    static = _Static("timm", "import timm", code, model)
    return static, trace(made, size)


def _of_torchvision(model: str) -> _Static:
    options = ["weights=None", "num_classes=num_classes"]
    # As kwsearch.networks builds them.
    if model.endswith(("googlenet", "inception_v3")):
        options += ["aux_logits=False", "init_weights=True"]
    options += ["image_size=INPUT[1]"] if model.startswith("vit_") else []
    options += ["input_size=INPUT[1:]"] if model.startswith("maxvit") else []
    code = (
        f"{_REFUSAL.substitute(model=model)}"
        "if in_chans != 3:\n"
        '    raise ValueError(f"torchvision\'s networks take 3 channels, not {in_chans}")\n'
        f'model = torchvision.models.get_model(\n    "{model}", {", ".join(options)}\n)'
    )
    return _Static("timm and torchvision", "import torchvision", code)


def _layers(network: Network) -> list[tuple[Any, ...]]:
    """What a plan depends on."""
    found: list[tuple[Any, ...]] = [
        (s.name, s.kind, s.kernel, s.groups, s.bias, s.positions) for s in network.sites
    ]
    return [*found, (network.params, network.macs)]


def _config(timm: Any, base: str | None, size: tuple[int, ...], classes: int) -> dict[str, Any]:
    """The network's `default_cfg`; its images are normalised as `base`'s."""
    known = _known(timm, base)
    found = {key: known[key] for key in _CONFIG if known.get(key) is not None}
    if size[0] != 3:
        found |= {"mean": (0.5,) * size[0], "std": (0.5,) * size[0]}
    return {"url": "", "num_classes": classes, "input_size": size, **found}


def _known(timm: Any, model: str | None) -> dict[str, Any]:
    found = None if model is None else timm.get_pretrained_cfg(model)
    return {} if found is None else found.to_dict()


def _literal(value: Any) -> str:
    return pprint.pformat(value, width=92, compact=True, sort_dicts=False)


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError:
        raise ExportFailed(
            'a module for timm needs timm, not installed here: pip install "kwsearch[zoo]"'
        ) from None
    except RuntimeError as error:  # of torchvision, which timm imports
        raise ExportFailed(
            f"importing timm fails: {error}; timm, torchvision and torch must go together"
        ) from error


def _check_name(timm: Any, name: str) -> None:
    hint = f"; call it e.g. {module_name(name)}"
    importable = name.isidentifier() and unicodedata.is_normalized("NFKC", name)
    if not importable or keyword.iskeyword(name):
        raise ExportError(f"{name!r}: not a name that Python can import{hint}")
    if name in ("kwlayers", "kwsearch", "timm", "torch", "torchvision"):
        raise ExportError(f"{name!r}: the module would hide the package of that name{hint}")
    if timm.is_model(name):
        raise ExportError(f"{name!r}: timm has a network of that name{hint}")
