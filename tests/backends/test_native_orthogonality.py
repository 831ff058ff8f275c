"""Orthogonality on the CPU against the specification and its fp64."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from adalora_kernels.backends import native
from adalora_kernels.reference import orthogonality as reference
from adalora_kernels.testing.inputs import RANKS
from adalora_kernels.testing.tolerances import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def matrices(ranks: list[int], lengths: list[int], dtype: torch.dtype, std: float) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(len(lengths) + sum(lengths))
    a = [(torch.randn(r, k, generator=generator) * std).to(dtype) for r, k in zip(ranks, lengths, strict=True)]
    b = [(torch.randn(n, r, generator=generator) * std).to(dtype) for r, n in zip(ranks, lengths[::-1], strict=True)]
    return a, b


Result = tuple[Tensor, list[Tensor]]


def both_sweeps(
    module: Any, lora_A: list[Tensor], lora_B: list[Tensor], squared: bool = False, add_to: float | None = None
) -> Result:
    """Value and gradients; the latter written over NaN, or added to so much in each place."""
    value, slopes = module.orthogonality(lora_A, lora_B, 0.1, squared)
    start = torch.nan if add_to is None else add_to
    grads = [torch.full(m.shape, start, dtype=m.dtype) for m in (*lora_A, *lora_B)]
    module.orthogonality_gradients(lora_A, lora_B, slopes, torch.tensor(0.5), grads, add_to is not None)
    return value, grads


def assert_matches(lora_A: list[Tensor], lora_B: list[Tensor], squared: bool) -> None:
    wide = [m.double() for m in lora_A], [m.double() for m in lora_B]
    for add_to in (None, 0.25):
        value, grads = both_sweeps(native, lora_A, lora_B, squared, add_to)
        same, same_grads = both_sweeps(reference, lora_A, lora_B, squared, add_to)
        exact, exact_grads = both_sweeps(reference, *wide, squared, add_to)
        assert value.dtype == same.dtype and value.shape == ()
        # The same-dtype error of a single number may be nothing by luck, so it is no measure of ours: 16 roundings are.
        rtol = 1e-12 if value.dtype == torch.float64 else 16 * 2**-24
        torch.testing.assert_close(value.double(), exact, rtol=rtol, atol=0)
        for i, (ours, theirs, truth) in enumerate(zip(grads, same_grads, exact_grads, strict=True)):
            if ours.dtype == torch.float64:
                assert ours.shape == truth.shape
                torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-13 * (1 + truth.abs().sum().item()))
            else:
                assert_within_budget(f"gradient {i} {list(ours.shape)}", ours, theirs, truth)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("squared", [False, True])
def test_ranks(rank: int, dtype: torch.dtype, squared: bool) -> None:
    for std in (0.02, 0.5):
        assert_matches(*matrices([rank] * 6, [1, 17, 64, 768, 1030, 3001], dtype, std), squared=squared)


@pytest.mark.parametrize("seed", range(8))
def test_ragged_and_mixed(seed: int) -> None:
    choice = random.Random(seed)
    lengths = [choice.choice([1, 5, 16, 100, 2049, 5000]) for _ in range(4)]
    lora_A, lora_B = matrices(
        [choice.choice([1, 2, 5, 7, 9, 15, 17, 31]) for _ in range(4)], lengths, torch.float32, 0.1
    )
    lora_A[0], lora_B[1] = lora_A[0].bfloat16(), lora_B[1].half()
    if seed % 2:
        lora_B[0] = lora_B[0].double()
    lora_A[1] = lora_A[1].t().contiguous().t()
    lora_B[2] = lora_B[2].t().contiguous().t()
    assert_matches(lora_A, lora_B, squared=bool(seed % 3))


@pytest.mark.parametrize("rank", [1, 12, 33])
def test_nothing_is_written_beside_a_gradient(rank: int) -> None:
    lora_A, lora_B = matrices([rank] * 3, [30, 30, 30], torch.float32, 0.5)
    matrix_list = [*lora_A, *lora_B]
    room = torch.full((sum(m.numel() for m in matrix_list) + 64 * 7,), torch.nan)
    offset, grads, gaps = 64, [], [room[:64]]
    for m in matrix_list:
        grads.append(room[offset : offset + m.numel()].view(m.shape))
        gaps.append(room[offset + m.numel() : offset + m.numel() + 64])
        offset += m.numel() + 64
    _, slopes = native.orthogonality(lora_A, lora_B, 0.3, True)
    native.orthogonality_gradients(lora_A, lora_B, slopes, torch.ones(()), grads, False)
    assert all(gap.isnan().all() for gap in gaps) and not any(g.isnan().any() for g in grads)


def test_orthonormal_matrices_have_no_slope() -> None:
    value, slopes = native.orthogonality([torch.eye(4, 20)], [torch.eye(20, 4)], 0.5, False)
    assert value.item() == 0 and not slopes.any()


def test_bits_do_not_depend_on_threads_or_run(threads: None) -> None:
    lora_A, lora_B = matrices([12, 33, 8, 64] * 2, [768, 3072, 100, 768] * 2, torch.float32, 0.02)
    results = []
    for count in (1, 2, 2, 3):
        torch.set_num_threads(count)
        results.append(both_sweeps(native, lora_A, lora_B, add_to=1.0))
    for value, grads in results[1:]:
        assert torch.equal(value, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0][1], strict=True))


@pytest.mark.parametrize(
    ("lora_A", "lora_B", "error", "message"),
    [
        ([], [], ValueError, "lora_A, lora_B"),
        ([torch.ones(2, 3)], [], ValueError, "1 and 0"),
        ([torch.ones(2, 3), torch.ones(6)], [torch.ones(3, 2)] * 2, ValueError, r"lora_A\[1\].*\[6\]"),
        ([torch.ones(2, 3)], [torch.ones(3, 2, 1)], ValueError, r"lora_B\[0\]"),
        ([torch.ones(2, 3, dtype=torch.int32)], [torch.ones(3, 2)], TypeError, "int32"),
        ([torch.ones(2, 3, device="meta")], [torch.ones(3, 2)], ValueError, "meta"),
    ],
)
def test_bad_arguments(lora_A, lora_B, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        native.orthogonality(lora_A, lora_B, 0.1, False)
