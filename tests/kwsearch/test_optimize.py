"""The study: trials on budget, resumed after a kill, none lost or doubled."""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from kwlayers.plan import Network, Plan, PlanError
from kwsearch import jobs, optimize, snapshot, study_report
from kwsearch import study as course
from kwsearch.dry_run import seconds_of
from kwsearch.executors import Cancelled, Event, Failed, Finished, Job, Reported
from kwsearch.executors.local import LocalExecutor
from kwsearch.recipe import Proxy, Recipe, load_recipe, parse_recipe
from kwsearch.resolve import network_of
from kwsearch.results import result_from
from kwsearch.rungs import as_rungs
from kwsearch.space import fingerprint
from kwsearch.trials import baseline, front, is_static

TEXT = """
format: 1
model: resnet20
budget: {total_ratio: 0.5}
search: {trials: 8, pruner: none, finalists: 0, space: {split: 2, sharing: [stage, layer]}}
proxy: {epochs: 3}
"""


class Quiet:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.finished: list[FrozenTrial] = []
        self.finals: list[tuple[int, int, dict[str, object]]] = []

    def start(self, trial: FrozenTrial, attempt: int, until: int) -> None: ...

    def epoch(self, number: int, step: int, accuracy: float) -> None: ...

    def pause(self, number: int, step: int, accuracy: float) -> None: ...

    def done(self, trial: FrozenTrial) -> None:
        self.finished.append(trial)

    def final(self, number: int, seed: int, result: dict[str, object]) -> None:
        self.finals.append((number, seed, result))

    def say(self, message: str) -> None:
        self.said.append(message)

    def known(self, trials: list[FrozenTrial]) -> None: ...


Objective = Callable[[Plan, Callable[[int, float], None]], float]


class Inline:
    """Runs one job at a time, here, with an objective in place of the training."""

    capacity = 1

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.job: Job | None = None
        self.events: list[Event] = []
        self.interrupt: KeyboardInterrupt | None = None

    @property
    def running(self) -> int:
        return int(self.job is not None)

    def submit(self, job: Job) -> None:
        assert self.job is None
        self.job = job

    def wait(self, timeout: float | None) -> list[Event]:
        assert self.job is not None
        if not self.events and not self.interrupt:
            self.run(self.job)
        if self.interrupt and not self.events:
            raise self.interrupt
        event = self.events.pop(0)
        if isinstance(event, (Finished, Failed, Cancelled)):
            self.job = None
        return [event]

    def run(self, job: Job) -> None:
        key = job.trial, job.attempt
        groups = job.arguments["trained"].groups
        if groups is None:  # the static twin
            self.events = [Finished(*key, 0.4)]
            return
        plan = Plan.from_groups(network(job.arguments["trained"].recipe), groups)

        def report(step: int, value: float) -> None:
            if step <= job.arguments.get("until", 99):
                self.events.append(Reported(*key, step, value))

        try:
            self.events.append(Finished(*key, self.objective(plan, report)))
        except KeyboardInterrupt as interrupt:
            self.interrupt = interrupt
        except Exception as error:
            kind = "diverged" if isinstance(error, ArithmeticError) else "error"
            self.events.append(Failed(*key, kind, f"{type(error).__name__}: {error}", ""))

    def cancel(self, trial: int) -> None:
        assert self.job is not None
        self.events = [Cancelled(trial, self.job.attempt)]

    def finish(self) -> None: ...

    def close(self) -> None: ...


@functools.lru_cache
def network(recipe: str) -> Network:
    return network_of(Recipe.model_validate_json(recipe))


def run(search: optimize.PlanStudy, objective: Objective) -> optimize.Result:
    return search.run(Inline(objective), "nowhere:nothing")


def score(plan: Plan, report: Callable[[int, float], None]) -> float:
    """A stand-in for training: a number that depends on the plan alone."""
    value = int(fingerprint(plan), 16) / 2**64
    for epoch in (1, 2, 3):
        report(epoch, value * epoch / 3)
    return value


def study(
    directory: Path, *overrides: str, resume: bool = False
) -> tuple[optimize.PlanStudy, Quiet]:
    watcher = Quiet()
    recipe = parse_recipe(TEXT, overrides=overrides)
    return optimize.PlanStudy(recipe, directory, resume=resume, watcher=watcher), watcher


def stored(directory: Path) -> list[FrozenTrial]:
    backend = JournalFileBackend(str(directory / optimize.JOURNAL))
    return optuna.load_study(study_name="kwsearch", storage=JournalStorage(backend)).get_trials()


def plans_of(trials: list[FrozenTrial]) -> list[str]:
    return [trial.user_attrs["fingerprint"] for trial in trials]


def test_every_trial_is_on_the_budget_and_no_plan_is_trained_twice(tmp_path: Path) -> None:
    search, watcher = study(tmp_path)
    result = run(search, score)
    assert [trial.number for trial in result.trials] == list(range(8))
    assert all(trial.state == TrialState.COMPLETE for trial in result.trials)
    # Half of the 272,474 parameters of the static network.
    assert all(0.97 * 136_237 < t.user_attrs["params"] <= 136_237 for t in result.trials)
    assert all(trial.constraints["params"] <= 0 for trial in result.trials)
    assert len(set(plans_of(list(result.trials)))) == 8
    assert len(watcher.finished) == 8


def test_trial_zero_is_the_uniform_plan(tmp_path: Path) -> None:
    search, _ = study(tmp_path, "search.trials=1")
    (trial,) = run(search, score).trials
    assert trial.user_attrs["groups"] == search.budgets[0].space.uniform.groups_to_list()


def test_best_yaml_is_the_recipe_with_the_plan_of_the_best_trial(tmp_path: Path) -> None:
    search, _ = study(tmp_path)
    result = run(search, score)
    best = max(result.trials, key=lambda trial: trial.values[0])
    assert result.budgets[0].best == best
    recipe = load_recipe(tmp_path / "best.yaml")
    assert recipe.plan is not None
    assert recipe.provenance["trial"] == best.number
    assert recipe.provenance["score"] == best.values[0]
    assert recipe.provenance["versions"]["optuna"] == optuna.__version__
    assert recipe.search == search.recipe.search
    import torch

    with torch.device("meta"):
        plan = recipe.plan_for(recipe.create_model())
    assert fingerprint(plan) == best.user_attrs["fingerprint"]
    assert plan.cost().params.total == best.user_attrs["params"]


def test_a_resumed_study_goes_on_to_its_total_and_repeats_nothing(tmp_path: Path) -> None:
    run(study(tmp_path, "search.trials=4")[0], score)
    before = stored(tmp_path)
    search, _ = study(tmp_path, "search.trials=9", resume=True)
    result = run(search, score)
    assert len(result.trials) == 9
    assert [t.params for t in result.trials[:4]] == [t.params for t in before]
    assert [t.datetime_complete for t in result.trials[:4]] == [t.datetime_complete for t in before]
    assert len(set(plans_of(list(result.trials)))) == 9


