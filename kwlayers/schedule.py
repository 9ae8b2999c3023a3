"""Temperature over training: from even or fixed mixtures to the learned attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Where `convert_` leaves what it made.
WAREHOUSES = "kw_warehouses"


class Tempered(nn.Module):
    """An attention whose warm-up is a buffer: `temperature`, from 1 to 0, the share that is left.

    What it means is the method's: KernelWarehouse mixes with a fixed assignment; a softmax's or
    sigmoid's own temperature is 1 + (max_temperature - 1) * temperature. 0 until something sets it.
    """

    temperature: Tensor

    def _add_temperature(self, **kwargs: Any) -> None:
        self.register_buffer("temperature", torch.zeros((), **kwargs))


def set_temperature_(model: nn.Module, temperature: float) -> nn.Module:
    """Set the temperature (in [0, 1]) of every dynamic layer of `model` that has one."""
    if not 0 <= temperature <= 1:
        raise ValueError(f"temperature {temperature}: it must be in [0, 1]")
    for module in model.modules():
        if isinstance(module, Tempered):
            module.temperature.fill_(temperature)
    return model


class TemperatureSchedule:
    """Linear from 1 to 0 over the first `warmup_epochs`, one `step()` before each forward.

    Step `it`, counted from 1, trains at `max(0, 1 - it / (warmup_epochs * steps_per_epoch))`
    (arXiv 2406.07879, section 3.4; 20 of 300 epochs there, 15 of 150 for MobileNetV2).
    The temperature itself is in the model's state dict; save `state_dict()` beside it. A converted
    model whose method has no temperature trains as it is.
    """

    def __init__(self, model: nn.Module, warmup_epochs: float, steps_per_epoch: int) -> None:
        if not warmup_epochs >= 0 or steps_per_epoch < 1:
            raise ValueError(
                f"warmup_epochs {warmup_epochs}, steps_per_epoch {steps_per_epoch}: "
                "at least 0 epochs, of at least 1 step"
            )
        tempered = any(isinstance(module, Tempered) for module in model.modules())
        if not tempered and not any(hasattr(module, WAREHOUSES) for module in model.modules()):
            raise ValueError("the model has no dynamic layer: convert_ it first")
        self.model = model
        self.warmup_steps = warmup_epochs * steps_per_epoch
        self.last_step = 0
        set_temperature_(model, self.temperature)

    @property
    def temperature(self) -> float:
        """The temperature of the current step."""
        if self.last_step >= self.warmup_steps:
            return 0.0
        return 1.0 - self.last_step / self.warmup_steps

    def step(self) -> float:
        """Move to the next iteration; returns its temperature."""
        self.last_step += 1
        set_temperature_(self.model, self.temperature)
        return self.temperature

    def state_dict(self) -> dict[str, Any]:
        """What to put into a checkpoint."""
        return {"last_step": self.last_step, "warmup_steps": self.warmup_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.last_step = int(state["last_step"])
        self.warmup_steps = float(state["warmup_steps"])
        set_temperature_(self.model, self.temperature)
