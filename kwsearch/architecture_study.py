"""The search for an architecture: every trial is one within the limits, trained by the recipe's
proxy. The first is the largest, which always finishes.

With the strategy `sampler` Optuna proposes them; with `differentiable` each trial trains a supernet
of its own first, by another seed, which chooses one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial

from kwlayers.plan import PlanError
from kwsearch import architectures, dry_run
from kwsearch.architecture_proposals import ArchitectureProposer
from kwsearch.dry_run import ArchitectureForecast
from kwsearch.executors import Job
from kwsearch.micronas.cycles import CycleError, CycleTable
from kwsearch.micronas.space import operators
from kwsearch.recipe import Method
from kwsearch.results import Found, with_architecture, write_found
from kwsearch.run_directory import SearchError
from kwsearch.study import Study
from kwsearch.train_step import train_bytes
from kwsearch.trials import AGAIN, ARCHITECTURE, FINGERPRINT, LARGEST, SUPERNET

if TYPE_CHECKING:
    from kwsearch.labelled_data import LabelledData
    from kwsearch.sign_data import SignData

# Of search.space, what architectures have.
_HAVE = {"limits"}
_LIMITS = {"latency_ms", "lut", "lut_force", "peak_memory", "flash"}


class NothingFits(SearchError):
    """No architecture keeps the limits."""


class ArchitectureStudy(Study):
    """A search for an architecture of micronas. Raises SearchError for limits that none keeps."""

    def _check_recipe(self) -> None:
        super()._check_recipe()
        search = self.search
        if search.budgets:
            raise SearchError(
                "search.budgets: architectures have limits, not a budget; leave it out, or give "
                "the recipe a budget, which is of plans"
            )
        for section, had, whose in (
            (search.space, _HAVE, "search.space"),
            (search.space.limits, _LIMITS, "search.space.limits"),
        ):
            default = type(section)()
            for name in type(section).model_fields:
                if name not in had and getattr(section, name) != getattr(default, name):
                    raise SearchError(
                        f"{whose}.{name}: is of plans; architectures of micronas have "
                        f"{', '.join(sorted(had))}"
                    )
        self.ratios = self.recipe.micronas.warehouses if self.recipe.micronas else ()
        if search.strategy != "sampler":
            self._check_supernets()
        if self.recipe.method != Method():
            raise SearchError(
                "method: is of plans; warehouses of architectures are those of its defaults: leave "
                "it out"
            )
        if self.proxy.starts_static:
            raise SearchError(
                f"proxy.init {self.proxy.init}: is of plans; architectures start from scratch"
            )

    def _check_supernets(self) -> None:
        search = self.search
        if self.ratios:
            raise SearchError(
                "micronas.warehouses: is of search.strategy sampler; supernets have plain "
                "convolutions"
            )
        for name, given in (
            ("rungs", bool(search.rungs)),
            ("zero_cost", search.zero_cost is not None),
            ("pruner: median", search.pruner == "median"),
        ):
            if given:
                raise SearchError(
                    f"search.{name}: is of search.strategy sampler; a trial of differentiable has "
                    "two parts, its supernet and what that chose, and finishes: leave it out"
                )

    def _prepare(self) -> None:
        try:
            self.feasible = architectures.feasible_of(self.recipe)
        except CycleError as error:
            raise SearchError(
                f"search.space.limits.lut: {error}; `kwsearch lut needed RECIPE` lists what a "
                "board's table needs, `kwsearch profile RECIPE -o TABLE` measures this machine"
            ) from None
        self.largest, broken = self.feasible.largest
        if broken:
            raise NothingFits(f"search.space.limits: {'; '.join(broken)}")
        if (table := self.feasible.table) is not None:
            for ratio in self.ratios:
                self._check_ratio(ratio, table)
            took = table.latency(operators(self.feasible.space, self.largest))
            if took.fitted:
                part = took.fitted_ms / took.milliseconds
                self._notes.append(
                    f"the latency table has no measured cycles of {len(took.fitted)} operators of "
                    f"the largest architecture: {part:.0%} of its latency is fitted, with a mean "
                    f"error of {table.fit_error:.1%}, by which limits may be missed"
                )

    def _check_ratio(self, ratio: float, table: CycleTable) -> None:
        """Raise SearchError where the table tells no latency of mixed kernels."""
        try:
            architectures.warehoused(self.feasible, self.largest, ratio).latency(table)
        except PlanError:
            pass  # others may have a plan
        except CycleError as error:
            raise SearchError(
                f"micronas.warehouses {ratio:g}: what mixes the kernels has no latency: {error}"
            ) from None

    def _check_memory(self) -> None:
        """Networks for microcontrollers train anywhere."""

    def _check_fit(self, data: LabelledData | SignData) -> None:
        from kwsearch.labelled_data import LabelledData

        assert isinstance(data, LabelledData)
        space, windows = self.feasible.space, data.train
        architectures.check_fit(space, windows)
        if windows.num_classes < space.classes:
            self._notes.append(
                f"{windows.name} has {windows.num_classes} classes, the model {space.classes}: all "
                f"are counted; model.num_classes={windows.num_classes} counts those that there are"
            )

    def _proposer(self) -> Callable[[optuna.Study], FrozenTrial]:
        return ArchitectureProposer(self.search, self.feasible, self.ratios)

    def _cycles(self) -> dict[str, Any] | None:
        table = self.feasible.table if self.search.strategy == "differentiable" else None
        return None if table is None else table.to_dict()

    def _job(self, trial: FrozenTrial, rung: int, attempt: int, splits: int) -> Job:
        """A supernet may choose what another one did: that is trained by another seed."""
        facts = trial.user_attrs
        if rung and SUPERNET in facts and AGAIN not in facts:
            others = [
                other
                for other in self.study.get_trials(deepcopy=False)
                if other.number != trial.number
                and ARCHITECTURE in other.user_attrs
                and other.user_attrs[FINGERPRINT] == facts[FINGERPRINT]
            ]
            storage = self.study._storage
            storage.set_trial_user_attr(trial._trial_id, AGAIN, len(others))
            trial = storage.get_trial(trial._trial_id)
        return super()._job(trial, rung, attempt, splits)

    def _slot_bytes(self) -> int:
        said = self.largest.to_dict()
        network = train_bytes(self.recipe, None, self.proxy, architecture=said)
        if self.search.strategy != "differentiable":
            return network
        from kwsearch import proxy, supernet_search

        device = proxy.device_of(self.proxy).type
        return max(network, supernet_search.step_bytes(self.feasible, self.search.supernet, device))

    def _calibration(self) -> int:
        # Supernets have been trained when their trials come to the first rung.
        several = self.search.strategy == "differentiable"
        return self.search.trials if several else super()._calibration()

    def _write(self, path: Path, found: Found) -> Path | None:
        if found.best is None:
            return None
        recipe = with_architecture(self.recipe, found.best)
        return write_found(path, recipe, found, self._provenance, LARGEST)

    def forecast(self) -> ArchitectureForecast:
        """What the search would be, without starting it and without data."""
        self._prepare()
        costs = architectures.facts(self.feasible, self.largest)
        return dry_run.forecast_architectures(
            self.recipe, self.feasible, costs, self.rungs, self._slot_bytes()
        )
