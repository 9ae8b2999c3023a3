"""kwsearch export: a recipe as a training script, and in other tools' formats."""

from __future__ import annotations

import importlib
import io
import os
import re
import secrets
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kwsearch.cli.options import trust_option, without_trust

if TYPE_CHECKING:
    from torch import nn

    from kwsearch.recipe import Recipe

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Request:
    """What is asked for. shown: the recipe and its changes, as on the command line."""

    recipe: Recipe
    shown: str
    output: Path
    weights: Path | None
    ema: bool
    trust: bool


@dataclass(frozen=True)
class _Kind:
    """write(request, path) makes the file; it may return limits that this does not keep. weights:
    None where none are taken; what there is without them is said if they are optional, and trained
    if they are.
    """

    what: str
    file: str
    write: Callable[[_Request, Path], tuple[str, ...] | None]
    weights: str | None = None


def _write_train_script(request: _Request, path: Path) -> None:
    from kwsearch.export.train_script import train_script

    text = train_script(request.recipe, request.shown, request.output.name, request.trust)
    path.write_text(text, encoding="utf-8")


def _write_official(request: _Request, path: Path) -> None:
    import json

    from kwsearch.resolve import network_of, outcome_of

    official: Any = importlib.import_module("kwlayers.official")
    plan = outcome_of(request.recipe, network_of(request.recipe, request.trust)).plan
    path.write_text(json.dumps(official.write_config(plan), indent=2) + "\n", encoding="utf-8")


def _write_timm(request: _Request, path: Path) -> None:
    module: Any = importlib.import_module("kwsearch.export.timm_module")
    module.write_timm_module(request.recipe, path, name=request.output.stem)


def _write_onnx(request: _Request, path: Path) -> None:
    _write_graph(request, path, "export_onnx")


def _write_program(request: _Request, path: Path) -> None:
    _write_graph(request, path, "export_program")


def _write_graph(request: _Request, path: Path, function: str) -> None:
    from kwsearch.resolve import input_of

    model = _converted(request)
    graphs: Any = importlib.import_module("kwsearch.export.onnx")
    getattr(graphs, function)(model, input_of(request.recipe), path)


def _write_static(request: _Request, path: Path) -> None:
    import torch

    from kwlayers import PlanError, to_static_
    from kwsearch.export.errors import ExportError

    try:
        state = to_static_(_converted(request)).state_dict()
    except PlanError as error:
        raise ExportError(
            f"--weights {request.weights}: {error} (train.py --temperature-epochs inf)"
        ) from error
    content = io.BytesIO()  # torch does not survive a file that it cannot write
    torch.save(state, content)
    path.write_bytes(content.getbuffer())


def _write_tflite(request: _Request, path: Path) -> tuple[str, ...]:
    from kwsearch import deploy
    from kwsearch.micronas import tflite

    def tell(epoch: int, accuracy: float) -> None:
        click.echo(f"epoch {epoch}: {accuracy:.2%} on held-out windows", err=True)

    kept = request.output.with_suffix(".pt")
    found = deploy.deploy(request.recipe, path, request.weights, kept, tell)
    if request.weights is None:
        click.echo(f"wrote {kept}, the trained weights, for --weights", err=True)
    name = re.sub(r"\W", "_", request.output.stem, flags=re.ASCII)
    name = f"_{name}" if name[:1].isdigit() else name
    tflite.header(path, name, found.notes()).replace(request.output.with_suffix(".h"))
    for line in found.lines():
        click.echo(line)
    return found.broken


KINDS = {
    "train.py": _Kind("a training script", "train.py", _write_train_script),
    "official.json": _Kind("a config of the papers' code", "official.json", _write_official),
    "timm": _Kind("a module that registers the network in timm", "kw_model.py", _write_timm),
    "onnx": _Kind("ONNX", "model.onnx", _write_onnx, weights="optional"),
    "program": _Kind("torch.export", "model.pt2", _write_program, weights="optional"),
    "static": _Kind(
        "the static network's weights, of one trained by train.py --temperature-epochs inf",
        "static.pt",
        _write_static,
        weights="needed",
    ),
    "tflite": _Kind(
        "int8 TensorFlow Lite and a C header, of an architecture of micronas, trained by the "
        "recipe's proxy without --weights",
        "model.tflite",
        _write_tflite,
        weights="trained",
    ),
}


