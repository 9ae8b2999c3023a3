"""The short training: seeded, on held-out images, and it learns."""

from __future__ import annotations

import math

import pytest
import torch

from kwlayers import plan_model
from kwlayers.plan import Plan
from kwsearch import data, proxy, zoo
from kwsearch.recipe import Proxy

SHORT = Proxy(
    data="digits",
    resolution=8,
    epochs=2,
    subset=120,
    batch_size=40,
    lr=0.05,
    temperature_epochs=1,
    augment="flip",
    device="cpu",
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():  # type: ignore[no-untyped-def]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def plan() -> Plan:
    with torch.device("meta"):
        model = zoo.create("resnet20")
    return plan_model(model, (3, 32, 32), params=60_000)


def run(plan: Plan, settings: Proxy, seed: int = 0) -> list[float]:
    images = proxy.load(settings, (3, 32, 32))
    seen: list[float] = []
    score = proxy.train(
        lambda: zoo.create("resnet20"),
        plan,
        images,
        settings,
        seed,
        lambda epoch, accuracy: seen.append(accuracy),
    )
    assert score == seen[-1]
    return seen


def test_one_seed_gives_one_result(plan: Plan) -> None:
    first = run(plan, SHORT)
    assert len(first) == 2
    assert run(plan, SHORT) == first


def test_held_out_images_are_no_training_images() -> None:
    images = proxy.load(Proxy(holdout=0.25, resolution=8), (3, 32, 32))
    train = {bytes(x.numpy().tobytes()) for x in images.train.x}
    valid = [bytes(x.numpy().tobytes()) for x in images.valid.x]
    assert len(images.valid.y) == pytest.approx(0.25 * 1437, abs=10)
    # Digits has a few images twice; none is shared by construction.
    assert len(train.intersection(valid)) <= 2


def test_images_are_normalised_and_grey_fills_every_channel() -> None:
    images = proxy.load(Proxy(resolution=8), (3, 32, 32))
    x = images.batch(images.train.x)
    assert x.shape[1:] == (3, 8, 8)
    assert x.mean().item() == pytest.approx(0, abs=1e-4)
    assert x.std().item() == pytest.approx(1, abs=1e-3)
    assert torch.equal(x[:, 0], x[:, 2])


def test_a_loss_that_is_no_number_is_reported_as_such(plan: Plan) -> None:
    wild = SHORT.model_copy(update={"lr": 1e30})
    with pytest.raises(proxy.Diverged, match=r"the loss became (nan|inf) in epoch 1"):
        run(plan, wild)


def test_a_shift_moves_and_a_flip_mirrors() -> None:
    x = torch.zeros(64, 1, 8, 8, dtype=torch.uint8)
    x[:, :, 4, 2] = 9
    generator = torch.Generator().manual_seed(0)
    assert proxy.augment(x, "none", generator) is x
    moved = proxy.augment(x, "shift", generator)
    assert moved.shape == x.shape
    # An eighth of 8 is 1: at most one pixel in each direction, nothing lost.
    assert moved.sum() == x.sum()
    rows, columns = (moved[0, 0] == 9).nonzero()[0].tolist()
    assert abs(rows - 4) <= 1
    assert abs(columns - 2) <= 1
    flipped = proxy.augment(x, "flip", generator)
    assert len({int((image == 9).nonzero()[0, 2]) for image in flipped}) == 2


def test_accuracy_is_the_share_of_held_out_images_that_are_right() -> None:
    images = proxy.load(Proxy(resolution=8), (3, 32, 32))

    class AlwaysZero(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.eye(10)[torch.zeros(len(x), dtype=torch.long)]

    expected = float((images.valid.y == 0).float().mean())
    assert proxy.evaluate(AlwaysZero(), images, 7) == pytest.approx(expected)


def test_the_learning_rate_rises_and_then_falls_to_nothing() -> None:
    factor = proxy._cosine(100)
    assert factor(0) == pytest.approx(1 / 5)
    assert factor(5) == pytest.approx(1)
    # Half of the cosine's 95 steps.
    assert factor(5 + 95 // 2) == pytest.approx(0.5 * (1 + math.cos(math.pi * 47 / 95)))
    assert factor(100) == pytest.approx(0)


def test_colour_images_need_a_model_for_them() -> None:
    colour = data.Images(
        torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]), 2, "c", ()
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda *args, **kwargs: colour)
        with pytest.raises(
            data.DataError, match="3 channels, the model takes 1: set input to 3x8x8"
        ):
            proxy.load(Proxy(data="c"), (1, 8, 8))


def test_cuda_that_is_not_there_is_one_clear_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(data.DataError, match=r"proxy\.device is cuda, but torch finds none"):
        proxy.device_of(Proxy(device="cuda"))
