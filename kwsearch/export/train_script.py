"""A recipe as one training script: the template, with the recipe's literals and network in it."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import operator
import re
import sys
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kwlayers.plan import PlanError
from kwsearch import __version__, data, networks, zoo
from kwsearch.resolve import network_of, outcome_of, outputs_of

if TYPE_CHECKING:
    from kwlayers.plan import Plan
    from kwsearch.recipe import Recipe

_WIDTH = 100

# Where a recipe says nothing, as published: 300 epochs, the temperature falls over 20 (arXiv
# 2406.07879); SGD of ResNets (arXiv 1812.01187), AdamW of networks without batch norm (arXiv
# 2012.12877, 2201.03545; their learning rates at a batch of 256).
_EPOCHS, _TEMPERATURE, _BATCH = 300, 20 / 300, 256
_PUBLISHED: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1, "weight_decay": 0.0001, "warmup": 5 / 300},
    "adamw": {"lr": 0.00025, "weight_decay": 0.05, "warmup": 20 / 300},
}
_PROXY_WARMUP = 1 / 20  # of the steps: see kwsearch.proxy


class _Import(NamedTuple):
    """`import module as alias`, or `from module import name as alias`."""

    module: str
    name: str | None = None
    alias: str | None = None


def train_script(recipe: Recipe, source: str, name: str = "train.py", trust: bool = False) -> str:
    """The text of a script that trains the recipe's network.

    source: where the recipe is; name: what the script will be called. Both are only shown.
    trust: whether the network may be the user's own code. Raises PlanError if the recipe cannot
    be planned, or is not for the classification of images.
    """
    plan = outcome_of(recipe, network_of(recipe, trust)).plan
    size = plan.network.input_size
    if len(size) != 3:
        raise PlanError(f"the script trains on images (C, H, W), not on inputs {size}")
    imports, code = _model(recipe.model.name, size)
    parts = {
        "head": _head(recipe, plan, source, name),
        "recipe": _settings(recipe, plan, outputs_of(recipe, size, trust)),
        "model": code,
    }
    text = (resources.files("kwsearch.export") / "train_template.py").read_text("utf-8")
    for part, content in parts.items():
        pattern = rf"^# <{part}>\n.*?^# </{part}>\n"
        text, found = re.subn(pattern, lambda _: content, text, flags=re.M | re.S)  # noqa: B023
        assert found == 1, f"the template has {found} parts called {part}"
    return _with_imports(text, imports)


def _head(recipe: Recipe, plan: Plan, source: str, name: str) -> str:
    cost, network = plan.cost(), plan.network
    size = "x".join(map(str, network.input_size))
    model = recipe.model.name
    text = f'''"""Train {model} as {source} plans it.

{cost.params.total:,} parameters (the static network has {network.params:,});
{cost.macs.total:,} MACs, multiply-adds, for one image of {size} (static: {network.macs:,}).

    python {name} --data PATH
    python {name} --data PATH --static                the static network, the same way
    torchrun --nproc-per-node 2 {name} --data PATH    two processes, one a GPU if there are

PATH is a folder of images: MNIST's format, CIFAR's binary version, or train/CLASS/ and val/CLASS/.
Needs torch and kwlayers, and pillow for image folders; --help has all options.

Written by kwsearch {__version__}:
    kwsearch export {source} --to train.py
"""
'''
    quotes = '"""'
    inside = text.strip().removeprefix(quotes).removesuffix(quotes)
    escaped = inside.replace("\\", "\\\\").replace(quotes, '\\"\\"\\"')
    return f"{quotes}{escaped}{quotes}\n"


def _settings(recipe: Recipe, plan: Plan, classes: int) -> str:
    lines = [
        f"INPUT = {_literal(plan.network.input_size)}  # channels, height, width",
        f"CLASSES = {classes}",
        f"DEFAULTS: dict[str, Any] = {_literal(_defaults(recipe, plan))}",
        f"GROUPS: list[dict[str, Any]] = {_literal(plan.groups_to_list())}",
    ]
    return "\n".join(lines) + "\n"


