"""int8 files: operators, numbers against torch's, sizes by hand, and the C array compiled."""

from __future__ import annotations

import shutil
import subprocess
from math import prod
from pathlib import Path
from random import Random

import pytest
import torch

from kwsearch.micronas import arena, tflite
from kwsearch.micronas.arena import Life
from kwsearch.micronas.peak_memory import peak_bytes
from kwsearch.micronas.space import Operator, Space, operators
from kwsearch.micronas.supernet import extract
from kwsearch.micronas.tflite import TFLiteError, _ChannelsLast
from tests.kwsearch.micronas.spaces import TINY, UCI_HAR


@pytest.mark.parametrize("space", [TINY, Space(13, 8, 3, time_limit=3, sensor_limit=2)])
def test_with_channels_last_it_is_the_network_with_softmax(space: Space) -> None:
    torch.manual_seed(0)
    model = extract(space, space.maximum()).double().eval()
    x = torch.randn(3, 1, space.steps, space.sensors).double()
    found = _ChannelsLast(model)(x.permute(0, 2, 3, 1))
    torch.testing.assert_close(found, torch.softmax(model(x), 1), rtol=1e-12, atol=1e-12)


def test_an_arena_by_hand() -> None:
    # The largest at 0; the second beside it; the third after both are gone; 10 bytes take 16.
    lives = [Life(32, 1, 2), Life(64, 0, 1), Life(10, 2, 3), Life(16, 3, 3)]
    assert arena.live(lives) == 96
    assert arena.greedy(lives) == [64, 0, 16, 0]
    assert arena.extent(lives, arena.greedy(lives)) == 96


def test_an_arena_that_is_packed_by_hand_is_as_small_as_what_is_alive() -> None:
    # Greedily 48 at 0, 32 beside it, and the second 32, which meets both, at 80. But the first two
    # may leave its place free: 32 at 0, 32 at 32, and 48, which is alone with each of them, ...
    lives = [Life(48, 0, 1), Life(32, 1, 2), Life(32, 2, 3), Life(48, 3, 4), Life(16, 0, 4)]
    greedily = arena.extent(lives, arena.greedy(lives))
    assert arena.live(lives) == 96
    assert greedily > 96
    offsets = arena.packed(lives)
    assert arena.extent(lives, offsets) == 96
    assert arena.packed(lives) == offsets
    with pytest.raises(ValueError, match="tensors 0 and 1 overlap at 0"):
        arena.extent(lives, [0] * 5)


@pytest.mark.parametrize("space", [TINY, UCI_HAR], ids=["tiny", "uci_har"])
def test_networks_need_no_more_than_is_alive_at_once(space: Space) -> None:
    """Of every size: within the alignment of 16 bytes of each tensor that is there."""
    rng = Random(0)
    for _ in range(10):
        network = operators(space, space.random(rng))
        lives = of_network(network)
        alive = arena.live(lives)
        assert alive == peak_bytes(network)
        taken = arena.extent(lives, arena.packed(lives))
        assert taken <= min(alive + 16 * 4, arena.extent(lives, arena.greedy(lives)))


def of_network(network: tuple[Operator, ...]) -> list[Life]:
    """The tensors of operators, in int8."""
    made, last, sizes = {"input": 0}, {}, {}
    for i, one in enumerate(network):
        for name, shape in zip(one.inputs, one.key.inputs, strict=False):
            last[name], sizes[name] = i, prod(shape)
        made[one.name], sizes[one.name] = i, prod(one.key.output)
        last[one.name] = i
    return [Life(sizes[name], made[name], last[name]) for name in made]


def test_a_header_compiles_to_the_files_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) + b"end"
    (tmp_path / "net.tflite").write_bytes(content)
    made = tflite.header(tmp_path / "net.tflite", "net")
    assert made == tmp_path / "net.h"
    if (cc := shutil.which("cc")) is None:
        pytest.skip("no C compiler")
    (tmp_path / "main.c").write_text(
        '#include <stdio.h>\n#include "net.h"\n'
        "int main(void) { fwrite(net, 1, net_len, stdout); return (int)((size_t)net % 16); }\n"
    )
    subprocess.run([cc, "-std=c11", "main.c", "-o", "main"], cwd=tmp_path, check=True)
    assert subprocess.run([tmp_path / "main"], capture_output=True, check=True).stdout == content


def test_a_name_that_is_none_in_c_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TFLiteError, match="name '2nd': must be letters, digits and _"):
        tflite.header(tmp_path / "net.tflite", "2nd")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tflite, "PACKAGES", ("no_such_package",))
    with pytest.raises(TFLiteError, match=r'no_such_package, .*`pip install "kwsearch\[mcu\]"`'):
        tflite.export(extract(TINY, TINY.minimum()), torch.zeros(1, 1, 6, 3), tmp_path / "a")


def test_windows_of_another_shape_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tflite, "PACKAGES", ())
    model = extract(TINY, TINY.minimum())
    with pytest.raises(TFLiteError, match=r"\(2, 1, 3, 6\): must be \(N, 1, 6, 3\)"):
        tflite.export(model, torch.zeros(2, 1, 3, 6), tmp_path / "a")
    with pytest.raises(TFLiteError, match="not finite"):
        tflite.export(model, torch.full((2, 1, 6, 3), torch.nan), tmp_path / "a")


@pytest.mark.slow  # the converter takes some ten seconds
# Of an untrained network of a few channels rounding is a larger part.
@pytest.mark.parametrize(
    ("space", "rounding"), [(TINY, 0.1), (UCI_HAR, 0.03)], ids=["tiny", "uci_har"]
)
def test_a_file_agrees_with_its_network(space: Space, rounding: float, tmp_path: Path) -> None:
    for package in tflite.PACKAGES:
        pytest.importorskip(package, reason=f"{package} is not installed")
    torch.manual_seed(0)
    network = operators(space, space.maximum())
    model = extract(space, space.maximum())
    x = torch.randn(64, 1, space.steps, space.sensors)
    path = tmp_path / "net.tflite"
    tflite.export(model, x, path)
    assert model.training
    kinds = {"conv2d": "CONV_2D", "add": "ADD", "gap2d": "MEAN", "softmax": "SOFTMAX"}
    expected = [kinds[one.key.kind] for one in network]
    assert tflite.operator_names(path.read_bytes()) == ["DEPTHWISE_CONV_2D", *expected[1:]]
    with torch.no_grad():
        truth = torch.softmax(model.eval()(x), 1)
    found = tflite.run(path, x)
    assert (found - truth).abs().max() < rounding
    assert torch.equal(found.argmax(1), truth.argmax(1)) or space == UCI_HAR
    result = tflite.check(path, network, x, found.argmax(1))
    assert result.accuracy == 1
    assert result.live_bytes == result.predicted_bytes
    assert result.live_bytes <= result.arena_bytes <= result.live_bytes + 64
    assert result.arena_bytes <= result.greedy_bytes
