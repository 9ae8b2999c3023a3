"""The short training: seeded, on held-out images, and nothing is lost when it is interrupted."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kwlayers.plan import Plan
from kwsearch import data, labelled_data, proxy, zoo
from kwsearch.checkpoint import CheckpointError
from kwsearch.recipe import Proxy

pytestmark = pytest.mark.usefixtures("one_thread")

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


def run(plan: Plan, settings: Proxy, seed: int = 0) -> list[float]:
    images = labelled_data.load(settings, (3, 32, 32))
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
    images = labelled_data.load(Proxy(holdout=0.25, resolution=8), (3, 32, 32))
    train = {bytes(x.numpy().tobytes()) for x in images.train.x}
    valid = [bytes(x.numpy().tobytes()) for x in images.valid.x]
    assert len(images.valid.y) == pytest.approx(0.25 * 1437, abs=10)
    # Digits has a few images twice; none is shared by construction.
    assert len(train.intersection(valid)) <= 2


def test_images_are_normalised_and_grey_fills_every_channel() -> None:
    images = labelled_data.load(Proxy(resolution=8), (3, 32, 32))
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
    assert labelled_data.augment(x, "none", generator) is x
    moved = labelled_data.augment(x, "shift", generator)
    assert moved.shape == x.shape
    # An eighth of 8 is 1: at most one pixel in each direction, nothing lost.
    assert moved.sum() == x.sum()
    rows, columns = (moved[0, 0] == 9).nonzero()[0].tolist()
    assert abs(rows - 4) <= 1
    assert abs(columns - 2) <= 1
    flipped = labelled_data.augment(x, "flip", generator)
    assert len({int((image == 9).nonzero()[0, 2]) for image in flipped}) == 2


def test_accuracy_is_the_share_of_held_out_images_that_are_right() -> None:
    images = labelled_data.load(Proxy(resolution=8), (3, 32, 32))

    class AlwaysZero(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.eye(10)[torch.zeros(len(x), dtype=torch.long)]

    expected = float((images.valid.y == 0).float().mean())
    assert images.score(AlwaysZero(), 7) == pytest.approx(expected)


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
            labelled_data.load(Proxy(data="c"), (1, 8, 8))


def test_cuda_that_is_not_there_is_one_clear_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(data.DataError, match=r"proxy\.device is cuda, but torch finds none"):
        proxy.device_of(Proxy(device="cuda"))


# Interrupted and resumed

LONGER = SHORT.model_copy(update={"epochs": 3})


def with_dropout() -> nn.Module:
    """Static, and every forward draws from torch's random numbers."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(144, 10),
    )


class Training:
    """Calls of `proxy.train` on one network, and what they report."""

    def __init__(
        self,
        plan: Plan | None,
        settings: Proxy = LONGER,
        seed: int = 3,
        static: Callable[[], nn.Module] = with_dropout,
    ) -> None:
        self.plan = plan
        self.static = static
        self.settings = settings
        self.seed = seed
        self.seen: dict[int, float] = {}
        self.images = labelled_data.load(settings, (3, 32, 32))

    def make(self) -> nn.Module:
        self.model = self.static() if self.plan is None else zoo.create("resnet20")
        return self.model

    def report(self, epoch: int, accuracy: float) -> None:
        assert epoch not in self.seen
        self.seen[epoch] = accuracy

    def run(self, report: Callable[[int, float], None] | None = None, **options: Any) -> float:
        return proxy.train(
            self.make,
            self.plan,
            self.images,
            self.settings,
            self.seed,
            report or self.report,
            **options,
        )

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.model.state_dict()


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.fixture(scope="module", params=["static", "dynamic", "adamw"])
def whole(request: pytest.FixtureRequest) -> Training:
    """A run from start to end that knows no checkpoint."""
    plan = request.getfixturevalue("plan") if request.param == "dynamic" else None
    settings = LONGER
    if request.param == "adamw":
        settings = LONGER.model_copy(update={"optimizer": "adamw", "lr": 0.01})
    training = Training(plan, settings)
    assert training.run() == training.seen[3]
    assert len(training.seen) == 3
    return training


def again(whole: Training) -> Training:
    return Training(whole.plan, whole.settings, whole.seed)


