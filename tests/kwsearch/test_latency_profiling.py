"""Filling and checking a table, on steps of made-up length."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import truediv

import pytest
from torch import nn

from kwsearch.latency import checking, measure, profiling
from kwsearch.latency.checking import check, summary
from kwsearch.latency.measure import Timed, Times
from kwsearch.latency.profiling import Profile, Step, steps_of
from kwsearch.latency.replay import Replay
from kwsearch.latency.subjects import Mode, Subject, of_grid, of_model, of_recipe
from kwsearch.latency.table import Check, Table
from kwsearch.recipe.loading import parse_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

MODES = [Mode(2, False), Mode(2, True)]


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def steps(*names: str) -> list[Step]:
    return list(steps_of([Subject(name, net, (3, 8, 8)) for name in names], MODES, print))


def new_table() -> Table:
    return Table({"device": "cpu", "dtype": "float32"})


# Measuring ----------------------------------------------------------------------------------


class _Scripted:
    """Takes the seconds that it is told to, one after the other."""

    def __init__(self, seconds: Sequence[float], log: list[str], name: str) -> None:
        self.left, self.log, self.name = itertools.cycle(seconds), log, name

    def seconds(self) -> float:
        self.log.append(self.name)
        return next(self.left)


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the anchor takes in each round, one after the other; the last stays."""
    left = [1.0]

    def run(anchor: measure.Anchor) -> float:
        anchor.times.append(left.pop(0) if left[1:] else left[0])
        return anchor.times[-1]

    monkeypatch.setattr(measure.Anchor, "run", run)
    return left


def test_a_machine_that_slows_down_changes_nothing(pace: list[float]) -> None:
    pace[:] = [1.0, 1.0, 2.0, 2.0, 1.0, 3.0, 1.0]
    # After a round to warm up, as much slower as the anchor is.
    slower = [9.0, *(4 * one for one in pace)]
    (found,) = measure.measure([lambda: _Scripted(slower, [], "one")])
    assert (found.first, found.median, found.third) == (4, 4, 4)
    assert (found.anchor, found.rounds) == (1.0, measure.ROUNDS)


def test_seconds_are_those_of_the_usual_anchor(pace: list[float]) -> None:
    pace[:] = [2.0]
    (found,) = measure.measure([lambda: _Scripted([6.0], [], "one")])
    assert (found.median, found.anchor) == (6.0, 2.0)


def test_the_anchor_says_what_it_took() -> None:
    anchor = measure.Anchor()
    took = [anchor.run(), anchor.run()]
    assert anchor.times == took
    assert all(0 < one < 10 for one in took)


def test_all_are_timed_in_every_round_and_the_scattered_ones_in_more(pace: list[float]) -> None:
    log: list[str] = []
    scripts = {"steady": [1.0], "wild": [1.0, 2.0]}
    making: list[Callable[[], Timed]] = [
        lambda name=name, s=s: _Scripted(s, log, name) for name, s in scripts.items()
    ]
    steady, wild = measure.measure(making)
    assert (steady.median, steady.rounds) == (1.0, measure.ROUNDS)
    assert (wild.first, wild.third) == (1.0, 2.0)
    assert wild.rounds == measure.ROUNDS + measure.MORE
    # One round warms up; then everybody is in each, not always in the same order.
    first = log[: 2 * (1 + measure.ROUNDS)]
    rounds = [tuple(first[i : i + 2]) for i in range(0, len(first), 2)]
    assert set(rounds) == {("steady", "wild"), ("wild", "steady")}
    assert steady.anchor > 0


# Profiles -----------------------------------------------------------------------------------


class _Machine:
    """Stands in for `measure`: a call takes a microsecond, a whole step a millisecond, and more
    where the anchor does.
    """

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.anchor = 1e-3
        self.fails_at: int | None = None
        self.slow_at: set[int] = set()  # three times as slow, which the anchor does not show

    def __call__(self, making: Sequence[Callable[[], Timed]], device: str) -> list[Times]:
        self.asked.append(len(making))
        if len(self.asked) == self.fails_at:
            raise KeyboardInterrupt
        kinds = [type(make()) for make in making[:1]]
        seconds = self.anchor * (1e-3 if kinds == [Replay] else 1)
        seconds *= 3 if len(self.asked) in self.slow_at else 1
        return [Times(seconds, seconds, seconds, 7, self.anchor) for _ in making]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> _Machine:
    found = _Machine()
    monkeypatch.setattr(profiling, "measure", found)
    monkeypatch.setattr(checking, "measure", found)
    return found


