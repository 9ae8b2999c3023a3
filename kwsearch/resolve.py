"""Between a recipe and a plan: what a recipe asks for, and the recipe that says a plan."""

from __future__ import annotations

import contextlib
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from kwlayers import methods
from kwlayers.layout import MethodSettings
from kwlayers.plan import Network, Plan, PlanError
from kwlayers.rules import Rule, Share
from kwlayers.sharing import Settings, named_groups
from kwsearch import networks, units
from kwsearch.budget import Outcome, Target, meet
from kwsearch.recipe import Recipe
from kwsearch.zoo import UnknownModelError

if TYPE_CHECKING:
    from torch import nn


# The kinds of budgets, and what a number means under each.
KINDS: dict[str, Callable[[float], float]] = {
    "ratio": float,
    "params": units.parse_count,
    "total_ratio": float,
}


@contextlib.contextmanager
def located(
    recipe: Recipe, *path: str | int, budget: tuple[str, ...] = ("budget",)
) -> Iterator[None]:
    """Errors about the recipe begin with their place in its file: that of `path`, if given.

    budget: where the budget is that was tried.
    """
    try:
        yield
    except (PlanError, UnknownModelError) as error:
        if place := recipe.place(*(path or _about(recipe, error) or budget)):
            error.args = (f"{place}: {error}",)
        raise


def _about(recipe: Recipe, error: ValueError) -> tuple[str | int, ...]:
    """What an error of planning or of the network is about, by how it begins; () the budget."""
    text = str(error)
    if rule := re.match(r"rule (\d+) ", text):
        return "method", "rules", int(rule[1]) - 1
    if group := re.search(r"\bgroup '(\w+)'", text):
        names = [one.name for one in recipe.plan.groups] if recipe.plan is not None else []
        if group[1] in names:
            return "plan", "groups", names.index(group[1])
        return "method", "sharing", group[1]
    if isinstance(error, UnknownModelError):
        return "model", "name"
    if text.startswith("plan: it has"):
        return ("plan",)
    return () if re.match("params |ratio |plan: ", text) else ("model",)


def create_model(recipe: Recipe, width: float | None = None, trust: bool = False) -> nn.Module:
    """The recipe's static model, on the current device; scaled to `width` if given.

    trust: whether it may be the user's own code, here and below.
    """
    model = recipe.model
    with located(recipe):
        return networks.build_model(model.name, recipe.input, model.num_classes, width, trust)


def network_of(recipe: Recipe, trust: bool = False) -> Network:
    """What tracing the recipe's model finds."""
    model = recipe.model
    with located(recipe):
        return networks.trace_model(model.name, recipe.input, model.num_classes, trust)


def outputs_of(recipe: Recipe, input_size: Sequence[int], trust: bool = False) -> int:
    """Classes that the recipe's model tells apart, on inputs of this size.

    Raises PlanError if it does not run on them, or gives something else.
    """
    choice = recipe.model
    with located(recipe):
        model = networks.planning_model(choice.name, recipe.input, choice.num_classes, trust)
        return networks.count_outputs(model, tuple(input_size))


def input_of(recipe: Recipe) -> tuple[int, ...]:
    """The recipe's input size, or the model's own."""
    with located(recipe):
        return recipe.input or networks.source(recipe.model.name).size()


def settings_of(recipe: Recipe) -> MethodSettings:
    """The recipe's method, as planning takes it."""
    method = recipe.method
    rules = []
    for number, rule in enumerate(method.rules):
        with located(recipe, "method", "rules", number):
            rules.append(Rule(**rule.model_dump()))
    fields = {name: getattr(method, name) for name in type(method).model_fields}
    kind = methods.find(fields.pop("name")).settings
    with located(recipe, "method"):
        return kind(**fields | {"rules": tuple(rules)})


def target_of(recipe: Recipe) -> Target:
    """The recipe's budget; empty if it has none."""
    budget = recipe.budget
    if budget is None:
        return Target()
    return Target(budget.ratio, budget.params, budget.total_ratio)


def targets_of(recipe: Recipe) -> dict[float, Target]:
    """The budgets that the recipe's search is under, by their values. Empty if it has none.

    Raises PlanError for budgets of a sweep that are not of the budget's kind.
    """
    own = target_of(recipe)
    if not own:
        return {}
    (kind,) = (name for name, given in vars(own).items() if given is not None)
    swept = recipe.search.budgets if recipe.search is not None else ()
    found: dict[float, Target] = {}
    for value in swept or (getattr(own, kind),):
        try:
            given: dict[str, Any] = {kind: KINDS[kind](value)}
            found[value] = Target(**given)
        except ValueError as error:
            with located(recipe, "search", "budgets"):
                raise PlanError(f"search.budgets: {error}; budget has {kind}") from None
    return found


