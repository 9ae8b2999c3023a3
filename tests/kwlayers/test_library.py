"""The fast paths as operators: what torch.compile, fake tensors and export see of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kwlayers import convert_, plan_model
from kwlayers.ops import ConvGeometry, kw_conv
from kwlayers.ops.paths import PATHS

GEOMETRY = ConvGeometry((8, 4, 3, 3), (2, 1), (1, 1), (1, 1), 1)
DENSE = [
    name
    for name in PATHS
    if name != "triton" and PATHS[name].refuses(GEOMETRY, (4, 2, 1, 1)) is None
]


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    """x, attention and cells for `GEOMETRY`."""
    torch.manual_seed(0)
    shapes = ((3, 4, 7, 5), (3, 36, 5), (5, 4, 2, 1, 1))
    x, attention, cells = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    return x, attention, cells


def network() -> nn.Module:
    """Two layers of one warehouse, one of another, a linear one; layer norms."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).double()
    plan = plan_model(model, (3, 9, 7), ratio=0.5, sharing=[["2", "4"]], norm="layer")
    return convert_(model, plan)


@pytest.mark.parametrize(
    ("backend", "last"), [*((backend, False) for backend in ["", *DENSE]), ("", True)]
)
def test_the_operators_pass_the_checks_of_torch(backend: str, last: bool) -> None:
    x, attention, cells = tensors()
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    static = [*(list(numbers) for numbers in GEOMETRY[:4]), 1, backend, 2**20]
    leaves = [t.requires_grad_() for t in (x, attention, cells)]
    torch.library.opcheck(torch.ops.kwlayers.conv, (*leaves, *static))
    plain = [t.detach() for t in leaves]
    out = torch.ops.kwlayers.conv(*plain, *static)
    for needs in ([True] * 3, [True, False, False], [False, False, True]):
        torch.library.opcheck(
            torch.ops.kwlayers.conv_backward, (torch.ones_like(out), *plain, *static, needs)
        )


@pytest.mark.parametrize(
    "training", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["train", "eval"]
)
def test_a_converted_network_compiles_into_one_graph_with_the_same_gradients(
    training: bool,
) -> None:
    torch._dynamo.reset()
    eager = network().train(training)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    for batch in (4, 6, 1):
        x = torch.randn(batch, 3, 9, 7, dtype=torch.float64)
        outputs = []
        for model in (eager, compiled):
            model.zero_grad()
            out = model(x)
            out.square().sum().backward()
            outputs.append(out)
        torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-12)
        for (name, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=1e-11, msg=name)


def test_a_compiled_network_runs_under_autocast_and_without_gradients() -> None:
    torch._dynamo.reset()
    eager = network().float()
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 3, 9, 7)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = compiled(x), eager(x)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected.float()).abs().max() <= 4 * 2**-7 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own
def test_inductor_compiles_a_converted_network() -> None:
    torch._dynamo.reset()
    eager = network()
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True)
    x = torch.randn(4, 3, 9, 7, dtype=torch.float64)
    for model in (eager, compiled):
        model(x).square().sum().backward()
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=1e-11)


def test_fake_tensors_get_the_shape_and_the_memory_format_without_computing() -> None:
    x, attention, cells = tensors()
    expected = kw_conv(x, attention, cells, GEOMETRY, "gemm")
    last = x.contiguous(memory_format=torch.channels_last)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (x, attention, cells)]
        found = kw_conv(*fake, GEOMETRY)
        fake_last = kw_conv(mode.from_tensor(last), *fake[1:], GEOMETRY)
    assert found.shape == expected.shape
    assert found.stride() == expected.stride()
    assert fake_last.stride() == kw_conv(last, attention, cells, GEOMETRY, "gemm").stride()


def test_a_converted_network_exports() -> None:
    model = network().eval()
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    program = torch.export.export(model, (x,))
    assert any("kwlayers.conv" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=1e-12)
