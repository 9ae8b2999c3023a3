"""What a command line asks of a model or recipe: the network, a target, settings."""

from __future__ import annotations

import contextlib
import difflib
from typing import TYPE_CHECKING, Any

import click

from kwlayers.layout import MethodSettings
from kwlayers.methods import find
from kwlayers.plan import Network, PlanError
from kwlayers.sharing import Settings
from kwsearch import networks
from kwsearch.budget import Outcome, Target, meet
from kwsearch.cli.options import is_recipe

if TYPE_CHECKING:
    from kwsearch.recipe import Recipe


def _setting(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value as in a recipe."""
    import yaml

    key, sign, value = text.partition("=")
    if not (key and sign and value):
        raise click.UsageError(f"--set {text}: expected KEY=VALUE, e.g. num_kernels=4")
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError:
        found = value
    return key, tuple(found) if isinstance(found, list) else found


class Request:
    """The model, its input and the target, from the command line and perhaps a recipe. replans:
    whether a target is met by the recipe's own method.
    """

    def __init__(
        self,
        model: str,
        input_size: Any,
        classes: int | None,
        target: Target,
        trust: bool,
        replans: bool = True,
    ) -> None:
        # recipe: the one that says the plan or its budget. source: where -o takes the rest from.
        self.recipe: Recipe | None = None
        self.source: Recipe | None = None
        self.model, self.input_size, self.classes, self.target = model, input_size, classes, target
        self.trust = trust
        self.settings: MethodSettings | None = None
        if is_recipe(model):
            self._read(model, replans)

    def _read(self, path: str, replans: bool) -> None:
        from kwsearch.recipe import load_recipe
        from kwsearch.resolve import check_replannable, settings_of, target_of

        self.source = self.recipe = load_recipe(path)
        self.model = self.recipe.model.name
        self.input_size = self.input_size or self.recipe.input
        self.classes = self.classes or self.recipe.model.num_classes
        self.settings = settings_of(self.recipe)
        if self.target:
            if replans:
                check_replannable(self.recipe)
            self.recipe = None
        else:
            self.target = target_of(self.recipe)

    def apply(self, options: dict[str, Any]) -> None:
        """Options that change the plan: of `plan_options`, those that were given."""
        options = {name: value for name, value in options.items() if value not in (None, ())}
        if not options:
            return
        if self.has_plan:
            names = ("set" if name == "own" else name for name in options)
            shown = ", ".join("--" + name.replace("_", "-") for name in names)
            raise click.UsageError(
                f"{shown}: the recipe has a plan, which is counted as it stands; give a target "
                "(--ratio, --params or --total-ratio) to plan anew"
            )
        settings = self.settings or Settings()
        method = find(options.pop("method", settings.method))
        if method.name != settings.method:
            settings = method.settings()
        for one in options.pop("own", ()):
            key, value = _setting(one)
            options[key] = value
        if unknown := sorted(set(options) - set(settings.names)):
            close = difflib.get_close_matches(unknown[0], settings.names, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise PlanError(
                f"{method.name} has no {' and no '.join(unknown)}: {hint}its settings are "
                f"{', '.join(settings.names)}"
            )
        self.settings = settings.changed(**options)

    @property
    def as_published(self) -> bool:
        """Whether a published accuracy speaks of this network."""
        default = networks.source(self.model).size()
        return self.classes is None and tuple(self.input_size or default) == default

    @property
    def sized(self) -> bool:
        """Whether there is a plan without a target."""
        return self.settings is not None and self.settings.sized

    @property
    def has_plan(self) -> bool:
        return self.recipe is not None and self.recipe.plan is not None

    def network(self) -> Network:
        with self._located():
            return networks.trace_model(self.model, self.input_size, self.classes, self.trust)

    def outcome(self, network: Network) -> Outcome:
        if self.recipe is not None and self.recipe.plan is not None:
            from kwsearch.resolve import outcome_of

            return outcome_of(self.recipe, network)
        with self._located():
            return meet(network, self.target, self.settings, self.model)

    def _located(self) -> contextlib.AbstractContextManager[None]:
        """Errors about a recipe have its lines; a target of the command line has none."""
        if self.source is None:
            return contextlib.nullcontext()
        from kwsearch.resolve import located

        return located(self.source, budget=() if self.recipe is None else ("budget",))
