"""The table of tiles: every call finds one, none too many, and what is measured goes before it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from adalora_kernels.backends.triton import configurations, measured, tiles
from adalora_kernels.backends.triton.configurations import MOST, choose, largest_rank, lookup
from adalora_kernels.backends.triton.tiles import Family, Tile, Width

HIGH = ("one_pass", "gemm", "shrink", "low_rank", "delta", "dx", "v", "t", "x", "group_shrink", "group_x")
LOW = {"one_gemm": 64, "g": 32}


def has(kernel: str, width: Width) -> bool:
    return kernel != "low_rank" or width is not Width.MIXED  # u comes in the dtype of the products


@pytest.mark.parametrize("kernel", [*HIGH, *LOW])
def test_every_call_has_a_tile(kernel: str) -> None:
    largest = LOW.get(kernel, tiles.MAX_RANK)
    assert largest_rank(kernel) == largest
    for family in Family:
        for width in (width for width in Width if has(kernel, width)):
            for dropout in (False, True):
                for rank in (0, 1, 16, 33, largest):
                    assert lookup(kernel, family, width, min(rank, largest), dropout)
                with pytest.raises(
                    ValueError, match=f"lora_A: expected a rank of at most {largest}, got {largest + 1}"
                ):
                    lookup(kernel, family, width, largest + 1, dropout)


def test_at_most_six_of_a_kernel_on_a_family_and_ranks_in_order() -> None:
    entries = [c for c in configurations.configurations() if c.capability is None]
    counts = Counter((c.family, c.kernel) for c in entries)
    assert len(counts) == 3 * (len(HIGH) + len(LOW) + 2) and max(counts.values()) <= MOST == 6
    for a, b in pairwise(entries):
        if replace(a, max_rank=b.max_rank, tile=b.tile) == b:
            assert a.max_rank < b.max_rank


def test_fp64_operands_take_no_pipeline() -> None:
    one, wide = torch.empty(1), torch.empty(1, dtype=torch.float64)
    assert choose("v", Width.SINGLE, 8, one, one).num_stages > 1
    assert choose("v", Width.SINGLE, 8, wide, one).num_stages == choose("v", Width.SINGLE, 8, one, wide).num_stages == 1


def test_dropout_has_rows_of_its_own_where_it_takes_more_registers() -> None:
    def blocks(kernel: str, dropout: bool) -> int:
        return lookup(kernel, Family.HOPPER, Width.HALF, 16, dropout).block_k

    assert blocks("one_gemm", True) < blocks("one_gemm", False)
    assert blocks("x", True) == blocks("x", False)
    found = {c.dropout for c in configurations.configurations() if (c.family, c.kernel) == (Family.HOPPER, "one_gemm")}
    assert found == {True, False, None}


def test_shape_decides_between_tiles() -> None:
    """The large tile where it fills whole waves, a smaller one where it would leave most of the last wave idle."""

    def blocks(m: int, n: int) -> tuple[int, int]:
        tile = lookup("gemm", Family.HOPPER, Width.HALF, 16, False, m, n, 132)
        return tile.block_m, tile.block_n

    assert blocks(8192, 4096) == (128, 256)
    assert blocks(8192, 768) == (128, 128)
    assert blocks(1024, 768) == (64, 128)


def test_stacks_take_the_single_layers_tiles_until_their_own_are_measured() -> None:
    half = torch.empty(1, dtype=torch.bfloat16)
    for name in ("shrink", "x"):
        usual = choose(name, Width.HALF, 48, half)
        with measured.trial(f"group_{name}", (16, 0, 16, 4, 1)):
            assert choose(f"group_{name}", Width.HALF, 48, half) == Tile(16, 0, 16, 4, 1)
            assert choose(name, Width.HALF, 48, half) == usual
        assert choose(f"group_{name}", Width.HALF, 48, half) == usual
