"""A network by name: of the zoo, timm, torchvision or your own code; and what tracing it finds."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kwlayers.plan import Network, PlanError
from kwsearch import terminal, zoo

if TYPE_CHECKING:
    from torch import nn

InputSize = tuple[int, ...]

OTHERS = "timm:NAME, torchvision:NAME, or package.module:function of your own (with --trust)"
# Of a video, for torchvision's networks: as r3d_18 was trained on, and the least that mvit takes.
FRAMES = 16


class BuildError(PlanError):
    """The code that builds a network failed. Says where and how."""


@dataclass(frozen=True)
class Source:
    """A network that has a name.

    input_size: (C, H, W), of videos (C, T, H, W), by default; None where only the user knows.
    num_classes: by default, None likewise. scalable: whether its width is free. refusal: why it
    must not be built, if so.
    """

    name: str
    input_size: InputSize | None
    num_classes: int | None
    make: Callable[[InputSize, int | None, float], nn.Module] = field(repr=False)
    scalable: bool = False
    refusal: str | None = None

    def size(self, given: InputSize | None = None) -> InputSize:
        """`given`, else the default. Raises PlanError if there is neither."""
        size = given or self.input_size
        if size is None:
            raise PlanError(
                f"{self.name}: its input size is not known: give --input, or in a recipe input, "
                "e.g. 3x224x224"
            )
        return size

    def build(
        self,
        input_size: InputSize | None = None,
        num_classes: int | None = None,
        width: float | None = None,
    ) -> nn.Module:
        """The network with fresh weights on the current device, its stem for `input_size`.

        width: scales its channels; 1 is the network as it is. Raises PlanError for what it cannot
        be built for, BuildError if its code fails.
        """
        if self.refusal is not None:
            raise PlanError(f"{self.name}: {self.refusal}")
        if width not in (None, 1) and not self.scalable:
            raise PlanError(f"{self.name}: only networks of the zoo can be scaled, not to {width}")
        size = self.size(input_size)
        try:
            return self.make(size, num_classes, 1.0 if width is None else width)
        except PlanError:
            raise
        except (Exception, SystemExit) as error:
            raise BuildError(
                f"{self.name}: it cannot be built for {_shown(size)}: {_reason(error)}"
            ) from error


def source(name: str, trust: bool = False) -> Source:
    """Where the network `name` comes from. trust: whether it may be the user's own code.

    Imports timm or torchvision for a name of theirs, the user's code with trust only. Raises
    zoo.UnknownModelError, and PlanError where a package is missing or does not load.
    """
    kind, colon, rest = name.partition(":")
    if not colon:
        return _of_zoo(name)
    if kind == "timm":
        return _of_timm(name, rest)
    if kind == "torchvision":
        return _of_torchvision(name, rest)
    return _of_own_code(name, trust)


def build_model(
    name: str,
    input_size: InputSize | None = None,
    num_classes: int | None = None,
    width: float | None = None,
    trust: bool = False,
) -> nn.Module:
    """`Source.build` of the network `name`, which raises what that and `source` raise."""
    return source(name, trust).build(input_size, num_classes, width)


def planning_model(
    name: str,
    input_size: InputSize | None = None,
    num_classes: int | None = None,
    trust: bool = False,
) -> nn.Module:
    """The network to plan on: on `meta`, without weights; on the CPU if its code needs data."""
    import torch

    found = source(name, trust)
    try:
        with torch.device("meta"):
            return found.build(input_size, num_classes)
    except BuildError:
        return found.build(input_size, num_classes)


def trace_model(
    name: str,
    input_size: InputSize | None = None,
    num_classes: int | None = None,
    trust: bool = False,
) -> Network:
    """The network behind a name, as `kwlayers.trace` finds it: no weights, no data."""
    from kwlayers.sites import trace

    model = planning_model(name, input_size, num_classes, trust)
    size = input_size or source(name, trust).size()
    with terminal.talk_to_stderr():
        return trace(model, size)


def count_outputs(model: nn.Module, input_size: InputSize) -> int:
    """The classes that `model` tells apart, by running it on `meta`, where it is left.

    Raises PlanError if it does not give a tensor (B, classes), of videos (T, B, classes), as losses
    and accuracies take it, evaluated and trained.
    """
    import torch

    model = model.to("meta")
    x = torch.empty(2, *input_size, device="meta")
    found = []
    for training, when in ((False, "evaluated"), (True, "trained")):
        try:
            with torch.no_grad(), terminal.talk_to_stderr():
                out = model.train(training)(x)
        except Exception as error:
            if training and isinstance(error, RuntimeError):
                break  # It may need data to train on, which meta has not.
            raise PlanError(
                f"the model does not run on images of {_shown(input_size)}, {when}: "
                f"{_reason(error)}"
            ) from error
        spoken = isinstance(out, torch.Tensor) and out.dim() == 3 and len(input_size) == 4
        if not isinstance(out, torch.Tensor) or (out.dim() != 2 and not spoken):
            what = (
                f"a tensor {(*out.shape,)}" if isinstance(out, torch.Tensor) else type(out).__name__
            )
            raise PlanError(
                f"the model gives {what} for 2 images, {when}: classifying images needs a "
                "tensor (2, classes)"
            )
        found.append(out.shape[-1])
    return min(found)


def matching(pattern: str) -> list[str]:
    """The networks of timm and torchvision by `timm:PATTERN`: a part of the name, or a glob.

    Raises PlanError for another kind of name, and where the package is missing.
    """
    kind, _, rest = pattern.partition(":")
    wanted = rest if any(c in rest for c in "*?[") else f"*{rest}*"
    if kind == "timm":
        return [f"timm:{name}" for name in _package(pattern, "timm").list_models(wanted)]
    if kind == "torchvision":
        models = _torchvision_models(pattern)
        return [
            f"torchvision:{name}"
            for name in models.list_models(include=wanted)
            if not _special(models, name)
        ]
    raise PlanError(f"{pattern}: give timm:PART or torchvision:PART of a name")


# The zoo ----------------------------------------------------------------------------------------


def _of_zoo(name: str) -> Source:
    try:
        entry = zoo.get(name)
    except zoo.UnknownModelError as error:
        raise zoo.UnknownModelError(f"{error}; others are {OTHERS}") from None

    def make(size: InputSize, num_classes: int | None, width: float) -> nn.Module:
        options: dict[str, int] = {"in_channels": size[0], **dict.fromkeys(entry.static, True)}
        if num_classes is not None:
            options["num_classes"] = num_classes
        if "sensors" in entry.options:
            options |= {"steps": size[1], "sensors": size[2]}
        if "img_size" in entry.options:
            options["img_size"] = _side(name, size)
        try:
            return zoo.create(name, width=width, **options)
        except ValueError as error:
            raise PlanError(f"{name}: {str(error).removeprefix(f'{name}: ')}") from None

    return Source(name, entry.input_size, entry.num_classes, make, scalable=True)


# timm -------------------------------------------------------------------------------------------


def _of_timm(name: str, model: str) -> Source:
    timm = _package(name, "timm")
    if not timm.is_model(model):
        raise _unknown(name, model, timm.list_models())
    try:
        config = timm.get_pretrained_cfg(model, allow_unregistered=True)
    except RuntimeError:  # of the part after the dot
        raise _unknown(name, model, timm.list_pretrained()) from None
    default = tuple(config.input_size) if config else (3, 224, 224)

    def make(size: InputSize, num_classes: int | None, width: float) -> nn.Module:
        options: dict[str, Any] = {}
        if num_classes is not None:
            options["num_classes"] = num_classes
        if size[0] != default[0]:
            options["in_chans"] = size[0]
        built: nn.Module
        if size[1:] != default[1:]:
            try:
                built = timm.create_model(model, pretrained=False, img_size=size[1:], **options)
                return built
            except TypeError as error:
                if "'img_size'" not in str(error):
                    raise
        built = timm.create_model(model, pretrained=False, **options)
        return built

    return Source(name, default, config.num_classes if config else 1000, make)


# torchvision ------------------------------------------------------------------------------------


def _of_torchvision(name: str, model: str) -> Source:
    models = _torchvision_models(name)
    if model not in models.list_models():
        raise _unknown(name, model, models.list_models())
    if _special(models, model):
        raise PlanError(
            f"{name}: it does not take a batch of images or videos alone, as planning needs it"
        )
    weights = getattr(models.get_model_weights(model), "DEFAULT", None)
    crop = getattr(getattr(weights, "transforms", None), "keywords", {}).get("crop_size", 224)
    default: InputSize = (3, crop, crop) if isinstance(crop, int) else (3, *crop)
    if model in models.list_models(module=models.video):
        default = (3, FRAMES, *default[1:])
    classes = getattr(weights, "meta", {}).get("categories")

    def make(size: InputSize, num_classes: int | None, width: float) -> nn.Module:
        if size[0] != 3:
            raise PlanError(
                f"{name}: torchvision's networks take 3 channels, not {size[0]}; those of the zoo "
                "and timm:NAME take any"
            )
        options: dict[str, Any] = {"weights": None}
        if num_classes is not None:
            options["num_classes"] = num_classes
        if "weights_backbone" in inspect.signature(models.get_model_builder(model)).parameters:
            options["weights_backbone"] = None  # By default they are downloaded.
        if model.endswith(("googlenet", "inception_v3")):
            # Auxiliary classifiers would make it return three tensors in training.
            options |= {"aux_logits": False, "init_weights": True}
        elif model.startswith("vit_"):
            options["image_size"] = _side(name, size)
        elif model.startswith("maxvit"):
            options["input_size"] = size[1:]
        built: nn.Module = models.get_model(model, **options)
        return built

    return Source(name, default, len(classes) if classes else None, make)


def _torchvision_models(name: str) -> Any:
    _package(name, "torchvision")
    return importlib.import_module("torchvision.models")


def _special(models: Any, model: str) -> bool:
    """Whether a network of torchvision takes lists or pairs of images, or targets with them."""
    modules = (models.detection, models.optical_flow)
    return any(model in models.list_models(module=module) for module in modules)


# Your own ---------------------------------------------------------------------------------------


def _of_own_code(name: str, trust: bool) -> Source:
    dotted = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
    if re.fullmatch(rf"{dotted}:{dotted}", name) is None:
        raise zoo.UnknownModelError(
            f"unknown model {name!r}: allowed are a name of the zoo ({', '.join(zoo.MODELS)}), "
            f"{OTHERS}"
        )
    module, _, function = name.partition(":")
    refusal = made = None
    if trust:
        made = _import_own(name, module, function)
    else:
        close = difflib.get_close_matches(module, ["timm", "torchvision"], n=1)
        meant = f"did you mean {close[0]}:{function}? Otherwise " if close else ""
        refusal = (
            f"{meant}it is code of your own: building it would import {module} and call "
            f"{function}(), which --trust allows (in Python trust=True)"
        )

    def make(size: InputSize, num_classes: int | None, width: float) -> nn.Module:
        assert made is not None
        return _call_own(name, made, size, num_classes)

    return Source(name, None, None, make, refusal=refusal)


def _import_own(name: str, module: str, function: str) -> Callable[..., Any]:
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        with terminal.talk_to_stderr():
            found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise PlanError(f"{name}: importing {module} fails: {_reason(error)}") from error
    for part in function.split("."):
        close = difflib.get_close_matches(part, dir(found), n=1)
        if not hasattr(found, part):
            hint = f"; did you mean {close[0]}?" if close else ""
            raise PlanError(f"{name}: {module} has no {function}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise PlanError(f"{name}: {function} is of type {type(found).__name__}, not a function")
    made: Callable[..., Any] = found
    return made


def _call_own(
    name: str, function: Callable[..., Any], size: InputSize, num_classes: int | None
) -> nn.Module:
    """function(in_channels=…, num_classes=…), as far as its signature takes them."""
    from torch import nn

    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    arguments = {"in_channels": size[0]}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
        if "num_classes" not in parameters and not takes_all:
            raise PlanError(
                f"{name}: it takes no num_classes, so it cannot be built for {num_classes} "
                "classes: leave out --classes, or the recipe's num_classes"
            )
    elif "num_classes" in parameters and parameters["num_classes"].default is inspect._empty:
        raise PlanError(
            f"{name}: it needs num_classes: give --classes, or in a recipe "
            f"model: {{name: {name}, num_classes: 10}}"
        )
    with terminal.talk_to_stderr():
        model = function(**{k: v for k, v in arguments.items() if takes_all or k in parameters})
    if not isinstance(model, nn.Module):
        raise PlanError(f"{name}: it returned {type(model).__name__}, not a torch.nn.Module")
    return model


# Parts of messages ------------------------------------------------------------------------------


def _package(name: str, package: str) -> Any:
    """The package that a name asks for. Raises PlanError if it is missing or does not load."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise PlanError(f"{name}: importing {package} fails: {_reason(error)}") from error
        raise PlanError(
            f"{name}: it needs the package {package}, which is not installed: "
            '`pip install "kwsearch[zoo]"`'
        ) from None
    except Exception as error:
        raise PlanError(
            f"{name}: importing {package} fails: {_reason(error)}; "
            "timm, torchvision and torch must be versions that go together"
        ) from error


def _unknown(name: str, model: str, known: Iterable[str]) -> zoo.UnknownModelError:
    package = name.partition(":")[0]
    close = difflib.get_close_matches(model, list(known), n=3)
    hint = f"did you mean {' or '.join(f'{package}:{one}' for one in close)}? " if close else ""
    return zoo.UnknownModelError(
        f"unknown model {name!r}: {hint}`kwsearch models {package}:PART` lists the names"
    )


def _side(name: str, size: InputSize) -> int:
    if len(set(size[1:])) > 1:
        raise PlanError(f"{name} takes square images, not {_shown(size)}")
    return size[1]


def _shown(size: InputSize) -> str:
    return "x".join(map(str, size))


def _reason(error: BaseException) -> str:
    """`TypeError: first line (file:line)`, the place being the innermost in code of your own."""
    text = str(error).strip().split("\n")[0]
    places = [
        f" ({frame.filename}:{frame.lineno})"
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in (__file__, importlib.__file__)
        and not frame.filename.startswith("<")
        and "-packages" not in frame.filename
    ]
    return f"{type(error).__name__}: {text}" + (places[-1] if places else "")
