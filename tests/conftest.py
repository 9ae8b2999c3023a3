"""Fixtures shared by all tests: the libraries that serve as independent references."""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # side by side, also what tests start: a thread each
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("COLUMNS", None)  # which xdist sets; output is as wide as without it

import torch


def _interpret_triton() -> None:
    """Import Triton with its interpreter on, before torch imports it without."""
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ImportError):
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
            importlib.import_module("triton")


_interpret_triton()


def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`: every worker takes about half a gigabyte."""
    return min(os.cpu_count() or 1, 8)


# A torch.library.Library withdraws its definitions when it is collected.
_kept_libraries: list[Any] = []


@contextmanager
def _third_party_import(package: str) -> Iterator[None]:
    """Warnings that ``package`` raises about itself while it is imported are not ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=rf"{package}(\.|$)")
        yield


def _declare_torchvision_operators() -> None:
    """Give the two operators that importing torchvision asks for a schema, without a kernel."""
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept_libraries.append(library)


@pytest.fixture(scope="session")
def torchvision_models() -> ModuleType:
    """``torchvision.models``, also where torchvision's operators were built for another torch."""
    with _third_party_import("torchvision"):
        try:
            pytest.importorskip("torchvision", reason="torchvision is not installed")
        except RuntimeError as error:
            if "torchvision::" not in str(error):
                raise
            _declare_torchvision_operators()
        return importlib.import_module("torchvision.models")


@pytest.fixture(scope="session")
def timm(torchvision_models: ModuleType) -> ModuleType:
    """``timm``, which imports torchvision itself."""
    with _third_party_import("timm"):
        module: ModuleType = pytest.importorskip("timm", reason="timm is not installed")
        return module
