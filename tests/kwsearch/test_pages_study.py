"""The page of a study: its numbers add up and are those of others, in every state of a study."""

from __future__ import annotations

import base64
import copy
import itertools
import json
import random
import re
import zlib
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import optuna
import pytest
import scipy.stats
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from kwlayers.methods import find
from kwlayers.plan import Network, Plan
from kwlayers.planner import lay_out
from kwsearch import cli, optimize, snapshot, trials
from kwsearch.executors import Failed, Finished, Job, Reported
from kwsearch.pages import figure, study_choices, study_plots, study_spending, study_table
from kwsearch.pages.study import MOST_BYTES, page
from kwsearch.recipe import load_recipe, parse_recipe
from kwsearch.resolve import network_of
from kwsearch.results import Found, result_from
from kwsearch.run_directory import RECIPE, write_down
from kwsearch.snapshot import Snapshot
from kwsearch.space import fingerprint
from kwsearch.trials import front
from tests.kwsearch.test_optimize import Inline, Quiet, network

TEXT = """
format: 1
model: resnet20
budget: {total_ratio: 0.5}
search:
  {trials: 24, calibration: 14, sampler: random, finalists: 1, seeds: 2, zero_cost: grad_norm,
   space: {split: 2, sharing: [stage, layer], basis_ratio: [1, 0.5]}}
proxy: {epochs: 9}
"""
# Half of the 272,474 parameters of the static network.
ALLOWED = 136_237
BEGIN = datetime(2026, 11, 22, 10, tzinfo=timezone.utc)
EVIL = "<script>alert(1)</script>"


# Studies ----------------------------------------------------------------------------------------


class Trainer(Inline):
    """In place of training: an accuracy that depends on the plan alone and rises with epochs.

    fails: trials that end with an error.
    """

    def __init__(self, fails: tuple[int, ...] = ()) -> None:
        super().__init__(lambda plan, report: 0.0)
        self.fails = fails

    def run(self, job: Job) -> None:
        key, trained = (job.trial, job.attempt), job.arguments["trained"]
        value = 0.7
        if trained.groups is not None:
            plan = Plan.from_groups(network(trained.recipe), trained.groups)
            value = 0.6 + 0.2 * int(fingerprint(plan), 16) / 2**64
        if "name" in job.arguments:
            score = value * 10
            answer = {"value": score, "scores": {job.arguments["name"]: score}}
            self.events = [Finished(*key, answer)]
        elif "until" not in job.arguments:
            value += 0.01 * trained.seed / 2**64
            self.events = [Finished(*key, {"valid": value, "test": value - 0.02})]
        elif job.trial in self.fails:
            message = f"RuntimeError: out of memory at {job.trial} bytes"
            self.events = [Failed(*key, "error", message, "")]
        else:
            until = job.arguments["until"]
            accuracies = [value * (1 - 0.5 / (epoch + 1)) for epoch in range(1, until + 1)]
            self.events = [
                Reported(*key, epoch, accuracy) for epoch, accuracy in enumerate(accuracies, 1)
            ]
            self.events.append(Finished(*key, accuracies[-1]))