def test_an_interrupted_trial_is_trained_again_under_its_number(tmp_path: Path) -> None:
    calls = 0

    def interrupted(plan: Plan, report: Callable[[int, float], None]) -> float:
        nonlocal calls
        calls += 1
        if calls == 2:
            report(1, 0.5)
            raise KeyboardInterrupt
        return score(plan, report)

    search, _ = study(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(search, interrupted)
    left = stored(tmp_path)
    assert [trial.state for trial in left] == [TrialState.COMPLETE] * 2 + [TrialState.RUNNING]
    assert (tmp_path / "best.yaml").exists()
    search, watcher = study(tmp_path, resume=True)
    result = run(search, score)
    assert [trial.number for trial in result.trials] == list(range(8))
    assert all(trial.state == TrialState.COMPLETE for trial in result.trials)
    assert result.trials[2].params == left[2].params
    assert "trial 2 was interrupted after epoch 1: it goes on" in watcher.said


def test_a_trial_that_fails_is_recorded_with_its_reason_and_the_study_goes_on(
    tmp_path: Path,
) -> None:
    def sometimes(plan: Plan, report: Callable[[int, float], None]) -> float:
        if int(fingerprint(plan), 16) % 2:
            raise RuntimeError(f"out of memory for {fingerprint(plan)}")
        return score(plan, report)

    search, _ = study(tmp_path)
    trials = run(search, sometimes).trials
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    assert 0 < len(failed) < len(trials) == 8
    assert all(t.user_attrs["reason"].startswith("RuntimeError: out of memory") for t in failed)


def test_the_same_failure_three_times_stops_the_study(tmp_path: Path) -> None:
    def broken(plan: Plan, report: Callable[[int, float], None]) -> float:
        raise RuntimeError("no such device")

    search, _ = study(tmp_path)
    with pytest.raises(optimize.StudyFailed, match=r"3 trials in a row .* no such device"):
        run(search, broken)
    # 0, then 2 to 4 after the static twin, which finished.
    assert len(stored(tmp_path)) == 5


def test_a_hopeless_trial_is_pruned_and_the_uniform_plan_never(tmp_path: Path) -> None:
    number = iter(range(100))

    def worse_and_worse(plan: Plan, report: Callable[[int, float], None]) -> float:
        value = 1 / (1 + next(number))
        for epoch in (1, 2, 3):
            report(epoch, value)
        return value

    search, _ = study(tmp_path, "search.pruner=median")
    trials = run(search, worse_and_worse).trials
    assert trials[0].state == TrialState.COMPLETE
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    assert pruned
    assert all("pruned" in trial.user_attrs["reason"] for trial in pruned)
    # The temperature falls during epoch 1: nothing is decided before epoch 2.
    assert all(trial.last_step and trial.last_step >= 2 for trial in pruned)


def test_a_space_without_more_plans_stops_the_study(tmp_path: Path) -> None:
    search, watcher = study(tmp_path, "search.space={split: 1, sharing: [stage, layer]}")
    trials = run(search, score).trials
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 3
    assert [is_static(t) for t in trials] == [False, True, False]
    assert any("2 plans are trained and no other was found" in said for said in watcher.said)
    # Asked again, it says so again, and records nothing.
    search, _ = study(tmp_path, "search.space={split: 1, sharing: [stage, layer]}", resume=True)
    assert len(run(search, score).trials) == 3


def test_a_run_directory_is_not_overwritten(tmp_path: Path) -> None:
    run(study(tmp_path, "search.trials=1")[0], score)
    with pytest.raises(optimize.SearchError, match="holds a study already: --resume"):
        run(study(tmp_path)[0], score)


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    directory = tmp_path / "typo"
    for _ in ("there is no such folder", "it is empty"):
        with pytest.raises(
            optimize.SearchError, match=r"^nothing to resume in .*typo: leave --res"
        ):
            run(study(directory, resume=True)[0], score)
        assert not directory.exists() or not list(directory.iterdir())
        directory.mkdir(exist_ok=True)
    # A kill before the journal is there leaves these.
    (directory / "driver.lock").touch()
    (directory / ".0123.tmp").touch()
    search, watcher = study(directory, "search.trials=1", resume=True)
    run(search, score)
    assert f"{directory} has no trials yet: a new study" in watcher.said


def test_a_folder_of_other_files_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "b.png").touch()
    for resume in (False, True):
        with pytest.raises(optimize.SearchError, match=r"holds no study but b\.png: --run-dir for"):
            run(study(tmp_path, resume=resume)[0], score)
    (tmp_path / "a.png").touch()
    with pytest.raises(optimize.SearchError, match=r"holds no study but a\.png and 1 more: "):
        run(study(tmp_path)[0], score)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method={rules: [{layers: [x], static: true}]}", r": rule 1 \(x\): no convolution or"),
        ("budget={params: 1k}", "^override 'budget={params: 1k}': params 1,000: below the floor"),
        ("search.budgets=[0.01]", r"^override 'search.budgets=\[0.01\]': params 2,724: below the"),
        ("input=3x32", "^<string>:3:1: the model does not run on "),
        ("model={name: resnet20, num_classes: 4}", "set model.num_classes=10$"),
        ("proxy={data: ./nowhere}", "nowhere"),
    ],
)
def test_what_cannot_be_searched_leaves_no_folder(
    tmp_path: Path, override: str, message: str
) -> None:
    search, _ = study(tmp_path / "run", override, "search.trials=1")
    with pytest.raises(ValueError, match=message):
        search.run()
    assert not (tmp_path / "run").exists()


def test_a_study_is_not_resumed_with_another_recipe(tmp_path: Path) -> None:
    run(study(tmp_path, "search.trials=1")[0], score)
    with pytest.raises(
        optimize.SearchError,
        match=r"another recipe: budget\.ratio is nothing there and 1\.0 here; budget\.total_ratio "
        r"is 0\.5 there and nothing here; proxy\.epochs is \d there and 4 here\. Repeat",
    ):
        run(study(tmp_path, "proxy.epochs=4", "budget={ratio: 1}", resume=True)[0], score)


def test_a_full_disk_stops_the_study_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0

    def write(directory: Path, trials: list[FrozenTrial]) -> None:
        nonlocal written
        written += 1
        if written == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(course, "write_trials", write)
    with pytest.raises(optimize.StudyFailed, match=r"disk is full: .* make room and --resume"):
        run(study(tmp_path)[0], score)
    monkeypatch.undo()
    trials = run(study(tmp_path, resume=True)[0], score).trials
    assert [trial.number for trial in trials] == list(range(8))
    assert all(trial.state == TrialState.COMPLETE for trial in trials)


def test_two_processes_do_not_share_a_run_directory(tmp_path: Path) -> None:
    def nested(plan: Plan, report: Callable[[int, float], None]) -> float:
        before = (tmp_path / "recipe.lock.yaml").read_text()
        with pytest.raises(optimize.SearchError, match="another process is running the study"):
            run(study(tmp_path, "budget.total_ratio=0.9", resume=True)[0], score)
        assert (tmp_path / "recipe.lock.yaml").read_text() == before
        return score(plan, report)

    run(study(tmp_path, "search.trials=1")[0], nested)


