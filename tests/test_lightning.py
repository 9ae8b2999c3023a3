"""A converted model in Lightning: the callback of the README steps, saves and restores."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kwlayers

EPOCHS, WARMUP = 2, 1.5


@pytest.fixture(scope="module")
def lightning(request: pytest.FixtureRequest) -> ModuleType:
    """`lightning`, which imports torchvision where that is installed."""
    if importlib.util.find_spec("torchvision") is not None:
        request.getfixturevalue("torchvision_models")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("lightning", reason="lightning is not installed")  # type: ignore[no-any-return]


def batches() -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 3, 8, 6, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(5, (16,), generator=generator)), batch_size=4)


def make() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    plan = kwlayers.plan_model(model, (3, 8, 6), ratio=1, sharing=[["0"], ["3"]])
    return kwlayers.convert_(model, plan)


def callback(lightning: ModuleType) -> type:
    """The README's, as it stands there."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    code = next(part for part in readme.split("```python\n")[1:] if "Callback" in part)
    variables: dict[str, Any] = {}
    exec(compile(code.split("```")[0], "README.md", "exec"), variables)
    return variables["Temperature"]


def module(lightning: ModuleType) -> Any:
    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = make()
            self.seen: list[float] = []

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            self.seen.append(float(self.net[0].attention.temperature))
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    return Module()


def fit(lightning: ModuleType, folder: Path, model: Any, epochs: int, resume: Any = None) -> None:
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=[callback(lightning)(WARMUP)],
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, batches(), ckpt_path=resume)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")


@pytest.fixture
def expected() -> tuple[list[float], nn.Module]:
    """The same training by hand, and its temperatures in closed form."""
    model, steps = make(), EPOCHS * len(batches())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    temperatures = [max(0.0, 1 - it / (WARMUP * len(batches()))) for it in range(1, steps + 1)]
    for temperature, (x, y) in zip(temperatures, [*batches(), *batches()], strict=True):
        kwlayers.set_temperature_(model, temperature)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return temperatures, model


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    state = expected.state_dict()
    assert state.keys() == found.state_dict().keys()
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore:::lightning")
def test_a_trained_and_a_resumed_module_are_what_the_plain_loop_gives(
    lightning: ModuleType, tmp_path: Path, expected: tuple[list[float], nn.Module]
) -> None:
    temperatures, by_hand = expected
    whole = module(lightning)
    fit(lightning, tmp_path, whole, EPOCHS)
    assert whole.seen == pytest.approx(temperatures)
    assert_same(whole.net, by_hand)

    fit(lightning, tmp_path, module(lightning), 1)
    resumed = module(lightning)
    fit(lightning, tmp_path, resumed, EPOCHS, tmp_path / "1.ckpt")
    assert resumed.seen == pytest.approx(temperatures[len(batches()) :])
    assert_same(resumed.net, by_hand)
