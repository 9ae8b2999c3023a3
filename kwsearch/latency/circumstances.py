"""What decides times besides the calls: the device, versions, threads."""

from __future__ import annotations

from typing import Any

import torch

from kwsearch import timing


def here(device: str = "cpu", dtype: str = "float32") -> dict[str, Any]:
    """Of this process, for a table. device: cpu in place of one that is not here."""
    if device.partition(":")[0] != "cuda" or gpu() is None:
        device = "cpu"
    machine, versions = timing.machine(device), timing.versions()
    return {
        "cpu": machine["cpu"],
        "gpu": machine["gpu"],
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "torch": versions["torch"],
        "malloc": timing.malloc(),
        "system": machine["system"],
        "versions": versions,
        "commit": timing.commit(),
        "environment": timing.environment(),
    }


def gpu() -> str | None:
    """The name of the GPU that torch takes first."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