def test_a_resumed_study_draws_what_an_uninterrupted_one_would(tmp_path: Path) -> None:
    straight = run(study(tmp_path / "a")[0], score)
    run(study(tmp_path / "b", "search.trials=3")[0], score)
    resumed = run(study(tmp_path / "b", resume=True)[0], score)
    assert [t.params for t in resumed.trials] == [t.params for t in straight.trials]


def test_a_score_that_is_no_number_is_pruned_with_its_reason(tmp_path: Path) -> None:
    def sometimes(plan: Plan, report: Callable[[int, float], None]) -> float:
        return float("nan") if int(fingerprint(plan), 16) % 2 else score(plan, report)

    trials = run(study(tmp_path)[0], sometimes).trials
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    assert pruned
    assert {trial.user_attrs["reason"] for trial in pruned} == {"the score is nan"}


def test_halving_stops_at_rungs_once_they_are_known_to_rank(tmp_path: Path) -> None:
    search, _ = study(tmp_path, "search.pruner=halving", "search.trials=20", "proxy.epochs=9")
    assert [rung.step for rung in search.rungs] == [3, 9]

    def nine(plan: Plan, report: Callable[[int, float], None]) -> float:
        value = int(fingerprint(plan), 16) / 2**64
        for epoch in range(1, 10):
            report(epoch, value)
        return value

    trials = run(search, nine).trials
    assert len(trials) == 20
    assert all(trial.state == TrialState.COMPLETE for trial in trials[:6])
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    assert pruned
    assert {trial.last_step for trial in pruned} == {3}


def test_every_sampler_fills_a_study(tmp_path: Path) -> None:
    for sampler in ("tpe", "gp", "nsgaii", "random"):
        search, _ = study(tmp_path / sampler, f"search.sampler={sampler}", "search.startup=3")
        trials = run(search, score).trials
        assert len(set(plans_of(list(trials)))) == 8


def test_a_deterministic_study_has_no_median(tmp_path: Path) -> None:
    with pytest.raises(optimize.SearchError, match="decides at rungs"):
        study(tmp_path, "search.pruner=median", "search.deterministic=true")


def test_the_temperature_is_part_of_what_is_trained(tmp_path: Path) -> None:
    with pytest.raises(optimize.SearchError, match="4 is more than"):
        study(tmp_path, "search.space.temperature_epochs=[4]")
    # One plan, two temperatures.
    space = "search.space={split: 1, temperature_epochs: [2]}"
    trials = run(study(tmp_path, space)[0], score).trials
    plans = [t for t in trials if not is_static(t)]
    assert len(plans) == 2
    assert plans[0].user_attrs["groups"] == plans[1].user_attrs["groups"]
    assert [t.user_attrs.get("temperature_epochs") for t in plans] == [None, 2]


def test_rungs_that_do_not_lead_to_the_full_trial_are_refused(tmp_path: Path) -> None:
    with pytest.raises(optimize.SearchError, match="the last rung must be the full trial"):
        study(tmp_path, "search.pruner=halving", "search.rungs=[{epochs: 2}]")


def test_a_recipe_whose_groups_have_ratios_of_their_own_is_not_searched(tmp_path: Path) -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "recipes/kw_mobilenetv2_050_0.5x.yaml")
    with pytest.raises(PlanError, match=r"ratios of their own \(0\.5, 1\)"):
        optimize.PlanStudy(recipe, tmp_path, resume=False, watcher=Quiet())


def test_the_command_searches_interrupts_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kwsearch import cli

    def interrupted(*args: object) -> list[Event]:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(
        "format: 1\nmodel: resnet20\nbudget: {params: 60k}\nsearch: {trials: 2}\n"
        "proxy: {resolution: 8, epochs: 1, subset: 60, batch_size: 24, lr: 0.05, threads: 1}\n"
    )
    with monkeypatch.context() as patch:
        patch.setattr(optimize.PlanStudy, "_check_memory", interrupted)
        assert cli.run(["optimize", "tiny.yaml"]) == 130
    assert capsys.readouterr().err.endswith("interrupted; nothing had begun\n")
    assert not Path("runs").exists()
    assert cli.run(["optimize", "tiny.yaml", "--trials", "1"]) == 0
    first = capsys.readouterr()
    assert "resnet20 on digits: 1 trial, study in runs/tiny\n" in first.err
    assert "0 (uniform)" in first.out
    assert "the uniform plan: no other plan has finished" in first.out
    assert "trial 0 (uniform): " in first.err
    assert cli.run(["optimize", "tiny.yaml"]) == 2
    assert "--resume to go on" in capsys.readouterr().err

    wait = LocalExecutor.wait
    monkeypatch.setattr(LocalExecutor, "wait", interrupted)
    assert cli.run(["optimize", "tiny.yaml", "--resume"]) == 130
    assert "nothing is lost: add --resume" in capsys.readouterr().err
    monkeypatch.setattr(LocalExecutor, "wait", wait)
    assert cli.run(["optimize", "tiny.yaml", "--resume", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(t["number"], t["state"]) for t in result["trials"]] == [
        (0, "complete"),
        (1, "complete"),
    ]
    recipe = load_recipe("runs/tiny/best.yaml")
    assert str(recipe.provenance["data"]).startswith("digits ")
    assert load_recipe("runs/tiny/recipe.lock.yaml").provenance["seed"] == 0


def test_a_search_in_which_nothing_finishes_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kwsearch import cli

    monkeypatch.chdir(tmp_path)
    Path("wild.yaml").write_text(
        "format: 1\nmodel: resnet20\nbudget: {params: 60k}\nsearch: {trials: 2}\n"
        "proxy: {resolution: 8, epochs: 1, subset: 60, batch_size: 16, lr: 1e30, threads: 1}\n"
    )
    assert cli.run(["optimize", "wild.yaml"]) == 1
    shown = capsys.readouterr()
    assert "no trial finished: nothing to choose" in shown.out
    assert "trial 0 (uniform): Diverged: the loss became nan in epoch 1" in shown.err


def test_a_torn_last_line_is_reported_and_survived(tmp_path: Path) -> None:
    run(study(tmp_path, "search.trials=3")[0], score)
    with open(tmp_path / optimize.JOURNAL, "ab") as journal:
        journal.write(b'{"op_code": 4, "wor')
    search, watcher = study(tmp_path, "search.trials=5", resume=True)
    assert len(run(search, score).trials) == 5
    assert "the last line of the journal was torn and is dropped" in watcher.said


def test_a_recipe_without_a_budget_cannot_be_searched(tmp_path: Path) -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "recipes/kw_resnet18_1x.yaml")
    bare = Recipe.model_validate({**recipe.to_dict(), "budget": None})
    with pytest.raises(optimize.SearchError, match="no budget to search under"):
        optimize.PlanStudy(bare, tmp_path, resume=False, watcher=Quiet())


