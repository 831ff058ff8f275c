"""The workspace of tickets and flags: one for each stream, and a piece of its own for each captured launch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from adalora_kernels.backends.triton import tickets
from adalora_kernels.backends.triton.backward.gemm import slab_blocks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tickets, "_buffers", {})
    monkeypatch.setattr(tickets, "_reserves", {})


def test_launches_of_a_stream_share_a_buffer_that_grows() -> None:
    small = tickets.workspace(CPU, 100)
    assert small.dtype == torch.int32 and small.numel() > 100 and not small.any()
    assert tickets.workspace(CPU, 7) is small
    large = tickets.workspace(CPU, 100_000)
    assert large.numel() > 100_000 and not large.any()
    assert tickets.workspace(CPU, 100) is large


def test_captured_launches_have_pieces_of_their_own() -> None:
    tickets._reserves[CPU] = (torch.zeros(32, dtype=torch.int32), 0)
    pieces = [tickets._captured(CPU, ints) for ints in (8, 16, 8)]
    for number, piece in enumerate(pieces, start=1):
        assert not piece.any() and piece.data_ptr() % 16 == 0
        piece.fill_(number)
    assert [piece.unique().tolist() for piece in pieces] == [[1], [2], [3]]
    beyond = tickets._captured(CPU, 8)
    assert beyond.numel() == 8 and not beyond.any()
    assert beyond.untyped_storage().data_ptr() != pieces[0].untyped_storage().data_ptr()


def test_captured_before_anything_ran() -> None:
    assert not tickets._captured(CPU, 8).any()
    assert not tickets._reserves


MIB = 1 << 20


@pytest.mark.parametrize(
    ("blocks_m", "blocks_k", "bytes_per_slab", "programs", "expected"),
    [
        (64, 32, MIB // 2, 132, 1),  # 4096², 8192 tokens, rank 16: the shares fit
        (64, 32, 2 * MIB, 132, 3),  # rank 64: memory wants 4, balance allows 3
        (64, 6, 2 * MIB, 132, 1),  # too few tickets to give any away
        (8192, 32, MIB // 2, 132, 128),  # a million tokens
        (1, 1, 1, 132, 1),
    ],
)
def test_slab_blocks(blocks_m: int, blocks_k: int, bytes_per_slab: int, programs: int, expected: int) -> None:
    assert slab_blocks(blocks_m, blocks_k, bytes_per_slab, programs) == expected
