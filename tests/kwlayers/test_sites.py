"""Tracing: what is found in a model, what is counted, and that the model is left as it was."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kwlayers
from kwlayers import PlanError, Site, trace
from kwlayers.sites import refuse_wrapped
from kwsearch import zoo


class Net(nn.Module):
    """A forward made of the layers that are given by name."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self, x)


def in_kernel_size_macs(network: kwlayers.Network) -> int:
    return sum(site.positions * math.prod(site.kernel) for site in network.sites)


# What is found


def test_layers_are_found_in_module_order_with_their_shapes() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, (3, 5), stride=2, bias=False),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 16, 1, groups=4)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    found = trace(model, (3, 17, 21))
    # Positions: (17 - 3) // 2 + 1 = 8 by (21 - 5) // 2 + 1 = 9.
    first = {"in_positions": 17 * 21, "out_positions": 72, "order": 0}
    second = {"in_positions": 72, "out_positions": 72, "order": 1}
    last = {"in_positions": 1, "out_positions": 1, "order": 2}
    assert found.sites == (
        Site("0", "conv2d", 3, 8, (3, 5), positions=72, **first),
        Site("2.0", "conv2d", 8, 16, (1, 1), groups=4, bias=True, positions=72, **second),
        Site("5", "linear", 16, 10, (1,), bias=True, **last),
    )
    assert found["2.0"].kernel == (16, 2, 1, 1)
    assert found.params == 8 * 3 * 15 + (16 * 2 + 16) + (160 + 10)
    assert found.macs == 72 * 8 * 3 * 15 + 72 * 16 * 2 + 160
    assert found.input_size == (3, 17, 21)


def test_1d_and_3d_convolutions_are_found() -> None:
    found = trace(nn.Sequential(nn.Conv1d(4, 6, 5), nn.Conv1d(6, 6, 1, dilation=2)), (4, 20))
    assert [site.kind for site in found.sites] == ["conv1d", "conv1d"]
    assert found.macs == 16 * 6 * 4 * 5 + 16 * 6 * 6
    found = trace(nn.Sequential(nn.Conv3d(2, 4, (1, 2, 3), padding=1)), (2, 4, 4, 4))
    first = {"positions": 6 * 5 * 4, "in_positions": 64, "out_positions": 6 * 5 * 4}
    assert found.sites[0] == Site("0", "conv3d", 2, 4, (1, 2, 3), bias=True, **first)
    assert found.macs == 120 * 4 * 2 * 6


def test_transposed_convolutions_are_no_sites_and_count_as_unchanged() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2))
    found = trace(model, (3, 5, 7))
    assert [site.name for site in found.sites] == ["0"]
    # Each of the 8 x 35 inputs meets the 3 x 2 x 2 weights of its group.
    assert found.macs - in_kernel_size_macs(found) == 8 * 35 * 3 * 4


def test_subclasses_of_layers_are_left_alone() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    found = trace(nn.Sequential(nn.Conv2d(3, 8, 1), Scaled(8, 8, 1)), (3, 4, 4))
    assert {site.name: site.fixed for site in found.sites} == {
        "0": "",
        "1": "Scaled may compute something else from its weight",
    }
    assert found.macs == 16 * (24 + 64)


