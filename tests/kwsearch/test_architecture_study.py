"""The search for an architecture: within its limits, resumed after a kill, by both strategies."""

from __future__ import annotations

import csv
import itertools
import json
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from click.testing import CliRunner
from optuna.trial import FrozenTrial, TrialState

from kwlayers import convert_
from kwlayers.plan import PlanError
from kwsearch import (
    architectures,
    checkpoint,
    deploy,
    jobs,
    labelled_data,
    snapshot,
    supernet_search,
)
from kwsearch.architecture_proposals import ArchitectureProposer, nearest
from kwsearch.architecture_study import ArchitectureStudy
from kwsearch.cli import cli
from kwsearch.cli import run as run_cli
from kwsearch.driver import SpaceExhausted
from kwsearch.executors import Event, Finished, Job, Reported
from kwsearch.latency import operators as latency
from kwsearch.micronas.cycles import CycleTable
from kwsearch.micronas.differentiable import Search, Settings
from kwsearch.micronas.expected import needed
from kwsearch.micronas.feasible import Feasible, Limits
from kwsearch.micronas.peak_memory import peak_bytes
from kwsearch.micronas.space import Space, operators
from kwsearch.micronas.supernet import Supernet, extract
from kwsearch.recipe import Recipe, RecipeError, load_recipe, parse_recipe
from kwsearch.results import Result, result_from
from kwsearch.run_directory import SearchError
from kwsearch.worker import FUNCTIONS, decode, encode
from tests.kwsearch.micronas.spaces import some_cycles

TEXT = """
format: 1
model: {{name: micronas, num_classes: 3}}
input: [1, 20, 4]
micronas: {{time_channels: [2, 4], fusion_channels: [4, 8, 12], plain_cells: 1}}
search:
  trials: 6
  startup: 3
  pruner: none
  finalists: 0
  supernet: {{epochs: 3, batch_size: 8}}
  space: {{limits: {{peak_memory: 400, flash: 900}}}}
proxy: {{data: {data}, epochs: 2, batch_size: 8, optimizer: adamw, lr: 0.01, threads: 1}}
"""
DIFFERENTIABLE = "search.strategy=differentiable"


class Quiet:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self, trial: FrozenTrial, attempt: int, until: int) -> None: ...

    def epoch(self, number: int, step: int, accuracy: float) -> None: ...

    def pause(self, number: int, step: int, accuracy: float) -> None: ...

    def done(self, trial: FrozenTrial) -> None: ...

    def known(self, trials: Any) -> None: ...

    def final(self, number: int, seed: int, result: Any) -> None: ...

    def say(self, message: str) -> None:
        self.said.append(message)


