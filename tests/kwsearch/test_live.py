"""What a search prints while it goes."""

from __future__ import annotations

import optuna
import pytest
from optuna.trial import FrozenTrial

from kwsearch.cli.live import Live


def trial(number: int, accuracy: float | None = None, **attrs: object) -> FrozenTrial:
    facts = {"params": 99_000, "budget": 0.5, **attrs}
    if accuracy is None:
        made = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING, user_attrs=facts)
    else:
        made = optuna.trial.create_trial(value=accuracy, user_attrs=facts)
    made.number = number
    made.system_attrs["constraints:params"] = -1000.0
    return made


def play(live: Live) -> None:
    with live:
        live.expect(4)
        live.known([trial(0, 0.5, kind="uniform"), trial(1, 0.9, kind="static")])
        live.start(trial(2), 1, 9)
        live.start(trial(3), 1, 9)
        live.epoch(2, 1, 0.25)
        live.epoch(2, 2, 0.375)
        live.pause(3, 3, 0.44)
        live.done(trial(2, 0.6))
        live.done(trial(3, 0.55, reason="irrelevant"))
        live.final(2, 0, {"valid": 0.61, "test": 0.6})
        live.final(2, 1, {"error": "KeyError: 'x'"})
        live.say("wrote [best.yaml]")


def test_without_a_terminal_there_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    play(Live(quiet=False))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "trial 3: 44.00% after epoch 3, waits",
        "trial 2: 60.00%  best so far",
        "trial 3: 55.00%",
        "final training of trial 2, seed 0: 61.00% held-out, 60.00% test",
        "final training of trial 2, seed 1: failed: KeyError: 'x'",
        "wrote [best.yaml]",
    ]


def test_a_terminal_shows_the_best_and_every_running_trial(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    live = Live(quiet=False)
    with live:
        live.expect(4)
        live.known([trial(0, 0.5, kind="uniform"), trial(1, 0.9, kind="static")])
        live.start(trial(2), 1, 9)
        live.start(trial(3), 1, 9)
        live.epoch(2, 2, 0.375)
        live.bars.refresh()
        shown = capsys.readouterr().err
        # 99,000 of the 100,000 that it may have; the static network is not the best plan.
        assert "trial 2: 99,000 parameters, 99.0% of the budget, now 37.5%" in shown
        assert "trial 3: 99,000 parameters, 99.0% of the budget" in shown
        assert "trials, best 50.0% (trial 0)" in shown
        assert "2/9" in shown
        assert "2/4" in shown
        live.done(trial(2, 0.6))
        live.bars.refresh()
        shown = capsys.readouterr().err
        assert "trials, best 60.0% (trial 2)" in shown
        assert "3/4" in shown
    assert list(live.running) == [3]


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    play(Live(quiet=True))
    assert capsys.readouterr() == ("", "")
