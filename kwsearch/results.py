"""What came of a study: its trials, the best of each budget, the recipes that say them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kwlayers.plan import Network, Plan, counted
from kwsearch import finals, verdict
from kwsearch.finals import Finals
from kwsearch.recipe import (
    MicroNAS,
    Proxy,
    Recipe,
    RecipeError,
    RecipePlan,
    Search,
    load_recipe,
    section_of,
    write_recipe,
)
from kwsearch.resolve import KINDS, target_of, targets_of
from kwsearch.run_directory import BEST, SearchError
from kwsearch.rungs import Rung, as_rungs, geometric
from kwsearch.rungs import check as check_rungs
from kwsearch.trials import (
    ARCHITECTURE,
    FLASH,
    LATENCY,
    NAMES,
    PEAK,
    UNIFORM,
    WAREHOUSE,
    accuracy_of,
    baseline,
    best_of,
    budget_of,
)
from kwsearch.zoo import MODELS

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from kwsearch.snapshot import Snapshot

# What a best recipe's provenance says it takes.
_COSTS = ("params", "macs", LATENCY, PEAK, FLASH)


@dataclass(frozen=True)
class Metric:
    """What trials are scored by. is_share: of examples, each right or wrong; else it may be below
    0.
    """

    title: str
    is_share: bool


ACCURACY = Metric("held-out accuracy", True)
WORDS = Metric("held-out 1 - WER", False)


def metric_of(recipe: Recipe) -> Metric:
    """By the recipe's input, or that of our network: of videos it is 1 less the word error rate."""
    own = MODELS.get(recipe.model.name)
    size = recipe.input or (own.input_size if own is not None else ())
    return WORDS if len(size) == 4 else ACCURACY


@dataclass(frozen=True)
class Found:
    """What was found under one budget. budget: as the recipe gives it; None of architectures."""

    budget: float | None
    trials: tuple[FrozenTrial, ...]
    finals: Finals | None = None
    best_path: Path | None = None

    @property
    def best(self) -> FrozenTrial | None:
        """The plan with the highest mean over the finalists' seeds; without finalists the one
        with the highest accuracy.
        """
        if self.finals is not None and self.finals.best is not None:
            return next(trial for trial in self.trials if trial.number == self.finals.best)
        return best_of(self.trials)

    def baseline(self, kind: str) -> FrozenTrial | None:
        """The finished trial that is this baseline."""
        return next((trial for trial in self.trials if baseline(trial) == kind), None)

    @property
    def allowed(self) -> int | None:
        """Parameters that a network may have, as the first trial says; None without one."""
        for trial in self.trials:
            if "params" in trial.user_attrs and "params" in trial.constraints:
                return int(trial.user_attrs["params"] - trial.constraints["params"])
        return None