class Inline:
    """Does jobs here, one after the other. most: reports after which it is interrupted."""

    capacity = 1

    def __init__(self, most: int | None = None) -> None:
        self.most, self.reports, self._jobs = most, 0, list[Job]()

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def cancel(self, trial: int) -> None: ...

    def close(self) -> None: ...

    def finish(self) -> None: ...

    def wait(self, timeout: float) -> list[Event]:
        from importlib import import_module

        events: list[Event] = []
        for job in self._jobs:
            module, _, name = job.function.partition(":")

            def report(step: int, value: float, job: Job = job) -> None:
                events.append(Reported(job.trial, job.attempt, step, value))
                self.reports += 1
                if self.reports == self.most:
                    raise KeyboardInterrupt

            answer = getattr(import_module(module), name)(report, **job.arguments)
            events.append(Finished(job.trial, job.attempt, answer))
        self._jobs = []
        return events


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three waves of different lengths over four sensors, with noise."""
    rng = np.random.default_rng(0)
    y = np.arange(72) % 3
    t = np.arange(20)[None, :, None]
    waves = np.sin(2 * np.pi * t / (4 + 5 * y[:, None, None]) + rng.uniform(0, 6, (72, 1, 4)))
    x = (waves + 0.3 * rng.normal(size=waves.shape)).astype(np.float32)
    path = tmp_path_factory.mktemp("data") / "waves.npz"
    np.savez(path, series_train=x[:54], y_train=y[:54], series_test=x[54:], y_test=y[54:])
    return path


def recipe_of(windows: Path, *overrides: str) -> Recipe:
    return parse_recipe(TEXT.format(data=windows), overrides=overrides)


def study(
    windows: Path, directory: Path, *overrides: str, resume: bool = False
) -> tuple[ArchitectureStudy, Quiet]:
    watcher = Quiet()
    recipe = recipe_of(windows, *overrides)
    return ArchitectureStudy(recipe, directory, resume=resume, watcher=watcher), watcher


def run(windows: Path, directory: Path, *overrides: str, most: int | None = None) -> Result:
    begun = (directory / "study.journal").exists()
    return study(windows, directory, *overrides, resume=begun)[0].run(Inline(most))


def essence(result: Result) -> list[Any]:
    """What must not depend on interruptions: an epoch that nobody was told of is not told again."""
    facts = ("architecture", "params", "macs", "peak_bytes", "flash_bytes", "fingerprint")
    return [(t.values, t.params, *(t.user_attrs.get(f) for f in facts)) for t in result.trials]


@pytest.mark.parametrize(
    "overrides",
    [(), ("search.sampler=random",), (DIFFERENTIABLE, "search.trials=3"), ("search.sampler=gp",)],
    ids=["tpe", "random", "differentiable", "gp"],
)
def test_every_trial_keeps_the_limits_and_says_what_it_costs(
    windows: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    result = run(windows, tmp_path, *overrides)
    space = architectures.space_of(result.recipe)
    assert all(trial.state == TrialState.COMPLETE for trial in result.trials)
    assert [t.user_attrs.get("kind") for t in result.trials][:2] == ["largest", None]
    for trial in result.trials:
        attrs = trial.user_attrs
        one = architectures.network(result.recipe, attrs["architecture"])
        convs = [m for m in one.modules() if isinstance(m, torch.nn.Conv2d)]
        weights = sum(conv.weight.numel() for conv in convs)
        biases = sum(conv.out_channels for conv in convs)
        assert attrs["params"] == weights + biases
        assert attrs["flash_bytes"] == weights + 4 * biases <= 900
        assert attrs["peak_bytes"] == peak_bytes(one.operators) <= 400
    with (tmp_path / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for trial, row in zip(result.trials, rows, strict=True):
        for fact in ("params", "peak_bytes", "flash_bytes"):
            assert row[fact] == str(trial.user_attrs[fact])
    sampled = [t for t in result.trials if "supernet" not in t.user_attrs]
    for trial in sampled:
        chosen = space.architecture(trial.params)
        assert chosen.to_dict() == trial.user_attrs["architecture"]
    prints = [t.user_attrs["fingerprint"] for t in sampled]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize("overrides", [(), (DIFFERENTIABLE, "search.trials=3")])
def test_an_interrupted_study_ends_as_one_that_was_not(
    windows: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    whole = run(windows, tmp_path / "whole", *overrides)
    # In the first training, in a later one or in a supernet, and between.
    for most in (1, 4, 3):
        with pytest.raises(KeyboardInterrupt):
            run(windows, tmp_path / "cut", *overrides, most=most)
    cut = run(windows, tmp_path / "cut", *overrides)
    assert essence(cut) == essence(whole)


def test_warehouses_are_tried_where_they_keep_the_limits(windows: Path, tmp_path: Path) -> None:
    roomy = ("search.space.limits={peak_memory: 4kB, flash: 40kB}", "micronas.warehouses=[0.5, 1]")
    result = run(windows, tmp_path / "roomy", *roomy, "search.trials=12", "search.startup=8")
    assert all(trial.state == TrialState.COMPLETE for trial in result.trials)
    found = {trial.params["warehouse"] for trial in result.trials}
    assert len(found) > 1
    recipe = result.recipe
    for trial in result.trials:
        attrs = trial.user_attrs
        assert attrs["peak_bytes"] <= 4000
        assert attrs["flash_bytes"] <= 40_000
        ratio = attrs.get("warehouse")
        assert trial.params["warehouse"] == ("none" if ratio is None else f"{ratio:g}")
        model = architectures.network(recipe, attrs["architecture"])
        if ratio is not None:
            convert_(model, architectures.plan_of(recipe, attrs["architecture"], ratio))
        assert attrs["params"] == sum(p.numel() for p in model.parameters())
    mixed = next(t for t in result.trials if "warehouse" in t.user_attrs)
    path = tmp_path / "mixed.yaml"
    shown = CliRunner().invoke(
        cli, ["show", str(tmp_path / "roomy"), str(mixed.number), "-o", str(path)]
    )
    assert shown.exit_code == 0
    counted = json.loads(CliRunner().invoke(cli, ["budget", str(path), "--json"]).output)
    for name in ("params", "macs", "peak_bytes", "flash_bytes", "warehouse"):
        assert counted[name] == mixed.user_attrs[name]
    for name in ("params", "macs"):
        assert sum(row[name] for row in counted["operators"]) == counted[name]
    # Where there is hardly room for an architecture there is none for its kernels.
    tight = run(windows, tmp_path / "tight", "micronas.warehouses=[1]", "search.trials=5")
    assert {t.params["warehouse"] for t in tight.trials} == {"none"}


def test_a_supernet_of_a_study_is_the_differentiable_search(windows: Path, tmp_path: Path) -> None:
    result = run(windows, tmp_path, DIFFERENTIABLE, "search.trials=2")
    trial = result.trials[1]
    assert result.recipe.proxy is not None
    data = labelled_data.load(result.recipe.proxy, (1, 20, 4))
    mean = data.train.x.mean((0, 1, 2), keepdim=True)
    deviation = data.train.x.std((0, 1, 2), keepdim=True)
    train, valid = (((p.x - mean) / deviation, p.y) for p in (data.train, data.valid))
    from kwsearch.proposals import seed_of

    search = Search(
        Space(20, 4, 3, (2, 4), (4, 8, 12), plain_cells=1),
        train,
        valid,
        limits=Limits(bytes=400, flash=900),
        settings=Settings(epochs=3, batch_size=8, seed=seed_of(0, "supernet 0")),
    )
    found = search.run()
    assert found.architecture.to_dict() == trial.user_attrs["architecture"]
    # The accuracies of three epochs of the supernet, then of two of the network.
    assert sorted(trial.intermediate_values) == [1, 2, 3, 4, 5]
    assert trial.values == [trial.intermediate_values[5]]
    assert result.rungs[0].step == 3


def test_best_yaml_says_the_architecture_and_is_counted_alike(
    windows: Path, tmp_path: Path
) -> None:
    result = run(windows, tmp_path, "search.finalists=1", "search.seeds=2")
    best = result.budgets[0].best
    assert best is not None
    recipe = load_recipe(tmp_path / "best.yaml")
    assert recipe.of_architectures
    said = architectures.architecture_of(recipe)
    assert said is not None
    assert said.to_dict() == best.user_attrs["architecture"]
    assert recipe.provenance["peak_bytes"] == best.user_attrs["peak_bytes"]
    assert recipe.provenance["largest_score"] == result.trials[0].values[0]
    shown = CliRunner().invoke(cli, ["budget", str(tmp_path / "best.yaml"), "--json"])
    counted = json.loads(shown.output)
    assert counted["params"] == sum(one["params"] for one in counted["operators"])
    assert counted["macs"] == sum(one["macs"] for one in counted["operators"])
    assert counted["peak_bytes"] == max(one["live_bytes"] for one in counted["operators"])
    assert {k: counted[k] for k in ("params", "macs", "flash_bytes")} == {
        k: best.user_attrs[k] for k in ("params", "macs", "flash_bytes")
    }
    assert counted["broken"] == []


@pytest.mark.parametrize("overrides", [(), (DIFFERENTIABLE, "search.trials=3")])
def test_a_study_is_reported_as_any_other(
    windows: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    run(windows, tmp_path, "search.finalists=1", "search.seeds=1", *overrides)
    shown = CliRunner().invoke(cli, ["report", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert "limits: 400 bytes of memory, 900 bytes of flash" in shown.output
    assert "largest architecture" in shown.output
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "memory (bytes)" in page
    assert "limit 400 bytes" in page
    assert "search of an architecture" in page
    assert "best architecture" in shown.output
    numbers = json.loads(CliRunner().invoke(cli, ["report", str(tmp_path), "--json"]).output)
    assert numbers["budget"] is None
    result = result_from(snapshot.take(tmp_path))
    assert numbers["best"] == result.budgets[0].best.number  # type: ignore[union-attr]
    shown = CliRunner().invoke(
        cli, ["show", str(tmp_path), "1", "-o", str(tmp_path.parent / f"{tmp_path.name}.yaml")]
    )
    assert "bytes of memory" in shown.output
    again = load_recipe(tmp_path.parent / f"{tmp_path.name}.yaml")
    found = architectures.architecture_of(again)
    assert found is not None
    assert found.to_dict() == result.trials[1].user_attrs["architecture"]


def test_the_nearest_within_limits_is_the_nearest_of_all() -> None:
    space = Space(6, 3, 2, (2, 4), (4, 6, 8), plain_cells=0)
    everything = []
    names = [one.name for one in space.decisions]
    for options in itertools.product(*(one.options for one in space.decisions)):
        chosen = dict(zip(names, options, strict=True))
        if any(chosen[f"fusion1.{p}"] for p in ("branch3", "branch5", "branch7", "residual")):
            one = space.architecture(chosen)
            everything.append((peak_bytes(operators(space, one)), chosen))
    places = {one.name: one.options for one in space.decisions}

    def steps(a: dict[str, int], b: dict[str, int]) -> int:
        return sum(abs(p.index(a[n]) - p.index(b[n])) for n, p in places.items())

    rng = Random(0)
    for limit in sorted({held for held, _ in everything})[::3]:
        feasible = Feasible(space, Limits(bytes=limit))
        for _ in range(5):
            wanted = {one.name: rng.choice(one.options) for one in space.decisions}
            least = min(steps(wanted, one) for held, one in everything if held <= limit)
            found = space.options(nearest(feasible, wanted))
            assert peak_bytes(operators(space, space.architecture(found))) <= limit
            assert steps(wanted, found) == least


REFUSED = [
    (
        ("search.space.limits.flash=30",),
        SearchError,
        r"flash limit 30 bytes: below \d+ bytes, the le",
    ),
    (("search.space.limits.peak_memory=9",), SearchError, r"memory limit 9 bytes: below \d+ bytes"),
    (
        ("search.space.limits.macs=1M",),
        SearchError,
        "limits.macs: is of plans; architectures .* have",
    ),
    (("search.space.split=3",), SearchError, "search.space.split: is of plans; .* have limits"),
    (("search.budgets=[1, 2]",), SearchError, "search.budgets: architectures have limits, not"),
    ((DIFFERENTIABLE, "micronas.warehouses=[1]"), SearchError, "warehouses: is of search.strategy"),
    (
        (DIFFERENTIABLE, "search.pruner=median"),
        SearchError,
        "search.pruner: median: is of search.strategy sampler",
    ),
    (
        (DIFFERENTIABLE, "search.rungs=[{epochs: 1}, {epochs: 2}]"),
        SearchError,
        "search.rungs: is of search.strategy sampler",
    ),
    (("method={reduction: 0.25}",), SearchError, "method: is of plans"),
    (("proxy.init=static",), SearchError, "proxy.init static: is of plans"),
    (("input=3x20x4",), PlanError, "input 3x20x4: micronas takes windows"),
    (("input=1x20x5",), ValueError, "do not fit 20x5"),
    (("model.num_classes=2",), PlanError, "has 3 classes, the model 2: set model.num_classes=3"),
]


@pytest.mark.parametrize(("overrides", "error", "message"), REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_written(
    windows: Path,
    tmp_path: Path,
    overrides: tuple[str, ...],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        run(windows, tmp_path / "run", *overrides)
    assert not (tmp_path / "run" / "study.journal").exists()


def test_classes_that_there_are_not_are_counted_and_told(windows: Path, tmp_path: Path) -> None:
    search, watcher = study(windows, tmp_path, "model.num_classes=4", "search.trials=1")
    search.run(Inline())
    (told,) = (text for text in watcher.said if "classes" in text)
    assert told.endswith("has 3 classes, the model 4: all are counted; model.num_classes=3 counts "
                         "those that there are")  # fmt: skip


@pytest.mark.parametrize(
    ("missing", "overrides", "message"),
    [
        (
            "gap2d",
            [],
            r"limits\.lut: gap2d 10x2x3 to 3: not in .* `kwsearch lut needed RECIPE` lists",
        ),
        ("", ["micronas.warehouses=[1]"], "warehouses 1: what mixes the kernels has no latency: "),
    ],
)
def test_what_the_table_does_not_know_is_said(
    windows: Path, tmp_path: Path, missing: str, overrides: list[str], message: str
) -> None:
    space = Space(20, 4, 3, (2, 4), (4, 8, 12), plain_cells=1)
    path = tmp_path / "board.lut.yaml"
    known = {key: n for key, n in some_cycles(needed(space)).items() if key.kind != missing}
    latency.table_of(CycleTable("a board", 1.0, known)).save(path)
    limits = f"search.space.limits={{latency_ms: 1000, lut: {path}}}"
    with pytest.raises(SearchError, match=message):
        run(windows, tmp_path / "run", *overrides, limits)


def test_limits_that_are_not_kept_are_an_exit_code(
    windows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(TEXT.format(data=windows).replace("flash: 900", "flash: 30"))
    assert run_cli(["budget", str(path), "--json"]) == 3
    told = capsys.readouterr()
    assert "no architecture keeps the limits: flash limit 30 bytes" in told.err
    assert "largest_within_limits" not in json.loads(told.out)
    assert run_cli(["optimize", str(path), "--run-dir", str(tmp_path / "none")]) == 3
    assert "search.space.limits: flash limit 30 bytes: below" in capsys.readouterr().err
    assert not (tmp_path / "none" / "study.journal").exists()
    path.write_text(TEXT.format(data=windows))
    run(windows, tmp_path / "run", "search.trials=1")
    best = load_recipe(tmp_path / "run" / "best.yaml")
    tight = best.model_dump(mode="json", exclude_none=True)
    tight["search"]["space"]["limits"]["flash"] = 30
    path.write_text(json.dumps(tight))
    assert run_cli(["budget", str(path)]) == 3
    assert "not within the limits: flash " in capsys.readouterr().err


def test_a_dry_run_says_what_is_searched(windows: Path, tmp_path: Path) -> None:
    search, _ = study(windows, tmp_path, DIFFERENTIABLE)
    forecast = search.forecast()
    assert forecast.architectures == search.feasible.space.architectures
    assert forecast.rungs == (3, 5)
    assert forecast.largest["flash_bytes"] <= 900
    assert forecast.supernet_s is not None
    assert forecast.most_seconds is not None
    text = "\n".join(forecast.lines())
    assert "a step of the supernet" in text
    assert "the largest within the limits" in text
    sampled = study(windows, tmp_path)[0].forecast()
    assert sampled.supernet_s is None
    # Supernets have more weights than any network of theirs, and the optimizer's two copies.
    weights = sum(one.numel() for one in Supernet(search.feasible.space).parameters())
    assert forecast.checkpoint_bytes == 4 * weights * 3 > sampled.checkpoint_bytes
    # Weights, gradients and copies at least, beside what is kept for backward, which a network's
    # step has less of.
    assert forecast.train_bytes > 4 * weights * 4
    assert forecast.train_bytes > sampled.train_bytes


def test_a_supernet_goes_on_from_its_checkpoint(windows: Path, tmp_path: Path) -> None:
    recipe = recipe_of(windows, DIFFERENTIABLE)
    assert recipe.proxy is not None
    data = labelled_data.load(recipe.proxy, (1, 20, 4))
    path, seen = tmp_path / "one.pt", []

    def stops(step: int, value: float) -> None:
        seen.append(step)
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        supernet_search.run(recipe, data, recipe.proxy, 7, stops, path)
    after = []
    found = supernet_search.run(
        recipe, data, recipe.proxy, 7, lambda step, value: after.append(step), path
    )
    assert (seen, after) == ([1, 2], [])  # the last is told by the result
    whole = supernet_search.run(
        recipe, data, recipe.proxy, 7, lambda step, value: None, tmp_path / "two.pt"
    )
    assert found == whole
    # However the study is run, the checkpoint is of the same supernet; of another one it is not.
    how = ("search.trials=50", "search.workers=4", "search.finalists=2", "search.timeout=9")
    other = recipe_of(windows, DIFFERENTIABLE, *how)
    again = supernet_search.run(other, data, recipe.proxy, 7, pytest.fail, path)  # type: ignore[arg-type]
    assert again == whole
    longer = recipe_of(windows, DIFFERENTIABLE, "search.supernet={epochs: 4, batch_size: 8}")
    with pytest.raises(checkpoint.CheckpointError):
        supernet_search.run(longer, data, recipe.proxy, 7, pytest.fail, path)  # type: ignore[arg-type]


def test_a_supernet_begins_anew_in_half_batches(windows: Path, tmp_path: Path) -> None:
    """As a driver asks for that ran out of memory after an epoch."""
    recipe = recipe_of(windows, DIFFERENTIABLE)
    assert recipe.proxy is not None
    data = labelled_data.load(recipe.proxy, (1, 20, 4))
    path, seen = tmp_path / "one.pt", []

    def stops(step: int, value: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        supernet_search.run(recipe, data, recipe.proxy, 7, stops, path)
    found = supernet_search.run(
        recipe, data, recipe.proxy, 7, lambda step, value: seen.append(step), path, splits=2
    )
    assert seen == [1, 2]
    again = supernet_search.run(
        recipe,
        data,
        recipe.proxy,
        7,
        pytest.fail,
        path,
        splits=2,  # type: ignore[arg-type]
    )
    assert again == found


def test_few_architectures_within_the_limits_are_found_soon(
    windows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(windows, "search.sampler=random")
    space = architectures.space_of(recipe)
    free = Feasible(space, Limits())
    least = free.flash(Feasible(space, Limits(flash=1)).largest.architecture)
    tight = Feasible(space, Limits(flash=least + 4))
    assert recipe.search is not None
    proposer = ArchitectureProposer(recipe.search, tight)
    drawn: list[int] = []
    random_ = space.random
    monkeypatch.setattr(Space, "random", lambda own, rng: drawn.append(1) or random_(rng))
    study, count = optuna.create_study(), 0
    with suppress(SpaceExhausted):
        for _ in range(1000):
            study.add_trial(proposer._made(study.trials))
            count += 1
    assert 0 < count < 1000
    # Not 1,000 draws for each of 1,000 tries of the last one.
    assert len(drawn) < 20_000
    # One that is resumed before every trial tries the same.
    other = optuna.create_study()
    for _ in range(min(count, 6)):
        resumed = ArchitectureProposer(recipe.search, tight)
        other.add_trial(resumed._made(other.trials))
    prints = [[t.user_attrs["fingerprint"] for t in one.trials] for one in (study, other)]
    assert prints[0][: len(prints[1])] == prints[1]


def test_supernets_that_choose_the_same_train_it_by_other_seeds(
    windows: Path, tmp_path: Path
) -> None:
    space = architectures.space_of(recipe_of(windows))
    lightest = Feasible(space, Limits(flash=1)).largest.architecture
    least = Feasible(space, Limits()).flash(lightest)
    limits = f"search.space.limits={{flash: {least}}}"
    result = run(windows, tmp_path, DIFFERENTIABLE, "search.trials=3", limits)
    prints = [trial.user_attrs["fingerprint"] for trial in result.trials]
    assert len(set(prints)) == 1  # there is one that is so small
    assert [trial.user_attrs.get("again") for trial in result.trials] == [None, 1, 2]


def test_networks_that_are_equal_are_one_architecture(windows: Path) -> None:
    recipe = recipe_of(windows)
    feasible = architectures.feasible_of(recipe)
    space, options = feasible.space, feasible.space.options(feasible.space.maximum())
    (keep,) = (name for name in options if name.endswith(".keep"))
    cell = keep.removesuffix(".keep")
    left_out = space.architecture({**options, keep: 0})
    other = space.architecture({**options, keep: 0, f"{cell}.branch3": 0})
    kept = space.architecture({**options, f"{cell}.branch3": 0})
    marks = [
        architectures.facts(feasible, one)["fingerprint"]
        for one in (left_out, other, kept, space.maximum())
    ]
    assert left_out != other
    assert operators(space, left_out) == operators(space, other)
    assert marks[0] == marks[1]
    assert len(set(marks)) == 3


def test_a_table_goes_to_workers_as_plain_data() -> None:
    space = Space(20, 4, 3, (2, 4), (4, 8, 12), plain_cells=1)
    table = CycleTable("a board", 64.0, some_cycles(needed(space)))
    sent = json.loads(json.dumps(encode({"cycles": table.to_dict(), "seed": 1})))
    found = CycleTable.from_dict(decode(sent, trust=False)["cycles"])
    assert found == table


def test_workers_of_a_queue_run_all_that_a_study_asks_for() -> None:
    asked = {value for name, value in vars(jobs).items() if name.isupper() and ":" in str(value)}
    assert asked == FUNCTIONS


def test_a_supernet_needs_no_table_where_it_is_trained(windows: Path, tmp_path: Path) -> None:
    space = Space(20, 4, 3, (2, 4), (4, 8, 12), plain_cells=1)
    path = tmp_path / "board.lut.yaml"
    latency.table_of(CycleTable("a board", 1.0, some_cycles(needed(space)))).save(path)
    limits = f"search.space.limits={{latency_ms: 25, lut: {path}}}"
    study_, _ = study(windows, tmp_path / "run", DIFFERENTIABLE, "search.trials=2", limits)

    class Elsewhere(Inline):
        def submit(self, job: Job) -> None:
            path.unlink(missing_ok=True)
            super().submit(job)

    result = study_.run(Elsewhere())
    assert [trial.state for trial in result.trials] == [TrialState.COMPLETE] * 2
    assert all(trial.user_attrs["latency_ms"] <= 25 for trial in result.trials)


# Recipes ------------------------------------------------------------------------------------------


WRONG = [
    ("model: resnet20\nbudget: {ratio: 1}\nmicronas: {plain_cells: 1}", "is of the model micronas"),
    ("model: micronas\nbudget: {ratio: 1}\nmicronas: {}", "micronas and budget"),
    ("model: micronas\nmicronas: {time_channels: [8, 4]}", r"not ascending \(got \[8, 4\]"),
    ("model: micronas\nmicronas: {time_channels: []}", "too few values"),
    ("model: micronas\nsearch: {strategy: gradient}", "unknown value .*differentiable"),
    ("model: micronas\nsearch: {supernet: {decay: 2}}", "search.supernet.decay: too large"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_recipe_that_cannot_be_says_why(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(f"format: 1\n{text}\n")


def test_an_architecture_that_is_none_of_its_space_is_refused(windows: Path) -> None:
    recipe = recipe_of(
        windows,
        "micronas.architecture={time: [{kernel: 3, channels: 6}], fusion: []}",
    )
    with pytest.raises(PlanError, match=r"micronas\.architecture: "):
        architectures.architecture_of(recipe)


def test_validate_knows_recipes_of_architectures(
    windows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(TEXT.format(data=windows))
    assert run_cli(["validate", str(path)]) == 0
    assert f"{path}: ok (micronas)" in capsys.readouterr().out
    none = "micronas.architecture={time: [{kernel: 3, channels: 6}], fusion: []}"
    assert run_cli(["validate", str(path), none]) == 2
    assert "micronas.architecture: " in capsys.readouterr().err


def test_a_plan_study_has_no_supernet_and_no_flash(tmp_path: Path) -> None:
    from kwsearch.optimize import PlanStudy

    base = "format: 1\nmodel: resnet20\nbudget: {ratio: 1}\n"
    for override, message in (
        (DIFFERENTIABLE, "trains a supernet, which micronas has"),
        ("search.space.limits.flash=1MB", "limits.flash: of the architectures of micronas"),
    ):
        recipe = parse_recipe(base, overrides=[override])
        with pytest.raises(SearchError, match=message):
            PlanStudy(recipe, tmp_path, resume=False, watcher=Quiet())


def test_the_largest_network_is_in_the_zoo_and_can_be_planned() -> None:
    # The row "max" of the specification.
    shown = CliRunner().invoke(cli, ["budget", "micronas", "--ratio", "1", "--json"])
    found = json.loads(shown.output)
    assert (found["static"]["params"], found["static"]["macs"]) == (249_830, 20_448_256)
    space = Space(128, 9, 6)
    assert sum(p.numel() for p in extract(space, space.maximum()).parameters()) == 249_830


# An int8 file -------------------------------------------------------------------------------------


def test_an_export_that_cannot_be_says_why(
    windows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    plain, plan = tmp_path / "plain.yaml", tmp_path / "plan.yaml"
    plain.write_text(TEXT.format(data=windows))
    plan.write_text("format: 1\nmodel: resnet20\nbudget: {ratio: 1}\n")
    for arguments, message in (
        ([str(plan)], "is of micronas' architectures; of plans there are onnx and program"),
        ([str(plain)], "no architecture: `kwsearch optimize` writes one"),
        ([str(plain), "-o", "model.bin"], "must end in .tflite"),
    ):
        assert run_cli(["export", *arguments, "--to", "tflite"]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "model.h").touch()
    assert run_cli(["export", str(plain), "--to", "tflite"]) == 2
    assert "model.h exists: --force" in capsys.readouterr().err
    (tmp_path / "model.h").rename(tmp_path / "model.pt")
    assert run_cli(["export", str(plain), "--to", "tflite"]) == 2
    assert "model.pt exists: --force" in capsys.readouterr().err
    (tmp_path / "model.pt").unlink()
    assert run_cli(["export", str(plain), "--to", "train.py"]) == 2
    assert "about architectures of micronas and has no plan" in capsys.readouterr().err


def test_an_export_without_its_latency_table_says_so(windows: Path, tmp_path: Path) -> None:
    limits = f"search.space.limits={{latency_ms: 9, lut: {tmp_path / 'gone.lut.yaml'}}}"
    recipe = recipe_of(windows, limits)
    network = operators(space := architectures.space_of(recipe), space.minimum())
    took, untold = deploy._latency(recipe, network)
    assert took is None
    assert "gone.lut.yaml" in untold
    known = some_cycles(needed(space))
    latency.table_of(CycleTable("a board", 1.0, known)).save(tmp_path / "gone.lut.yaml")
    took, untold = deploy._latency(recipe, network)
    assert took == pytest.approx(sum(known[one.key] for one in network) / 1000)
    assert untold == ""


@pytest.mark.usefixtures("one_thread")
def test_an_export_trains_the_same_network_by_the_same_seed(windows: Path) -> None:
    recipe = recipe_of(windows)
    assert recipe.proxy is not None
    data = labelled_data.load(recipe.proxy, (1, 20, 4))
    space = architectures.space_of(recipe)
    one, two, other = (
        deploy._trained(
            lambda: extract(space, space.minimum()), recipe.proxy, data, seed, lambda *_: None
        ).state_dict()
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.slow  # the converter takes some ten seconds
def test_a_trained_architecture_is_written_and_run_in_int8(
    windows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kwsearch.micronas import tflite

    for package in tflite.PACKAGES:
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    run(windows, tmp_path / "run", "search.trials=1", "proxy.epochs=30")
    recipe = load_recipe(tmp_path / "run" / "best.yaml")
    kept = tmp_path / "net.pt"
    found = deploy.deploy(recipe, tmp_path / "net.tflite", None, kept, lambda *_: None)
    # By the weights that it has kept it is the same file.
    deploy.deploy(recipe, tmp_path / "same.tflite", kept, tmp_path / "none.pt", pytest.fail)  # type: ignore[arg-type]
    assert (tmp_path / "same.tflite").read_bytes() == (tmp_path / "net.tflite").read_bytes()
    assert not (tmp_path / "none.pt").exists()
    assert (found.split, found.windows) == ("test", 18)
    # The training is the trial's, but for the seed; waves of three lengths are easily told apart.
    assert found.floating > 0.6
    assert abs(found.check.accuracy - found.floating) <= 3 / 18
    feasible = architectures.feasible_of(recipe)
    said = architectures.architecture_of(recipe)
    assert said is not None
    assert found.check.predicted_bytes == feasible.bytes(said)
    assert found.check.live_bytes == found.check.predicted_bytes
    assert found.check.file_bytes > feasible.flash(said)
    shown = CliRunner().invoke(
        cli, ["export", str(tmp_path / "run" / "best.yaml"), "--to", "tflite", "-o", "a-net.tflite"]
    )
    assert shown.exit_code == 0, shown.output
    assert "test windows (18): " in shown.output
    assert "wrote a-net.pt, the trained weights, for --weights" in shown.output
    text = (tmp_path / "a-net.h").read_text()
    assert "a_net[]" in text
    assert "// mean " in text
