"""Rungs: where trials stop, and which go on."""

from __future__ import annotations

import pytest

from kwsearch.rungs import Phase, Rung, as_rungs, check, geometric, phase_of, promotable, trusted


def test_rungs_are_the_parts_of_the_full_length_by_powers_of_eta() -> None:
    assert geometric(27, 3, 1) == [1, 3, 9, 27]
    assert geometric(27, 3, 3) == [3, 9, 27]
    assert geometric(20, 3, 1) == [2, 6, 20]
    assert geometric(5, 2, 3) == [5]


def test_steps_count_the_epochs_of_all_phases() -> None:
    rungs = as_rungs([(2, 100, None), (6, 100, None), (4, None, None), (12, None, None)])
    assert [rung.step for rung in rungs] == [2, 6, 10, 18]
    assert rungs[1] == Rung(6, 6, 100)
    assert phase_of(rungs, 0) == phase_of(rungs, 1) == Phase(0, 6, 100, None)
    assert phase_of(rungs, 2) == phase_of(rungs, 3) == Phase(6, 12, None, None)


def test_the_best_third_goes_on_and_ties_go_to_the_earlier() -> None:
    values = {0: 0.1, 1: 0.9, 2: 0.5, 3: 0.9, 4: 0.2, 5: 0.9, 6: 0.3}
    assert promotable(values, frozenset(), 3) == [1, 3]
    assert promotable(values, frozenset({1}), 3) == [3]
    assert promotable({1: 0.5, 2: 0.6}, frozenset(), 3) == []


def test_a_paused_trial_goes_on_when_worse_ones_come() -> None:
    values = {0: 0.9, 1: 0.8, 2: 0.1}
    assert promotable(values, frozenset({0}), 3) == []
    values |= {3: 0.1, 4: 0.1, 5: 0.1}
    assert promotable(values, frozenset({0}), 3) == [1]


def test_a_rung_that_does_not_rank_stops_nothing() -> None:
    rungs = as_rungs([(1, None, None), (3, None, None), (9, None, None)])
    assert trusted(rungs, {}, 0.3) == [False, False]
    assert trusted(rungs, {1: 0.29, 3: 0.3}, 0.3) == [False, True]
    assert trusted(rungs, {1: None, 3: 0.9}, -1) == [False, True]


@pytest.mark.parametrize(
    ("stops", "message"),
    [
        ([(3, None, None), (9, None, None)], None),
        ([(9, 50, None), (9, None, None)], None),
        ([(3, None, None)], "the last rung must be the full trial: 9 epochs"),
        ([(9, 50, None)], "the last rung must be the full trial: 9 epochs"),
        ([(3, None, None), (3, None, None), (9, None, None)], "3 before 3"),
    ],
)
def test_rungs_must_lead_to_the_full_trial(
    stops: list[tuple[int, int | None, int | None]], message: str | None
) -> None:
    found = check(stops, 9)
    assert found is None if message is None else message in (found or "")
