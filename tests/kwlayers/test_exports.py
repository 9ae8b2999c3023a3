"""What the package exports, and that planning from Python data imports no torch."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kwlayers

# Everything but tracing and the layers themselves.
TORCH_FREE = (
    "geometry", "plan", "cost", "families", "stages", "sharing", "planner", "solver",
    "official", "official_models", "official_weights",
)  # fmt: skip


def imports_of(statement: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after `statement`."""
    report = "import sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}\n{report}"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_every_exported_name_has_a_home_and_every_home_is_exported() -> None:
    assert sorted(kwlayers.__all__) == sorted(kwlayers._HOME)
    assert len(set(kwlayers.__all__)) == len(kwlayers.__all__) > 20
    assert kwlayers.__all__ == sorted(kwlayers.__all__)


@pytest.mark.parametrize("name", kwlayers.__all__)
def test_every_exported_name_is_what_its_home_module_defines(name: str) -> None:
    value = getattr(kwlayers, name)
    home = importlib.import_module(f"kwlayers.{kwlayers._HOME[name]}")
    assert value is getattr(home, name)
    assert value.__module__ == home.__name__, "defined elsewhere"
    assert name in dir(kwlayers)


def test_every_name_that_the_readme_gives_is_there() -> None:
    named = re.findall(r"\bkwlayers\.(\w+)", (Path(__file__).parents[2] / "README.md").read_text())
    assert {"convert_", "to_static_"} < set(named)
    for name in set(named) - set(kwlayers.__all__):
        importlib.import_module(f"kwlayers.{name}")


def test_an_unknown_name_is_an_attribute_error_with_the_name() -> None:
    with pytest.raises(AttributeError, match="'kwlayers' has no attribute 'convert_model'"):
        kwlayers.convert_model  # noqa: B018
    assert not hasattr(kwlayers, "torch")


@pytest.mark.parametrize("module", TORCH_FREE)
def test_planning_modules_load_without_torch(module: str) -> None:
    loaded = imports_of(f"import kwlayers.{module}")
    assert "kwlayers" in loaded
    assert "torch" not in loaded


def test_the_exported_planning_names_load_without_torch() -> None:
    assert "torch" not in imports_of(
        "from kwlayers import BudgetError, Cost, Group, Network, Plan, PlanError, Settings, "
        "Share, Site, plan_model, plan_network"
    )


def test_a_network_is_planned_and_counted_without_torch() -> None:
    assert "torch" not in imports_of(
        "from kwlayers import Network, Settings, Site, plan_network\n"
        "site = Site('a', 'conv2d', 8, 8, (3, 3))\n"
        "network = Network((site,), 576, 576, (8, 1, 1))\n"
        "plan = plan_network(network, Settings(sharing=[['a']]), ratio=1)\n"
        "assert plan.cost().params.warehouses == 576"
    )


def test_a_module_that_imports_torch_is_caught() -> None:
    assert "torch" in imports_of("import kwlayers.sites")
