"""Zero-cost scores: closed forms on tiny networks, and nothing is changed by scoring."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwlayers import KWConv2d, Warehouse, convert_, set_temperature_
from kwlayers.plan import Plan
from kwsearch import zoo
from kwsearch.scores import SCORES, grad_norm, jacob_cov, score_all, synflow

pytestmark = pytest.mark.usefixtures("one_thread")


def linear(*matrices: list[list[float]], bias: list[float] | None = None) -> nn.Sequential:
    """Linear layers of these weights; the first has that bias."""
    layers = nn.Sequential()
    for matrix in matrices:
        weight = torch.tensor(matrix)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        layer.weight.data = weight
        if bias is not None:
            layer.bias.data = torch.tensor(bias)
            bias = None
        layers.append(layer)
    return layers


class Squares(nn.Module):
    """Outputs w * x^2 of each position: their sum has the gradient 2 w x."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x**2).flatten(1)


# The gradient norm


def test_the_gradient_norm_of_a_linear_network_is_that_of_an_outer_product() -> None:
    # Equal logits: dL/dlogits = (-1/2, 1/2), of norm sqrt(1/2); times x = (3, 4) of norm 5.
    x, y = torch.tensor([[3.0, 4.0]]), torch.tensor([0])
    flat = [[0.0, 0.0], [0.0, 0.0]]
    assert grad_norm(linear(flat), x, y) == pytest.approx(5 * math.sqrt(0.5))
    # A sum over parameters, not one norm of all: the bias adds its own sqrt(1/2).
    model = linear(flat, bias=[0.0, 0.0])
    assert grad_norm(model, x, y) == pytest.approx(6 * math.sqrt(0.5))


def test_parameters_without_gradient_add_nothing() -> None:
    model = linear([[0.0, 0.0], [0.0, 0.0]], bias=[0.0, 0.0])
    model[0].unused = nn.Parameter(torch.ones(2))
    model[0].bias.requires_grad_(False)
    x, y = torch.tensor([[3.0, 4.0]]), torch.tensor([1])
    assert grad_norm(model, x, y) == pytest.approx(5 * math.sqrt(0.5))


# SynFlow


def test_synflow_of_linear_layers_is_the_sum_of_path_products_once_a_layer() -> None:
    # |W1| 1 = (3, 3); |W2| of that: 1 * 3 + 4 * 3 = 15. R has degree 1 in each of two layers.
    assert synflow(linear([[1.0, -2.0], [3.0, 0.0]], [[-1.0, 4.0]]), (2,)) == pytest.approx(30)


def test_a_bias_starts_paths_of_its_own() -> None:
    # |b| = (1, 2) adds 1 * 1 + 4 * 2 = 9 to R, and to the flow of b and of W2, not of W1.
    model = linear([[1.0, -2.0], [3.0, 0.0]], [[-1.0, 4.0]], bias=[1.0, -2.0])
    assert model[1].bias is None
    assert synflow(model, (2,)) == pytest.approx(30 + 2 * 9)


def test_synflow_goes_through_a_fresh_batch_norm() -> None:
    model = linear([[1.0, -2.0], [3.0, 0.0]], [[-1.0, 4.0]])
    model.insert(1, nn.BatchNorm1d(2))
    # Degree 1 in its weights, too; its running variance is 1.
    assert synflow(model, (2,)) == pytest.approx(3 * 15 / math.sqrt(1 + 1e-5), rel=1e-12)


class Relu6(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x, inplace=True)


@pytest.mark.parametrize("relu6", [nn.ReLU6(), nn.ReLU6(inplace=True), Relu6()])
def test_paths_go_on_where_relu6_would_cut_them(relu6: nn.Module) -> None:
    model = linear([[1.0, -20.0], [3.0, 0.0]], [[-1.0, 4.0]])
    model.insert(1, relu6)
    # 1 * 21 + 4 * 3, in two layers.
    assert synflow(model, (2,)) == pytest.approx(2 * 33)


def test_synflow_counts_shared_cells_once_for_each_layer_that_uses_them() -> None:
    warehouse = Warehouse(1, (1, 1, 1, 1))
    layers = [KWConv2d(1, 1, 1, bias=False, warehouse=warehouse) for _ in range(2)]
    model = nn.Sequential(*layers)
    # At temperature 1 a kernel is its cell. Registered where it does not run.
    set_temperature_(model, 1)
    assert [layer.attention.assignment.tolist() for layer in layers] == [[0], [0]]
    layers[0].add_module("cells", warehouse)
    nn.init.constant_(warehouse.cells, -3)
    # R = 3 * 3 on each of 2 x 5 positions has degree 2 in the cells.
    assert synflow(model, (1, 2, 5)) == pytest.approx(2 * 9 * 10)


