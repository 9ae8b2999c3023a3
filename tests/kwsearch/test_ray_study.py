"""Studies on a real Ray cluster, of three nodes on this machine, one of which is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kwsearch.executors import ExecutorError
from tests.kwsearch import test_kills
from tests.kwsearch.distributed import Watcher, study

pytest.importorskip("ray", reason="Ray is not installed")


class Nodes:
    """A cluster of which a node can be killed."""

    def __init__(self, count: int, cpus: int) -> None:
        from ray.cluster_utils import Cluster

        self.cluster: Any = Cluster()
        self.nodes = [self.cluster.add_node(num_cpus=cpus) for _ in range(count)]

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def kill(self) -> None:
        """The last one, with all that runs on it: its workers are children of its raylet."""
        node = self.nodes.pop()
        raylet = node.all_processes["raylet"][0].process.pid
        workers = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
        for pid in (raylet, *map(int, workers)):
            os.kill(pid, signal.SIGKILL)
        self.cluster.remove_node(node, allow_graceful=False)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    found = Nodes(3, 2)
    yield found
    found.cluster.shutdown()


def test_a_killed_node_loses_and_doubles_nothing(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    watcher = Watcher(at_20=nodes.kill)
    search = "trials: 64, workers: auto, executor: ray, pruner: none"
    made = study(tmp_path, search, watcher=watcher, address=nodes.address)
    made.run(function="simulated:train")
    assert any("its process was taken away (NodeDiedError" in line for line in watcher.said)
    test_kills.check(tmp_path, 64, kills=1)


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_deterministic_studies_are_the_same_on_ray_and_here(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    found = []
    for name, address in (("local", None), ("ray", nodes.address)):
        monkeypatch.syspath_prepend(tmp_path / name)
        search = f"trials: 24, workers: 3, executor: {name}, deterministic: true, calibration: 6"
        made = study(tmp_path / name, search, sampler=sampler, address=address)
        result = made.run(function="simulated:train")
        found.append([(t.state, t.value, t.user_attrs["fingerprint"]) for t in result.trials])
    assert found[0] == found[1]
    assert len({state for state, _, _ in found[0]}) == 2  # some were stopped


def test_what_no_node_has_is_said_at_once(nodes: Nodes, tmp_path: Path) -> None:
    with pytest.raises(
        ExecutorError,
        match=r"a trial asks for 3 CPUs and 0\.5 GPUs, which no node of the Ray cluster has: its "
        r"nodes have 2 CPUs and 0 GPUs, 2 CPUs and 0 GPUs, 2 CPUs and 0 GPUs; lower search\.res",
    ):
        study(
            tmp_path, "executor: ray, resources: {cpus: 3, gpus: 0.5}", address=nodes.address
        ).run(function="simulated:train")


def test_a_cluster_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ExecutorError, match=r"no Ray cluster at 127\.0\.0\.1:1: .* refused; `ray"):
        study(tmp_path, "trials: 2, executor: ray", address="127.0.0.1:1").run(
            function="simulated:train"
        )
