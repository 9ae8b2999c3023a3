"""What is exported computes what the model does, for batches of any size, without our package."""

from __future__ import annotations

import math
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kwlayers import convert_, methods, plan_model, set_temperature_
from kwlayers.methods.kernel_dna import KernelDNAConv2d
from kwsearch import zoo
from kwsearch.export import onnx as exporting
from kwsearch.export.errors import ExportError
from kwsearch.export.onnx import export_onnx, export_program

BATCHES = (1, 7)


class Images(nn.Module):
    """(3, 9, 7): shared 3x3 and strided layers, a depthwise and a grouped one, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, stride=2, padding=1, dilation=1, bias=False)
        self.c = nn.Conv2d(8, 8, (3, 2), padding="same", padding_mode="reflect")
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 16, 1, stride=2, groups=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.b(self.a(x).relu()).relu())
        x = self.grouped(self.norm(self.depthwise(x)).relu())
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class Signals(nn.Module):
    """(2, 16): convolutions along time, then layers on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(2, 8, 5, stride=2)
        self.b = nn.Conv1d(8, 8, 3, dilation=2)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).transpose(1, 2)
        out: Tensor = self.down(self.up(x).relu()).mean(1)
        return out


IMAGES = [["a", "b"], ["c"], ["depthwise"], ["grouped"], ["head"]]
SIGNALS = [["a"], ["b"], ["up"], ["down"]]
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "images": (Images, (3, 9, 7), {"sharing": IMAGES, "ratio": 2, "basis_ratio": 0.25}),
    "signals and tokens": (Signals, (2, 16), {"sharing": SIGNALS, "ratio": 1, "norm": "layer"}),
}


def trained(model: nn.Module, size: tuple[int, ...], plan: dict[str, Any]) -> Any:
    """Converted, with statistics of its own, at temperature 0."""
    convert_(model, plan_model(model, size, **plan))
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(8, *size))
    return model


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def runtime() -> Any:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    return pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def differences(model: nn.Module, size: tuple[int, ...], run: Callable[[Tensor], Any]) -> float:
    """The largest, as a part of the largest output, over batches of any size."""
    worst = 0.0
    with torch.no_grad():
        for count in BATCHES:
            x = torch.randn(count, *size)
            expected = model(x)
            found = torch.as_tensor(run(x))
            assert found.shape == expected.shape
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return worst


def interpolations(run: Any) -> list[str]:
    """Between what is learned and what is assigned: none at temperature 0."""
    return [node.name for node in run.graph.nodes if "lerp" in str(node.target)]


def check_onnx(
    runtime: Any, model: nn.Module, size: tuple[int, ...], path: Path, computed: int = 0
) -> None:
    """Exported and run: equal, one file, ONNX's own operators, every parameter once.

    computed: other numbers that do not depend on the input, which it has ready.
    """
    import onnx

    export_onnx(model.train(), size, path)
    model.eval()
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("input", ["batch", *size])]
    (output,) = session.get_outputs()
    assert (output.name, output.shape[0]) == ("output", "batch")
    assert differences(model, size, lambda x: session.run(None, {"input": x.numpy()})[0]) < 1e-4

    written = onnx.load(path)
    assert {node.domain for node in written.graph.node} == {""}
    stored = sum(math.prod(tensor.dims) for tensor in written.graph.initializer)
    params = sum(p.numel() for p in model.parameters())
    constants = 40 * len(written.graph.node)
    assert stored < 1.1 * params + computed + constants
    assert path.stat().st_size < 4 * stored + 400 * len(written.graph.node)
    assert str(Path(__file__).parents[2]) not in path.read_bytes().decode("latin-1")


@pytest.mark.parametrize("name", CASES)
def test_an_onnx_model_computes_the_same_for_any_batch(
    name: str, runtime: Any, tmp_path: Path
) -> None:
    build, size, plan = CASES[name]
    check_onnx(runtime, trained(build(), size, plan), size, tmp_path / "model.onnx")


class Plain(nn.Module):
    """(3, 8, 8): blocks that are alike, so that every method makes something of them dynamic."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv2(self.conv1(x).relu())
        return out


METHODS: dict[str, dict[str, Any]] = {
    "condconv": {},
    "dyconv": {},
    "odconv": {"num_kernels": 4},
    "dcd": {},
    "kernel_dna": {},
    "pad_net": {"base": "odconv"},
}


@pytest.mark.parametrize("method", METHODS)
def test_so_does_one_of_another_method(method: str, runtime: Any, tmp_path: Path) -> None:
    settings = methods.find(method).settings(**METHODS[method])
    model = trained(Plain(), (3, 8, 8), {"method": settings})
    # A child's kernel is one for all inputs.
    children = [m for m in model.modules() if isinstance(m, KernelDNAConv2d)]
    computed = sum(math.prod(child.geometry.kernel) for child in children)
    check_onnx(runtime, model, (3, 8, 8), tmp_path / "model.onnx", computed)


def test_what_onnx_has_no_operators_for_is_said(runtime: Any, tmp_path: Path) -> None:
    """FDConv's kernels are of a Fourier transform, whose numbers are complex."""
    settings = methods.find("fdconv").settings(min_channels=8, num_kernels=4)
    model = trained(Plain(), (3, 8, 8), {"method": settings})
    with pytest.raises(ExportError, match=r"cannot be written as ONNX: .*complex"):
        export_onnx(model, (3, 8, 8), tmp_path / "model.onnx")
    export_program(model, (3, 8, 8), tmp_path / "model.pt2")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", "mobilenetv2_050", "deit_tiny"])
