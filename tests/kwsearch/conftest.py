"""Fixtures of the tests that train small networks."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kwlayers import plan_model
from kwlayers.plan import Plan
from kwsearch import zoo


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A small one, of resnet20."""
    with torch.device("meta"):
        model = zoo.create("resnet20")
    return plan_model(model, (3, 32, 32), params=60_000)


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Writes a module of one's own into the current directory, an empty one, and names it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", os.getcwd())])
    before = set(sys.modules)

    def write(text: str) -> str:
        name = f"own_{tmp_path.name}_{len(list(tmp_path.glob('own_*.py')))}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        return name

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("own_"):
            del sys.modules[name]