def test_too_few_classes_are_found_before_the_first_trial(tmp_path: Path) -> None:
    search, _ = study(tmp_path, "model={name: resnet20, num_classes: 4}", "proxy.resolution=8")
    with pytest.raises(optimize.SearchError, match="digits has 10 classes, the model 4"):
        search.run()
    assert not (tmp_path / optimize.JOURNAL).exists()


def test_a_timeout_stops_and_can_be_resumed(tmp_path: Path) -> None:
    def slow(plan: Plan, report: Callable[[int, float], None]) -> float:
        time.sleep(0.1)
        return score(plan, report)

    search, watcher = study(tmp_path, "search.timeout=0.05")
    assert len(run(search, slow).trials) == 1
    assert "time is up; --resume goes on" in watcher.said
    assert len(run(study(tmp_path, resume=True)[0], score).trials) == 8


KILLED = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import test_optimize

    def slow(plan, report):
        for epoch in (1, 2, 3):
            time.sleep(0.05)
            report(epoch, 0.1 * epoch)
        return test_optimize.score(plan, lambda *a: None)

    directory = Path({directory!r})
    begun = (directory / "study.journal").exists()
    test_optimize.run(test_optimize.study(directory, resume=begun)[0], slow)
"""


@pytest.mark.slow  # test_kills.py kills workers, too
def test_a_killed_study_ends_with_its_trials_none_lost_or_doubled(tmp_path: Path) -> None:
    script = textwrap.dedent(
        KILLED.format(tests=str(Path(__file__).parent), directory=str(tmp_path))
    )
    kills = 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
        goal = len(_numbers(tmp_path)) + 2
        deadline = time.monotonic() + 60
        while len(_numbers(tmp_path)) < goal and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 2
    result = run(study(tmp_path, resume=True)[0], score)
    assert [trial.number for trial in result.trials] == list(range(8))
    assert all(trial.state == TrialState.COMPLETE for trial in result.trials)
    assert len(set(plans_of(list(result.trials)))) == 8


def _numbers(directory: Path) -> list[str]:
    """Trials in the journal, without taking part in it."""
    journal = directory / optimize.JOURNAL
    return (
        [line for line in journal.read_text().splitlines() if '"op_code":4' in line]
        if (journal.exists())
        else []
    )


@pytest.mark.slow
def test_the_quick_start_search_survives_a_kill(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes/quickstart.yaml"
    command = [sys.executable, "-m", "kwsearch", "optimize", str(recipe), "--run-dir", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not (tmp_path / "run/study.journal").exists() or len(_numbers(tmp_path / "run")) < 4:
        assert process.poll() is None
        time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(
        [*command, "--resume", "--json"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert [trial["number"] for trial in result["trials"]] == list(range(10))
    assert len({trial["fingerprint"] for trial in result["trials"]}) == 10
    assert result["trials"][0]["state"] == "complete"
    assert load_recipe(tmp_path / "run/best.yaml").plan is not None


FINALS = ("search.finalists=2", "search.seeds=3")


class Finals(Inline):
    """Scores a final training by its plan and its seed."""

    def run(self, job: Job) -> None:
        if not job.function.endswith("final"):
            super().run(job)
            return
        trained = job.arguments["trained"]
        value = 0.5 if trained.groups is None else 0.6 + trained.seed / 2**32 / 100
        if trained.groups is not None:
            plan = Plan.from_groups(network(trained.recipe), trained.groups)
            value += int(fingerprint(plan), 16) / 2**64 / 10
        self.events = [Finished(job.trial, job.attempt, {"valid": value, "test": value - 0.01})]


def finals_of(directory: Path, *overrides: str, resume: bool = False) -> optimize.Result:
    search, _ = study(directory, *FINALS, *overrides, resume=resume)
    return search.run(Finals(score), "nowhere:trial", "nowhere:final")


def test_the_best_plans_and_the_baselines_are_trained_again_by_the_same_seeds(
    tmp_path: Path,
) -> None:
    result = finals_of(tmp_path)
    assert result.budgets[0].finals is not None
    found = result.budgets[0].finals.accuracies
    plans = [t for t in result.trials if t.number > 1]
    top = sorted(plans, key=lambda t: -t.values[0])[:2]
    assert set(found) == {"uniform plan", "static network", *(f"trial {t.number}" for t in top)}
    assert all(list(runs) == [0, 1, 2] for runs in found.values())
    # The same seeds for all: differences between plans do not depend on the seed.
    one, other = (found[f"trial {t.number}"] for t in top)
    assert len({round(one[seed] - other[seed], 9) for seed in (0, 1, 2)}) == 1
    assert result.budgets[0].finals.split == "test"
    assert found["static network"] == dict.fromkeys((0, 1, 2), 0.49)


def test_best_yaml_says_the_verdict(tmp_path: Path) -> None:
    result = finals_of(tmp_path)
    text = (tmp_path / "best.yaml").read_text()
    recipe = load_recipe(tmp_path / "best.yaml")
    assert result.budgets[0].finals is not None
    assert result.budgets[0].finals.verdict is not None
    assert "winner" in str(recipe.provenance["verdict"])
    assert "On test examples, 3 seeds each:" in text
    assert recipe.provenance["trial"] == result.budgets[0].finals.best


def test_status_says_the_best_of_the_finals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from kwsearch import cli

    class Upset(Finals):
        """The finals turn the order of the search round."""

        def run(self, job: Job) -> None:
            super().run(job)
            if job.function.endswith("final"):
                (event,) = self.events
                assert isinstance(event, Finished)
                value = 1 - event.value["test"]
                self.events = [Finished(job.trial, job.attempt, {"valid": value, "test": value})]

    search, _ = study(tmp_path, *FINALS)
    (found,) = search.run(Upset(score), "nowhere:trial", "nowhere:final").budgets
    assert found.best is not None
    assert found.best != max((t for t in found.trials if t.values), key=lambda t: t.values[0])
    assert cli.run(["status", str(tmp_path), "--json"]) == 0
    (best,) = json.loads(capsys.readouterr().out)["best"]
    assert best["number"] == found.best.number


def test_finals_decide_once_every_finalist_has_a_result(tmp_path: Path) -> None:
    class Interrupted(Finals):
        """The finals turn the order of the search round, and end after two trainings."""

        count = 0

        def run(self, job: Job) -> None:
            final = job.function.endswith("final")
            self.count += final
            if self.count == 3:
                raise KeyboardInterrupt
            super().run(job)
            if final:
                value = 0.1 * self.count
                self.events = [Finished(job.trial, job.attempt, {"valid": value, "test": value})]

    search, _ = study(tmp_path, *FINALS)
    with pytest.raises(KeyboardInterrupt):
        search.run(Interrupted(score), "nowhere:trial", "nowhere:final")
    (found,) = result_from(snapshot.take(tmp_path)).budgets
    assert found.finals is not None
    assert sorted(map(len, found.finals.accuracies.values())) == [1, 1]
    plans = [trial for trial in found.trials if trial.values and not is_static(trial)]
    assert found.best is not None
    assert found.best.number == max(plans, key=lambda trial: trial.values[0]).number


def test_finals_are_taken_up_where_they_were_left(tmp_path: Path) -> None:
    class Interrupted(Finals):
        count = 0

        def run(self, job: Job) -> None:
            if job.function.endswith("final"):
                self.count += 1
                if self.count == 6:
                    raise KeyboardInterrupt
            super().run(job)

    search, _ = study(tmp_path, *FINALS)
    with pytest.raises(KeyboardInterrupt):
        search.run(Interrupted(score), "nowhere:trial", "nowhere:final")
    search, watcher = study(tmp_path, *FINALS, resume=True)
    result = search.run(Finals(score), "nowhere:trial", "nowhere:final")
    assert "verdict: 2 finalists and 2 baselines, 3 seeds each: 7 trainings in full" in watcher.said
    assert result.budgets[0].finals is not None
    assert all(len(runs) == 3 for runs in result.budgets[0].finals.accuracies.values())


def test_a_final_training_that_fails_is_left_out_of_the_verdict(tmp_path: Path) -> None:
    class Broken(Finals):
        def run(self, job: Job) -> None:
            if job.function.endswith("final") and job.arguments["trained"].groups is None:
                self.events = [Failed(job.trial, job.attempt, "error", "KeyError: 'x'", "")]
            else:
                super().run(job)

    search, watcher = study(tmp_path, *FINALS, "search.seeds=2")
    result = search.run(Broken(score), "nowhere:trial", "nowhere:final")
    assert result.budgets[0].finals is not None
    assert "static network" not in result.budgets[0].finals.accuracies
    assert [result for _, _, result in watcher.finals if "error" in result] == [
        {"error": "KeyError: 'x'"}
    ] * 2
    # A third of the same ends it.
    search, _ = study(tmp_path, *FINALS, "search.seeds=5", resume=True)
    with pytest.raises(optimize.StudyFailed, match="3 final trainings failed with the same"):
        search.run(Broken(score), "nowhere:trial", "nowhere:final")


def test_a_final_training_that_failed_is_tried_again_by_the_next_run(tmp_path: Path) -> None:
    class Full(Finals):
        def run(self, job: Job) -> None:
            message = "OSError: [Errno 28] No space left on device"
            self.events = [Failed(job.trial, job.attempt, "error", message, "")]
            if not job.function.endswith("final"):
                super().run(job)

    search, _ = study(tmp_path, *FINALS)
    with pytest.raises(optimize.StudyFailed, match=r"the disk is full: .* make room and --resume"):
        search.run(Full(score), "nowhere:trial", "nowhere:final")
    found = finals_of(tmp_path, resume=True).budgets[0].finals
    assert found is not None
    assert all(len(runs) == 3 for runs in found.accuracies.values())


def test_time_that_is_up_in_the_finals_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(Finals):
        """The first final training takes all the time that is left."""

        def run(self, job: Job) -> None:
            if job.function.endswith("final"):
                monkeypatch.setattr(time, "monotonic", lambda: 1e12)
            super().run(job)

    search, watcher = study(tmp_path, *FINALS, "search.timeout=1e9")
    search.run(Late(score), "nowhere:trial", "nowhere:final")
    assert len(watcher.finals) == 1
    assert "time is up; --resume goes on" in watcher.said


def test_a_plan_that_was_trained_twice_is_one_finalist(tmp_path: Path) -> None:
    space = "search.space={split: 1, sharing: [stage, layer]}"
    result = finals_of(tmp_path, space, "search.repeat=true", "search.trials=10")
    plans = [t for t in result.trials if not is_static(t)]
    assert len(set(plans_of(plans))) == 2
    found = result.budgets[0].finals
    assert found is not None
    assert len(found.accuracies) == 3  # the other plan, uniform, static


class Interrupting(Finals):
    """Ctrl-C while the second final training runs."""

    count = 0

    def wait(self, timeout: float | None) -> list[Event]:
        if self.job is not None and self.job.function.endswith("final") and not self.events:
            self.count += 1
            if self.count == 2:
                os.kill(os.getpid(), signal.SIGINT)
        return super().wait(timeout)


def test_ctrl_c_lets_final_trainings_finish(tmp_path: Path) -> None:
    search, watcher = study(tmp_path, *FINALS)
    with pytest.raises(KeyboardInterrupt):
        search.run(Interrupting(score), "nowhere:trial", "nowhere:final")
    assert len(watcher.finals) == 2
    assert "stopping: trainings that run finish; Ctrl-C again stops now" in watcher.said
    search, watcher = study(tmp_path, *FINALS, resume=True)
    search.run(Finals(score), "nowhere:trial", "nowhere:final")
    assert len(watcher.finals) == 4 * 3 - 2


SWEEP = ("search.budgets=[0.5, 0.7, 1]", "search.trials=24")


def test_a_sweep_has_its_baselines_and_its_best_under_every_budget(tmp_path: Path) -> None:
    search, _ = study(tmp_path, *SWEEP)
    result = run(search, score)
    assert [trial.number for trial in result.trials] == list(range(24))
    budgets = {found.budget: found for found in result.budgets}
    assert list(budgets) == [0.5, 0.7, 1]
    # Of the 272,474 parameters of the static network; each as often as the others.
    for ratio, found in budgets.items():
        allowed = int(ratio * 272_474)
        assert len(found.trials) == 8
        assert [baseline(trial) for trial in found.trials[:2]] == ["uniform", "static"]
        assert all(baseline(trial) is None for trial in found.trials[2:])
        assert all(t.user_attrs["params"] <= allowed for t in found.trials)
        plans = [t for t in found.trials if not is_static(t)]
        assert all(t.user_attrs["params"] > 0.99 * allowed for t in plans)
        assert found.best_path == tmp_path / f"best_{ratio:g}.yaml"
        recipe = load_recipe(found.best_path)
        assert recipe.budget is not None
        assert recipe.budget.total_ratio == ratio
        assert recipe.search is not None
        assert recipe.search.budgets == ()
        assert recipe.provenance["trial"] == max(plans, key=lambda t: t.values[0]).number


def test_the_recipe_of_a_trial_of_a_sweep_has_its_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from kwsearch import cli

    run(study(tmp_path / "run", "search.budgets=[0.5, 1]", "search.trials=2")[0], score)
    written = tmp_path / "second.yaml"
    assert cli.run(["show", str(tmp_path / "run"), "1", "-o", str(written)]) == 0
    assert cli.run(["validate", str(written)]) == 0
    # The second budget's uniform plan, over the half that the study's own recipe names.
    recipe = load_recipe(written)
    assert recipe.budget is not None
    assert recipe.budget.total_ratio == 1
    assert recipe.search is not None
    assert recipe.search.budgets == ()


def test_a_sweep_tries_what_was_best_under_the_next_budget(tmp_path: Path) -> None:
    search, _ = study(tmp_path, *SWEEP)

    def not_uniform(plan: Plan, report: Callable[[int, float], None]) -> float:
        uniform = {fingerprint(budget.space.uniform) for budget in search.budgets}
        return 0.1 if fingerprint(plan) in uniform else score(plan, report)

    found = run(search, not_uniform).budgets
    # The third trial of a budget is the first chance to learn; the first budget comes first.
    later = found[1].trials[2]
    before = [t for t in found[0].trials + found[2].trials if t.number < later.number]
    assert later.params in [trial.params for trial in before]
    assert later.params != found[1].trials[0].params
    assert later.user_attrs["fingerprint"] not in [t.user_attrs["fingerprint"] for t in before]


def test_a_resumed_sweep_draws_what_an_uninterrupted_one_would(tmp_path: Path) -> None:
    straight = run(study(tmp_path / "a", *SWEEP)[0], score)
    run(study(tmp_path / "b", SWEEP[0], "search.trials=10")[0], score)
    resumed = run(study(tmp_path / "b", *SWEEP, resume=True)[0], score)
    assert [t.params for t in resumed.trials] == [t.params for t in straight.trials]


def test_a_budget_without_more_plans_leaves_the_others_to_go_on(tmp_path: Path) -> None:
    space = "search.space={split: 1, sharing: [stage, layer], temperature_epochs: [2]}"
    search, watcher = study(tmp_path, *SWEEP, space)
    trials = run(search, score).trials
    # Two ways to share and two temperatures, and a static network each.
    assert len(trials) == 3 * 5
    assert sum("4 plans are trained and no other was found" in said for said in watcher.said) == 3


def test_budgets_of_a_sweep_are_of_the_budgets_kind(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"budgets: not a count .*budget has params"):
        study(tmp_path, "budget={params: 200k}", "search.budgets=[0.5, 150k]")
    search, _ = study(tmp_path, "budget={params: 200k}", "search.budgets=[150k, 200k]")
    assert [target.params for target in search.targets.values()] == [150_000, 200_000]
    with pytest.raises(optimize.SearchError, match="nsgaii breeds one population"):
        study(tmp_path, *SWEEP, "search.sampler=nsgaii")


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_samplers_of_a_sweep_see_their_own_budget_only(tmp_path: Path, sampler: str) -> None:
    """How accurate the plans of another budget are changes nothing but which is best there."""

    def run_with(folder: str, scale: float) -> list[dict[str, object]]:
        def scaled(plan: Plan, report: Callable[[int, float], None]) -> float:
            large = plan.cost().params.total > 0.6 * 272_474
            return score(plan, report) * (scale if large else 1)

        overrides = ("search.budgets=[0.5, 1]", "search.trials=16", "search.startup=3")
        search, _ = study(tmp_path / folder, *overrides, f"search.sampler={sampler}")
        return [t.params for t in run(search, scaled).budgets[0].trials]

    assert run_with("a", 1.0) == run_with("b", 0.001)


def test_a_static_network_does_not_blind_the_samplers(tmp_path: Path) -> None:
    """It has no parameters, and gp models what all trials have."""
    names = ("random", "gp")
    drawn = {
        name: [
            t.params
            for t in run(
                study(tmp_path / name, f"search.sampler={name}", "search.startup=0", SPLIT)[0],
                score,
            ).trials
        ]
        for name in names
    }
    assert drawn["random"] != drawn["gp"]


SPLIT = "search.space={split: 2}"


def test_the_median_is_that_of_the_own_budget(tmp_path: Path) -> None:
    def by_size(plan: Plan, report: Callable[[int, float], None]) -> float:
        value = plan.cost().params.total / 1e6 + score(plan, lambda *a: None) / 1000
        for epoch in (1, 2, 3):
            report(epoch, value)
        return value

    overrides = ("search.budgets=[0.5, 1]", "search.trials=24", "search.pruner=median")
    small, large = run(study(tmp_path, *overrides)[0], by_size).budgets
    # Every small plan is worse than every large one; about half of each are pruned.
    for found in (small, large):
        states = [trial.state for trial in found.trials]
        assert 6 <= states.count(TrialState.COMPLETE) <= 11


def test_an_even_start_spreads_over_the_choices_whoever_asks(tmp_path: Path) -> None:
    overrides = (
        "search.trials=10",
        "search.space={split: 2, sharing: [stage, layer], cell_ratio: [1, 0.5]}",
    )
    chosen = [
        [t.params for t in run(study(tmp_path / f"{i}", *overrides, more)[0], score).trials]
        for i, more in enumerate(("search.deterministic=false", "search.deterministic=true"))
    ]
    assert chosen[0][:8] == chosen[1][:8]
    # Six points of a Sobol sequence, of which any aligned four have each quarter once.
    quarters = {(p["sharing"], p["cell_ratio"]) for p in chosen[0][4:8]}
    assert len(quarters) == 4


def test_any_seed_will_do(tmp_path: Path) -> None:
    for seed in (12345, 2**32 - 1):
        run(study(tmp_path / str(seed), f"search.seed={seed}", "search.startup=3")[0], score)


def test_a_stopped_trial_has_no_accuracy(tmp_path: Path) -> None:
    search, _ = study(tmp_path, *ZERO, "search.rungs=[{epochs: 3}]")
    result = search.run(Scored(score, lambda value: 1e9 * value), "nowhere:nothing")
    stopped = [t for t in result.trials if t.state == TrialState.PRUNED]
    assert stopped
    assert all(study_report.trial_json(trial)["score"] is None for trial in stopped)
    rows = (tmp_path / "trials.csv").read_text().splitlines()
    assert all(row.split(",")[4] == "" for row in rows if ",pruned," in row)
    told = [json.loads(line) for line in (tmp_path / "events.ndjson").read_text().splitlines()]
    done = {event["trial"]: event["accuracy"] for event in told if event["event"] == "done"}
    assert all(done[trial.number] is None for trial in stopped)


def test_the_temperature_of_a_short_phase_ends_with_it(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    class Seen(Inline):
        def run(self, job: Job) -> None:
            proxy = Proxy.model_validate_json(job.arguments["trained"].proxy)
            seen.append((proxy.epochs, proxy.temperature_epochs))
            super().run(job)

    search, _ = study(
        tmp_path,
        "search.pruner=halving",
        "search.trials=1",
        "proxy={epochs: 9, temperature_epochs: 4}",
        "search.rungs=[{epochs: 2, subset: 100}, {epochs: 9}]",
    )
    search.run(Seen(score), "nowhere:nothing")
    assert seen == [(2, 2), (9, 4)]


class Killed(BaseException):
    """The driver dies here."""


KILLS = {
    "tpe": ("search.trials=6", "search.startup=3"),
    "sweep": ("search.budgets=[0.5, 1]", "search.trials=9", "search.startup=3"),
    "repeat": (
        "search.space={split: 1, sharing: [stage, layer]}",
        "search.repeat=true",
        "search.trials=6",
    ),
    "generations": (
        "search.pruner=halving",
        "search.deterministic=true",
        "search.zero_cost=synflow",
        "search.rungs=[{epochs: 1, subset: 50}, {epochs: 3}]",
        "search.calibration=3",
        "search.trials=11",
    ),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] * (case in ("sweep", "generations")))
        for case in KILLS
    ],
)
def test_a_study_killed_at_any_write_ends_like_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Every 11th write to the journal here; the slow run kills at every one."""
    kill_at_writes(tmp_path, monkeypatch, case, 11)