def test_a_profile_has_every_call_and_whole_step(machine: _Machine) -> None:
    table, found = new_table(), steps("net")
    progress = list(Profile(table, found, lambda: None).run())
    assert table.entries.keys() == {call.key for step in found for call in step.calls}
    assert {(w.name, w.batch, w.training) for w in table.wholes} == {
        ("net at 3x8x8", 2, False), ("net at 3x8x8", 2, True),
    }  # fmt: skip
    inference = next(whole for whole in table.wholes if not whole.training)
    assert sum(inference.calls_ns) == 1000 * sum(found[0].calls.values())
    assert inference.calls_ns[0] == 1000  # the convolution
    assert inference.calls_ns[2:] == (0, 0)  # no attention, no mixing
    assert inference.measured_ns == 10**6
    assert progress[-1].done == progress[-1].total == len(table.entries) + 2


def test_what_is_in_the_table_is_not_measured_again(machine: _Machine) -> None:
    table = new_table()
    list(Profile(table, steps("net"), lambda: None).run())
    before, machine.asked = len(table.entries), []
    more = Profile(table, steps("net", "other"), lambda: None)
    assert tuple(map(len, more.missing())) == (0, 2)  # the same calls, other whole steps
    list(more.run())
    assert (len(table.entries), machine.asked) == (before, [2])


def test_an_interruption_loses_the_block_that_was_measured(
    machine: _Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "_CALLS", 4)
    table, saved = new_table(), []
    machine.fails_at = 3
    profile = Profile(table, steps("net"), lambda: saved.append(len(table.entries)))
    with pytest.raises(KeyboardInterrupt):
        list(profile.run())
    assert saved == [4, 8, 8]  # the last on the way out


def test_what_was_measured_on_a_slow_machine_is_measured_again(
    machine: _Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "_CALLS", 4)
    table = new_table()
    profile = Profile(table, steps("net"), lambda: None)
    for number, _ in enumerate(profile.run()):
        machine.anchor = 1.5e-3 if number == 0 else 1e-3  # the second block only
    assert table.drifted() == set()
    calls = len(profile.calls)
    assert sum(machine.asked) == calls + 2 + 4
    for whole in table.wholes:  # were summed up before the slow calls were measured again
        step = profile.steps[whole.key]
        assert sum(whole.calls_ns) == 1000 * sum(step.calls.values())


def test_what_takes_far_longer_than_the_rest_tells_is_measured_once_more(
    machine: _Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "_WHOLES", 1)
    table, names = new_table(), ("a", "b", "c", "d")
    machine.slow_at = {4}  # after a block of calls the third whole step
    progress = list(Profile(table, steps(*names), lambda: None).run())
    assert {whole.measured_ns for whole in table.wholes} == {10**6}
    assert machine.asked == [len(table.entries)] + 8 * [1] + [1]
    assert progress[-1].done == progress[-1].total == sum(machine.asked)
    # What stays so is so; and a longer second measurement does not count.
    table, machine.asked, machine.slow_at = new_table(), [], {4, 10}
    list(Profile(table, steps(*names), lambda: None).run())
    assert sorted(whole.measured_ns for whole in table.wholes) == 7 * [10**6] + [3 * 10**6]
    assert len(machine.asked) == 1 + 8 + 1


