"""The reused memory: one buffer per thread and dtype, handed out in pieces."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from kwlayers.ops.workspace import Workspace

LIKE = torch.empty(0)


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    Workspace.clear()
    yield
    Workspace.clear()


def test_pieces_lie_beside_each_other_and_are_reused_after_a_release() -> None:
    workspace = Workspace(LIKE, 2**16)
    first = workspace.take(3, 5)
    mark = workspace.mark()
    second = workspace.take(7)
    first.fill_(1)
    second.fill_(2)
    assert (first == 1).all()
    assert second.data_ptr() - first.data_ptr() >= first.nbytes
    workspace.release(mark)
    assert workspace.take(7).data_ptr() == second.data_ptr()


def test_the_next_call_gets_the_same_memory_and_a_larger_one_more() -> None:
    first = Workspace(LIKE, 2**16).take(8).data_ptr()
    assert Workspace(LIKE, 2**16).take(8).data_ptr() == first
    assert Workspace(LIKE, 2**10).take(8).data_ptr() == first
    large = Workspace(LIKE, 2**20).take(2**17)
    assert large.untyped_storage().nbytes() == 2**20


def test_what_does_not_fit_is_allocated_on_its_own() -> None:
    workspace = Workspace(LIKE, 2**10)
    inside = workspace.take(16)
    outside = workspace.take(2**12)
    assert outside.shape == (2**12,)
    assert outside.untyped_storage().data_ptr() != inside.untyped_storage().data_ptr()


def test_dtypes_and_threads_have_buffers_of_their_own() -> None:
    mine = Workspace(LIKE, 2**12).take(4)
    half = Workspace(LIKE.bfloat16(), 2**12).take(4)
    assert half.dtype == torch.bfloat16
    assert half.data_ptr() != mine.data_ptr()
    other: list[int] = []
    thread = threading.Thread(
        target=lambda: other.append(Workspace(LIKE, 2**12).take(4).data_ptr())
    )
    thread.start()
    thread.join()
    assert other[0] != mine.data_ptr()


def test_a_buffer_made_in_inference_mode_serves_training() -> None:
    with torch.inference_mode():
        Workspace(LIKE, 2**12).take(4).fill_(1)
    piece = Workspace(LIKE, 2**12).take(4)
    assert not piece.is_inference()