@pytest.mark.slow
@pytest.mark.parametrize("case", KILLS)
def test_a_study_killed_at_every_write_ends_like_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    kill_at_writes(tmp_path, monkeypatch, case, 1)


def kill_at_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, stride: int) -> None:
    append = JournalFileBackend.append_logs
    writes, last = 0, 10**9

    def counted(self: JournalFileBackend, logs: list[dict[str, object]]) -> None:
        nonlocal writes
        if writes >= last:
            raise Killed
        writes += 1
        append(self, logs)

    monkeypatch.setattr(JournalFileBackend, "append_logs", counted)

    def outcome(directory: Path) -> list[tuple[object, ...]]:
        search, _ = study(directory, *KILLS[case], resume=directory.exists())
        trials = search.run(Scored(score, lambda value: value), "nowhere:nothing").trials
        return [(t.number, t.params, t.state, t.values, t.user_attrs.get("kind")) for t in trials]

    whole = outcome(tmp_path / "whole")
    total = writes
    assert total > 30
    for kill in range(1, total, stride):
        writes, last = 0, kill
        with pytest.raises(Killed):
            outcome(tmp_path / str(kill))
        last = 10**9
        assert outcome(tmp_path / str(kill)) == whole, f"killed at write {kill}"


class Scored(Inline):
    """Scores before training: `how` of the plan's accuracy."""

    def __init__(self, objective: Objective, how: Callable[[float], float]) -> None:
        super().__init__(objective)
        self.how = how

    def run(self, job: Job) -> None:
        if job.function != jobs.SCORING:
            super().run(job)
            return
        trained = job.arguments["trained"]
        value = 0.4
        if trained.groups is not None:
            plan = Plan.from_groups(network(trained.recipe), trained.groups)
            value = score(plan, lambda step, value: None)
        found = {"value": self.how(value), "scores": {job.arguments["name"]: self.how(value)}}
        self.events = [Finished(job.trial, job.attempt, found)]