def test_an_onnx_model_of_a_whole_network_computes_the_same(
    name: str, runtime: Any, timm: ModuleType, tmp_path: Path
) -> None:
    size, plan = (3, 32, 32), {"ratio": 0.5}
    if name == "resnet20":
        model = zoo.create("resnet20")
    elif name == "deit_tiny":
        model = timm.create_model("deit_tiny_patch16_224", img_size=32)
    else:
        model = timm.create_model(name)
    model = trained(model, size, plan)
    check_onnx(runtime, model, size, tmp_path / "model.onnx")


@pytest.mark.slow  # ten seconds
def test_an_exported_program_runs_without_our_package(tmp_path: Path) -> None:
    build, size, plan = CASES["signals and tokens"]
    model = trained(build(), size, plan).eval()
    export_program(model, size, tmp_path / "model.pt2")
    assert interpolations(torch.export.load(tmp_path / "model.pt2").module()) == []
    inputs = [torch.randn(count, *size) for count in BATCHES]
    torch.save(inputs, tmp_path / "inputs.pt")
    code = (
        "import os, sys, torch\n"
        "sys.modules['kwlayers'] = sys.modules['kwsearch'] = None\n"
        "os.chdir(sys.argv[1])\n"
        "run = torch.export.load('model.pt2').module()\n"
        "torch.save([run(x).detach() for x in torch.load('inputs.pt')], 'outputs.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
    outputs = torch.load(tmp_path / "outputs.pt")
    assert [len(y) for y in outputs] == list(BATCHES)
    for x, found in zip(inputs, outputs, strict=True):
        torch.testing.assert_close(found, model(x).detach(), rtol=0, atol=1e-6)


def test_a_temperature_above_zero_is_exported_as_it_is(tmp_path: Path) -> None:
    build, size, plan = CASES["signals and tokens"]
    model = set_temperature_(trained(build(), size, plan), 0.25).eval()
    export_program(model, size, tmp_path / "model.pt2")
    run = torch.export.load(tmp_path / "model.pt2").module()
    assert len(interpolations(run)) == 4
    assert differences(model, size, run) < 1e-6
    with torch.no_grad():
        x = torch.randn(2, *size)
        other = set_temperature_(model, 0.5)(x)
        assert (run(x) - other).abs().max() > 1e-2 * other.abs().max()


def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    build, size, plan = CASES["signals and tokens"]
    model = trained(build(), size, plan)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_program(model, size, tmp_path / "model.pt2")
    assert model.training
    assert model.a.backend is None
    assert all(p.requires_grad for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_file_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"'/proc/a\.pt2'"):
        export_program(nn.Linear(4, 2), (4,), "/proc/a.pt2")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            export_program(nn.Linear(100, 100), (100,), tmp_path / "a.pt2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_missing_packages_are_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = exporting.importlib.util.find_spec
    monkeypatch.setattr(
        exporting.importlib.util,
        "find_spec",
        lambda name, *rest: None if name.startswith("onnx") else find(name, *rest),
    )
    message = "ONNX needs onnx and onnxscript, not installed here: `pip install onnx onnxscript`"
    with pytest.raises(ExportError, match=message):
        export_onnx(nn.Linear(2, 2), (2,), tmp_path / "model.onnx")


class Fixed(nn.Module):
    """Takes batches of two only."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 4).flip(0)


@pytest.mark.parametrize(
    ("model", "size", "path", "message"),
    [
        (nn.Linear(4, 2), (), "a.pt2", r"input_size \(\): positive sizes \(C, H, W\)"),
        (nn.Linear(4, 2), (4, -1), "a.pt2", r"input_size \(4, -1\): positive sizes"),
        (nn.Linear(4, 2), (4,), "no/a.pt2", "there is no directory"),
        (nn.Linear(4, 2), (4,), ".", "a directory; give the name of a file"),
        (nn.Linear(4, 2), (3,), "a.pt2", r"cannot be exported for inputs of 3 in batches of any"),
        (Fixed(), (4,), "a.pt2", "cannot be exported for inputs of 4 in batches of any size"),
        (
            torch.compile(nn.Linear(4, 2), backend="eager"),
            (4,),
            "a.pt2",
            r"wrapped in OptimizedModule: export the model inside \(model._orig_mod",
        ),
    ],
    ids=["empty", "negative", "no folder", "folder", "wrong size", "fixed batch", "compiled"],
)
def test_what_cannot_be_exported_is_refused_with_the_reason(
    model: Any, size: Any, path: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        export_program(model, size, tmp_path / path)
    assert not (tmp_path / "a.pt2").exists()
