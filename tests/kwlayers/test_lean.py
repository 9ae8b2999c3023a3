"""The fast paths inside autograd: what they save, how they add up, and everything around them."""

from __future__ import annotations

import copy
import gc
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kwlayers import KWConv2d, Warehouse, convert_, plan_model
from kwlayers.ops import BACKENDS, ConvGeometry, kw_conv, lean
from kwlayers.ops.paths import PATHS

FAST = sorted(set(PATHS) - {"triton"})
GEOMETRY = ConvGeometry((8, 4, 3, 3), (1, 1), (1, 1), (1, 1), 1)
DENSE = [name for name in FAST if PATHS[name].refuses(GEOMETRY, (4, 2, 1, 1)) is None]


class Net(nn.Module):
    """Three layers of one warehouse and one of another; the second is used twice."""

    def __init__(self, backend: str | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = Warehouse(5, (4, 4, 1, 1), 20, dtype=torch.float64)
        self.own = Warehouse(3, (2, 4, 1, 1), dtype=torch.float64)
        settings: Any = {"backend": backend, "norm": "layer", "dtype": torch.float64}
        self.first = KWConv2d(4, 8, 3, padding=1, warehouse=self.shared, **settings)
        self.twice = KWConv2d(8, 8, 1, warehouse=self.shared, **settings)
        self.last = KWConv2d(8, 2, 1, warehouse=self.own, **settings)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(self.twice(x))
        x = self.twice(x)
        return self.last(x).mean((2, 3))


def images(count: int = 3) -> Tensor:
    return torch.randn(
        count, 4, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def gradients(net: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}


def assert_same(got: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        found = got[name]
        if grad is None:
            assert found is None, name
        else:
            assert found is not None, name
            torch.testing.assert_close(found, grad, rtol=0, atol=1e-12, msg=name)


def step(backend: str | None, run: Callable[[Net], None]) -> dict[str, Tensor | None]:
    net = Net(backend)
    run(net)
    return gradients(net)


# The same gradients as the published form, however the layers are used ----------------


def plainly(net: Net) -> None:
    net(images()).square().sum().backward()


def accumulated(net: Net) -> None:
    for part in images().split(1):
        net(part).square().sum().backward()


def both_forwards_first(net: Net) -> None:
    losses = [net(part).square().sum() for part in images().split(2)]
    for loss in losses:
        loss.backward()


def twice_through_one_graph(net: Net) -> None:
    loss = net(images()).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()


def with_frozen_cells(net: Net) -> None:
    net.shared.cells.requires_grad_(False)
    net(images()).square().sum().backward()


def with_frozen_attention(net: Net) -> None:
    net.first.attention.requires_grad_(False)
    net(images()).square().sum().backward()


def with_all_but_cells_frozen(net: Net) -> None:
    net.requires_grad_(False)
    net.shared.cells.requires_grad_(True)
    net(images()).square().sum().backward()


def checkpointed(net: Net) -> None:
    x = F.relu(checkpoint(net.first, images().requires_grad_(), use_reentrant=False))
    x = checkpoint(net.twice, F.relu(net.twice(x)), use_reentrant=False)
    net.last(x).mean((2, 3)).square().sum().backward()


def checkpointed_reentrantly(net: Net) -> None:
    x = F.relu(checkpoint(net.first, images().requires_grad_(), use_reentrant=True))
    x = checkpoint(net.twice, F.relu(net.twice(x)), use_reentrant=True)
    net.last(x).mean((2, 3)).square().sum().backward()


def after_a_forward_that_nobody_differentiates(net: Net) -> None:
    kept = net(images())
    net(images()).square().sum().backward()
    assert kept.grad_fn is not None


def after_a_backward_that_failed(net: Net) -> None:
    def fail(grad: Tensor) -> Tensor:
        raise RuntimeError("on purpose")

    x = F.relu(net.first(images()))
    x.register_hook(fail)
    loss = net.last(net.twice(F.relu(net.twice(x)))).mean((2, 3)).square().sum()
    with pytest.raises(RuntimeError, match="on purpose"):
        loss.backward()
    net.zero_grad()
    net(images()).square().sum().backward()


def after_gradients_of_the_input_only(net: Net) -> None:
    x = images().requires_grad_()
    out = net(x).square().sum()
    torch.autograd.grad(out, x, retain_graph=True)
    out.backward()


def through_autograd_grad(net: Net) -> None:
    parameters = list(net.parameters())
    found = torch.autograd.grad(net(images()).square().sum(), parameters)
    for parameter, grad in zip(parameters, found, strict=True):
        parameter.grad = grad


USES = [
    plainly,
    accumulated,
    both_forwards_first,
    twice_through_one_graph,
    with_frozen_cells,
    with_frozen_attention,
    with_all_but_cells_frozen,
    checkpointed,
    checkpointed_reentrantly,
    after_a_forward_that_nobody_differentiates,
    after_a_backward_that_failed,
    after_gradients_of_the_input_only,
    through_autograd_grad,
]


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.parametrize("backend", ["gemm", "mix_inputs"])
def test_gradients_are_those_of_the_published_form(
    backend: str, use: Callable[[Net], None]
) -> None:
    expected = step("published", use)
    assert any(grad is not None and grad.abs().sum() > 0 for grad in expected.values())
    assert_same(step(backend, use), expected)


def test_a_gradient_of_cells_is_added_to_the_one_before() -> None:
    net = Net("gemm")
    plainly(net)
    once = gradients(net)
    plainly(net)
    assert_same(gradients(net), {k: None if g is None else 2 * g for k, g in once.items()})


def test_hooks_on_cells_see_one_gradient_for_all_layers() -> None:
    net = Net("gemm")
    seen: list[Tensor] = []
    net.shared.cells.register_hook(lambda grad: seen.append(grad.clone()))
    plainly(net)
    assert len(seen) == 1
    assert net.shared.cells.grad is not None
    torch.testing.assert_close(seen[0], net.shared.cells.grad, rtol=0, atol=0)


# One block or many -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "cell"),
    [
        ((32, 6, 3, 3), (32, 3, 1, 1)),
        ((64, 6, 3, 3), (32, 6, 1, 1)),
        ((64, 6, 1, 1), (32, 3, 1, 1)),
        ((64, 6, 2, 2), (64, 3, 2, 2)),
    ],
)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", DENSE)
def test_any_workspace_gives_the_same(
    backend: str, last: bool, kernel: tuple[int, ...], cell: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    geometry = ConvGeometry(kernel, (2, 1), (1, 0), (1, 1), 1)
    mixtures = 1
    for whole, part in zip(kernel, cell, strict=True):
        mixtures *= whole // part
    x = torch.randn(5, 6, 7, 5, dtype=torch.float64)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    attention = torch.randn(5, mixtures, 4, dtype=torch.float64)
    cells = torch.randn(4, *cell, dtype=torch.float64)

    def run(name: str, megabytes: float) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, attention, cells)]
        out = kw_conv(*leaves, geometry, name, megabytes)
        slope = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        return [out, *torch.autograd.grad((out * slope).sum(), leaves)]

    expected = run("reference", 16)
    for megabytes in (16, 0.1, 0.01, 0.0001):
        found = run(backend, megabytes)
        for got, want in zip(found, expected, strict=True):
            scale = want.abs().max()
            torch.testing.assert_close(got / scale, want / scale, rtol=0, atol=1e-12)
        assert found[0].is_contiguous(memory_format=torch.channels_last) or not last
        assert found[0].is_contiguous() or last


@pytest.mark.parametrize("backend", DENSE)
def test_the_fast_paths_pass_gradcheck(backend: str) -> None:
    torch.manual_seed(0)
    geometry = ConvGeometry((2, 4, 3, 1), (2, 1), (1, 0), (1, 1), 1)
    leaves = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 4, 3, 2), (2, 12, 3), (3, 1, 2, 1, 1))
    ]
    assert torch.autograd.gradcheck(lambda *tensors: kw_conv(*tensors, geometry, backend), leaves)