def test_a_layer_whose_weight_is_read_by_another_is_left_alone() -> None:
    def tied(net: Any, x: Tensor) -> Tensor:
        return nn.functional.linear(net.inner(x).to(net.other.weight.dtype), net.used.weight)

    model = Net(tied, inner=nn.Linear(8, 8), other=nn.Linear(8, 8), used=nn.Linear(8, 8))
    model.other.register_parameter("bias", None)
    found = trace(model, (5, 8))
    assert {site.name: site.fixed for site in found.sites} == {
        "inner": "",
        "other": "the forward never calls it",
        "used": "the forward never calls it",
    }

    def both(net: Any, x: Tensor) -> Tensor:
        return net.inner(net.other(x)) @ net.other.weight

    model = Net(both, inner=nn.Linear(8, 8), other=nn.Linear(8, 8))
    found = trace(model, (5, 8))
    assert {site.name: site.fixed for site in found.sites} == {
        "inner": "",
        "other": "something else reads its weight",
    }
    assert type(model.other) is nn.Linear


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_quantised_model_is_refused(dynamic: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if dynamic:
        model[1] = torch.ao.nn.quantized.dynamic.Linear(4, 4)
    else:
        model[1] = torch.ao.nn.quantized.Linear(4, 4)
    with pytest.raises(
        PlanError, match=r"quantised \(1 is a torch\.ao\.nn\.quantized\..*Linear\): plan"
    ):
        trace(model, (4,))


def test_a_weight_that_is_no_plain_tensor_is_left_alone() -> None:
    class Packed(Tensor):
        pass

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[1].weight.detach().as_subclass(Packed))
    (first, second) = trace(model, (4,)).sites
    assert (first.fixed, second.fixed) == ("", "its weight is no plain tensor but of type Packed")


def test_batch_norm_is_noticed_wherever_it_is() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8))
    assert not trace(plain, (3, 4, 4)).batch_norm
    normed = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(nn.BatchNorm2d(8)))
    assert trace(normed, (3, 4, 4)).batch_norm


def test_a_layer_that_is_called_twice_is_one_site_with_the_work_of_both() -> None:
    model = Net(
        lambda net, x: net.conv(F.max_pool2d(net.conv(x), 2)), conv=nn.Conv2d(4, 4, 3, padding=1)
    )
    (site,) = trace(model, (4, 8, 8)).sites
    assert (site.positions, site.samples) == (64 + 16, 2)
    assert trace(model, (4, 8, 8)).macs == 80 * 4 * 4 * 9


def test_a_module_under_two_names_is_one_site_under_its_first() -> None:
    shared = nn.Conv2d(4, 4, 1)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    (site,) = trace(model, (4, 3, 3)).sites
    assert (site.name, site.positions, site.samples) == ("0", 18, 2)
    assert trace(model, (4, 3, 3)).params == 20


def test_layers_with_tied_weights_cannot_be_converted_and_count_once() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    model[2].weight = model[0].weight
    found = trace(model, (4, 3, 3))
    assert [site.fixed for site in found.sites] == [
        "its weight is tied to another layer's",
        "",
        "its weight is tied to another layer's",
    ]
    assert found.params == 2 * 16 + 3 * 4
    assert found.macs == 3 * 9 * 16


def test_a_weight_tied_to_an_embedding_cannot_be_converted() -> None:
    model = Net(
        lambda net, x: net.out(x @ net.embed.weight), embed=nn.Embedding(5, 4), out=nn.Linear(4, 5)
    )
    model.out.weight = model.embed.weight
    (site,) = trace(model, (2, 5)).sites
    assert site.fixed == "its weight is tied to another layer's"


def test_a_layer_that_the_forward_never_calls_is_kept_but_cannot_be_converted() -> None:
    model = Net(lambda net, x: net.used(x), used=nn.Conv2d(3, 4, 1), spare=nn.Conv2d(3, 4, 1))
    used, spare = trace(model, (3, 2, 2)).sites
    assert (used.fixed, spare.fixed) == ("", "the forward never calls it")
    assert spare.positions == 0