def test_flows_of_opposite_signs_do_not_cancel() -> None:
    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([2.0, -5.0]))

        def forward(self, x: Tensor) -> Tensor:
            return (self.weight * x) @ x.new_tensor([1.0, -1.0])

    # theta dR/dtheta is (2, -5).
    assert synflow(Difference(), (2,)) == pytest.approx(7)


def test_synflow_does_not_overflow_where_float32_does() -> None:
    layers = [[[1e20]]] * 3
    assert synflow(linear(*layers), (1,)) == pytest.approx(3e60)


# The Jacobian's covariance


def test_uncorrelated_gradients_have_eigenvalues_of_one() -> None:
    x = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]])
    expected = -2 * (math.log(1 + 1e-5) + 1 / (1 + 1e-5))
    assert jacob_cov(Squares(torch.ones(4)), x) == pytest.approx(expected)


def test_gradients_that_are_the_same_score_as_low_as_can_be() -> None:
    # Of a linear network: eigenvalues 3, 0 and 0.
    model = linear([[1.0, 2.0, 4.0], [0.0, 1.0, 0.0]])
    expected = -(math.log(3) + 1 / 3 + 2 * (math.log(1e-5) + 1e5))
    assert jacob_cov(model, torch.randn(3, 3)) == pytest.approx(expected, rel=1e-4)


def test_the_jacobians_covariance_is_that_of_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 2, 3, 3, generator=generator)
    weight = torch.randn(2, 3, 3, generator=generator)
    jacobian = 2 * weight.numpy().astype(float) * x.numpy().astype(float)
    v = np.linalg.eigvals(np.corrcoef(jacobian.reshape(6, 18)))
    expected = -np.sum(np.log(v + 1e-5) + 1 / (v + 1e-5))
    assert jacob_cov(Squares(weight), x) == pytest.approx(expected, rel=1e-5)


def test_a_dead_network_has_no_covariance() -> None:
    assert math.isnan(jacob_cov(Squares(torch.zeros(4)), torch.ones(3, 4)))


# On whole networks


def images(count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, 16, 16, generator=generator)
    return x, torch.arange(count) % 10


def made(plan: Plan | None) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = zoo.create("resnet20")
        return model if plan is None else convert_(model, plan)

    return make


@pytest.mark.parametrize("dynamic", [False, True])
def test_all_scores_are_finite_and_those_of_their_seed(plan: Plan, dynamic: bool) -> None:
    make = made(plan if dynamic else None)
    state = torch.get_rng_state()
    first = score_all(make, *images(), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(first) == list(SCORES) == ["grad_norm", "synflow", "jacob_cov"]
    assert all(map(math.isfinite, first.values()))
    torch.manual_seed(99)
    assert score_all(make, *images(), seed=3) == first
    other = score_all(make, *images(), seed=4)
    assert all(other[name] != first[name] for name in SCORES)


def test_dropout_is_that_of_the_seed() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(768, 10))

    x, y = images()
    found = score_all(make, x, y, seed=3)
    torch.manual_seed(3)
    model = make()
    for name, score in SCORES.items():
        torch.manual_seed(3)
        assert score(model, x, y) == found[name]


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("training", [False, True])
def test_scoring_leaves_the_network_as_it_was(plan: Plan, name: str, training: bool) -> None:
    torch.manual_seed(0)
    model = set_temperature_(made(plan)().train(training), 0.25)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert any("running_mean" in key for key in before)
    x, y = images()
    x_before = x.clone()
    SCORES[name](model, x, y)
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == before[key].dtype
        assert torch.equal(tensor, before[key]), key
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training == training for module in model.modules())
    assert torch.equal(x, x_before)
    assert not x.requires_grad


def test_fast_paths_score_as_the_reference_does(plan: Plan) -> None:
    scores = []
    for backend in (None, "published"):
        torch.manual_seed(0)
        model = convert_(zoo.create("resnet20"), plan, backend=backend)
        scores.append([score(model, *images()) for score in SCORES.values()])
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)