ZERO = ("search.pruner=halving", "search.zero_cost=synflow", "search.trials=20", "proxy.epochs=3")


def test_a_score_that_ranks_stops_trials_before_they_train(tmp_path: Path) -> None:
    search, _ = study(tmp_path, *ZERO, "search.rungs=[{epochs: 3}]")
    assert [rung.step for rung in search.rungs] == [0, 3]
    trials = search.run(Scored(score, lambda value: 1e9 * value), "nowhere:nothing").trials
    assert len(trials) == 20
    assert all(trial.state == TrialState.COMPLETE for trial in trials[:6])
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    assert pruned
    assert {trial.last_step for trial in pruned} == {0}
    assert all(t.user_attrs["reason"].startswith("stopped before training: ") for t in pruned)
    assert all("synflow" in trial.user_attrs["scores"] for trial in trials)


def test_a_score_that_misleads_stops_nothing_and_is_called_out(tmp_path: Path) -> None:
    search, _ = study(tmp_path, *ZERO, "search.rungs=[{epochs: 3}]")
    result = search.run(Scored(score, lambda value: -value), "nowhere:nothing")
    assert all(trial.state == TrialState.COMPLETE for trial in result.trials)
    (line,) = study_report.trust_lines(result)
    assert line.startswith("score synflow: tau -1.00 over 19 trials: poor")


