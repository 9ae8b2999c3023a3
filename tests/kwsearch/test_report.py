"""`kwsearch report`: what it says of a study in any state, the page it writes, and --watch."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from kwlayers.plan import Plan
from kwsearch import cli, results, scatter, snapshot, study_summary
from kwsearch.cli import report
from kwsearch.recipe import parse_recipe
from kwsearch.run_directory import JOURNAL, LOCK, write_down

GOLDEN = Path(__file__).parents[1] / "data" / "study_summary.txt"
TEXT = """
format: 1
model: resnet20
budget: {total_ratio: 0.5}
search: {trials: 8, finalists: 1, seeds: 2}
proxy: {epochs: 9}
"""
# Half of the 272,474 parameters of the static network. Rungs: 9 epochs, and a third of them.
ALLOWED = 136_237
PROVENANCE = {
    "command": "kwsearch optimize golden.yaml",
    "versions": {"python": "3.11.7", "torch": "2.13.0+cpu"},
    "seed": 0,
    "data": "digits 6ca377f18564a2e4",
    "held_out": 1000,
}
BEGIN = datetime.datetime(2026, 11, 22, 10, 0, 0, tzinfo=datetime.timezone.utc)


def trial(
    number: int,
    accuracy: float | None = None,
    state: str = "COMPLETE",
    *,
    params: int = 136_000,
    macs: int = 40_000_000,
    rung: float | None = None,
    **attrs: Any,
) -> FrozenTrial:
    """One that began `number` minutes after the first, on a budget of ALLOWED parameters."""
    facts = {"budget": 0.5, "fingerprint": f"plan {number}", "lease": {"attempt": 1}}
    steps = {} if rung is None else {3: rung}
    made = optuna.trial.create_trial(
        state=TrialState[state],
        value=accuracy,
        user_attrs={**facts, "params": params, "macs": macs, **attrs},
        constraints={"params": float(params - attrs.get("allowed", ALLOWED))},
        intermediate_values=steps if accuracy is None else {**steps, 9: accuracy},
    )
    made.datetime_start = BEGIN + datetime.timedelta(minutes=number)
    if made.state.is_finished():
        made.datetime_complete = made.datetime_start + datetime.timedelta(
            seconds=attrs.get("seconds", 0)
        )
    return made


def storage(directory: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(directory / JOURNAL)))


def make(
    directory: Path,
    *trials: FrozenTrial,
    finals: dict[str, Any] | None = None,
    overrides: tuple[str, ...] = (),
    provenance: dict[str, Any] = PROVENANCE,
) -> Path:
    """A study's run directory with these trials and results of final trainings."""
    directory.mkdir(parents=True, exist_ok=True)
    write_down(directory, parse_recipe(TEXT, overrides=overrides), provenance)
    study = optuna.create_study(
        storage=storage(directory), study_name="kwsearch", direction="maximize"
    )
    study.add_trials(trials)
    for key, value in (finals or {}).items():
        study.set_user_attr(key, value)
    return directory


def say_best(directory: Path, number: int) -> None:
    """Write a best recipe that says this trial."""
    text = "format: 1\nmodel: resnet20\nbudget: {total_ratio: 0.5}\nprovenance: {trial: %d}\n"
    (directory / "best.yaml").write_text(text % number)


def add(directory: Path, *trials: FrozenTrial) -> None:
    optuna.load_study(storage=storage(directory), study_name="kwsearch").add_trials(trials)


UNIFORM = trial(0, 0.70, rung=0.50, kind="uniform", seconds=60.0)
STATIC = trial(1, 0.72, rung=0.60, params=136_237, macs=20_000_000, kind="static", seconds=30.0)
OTHERS = (
    trial(2, 0.60, rung=0.40, params=136_100, macs=41_000_000, seconds=60.0),
    trial(3, 0.75, rung=0.55, params=136_200, macs=42_000_000, seconds=60.0),
    trial(4, 0.65, rung=0.52, params=135_900, macs=39_000_000, seconds=60.0),
)
STOPPED = tuple(
    trial(
        number,
        state="PRUNED",
        rung=0.3,
        seconds=20.0,
        reason=f"stopped after epoch 3: not among the best {best} of {of}",
    )
    for number, best, of in ((5, 1, 5), (6, 2, 6))
)
FAILED = trial(7, state="FAIL", seconds=5.0, reason="RuntimeError: no room [for] more\n  at x")
FINALS = {
    f"final/{number}/{seed}": {"valid": 0.5, "test": accuracy}
    for number, accuracies in {3: (0.80, 0.82), 0: (0.78, 0.79), 1: (0.79, 0.80)}.items()
    for seed, accuracy in enumerate(accuracies)
}
ALL = (UNIFORM, STATIC, *OTHERS, *STOPPED, FAILED)