def test_a_model_that_is_one_layer_says_to_wrap_it() -> None:
    (site,) = trace(nn.Conv2d(3, 4, 1), (3, 2, 2)).sites
    assert site.fixed == "it has no parent to be swapped in: wrap it in nn.Sequential"
    assert site.positions == 4


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_a_layer_with_hooks_cannot_be_converted(register: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    getattr(model[1], register)(lambda *args: None)
    assert [site.fixed for site in trace(model, (3, 2, 2)).sites] == ["", "it carries hooks"]


def test_multihead_attention_is_left_alone_and_counted() -> None:
    def attend(net: Any, x: Tensor) -> Tensor:
        return net.out(net.attention(x, x, x, need_weights=False)[0])

    model = Net(
        attend, attention=nn.MultiheadAttention(8, 2, batch_first=True), out=nn.Linear(8, 3)
    )
    found = trace(model, (5, 8))
    assert {site.name: site.fixed for site in found.sites} == {
        "attention.out_proj": "MultiheadAttention reads its weight without calling it",
        "out": "",
    }
    # Projections 4 * 8^2 per token, and two products of 5 x 5 with all 8 channels.
    assert found.macs == 5 * 8 * 3 + 4 * 5 * 64 + 2 * 25 * 8


# Samples: how many kernels a layer mixes


def test_a_linear_layer_over_windows_mixes_one_kernel_per_window() -> None:
    def windows(net: Any, x: Tensor) -> Tensor:
        return net.fc(x.reshape(x.shape[0] * 4, 6, 8))

    (site,) = trace(Net(windows, fc=nn.Linear(8, 5)), (24, 8)).sites
    assert (site.positions, site.samples) == (24, 4)


def test_a_linear_layer_over_tokens_or_images_mixes_one_kernel() -> None:
    for size in ((8,), (7, 8), (3, 4, 8)):
        (site,) = trace(nn.Sequential(nn.Linear(8, 5)), size).sites
        assert (site.positions, site.samples) == (math.prod(size) // 8, 1)


def test_a_convolution_called_without_batch_mixes_one_kernel() -> None:
    model = Net(lambda net, x: net.conv(x[0]), conv=nn.Conv2d(3, 4, 1))
    (site,) = trace(model, (3, 5, 6)).sites
    assert (site.positions, site.samples) == (30, 1)


def test_a_layer_called_with_its_input_by_name_is_counted() -> None:
    model = Net(lambda net, x: net.conv(input=x), conv=nn.Conv2d(3, 4, 1))
    (site,) = trace(model, (3, 5, 6)).sites
    assert site.positions == 30


# MACs outside of layers


def test_functional_convolutions_and_products_count_as_unchanged() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.conv(x)
        x = F.conv2d(x, net.kernel.weight, groups=2)  # a functional call of another's weight
        x = x.flatten(2)
        return torch.einsum("bct,bdt->bcd", x, x) @ torch.ones(6, 2, device=x.device)

    model = Net(forward, conv=nn.Conv2d(3, 4, 1), kernel=nn.Conv2d(4, 6, 3, groups=2, bias=False))
    found = trace(model, (3, 6, 7))
    assert [site.fixed for site in found.sites] == ["", "the forward never calls it"]
    conv, functional = 42 * 12, 4 * 5 * 6 * 2 * 9
    assert found.macs == conv + functional + 6 * 6 * 20 + 6 * 6 * 2


@pytest.mark.parametrize("fused", [True, False])
def test_the_attention_products_of_deit_are_unchanged_macs(fused: bool, timm: ModuleType) -> None:
    if fused:
        model = timm.create_model("deit_tiny_patch16_224")
    else:
        with torch.device("meta"):
            model = zoo.create("deit_tiny")
    found = trace(model, (3, 224, 224))
    # Queries with keys, and weights with values: 197 tokens, 3 heads of 64 channels.
    assert found.macs - in_kernel_size_macs(found) == 12 * 2 * 197**2 * 192


def test_products_with_vectors_and_biases_are_counted() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        a, v = x[0], x[0, 0]
        y = torch.baddbmm(x, x, x).sum()
        return torch.mv(a, v).sum() + torch.dot(v, v) + torch.addmm(a, a, a).sum() + y

    found = trace(Net(forward), (7, 7))
    assert found.macs == 49 + 7 + 343 + 343


class Awkward(nn.Module):
    """Strides, dilations, paddings and broadcasts whose shapes are easy to get wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(2, 1))
        self.b = nn.Conv2d(8, 8, 3, padding="same", groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=(2, 3), padding=1, output_padding=(1, 0))
        self.c = nn.Conv2d(6, 4, 1, padding=1, padding_mode="reflect")
        self.norm = nn.GroupNorm(2, 4)
        self.d = nn.Conv1d(4, 5, 3, stride=2)
        self.e = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.a(x)), 3, stride=2, padding=1)
        x = F.max_pool2d(self.b(x), 2, ceil_mode=True)
        x = x + x.mean((2, 3), keepdim=True).sigmoid() * x.mean(1, keepdim=True)
        x = F.gelu(self.norm(self.c(F.relu6(self.up(x)))))
        x = x.mean(-1) - x.amax(3)
        scores = (x.transpose(1, 2) @ x).softmax(-1)
        x = self.d(x @ scores).transpose(1, 2)
        return self.e(x[:, :1] + x).mul_(2).mean()


REAL_RUNS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "awkward": (Awkward, (3, 37, 30)),
    "resnet20": (lambda: zoo.create("resnet20"), (3, 33, 47)),
    "resnet50": (lambda: zoo.create("resnet50"), (3, 33, 47)),
    "mobilenetv2_050": (lambda: zoo.create("mobilenetv2_050"), (3, 33, 47)),
    "convnext_tiny": (lambda: zoo.create("convnext_tiny"), (3, 33, 47)),
    "deit_tiny": (lambda: zoo.create("deit_tiny", img_size=32), (3, 32, 32)),
}


@pytest.mark.parametrize("name", REAL_RUNS)
def test_tracing_finds_the_shapes_and_macs_of_a_real_run(name: str) -> None:
    make, size = REAL_RUNS[name]
    model = make().eval()
    found = trace(model, size)
    ran: dict[str, int] = {}

    def note(layer: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            ran[layer] = out.numel() // module.weight.shape[0]

        return hook

    for site in found.sites:
        model.get_submodule(site.name).register_forward_hook(note(site.name))
    # The counter knows products, not every fused attention.
    apart = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), apart, FlopCounterMode(display=False) as flops:
        model(torch.randn(1, *size))
    assert {site.name: site.positions for site in found.sites} == ran
    assert 2 * found.macs == flops.get_total_flops()


def test_results_of_operations_are_new_tensors() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        for same in (torch.relu(x), x + 1, x.sigmoid(), F.layer_norm(x, x.shape[-1:])):
            same.unsqueeze_(0)  # changes the shape of the result in place, not that of x
        return net.conv(x)

    (site,) = trace(Net(forward, conv=nn.Conv2d(3, 4, 1)), (3, 5, 6)).sites
    assert site.positions == 30


def test_values_that_the_forward_computes_off_meta_are_kept() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        rows = torch.full((1, 2), 1.0) @ torch.full((2, 1), 1.5)  # 3
        rows = F.conv2d(rows[None], torch.ones(1, 1, 1, 1))
        return net.conv(x[:, :, : int(rows)])

    (site,) = trace(Net(forward, conv=nn.Conv2d(3, 4, 1)), (3, 5, 6)).sites
    assert site.positions == 18


# The model is left as it was


class NoDataMade(TorchDispatchMode):
    """Collects every tensor with data that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, torch.Size]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, Tensor) and tensor.device.type != "meta" and tensor.numel() > 1:
                self.made.append((str(func), tensor.shape))
        return out