def outcome_of(recipe: Recipe, network: Network) -> Outcome:
    """The recipe's plan as it stands, else the plan that meets its budget.

    Raises PlanError for a plan that cannot be or has more parameters than the budget, BudgetError
    for a budget that no plan meets.
    """
    if recipe.of_architectures:
        with located(recipe, "model"):
            raise PlanError(
                "model: the recipe is about architectures of micronas and has no plan; `kwsearch "
                "budget` counts an architecture, `kwsearch optimize` looks for one, and with a "
                "budget the recipe is about plans of the largest"
            )
    settings, target = settings_of(recipe), target_of(recipe)
    with located(recipe):
        if recipe.plan is None:
            return meet(network, target, settings)
        if not recipe.plan.groups:
            raise PlanError("plan: it has no groups; delete the section to plan by the budget")
        plan = Plan.from_groups(network, [group.model_dump() for group in recipe.plan.groups])
        if target and target.ratio is None:
            total, allowed = plan.cost().deployed, target.params_of(network)
            if total > allowed:
                raise PlanError(
                    f"plan: {total:,} parameters, over the budget of {allowed:,}: raise the "
                    "budget, or delete it to take the plan as it stands"
                )
    # It stands for itself: the budget it was once made for may not be its ratio.
    return Outcome(plan, Target(), settings)


def plan_for(recipe: Recipe, model: nn.Module) -> Plan:
    """The recipe's plan for `model`, which may be yours: layers are found by name."""
    from kwlayers.sites import trace

    network = trace(model, input_of(recipe))
    try:
        return outcome_of(recipe, network).plan
    except PlanError as error:
        raise PlanError(f"the recipe does not fit this {type(model).__name__}: {error}") from error


def versions() -> dict[str, str]:
    """Of what decides a result, without importing it."""
    packages = {name: version(name) for name in ("kwsearch", "torch", "optuna", "numpy")}
    return {"python": platform.python_version(), **packages}


def check_replannable(recipe: Recipe) -> None:
    """Raise PlanError if planning anew would lose what only the recipe's plan says.

    A method's sharing groups have no ratios of their own; a plan's can.
    """
    sharing = getattr(recipe.method, "sharing", "layer")
    if recipe.plan is None or isinstance(sharing, str):
        return
    ratios = {getattr(group, "ratio", None) for group in recipe.plan.groups}
    if len(ratios) > 1:
        shown = ", ".join("solved" if r is None else f"{r:g}" for r in sorted(ratios, key=str))
        raise PlanError(
            f"the recipe's groups have ratios of their own ({shown}), which a plan made anew from "
            "its method would lose: count it as it stands, or delete its plan section first"
        )


def method_dict(settings: MethodSettings) -> dict[str, Any]:
    """Settings as a recipe's method section."""
    rules = [
        {"layers": list(rule.patterns)}
        | {word: True for word in ("static", "dynamic") if getattr(rule, word)}
        | ({} if rule.share is None else {"share": rule.share})
        | rule.own
        for rule in settings.rules
    ]
    if not isinstance(settings, Settings):
        return {"name": settings.method, **vars(settings), "rules": rules}
    sharing: Any = settings.sharing
    if not isinstance(sharing, str):
        sharing = {
            name: list(given.layers if isinstance(given, Share) else given)
            for name, given in named_groups(sharing).items()
        }
    return {
        **vars(settings),
        "sharing": sharing,
        "cell_ratio": list(settings.cell_ratio),
        "rules": rules,
    }


def recipe_of(
    outcome: Outcome,
    model: str,
    input_size: Sequence[int] | None,
    num_classes: int | None,
    sections: dict[str, Any] | None = None,
) -> Recipe:
    """The recipe that says `outcome`. sections: further ones, as plain data."""
    target = {k: v for k, v in vars(outcome.target).items() if v is not None}
    data: dict[str, Any] = {
        "format": 1,
        "model": model if num_classes is None else {"name": model, "num_classes": num_classes},
        "input": list(input_size or outcome.plan.network.input_size),
        "method": method_dict(outcome.settings),
        "plan": {"groups": outcome.plan.groups_to_list()},
    }
    if target:
        data["budget"] = target
    return Recipe.model_validate({**data, **(sections or {})})