class Ran:
    """Exit code and what was printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.out.splitlines()]


Run = Callable[..., Ran]


@pytest.fixture
def run(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Run:
    """The command, in an empty folder. Its page says only when it asks for news."""

    def page(study: snapshot.Snapshot, refresh: int | None = None) -> str:
        again = "" if refresh is None else f'<meta http-equiv="refresh" content="{refresh}">'
        return f"<!doctype html>{again}{study.directory}"

    if "whole_page" not in request.fixturenames:
        monkeypatch.setattr("kwsearch.pages.study.page", page)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*args: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["kwsearch", *args])
        code = cli.run(["report", *args])
        return Ran(code, *capsys.readouterr())

    return call


# What it says ---------------------------------------------------------------------------------


def test_the_summary_is_the_one_that_was_worked_out_by_hand(run: Run) -> None:
    """By hand, from the values above:

    - Against the allowed 136,237: 136,200 is 99.97 %, 136,000 is 99.83 %.
    - Plot: 90 columns less 5 are 85, from 135,900 to 136,250 by 50: 100 parameters are 24 columns,
      the limit is in 337 / 350 * 84 = 80.9, where the static network stands. 12 rows from 60 to
      75 %: a point is 11 / 15 rows.
    - Front: trial 2 has more parameters and MACs than trial 0 and less accuracy; trial 4 has the
      fewest parameters, trial 1 the fewest MACs.
    - Finals: means 0.81, 0.785, 0.795. With two seeds an interval is 12.706 times half the
      difference: 0.01 * 12.706 = 0.127. Differences to the uniform plan 0.02 and 0.03: t = 5,
      p = 1 - 2 atan(5) / pi = 0.126, twice that after Holm's correction; to the static network
      0.01 and 0.02: t = 3, p = 0.205, and not less than the other.
    - Rung: of the 6 pairs of trials 0, 2, 3, 4 only 0 and 4 change places: tau = (5 - 1) / 6; at
      most one change has 4 of 24 orders, and both ways: p = 8 / 24. A third of 4 is 1: trial 3.
    - Time: 4 * 60 + 30 + 2 * 20 + 5 = 315 s, the middle two are 30 and 60; trial 7 begins at
      10:07:00 and fails 5 s later.
    """
    make(Path("runs/golden"), *ALL, finals=FINALS)
    say_best(Path("runs/golden"), 3)
    ran = run("runs/golden")
    assert ran.code == 0
    assert ran.lines == GOLDEN.read_text(encoding="utf-8").splitlines()


def test_the_numbers_are_the_summarys(run: Run) -> None:
    make(Path("r"), *ALL, finals=FINALS)
    found = json.loads(run("r", "--json").out)
    assert found["states"] == {"complete": 5, "pruned": 2, "fail": 1}
    assert found["asked"] == 8
    assert found["running"] is False
    assert found["unfinished"] == []
    assert found["final_trainings"] == {"done": 6, "planned": 6}
    assert found["model"] == "resnet20"
    assert found["input"] == [3, 32, 32]
    assert found["budget"] == {"total_ratio": [0.5]}
    assert found["params_allowed"] == [ALLOWED]
    assert found["best"] == 3
    assert [one["trial"] for one in found["front"]] == [4, 0, 3, 1]
    assert found["verdict"]["winner"] is None
    (rung,) = found["trust"]
    assert rung["of"] == "rung of 3 epochs"
    assert rung["tau"] == pytest.approx(4 / 6)
    assert rung["p"] == pytest.approx(8 / 24)
    assert rung["top"] == [1, 1]
    assert found["reasons"] == [
        {"state": "fail", "text": "RuntimeError: no room [for] more", "numbers": [7]},
        {
            "state": "pruned",
            "text": "stopped after epoch 3: not among the best N of N",
            "numbers": [5, 6],
        },
    ]
    assert found["seconds"] == 315.0
    assert found["began"] == "2026-11-22T10:00:00+00:00"
    assert found["ended"] == "2026-11-22T10:07:05+00:00"
    assert found["provenance"] == PROVENANCE


RUNNING = trial(3, state="RUNNING", rung=0.35)
PROPOSED = trial(4, state="RUNNING")
del PROPOSED.user_attrs["lease"]
STUDIES = {
    "empty": (),
    "one": (UNIFORM,),
    "only proposed": (PROPOSED,),
    "all failed": tuple(trial(n, state="FAIL", reason=f"E: {n}") for n in range(8)),
    "only the static network": (trial(0, state="FAIL"), STATIC),
    "half-finished": (UNIFORM, STATIC, OTHERS[0], RUNNING, PROPOSED),
    "no rung": (trial(0, 0.5, kind="uniform"),),
    "finished": ALL,
}


@pytest.mark.parametrize("name", STUDIES)
def test_states_add_up_to_trials_and_everything_shown_is_a_trial(run: Run, name: str) -> None:
    directory = make(Path("r"), *STUDIES[name])
    study = snapshot.take(directory)
    result = results.result_from(study)
    found = json.loads(run("r", "--json").out)
    assert sum(found["states"].values()) == len(STUDIES[name]) == len(study.trials)
    stated = re.fullmatch(r"trials: (\d+) of 8 finished \((.*)\)", study_summary.trials_line(study))
    assert stated is not None
    parts = [int(count) for count in re.findall(r"\d+", stated[2])]
    assert sum(parts) == len(study.trials)
    ended = sum(found["states"].get(state, 0) for state in ("complete", "pruned", "fail"))
    assert int(stated[1]) == ended
    explained = sum(len(reason["numbers"]) for reason in found["reasons"])
    assert explained == ended - found["states"].get("complete", 0)
    assert len(study_summary.points(result, "params")) == found["states"].get("complete", 0)
    # And the command shows them all.
    ran = run("r")
    assert ran.code == 0
    assert study_summary.trials_line(study) in ran.lines
    assert ran.lines[-1] == f"wrote {Path('r/report.html')}"


def test_a_study_without_trials_says_so(run: Run) -> None:
    make(Path("r"), provenance={})
    assert run("r").lines == [
        "study r: not running; kwsearch optimize with --resume goes on with it",
        "model: resnet20, input 3x32x32",
        "trials train on digits, 9 epochs in full",
        "budget: 0.5 x the static network",
        "trials: 0 of 8 finished (none yet)",
        "no trial finished: nothing to choose",
        "",
        "no held-out accuracy to plot yet",
        "",
        "wrote r/report.html",
    ]


def test_a_study_in_which_all_failed_groups_the_reasons(run: Run) -> None:
    reasons = ["ValueError: 3 is not 4"] * 9 + ["ValueError: 5 is not 6", "KeyError: 'a'"]
    make(Path("r"), *(trial(n, state="FAIL", reason=text) for n, text in enumerate(reasons)))
    lines = run("r").lines
    assert "no trial finished: nothing to choose" in lines
    assert [line for line in lines if line.startswith("failed")] == [
        "failed: 10 trials (0, 1, 2, 3, 4, 5, 6, 7, ...): ValueError: N is not N",
        "failed: 1 trial (10): KeyError: 'a'",
    ]


def test_a_baseline_that_is_best_is_listed_once(run: Run) -> None:
    make(Path("r"), UNIFORM, STATIC)
    names = [line.split("  ")[0].strip() for line in run("r").lines]
    assert "best plan" in names
    assert "static network" in names
    assert "uniform plan" not in names


def test_a_long_reason_is_cut(run: Run) -> None:
    make(Path("r"), trial(0, state="FAIL", reason="x" * 500))
    (reason,) = json.loads(run("r", "--json").out)["reasons"]
    assert reason["text"] == "x" * 197 + "..."


def test_a_half_finished_study_says_how_to_go_on_and_where_its_trials_are(run: Run) -> None:
    make(Path("r"), *STUDIES["half-finished"])
    lines = run("r").lines
    assert lines[0] == "study r: not running; kwsearch optimize with --resume goes on with it"
    assert "trials: 3 of 8 finished (3 complete, 2 unfinished)" in lines
    assert "    trial 3: after epoch 3 of 9, 35.00%" in lines
    assert not any(line.startswith("    trial 4") for line in lines)  # it has not begun
    # best.yaml is written when the search ends.
    assert not any(line.startswith("recipe of the best") for line in lines)
    # 0.70 - 0.72; twice the error of two shares of 1000: 2 sqrt((0.21 + 0.2016) / 1000) = 0.0406.
    assert (
        "-2.00 points against the static network within the budget; within two standard errors "
        "(4.06 points) of so few examples and one seed"
    ) in " ".join(" ".join(lines).split())
    assert not any(line.startswith("final trainings") for line in lines)


def test_many_unfinished_trials_are_named_in_part(run: Run) -> None:
    make(Path("r"), *(trial(n, state="RUNNING", rung=0.1 * n) for n in range(1, 10)))
    lines = [line for line in run("r").lines if line.startswith("    ")]
    assert lines[0] == "    trial 0: after epoch 3 of 9, 10.00%"
    assert lines[-1] == "    and 1 more"
    assert len(lines) == 9


def test_a_study_that_is_driven_is_running(run: Run) -> None:
    make(Path("r"), UNIFORM)
    say_best(Path("r"), 0)
    with filelock.FileLock("r/driver.lock"):
        assert run("r").lines[0] == "study r: running"
        found = json.loads(run("r", "--json").out)
    assert found["running"] is True
    assert found["best_recipe"] is None  # it is of an earlier run
    assert json.loads(run("r", "--json").out)["best_recipe"] == "r/best.yaml"


def test_a_best_recipe_of_an_earlier_end_is_not_that_of_the_best(run: Run) -> None:
    """The search went on, found a better one, and was killed."""
    make(Path("r"), *ALL)
    say_best(Path("r"), 4)
    assert json.loads(run("r", "--json").out)["best_recipe"] is None
    assert not any(line.startswith("recipe of the best") for line in run("r").lines)
    Path("r/best.yaml").write_text("format: 1\nmod")  # half a file
    assert json.loads(run("r", "--json").out)["best_recipe"] is None


def test_a_study_whose_space_is_exhausted_is_finished(run: Run) -> None:
    make(Path("r"), UNIFORM, STATIC, overrides=("search.finalists=0",))
    assert "--resume" in run("r").lines[0]
    study = optuna.load_study(storage=storage(Path("r")), study_name="kwsearch")
    study.set_user_attr("exhausted", "2 plans are trained and no other was found")
    lines = run("r").lines
    assert lines[0] == "study r: finished"
    assert (
        "trials: 2 of 8 finished (2 complete), and no others can be had: 2 plans are trained and "
        "no other was found"
    ) in " ".join(lines)


def test_a_trial_that_the_database_made_twice_does_not_count_as_asked_for(run: Run) -> None:
    double = trial(8, state="FAIL", reason="a double", double=True)
    make(Path("r"), *ALL[:-1], double, overrides=("search.finalists=0",))
    lines = run("r").lines
    assert "trials: 7 of 8 finished (5 complete, 2 stopped, 1 failed)" in lines
    assert "--resume" in lines[0]


def test_scores_of_videos_may_be_below_0(run: Run) -> None:
    videos = ("model={name: sign_resnet18, num_classes: 10}", "input=[3, 8, 32, 32]")
    make(Path("one"), trial(0, -0.05), overrides=videos)
    text = run("one").out
    assert "best: trial 0, -5.00% of 1 - WER on 1000 held-out examples" in text
    assert "held-out 1 - WER over parameters" in text
    make(Path("two"), trial(0, -0.2, kind="uniform"), trial(1, -0.05), overrides=videos)
    lines = " ".join(run("two").out.split())
    # 1 less a rate of errors is no share of examples: no error is known.
    assert "+15.00 points against the uniform plan; how much of it is chance is not" in lines
    assert "standard errors" not in lines


def test_equal_scores_are_not_beyond_the_error(run: Run) -> None:
    make(Path("r"), trial(0, 1.0), trial(1, 1.0, kind="static"))
    text = " ".join(run("r").out.split())
    assert "+0.00 points against the static network within the budget; within two" in text


def test_limits_beside_the_budget_are_said(run: Run) -> None:
    limits = "search.space.limits={macs: 45M, train_memory: 2GB}"
    make(Path("r"), *ALL, overrides=(limits,))
    lines = run("r").lines
    place = next(i for i, line in enumerate(lines) if line.startswith("budget: "))
    assert lines[place + 1].startswith("limits: 45,000,000 MACs, 2,000,000,000 bytes of memory")


def test_final_trainings_are_counted_and_not_foreseen_before_all_trials_are_there(
    run: Run,
) -> None:
    first = dict(list(FINALS.items())[:2])
    make(Path("r"), *ALL, finals={**first, "final/0/0": {"error": "Diverged: nan"}})
    lines = run("r").lines
    assert "final trainings: 3 of 6 (1 failed)" in lines
    assert lines[0] == "study r: not running; kwsearch optimize with --resume goes on with it"
    make(Path("s"), *ALL[:-1])
    assert json.loads(run("s", "--json").out)["final_trainings"] == {"done": 0, "planned": 0}


def test_a_sweep_shows_each_budget(run: Run) -> None:
    half = (UNIFORM, STATIC, OTHERS[1])
    whole = tuple(
        trial(number, accuracy, params=params, budget=1.0, allowed=272_474, **kind)
        for number, accuracy, params, kind in (
            (3, 0.8, 272_000, {"kind": "uniform"}),
            (4, 0.85, 272_400, {}),
        )
    )
    overrides = ("search.budgets=[0.5, 1]", "search.trials=5", "search.finalists=0")
    make(Path("r"), *half, *whole, overrides=overrides)
    lines = run("r").lines
    assert lines[0] == "study r: finished"
    assert "budget: 0.5 x the static network: at most 136,237 parameters" in lines
    assert "budget: 1 x the static network: at most 272,474 parameters" in lines
    assert "budget 0.5: best: trial 2, 75.00% on 1000 held-out examples" in lines
    assert "budget 1: best: trial 4, 85.00% on 1000 held-out examples" in lines
    assert any("| budgets" in line for line in lines)
    table = lines[: next(i for i, line in enumerate(lines) if line.startswith(" front:"))]
    rows = [line.split() for line in table if line.startswith((" 0.5 ", " 1 "))]
    assert [row[:3] for row in rows] == [
        ["0.5", "best", "plan"],
        ["0.5", "uniform", "plan"],
        ["0.5", "static", "network"],
        ["1", "best", "plan"],
        ["1", "uniform", "plan"],
    ]
    result = results.result_from(snapshot.take(Path("r")))
    best = [point for point in study_summary.points(result, "macs") if point.kind == "best"]
    assert best == [scatter.Point(42e6, 0.75, "best"), scatter.Point(40e6, 0.85, "best")]


def test_a_budget_is_said_as_the_recipe_gives_it(run: Run) -> None:
    for given, words in {
        "{ratio: 0.5}": "budget: b = 0.5, cells per mixture: at most 136,237 parameters",
        "{params: 136237}": "budget: 136,237 parameters",
    }.items():
        value = 0.5 if "ratio" in given else 136_237.0
        first = trial(0, 0.7, kind="uniform", budget=value)
        directory = Path(f"r{int(value)}")
        make(directory, first, overrides=(f"budget={given}",))
        lines = run(str(directory)).lines
        assert words in lines
        assert "best: trial 0, 70.00% on 1000 held-out examples" in lines


def test_a_study_that_did_not_write_down_its_images_is_compared_without_errors(run: Run) -> None:
    older = {key: value for key, value in PROVENANCE.items() if key != "held_out"}
    make(Path("r"), UNIFORM, STATIC, provenance=older)
    lines = run("r").lines
    assert "best: trial 0, 70.00% on held-out examples" in lines
    assert not any("standard errors" in line for line in lines)


def test_names_are_no_markup_and_a_model_that_cannot_be_loaded_has_no_size(run: Run) -> None:
    overrides = ("model={name: 'nowhere[red]:make', num_classes: 10}",)
    make(Path("runs[bold]"), UNIFORM, overrides=overrides)
    ran = run("runs[bold]")
    assert ran.code == 0
    assert ran.lines[0].startswith("study runs[bold]: ")
    assert ran.lines[1] == "model: nowhere[red]:make"
    assert ran.lines[-1] == "wrote runs[bold]/report.html"


def test_latency_is_shown_where_there_is_a_table(run: Run) -> None:
    slow = trial(0, 0.7, kind="uniform", latency_ms=12.345)
    make(Path("r"), slow, trial(1, 0.8), provenance={**PROVENANCE, "warnings": ["old table"]})
    lines = run("r").lines
    assert "warning: old table" in lines
    assert any(line.endswith("40,000,000   12.3") for line in lines)


def test_the_plot_can_be_over_macs_with_the_recipes_limit(run: Run) -> None:
    limits = "search.space.limits={macs: 45M}"
    make(Path("r"), *ALL, overrides=(limits,))
    lines = run("r", "--over", "macs").lines
    assert "held-out accuracy over MACs" in lines
    assert any("45M" in line for line in lines)
    assert any("| the most that is allowed" in line for line in lines)


def test_a_narrow_terminal_gets_no_plot_and_whole_numbers(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(Path("r"), *ALL, finals=FINALS)
    monkeypatch.setenv("COLUMNS", "59")
    lines = run("r").lines
    assert "held-out accuracy over parameters" not in lines
    assert "no plot: it takes 60 columns, and there are 59" in lines
    assert max(map(len, lines)) <= 59
    assert " left out, as the terminal is narrow: of budget, MACs" in lines
    assert " static network   1                  72.00%      136,237" in lines
    monkeypatch.setenv("COLUMNS", "60")
    assert "held-out accuracy over parameters" in run("r").lines


# The page -------------------------------------------------------------------------------------


REFRESH = re.compile(r"<meta[^>]*http-equiv=.?refresh[^>]*content=.?(\d+)", re.I)


def refresh_of(path: Path) -> int | None:
    """Seconds after which the page asks for itself again."""
    text = path.read_text(encoding="utf-8")
    assert text.lower().startswith("<!doctype html>")
    found = REFRESH.search(text)
    return None if found is None else int(found[1])


def test_the_page_is_written_beside_the_study_or_where_asked(run: Run) -> None:
    make(Path("r"), *ALL)
    assert run("r").lines[-1] == "wrote r/report.html"
    assert refresh_of(Path("r/report.html")) is None
    assert run("r", "-o", "else.html").lines[-1] == "wrote else.html"
    assert Path("else.html").exists()


@pytest.fixture
def whole_page() -> None:
    """Asked for by tests of the page that users get."""


def test_the_page_asks_for_itself_again_while_it_is_watched(
    whole_page: None, run: Run, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost = plan.cost()
    facts = {"params": cost.deployed, "macs": cost.macs.total, "groups": plan.groups_to_list()}
    make(Path("r"), trial(0, 0.7, kind="uniform", **facts), STATIC)
    driver = Driver(monkeypatch, lambda: driver.end())
    assert run("r", "--watch", "--every", "3").code == 0
    assert driver.pages == [3]
    assert refresh_of(Path("r/report.html")) is None
    assert "resnet20" in Path("r/report.html").read_text(encoding="utf-8")


def test_json_writes_a_page_only_where_asked(run: Run) -> None:
    make(Path("r"), *ALL)
    run("r", "--json")
    assert not Path("r/report.html").exists()
    ran = run("r", "--json", "-o", "else.html")
    json.loads(ran.out)
    assert ran.err == "wrote else.html\n"
    assert Path("else.html").exists()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: object, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("kwsearch.files.write_whole", fail)


@pytest.mark.usefixtures("full_disk")
def test_a_page_that_cannot_be_written_is_one_line_after_the_summary(run: Run) -> None:
    make(Path("r"), *ALL)
    ran = run("r", "-o", "page.html")
    assert ran.code == 1
    assert ran.err == (
        "Error: cannot write page.html: No space left on device; -o names another file\n"
    )
    assert ran.lines[0].startswith("study r: ")
    assert "wrote" not in ran.out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("empty",), "empty holds no study: there is no study.journal in it"),
        (("missing",), "missing holds no study: there is no study.journal in it"),
        (("missing", "--watch"), "missing holds no study: there is no study.journal in it"),
        (("file",), "Directory 'file' is a file."),
        (("r", "-o", "r"), "File 'r' is a directory."),
        (("r", "-o", "nowhere/r.html"), "-o nowhere/r.html: there is no folder nowhere"),
        (("r", "-o", "r.txt"), "-o r.txt: its name ends in .html or .htm"),
        (("r", "--every", "3"), "--every: of --watch; give that, too"),
        (("r", "--watch", "--every", "0"), "0.0 is not in the range"),
        (("r", "--over", "time"), "'time' is not one of 'params', 'macs'"),
    ],
)
def test_what_is_asked_wrongly_is_one_message(
    run: Run, args: tuple[str, ...], message: str
) -> None:
    make(Path("r"), *ALL)
    Path("empty").mkdir()
    Path("file").touch()
    ran = run(*args)
    assert ran.code == 2
    assert message in ran.err
    assert ran.out == ""
    assert "Traceback" not in ran.err
    assert not Path("missing").exists()


# Watching -------------------------------------------------------------------------------------


class Driver:
    """Stands for the search that drives a study: a step of it for each time the watcher sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], object]) -> None:
        self.steps: Iterator[Callable[[], object]] = iter(steps)
        self.slept: list[float] = []
        self.reads = 0
        self.pages: list[int | None] = []
        monkeypatch.setattr(report, "sleep", self.sleep)
        take = snapshot.take

        def counting(directory: Path) -> snapshot.Snapshot:
            self.reads += 1
            return take(directory)

        monkeypatch.setattr(snapshot, "take", counting)
        self.lock = filelock.FileLock(Path("r") / LOCK)
        self.lock.acquire()

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.pages.append(refresh_of(Path("r/report.html")))
        next(self.steps)()

    def end(self) -> None:
        self.lock.release()