def test_tracing_makes_no_tensor_with_data() -> None:
    model = zoo.create("resnet20")
    with NoDataMade() as mode:
        trace(model, (3, 32, 32))
    assert mode.made == []
    with NoDataMade() as mode:  # and a copy with data would have been noticed
        model.conv1.weight.clone()
    assert mode.made == [("aten.clone.default", model.conv1.weight.shape)]


def test_a_traced_model_is_unchanged() -> None:
    model = zoo.create("resnet20")
    model.layer1.eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {name: id(tensor) for name, tensor in model.named_parameters()}
    buffers = {name: id(tensor) for name, tensor in model.named_buffers()}
    modes = {name: module.training for name, module in model.named_modules()}
    assert len(set(modes.values())) == 2
    trace(model, (3, 32, 32))
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == tensors
    assert {name: id(tensor) for name, tensor in model.named_buffers()} == buffers
    assert {name: module.training for name, module in model.named_modules()} == modes
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, state[name]), name
    assert all(parameter.requires_grad for parameter in model.parameters())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_gradients_and_other_state_of_the_model_survive_tracing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    gradient = model[0].weight.grad
    trace(model, (3, 4, 4))
    assert model[0].weight.grad is gradient
    assert model[1].num_batches_tracked == 1


def test_a_model_on_meta_or_in_half_precision_is_traced_like_any() -> None:
    plain = trace(zoo.create("resnet20"), (3, 32, 32))
    with torch.device("meta"):
        assert trace(zoo.create("resnet20"), (3, 32, 32)) == plain
    assert trace(zoo.create("resnet20").to(torch.bfloat16), (3, 32, 32)) == plain


