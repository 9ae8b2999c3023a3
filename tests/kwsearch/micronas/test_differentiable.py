"""The differentiable search: schedules, the loss, gradients, resuming, and what it finds."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kwsearch.micronas.cycles import CycleError, CycleTable
from kwsearch.micronas.differentiable import Search, Settings, Step, Windows
from kwsearch.micronas.expected import ExpectedCycles, needed
from kwsearch.micronas.feasible import Limits
from kwsearch.micronas.mixture import one_hot, with_output
from kwsearch.micronas.peak_memory import ExpectedPeak, peak_bytes
from kwsearch.micronas.space import Key, macs, operators, params
from tests.kwsearch.micronas.spaces import TINY, random_mixture

pytestmark = pytest.mark.usefixtures("one_thread")


def by_macs(key: Key) -> int:
    """Cycles that grow with the work."""
    return 100 + 4 * key.macs + 10 * math.prod(key.output)


TABLE = CycleTable("a board", 1.0, {key: by_macs(key) for key in needed(TINY)})


def windows(count: int, seed: int) -> Windows:
    """Of two classes: whether the steps rise or fall."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (count,), generator=generator)
    slope = torch.linspace(-1, 1, 6)[:, None] * (2 * y[:, None, None, None] - 1)
    return slope + 0.3 * torch.randn(count, 1, 6, 3, generator=generator), y


def search(limits: Limits | None = None, **changes: Any) -> Search:
    settings = Settings(**{"epochs": 2, "batch_size": 16, **changes})
    return Search(
        TINY, windows(40, 0), windows(24, 1), limits=limits, table=TABLE, settings=settings
    )


def logits_of(one: Search) -> list[Tensor]:
    return [value.detach().clone() for value in one.logits.values()]


def test_schedules_are_the_published_ones() -> None:
    settings = Settings()
    assert settings.temperature_at(0) == 1
    assert settings.temperature_at(2) == pytest.approx(0.995**2)
    assert settings.temperature_at(2296) > 1e-5 == settings.temperature_at(2297)
    assert settings.logit_lr_at(0, 500) == 0.36
    assert settings.logit_lr_at(250, 500) == pytest.approx((0.36 + 8e-4) / 2)
    assert settings.logit_lr_at(500, 500) == pytest.approx(8e-4)


def test_logits_start_as_published() -> None:
    found = search().logits
    for name, one in found.items():
        if name.endswith(("channels", "bottleneck")):
            assert not one.any()
        else:
            assert 0 < one.abs().max() < 6e-3


def test_a_step_is_of_all_batches_in_turn() -> None:
    one = search()
    assert one.steps == 2 * 3  # 40 windows in batches of at most 16
    seen: list[Step] = []
    one.run(seen.append)
    assert [step.number for step in seen] == [1, 2, 3, 4, 5, 6]
    assert [step.temperature for step in seen] == pytest.approx([0.995**n for n in range(6)])
    batches = [one._batch(one.train, n, 0)[0] for n in range(6)]
    for first in (0, 3):
        passed = torch.cat(batches[first : first + 3]).flatten(1)
        assert len(passed.unique(dim=0)) == 40
    assert not torch.equal(batches[0], batches[3])


def test_the_loss_is_the_published_one() -> None:
    mixture = random_mixture(TINY, 0)
    took = float(ExpectedCycles(TINY, TABLE).milliseconds(mixture))
    held = float(ExpectedPeak(TINY)(mixture))
    total, ms, size = search(Limits(took / 2, int(held * 3))).penalties(mixture)
    assert (float(ms), float(size)) == (took, held)  # type: ignore[arg-type]
    expected = 4 * math.log(2) + 0.002 * math.log(held / int(held * 3))
    assert float(total) == pytest.approx(expected)
    total, *_ = search(Limits(bytes=int(held / 3))).penalties(mixture)
    assert float(total) == pytest.approx(4 * math.log(held / int(held / 3)))
    total, *_ = search(Limits(took / 3)).penalties(mixture)
    assert float(total) == pytest.approx(4 * math.log(3))
    total, *costs = search().penalties(mixture)
    assert (float(total), *map(float, costs)) == (0, took, held)
    _, ms, _ = Search(TINY, windows(4, 0), windows(4, 1)).penalties(mixture)
    assert ms is None


def test_the_loss_of_a_step_is_cross_entropy_and_penalties() -> None:
    step = search(Limits(1.0, 60)).step()
    assert step.milliseconds is not None
    penalty = 4 * math.log(step.milliseconds) + 4 * math.log(step.bytes / 60)
    assert step.loss == pytest.approx(step.cross_entropy + penalty, rel=1e-6)


@pytest.mark.parametrize("limits", [None, Limits(1.0), Limits(bytes=50), Limits(1.0, 50)])
def test_every_decision_is_moved_by_the_first_step(limits: Limits | None) -> None:
    one = search(limits)
    before = logits_of(one)
    one.step()
    moved = [(a - b).abs().max() for a, b in zip(before, logits_of(one), strict=True)]
    assert min(moved) > 0
    assert len(moved) == len(TINY.decisions)