@click.command(
    "export",
    epilog="KIND is one of: "
    + "; ".join(f"{name}, {kind.what}" for name, kind in KINDS.items())
    + ".",
)
@click.argument("recipe", metavar="RECIPE")
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--to", "kind", required=True, metavar="KIND", type=click.Choice(list(KINDS)),
              help="What to write, see below.")  # fmt: skip
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Its file.  [default: train.py, model.onnx, …]",
)
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@click.option(
    "--weights",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A checkpoint of train.py, or a state dict (onnx, program, static).",
)
@click.option("--ema", is_flag=True, help="The checkpoint's averaged weights.")
@trust_option
def command(
    recipe: str,
    overrides: tuple[str, ...],
    kind: str,
    output: Path | None,
    force: bool,
    weights: Path | None,
    ema: bool,
    trust: bool,
) -> None:
    """Write RECIPE, with KEY=VALUE changes such as model.num_classes=10, for use elsewhere.

    \b
    kwsearch export recipe.yaml --to train.py && python train.py --data PATH
    kwsearch export recipe.yaml --to onnx --weights runs/train/checkpoint.pt
    """
    from kwsearch.recipe import load_recipe

    chosen = KINDS[kind]
    target = output or Path(chosen.file)
    _check(kind, target, force, weights, ema)
    settings, trust = without_trust(overrides, trust)
    loaded = load_recipe(recipe, settings)
    shown = shlex.join([recipe, *overrides])
    request = _Request(loaded, shown, target, weights, ema, trust)
    if chosen.weights == "optional" and weights is None:
        click.echo("note: without --weights the weights are random", err=True)
    broken = _replace(target, lambda path: chosen.write(request, path))
    click.echo(f"wrote {target}", err=True)
    if broken:
        from kwsearch.step_report import DoesNotFit

        raise DoesNotFit(f"the file is not within the recipe's limits: {'; '.join(broken)}")


def _beside(kind: str, target: Path, weights: Path | None) -> list[Path]:
    """What else is written."""
    if kind != "tflite":
        return []
    header, kept = target.with_suffix(".h"), target.with_suffix(".pt")
    return [header] if weights is not None else [header, kept]


def _check(kind: str, target: Path, force: bool, weights: Path | None, ema: bool) -> None:
    """Before the work: options that do not go together, a file that may not be written."""
    chosen = KINDS[kind]
    if weights is not None and chosen.weights is None:
        takers = ", ".join(name for name, other in KINDS.items() if other.weights)
        raise click.UsageError(f"--weights: {kind} has none; they are for {takers}")
    if weights is None and chosen.weights == "needed":
        raise click.UsageError(f"--to {kind} needs --weights, a checkpoint of the trained network")
    if kind == "tflite" and ema:
        raise click.UsageError("--ema: of checkpoints of train.py; tflite takes a state dict")
    if kind == "tflite" and target.suffix != ".tflite":
        raise click.UsageError(f"-o {target}: must end in .tflite; the C header is written beside")
    for beside in _beside(kind, target, weights):
        if beside.exists() and not force:
            raise click.UsageError(f"{beside} exists: --force replaces it, too")
    if ema and weights is None:
        raise click.UsageError("--ema needs --weights, a checkpoint of train.py --ema")
    if kind == "timm" and target.suffix != ".py":
        raise click.UsageError(f"-o {target}: Python imports files that end in .py only")
    if not target.parent.is_dir():
        raise click.UsageError(f"-o {target}: there is no folder {target.parent}")
    if target.exists() and not force:
        raise click.UsageError(f"{target} exists: --force replaces it, or give another with -o")


def _replace(target: Path, write: Callable[[Path], _T]) -> _T:
    """All or nothing: written beside, with the same ending, then renamed; what `write` gives."""
    temporary = target.with_name(f".{secrets.token_hex(8)}{target.suffix}")
    try:
        temporary.touch()  # before the work
        try:
            found = write(temporary)
            os.replace(temporary, target)
            return found
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.filename is not None and str(error.filename) != str(temporary):
            raise
        raise OSError(f"-o {target}: {error.strerror or error}") from error


def _converted(request: _Request) -> nn.Module:
    """The recipe's network, converted, with the weights if there are some, to be evaluated."""
    from kwlayers import convert_
    from kwsearch.resolve import create_model, plan_for

    model = create_model(request.recipe, trust=request.trust)
    static = set(model.state_dict())
    convert_(model, plan_for(request.recipe, model))
    if request.weights is not None:
        _load(model, request.weights, request.ema, static)
    return model.eval()


def _load(model: nn.Module, path: Path, ema: bool, static: set[str]) -> None:
    """A checkpoint's weights into the model. Raises click.UsageError where they do not fit.

    static: the names of the static network's weights.
    """
    from kwsearch.export import train_template as script

    try:
        state = script.read_file(path)
        if ema:
            state = state.get("ema") if isinstance(state, dict) else None
            if state is None:
                raise click.UsageError(f"--ema: {path} has no averaged weights; leave it out")
        weights = script.weights_in(state, path)
        if weights.keys() == static:
            raise script.UserError(
                f"{path}: the static network's weights; train.py --weights starts from them"
            )
        script.load_weights(model, weights, path, strict=True)
    except script.UserError as error:
        raise click.UsageError(f"--weights {error}") from None
    if problem := script.not_finite(weights):
        click.echo(f"warning: --weights {path}: {problem}", err=True)