def _defaults(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """What `training` says, else `proxy`, else what is published."""
    said: dict[str, Any] = {}
    for section in (recipe.proxy, recipe.training):
        if section is not None:
            said |= {key: value for key, value in vars(section).items() if value is not None}
    optimizer = said.get("optimizer", "sgd" if plan.network.batch_norm else "adamw")
    if optimizer not in _PUBLISHED:
        raise PlanError(
            f"training.optimizer {optimizer!r}: the script has {' and '.join(_PUBLISHED)}; "
            "override it, e.g. training.optimizer=sgd"
        )
    published = _PUBLISHED[optimizer]
    epochs = said.get("epochs", _EPOCHS)
    warmup = published["warmup"] if recipe.proxy is None else _PROXY_WARMUP
    temperature = said.get("temperature_epochs", epochs * _TEMPERATURE)
    images = said.get("data")
    return {
        "data": None if images in data.NAMES else images,
        "epochs": epochs,
        "warmup_epochs": round(epochs * warmup, 3),
        "start": "static" if said.get("init") == "static" else "published",
        "temperature_epochs": round(min(temperature, epochs), 3),
        "batch_size": said.get("batch_size", _BATCH),
        "optimizer": optimizer,
        "lr": said.get("lr", published["lr"]),
        "weight_decay": said.get("weight_decay", published["weight_decay"]),
        "momentum": said.get("momentum", 0.9),
        "label_smoothing": 0.1 if recipe.proxy is None else 0.0,
        "augment": said.get("augment", "auto"),
        "threads": said.get("threads", 0),
    }


def _literal(value: Any, indent: int = 0) -> str:
    """Python source, one entry per line where one line is too long."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if not isinstance(value, (list, tuple, dict)):
        return repr(value)
    left, right = {list: ("[", "]"), tuple: ("(", ")"), dict: ("{", "}")}[type(value)]
    if isinstance(value, dict):
        entries = [f"{_literal(k)}: {_literal(v, indent + 4)}" for k, v in value.items()]
    else:
        entries = [_literal(v, indent + 4) for v in value]
    line = left + ", ".join(entries) + ("," if right == ")" and len(entries) == 1 else "") + right
    if "\n" not in line and indent + len(line) < _WIDTH * 2 // 3:
        return line
    inner = "".join(f"{' ' * (indent + 4)}{entry},\n" for entry in entries)
    return f"{left}\n{inner}{' ' * indent}{right}"


def _model(name: str, size: networks.InputSize) -> tuple[set[_Import], str]:
    """Imports, and the source of the static network down to `make_model`."""
    kind, colon, rest = name.partition(":")
    if not colon:
        entry = zoo.get(name)
        function = entry.builder or name
        options = [f"{key}={value!r}" for key, value in entry.arguments.items()]
        options += ["num_classes=CLASSES", "in_channels=INPUT[0]"]
        options += ["img_size=INPUT[1]"] if "img_size" in entry.options else []
        options += [f"{flag}=True" for flag in entry.static]
        imports, code = _pruned(entry.module, {function})
        return imports, f"{code}\n\n\n{_make_model(function, options)}"
    options = [json.dumps(rest), "num_classes=CLASSES"]
    if kind == "timm":
        options += ["in_chans=INPUT[0]"]
        options += ["img_size=INPUT[1:]"] if _takes_img_size(name, rest, size) else []
        return {_Import("timm")}, _make_model("timm.create_model", options)
    if kind == "torchvision":
        # As networks.source builds them.
        if rest.endswith(("googlenet", "inception_v3")):
            options += ["aux_logits=False", "init_weights=True"]
        options += ["image_size=INPUT[1]"] if rest.startswith("vit_") else []
        options += ["input_size=INPUT[1:]"] if rest.startswith("maxvit") else []
        return {_Import("torchvision")}, _make_model("torchvision.models.get_model", options)
    function = operator.attrgetter(rest)(importlib.import_module(kind))
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    options = [
        f"{option}={value}"
        for option, value in (("in_channels", "INPUT[0]"), ("num_classes", "CLASSES"))
        if takes_all or option in parameters
    ]
    return {_Import(kind, rest.split(".")[0])}, _make_model(rest, options)


def _takes_img_size(name: str, model: str, size: networks.InputSize) -> bool:
    """Whether a network of timm is built for one size of images, and this is another."""
    if networks.source(name).size()[1:] == size[1:]:
        return False
    import timm
    import torch

    try:
        with torch.device("meta"):
            timm.create_model(model, img_size=size[1:])
    except TypeError:
        return False
    return True


def _make_model(function: str, options: list[str]) -> str:
    return (
        "def make_model() -> nn.Module:\n"
        '    """The static network. x: (B, *INPUT)  out: (B, CLASSES)"""\n'
        f"    return {function}({', '.join(options)})\n"
    )


def _pruned(module: str, wanted: set[str]) -> tuple[set[_Import], str]:
    """What `wanted` of a module of the zoo needs: imports, and source in its order.

    What it needs of other modules of ours that a network is made of comes first, each once.
    """
    needed: dict[str, set[str]] = {}
    outer: set[_Import] = set()
    _collect(module, wanted, needed, outer)
    return outer, "\n\n\n".join(_source(name, needed[name]) for name in reversed(needed))


def _collect(
    module: str, wanted: set[str], needed: dict[str, set[str]], outer: set[_Import]
) -> None:
    """Names of modules of the zoo into `needed`, each module after all that import it; imports of
    others into `outer`.
    """
    imports, pieces = _parsed(module)
    names = needed.pop(module, set()) | wanted
    for _ in pieces:
        used = [_names(node) for node, _ in pieces if _defined(node) & names]
        names = names.union(*used)
    needed[module] = names
    inner: dict[str, set[str]] = {}
    for bound, found in sorted(imports.items()):
        if bound not in names or found.module == "__future__":
            continue
        if found.module.startswith("kwsearch."):
            assert found.name is not None, found
            inner.setdefault(found.module, set()).add(found.name)
        else:
            outer.add(found)
    for name, members in inner.items():
        _collect(name, members, needed, outer)


def _parsed(module: str) -> tuple[dict[str, _Import], list[tuple[ast.stmt, str]]]:
    """A module's imports by the names that they bind, and its other statements with their source,
    comments above them included.
    """
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).read_text("utf-8")
    lines = text.split("\n")
    imports: dict[str, _Import] = {}
    pieces: list[tuple[ast.stmt, str]] = []
    before = 0
    for node in ast.parse(text).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports |= _imported(node)
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            pieces.append((node, "\n".join(lines[before : node.end_lineno]).strip("\n")))
        before = node.end_lineno or 0
    return imports, pieces


def _source(module: str, names: set[str]) -> str:
    """The statements of a module that define any of these."""
    kept = [(node, piece) for node, piece in _parsed(module)[1] if _defined(node) & names]
    code = kept[0][1]
    for (last, _), (node, piece) in pairwise(kept):
        simple = not any(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in (last, node))
        code += ("\n" if simple else "\n\n\n") + piece
    return code


def _imported(node: ast.Import | ast.ImportFrom) -> dict[str, _Import]:
    """Bound name -> the import that binds it."""
    if isinstance(node, ast.Import):
        return {
            alias.asname or alias.name.split(".")[0]: _Import(alias.name, None, alias.asname)
            for alias in node.names
        }
    assert node.module is not None, "the zoo imports by full names"
    return {
        alias.asname or alias.name: _Import(node.module, alias.name, alias.asname)
        for alias in node.names
    }


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _names(node: ast.stmt) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _with_imports(text: str, more: set[_Import]) -> str:
    """The script with all imports in one sorted block: standard library, then the rest."""
    nodes = [
        node for node in ast.parse(text).body if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    _future, *nodes = nodes
    found = more.union(*(_imported(node).values() for node in nodes))
    standard = {i for i in found if i.module.split(".")[0] in sys.stdlib_module_names}
    blocks = ["\n".join(_import_lines(part)) for part in (standard, found - standard) if part]
    lines = text.split("\n")
    first, last = nodes[0].lineno - 1, nodes[-1].end_lineno or 0
    return "\n".join([*lines[:first], "\n\n".join(blocks), *lines[last:]])


def _import_lines(imports: set[_Import]) -> list[str]:
    """As isort has them: `import x` first; of one module, classes before functions."""

    def spelled(what: str, alias: str | None) -> str:
        return what if alias is None else f"{what} as {alias}"

    plain = sorted((i.module, i.alias) for i in imports if i.name is None)
    lines = [f"import {spelled(module, alias)}" for module, alias in plain]
    named: dict[str, list[tuple[bool, str, str | None]]] = {}
    for one in imports:
        if one.name is not None:
            member = (not one.name[0].isupper(), one.name, one.alias)
            named.setdefault(one.module, []).append(member)
    for module in sorted(named):
        names = ", ".join(spelled(name, alias) for _, name, alias in sorted(named[module]))
        lines.append(f"from {module} import {names}")
    return lines