def test_a_trial_interrupted_before_its_score_is_scored_when_it_goes_on(tmp_path: Path) -> None:
    class Interrupted(Scored):
        def run(self, job: Job) -> None:
            if job.trial == 2:
                self.interrupt = KeyboardInterrupt()
            else:
                super().run(job)

    with pytest.raises(KeyboardInterrupt):
        study(tmp_path, *ZERO)[0].run(Interrupted(score, abs), "nowhere:nothing")
    trials = study(tmp_path, *ZERO, resume=True)[0].run(Scored(score, abs), "nowhere:x").trials
    assert 0 in trials[2].intermediate_values
    assert trials[2].state == TrialState.COMPLETE


def test_a_score_is_a_rung_and_needs_rungs(tmp_path: Path) -> None:
    with pytest.raises(optimize.SearchError, match=r"zero_cost is a rung: set search\.pruner"):
        study(tmp_path, "search.zero_cost=synflow")


def test_a_plan_is_trained_again_on_purpose_with_another_seed(tmp_path: Path) -> None:
    seeds: dict[int, int] = {}

    class Seeds(Inline):
        def run(self, job: Job) -> None:
            seeds[job.trial] = job.arguments["trained"].seed
            super().run(job)

    search, _ = study(tmp_path, "search.space={split: 1}", "search.repeat=true", "search.trials=5")
    trials = search.run(Seeds(score), "nowhere:nothing").trials
    plans = [trial for trial in trials if not is_static(trial)]
    assert len({trial.user_attrs["fingerprint"] for trial in plans}) == 1
    assert [trial.user_attrs.get("again", 0) for trial in plans] == [0, 1, 2, 3]
    assert len(set(seeds.values())) == 5


def finished(number: int, accuracy: float, params: int, macs: int) -> FrozenTrial:
    trial = optuna.trial.create_trial(
        value=accuracy, user_attrs={"params": params, "macs": macs, "budget": 1.0}
    )
    trial.number = number
    return trial


def test_the_front_holds_what_no_other_trial_beats() -> None:
    trials = [
        finished(0, 0.90, 100, 50),
        finished(1, 0.89, 100, 50),  # beaten by 0
        finished(2, 0.89, 100, 40),  # fewer MACs
        finished(3, 0.95, 200, 50),  # more accurate
        finished(4, 0.95, 200, 50),  # as good as 3
        finished(5, 0.94, 300, 60),  # beaten by 3
        finished(6, 0.10, 10, 5),  # the smallest
    ]
    assert [trial.number for trial in front(trials)] == [6, 0, 2, 3, 4]