def test_a_run_that_stops_at_every_epoch_is_the_run_that_does_not(
    whole: Training, tmp_path: Path
) -> None:
    training = again(whole)
    for epoch in (1, 2, 3):
        torch.manual_seed(epoch)  # another process has drawn other numbers
        score = training.run(until=epoch, checkpoint=tmp_path / "run")
        assert score == whole.seen[epoch]
        assert max(training.seen) == epoch
    assert training.seen == whole.seen
    assert_same(training.weights, whole.weights)


@pytest.mark.parametrize("batch", [2, 4, 6, 9])
def test_a_run_killed_within_any_epoch_goes_on_from_the_one_before(
    whole: Training, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = again(whole)
    batches = 0
    augment = labelled_data.augment

    def killed(*args: Any) -> Tensor:
        nonlocal batches
        batches += 1
        if batches == batch:
            raise KeyboardInterrupt
        return augment(*args)

    with monkeypatch.context() as patch:
        patch.setattr(labelled_data, "augment", killed)
        with pytest.raises(KeyboardInterrupt):
            training.run(checkpoint=tmp_path / "run")
    # Three batches an epoch.
    assert len(training.seen) == (batch - 1) // 3
    training.run(checkpoint=tmp_path / "run")
    assert training.seen == whole.seen
    assert_same(training.weights, whole.weights)


def test_an_epoch_is_written_before_it_is_reported(tmp_path: Path) -> None:
    training = Training(None)
    written = []

    def stop(epoch: int, accuracy: float) -> None:
        written.append(torch.load(tmp_path / "run", weights_only=True)["accuracies"])
        training.report(epoch, accuracy)
        raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            training.run(stop, checkpoint=tmp_path / "run")
    assert [len(accuracies) for accuracies in written] == [1, 2, 3]
    assert written[-1] == [*training.seen.values()]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_epochs_that_a_checkpoint_holds_are_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(None)
    training.run(checkpoint=tmp_path / "run")
    seen = dict(training.seen)
    monkeypatch.setattr(labelled_data, "augment", pytest.fail)
    assert training.run(checkpoint=tmp_path / "run") == seen[3]
    assert training.run(checkpoint=tmp_path / "run", until=1) == seen[1]


def test_a_checkpoint_of_another_run_is_refused_and_left_alone(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "run"
    Training(None).run(checkpoint=path, until=1)
    before = path.read_bytes()
    faster = LONGER.model_copy(update={"lr": 0.1})
    for other in (Training(plan), Training(None, seed=4), Training(None, faster)):
        with pytest.raises(CheckpointError, match=r"run is not a checkpoint of this network, plan"):
            other.run(checkpoint=path)
    network = Training(None, static=lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 10)))
    with pytest.raises(CheckpointError, match="delete it, or name another file"):
        network.run(checkpoint=path)
    assert path.read_bytes() == before


def test_threads_device_and_micro_batches_may_change_between_epochs(tmp_path: Path) -> None:
    Training(None).run(checkpoint=tmp_path / "run", until=1)
    elsewhere = Training(None, LONGER.model_copy(update={"threads": 1, "device": "auto"}))
    elsewhere.run(checkpoint=tmp_path / "run", until=2, splits=2)
    assert [*elsewhere.seen] == [2]


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_torn_checkpoint_is_trained_afresh_and_overwritten(kept: float, tmp_path: Path) -> None:
    path = tmp_path / "run"
    training = Training(None)
    score = training.run(checkpoint=path, until=1)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    training.seen.clear()
    assert training.run(checkpoint=path, until=1) == score
    assert torch.load(path, weights_only=True)["accuracies"] == [score]
    path.write_bytes(b"no checkpoint at all")
    training.seen.clear()
    assert training.run(checkpoint=path, until=1) == score


def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    training = Training(None)
    training.run(checkpoint=path, until=1)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        training.run(checkpoint=path)
    assert [*training.seen] == [1]  # what is not written is not reported
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


# Micro-batches


