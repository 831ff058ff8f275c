"""How the matrices of the orthogonality regulariser are cut into pieces of their length, by the shapes alone."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from adalora_kernels.backends.triton.engine.tables import shapes_in
from adalora_kernels.backends.triton.tiles import MAX_RANK

MATRIX_ROW = 7  # R, length, whether it is a B, its slopes, its shares, its pieces, their blocks in all
ITEM_ROW = 4  # matrix, first position, first triplets of a block of the Gram matrix
PIECE = 1024  # positions that a program takes
BLOCK = 64  # triplets by triplets of a Gram matrix that a program takes at most


class Pieces(NamedTuple):
    """The matrices cut into pieces, and their Gram matrices into blocks, by their shapes alone.

    Attributes:
        matrices: int64 table on the device.
        pieces, blocks: int64 tables of items: pieces alone, and each block of each piece.
        matrix_count, piece_count, block_count, slope_count, share_count: of numbers of each kind.
        padded_rank: of the tiles.
        fours: whether rows begin at multiples of 4 elements.
    """

    matrices: Tensor
    pieces: Tensor
    blocks: Tensor
    matrix_count: int
    piece_count: int
    block_count: int
    slope_count: int
    share_count: int
    padded_rank: int
    fours: bool


@lru_cache(maxsize=16)
def pieces_of(sizes: bytes, a_count: int, device: torch.device) -> Pieces:
    """The first ``a_count`` of the sizes (``tables.sizes_of``) are of A [R, K], the others of B [N, R]."""
    shapes = shapes_in(sizes)
    matrices: list[int] = []
    pieces: list[int] = []
    blocks: list[int] = []
    slopes = shares = 0
    ranks, fours = [1], True
    for i, shape in enumerate(shapes):
        columns = int(i >= a_count)
        rank, length = shape[columns], shape[1 - columns]
        starts = range(0, max(length, 1), PIECE)
        corners = [(r, c) for r in range(0, max(rank, 1), BLOCK) for c in range(0, max(rank, 1), BLOCK)]
        matrices += (rank, length, columns, slopes, shares, len(starts), len(starts) * len(corners))
        for start in starts:
            pieces += (i, start, 0, 0)
            blocks += (value for corner in corners for value in (i, start, *corner))
        slopes += rank * rank
        shares += rank * rank * len(starts)
        ranks.append(rank)
        fours &= rank % 4 == 0 and (columns == 1 or length % 4 == 0)
    if max(ranks) > MAX_RANK:
        raise ValueError(f"lora_A, lora_B: expected ranks up to {MAX_RANK}, got {max(ranks)}")
    tables = [torch.tensor(numbers, dtype=torch.int64).to(device) for numbers in (matrices, pieces, blocks)]
    return Pieces(
        matrices=tables[0],
        pieces=tables[1],
        blocks=tables[2],
        matrix_count=len(shapes),
        piece_count=len(pieces) // ITEM_ROW,
        block_count=len(blocks) // ITEM_ROW,
        slope_count=slopes,
        share_count=shares,
        padded_rank=max(16, triton.next_power_of_2(max(ranks))),
        fours=fours,
    )


__all__ = ["BLOCK", "ITEM_ROW", "MATRIX_ROW", "PIECE", "Pieces", "pieces_of"]