@pytest.mark.slow
def test_a_dry_run_needs_no_data_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kwsearch import cli

    monkeypatch.chdir(tmp_path)
    text = TEXT.replace("epochs: 3", "epochs: 3, resolution: 8, batch_size: 2, data: ./nowhere")
    Path("dry.yaml").write_text(text)
    assert cli.run(["optimize", "dry.yaml", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["valid_share"] == 1.0
    assert found["combinations"] == 2
    assert found["warehouses"] == [3, 20]
    assert found["train_images"] is None
    assert found["most_seconds"] is None
    assert not Path("runs").exists()
    assert cli.run(["optimize", "dry.yaml", "proxy.subset=100", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "time on one worker: " in shown
    assert "space: 2 combinations, 3 to 20 warehouses to split over" in shown
    assert "finals: none" in shown
    one = ["search.space={}", "search.finalists=3", "search.seeds=1", "proxy.subset=100"]
    assert cli.run(["optimize", "dry.yaml", *one, "--dry-run", "--trials", "3"]) == 0
    shown = capsys.readouterr().out
    # A plan, the uniform one and the static network.
    assert "space: 1 combination, 3 warehouses to split over" in shown
    assert "; finals: at most 3 trainings\n" in shown


@pytest.mark.parametrize(
    ("overrides", "trainings"),
    [
        (("search.trials=1",), 0),
        (("search.trials=2",), 0),  # the baselines
        (("search.trials=4",), (2 + 2) * 3),
        (("search.trials=40",), (3 + 2) * 3),
        (("search.trials=40", "search.finalists=0"), 0),
        # Of 5 trials the first budget has 3, of which one is a plan, the second only baselines.
        (("search.trials=5", "search.budgets=[0.5, 1]"), (1 + 2) * 3),
    ],
)
def test_a_dry_run_counts_the_finals_that_there_can_be(
    tmp_path: Path, overrides: tuple[str, ...], trainings: int
) -> None:
    search, _ = study(tmp_path, "search.finalists=3", *overrides)
    search._prepare()
    assert search._most_finals() == trainings


def test_the_time_of_a_study_is_that_of_its_steps() -> None:
    rungs = as_rungs([(3, None, None), (9, None, None)])
    # 6 trials of 9 epochs and 34 of 3, 10 steps of 2 s each; 15 final trainings.
    least, most = seconds_of(2.0, 10, 40, 6, rungs, 15)
    assert least == 20 * (6 * 9 + 34 * 3 + 15 * 9)
    assert most == 20 * (40 * 9 + 15 * 9)


# Networks of other packages, and of one's own -------------------------------------------------


OWN = """
    from torch import nn

    def make(in_channels, num_classes=10):
        return nn.Sequential(
            nn.Conv2d(in_channels, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes),
        )

    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make(3)

        def forward(self, x):
            return {"out": self.body(x)}
"""
OWN_PARAMS = 9 * 3 * 32 + 2 * 9 * 32 * 32 + 3 * 32 + 32 * 10 + 10


def own_study(
    name: str, directory: Path, *overrides: str, trust: bool = True, resume: bool = False
) -> tuple[optimize.PlanStudy, Quiet]:
    watcher = Quiet()
    text = TEXT.replace("model: resnet20", f"model: {name}\ninput: 3x8x8")
    coarse = ("method={sharing: layer, cell_ratio: 0.5}", "search.space.tolerance=0.1")
    recipe = parse_recipe(text, overrides=(*coarse, "budget.total_ratio=0.75", *overrides))
    return optimize.PlanStudy(
        recipe, directory, resume=resume, watcher=watcher, trust=trust
    ), watcher


class Trusting(Inline):
    """Remembers what workers were sent, and does not look into it."""

    def __init__(self) -> None:
        super().__init__(lambda plan, report: 0.5)
        self.trusts: list[bool] = []

    def run(self, job: Job) -> None:
        self.trusts.append(job.arguments["trained"].trust)
        self.events = [Finished(job.trial, job.attempt, 0.5)]


def test_trust_reaches_every_worker_and_no_file(
    tmp_path: Path, own_code: Callable[[str], str]
) -> None:
    name = f"{own_code(OWN)}:make"
    search, _ = own_study(name, tmp_path / "run", "search.trials=3")
    executor = Trusting()
    search.run(executor, "nowhere:nothing")
    assert executor.trusts == [True] * 3
    resumed, _ = own_study(name, tmp_path / "run", trust=False, resume=True)
    place = "<string>:3:1: "
    with pytest.raises(PlanError, match=f"^{place}{name}: it is code of your own: .* --trust"):
        resumed.run(executor, "nowhere:nothing")
    assert executor.trusts == [True] * 3
    own_study(name, tmp_path / "run", resume=True)[0].run(executor, "nowhere:nothing")
    assert executor.trusts == [True] * 8
    head = (tmp_path / "run" / "best.yaml").read_text().split("\nformat")[0]
    assert head.endswith("best.yaml --trust")


def test_without_trust_not_even_the_size_of_the_search_is_told(
    tmp_path: Path, own_code: Callable[[str], str]
) -> None:
    module = own_code(OWN)
    with pytest.raises(PlanError, match="--trust"):
        own_study(f"{module}:make", tmp_path, trust=False)[0].forecast()
    assert module not in sys.modules
    assert own_study(f"{module}:make", tmp_path)[0].forecast().params_allowed == [
        int(OWN_PARAMS * 0.75)
    ]


def test_a_network_without_a_width_is_compared_with_as_it_is(
    tmp_path: Path, own_code: Callable[[str], str]
) -> None:
    name = f"{own_code(OWN)}:make"
    search, watcher = own_study(name, tmp_path / "run", "budget={ratio: 1}", "search.trials=3")
    first, second, _ = search.run(Trusting(), "nowhere:nothing").trials
    assert (baseline(first), baseline(second)) == ("uniform", "static")
    assert second.user_attrs["params"] == OWN_PARAMS < first.user_attrs["params"]
    allowed = first.user_attrs["params"]
    assert (
        f"the static network to compare with is {name} as it is: {OWN_PARAMS:,} parameters, "
        f"where plans may have {allowed:,}"
    ) in watcher.said


def test_a_network_that_is_over_the_budget_is_not_compared_with(
    tmp_path: Path, own_code: Callable[[str], str]
) -> None:
    name = f"{own_code(OWN)}:make"
    search, watcher = own_study(name, tmp_path / "run", "search.trials=3")
    trials = search.run(Trusting(), "nowhere:nothing").trials
    assert [baseline(trial) for trial in trials] == ["uniform", None, None]
    reason = f"params {int(OWN_PARAMS * 0.75):,}: below those of {name}, {OWN_PARAMS:,}, and only "
    assert any(
        said.startswith(f"no static network to compare with: {reason}") for said in watcher.said
    )


def test_a_network_that_gives_no_classes_is_refused_before_anything_is_trained(
    tmp_path: Path, own_code: Callable[[str], str], torchvision_models: object
) -> None:
    module = own_code(OWN)
    search, _ = own_study(f"{module}:Several", tmp_path / "a")
    with pytest.raises(PlanError, match="the model gives dict for 2 images, evaluated: "):
        search.forecast()
    search, _ = own_study("torchvision:r3d_18", tmp_path / "b", "input=null")
    with pytest.raises(optimize.SearchError, match=r"takes inputs of 3x16x112x112: a search"):
        run(search, score)


@pytest.mark.slow
def test_own_code_is_trained_in_processes_of_their_own(
    tmp_path: Path, own_code: Callable[[str], str]
) -> None:
    module = own_code(OWN)
    small = "{epochs: 1, subset: 100, threads: 1, resolution: 8, temperature_epochs: 0}"
    search, _ = own_study(
        f"{module}:make", tmp_path / "run", f"proxy={small}", "search.trials=2", "budget={ratio: 1}"
    )
    trials = search.run().trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 2
    assert [baseline(trial) for trial in trials] == ["uniform", "static"]
