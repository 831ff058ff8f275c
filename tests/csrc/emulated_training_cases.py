"""Training with importance fused into the backward in CUDA C++, the layers' passes being Triton's.

Run by ``test_emulated_ops.py``: interpreted, with the ops of ``_C_cuda`` made for the CPU. With a GPU the ops are what
they are: ``pytest tests/csrc/emulated_training_cases.py``.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from adalora_kernels.allocator.fused import FUSED
from adalora_kernels.backends import native, native_cuda, triton
from adalora_kernels.backends.triton import group
from tests.backends.triton.fused_training_cases import (
    BEFORE,
    UNSEEN,
    Siblings,
    accumulated,
    assert_same,
    network,
    one_backward,
    with_term,
    written_unseen,
)

CUDA_OPS = ("importance_update", "importance_handed_over", "finish_gradients", "mask_by_selection", "zero_pruned")
LAUNCHERS = {
    "importance_update": native.importance_update,
    "finish_gradients": native.finish_gradients,
    "mask_to_budget": native_cuda.mask_to_budget,
    "zero_pruned": native.zero_pruned,
}


class Ops:
    """Those of ``_C``, but for those that ``_C_cuda`` has."""

    def __init__(self, cpu: Any) -> None:
        self._cpu = cpu

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.adalora_emulated if name in CUDA_OPS else self._cpu, name)


@pytest.fixture(autouse=True)
def engine_in_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Triton's importance and masking are CUDA C++'s; which of its launchers were called."""
    if library := os.environ.get("ADALORA_EMULATED_OPS"):
        torch.ops.load_library(library)
        monkeypatch.setattr(torch.ops, "adalora_native", Ops(torch.ops.adalora_native))
    calls: list[str] = []
    for name in LAUNCHERS:

        def counted(*args: Any, name: str = name, **kwargs: Any) -> Any:
            calls.append(name)
            return LAUNCHERS[name](*args, **kwargs)

        monkeypatch.setattr(triton, name, counted, raising=False)
    return calls


def test_with_orthogonality(engine_in_cuda: list[str]) -> None:
    assert assert_same(with_term, network()) == {FUSED}
    assert set(engine_in_cuda) == {"importance_update", "finish_gradients", "mask_to_budget"}


def test_accumulated_gradients() -> None:
    assert assert_same(accumulated, network("blas", dtype=torch.bfloat16)) == {FUSED}


@pytest.mark.parametrize("stacked", [False, True], ids=["one by one", "stacked"])
def test_siblings(stacked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "_backward_pays", lambda *_: stacked)
    assert assert_same(with_term, Siblings) == {FUSED}


def test_where_it_is_not_legal_the_launch_does_it() -> None:
    assert assert_same(written_unseen, network()) == {UNSEEN.format("last")}
    (outcome,) = assert_same(one_backward, network(runs=2))
    assert outcome.startswith(FUSED) and outcome.endswith(f"{BEFORE}first ran twice in one backward")