@contextlib.contextmanager
def begun_with(number: int, handler: Any) -> Iterator[None]:
    """As if the process had begun so: background jobs of a shell and of nohup ignore signals."""
    usual = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, usual)


def nothing() -> None:
    """Happens."""


def test_watching_prints_a_line_per_change_and_ends_with_the_study(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(Path("r"), UNIFORM, STATIC)

    def last() -> None:
        """The search ends right after a trial: the watcher must have that, too."""
        add(Path("r"), *ALL[3:])
        driver.end()

    driver = Driver(monkeypatch, nothing, lambda: add(Path("r"), OTHERS[0]), nothing, nothing, last)
    ran = run("r", "--watch", "--every", "0.5")
    assert ran.code == 0
    assert ran.lines[:2] == [
        "trials: 2 of 8 finished (2 complete); best: trial 0, 70.00% on 1000 held-out examples",
        "trials: 3 of 8 finished (3 complete); best: trial 0, 70.00% on 1000 held-out examples",
    ]
    assert ran.lines[2].startswith("study r: ")
    assert "trials: 8 of 8 finished (5 complete, 2 stopped, 1 failed)" in ran.lines
    assert ran.lines[-1] == "wrote r/report.html"
    # What did not change was not read again; the page stopped asking for news.
    assert driver.slept == [0.5] * 5
    assert driver.reads == 3
    assert driver.pages == [1] * 5
    assert refresh_of(Path("r/report.html")) is None


def test_the_events_of_a_study_in_a_database_are_changes_too(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(Path("r"), UNIFORM)

    def event() -> None:
        with open("r/events.ndjson", "a") as events:
            events.write("{}\n")

    driver = Driver(monkeypatch, event, nothing, lambda: driver.end())
    lines = run("r", "--watch").lines
    # It is read again, and says nothing new.
    assert lines[0].startswith("trials: 1 of 8 finished (1 complete); best: ")
    assert lines[1].startswith("study r: ")
    assert driver.reads == 3
    assert driver.slept == [2.0] * 3


def test_watching_a_study_that_is_over_is_a_report(run: Run) -> None:
    make(Path("r"), *ALL)
    once = run("r").out
    assert run("r", "--watch").out == once


def test_watching_as_json_is_a_line_per_change(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    make(Path("r"), UNIFORM)

    def more() -> None:
        add(Path("r"), STATIC)

    driver = Driver(monkeypatch, more, lambda: driver.end())
    monkeypatch.setattr(driver, "sleep", lambda seconds: next(driver.steps)())
    monkeypatch.setattr(report, "sleep", driver.sleep)
    found = [json.loads(line) for line in run("r", "--watch", "--json").out.splitlines()]
    assert [one["running"] for one in found] == [True, True, False]
    assert [one["states"]["complete"] for one in found] == [1, 2, 2]
    assert not Path("r/report.html").exists()


@pytest.mark.parametrize("terminal", [False, True])
def test_ctrl_c_ends_watching_and_leaves_a_page_that_rests(
    run: Run, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    make(Path("r"), UNIFORM)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    driver = Driver(monkeypatch, nothing, interrupt)
    with begun_with(signal.SIGINT, signal.default_int_handler):
        ran = run("r", "--watch", "--every", "7")
    assert ran.code == 130
    assert ran.err.strip() == "interrupted"
    assert driver.pages == [7, 7]
    assert refresh_of(Path("r/report.html")) is None
    driver.end()


@pytest.mark.parametrize("bad", [b"no record", b"\xc2\x00\xff"])
@pytest.mark.parametrize("command", ["report", "status", "trials"])
@pytest.mark.usefixtures("run")
def test_a_damaged_journal_is_said_with_its_line(
    capsys: pytest.CaptureFixture[str], bad: bytes, command: str
) -> None:
    make(Path("r"), UNIFORM)
    journal = Path("r/study.journal")
    lines = journal.read_bytes().splitlines()
    journal.write_bytes(b"\n".join([lines[0], bad, *lines[1:], b""]))
    assert cli.run([command, "r"]) == 2
    told = capsys.readouterr().err
    assert "study.journal:2: damaged, no record of a study; take a copy" in told


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="the system has no SIGHUP")
def test_watching_survives_its_terminal_if_that_was_asked_for(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As nohup asks."""
    make(Path("r"), UNIFORM)
    driver = Driver(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGHUP), lambda: driver.end())
    with begun_with(signal.SIGHUP, signal.SIG_IGN):
        assert run("r", "--watch").code == 0


def test_a_terminal_has_one_view_that_changes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    make(Path("r"), UNIFORM)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("LINES", "40")
    driver = Driver(
        monkeypatch, lambda: add(Path("r"), STATIC), lambda: add(Path("r"), OTHERS[1]),
        lambda: driver.end(),
    )  # fmt: skip
    ran = run("r", "--watch")
    assert ran.code == 0
    seen = [f"trials: {n} of 8 finished ({n} complete)" for n in (1, 2, 3)]
    places = [ran.out.index(line) for line in seen]
    assert places == sorted(places)
    assert ran.out.count("watching; r/report.html is kept up to date; Ctrl-C ends") >= 3
    # The view is wiped before all of it is printed once.
    end = ran.out.rindex("study r: not running")
    assert ran.out[:end].endswith("\x1b[1A\x1b[2K")
    assert "watching" not in ran.out[end:]
    assert "wrote r/report.html" in ran.out[end:]
    assert refresh_of(Path("r/report.html")) is None


@pytest.mark.parametrize("rows", [24, 40])
def test_the_plot_of_the_view_ends_on_the_screen(
    run: Run, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    unfinished = [trial(n, state="RUNNING", rung=0.3) for n in range(3, 7)]
    make(Path("r"), UNIFORM, STATIC, OTHERS[1], *unfinished)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("LINES", str(rows))
    monkeypatch.setenv("COLUMNS", "80")
    driver = Driver(monkeypatch, lambda: driver.end())
    out = run("r", "--watch").out
    view = out[out.index("watching;") : out.rindex("study r: not running")]
    lines = re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", view).splitlines()
    axis = next(i for i, line in enumerate(lines) if "+---" in line)
    assert axis + 2 < rows
    assert "* best" in lines[axis + 2]
    assert any("points against" in line for line in lines[:axis]) is (rows == 40)


@pytest.mark.parametrize("error", [OSError("the disk is gone"), ValueError("a slip of ours")])
def test_whatever_ends_watching_leaves_a_page_that_rests(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    make(Path("r"), UNIFORM)

    def fail() -> None:
        raise error

    driver = Driver(monkeypatch, nothing, fail)
    with contextlib.suppress(ValueError):
        assert run("r", "--watch").code == 1
    assert driver.pages == [2, 2]
    assert refresh_of(Path("r/report.html")) is None
    driver.end()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_so_does_a_request_to_end(run: Run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    make(Path("r"), UNIFORM)
    number = getattr(signal, name)

    def end() -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)

    driver = Driver(monkeypatch, end)
    with begun_with(number, signal.SIG_DFL):
        with pytest.raises(SystemExit) as ended:
            run("r", "--watch")
        assert ended.value.code == 128 + number
        assert refresh_of(Path("r/report.html")) is None
        assert signal.getsignal(number) == signal.SIG_DFL
    driver.end()


@pytest.mark.usefixtures("full_disk")
def test_a_page_that_cannot_be_written_ends_watching_at_once(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(Path("r"), UNIFORM)
    driver = Driver(monkeypatch)
    ran = run("r", "--watch", "-o", "x.html")
    assert ran.code == 1
    assert ran.err.startswith("Error: cannot write x.html: ")
    assert driver.slept == []
    driver.end()


# The end of a search --------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "shown"), [("90", True), ("59", False)])
def test_a_search_on_a_terminal_ends_with_the_plot(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    columns: str,
    shown: bool,
) -> None:
    from kwsearch.cli import optimize

    result = results.result_from(snapshot.take(make(tmp_path / "r", *ALL)))
    monkeypatch.setenv("COLUMNS", columns)
    optimize._print(result)
    assert "held-out accuracy over parameters" not in capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    optimize._print(result)
    assert ("held-out accuracy over parameters" in capsys.readouterr().out) is shown