def test_micro_batches_are_even_and_none_holds_a_single_image() -> None:
    assert labelled_data.micro_batch_sizes(8, 1) == [8]
    assert labelled_data.micro_batch_sizes(10, 4) == [3, 3, 2, 2]
    assert labelled_data.micro_batch_sizes(7, 4) == [3, 2, 2]
    assert labelled_data.micro_batch_sizes(3, 2) == [3]
    assert labelled_data.micro_batch_sizes(1, 2) == [1]
    for batch in range(1, 40):
        for splits in range(1, 10):
            sizes = labelled_data.micro_batch_sizes(batch, splits)
            assert sum(sizes) == batch
            assert len(sizes) == min(splits, max(batch // 2, 1))
            assert max(sizes) - min(sizes) <= 1


def test_micro_batches_train_as_the_whole_batch_does() -> None:
    # Nothing in it looks at other images of the batch. 40 images split into 14, 13 and 13.
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 10))

    trained = []
    for splits in (1, 3):
        training = Training(None, static=make)
        training.run(splits=splits)
        trained.append(training.weights)
    for name, tensor in trained[0].items():
        # Sums in another order: float32 rounding over nine steps. A wrong weight is 1e-2 off.
        torch.testing.assert_close(trained[1][name], tensor, rtol=0, atol=1e-5)


def test_batch_norms_see_micro_batches() -> None:
    training = Training(None)
    training.run(until=1, splits=2)
    # 96 images in batches of 40, 40 and 16.
    assert training.weights["1.num_batches_tracked"] == 3 * 2


def test_schedules_move_once_a_batch_and_span_all_epochs(plan: Plan, tmp_path: Path) -> None:
    settings = LONGER.model_copy(update={"temperature_epochs": 2})
    training = Training(plan, settings)

    def rate() -> float:
        state = torch.load(tmp_path / "run", weights_only=True)
        return float(state["optimizer"]["param_groups"][0]["lr"])

    training.run(until=1, splits=2, checkpoint=tmp_path / "run")
    temperatures = {float(t) for name, t in training.weights.items() if "temperature" in name}
    assert temperatures == {0.5}  # step 3 of 6
    # After 3 of 9 steps: one to warm up, then 2 of the cosine's 8.
    assert rate() == pytest.approx(0.05 * 0.5 * (1 + math.cos(math.pi * 2 / 8)))
    training.run(checkpoint=tmp_path / "run")
    assert rate() == pytest.approx(0, abs=1e-9)


def test_a_network_is_prepared_at_the_temperature_that_training_starts_at(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(model: nn.Module, *_: object) -> nn.Module:
        state = model.state_dict().items()
        seen.append({float(value) for name, value in state if name.endswith("temperature")})
        return model

    monkeypatch.setattr(labelled_data, "prepare_", watched)
    run(plan, SHORT)
    assert seen == [{1.0}]


# Mixup


def test_shares_are_those_of_the_beta_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    shares = labelled_data.mixing(4000, 1.0, generator)[0].tolist()
    assert 0.5 <= min(shares) < max(shares) <= 1
    assert sum(shares) / 4000 == pytest.approx(0.75, abs=0.01)  # of max(u, 1 - u), u uniform
    assert sum(share > 0.9 for share in shares) / 4000 == pytest.approx(0.2, abs=0.02)
    assert sorted(labelled_data.mixing(9, 0.3, generator)[1].tolist()) == list(range(9))


def test_mixup_learns_mixed_labels_of_mixed_images() -> None:
    settings = SHORT.model_copy(
        update={
            "augment": "none", "batch_size": 200, "epochs": 1, "mixup": 0.8, "momentum": 0.0,
            "weight_decay": 0.0, "temperature_epochs": 0,
        }
    )  # fmt: skip
    images = labelled_data.load(settings, (3, 32, 32))

    def make() -> nn.Module:
        torch.manual_seed(5)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))

    trained: list[nn.Module] = []
    proxy.train(make, None, images, settings, 3, lambda *_: None, done=trained.append)

    model = make()
    order = torch.Generator().manual_seed(3)
    shuffled = torch.randperm(len(images.train.y), generator=order)
    share, others = labelled_data.mixing(len(shuffled), 0.8, order)
    assert len(share.unique()) == len(share)
    share = share[:, None]
    x = images.batch(images.train.x[shuffled])
    labels = torch.eye(10)[images.train.y[shuffled]]
    labels = share * labels + (1 - share) * labels[others]
    portion = share[..., None, None]
    log = torch.log_softmax(model(portion * x + (1 - portion) * x[others]), 1)
    (-(labels * log).sum(1).mean()).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), trained[0].parameters(), strict=True):
            assert mine.grad is not None
            torch.testing.assert_close(theirs, mine - 0.05 * mine.grad, rtol=1e-4, atol=1e-6)
