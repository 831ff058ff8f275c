"""The native launchers for CUDA against the specification: on a GPU, and elsewhere around kernels run on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adalora_kernels.backends import native, native_cuda
from adalora_kernels.reference.handover import Handover, LayerImportance
from adalora_kernels.reference.importance import OrthogonalityShare, TripletLayout
from adalora_kernels.reference.svd_linear import Adapter
from tests.csrc import test_emulated_allocation as allocation
from tests.csrc import test_emulated_finish as finish
from tests.csrc import test_emulated_importance as importance


class Launchers:
    """Those of ``backends.native``, for tensors on the CPU that are computed with on ``device``."""

    def __init__(self, device: str) -> None:
        self._device = device

    def draw_orders(self, seed: int) -> None:
        """A GPU has its own."""

    def _there(self, tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.to(self._device, copy=True)

    def importance_update(
        self,
        layout: TripletLayout,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        state: Tensor,
        half: Tensor,
        scores: Tensor,
        beta1: float,
        beta2: float,
        handed_over: tuple[Handover, list[bool]] | None = None,
    ) -> Tensor:
        """As ``native``."""
        written = [state, half, scores, *(() if handed_over is None else handed_over[0])]
        there = [self._there(t) for t in written]
        left = None if handed_over is None else (Handover(*there[3:]), handed_over[1])
        inputs = [self._there(p) for p in params], [self._there(g) for g in grads]
        taken = native.importance_update(layout, *inputs, *there[:3], beta1, beta2, left)
        _copy_back(written, there)
        return taken.cpu()

    def finish_gradients(
        self, t: Tensor, da_shares: Tensor, adapter: Adapter, importance: LayerImportance, ticket: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``native``."""
        written = [importance.state, importance.sums, importance.probes, ticket]
        state, sums, probes, ticket = there = [self._there(w) for w in written]
        term = importance.term
        moved = replace(
            importance,
            state=state,
            half=self._there(importance.half),
            before=[self._there(b) for b in importance.before],
            term=None
            if term is None
            else OrthogonalityShare(self._there(term.slopes), *term[1:3], self._there(term.scale)),
            sums=sums,
            probes=probes,
        )
        own = Adapter(*(self._there(a) for a in adapter[:5]), *adapter[5:])
        grads = native.finish_gradients(self._there(t), self._there(da_shares), own, moved, ticket)
        _copy_back(written, there)
        dA, dE, dB = (g.cpu() for g in grads)
        return dA, dE, dB

    def mask_to_budget(
        self, scores: Tensor, lora_E: Sequence[Tensor], budget: int | Tensor, live: Tensor, enabled: Tensor | None
    ) -> Tensor:
        """As ``native``."""
        written = [live, *lora_E]
        there = [self._there(w) for w in written]
        run = native.mask_to_budget if self._device == "cuda" else native_cuda.mask_to_budget
        number = self._there(budget) if isinstance(budget, Tensor) else budget
        threshold = run(self._there(scores), there[1:], number, there[0], self._there(enabled))
        _copy_back(written, there)
        return threshold.cpu()


def _copy_back(written: Sequence[Tensor], there: Sequence[Tensor]) -> None:
    for target, source in zip(written, there, strict=True):
        target.copy_(source)


NO_GPU = pytest.mark.skipif(native.unavailable_reason("cuda") is not None, reason="no CUDA, or built without nvcc")


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=NO_GPU)])
def launchers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Launchers:
    if request.param == "cuda":
        return Launchers("cuda")
    library: Path = request.getfixturevalue("emulated_ops")
    torch.ops.load_library(str(library))
    monkeypatch.setattr(torch.ops, "adalora_native", torch.ops.adalora_emulated)
    monkeypatch.setattr(native, "_ops", lambda device_type: torch.ops.adalora_emulated)
    return Launchers("cpu")


CASES: dict[str, Callable[[Any], None]] = {
    "importance, ranks": lambda k: importance.test_matches_the_specification(k, "ranks", torch.float32),
    "importance, ragged": lambda k: importance.test_matches_the_specification(k, "ragged", torch.float64),
    "importance, mixed": lambda k: importance.test_mixed_dtypes_and_missing_gradients(k, importance.DTYPES),
    "importance, overflow": lambda k: importance.test_overflow_step_leaves_no_trace(k, float("inf")),
    "importance, empty": importance.test_empty_model,
    "importance, again": lambda k: importance.test_bits_do_not_depend_on_the_order_of_execution(k, "ragged"),
    "finish, fp32": lambda k: finish.test_gradients_and_importance(k, "alone", finish.DTYPES[:1]),
    "finish, mixed": lambda k: finish.test_gradients_and_importance(k, "with all", finish.DTYPES),
    "finish, done over": finish.test_what_was_written_to_is_done_over,
    "finish, overflow": lambda k: finish.test_overflow_is_handed_over(k, 1e25, (2, 1)),
    "finish, again": finish.test_bits_do_not_depend_on_the_order_of_execution,
    "allocation": lambda k: allocation.test_many_scores(k, torch.float32),
    "allocation, fp64": lambda k: allocation.test_many_scores(k, torch.float64),
    "allocation, on the device": lambda k: allocation.test_budgets(k, torch.float32, 10, True),
    "allocation, ties": allocation.test_ties_all_die,
    "allocation, many layers": lambda k: allocation.test_more_layers_than_a_launch_holds(k, True),
    "allocation, disabled": lambda k: allocation.test_more_layers_than_a_launch_holds(k, False),
}


@pytest.mark.parametrize("case", CASES)
def test_case(launchers: Launchers, case: str) -> None:
    CASES[case](launchers)
