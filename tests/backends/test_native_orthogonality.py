"""Orthogonality on the CPU against the specification and its fp64."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from adalora_kernels.backends import native
from adalora_kernels.reference.orthogonality import orthogonality
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


def assert_matches(lora_A: list[Tensor], lora_B: list[Tensor], squared: bool) -> None:
    value, grads = native.orthogonality(lora_A, lora_B, 0.1, squared, True)
    same, same_grads = orthogonality(lora_A, lora_B, 0.1, squared, True)
    exact, exact_grads = orthogonality([m.double() for m in lora_A], [m.double() for m in lora_B], 0.1, squared, True)
    assert value.dtype == same.dtype and value.shape == ()
    # The same-dtype error of a single number may be nothing by luck, so it is no measure of ours: 16 roundings are.
    torch.testing.assert_close(
        value.double(), exact, rtol=1e-12 if value.dtype == torch.float64 else 16 * 2**-24, atol=0
    )
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
    _, alone = native.orthogonality(lora_A[:1], lora_B[:1], 0.3, True, True)
    _, together = native.orthogonality(lora_A, lora_B, 0.3, True, True)
    assert torch.equal(together[0], alone[0]) and torch.equal(together[3], alone[1])


def test_orthonormal_matrices_have_no_slope() -> None:
    value, grads = native.orthogonality([torch.eye(4, 20)], [torch.eye(20, 4)], 0.5, False, True)
    assert value.item() == 0 and not any(g.any() for g in grads)


def test_gradient_on_request_only() -> None:
    lora_A, lora_B = matrices([12] * 2, [64, 48], torch.float32, 0.1)
    value, grads = native.orthogonality(lora_A, lora_B, 0.5, False, False)
    assert grads == [] and torch.equal(value, native.orthogonality(lora_A, lora_B, 0.5, False, True)[0])


def test_bits_do_not_depend_on_threads_or_run(threads: None) -> None:
    lora_A, lora_B = matrices([12, 33, 8, 64] * 2, [768, 3072, 100, 768] * 2, torch.float32, 0.02)
    results = []
    for count in (1, 2, 2, 3):
        torch.set_num_threads(count)
        results.append(native.orthogonality(lora_A, lora_B, 0.1, False, True))
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
        native.orthogonality(lora_A, lora_B, 0.1, False, True)