@dataclass(frozen=True)
class Result:
    """A study's finished trials, in the order of their numbers, and what each budget gave.

    held_out: images that trials are scored on. warnings: of what its numbers are not.
    """

    recipe: Recipe
    trials: tuple[FrozenTrial, ...]
    held_out: int
    budgets: tuple[Found, ...]
    rungs: tuple[Rung, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def metric(self) -> Metric:
        """What trials are scored by."""
        return metric_of(self.recipe)

    @property
    def found(self) -> bool:
        """Whether there is a plan to use."""
        return any(found.best is not None for found in self.budgets)


def result_from(study: Snapshot) -> Result:
    """What a study has come to, as its run directory has it now: it may be running.

    held_out: 0 for a study that did not write it down.
    """
    recipe = study.recipe
    trials = tuple(trial for trial in study.trials if trial.state.is_finished())
    values = values_of(recipe)
    budgets = []
    for found in found_of(values, trials, study.attributes):
        path = study.directory / named(values, found.budget, BEST)
        there = not study.running and _says(path, found.best)
        budgets.append(replace(found, best_path=path if there else None))
    held_out = recipe.provenance.get("held_out")
    warnings = recipe.provenance.get("warnings")
    return Result(
        recipe,
        trials,
        held_out if isinstance(held_out, int) else 0,
        tuple(budgets),
        rungs_of(recipe.search or Search(), recipe.proxy or Proxy()),
        tuple(map(str, warnings)) if isinstance(warnings, list) else (),
    )


def _says(path: Path, best: FrozenTrial | None) -> bool:
    """Whether a best recipe is that of this trial; one may be of an earlier run of the study."""
    if best is None or not path.exists():
        return False
    try:
        return load_recipe(path).provenance.get("trial") == best.number
    except RecipeError:
        return False


def values_of(recipe: Recipe) -> list[float | None]:
    """The budgets of a study, by value; architectures are searched under none."""
    return [None] if recipe.of_architectures else [*targets_of(recipe)]


def found_of(
    values: Sequence[float | None], trials: Sequence[FrozenTrial], attributes: Mapping[str, Any]
) -> tuple[Found, ...]:
    """What each budget gave, of a study's finished trials and its attributes."""
    found = []
    for value in values:
        own = tuple(trial for trial in trials if budget_of(trial) == value)
        found.append(Found(value, own, finals.results(attributes, own)))
    return tuple(found)


def finalists(budgets: Iterable[Found], top: int) -> list[FrozenTrial]:
    """The best `top` plans of each budget and its baselines, if it has a plan to compare."""
    found = []
    for one in budgets:
        candidates = finals.chosen(one.trials, top)
        if not all(baseline(trial) for trial in candidates):
            found += candidates
    return found


def rungs_of(search: Search, proxy: Proxy) -> tuple[Rung, ...]:
    """Where trials stop. Raises SearchError for rungs that do not end in the full trial."""
    if search.strategy == "differentiable":
        supernet = search.supernet.epochs
        return Rung(supernet, supernet), Rung(proxy.epochs, supernet + proxy.epochs)
    if search.pruner != "halving":
        return as_rungs([(proxy.epochs, None, None)])
    stops = [(stop.epochs, stop.subset, stop.resolution) for stop in search.rungs]
    if not stops:
        counts = geometric(proxy.epochs, search.eta, settled(proxy))
        stops = [(count, None, None) for count in counts]
    problem = check_rungs(stops, proxy.epochs)
    if problem is not None:
        raise SearchError(f"search.rungs: {problem}")
    return as_rungs([(0, None, None), *stops] if search.zero_cost else stops)


def settled(proxy: Proxy) -> int:
    """While the temperature falls, accuracy falls with it and ranks nothing."""
    falling = 0 if proxy.starts_static else proxy.temperature_epochs
    return min(falling + 1, proxy.epochs)


def under(recipe: Recipe, value: float | None) -> Recipe:
    """The recipe with a budget of the same kind in place of its own, and no sweep; None: as is."""
    if value is None:
        return recipe
    (kind,) = (name for name, given in vars(target_of(recipe)).items() if given is not None)
    search = recipe.search
    if search is not None and search.budgets:
        search = search.model_copy(update={"budgets": ()})
    budget = type(recipe.budget).model_validate({kind: KINDS[kind](value)})  # type: ignore[union-attr]
    return recipe.model_copy(update={"budget": budget, "search": search})


def recipe_of_trial(recipe: Recipe, trial: FrozenTrial) -> Recipe:
    """The recipe with a trial's plan or architecture. Raises SearchError where there is none."""
    if ARCHITECTURE in trial.user_attrs:
        return with_architecture(recipe, trial)
    if "groups" not in trial.user_attrs:
        raise SearchError(f"trial {trial.number} has no plan: {baseline(trial) or 'not begun'}")
    return recipe.model_copy(update=_with_plan(recipe, trial.user_attrs["groups"]))


def _with_plan(recipe: Recipe, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sections that say a plan; its method, too, if that is not the recipe's."""
    name = groups[0]["method"]
    said: dict[str, Any] = {"plan": RecipePlan.model_validate({"groups": groups})}
    if name != recipe.method.name:
        said["method"] = section_of(name)
    return said


def with_architecture(recipe: Recipe, trial: FrozenTrial) -> Recipe:
    """The recipe that says a trial's."""
    said = (recipe.micronas or MicroNAS()).model_dump()
    said |= {name: trial.user_attrs.get(name) for name in (ARCHITECTURE, WAREHOUSE)}
    return recipe.model_copy(update={"micronas": MicroNAS.model_validate(said)})


def write_best(
    path: Path,
    recipe: Recipe,
    network: Network,
    found: Found,
    provenance: Mapping[str, Any],
    trust: bool = False,
) -> Path | None:
    """The recipe of a budget with its best plan, where it comes from and what it is worth.

    trust: whether reading it needs --trust. None if there is no plan.
    """
    best = found.best
    if best is None:
        return None
    plan = Plan.from_groups(network, best.user_attrs["groups"])
    filled = recipe.model_copy(update=_with_plan(recipe, plan.groups_to_list()))
    return write_found(path, filled, found, provenance, UNIFORM, " --trust" if trust else "")


def write_found(
    path: Path,
    recipe: Recipe,
    found: Found,
    provenance: Mapping[str, Any],
    kind: str,
    options: str = "",
) -> Path:
    """A recipe that says the best trial, with where that comes from and what it is worth. kind: of
    the baseline to name beside it. options: of the command that counts it.
    """
    best = found.best
    assert best is not None
    provenance = dict(provenance)
    first = found.baseline(kind)
    base = None if first is None else accuracy_of(first)
    said = [
        f"Trial {best.number}, the best of {len(found.trials)}: {best.values[0]:.2%} on held-out "
        "examples" + (f" ({NAMES[kind]} {base:.2%})." if base is not None else ".")
    ]
    if found.finals is not None and found.finals.verdict is not None:
        seeds = max(len(runs) for runs in found.finals.accuracies.values())
        shares = metric_of(recipe).is_share
        provenance["verdict"] = verdict.sentence(found.finals.verdict, is_share=shares)
        said.append(f"On {found.finals.split} examples, {counted(seeds, 'seed')} each:")
        said += [f"    {part}" for part in provenance["verdict"].split("; ")]
    filled = recipe.model_copy(
        update={
            "provenance": {
                **provenance,
                "trial": best.number,
                "trials": len(found.trials),
                "score": best.values[0],
                f"{kind}_score": base,
                **{name: best.user_attrs[name] for name in _COSTS if name in best.user_attrs},
            },
        }
    )
    header = [
        *said,
        f"{best.user_attrs['params']:,} parameters, {best.user_attrs['macs']:,} MACs"
        + (f", {best.user_attrs[LATENCY]:.3g} ms." if LATENCY in best.user_attrs else "."),
        f"    kwsearch budget {path}{options}",
    ]
    write_recipe(filled, path, header)
    return path


def named(budgets: Sequence[float | None], value: float | None, name: str) -> str:
    """The file of one budget: best.yaml, or best_0.5.yaml of a sweep."""
    if len(budgets) == 1:
        return name
    stem, _, suffix = name.partition(".")
    return f"{stem}_{value:.12g}.{suffix}"