def search(directory: Path, *overrides: str, fails: tuple[int, ...] = ()) -> Snapshot:
    """A study that was searched, without training."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optimize.PlanStudy(
        parse_recipe(TEXT, overrides=overrides),
        directory,
        resume=False,
        watcher=Quiet(),
        command=f"kwsearch optimize 'my recipe.yaml' --run-dir {directory}",
    )
    study.run(Trainer(fails), "nowhere:nothing")
    return snapshot.take(directory)


def made(
    number: int,
    accuracy: float | None = None,
    *,
    state: str = "COMPLETE",
    plan: Plan | None = None,
    steps: dict[int, float] | None = None,
    params: dict[str, Any] | None = None,
    distributions: dict[str, Any] | None = None,
    minutes: float | None = None,
    **attrs: Any,
) -> FrozenTrial:
    """A trial by hand, `minutes` long, that began `number` minutes after the first."""
    facts: dict[str, Any] = {"budget": 0.5, "params": 136_000, "macs": 40_000_000, **attrs}
    if state != "WAITING":
        facts["lease"] = {"attempt": 1}
    if plan is not None:
        cost = plan.cost()
        facts |= {"params": cost.deployed, "macs": cost.macs.total}
        facts["groups"] = plan.groups_to_list()
    known = {} if accuracy is None else {9: accuracy}
    trial = optuna.trial.create_trial(
        state=TrialState[state],
        value=accuracy,
        params=params,
        distributions=distributions,
        user_attrs=facts,
        constraints={"params": float(facts["params"] - ALLOWED)},
        intermediate_values=(steps or {}) | known,
    )
    trial.number = number
    trial.datetime_start = BEGIN + timedelta(minutes=number)
    if trial.state.is_finished():
        trial.datetime_complete = trial.datetime_start + timedelta(minutes=minutes or 1)
    return trial


def study_of(
    directory: Path,
    *found: FrozenTrial,
    overrides: tuple[str, ...] = (),
    attributes: dict[str, Any] | None = None,
    running: bool = False,
    provenance: dict[str, Any] | None = None,
) -> Snapshot:
    """One whose trials were made by hand."""
    directory.mkdir(exist_ok=True)
    write_down(directory, parse_recipe(TEXT, overrides=overrides), provenance or {})
    recipe = load_recipe(directory / RECIPE)
    return Snapshot(directory, recipe, found, attributes or {}, running)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """24 trials: complete, stopped before and during training, two failed; with final trainings."""
    return search(tmp_path_factory.mktemp("runs") / "searched", fails=(4, 9))


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """Two budgets, two methods."""
    return search(
        tmp_path_factory.mktemp("runs") / "swept",
        "search.budgets=[1.5,3]",
        "search.trials=14",
        "search.pruner=none",
        "search.zero_cost=null",
        "search.finalists=0",
        "search.space={split: 1.5, tolerance: 0.05, method: [kernel_warehouse, dyconv, dcd]}",
    )


# Pages ------------------------------------------------------------------------------------------


@dataclass
class Row:
    """Of a table: its attributes, the texts of its cells."""

    attrs: dict[str, str | None]
    cells: list[str] = field(default_factory=list)


@dataclass
class Table:
    attrs: dict[str, str | None]
    rows: list[Row] = field(default_factory=list)

    @property
    def body(self) -> list[Row]:
        return [row for row in self.rows if "id" in row.attrs]

    def column(self, title: str) -> dict[int, str]:
        """Cells under a title of the last line of heads, by the number of the trial."""
        place = self.rows[0].cells.index(title)
        return {int(str(row.attrs["id"])[1:]): row.cells[place] for row in self.body}


class Read(HTMLParser):
    """What a page has: elements, tables, the text of each section, scripts by id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[Table] = []
        self.sections: dict[str, str] = {}
        self.scripts: dict[str | None, str] = {}
        self.title = ""
        self._open: list[str] = []
        self._section = ""
        self._in_cell = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.elements.append((tag, known))
        self._open.append(tag)
        if tag == "section":
            self._section = str(known["id"])
            self.sections[self._section] = ""
        elif tag == "table":
            self.tables.append(Table(known))
        elif tag == "tr":
            self.tables[-1].rows.append(Row(known))
        elif tag in ("td", "th"):
            self.tables[-1].rows[-1].cells.append("")
            self._in_cell = True

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("table", "caption", "td", "th", "tr"):
            self._in_cell = False
        if tag == "section":
            self._section = ""
        if tag == "script":
            self._open.append("")

    def handle_data(self, data: str) -> None:
        tag, attrs = self.elements[-1] if self.elements else ("", {})
        if tag == "script" and self._open[-1] == "script":
            self.scripts[attrs.get("id")] = data
            return
        if tag == "title" and not self.title:
            self.title = data
        if self._section:
            self.sections[self._section] += data
        if self._in_cell:
            self.tables[-1].rows[-1].cells[-1] += data.strip("\n")

    def table(self, name: str) -> Table:
        return next(table for table in self.tables if table.attrs.get("id") == name)

    def svg(self, name: str) -> str:
        """The text of a plot."""
        return re.search(rf"<svg [^>]*id={name} .*?</svg>", self.text, re.S)[0]  # type: ignore[index]

    def recipes(self) -> dict[str, str]:
        packed = base64.b64decode(self.scripts["recipes"])
        found: dict[str, str] = json.loads(zlib.decompress(packed))
        return found


@pytest.fixture(scope="module")
def read(searched: Snapshot) -> Read:
    return Read(page(searched))


def number(text: str) -> int:
    return int(text.replace(",", "").replace("+", ""))


def count(read: Read, tag: str, **attrs: str) -> int:
    return sum(t == tag and attrs.items() <= a.items() for t, a in read.elements)


# Numbers ----------------------------------------------------------------------------------------


