"""Real processes, killed at random with SIGKILL, workers and drivers: nothing lost or doubled."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from optuna.trial import TrialState

from kwsearch import snapshot

SIMULATED = """
import os, time
from pathlib import Path

def train(report, *, trained, first, until):
    checkpoint = Path(trained.checkpoint)
    log = checkpoint.parent.parent.parent / "epochs.log"
    done = int(checkpoint.read_text()) if checkpoint.exists() else 0
    value = trained.seed / 2**32
    for epoch in range(done + 1, until + 1):
        time.sleep({epoch_s})
        partial = checkpoint.with_suffix(f".{{os.getpid()}}")
        partial.write_text(str(epoch))
        partial.replace(checkpoint)
        with open(log, "a") as file:
            file.write(f"{{checkpoint.stem}} {{epoch}}\\n")
        report(first + epoch, value * epoch / 3)
    return value
"""

DRIVER = """
import sys
sys.path.insert(0, {folder!r})
from pathlib import Path
from kwsearch import optimize
from kwsearch.recipe import parse_recipe

class Quiet:
    def __getattr__(self, name):
        return lambda *args: None

if __name__ == "__main__":
    recipe = parse_recipe('''
format: 1
model: resnet20
budget: {{total_ratio: 0.5}}
search: {{trials: {trials}, workers: 2, sampler: random, pruner: none, finalists: 0}}
proxy: {{epochs: 3}}
''')
    run = Path({folder!r}) / "run"
    begun = (run / "study.journal").exists()
    study = optimize.PlanStudy(recipe, run, resume=begun, watcher=Quiet())
    study.run(function="simulated:train")
"""


def kill_all(folder: Path, trials: int, kills: int, epoch_s: float, seed: int) -> int:
    """Run drivers, killing each, and workers in between; the last one may finish. Kills made."""
    (folder / "simulated.py").write_text(SIMULATED.format(epoch_s=epoch_s))
    script = folder / "driver.py"
    script.write_text(DRIVER.format(folder=str(folder), trials=trials))
    dice = random.Random(seed)
    made = 0
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    for turn in range(kills + 1):
        driver = subprocess.Popen(
            [sys.executable, str(script)], env=environment, stderr=subprocess.DEVNULL
        )
        begun = lines(folder)
        deadline = time.monotonic() + 120
        while driver.poll() is None and turn < kills:
            time.sleep(0.05)
            assert time.monotonic() < deadline
            if lines(folder) < begun + 4 * (1 + made % 2):
                continue
            for worker in children(driver.pid):
                if dice.random() < 0.5:
                    os.kill(worker, signal.SIGKILL)
            if dice.random() < 0.7:
                driver.kill()
                made += 1
                break
            begun = lines(folder)
        assert driver.wait(timeout=600) in (0, -signal.SIGKILL)
    return made


def lines(folder: Path) -> int:
    log = folder / "epochs.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def children(pid: int) -> list[int]:
    """The driver's workers, by what the system says."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    found = []
    for child in map(int, text.split()):
        try:
            command = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            continue
        if b"spawn_main" in command:
            found.append(child)
    return found


def check(folder: Path, trials: int, kills: int) -> None:
    study = snapshot.take(folder / "run")
    assert [trial.number for trial in study.trials] == list(range(trials))
    assert all(trial.state == TrialState.COMPLETE for trial in study.trials)
    assert len({trial.user_attrs["fingerprint"] for trial in study.trials}) == trials
    trained = Counter((folder / "epochs.log").read_text().splitlines())
    assert {line.split()[0] for line in trained} == {f"{number}-0" for number in range(trials)}
    # An epoch is logged after its checkpoint is written: it is never trained again.
    assert set(trained.values()) == {1}
    assert kills
    done = [json.loads(line) for line in (folder / "run/events.ndjson").read_text().splitlines()]
    told = Counter(event["trial"] for event in done if event["event"] == "done")
    assert all(count == 1 for count in told.values())


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="finds processes by /proc, which is Linux's"
)


@pytest.mark.slow
@needs_proc
def test_killed_workers_and_drivers_lose_and_double_nothing(tmp_path: Path) -> None:
    kills = kill_all(tmp_path, trials=6, kills=1, epoch_s=0.02, seed=0)
    check(tmp_path, 6, kills)


@needs_proc
@pytest.mark.slow
def test_two_hundred_trials_and_twenty_killed_drivers(tmp_path: Path) -> None:
    kills = kill_all(tmp_path, trials=200, kills=20, epoch_s=0.05, seed=1)
    assert kills >= 15
    check(tmp_path, 200, kills)
