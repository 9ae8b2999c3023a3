"""Fixtures of the tests that train small networks."""

from __future__ import annotations

from collections.abc import Iterator

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
