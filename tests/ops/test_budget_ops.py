"""Importance, masking and orthogonality through ops: what they refuse, leaving everything as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adalora_kernels.ops.allocation import mask_to_budget, zero_pruned
from adalora_kernels.ops.importance import TripletLayout, importance_update
from adalora_kernels.ops.orthogonality import can_accumulate, orthogonality_loss

LAYOUT = TripletLayout(((3, 5, 4), (0, 5, 2), (2, 7, 6)))


def importance_arguments() -> dict[str, Any]:
    shapes = [shape for r, k, n in LAYOUT.shapes for shape in ((r, k), (r, 1), (n, r))]
    return {
        "layout": LAYOUT,
        "params": [torch.randn(s) for s in shapes],
        "grads": [torch.randn(s) for s in shapes],
        "state": torch.rand(2, 2, LAYOUT.total_elements),
        "half": torch.zeros(1, dtype=torch.int32),
        "scores": torch.rand(5),
        "beta1": 0.85,
        "beta2": 0.9,
    }


@pytest.mark.parametrize("backend", ("reference", "native"))
@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"params": [torch.zeros(1)]}, "params.*: expected 9 .*, got 1"),
        ({"state": torch.zeros(2, 2, 3)}, r"state: expected "),
        ({"scores": torch.zeros(4)}, r"scores.*: expected .*5"),
        ({"half": torch.zeros(2, dtype=torch.int32)}, r"half: expected"),
        ({("grads", 0): torch.zeros(5, 3)}, r"grads\[0\]: expected .*\[3, 5\]"),
        ({("params", 6): torch.zeros(2, 8)}, r"params\[6\]: expected "),
        ({("grads", 2): torch.zeros(4, 3, device="meta")}, r"grads\[2\]: expected .*\[4, 3\] on cpu, got .* on meta"),
    ),
)
def test_importance_refuses(backend: str, change: dict[Any, Any], message: str) -> None:
    arguments = importance_arguments()
    for key, value in change.items():
        if isinstance(key, tuple):
            arguments[key[0]][key[1]] = value
        else:
            arguments[key] = value
    before = {n: arguments[n].clone() for n in ("state", "half", "scores")}
    with pytest.raises(ValueError, match=message):
        importance_update(**arguments, backend=backend)
    for name, value in before.items():
        assert torch.equal(arguments[name], value)


def test_importance_by_hand() -> None:
    """One element, two steps, by the formula."""
    layout = TripletLayout(((1, 1, 1),))
    params = [torch.tensor([[2.0]]), torch.tensor([[3.0]]), torch.tensor([[4.0]])]
    state, half, scores = torch.zeros(2, 2, 3), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    want = [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    for g in (0.5, -0.25):
        grads: list[Tensor | None] = [torch.full((1, 1), g) for _ in params]
        assert importance_update(layout, params, grads, state, half, scores, 0.8, 0.6).item()
        for row, theta in zip(want, (2.0, 3.0, 4.0), strict=True):
            sensitivity = abs(theta * g)
            row[0] = 0.8 * row[0] + 0.2 * sensitivity
            row[1] = 0.6 * row[1] + 0.4 * abs(sensitivity - row[0])
    torch.testing.assert_close(state[half.item()].t(), torch.tensor(want))
    assert scores.item() == pytest.approx(sum(a * b for a, b in want), rel=1e-6)


@pytest.mark.parametrize("backend", ("reference", "native"))
def test_ties_at_the_threshold_all_die(backend: str) -> None:
    E = [torch.ones(3, 1), torch.ones(2, 1)]
    live = torch.ones(5, dtype=torch.bool)
    threshold = mask_to_budget(torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0]), E, 3, live, backend=backend)
    assert threshold.item() == 2.0 and live.tolist() == [True, False, False, False, False]
    assert E[0].view(-1).tolist() == [1.0, 0.0, 0.0] and not E[1].any()


@pytest.mark.parametrize("backend", ("reference", "native"))
def test_allocation_refuses(backend: str) -> None:
    scores, live = torch.rand(5), torch.ones(5, dtype=torch.bool)
    E = [torch.ones(3, 1), torch.ones(2, 1)]
    with pytest.raises(ValueError, match="budget: expected at least 0, got -1"):
        mask_to_budget(scores, E, -1, live, backend=backend)
    with pytest.raises(ValueError, match="live, lora_E: expected 5 triplets in all"):
        mask_to_budget(scores, E[:1], 3, live, backend=backend)
    with pytest.raises(ValueError, match=r"scores: expected \[total rank\]"):
        mask_to_budget(scores.view(5, 1), E, 3, live, backend=backend)
    with pytest.raises(ValueError, match="live, lora_E: expected 4 triplets"):
        zero_pruned(live[:4], E, backend=backend)
    assert all(e.all() for e in E) and live.all()


def test_orthogonality_refuses() -> None:
    a, b = torch.randn(2, 5), torch.randn(4, 2)
    with pytest.raises(ValueError, match="lora_A, lora_B: expected at least one matrix"):
        orthogonality_loss([], [], 0.1)
    with pytest.raises(ValueError, match="weight: expected a finite number of at least 0"):
        orthogonality_loss([a], [b], -0.1)
    with pytest.raises(ValueError, match=r"lora_A.*expected 2(-d| dimensions)"):
        orthogonality_loss([a[0]], [b], 0.1)
    with pytest.raises(ValueError, match=r"lora_A, lora_B.* on meta"):
        orthogonality_loss([a], [b.to("meta")], 0.1)


@pytest.mark.parametrize("backend", ("reference", "native"))
@pytest.mark.parametrize("squared", (False, True))
def test_orthogonality_gradcheck(backend: str, squared: bool) -> None:
    a, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (6, 3)))
    assert torch.autograd.gradcheck(lambda a, b: orthogonality_loss([a], [b], 0.3, squared, backend=backend), [a, b])


@pytest.mark.parametrize("backend", ("reference", "native"))
def test_orthogonality_of_orthonormal_rows_has_no_gradient(backend: str) -> None:
    """‖C‖ has no derivative at C = 0; 0 is the one that trains."""
    a, b = torch.eye(3, 5, requires_grad=True), torch.eye(6, 3, requires_grad=True)
    value = orthogonality_loss([a], [b], 0.3, backend=backend)
    value.backward()
    assert value.item() == 0 and a.grad is not None and not a.grad.any()


@pytest.mark.parametrize("backend", ("reference", "native"))
def test_orthogonality_twice_through_a_kept_graph(backend: str) -> None:
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    value = orthogonality_loss([a], [b], 0.3, backend=backend)
    first = torch.autograd.grad(value, [a, b], retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()
    for got, want in zip(torch.autograd.grad(value, [a, b]), kept, strict=True):
        assert torch.equal(got, want)


def leaves() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    lora_A = [torch.randn(3, 5, generator=generator).requires_grad_() for _ in range(2)]
    lora_B = [torch.randn(6, 3, generator=generator).requires_grad_() for _ in range(2)]
    return lora_A, lora_B


@pytest.mark.parametrize("backend", ("reference", "native"))
@pytest.mark.parametrize("scale", (1.0, 4.0))
@pytest.mark.parametrize("others", ("none", "some", "all"))
def test_accumulated_orthogonality_is_autograds(backend: str, scale: float, others: str) -> None:
    """The gradient added at the end of the backward equals autograd's, beside other gradients or alone."""
    results = []
    for accumulate in (False, True):
        lora_A, lora_B = leaves()
        matrices = [*lora_A, *lora_B]
        lora_A[1].requires_grad_(False)
        loss = scale * orthogonality_loss(lora_A, lora_B, 0.3, accumulate=accumulate, backend=backend)
        for m in {"none": [], "some": matrices[2:], "all": matrices}[others]:
            loss = loss + (m**2).sum()
        for _ in range(2):  # the second time into gradients that are there
            loss.backward(retain_graph=True)
        assert matrices[1].grad is None
        results.append([m.grad for m in matrices if m.requires_grad])
    for ours, autograds in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, autograds)


def test_accumulated_orthogonality_refuses() -> None:
    """What it can't do raises; hooks and non-leaves are left to autograd."""
    lora_A, lora_B = leaves()
    value = orthogonality_loss(lora_A, lora_B, 0.3, accumulate=True)
    with pytest.raises(RuntimeError, match=r"torch\.autograd\.grad can't have this term's gradient"):
        torch.autograd.grad(value, [*lora_A, *lora_B])
    assert all(m.grad is None for m in (*lora_A, *lora_B))
    with pytest.raises(ValueError, match="accumulate: expected distinct leaves"):
        orthogonality_loss([lora_A[0], lora_A[0]], lora_B, 0.3, accumulate=True)
    assert can_accumulate((*lora_A, *lora_B)) and not can_accumulate([lora_A[0] * 2.0])
    lora_B[1].register_post_accumulate_grad_hook(lambda p: None)
    assert not can_accumulate(lora_B)
    lora_A[1].register_hook(lambda g: g)
    assert not can_accumulate(lora_A)