def test_penalties_alone_have_a_gradient_at_every_decision() -> None:
    mixture = random_mixture(TINY, 0)
    leaves = [one.requires_grad_() for one in mixture.values()]
    for limits, without in ((Limits(1.0), set()), (Limits(bytes=50), {"time1.kernel"})):
        total, *_ = search(limits).penalties(mixture)
        grads = torch.autograd.grad(total, leaves, retain_graph=True)
        still = {
            name
            for name, grad in zip(mixture, grads, strict=True)
            if grad.max() - grad.min() < 1e-9
        }
        assert still == without  # bytes do not depend on a kernel


def test_logits_are_moved_at_the_rate_of_the_step() -> None:
    one = search(epochs=1)
    seen: list[Step] = []
    one.run(seen.append)
    rates = [Settings().logit_lr_at(number, 3) for number in range(3)]
    assert [step.logit_lr for step in seen] == rates
    assert one._logit_optimizer.param_groups[0]["lr"] == rates[-1]


def test_weights_are_not_moved_by_the_loss_of_the_logits() -> None:
    one = search(Limits(1.0), lr=1e-9)
    before = [value.detach().clone() for value in one.supernet.parameters()]
    one.step()
    for a, b in zip(before, one.supernet.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-7


def test_weights_gradients_are_clipped() -> None:
    one = search(clip=1e-3)
    one.step()
    norms = torch.stack([p.grad.norm() for p in one.supernet.parameters() if p.grad is not None])
    assert float(norms.norm()) == pytest.approx(1e-3, rel=1e-3)


def test_a_seed_decides_everything_and_leaves_others_draws_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = search(Limits(2.0, 70))
    found = first.run()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = search(Limits(2.0, 70))
    assert second.run() == found
    for a, b in zip(logits_of(first), logits_of(second), strict=True):
        assert torch.equal(a, b)
    other = search(Limits(2.0, 70), seed=1)
    other.run()
    same = [torch.equal(a, b) for a, b in zip(logits_of(first), logits_of(other), strict=True)]
    assert not any(same)


def test_a_search_that_was_saved_goes_on_to_the_bit() -> None:
    whole = search(Limits(2.0, 70))
    steps: list[Step] = []
    whole.run(steps.append)
    first = search(Limits(2.0, 70))
    for _ in range(3):
        first.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    rest = search(Limits(2.0, 70))
    rest.load_state_dict(torch.load(file, weights_only=True))
    later: list[Step] = []
    rest.run(later.append)
    assert later == steps[3:]
    for a, b in zip(logits_of(whole), logits_of(rest), strict=True):
        assert torch.equal(a, b)
    mine, theirs = whole.supernet.state_dict(), rest.supernet.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_saved_state_does_not_change_with_the_search() -> None:
    one = search()
    one.step()
    state = one.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    one.step()
    file.seek(0)
    before = torch.load(file, weights_only=True)
    for part in ("supernet", "logits"):
        assert all(torch.equal(state[part][name], value) for name, value in before[part].items())
    moments = zip(
        state["weight_optimizer"]["state"].values(),
        before["weight_optimizer"]["state"].values(),
        strict=True,
    )
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in moments)


