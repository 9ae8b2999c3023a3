"""The driver with a scripted executor: kills, losses, rungs; no processes and no training."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from kwsearch import driver
from kwsearch.driver import Driver, Rules, SpaceExhausted
from kwsearch.executors import Cancelled, Event, Failed, Finished, Job, Lost, Reported, Started
from kwsearch.failures import StudyFailed
from kwsearch.rungs import as_rungs

NINE = as_rungs([(1, None, None), (3, None, None), (9, None, None)])
FULL = as_rungs([(3, None, None)])


class Killed(Exception):
    """The driver dies here."""


class Scripted:
    """Trains by counting: the accuracy of x after e epochs is x e / 9. Checkpoints survive it.

    Every `wait` brings a random job on by an epoch. lose: share of epochs that a worker's death
    takes. kill: waits until the driver dies.
    """

    def __init__(
        self,
        capacity: int = 1,
        seed: int = 0,
        lose: float = 0.0,
        kill: int | None = None,
        checkpoints: Counter[int] | None = None,
        fail: dict[int, list[Event]] | None = None,
    ) -> None:
        self.capacity = capacity
        self.random = random.Random(seed)
        self.lose, self.kill = lose, kill
        self.checkpoints = Counter() if checkpoints is None else checkpoints
        self.trained: Counter[tuple[int, int]] = Counter()
        self.jobs: dict[int, Job] = {}
        self.submitted: list[Job] = []
        self.fail = fail or {}
        self.cancelled: list[Event] = []

    @property
    def running(self) -> int:
        return len(self.jobs)

    def submit(self, job: Job) -> None:
        assert len(self.jobs) < self.capacity
        assert job.trial not in self.jobs
        self.jobs[job.trial] = job
        self.submitted.append(job)

    def cancel(self, trial: int) -> None:
        job = self.jobs.pop(trial)
        self.cancelled.append(Cancelled(trial, job.attempt))

    def finish(self) -> None:
        pass

    def close(self) -> None:
        self.jobs.clear()

    def wait(self, timeout: float | None) -> list[Event]:
        if self.kill is not None:
            self.kill -= 1
            if self.kill < 0:
                raise Killed
        if self.cancelled:
            return [self.cancelled.pop()]
        number = self.random.choice(sorted(self.jobs))
        job = self.jobs[number]
        if self.fail.get(number):
            del self.jobs[number]
            return [replace(self.fail[number].pop(0), trial=number, attempt=job.attempt)]
        epoch = self.checkpoints[number]
        if epoch < job.arguments["until"]:
            self.trained[number, epoch + 1] += 1
            if self.random.random() < self.lose:
                del self.jobs[number]
                return [Started(number, job.attempt, 1), Lost(number, job.attempt, "SIGKILL")]
            self.checkpoints[number] = epoch + 1
            return [Reported(number, job.attempt, epoch + 1, job.arguments["x"] * (epoch + 1) / 9)]
        del self.jobs[number]
        return [Finished(number, job.attempt, job.arguments["x"])]


class Notes:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.paused: list[tuple[int, int]] = []
        self.done_: list[int] = []
        self.started: list[tuple[int, int, int]] = []

    def start(self, trial: FrozenTrial, attempt: int, until: int) -> None:
        self.started.append((trial.number, attempt, until))

    def epoch(self, number: int, step: int, accuracy: float) -> None: ...

    def pause(self, number: int, step: int, accuracy: float) -> None:
        self.paused.append((number, step))

    def done(self, trial: FrozenTrial) -> None:
        self.done_.append(trial.number)

    def say(self, message: str) -> None:
        self.said.append(message)


def opened(path: Path) -> optuna.Study:
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(path / "journal"))),
        study_name="s",
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.NopPruner(),
    )


def drive(
    path: Path, executor: Scripted, rules: Rules, values: dict[int, float] | None = None
) -> tuple[list[FrozenTrial], Notes]:
    study = opened(path)
    notes = Notes()

    def propose(study: optuna.Study) -> FrozenTrial:
        left = [
            t
            for t in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if "lease" not in t.user_attrs
        ]
        number = left[0].number if left else len(study.get_trials(deepcopy=False))
        study.sampler = optuna.samplers.TPESampler(
            seed=number, n_startup_trials=3, constant_liar=True
        )
        trial = optuna.trial.Trial(study, left[0]._trial_id) if left else study.ask()
        x = trial.suggest_float("x", 0, 1)
        if values is not None:
            if trial.number not in values:
                raise SpaceExhausted("none left")
            x = values[trial.number]
        trial.set_user_attr("x", x)
        return study.get_trials(deepcopy=False)[trial.number]

    def job(trial: FrozenTrial, rung: int, attempt: int, splits: int) -> Job:
        arguments = {
            "x": trial.user_attrs["x"],
            "until": rules.rungs[rung].epochs,
            "splits": splits,
        }
        return Job(trial.number, attempt, "none:none", arguments)

    driver = Driver(
        study,
        executor,
        rules,
        notes,
        propose,
        job,
        lambda trial: trial.number == 0,
        lambda number: None,
    )
    driver.run()
    return study.get_trials(deepcopy=False), notes


def test_every_trial_trains_to_the_end_once(tmp_path: Path) -> None:
    executor = Scripted(capacity=2)
    trials, notes = drive(tmp_path, executor, Rules(10, FULL))
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 10
    assert set(executor.trained.values()) == {1}
    assert len(executor.trained) == 30
    assert sorted(notes.done_) == list(range(10))
    assert all(t.values == [pytest.approx(t.user_attrs["x"] / 3)] for t in trials)


def test_two_hundred_trials_with_lost_workers_and_twenty_killed_drivers(tmp_path: Path) -> None:
    dice = random.Random(1)
    checkpoints: Counter[int] = Counter()
    trained: Counter[tuple[int, int]] = Counter()
    rules = Rules(200, FULL)
    kills = 0
    while True:
        kill = dice.randrange(5, 40) if kills < 20 else None
        executor = Scripted(3, kills, 0.05, kill, checkpoints)
        try:
            trials, _ = drive(tmp_path, executor, rules)
        except Killed:
            kills += 1
            continue
        finally:
            trained += executor.trained
        break
    assert kills == 20
    assert [t.number for t in trials] == list(range(200))
    assert all(t.state == TrialState.COMPLETE for t in trials)
    # What a lost worker was at is trained again, nothing that was reported is.
    assert set(trained) == {(number, epoch) for number in range(200) for epoch in (1, 2, 3)}
    assert all(count == 3 for count in checkpoints.values())


def test_the_best_third_of_a_rung_goes_on_and_the_others_end_there(tmp_path: Path) -> None:
    values = {number: (number * 7 % 18) / 18 for number in range(18)}
    rules = Rules(18, NINE, calibration=3, tau=0.3)
    trials, notes = drive(tmp_path, Scripted(), rules, values)
    complete = {t.number for t in trials if t.state == TrialState.COMPLETE}
    pruned = [t for t in trials if t.state == TrialState.PRUNED]
    # The first three are never stopped; the best of all must have come through.
    best = max(values, key=values.__getitem__)
    assert complete >= {0, 1, 2, best}
    assert len(complete) + len(pruned) == 18
    assert {t.last_step for t in pruned} <= {1, 3}
    assert all("not among the best" in t.user_attrs["reason"] for t in pruned)
    # At the end nobody who waits at a rung is in its best third.
    for rung in NINE[:2]:
        reached = [t for t in trials if rung.step in t.intermediate_values]
        order = sorted(reached, key=lambda t: -t.user_attrs["x"])
        assert not [t for t in order[: len(order) // 3] if t.last_step == rung.step]
    assert notes.paused


def test_a_paused_trial_goes_on_later(tmp_path: Path) -> None:
    values = {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.9, 4: 0.8, 5: 0.1, 6: 0.15, 7: 0.12, 8: 0.11}
    rules = Rules(9, as_rungs([(1, None, None), (9, None, None)]), calibration=3)
    trials, notes = drive(tmp_path, Scripted(), rules, values)
    # Trial 4 is second of five at first, so it waits; among nine it is in the best third.
    assert (4, 1) in notes.paused
    assert trials[4].state == TrialState.COMPLETE
    assert trials[5].state == TrialState.PRUNED


def test_a_rung_that_ranks_wrongly_stops_nobody(tmp_path: Path) -> None:
    class Crossing(Scripted):
        def wait(self, timeout: float | None) -> list[Event]:
            events = super().wait(timeout)
            return [
                Reported(e.trial, e.attempt, e.step, -e.value)
                if isinstance(e, Reported) and e.step == 1
                else e
                for e in events
            ]

    rules = Rules(12, as_rungs([(1, None, None), (9, None, None)]), calibration=4)
    trials, _ = drive(tmp_path, Crossing(), rules)
    assert all(t.state == TrialState.COMPLETE for t in trials)


@pytest.mark.parametrize("rungs", [FULL, NINE])
def test_a_deterministic_study_is_the_same_whatever_the_workers(
    tmp_path: Path, rungs: tuple
) -> None:  # type: ignore[type-arg]
    found = []
    rules = Rules(21, rungs, calibration=5, generation=8)
    for number, (capacity, seed, lose) in enumerate([(1, 0, 0.0), (3, 5, 0.0), (4, 9, 0.1)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        trials, _ = drive(folder, Scripted(capacity, seed, lose), rules)
        found.append([(t.params, t.state, t.values, t.intermediate_values) for t in trials])
    assert len(found[0]) == 21
    assert found[0] == found[1] == found[2]


def test_a_deterministic_study_is_the_same_after_kills(tmp_path: Path) -> None:
    rules = Rules(21, NINE, calibration=5, generation=8)
    (tmp_path / "whole").mkdir()
    whole, _ = drive(tmp_path / "whole", Scripted(2), rules)
    checkpoints: Counter[int] = Counter()
    for kill in (0, 1, 5, 13, 20, 8, 3, None):
        try:
            trials, _ = drive(tmp_path, Scripted(2, 3, 0.0, kill, checkpoints), rules)
        except Killed:
            continue
    assert [(t.params, t.state, t.values) for t in trials] == [
        (t.params, t.state, t.values) for t in whole
    ]


def test_out_of_memory_is_tried_once_more_in_half_batches(tmp_path: Path) -> None:
    memory = Failed(1, 0, "memory", "out of memory", "")
    executor = Scripted(fail={1: [memory], 2: [memory, memory]})
    trials, _ = drive(tmp_path, executor, Rules(4, FULL))
    states = [t.state for t in trials]
    assert states == [
        TrialState.COMPLETE,
        TrialState.COMPLETE,
        TrialState.FAIL,
        TrialState.COMPLETE,
    ]
    splits = [(j.trial, j.arguments["splits"]) for j in executor.submitted]
    assert splits == [(0, 1), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1)]
    assert trials[2].user_attrs["reason"] == "out of memory"


def test_a_plan_that_diverges_is_pruned_with_its_reason(tmp_path: Path) -> None:
    diverged = Failed(1, 0, "diverged", "Diverged: the loss became nan in epoch 2", "")
    trials, _ = drive(tmp_path, Scripted(fail={1: [diverged]}), Rules(3, FULL))
    assert trials[1].state == TrialState.PRUNED
    assert trials[1].user_attrs["reason"] == "Diverged: the loss became nan in epoch 2"


def test_the_same_error_three_times_in_a_row_stops_the_study(tmp_path: Path) -> None:
    def error(message: str) -> list[Event]:
        return [Failed(0, 0, "error", message, "")]

    same = {number: error("KeyError: 'x'") for number in (1, 2, 3)}
    with pytest.raises(StudyFailed, match="KeyError: 'x'"):
        drive(tmp_path, Scripted(fail=same), Rules(9, FULL))
    (tmp_path / "other").mkdir()
    mixed = {1: error("a"), 2: error("a"), 3: error("b"), 4: error("a"), 6: error("a")}
    trials, _ = drive(tmp_path / "other", Scripted(fail=mixed), Rules(9, FULL))
    assert sum(t.state == TrialState.FAIL for t in trials) == 5


def test_a_full_disk_stops_the_study(tmp_path: Path) -> None:
    full = Failed(1, 0, "error", "OSError: [Errno 28] No space left on device", "")
    with pytest.raises(StudyFailed, match="the disk is full"):
        drive(tmp_path, Scripted(fail={1: [full]}), Rules(3, FULL))
    trials, _ = drive(tmp_path, Scripted(), Rules(3, FULL))
    assert all(t.state == TrialState.COMPLETE for t in trials)


def test_a_trial_whose_process_always_dies_is_given_up(tmp_path: Path) -> None:
    lost: list[Event] = [Lost(1, 0, "SIGSEGV") for _ in range(5)]
    trials, _ = drive(tmp_path, Scripted(fail={1: lost}), Rules(3, FULL))
    assert trials[1].state == TrialState.FAIL
    assert (
        "its process ended again and again within one epoch: SIGSEGV"
        in trials[1].user_attrs["reason"]
    )
    assert trials[2].state == TrialState.COMPLETE


def test_workers_that_are_taken_away_are_no_fault_of_a_trial(tmp_path: Path) -> None:
    lost: list[Event] = [Lost(1, 0, "node is drained", suspect=False) for _ in range(7)]
    trials, notes = drive(tmp_path, Scripted(fail={1: lost}), Rules(3, FULL))
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 3
    assert "trial 1: its process was taken away (node is drained); it goes on" in notes.said
    # Unless there is no end to it: it may be what takes nodes away.
    always: list[Event] = [Lost(4, 0, "node is gone", suspect=False) for _ in range(20)]
    trials, _ = drive(tmp_path, Scripted(fail={4: always}), Rules(6, FULL))
    assert [t.state.name for t in trials[3:]] == ["COMPLETE", "FAIL", "COMPLETE"]


def test_seconds_are_those_of_training_not_of_waiting_for_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(driver.time, "monotonic", lambda: clock[0])

    class Slow(Scripted):
        def wait(self, timeout: float | None) -> list[Event]:
            job = self.jobs[0]
            if not self.trained:  # an hour in the queue, then a minute for each epoch and the end
                self.trained[0, 0] = 1
                clock[0] += 3600
                return [Started(0, job.attempt, 1)]
            clock[0] += 60
            return super().wait(timeout)

    trials, _ = drive(tmp_path, Slow(), Rules(1, FULL))
    assert trials[0].user_attrs["seconds"] == 4 * 60


def test_a_deadline_starts_nothing_more(tmp_path: Path) -> None:
    trials, _ = drive(tmp_path, Scripted(), Rules(5, FULL, deadline=0.0))
    assert trials == []


def test_a_space_without_more_plans_ends_the_study(tmp_path: Path) -> None:
    trials, notes = drive(tmp_path, Scripted(), Rules(5, FULL), {0: 0.5, 1: 0.4})
    assert [t.state for t in trials[:2]] == [TrialState.COMPLETE] * 2
    assert any("no more trials" in line for line in notes.said)


def test_a_larger_total_goes_on_where_the_study_ended(tmp_path: Path) -> None:
    drive(tmp_path, Scripted(), Rules(3, FULL))
    executor = Scripted()
    after, _ = drive(tmp_path, executor, Rules(5, FULL))
    assert [t.number for t in after] == list(range(5))
    assert {number for number, _ in executor.trained} == {3, 4}