# Refused


def test_a_wrong_input_size_is_an_error_with_the_size_and_the_reason() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 5))
    with pytest.raises(PlanError, match=r"4x8x8 \(traced without data, on meta\): .*channels"):
        trace(model, (4, 8, 8))
    with pytest.raises(PlanError, match="does not run on an input of 3x2x2"):
        trace(model, (3, 2, 2))


@pytest.mark.parametrize("size", [(), (3, 0, 8), (3, -1)])
def test_sizes_are_positive_and_without_batch(size: tuple[int, ...]) -> None:
    with pytest.raises(PlanError) as error:
        trace(nn.Sequential(nn.Linear(3, 3)), size)
    assert str(error.value) == f"input_size {size}: positive sizes (C, H, W), without batch"


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (torch.zeros(99, 99), "tensor([["),
        ({f"layer{i}": torch.zeros(9) for i in range(50)}, "{'layer0': "),
        (nn.Linear(3, 3).state_dict(), "OrderedDict("),
        ("3x8x8", "'3x8x8': "),
        ((3, 8.0), "(3, 8.0): "),
    ],
)
def test_what_is_no_size_is_refused_in_one_short_line(size: Any, shown: str) -> None:
    with pytest.raises(PlanError) as error:
        trace(nn.Sequential(nn.Linear(3, 3)), size)
    message = str(error.value)
    assert message.startswith(f"input_size {shown}")
    assert message.endswith(": a tuple (C, H, W), without batch")
    assert "\n" not in message
    assert len(message) < 250


VALUES = "its forward reads the values of its input or of a result, which is not supported. torch"
INTEGERS = "its forward takes integers, such as tokens or classes; only networks of real numbers"


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda net, x: x * x.mean().item(), f"{VALUES} says: Tensor.item() cannot be called on"),
        (lambda net, x: x if x.sum() > 0 else -x, VALUES),
        (lambda net, x: x[x > 0], VALUES),
        (lambda net, x: torch.from_numpy(x.numpy()), VALUES),
        (lambda net, x: x.tolist(), VALUES),
        (lambda net, x: x.unique(), VALUES),
        (lambda net, x: net.table(x), INTEGERS),
        (lambda net, x: F.one_hot(x), INTEGERS),
        (lambda net, x: x[x], INTEGERS),
        (lambda net, x: x.gather(0, x), INTEGERS),
    ],
)
def test_a_forward_that_cannot_be_traced_is_refused_in_plain_words(
    forward: Callable[[Any, Tensor], Tensor], message: str
) -> None:
    model = Net(forward, table=nn.Embedding(9, 4))
    with pytest.raises(PlanError) as error:
        trace(model, (3, 8, 8))
    start = "the model does not run on an input of 3x8x8 (traced without data, on meta): "
    assert str(error.value).startswith(start + message)
    assert str(error.value).endswith(f"torch says: {error.value.__cause__}")