# What is kept ------------------------------------------------------------------------


def saved(run: Callable[[], Tensor]) -> int:
    """Bytes of different memory that autograd keeps for the backward of `run`."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("backend", DENSE)
def test_only_the_input_the_attention_and_the_cells_are_kept(backend: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4, 5, 5, requires_grad=True)
    attention = torch.randn(6, 36, 7, requires_grad=True)
    cells = torch.randn(7, 4, 2, 1, 1, requires_grad=True)
    geometry = GEOMETRY
    assert saved(lambda: kw_conv(x, attention, cells, geometry, backend)) == 4 * (
        x.numel() + attention.numel() + cells.numel()
    )
    kernels = 6 * 8 * 4 * 3 * 3
    published = saved(lambda: kw_conv(x, attention, cells, geometry, "published"))
    assert published >= 4 * (x.numel() + kernels)


def test_nothing_is_left_of_a_graph_that_is_gone() -> None:
    net = Net("gemm")
    before = len(lean._tokens)
    loss = net(images()).sum()
    token = lean._tokens[net.shared.cells]()
    assert token is not None
    del token, loss
    gc.collect()
    assert lean._tokens[net.shared.cells]() is None
    del net
    gc.collect()
    assert len(lean._tokens) <= before


def test_layers_of_one_forward_share_one_gradient_buffer() -> None:
    net = Net("gemm")
    loss = net(images()).sum()
    total = lean._tokens[net.shared.cells]().total
    asked: list[int] = []
    real = total.buffer

    def buffer() -> Tensor:
        asked.append(real().data_ptr())
        return real()

    total.buffer = buffer
    loss.backward()
    assert len(asked) == 3  # `first`, and `twice` two times
    assert len(set(asked)) == 1


def test_a_model_can_be_copied_and_stored_between_forward_and_backward() -> None:
    net = Net(None)
    loss = net(images()).square().sum()
    twin = copy.deepcopy(net)
    torch.save(net.state_dict(), io.BytesIO())
    loss.backward()
    plainly(twin)
    assert_same(gradients(net), gradients(twin))


def test_cells_changed_between_forward_and_backward_are_noticed() -> None:
    net = Net("gemm")
    loss = net(images()).sum()
    with torch.no_grad():
        net.shared.cells.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_derivative_is_refused_by_the_fast_paths_and_given_by_the_published_form() -> None:
    x = images().requires_grad_()
    attention = torch.randn(3, 36, 5, dtype=torch.float64)
    cells = torch.randn(5, 4, 2, 1, 1, dtype=torch.float64)
    for backend in ("gemm", "published"):
        out = kw_conv(x, attention, cells, GEOMETRY, backend)
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        if backend == "published":
            grad.square().sum().backward()
            assert x.grad is not None
            assert x.grad.abs().sum() > 0
        else:
            with pytest.raises(RuntimeError, match="once_differentiable"):
                grad.square().sum().backward()


# Around autograd ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_result_is_the_same(mode: Any) -> None:
    net = Net("gemm").eval()
    expected = net(images()).detach()
    with mode():
        found = net(images())
    assert not found.requires_grad
    torch.testing.assert_close(found.clone(), expected, rtol=0, atol=1e-12)
    # The workspace that inference mode made is still good for training.
    net(images()).sum().backward()


def test_products_are_written_by_rows() -> None:
    """By columns, torch's products of 16-bit numbers take 1000 times as long."""
    strides: list[tuple[int, ...]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten.bmm.out:
                strides.append(kwargs["out"].stride())
            if func is torch.ops.aten.baddbmm_.default:
                strides.append(args[0].stride())
            return func(*args, **(kwargs or {}))

    alpha = torch.randn(3, 2 * 9 * 2, 5, dtype=torch.bfloat16, requires_grad=True)
    cells = torch.randn(5, 4, 2, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = images().bfloat16().contiguous(memory_format=memory_format).requires_grad_()
        with Watch():
            kw_conv(x, alpha, cells, GEOMETRY, "gemm").sum().backward()
    assert len(strides) >= 6
    assert all(stride[-1] == 1 for stride in strides), strides


@pytest.mark.parametrize("backend", [None, *DENSE])
def test_autocast_trains_float32_cells_with_bfloat16_products(backend: str | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 4, 6, 6)
    attention = torch.randn(4, 36, 5)
    attention = (attention / attention.abs().sum(-1, keepdim=True)).requires_grad_()
    cells = torch.randn(5, 4, 2, 1, 1, requires_grad=True)

    def run(name: str | None, enabled: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = kw_conv(x, attention, cells, GEOMETRY, name)
        return [out, *torch.autograd.grad(out.float().square().sum(), (attention, cells))]

    found, expected = run(backend, True), run("reference", False)
    assert found[0].dtype == torch.bfloat16
    assert [grad.dtype for grad in found[1:]] == [torch.float32] * 2
    for got, want in zip(found, expected, strict=True):
        # Four roundings to 8 bits.
        assert (got.float() - want).abs().max() <= 4 * 2**-7 * want.abs().max()


def test_under_autocast_the_layers_of_a_graph_share_one_cast_of_the_cells() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
    plan = plan_model(model, (4, 6, 6), ratio=1, sharing=[["0", "1", "2"]], cell_ratio=(0.5, 0.5))
    convert_(model, plan, backend="gemm")
    cells = model.kw_warehouses[plan.groups[0].name].cells
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(2, 4, 6, 6))
        cast = lean._tokens[cells]().total.cast
        assert list(cast) == [torch.bfloat16]
        kept = cast[torch.bfloat16]
    out.float().sum().backward()
    assert kept.dtype == torch.bfloat16
    assert not cast, "dropped after backward"
    assert cells.grad.dtype == torch.float32


def test_different_dtypes_without_autocast_are_refused() -> None:
    x = torch.randn(3, 4, 7, 5)
    attention = torch.randn(3, 36, 5)
    cells = torch.randn(5, 4, 2, 1, 1, dtype=torch.bfloat16)
    for backend in (None, *BACKENDS):
        with pytest.raises(ValueError, match="one dtype for all, or autocast"):
            kw_conv(x, attention, cells, GEOMETRY, backend)


def test_torch_func_sees_through_the_layers() -> None:
    net = Net(None)
    state = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(net, parameters, (x,)).square().sum()

    found = torch.func.grad(loss)(state, images())
    plainly(net)
    assert_same(found, gradients(net))


def test_a_traced_network_gives_the_same() -> None:
    net = Net(None).eval()
    with warnings.catch_warnings():
        # Tracing is deprecated, and warns that checks of shapes are traced as they came out.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(net, images())
    other = images().flip(0)
    torch.testing.assert_close(traced(other), net(other), rtol=0, atol=1e-12)