def budget_json(recipe: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What `kwsearch budget RECIPE --json` says."""
    path = folder / "trial.yaml"
    path.write_text(recipe)
    assert cli.run(["budget", str(path), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_parts_add_up_to_the_totals_that_the_budget_command_counts(
    read: Read, searched: Snapshot, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spent = [table for table in read.tables if table.attrs.get("class") == "spent"]
    assert [table.attrs["data-unit"] for table in spent] == ["parameters", "MACs"]
    for table, key in zip(spent, ("params", "macs"), strict=True):
        plans = [int(re.search(r"trial (\d+)", cell)[1]) for cell in table.rows[0].cells[1:3]]  # type: ignore[index]
        assert plans == [result_from(searched).budgets[0].best.number, 0]  # type: ignore[union-attr]
        heads, *lines, total = table.rows[1:]
        columns = [i for i, head in enumerate(heads.cells) if head not in ("place", "made of")]
        assert len(lines) == 4  # three stages, and the rest
        for column in columns:
            assert sum(number(line.cells[column]) for line in lines) == number(total.cells[column])
        difference = columns.pop()
        assert len(columns) % 2 == 0
        half = len(columns) // 2
        for own, trial in zip((columns[:half], columns[half:]), plans, strict=True):
            for line in [*lines, total]:
                *parts, whole = (number(line.cells[column]) for column in own)
                assert sum(parts) == whole
            counted = budget_json(read.recipes()[str(trial)], tmp_path, capsys)[key]
            said = {heads.cells[column]: number(total.cells[column]) for column in own}
            assert said.pop("total") == counted["total"]
            known = {name: counted.get(name, counted.get("warehouses")) for name in said}
            assert said == known
        totals = [number(total.cells[column]) for column in (columns[half - 1], columns[-1])]
        assert number(total.cells[difference]) == totals[0] - totals[1]


def test_what_is_only_there_for_training_is_taken_off(tmp_path: Path) -> None:
    net = network_of(parse_recipe("{format: 1, model: resnet20, method: {name: pad_net}}"))
    plan = lay_out(net, find("pad_net").settings()).as_laid_out()
    cost = plan.cost()
    assert cost.deployed < cost.params.total
    trial = made(0, 0.5, plan=plan, kind="uniform")
    found = study_spending.spending(Found(0.5, (trial,)), net)
    assert found is not None
    params = found.parts[0]
    assert params.lines[-2].name == "less what is only there for training"
    assert params.lines[-2].plans[0][-1] == cost.deployed - cost.params.total
    assert params.lines[-1].plans[0][-1] == cost.deployed
    for line in params.lines:
        assert sum(line.plans[0][:-1]) == line.plans[0][-1]


def test_the_summary_is_what_was_worked_out_by_hand(tmp_path: Path, plan: Plan) -> None:
    """Trial 2 less trial 0: 75 - 70 = 5 points, 136,200 - 136,000 = 200. Of the budget:
    136,200 / 136,237 = 99.97 %. Finals: 80 and 82 have mean 81 and standard deviation sqrt(2).
    """
    runs = {2: (0.80, 0.82), 0: (0.78, 0.79), 1: (0.79, 0.80)}
    study = study_of(
        tmp_path,
        made(0, 0.70, kind="uniform", fingerprint="a"),
        made(1, 0.72, kind="static", fingerprint="b", macs=20_000_000),
        replaced(made(2, 0.75, fingerprint="c", macs=42_000_000), params=136_200),
        attributes={
            f"final/{n}/{seed}": {"valid": 0.5, "test": accuracy}
            for n, found in runs.items()
            for seed, accuracy in enumerate(found)
        },
        provenance={"held_out": 1000},
    )
    found = Read(page(study))
    table = found.table("plans")
    heads = "network|trial|held-out accuracy|final accuracy, test examples|parameters|of the budget"
    assert ["|".join(row.cells) for row in table.rows] == [
        f"{heads}|MACs",
        "best plan|2|75.00 %|81.00 ± 1.41 % over 2 seeds|136,200|99.97 %|42,000,000",
        "uniform plan|0|70.00 %|78.50 ± 0.71 % over 2 seeds|136,000|99.83 %|40,000,000",
        "static network|1|72.00 %|79.50 ± 0.71 % over 2 seeds|136,000|99.83 %|20,000,000",
        "best less uniform||+5.00 points|+2.50 points|+200||+2,000,000",
        "best less static||+3.00 points|+1.50 points|+200||+22,000,000",
    ]
    assert "best: trial 2, 75.00% on 1000 held-out examples" in found.sections["s-summary"]
    assert "verdict on test examples: no significant winner" in found.sections["s-summary"]


def replaced(trial: FrozenTrial, **attrs: Any) -> FrozenTrial:
    for key, value in attrs.items():
        trial.set_user_attr(key, value)
    return trial


# Plots ------------------------------------------------------------------------------------------


def marks(svg: str, kind: str) -> dict[int, float]:
    """Where marks of a kind are, from left to right, by trial."""
    found = re.search(rf'<g class="mark {kind}">(.*?)</g>', svg, re.S)
    if found is None:
        return {}
    places = re.findall(r"href=#t(\d+)><(?:circle cx=|use [^>]*x=|path d=\"M)([\d.]+)", found[1])
    shift = 3 if kind == "stopped" else 0
    return {int(trial): float(x) + shift for trial, x in places}


def test_the_budget_is_a_line_where_its_parameters_are(read: Read, searched: Snapshot) -> None:
    svg = read.svg("over-params")
    (rule,) = re.findall(r'class=rule d="M([\d.]+),', svg)
    assert f">budget {ALLOWED:,}</text>" in svg
    places = marks(svg, "trial") | marks(svg, "static") | marks(svg, "uniform")
    params = {t.number: t.user_attrs["params"] for t in searched.trials if t.number in places}
    a, b = min(params, key=params.__getitem__), max(params, key=params.__getitem__)
    assert params[b] - params[a] > 100
    scale = (places[b] - places[a]) / (params[b] - params[a])
    for trial, x in {**places, -1: float(rule)}.items():
        expected = places[a] + scale * (params.get(trial, ALLOWED) - params[a])
        assert x == pytest.approx(expected, abs=2)


def test_the_front_is_the_one_that_optuna_finds(read: Read, searched: Snapshot) -> None:
    study = optuna.create_study(directions=["maximize", "minimize", "minimize"])
    complete = [t for t in searched.trials if t.state == TrialState.COMPLETE]
    for trial in complete:
        values = [trial.values[0], trial.user_attrs["params"], trial.user_attrs["macs"]]
        study.add_trial(optuna.trial.create_trial(values=values))
    expected = {complete[trial.number].number for trial in study.best_trials}
    assert {trial.number for trial in trials.front(searched.trials)} == expected
    baselines = {t.number for t in complete if "kind" in t.user_attrs}
    best = {result_from(searched).budgets[0].best.number}  # type: ignore[union-attr]
    for name in ("over-params", "over-macs"):
        svg = read.svg(name)
        assert set(marks(svg, "best")) == best
        assert set(marks(svg, "front")) == expected - best - baselines
        assert set(marks(svg, "uniform")) | set(marks(svg, "static")) == baselines
        others = {t.number for t in complete} - expected - best - baselines
        assert others
        assert set(marks(svg, "trial")) == others
        # Those that came to a rung after training; others have no accuracy.
        stopped = {t.number for t in searched.trials if t.state.name == "PRUNED" and t.last_step}
        assert stopped
        assert set(marks(svg, "stopped")) == stopped


def test_the_front_compares_what_both_trials_say() -> None:
    """The first is worse in all but memory, the third in all; the last ones' latency is unknown."""
    memories = [
        replaced(made(0, 0.80, peak_bytes=2_000), params=12_000, macs=2_000),
        replaced(made(1, 0.81, peak_bytes=8_000), params=10_000, macs=1_000),
        replaced(made(2, 0.79, peak_bytes=2_000), params=12_000, macs=2_000),
    ]
    assert [trial.number for trial in front(memories)] == [1, 0]
    timed = [
        made(0, 0.80, macs=1_000, latency_ms=5.0),
        made(1, 0.81, macs=2_000, latency_ms=6.0),
        made(2, 0.80, macs=1_500),  # worse than the first in what both say
        made(3, 0.82, macs=3_000),
    ]
    assert [trial.number for trial in front(timed)] == [0, 1, 3]


def test_a_plot_of_memory_has_the_front_in_memory(tmp_path: Path) -> None:
    study = study_of(
        tmp_path,
        made(0, 0.80, peak_bytes=2_000, macs=40_000_001),
        made(1, 0.81, peak_bytes=8_000),
        made(2, 0.75, peak_bytes=1_000),
    )
    figures = study_plots.over_costs(study, result_from(study), front(study.trials))
    (memory,) = (figure for figure in figures if figure.name == "over-memory")
    assert "the front goes 1,000: 75.00 %, 2,000: 80.00 %, 8,000: 81.00 %" in memory.description


def test_trials_without_a_mark_are_counted(read: Read, searched: Snapshot) -> None:
    marked = sum(
        len(marks(read.svg("over-params"), kind))
        for kind in ("trial", "front", "best", "uniform", "static", "stopped")
    )
    assert f"{24 - marked} that failed or stopped before training" in read.sections["s-costs"]
    assert {4, 9} & set(marks(read.svg("over-params"), "stopped")) == set()


def test_the_line_of_the_front_has_the_points_that_no_other_beats_in_both() -> None:
    points = [(3.0, 0.5), (1.0, 0.4), (1.0, 0.3), (2.0, 0.4), (4.0, 0.6), (5.0, 0.6)]
    # By hand: 1 has 0.4, 2 has no more; 3 has 0.5; 4 has 0.6, 5 no more.
    assert study_plots.stairs(points) == [(1.0, 0.4), (3.0, 0.5), (4.0, 0.6)]


def test_the_best_so_far_is_the_running_maximum(searched: Snapshot) -> None:
    (found,) = result_from(searched).budgets
    plans = trials.complete_plans(found.trials)
    best = list(itertools.accumulate((trial.values[0] for trial in plans), max))
    rises = [i for i in range(len(best)) if i == 0 or best[i] > best[i - 1]]
    expected = [(plans[i].number, best[i]) for i in rises]
    assert len(expected) > 1
    assert study_plots.rising(found, lambda trial: trial.number) == expected


def test_times_count_from_the_first_start(tmp_path: Path) -> None:
    # Trial 3 began after 3 minutes and took 400: done at 403 minutes, 6.72 hours.
    study = study_of(tmp_path, made(0, 0.5, kind="uniform"), made(3, 0.7, minutes=400))
    words = Read(page(study)).sections["s-progress"]
    assert "time since the first start (h), pauses included" in words
    assert "50.00 % at first, 70.00 % from trial 3 on" in words
    assert "50.00 % at first, 70.00 % from 6.72 h on" in words


def test_latency_has_a_plot_where_trials_have_it(tmp_path: Path, read: Read) -> None:
    study = study_of(
        tmp_path,
        made(0, 0.5, kind="uniform", latency_ms=7.5),
        made(1, 0.6, latency_ms=8.25),
        overrides=("search.space.limits={latency_ms: 9, lut: x.yaml}",),
    )
    found = Read(page(study))
    assert "2 trials of 7.5 ms to 8.25 ms, 50.00 % to 60.00 %" in found.sections["s-costs"]
    assert ">limit 9 ms</text>" in found.svg("over-latency")
    assert found.table("trials").column("ms") == {0: "7.5", 1: "8.25"}
    assert count(read, "svg", id="over-latency") == 0


def test_rungs_are_compared_by_kendalls_tau(tmp_path: Path) -> None:
    pairs = [(0.3, 0.5), (0.2, 0.6), (0.4, 0.7), (0.1, 0.4), (0.5, 0.65)]
    tau = scipy.stats.kendalltau(*zip(*pairs, strict=True)).statistic
    study = study_of(
        tmp_path, *(made(i, end, steps={3: rung}) for i, (rung, end) in enumerate(pairs))
    )
    found = Read(page(study))
    assert f"Tau {tau:.2f} over 5 trials" in found.sections["s-rungs"]
    (dots,) = re.findall(r'class="dots dot" d="([^"]*)"', found.svg("rung-0"))
    assert dots.count("h0") == 5


def test_axes_are_written_with_as_many_digits_as_tell_ticks_apart() -> None:
    for low, high in ((12_799_990, 12_800_020), (0, 3e9), (135_408, 136_237), (5, 9)):
        ticks = figure.count_axis("x", [low, high]).ticks
        assert len(ticks) > 1
        assert len({text for _, text in ticks}) == len(ticks)
        units = {"G": 1e9, "M": 1e6, "k": 1e3}
        for value, text in ticks:
            unit = units.get(text[-1], 1.0)
            assert float(text.rstrip("GMk").replace(",", "")) * unit == pytest.approx(
                value, rel=1e-9, abs=1e-9
            )
    shares = figure.percent_axis("x", [0.9981, 0.9999]).ticks
    assert [float(text) / 100 for _, text in shares] == pytest.approx([v for v, _ in shares])
    assert max(value for value, _ in shares) <= 1


# Choices ----------------------------------------------------------------------------------------


def chosen(number: int, a: str, b: float, accuracy: float) -> FrozenTrial:
    """A trial with two choices."""
    space = {"a": CategoricalDistribution(("x", "y")), "b": FloatDistribution(0.5, 2, log=True)}
    return made(number, accuracy, params={"a": a, "b": b}, distributions=space)


def test_the_choice_that_the_best_have_in_common_matters_most(tmp_path: Path) -> None:
    """y is what all of the best have in common, a small b what all of the worst have."""
    rng = random.Random(0)
    found = []
    for i in range(60):
        b = rng.uniform(0.5, 2)
        accuracy = 0.1 if b < 0.7 else 0.5 + 0.2 * (i % 2)
        found.append(chosen(i, "xy"[i % 2], b, accuracy + 0.01 * rng.random()))
    result = result_from(study_of(tmp_path, *found))
    words = study_choices.choices(result)
    assert words.importance is not None
    bars = str(words.importance.svg())
    shares = [float(text) for text in re.findall(r"([\d.]+) %</text>", bars)]
    names = re.findall(r"y=[\d.]+>(a|b)</text>", bars)
    assert names == ["a", "b"]
    assert sum(shares) == pytest.approx(100, abs=0.02)
    assert shares[0] > 50
    means = re.search(
        r"Means: x: ([\d.]+) % over 30 plans; y: ([\d.]+) % over 30 plans",
        str(words.slices[0].description),
    )
    assert means is not None
    for place, text in enumerate(means.groups()):
        group = [t.values[0] for t in found if t.params["a"] == "xy"[place]]
        assert float(text) == pytest.approx(100 * sum(group) / 30, abs=0.005)


def test_budgets_are_compared_within_themselves(tmp_path: Path) -> None:
    # Budget 1 is better by far; within each budget y is better by 2 points.
    found = [
        replaced(
            chosen(i, "xy"[i // 2 % 2], 1.0, 0.5 + 0.3 * (i % 2) + 0.02 * (i // 2 % 2)),
            budget=(0.5, 1.0)[i % 2],
        )
        for i in range(8)
    ]
    study = study_of(tmp_path, *found, overrides=("search.budgets=[0.5,1]",))
    (only,) = study_choices.choices(result_from(study)).slices
    assert only.description == "Means: x: -1.00 points over 4 plans; y: 1.00 points over 4 plans."


@pytest.mark.parametrize("few", [0, 3])
def test_few_trials_say_nothing_of_choices(tmp_path: Path, few: int) -> None:
    study = study_of(
        tmp_path, *(chosen(i, "xy"[i % 2], 1.0 + i / 9, 0.5 + i / 9) for i in range(few))
    )
    found = Read(page(study))
    assert f"Too few to tell: {few} complete plans" in found.sections["s-choices"]
    assert count(found, "svg", id="importance") == 0


# The table ---------------------------------------------------------------------------------------


def test_the_table_is_what_trials_json_says(
    read: Read, searched: Snapshot, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["trials", str(searched.directory), "--json"]) == 0
    known = {trial["number"]: trial for trial in json.loads(capsys.readouterr().out)}
    table = read.table("trials")
    assert list(table.column("trial")) == list(known)
    assert {n: number(text) for n, text in table.column("parameters").items()} == {
        n: trial["params"] for n, trial in known.items()
    }
    assert {n: number(text) for n, text in table.column("MACs").items()} == {
        n: trial["macs"] for n, trial in known.items()
    }
    assert {n: text or None for n, text in table.column("kind").items()} == {
        n: trial.get("kind") for n, trial in known.items()
    }
    accuracies = {n: trial["score"] for n, trial in known.items()}
    place = table.rows[0].cells.index("accuracy")
    for row in table.body:
        accuracy = accuracies[int(str(row.attrs["id"])[1:])]
        assert row.cells[place] == ("" if accuracy is None else f"{100 * accuracy:.2f} %")
    assert table.column("sharing") == {
        n: trial["choices"].get("sharing", "") for n, trial in known.items()
    }
    states = {"complete": "complete", "pruned": "stopped", "fail": "failed"}
    assert [row.attrs["data-state"] for row in table.body] == [
        states[trial["state"]] for trial in known.values()
    ]
    # A mark of a stopped trial says what its row does not: the accuracy of its last epoch.
    for row in table.body:
        trial = known[int(str(row.attrs["id"])[1:])]
        epochs = {int(epoch): value for epoch, value in trial["epochs"].items() if epoch != "0"}
        tip = f"{100 * epochs[max(epochs)]:.2f} % at epoch {max(epochs)}" if epochs else None
        assert row.attrs.get("data-tip") == (tip if trial["state"] == "pruned" else None)


def test_recipes_unpack_load_and_have_the_parameters_shown(
    read: Read, searched: Snapshot, tmp_path: Path
) -> None:
    recipes = read.recipes()
    params = {n: number(text) for n, text in read.table("trials").column("parameters").items()}
    assert set(map(int, recipes)) == set(params) - {1}  # the static network has no plan
    assert read.table("trials").attrs["data-kept"] == " ".join(sorted(recipes, key=int))
    bare = [row.attrs["id"] for row in read.table("trials").body if "data-bare" in row.attrs]
    assert bare == ["t1"]
    net: Network | None = None
    for trial, text in recipes.items():
        path = tmp_path / f"{trial}.yaml"
        path.write_text(text)
        recipe = load_recipe(path)
        net = net or network_of(recipe)
        assert recipe.plan is not None
        plan = Plan.from_groups(net, [group.model_dump() for group in recipe.plan.groups])
        assert plan.cost().deployed == params[int(trial)]


def test_a_recipe_is_the_one_that_show_writes(
    read: Read, searched: Snapshot, tmp_path: Path
) -> None:
    command = str(read.table("trials").attrs["data-command"])
    assert command == f"kwsearch show {searched.directory} {{}} -o trial_{{}}.yaml"
    path = tmp_path / "7.yaml"
    assert cli.run(["show", str(searched.directory), "7", "-o", str(path)]) == 0
    assert read.recipes()["7"] == path.read_text()


def test_relative_ratios_have_one_column_where_they_are_many(read: Read) -> None:
    heads = read.table("trials").rows[0].cells
    assert "relative ratios" in heads
    assert not any(head.startswith("relative ratio of") for head in heads)


def test_reasons_are_grouped_and_lead_to_their_trials(read: Read, searched: Snapshot) -> None:
    words = read.sections["s-failures"]
    assert "2 failed" in words
    assert "RuntimeError: out of memory at N bytes" in words
    failures = read.text[read.text.index('<section id="s-failures">') :]
    failures = failures[: failures.index("</section>")]
    links = [int(trial) for trial in re.findall(r'href="#t(\d+)"', failures)]
    assert sorted(links) == [t.number for t in searched.trials if t.state != TrialState.COMPLETE]


# Sweeps and methods -----------------------------------------------------------------------------


def test_series_of_a_long_sweep_look_different() -> None:
    css = figure.style()
    kinds = [figure.series(i) for i in range(36)]
    looks = set()
    for kind in kinds:
        rules = [re.search(rf"\.line\.{one} ?{{([^}}]*)}}", css) for one in kind.split()]
        looks.add(tuple(rule[1].strip(" ;") if rule else "" for rule in rules))
    assert len(looks) == 36
    assert kinds[:6] == [f"s{i} d{i}" for i in range(6)]


def test_a_sweep_has_all_budgets_in_one_plot(swept: Snapshot) -> None:
    found = Read(page(swept))
    svg = found.svg("over-params")
    assert svg.count("class=rule") == 2
    assert re.findall(r">(budget [\d.]+)</text>", svg) == ["budget 1.5", "budget 3"]
    # 1.5 and 3 times 272,474.
    assert re.findall(r"at most ([\d,]+) parameters", found.text) == ["408,711", "817,422"]
    lines = re.findall(r'class="line (s\d d\d)"', found.svg("by-trial"))
    assert lines == ["s0 d0", "s1 d1"]
    heads = [row.cells[0] for row in found.table("plans").rows if row.attrs.get("class") == "head"]
    assert heads == ["budget 1.5", "budget 3"]
    budgets = found.table("trials").column("budget")
    assert set(budgets.values()) == {"1.5", "3"}
    for trial, text in found.recipes().items():
        recipe = parse_recipe(text)
        assert recipe.budget is not None
        assert recipe.budget.total_ratio == float(budgets[int(trial)])
        assert recipe.search is not None
        assert recipe.search.budgets == ()
    assert [t.attrs["data-unit"] for t in found.tables if t.attrs.get("class") == "spent"] == [
        "parameters",
        "MACs",
        "parameters",
        "MACs",
    ]


def test_several_methods_have_a_column(swept: Snapshot, read: Read) -> None:
    column = Read(page(swept)).table("trials").column("method")
    assert {"", "kernel_warehouse", "dyconv"} <= set(column.values())
    assert column == {
        t.number: t.user_attrs["groups"][0]["method"] if "groups" in t.user_attrs else ""
        for t in swept.trials
    }
    assert "method" not in read.table("trials").rows[0].cells


# States of studies ------------------------------------------------------------------------------


def no_plots(found: Read) -> bool:
    return not any(t == "svg" for t, _ in found.elements)


def test_a_study_without_trials_is_sentences(tmp_path: Path) -> None:
    found = Read(page(study_of(tmp_path)))
    assert no_plots(found)
    assert found.tables == []
    assert "no trial finished: nothing to choose" in found.sections["s-summary"]
    for name in ("s-costs", "s-progress", "s-spent"):
        assert "Nothing to show" in found.sections[name]
    assert "No trial has begun." in found.sections["s-trials"]
    assert "recipes" not in found.scripts


def test_a_study_of_one_trial(tmp_path: Path, plan: Plan) -> None:
    found = Read(page(study_of(tmp_path, made(0, 0.5, plan=plan, kind="uniform"))))
    assert found.table("plans").rows[1].cells[:3] == [
        "best plan, which is the uniform one",
        "0",
        "50.00 %",
    ]
    assert len(found.table("plans").rows) == 2
    assert "the uniform plan: no other plan has finished" in found.sections["s-summary"]
    assert set(marks(found.svg("over-params"), "best")) == {0}
    assert set(marks(found.svg("over-params"), "uniform")) == {0}
    (spent, _) = (t for t in found.tables if t.attrs.get("class") == "spent")
    assert number(spent.rows[-1].cells[-1]) == plan.cost().deployed


def test_a_study_in_which_all_failed(tmp_path: Path) -> None:
    reason = 'RuntimeError: <b>no</b> & "nothing"'
    study = study_of(
        tmp_path, *(made(i, state="FAIL", reason=reason, kind="uniform") for i in range(2))
    )
    found = Read(page(study))
    assert no_plots(found)
    assert "Nothing to show: no trial has an accuracy." in found.sections["s-costs"]
    assert f"2 failed\n{reason}" in re.sub(r"\n+", "\n", found.sections["s-failures"])
    assert [row.cells[3] for row in found.table("trials").body] == [reason, reason]
    assert count(found, "b") == 0


def test_a_study_that_runs(tmp_path: Path, plan: Plan) -> None:
    study = study_of(
        tmp_path,
        made(0, 0.5, plan=plan, kind="uniform", steps={3: 0.4}),
        made(1, state="RUNNING", plan=plan, steps={0: 77.0, 1: 0.2, 2: 0.25}),
        made(2, state="RUNNING", plan=plan, steps={0: 77.0}),
        made(3, state="WAITING"),
        running=True,
    )
    found = Read(page(study, refresh=7))
    assert (("meta", {"http-equiv": "refresh", "content": "7"})) in found.elements
    assert count(found, "span", **{"class": "badge live"}) == 1
    assert "trials: 1 of 24 finished (1 complete, 2 unfinished, 1 not begun)" in found.text
    # The value at step 0 is a score, no accuracy.
    assert set(marks(found.svg("over-params"), "running")) == {1}
    tips = [row.attrs.get("data-tip") for row in found.table("trials").body]
    assert tips == [None, "25.00 % at epoch 2", None, None]
    again = Read(page(study))
    assert not any(a.get("http-equiv") == "refresh" for _, a in again.elements)


def test_a_network_that_needs_trust_has_no_parts_but_a_reason(searched: Snapshot) -> None:
    found = Read(page(named(searched, "own_code:network")))
    assert "The network cannot be taken apart here: " in found.sections["s-spent"]
    assert "--trust" in found.sections["s-spent"]
    assert not any(table.attrs.get("class") == "spent" for table in found.tables)
    assert found.table("trials").column("parameters")


# Any page ---------------------------------------------------------------------------------------


def named(study: Snapshot, name: str) -> Snapshot:
    """The study of a network of another name."""
    model = study.recipe.model.model_copy(update={"name": name})
    return replace(study, recipe=study.recipe.model_copy(update={"model": model}))


def evil_study(searched: Snapshot) -> Snapshot:
    """One whose names are markup."""
    study = named(searched, EVIL)
    provenance = {**study.recipe.provenance, "command": EVIL, "data": EVIL, EVIL: EVIL}
    recipe = study.recipe.model_copy(update={"provenance": provenance})
    found = []
    for trial in copy.deepcopy(study.trials):
        if trial.state == TrialState.FAIL:
            trial.set_user_attr("reason", f"{EVIL} \" ' onclick=alert(1)")
        if "sharing" in trial.params:
            names = (EVIL, "</svg><b>")
            trial.distributions = {EVIL: CategoricalDistribution(names)}
            trial.params = {EVIL: names[trial.number % 2]}
        found.append(trial)
    return replace(study, recipe=recipe, trials=tuple(found))


def test_names_are_text_whatever_is_in_them(searched: Snapshot, read: Read) -> None:
    found = Read(page(evil_study(searched)))
    assert found.title == f"{EVIL}: search"
    assert EVIL in found.sections["s-summary"]
    assert EVIL in found.sections["s-choices"]
    assert EVIL in found.sections["s-origin"]
    assert EVIL in found.table("trials").rows[0].cells
    for tag in ("script", "b"):
        assert count(found, tag) == count(read, tag)
    assert not any(name.startswith("on") for _, attrs in found.elements for name in attrs)


@pytest.fixture(scope="module")
def every(
    searched: Snapshot, swept: Snapshot, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """Pages of several studies."""
    empty = study_of(tmp_path_factory.mktemp("empty"))
    return [page(study) for study in (searched, swept, evil_study(searched), empty)]


def test_pages_load_nothing(every: list[str]) -> None:
    for text in every:
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)
        assert "@import" not in text
        found = Read(text)
        loaded = [
            attrs
            for tag, attrs in found.elements
            if tag in ("link", "img", "iframe", "object", "embed", "audio", "video")
            or "src" in attrs
        ]
        assert loaded == []
        (policy,) = (
            str(attrs["content"])
            for _, attrs in found.elements
            if attrs.get("http-equiv") == "Content-Security-Policy"
        )
        assert "default-src 'none'" in policy


def test_ids_are_unique_and_links_lead_somewhere(every: list[str]) -> None:
    for text in every:
        found = Read(text)
        ids = [attrs["id"] for _, attrs in found.elements if "id" in attrs]
        assert len(set(ids)) == len(ids)
        hrefs = {str(attrs["href"]) for _, attrs in found.elements if "href" in attrs}
        assert hrefs <= {f"#{one}" for one in ids}
        labels = {
            name
            for _, attrs in found.elements
            for name in str(attrs.get("aria-labelledby", "")).split()
        }
        assert labels <= set(ids)
        fills = set(re.findall(r"url\(#([\w-]+)\)", text))
        assert fills <= set(ids)


def test_every_plot_has_a_title_and_a_description(every: list[str]) -> None:
    found = 0
    for text in every:
        for svg in re.findall(r"<svg [^>]*role=img.*?</svg>", text, re.S):
            title, words = (
                re.search(rf"<{t} id=[^>]*>(.*?)</{t}>", svg) for t in ("title", "desc")
            )
            assert title is not None
            assert title[1]
            assert words is not None
            assert len(words[1]) > 10
            found += 1
    assert found > 20


def test_how_it_was_made_is_all_there(read: Read, searched: Snapshot) -> None:
    words = read.sections["s-origin"]
    assert f"kwsearch optimize 'my recipe.yaml' --run-dir {searched.directory}" in words
    assert (searched.directory / RECIPE).read_text() in words
    for key in ("python", "torch", "optuna", "numpy"):
        assert f"{key} {searched.recipe.provenance['versions'][key]}" in words
    assert str(searched.recipe.provenance["id"]) in words


def test_passwords_are_not_passed_on(tmp_path: Path, plan: Plan) -> None:
    study = study_of(
        tmp_path,
        made(0, 0.5, plan=plan, kind="uniform"),
        overrides=("search.checkpoints='s3://me:secret@host/x'",),
        provenance={"place": "s3://me:secret@host/y"},
    )
    assert "secret" in (tmp_path / RECIPE).read_text()
    found = Read(page(study))
    assert "s3://me:***@host/x" in found.sections["s-origin"]
    assert "s3://me:***@host/y" in found.sections["s-origin"]
    assert "s3://me:***@host/x" in found.recipes()["0"]
    assert "secret" not in found.text + found.recipes()["0"]


# Size -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet50() -> Plan:
    """Of the size of those that people search."""
    recipe = parse_recipe("{format: 1, model: resnet50, budget: {total_ratio: 0.5}}")
    from kwlayers.sharing import Settings

    layout = lay_out(network_of(recipe), Settings(sharing="layer"))
    return layout.floor()


def large(directory: Path, plan: Plan, *, stops: bool) -> Snapshot:
    """500 trials of plans that differ in all their sizes, with all that makes rows long."""
    rng = random.Random(0)
    groups = plan.groups_to_list()
    space = {
        f"relative_ratio/layer/{group['name']}": FloatDistribution(0.5, 2, log=True)
        for group in groups
    }
    shape = {name: CategoricalDistribution((1.0, 0.5)) for name in ("basis_ratio", "reduction")}
    found = []
    for i in range(500):
        own = [{**group, "num_cells": rng.randint(1, 200)} for group in groups]
        stopped = stops and i % 3 > 0
        accuracy = 0.7 + rng.gauss(0, 0.03)
        ratios: dict[str, Any] = {name: rng.uniform(0.5, 2) for name in space}
        trial = made(
            i,
            None if stopped else accuracy,
            state="PRUNED" if stopped else "COMPLETE",
            steps={3: accuracy - 0.1 + rng.gauss(0, 0.02)},
            params=ratios | {name: rng.choice((1.0, 0.5)) for name in shape},
            distributions=space | shape,
            groups=own,
            seconds=rng.uniform(100, 2000),
            latency_ms=rng.uniform(5, 9),
            fingerprint=f"{i:016x}",
            **({"kind": "uniform"} if i == 0 else {}),
            **(
                {"reason": f"stopped after epoch 3: not among the best {i} of {3 * i}"}
                if stopped
                else {}
            ),
        )
        found.append(
            replaced(
                trial, params=12_780_000 + rng.randint(0, 9999), macs=rng.randint(4, 9) * 10**9
            )
        )
    return study_of(
        directory,
        *found,
        overrides=("model=resnet50", "input=[3,224,224]", "search.trials=500"),
        provenance={"command": "kwsearch optimize large.yaml"},
    )


@pytest.mark.parametrize(
    "stops",
    [pytest.param(False, marks=pytest.mark.slow), True],
    ids=["all complete", "two thirds stopped"],
)
def test_500_trials_of_resnet50_have_a_page_under_300_kb(
    tmp_path: Path, resnet50: Plan, stops: bool
) -> None:
    assert MOST_BYTES == 300_000
    assert len(resnet50.groups) > 45
    study = large(tmp_path, resnet50, stops=stops)
    text = page(study)
    assert len(text.encode()) <= 300_000
    found = Read(text)
    assert len(found.table("trials").body) == 500
    marked = [set(marks(found.svg("over-params"), kind)) for kind in ("trial", "stopped", "front")]
    assert sum(map(len, marked)) == 500 - 1 - len(marks(found.svg("over-params"), "best"))
    kept = set(map(int, found.recipes()))
    # What does not fit is written by a command: first the best and the front have a place.
    assert 20 < len(kept) < 500
    best = result_from(study).budgets[0].best
    assert best is not None
    unbeaten = [trial.number for trial in trials.front(study.trials)]
    first = list(dict.fromkeys([best.number, *unbeaten]))
    assert kept >= set(first[: len(kept)])
    assert str(found.table("trials").attrs["data-kept"]) == " ".join(map(str, sorted(kept)))


def test_packing_stops_where_there_is_no_room() -> None:
    rng = random.Random(0)
    texts = [(i, "".join(rng.choices("abcdefgh\n:ü", k=300))) for i in (5, 3, 8, 1)]
    for room in (*range(0, 2000, 7), 10_000):
        packed, numbers = study_table.packed(texts, room)
        assert len(packed) <= room
        assert numbers == [number for number, _ in texts][: len(numbers)]
        if packed:
            known = json.loads(zlib.decompress(base64.b64decode(packed)))
            assert known == {str(number): dict(texts)[number] for number in numbers}
    assert numbers == [5, 3, 8, 1]
