"""Every construction that was counted in published implementations is compared with ours."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from kwlayers import methods
from tests.kwlayers.methods.reference import ASKED, ENTRIES, network

_STATIC = [entry for entry in ENTRIES if entry["method"].startswith("static")]


def test_every_count_is_compared_with_ours() -> None:
    for name in methods.NAMES:
        if (Path(__file__).parent / f"test_{name}.py").exists():
            importlib.import_module(f"tests.kwlayers.methods.test_{name}")
    every = {(entry["method"], entry["constructor"]) for entry in ENTRIES}
    assert every - ASKED == {(entry["method"], entry["constructor"]) for entry in _STATIC}


@pytest.mark.parametrize("entry", _STATIC, ids=lambda entry: entry["constructor"])
def test_static_networks_are_the_published_ones(entry: dict[str, Any]) -> None:
    width, name = entry["backbone"].removeprefix("mobilenetv2_"), entry["backbone"]
    found = network(name if width == name else f"mobilenetv2_{int(width) / 100}")
    headless = "no fc" in entry["method"]
    head = found.sites[-1]
    assert found.params - headless * head.params == entry["params"]
    assert found.macs - headless * head.macs == entry["macs_conv_linear_matmul_224"]