def test_what_is_no_model_is_refused_with_what_it_is() -> None:
    for given, message in (
        (None, "model: expected an nn.Module, got NoneType"),
        (nn.Linear, "model: expected an nn.Module, got the class Linear"),
    ):
        for refuse in (lambda model: trace(model, (3, 8, 8)), refuse_wrapped):
            with pytest.raises(PlanError) as error:
                refuse(given)  # type: ignore[arg-type]
            assert str(error.value) == message


def test_modules_with_weights_that_are_no_sites_are_found() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(1, 4, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table

    class Scale(nn.Module):  # one number per channel, as norms have
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, 1, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    model = nn.Sequential(
        nn.Sequential(nn.Linear(8, 8), Scale()),
        Positions(),
        nn.LSTM(8, 8, batch_first=True),
        Net(lambda net, x: net.a(x[0], x[0], x[0])[0][:, :1], a=nn.MultiheadAttention(8, 1)),
    )
    model.append(nn.Sequential(nn.ConvTranspose1d(1, 2, 3), nn.LayerNorm((2, 10))))
    found = trace(model, (4, 8))
    assert [(other.name, other.kind, other.params) for other in found.others] == [
        ("1", "Positions", 4 * 8),
        ("2", "LSTM", 4 * 8 * (8 + 8 + 2)),
        ("3.a", "MultiheadAttention", 3 * 8 * (8 + 1)),  # its out_proj is a site
        ("4.0", "ConvTranspose1d", 1 * 2 * 3 + 2),
    ]


def test_a_failed_trace_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8))
    with pytest.raises(PlanError):
        trace(model, (4, 8, 8))
    assert model.training
    assert not model[0]._forward_hooks
    assert model[0].weight.device.type == "cpu"


@pytest.mark.parametrize(
    "lazy", [lambda: nn.LazyConv2d(4, 1), lambda: nn.LazyBatchNorm2d(affine=False)]
)
def test_lazy_layers_are_refused_with_what_to_do(lazy: Callable[[], nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Lazy modules are a new feature")
        model = nn.Sequential(nn.Conv2d(3, 4, 1), lazy())
    with pytest.raises(PlanError, match="lazy layers: run it once on real data first"):
        trace(model, (3, 4, 4))


def test_wrapped_models_are_refused_with_what_to_do() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    for wrapped, name in (
        (nn.DataParallel(model), "DataParallel"),
        (torch.compile(model, backend="eager"), "OptimizedModule"),
    ):
        with pytest.raises(PlanError) as error:
            trace(wrapped, (3, 4, 4))
        assert str(error.value) == (
            f"the model is wrapped in {name}: plan and convert it before wrapping"
        )


def test_a_converted_model_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1))
    kwlayers.convert_(model, kwlayers.plan_model(model, (4, 3, 3), ratio=1, sharing=[["0"]]))
    with pytest.raises(PlanError, match="already converted: it has dynamic layers"):
        trace(model, (4, 3, 3))
    with pytest.raises(PlanError, match="already converted"):
        refuse_wrapped(model)


def test_a_model_that_cannot_be_copied_is_refused_with_the_reason() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    model.cache = model[0].weight * 2  # not a leaf: torch does not copy it
    with pytest.raises(PlanError, match="cannot be copied for tracing: Only Tensors created"):
        trace(model, (3, 4, 4))


def test_a_transformer_encoder_layer_keeps_its_linears() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    network = trace(nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 3)), (5, 4))
    assert {site.name: bool(site.fixed) for site in network.sites} == {
        "0": False,
        "1.self_attn.out_proj": True,
        "1.linear1": True,
        "1.linear2": True,
        "2": False,
    }
    assert "TransformerEncoderLayer reads its weight" in network["1.linear1"].fixed
    # 5 tokens: in 4x8, qkv 8x24, scores and values 2 x 5 x 8, out 8x8, mlp 2 x 8x16, head 8x3.
    assert network.macs == 5 * (32 + 192 + 2 * 5 * 8 + 64 + 256 + 24)