@pytest.mark.parametrize(
    ("changes", "limits", "message"),
    [
        ({"seed": 1}, None, "the state is of another search: settings {.*'seed': 0}, not {.*'seed"),
        ({}, Limits(3.0), "the state is of another search: limits {'milliseconds': None, 'bytes'"),
    ],
)
def test_the_state_of_another_search_is_refused(
    changes: dict[str, Any], limits: Limits | None, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        search(limits, **changes).load_state_dict(search().state_dict())


def test_a_search_learns_to_tell_the_classes_apart() -> None:
    steps: list[Step] = []
    search(epochs=12, lr=1e-2).run(steps.append)
    losses = [step.train_loss for step in steps]
    assert sum(losses[-9:]) < 0.6 * sum(losses[:9])


def test_limits_make_the_expectations_small() -> None:
    limited: list[Step] = []
    found = search(Limits(2.4, 60), epochs=8).run(limited.append)
    for name in ("milliseconds", "bytes"):
        seen = [getattr(step, name) for step in limited]
        assert sum(seen[-5:]) < 0.6 * sum(seen[:5])
    assert not found.broken
    network = operators(TINY, found.architecture)
    assert found.bytes == peak_bytes(network) <= 60
    assert found.milliseconds == TABLE.latency(network).milliseconds
    assert found.milliseconds is not None
    assert found.milliseconds <= 2.4
    assert (found.params, found.macs) == (params(network), macs(network))


def lean_to(one: Search, architecture: Any) -> None:
    """Logits whose most probable is that."""
    with torch.no_grad():
        for name, value in one_hot(TINY, architecture).items():
            one.logits[name].copy_(3 * value)


def test_a_limit_that_binds_is_named_and_another_architecture_taken() -> None:
    one = search(Limits(2.4, 10_000))
    lean_to(one, TINY.maximum())
    found = one.result()
    assert found.preferred == TINY.maximum()
    (why,) = found.binding
    assert why.startswith("latency ")
    assert why.endswith("ms: above the limit of 2.4 ms")
    assert found.broken == ()
    assert found.architecture != TINY.maximum()
    assert found.milliseconds is not None
    assert found.milliseconds <= 2.4


def test_limits_that_nothing_keeps_are_said_to_be_so() -> None:
    one = search(Limits(0.5))
    lean_to(one, TINY.maximum())
    found = one.result()
    (why,) = found.broken
    assert why.startswith("latency limit 0.5 ms: below ")


def test_the_preferred_architecture_is_taken_where_no_limit_binds() -> None:
    one = search(Limits(1000.0, 10_000))
    lean_to(one, TINY.minimum())
    found = one.result()
    assert found.architecture == found.preferred == TINY.minimum()
    assert found.binding == found.broken == found.fitted == ()


def test_after_the_last_step_there_is_none() -> None:
    one = search(epochs=1)
    one.run()
    with pytest.raises(ValueError, match=r"^all 3 steps are done: take the result, or more epochs"):
        one.step()


def test_a_loss_that_is_not_finite_stops_the_search() -> None:
    train, valid = windows(40, 0), windows(24, 1)
    valid[0][:] = math.nan
    one = Search(TINY, train, valid, settings=Settings(epochs=1))
    with pytest.raises(ArithmeticError, match=r"^step 1: the loss of the logits is nan; try a sma"):
        one.step()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs 0: must be at least 1"),
        ({"epochs": 1.5}, "epochs 1.5: must be an integer"),
        ({"batch_size": 1}, "batch_size 1: must be at least 2"),
        ({"seed": -1}, "seed -1: must be at least 0"),
        ({"lr": 0}, "lr 0: must be positive"),
        ({"lr": "1"}, "lr '1': must be a number"),
        ({"clip": math.inf}, "clip inf: must be positive"),
        ({"decay": 1.01}, "decay 1.01: must be at most 1, as temperatures fall"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Settings(**changes)


X, Y = windows(8, 0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((X[:, 0], Y), r"training windows of shape \(8, 6, 3\), torch.float32: must be floating"),
        ((X.transpose(2, 3), Y), r"training windows of shape \(8, 1, 3, 6\)"),
        ((X.long(), Y), r"training windows of shape \(8, 1, 6, 3\), torch.int64: must be floating"),
        ((X, Y[:5]), r"training labels of shape \(5,\), torch.int64: must be int64 of shape \(8,"),
        ((X, Y.float()), r"training labels of shape \(8,\), torch.float32: must be int64"),
        ((X, Y + 1), "training labels from 1 to 2: must be from 0 to 1"),
        ((X[:1], Y[:1]), "1 training windows: batch norms need at least 2"),
    ],
)
def test_other_windows_are_refused(bad: Windows, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Search(TINY, bad, (X, Y))


def test_a_table_that_lacks_an_operator_is_refused_before_the_search() -> None:
    entries = {key: cycles for key, cycles in TABLE.entries.items() if key.kind != "softmax"}
    with pytest.raises(CycleError, match="softmax 2 to 2: not in the table of a board, and softm"):
        Search(TINY, (X, Y), (X, Y), table=CycleTable("a board", 1.0, entries))


def test_a_limit_of_milliseconds_needs_a_table() -> None:
    with pytest.raises(ValueError, match=r"^a limit of 3 ms without a table of cycles"):
        Search(TINY, (X, Y), (X, Y), limits=Limits(3.0))


def test_a_draw_without_a_branch_has_the_residual() -> None:
    for seed in range(50):
        hard = {
            name: torch.nn.functional.one_hot(torch.multinomial(one, 1)[0], len(one)).double()
            for name, one in random_mixture(TINY, seed).items()
        }
        filled = with_output(hard)
        for cell in ("fusion1", "fusion2"):
            branches = [bool(hard[f"{cell}.branch{k}"][1]) for k in (3, 5, 7)]
            expected = bool(hard[f"{cell}.residual"][1]) or not any(branches)
            assert filled[f"{cell}.residual"].tolist() == [1 - expected, expected]
        rest = [name for name in hard if not name.endswith(".residual")]
        assert all(torch.equal(filled[name], hard[name]) for name in rest)
    soft = random_mixture(TINY, 0)
    off = [float(soft[f"fusion1.{one}"][0]) for one in ("branch3", "branch5", "branch7")]
    r = float(soft["fusion1.residual"][1])
    chance = r + (1 - r) * math.prod(off)
    assert float(with_output(soft)["fusion1.residual"][1]) == pytest.approx(chance, rel=1e-12)