def test_so_is_a_call(machine: _Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_CALLS", 1)

    def widths(width: int) -> nn.Module:
        return nn.Sequential(*(nn.Conv2d(width, width, 1) for _ in range(2)), nn.Flatten())

    table = new_table()
    subjects = [Subject(str(w), partial(widths, w), (w, 8, 8)) for w in range(8, 20)]
    found = list(steps_of(subjects, MODES[:1], print))
    profile = Profile(table, found, lambda: None)
    random_order = list(profile.missing()[0])
    random.Random(len(random_order)).shuffle(random_order)
    convs = [i for i, key in enumerate(random_order) if key.startswith("conv2d")]
    machine.slow_at = {1 + convs[3]}
    list(profile.run())
    assert {entry.median_ns for entry in table.entries.values()} == {1000}
    assert len(machine.asked) == len(table.entries) + len(found) // profiling._WHOLES + 1


def test_a_worse_measurement_does_not_replace_a_better_one(machine: _Machine) -> None:
    table = new_table()
    machine.anchor = 1.5e-3
    list(Profile(table, steps("net")[:1], lambda: None).run())
    before = dict(table.entries)
    for entry in before.values():
        table.add([replace(entry, anchor_ns=1_200_000, median_ns=1200)])
    table.add(
        [
            replace(next(iter(before.values())), kind="x", family=str(i), anchor_ns=10**6)
            for i in range(99)
        ]
    )  # by which all of it has drifted
    machine.anchor = 2e-3
    list(Profile(table, steps("net")[:1], lambda: None).run())
    assert {table.entries[key].median_ns for key in before} == {1200}


def test_a_machine_that_stays_slow_is_told_and_not_waited_for(machine: _Machine) -> None:
    table = new_table()
    list(Profile(table, steps("net"), lambda: None).run())
    machine.anchor, machine.asked = 2e-3, []
    profile = Profile(table, steps("other"), lambda: None)
    list(profile.run())
    assert machine.asked == [2, 2, 2]  # once, and twice more
    assert profile.missing() == ([], ["other at 3x8x8 2 False", "other at 3x8x8 2 True"])


# Checks -------------------------------------------------------------------------------------


def test_a_check_measures_steps_that_the_table_had_no_part_in(machine: _Machine) -> None:
    table = new_table()
    list(Profile(table, steps("net"), lambda: None).run())
    found = list(check(table, steps("net", "held out"), lambda *_: None))
    assert [(one.name, one.training) for one in found] == [
        ("held out at 3x8x8", False), ("held out at 3x8x8", True),
    ]  # fmt: skip
    # The same calls in the same time: whole steps are to their calls as those of the table.
    assert [one.error for one in found] == pytest.approx([0, 0])


def test_a_machine_of_another_speed_is_told_as_well(machine: _Machine) -> None:
    """Calls, whole steps and the check are each measured at a speed of their own."""
    table = new_table()
    for number, _ in enumerate(Profile(table, steps("net"), lambda: None).run()):
        machine.anchor = 1.05e-3 if number == 0 else 1e-3  # within what is not measured again
    machine.anchor = 1.08e-3
    found = list(check(table, steps("held out"), lambda *_: None))
    assert [one.error for one in found] == pytest.approx([0, 0], abs=1e-4)
    usual = 1e-6 * table.anchor()
    assert [one.measured_ms for one in found] == pytest.approx([usual, usual], rel=1e-6)


def test_the_summary_of_checks() -> None:
    def one(measured: float, predicted: float) -> Check:
        return Check("net", 1, False, measured, predicted, 0.9 * predicted, 1.1 * predicted)

    found = summary([one(10, 11), one(20, 20), one(40, 60), one(50, 45)])
    assert found["median"] == pytest.approx(0.1)
    assert found["worst"] == pytest.approx(0.5)
    assert found["within"] == 0.5  # 20 is, and 10 in 9.9 to 12.1; 40 in 54 to 66 is not, nor 50
    assert found["tau"] == pytest.approx(4 / 6)  # of six pairs one is the wrong way round


# Subjects -----------------------------------------------------------------------------------


def test_a_model_is_taken_static_and_under_plans() -> None:
    found = of_model("resnet20", ratios=(0.5, 1))
    assert [one.name for one in found] == ["resnet20", "resnet20 b = 0.5", "resnet20 b = 1"]
    assert found[0].plan is None
    assert sum(group.num_cells for group in found[1].plan.groups) * 2 == pytest.approx(  # type: ignore[union-attr]
        sum(group.num_cells for group in found[2].plan.groups),
        rel=0.02,  # type: ignore[union-attr]
    )


def test_a_search_space_is_taken_at_its_ends() -> None:
    text = """
format: 1
model: resnet20
budget: {ratio: 1}
search: {space: {split: 2, cell_ratio: [0.5], sharing: [layer]}}
"""
    found = of_recipe(parse_recipe(text))
    plans = [one.plan for one in found if one.plan is not None]
    assert found[0].plan is None
    # With the recipe's choices, the other cells and the other sharing: even, and both ends.
    assert len(plans) == 3 * 3
    assert {plan.groups[0].cell[0] for plan in plans} == {16, 8}
    assert len({len(plan.groups) for plan in plans}) == 2
    # A limit of latency cannot hold before there is a table.
    limited = "{latency_ms: 0.001, lut: not_yet.lut.yaml}"
    again = of_recipe(parse_recipe(text, overrides=[f"search.space.limits={limited}"]))
    assert [one.name for one in again] == [one.name for one in found]
    ends = [[g.num_cells for g in plan.groups] for plan in plans[1:3]]
    assert [a > b for a, b in zip(*ends, strict=True)] == [True, False, True]


@pytest.fixture(scope="module")
def grid() -> list[Subject]:
    return of_grid([32])


def test_the_grid_knows_the_usual_blocks(grid: list[Subject]) -> None:
    found = grid
    calls = {call for one in found[:8] for call in one.calls(Mode(1, False))}
    kinds = {call.kind.split()[0] for call in calls}
    assert {"conv2d", "batch_norm", "attention", "mixing", "module"} <= kinds
    names = {one.name.split()[1] for one in found}
    assert names == {"basic", "bottleneck", "cifar", "inverted", "convnext", "vit"}
    assert [one.name.rsplit(" b = ")[-1] for one in found[1:4]] == ["0.25", "1", "4"]


def test_the_grid_has_mixing_in_cells_of_every_size(grid: list[Subject]) -> None:
    found = [one for one in grid if one.only_mixing]
    cut: dict[tuple[float, ...], set[str]] = {}
    for one in found:
        sites = {site.name: site for site in one.plan.network.sites}
        for group in one.plan.groups:
            site = sites[group.layers[0]]
            # Depthwise layers and the first one have no channels to cut.
            if site.kernel_size == (3, 3) and site.in_channels >= 64 and site.groups == 1:
                channels = (site.out_channels, site.in_channels)
                ratio = tuple(map(truediv, group.cell[:2], channels))
                cut.setdefault(ratio, set()).add(one.name.split()[1])
    halves_and_quarters = {(a, b) for a in (1, 0.5, 0.25) for b in (1, 0.5, 0.25)} - {(1, 1)}
    assert halves_and_quarters <= set(cut)
    (call,) = {call.kind.split()[0] for one in found[:2] for call in one.calls(Mode(1, False))}
    assert call == "mixing"


def test_what_only_mixes_is_no_whole_step(grid: list[Subject]) -> None:
    (subject, *_) = [one for one in grid if one.only_mixing]
    found = list(steps_of([subject], MODES[:1], print))
    calls, wholes = Profile(new_table(), found, lambda: None).missing()
    assert wholes == []
    assert set(calls) == {call.key for call in subject.calls(MODES[0])}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_whole_step_runs(training: bool) -> None:
    for subject in of_model("resnet20", (3, 16, 16), ratios=(0.5,)):
        assert subject.whole(Mode(2, training)).seconds() > 0


def test_steps_that_cannot_run_are_told() -> None:
    told: list[str] = []
    subject = Subject("net", lambda: nn.Sequential(net(), nn.BatchNorm1d(4)), (3, 8, 8))
    modes = [Mode(1, False), Mode(1, True)]
    found = list(steps_of([subject], modes, lambda s, m, why: told.append(f"{s.name} {m}: {why}")))
    assert [step.mode.training for step in found] == [False]
    assert len(told) == 1
    assert told[0].startswith("net training, batch 1: a step of 1 images cannot run: Expected more")
