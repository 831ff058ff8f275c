"""The CUDA stage that finishes a layer's gradients, run on the CPU: gradients, and importance handed over by it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adalora_kernels.reference.handover import LayerImportance, new_handover, probes_of, slots_of, sum_offsets
from adalora_kernels.reference.importance import OrthogonalityShare, TripletLayout
from adalora_kernels.reference.svd_linear import Adapter
from adalora_kernels.testing.tolerances import assert_within_budget
from tests.csrc.emulation import Emulation

BETAS = 0.85, 0.75
# Ends within a slot and within a block, one position, as many triplets as threads, more probes than positions.
SHAPES = ((1, 1, 1), (8, 130, 64), (12, 300, 77), (33, 65, 40), (64, 9, 200), (128, 20, 3))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Model:
    """Layers with what passes over g and x have left of their gradients, averages of some steps, and a handover."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        dtypes: Sequence[torch.dtype] = (torch.float32,),
        before: bool = False,
        term: bool = False,
        mask: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        choice = random.Random(0)
        self.layout = TripletLayout(tuple(shapes))
        self.state = normal(2, 2, self.layout.total_elements).abs()
        self.half = torch.ones(1, dtype=torch.int32)
        self.state[0] = torch.nan
        self.scores = torch.full((self.layout.total_rank,), -1.0)
        self.handover = new_handover(self.layout, torch.device("cpu"))
        self.handover.sums.fill_(torch.nan)
        self.ticket = torch.zeros(4, dtype=torch.int32)
        self.params: list[Tensor] = []
        self.before: list[Tensor | None] = []
        self.shares: list[tuple[Tensor, Tensor]] = []
        self.adapters: list[Adapter] = []
        self.terms: list[OrthogonalityShare | None] = []
        for r, k, n in shapes:
            A, E, B = (normal(*size).to(choice.choice(dtypes)) for size in ((r, k), (r, 1), (n, r)))
            self.params += [A, E, B]
            self.before += [
                normal(*p.shape).to(p.dtype) if before and choice.random() < 0.7 else None for p in (A, E, B)
            ]
            padded, slabs = -(-r // 16) * 16, (choice.randint(1, 5), choice.randint(1, 5))
            shares = normal(slabs[0], n, padded), normal(slabs[1], k, padded)
            for share in shares:
                share[:, :, r:] = torch.nan
            self.shares.append(shares)
            own_mask = (torch.arange(r) % 3 > 0).float() if mask else None
            self.adapters.append(Adapter(A, E, B, own_mask, None, 1.7, 0.0, torch.float32))
            slopes = normal(2 * r * r + 3)
            for offset in (1, r * r + 2):
                own = slopes[offset : offset + r * r].view(r, r)
                own += own.t().clone()
            self.terms.append(OrthogonalityShare(slopes, 1, r * r + 2, torch.tensor([0.3])) if term else None)

    def finish(self, emulation: Emulation) -> list[Tensor]:
        """All layers' gradients, with importance handed over."""
        layout, grads = self.layout, list[Tensor]()
        pieces = [self.handover.sums[a:b] for a, b in pairwise(sum_offsets(layout))]
        for i, (r, _, _) in enumerate(layout.shapes):
            if r == 0:
                grads += self.adapters[i][:3]
                continue
            sums = pieces[i].view(slots_of(layout)[i], r)
            probes = self.handover.probes[3 * i : 3 * i + 3]
            before = self.before[3 * i : 3 * i + 3]
            importance = LayerImportance(
                self.state, self.half, layout.offsets[3 * i], before, self.terms[i], sums, probes, *BETAS
            )
            grads += emulation.finish_gradients(*self.shares[i], self.adapters[i], importance, self.ticket)
            assert not self.ticket.any()
        return grads

    def totals(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """As autograd accumulates them."""
        return [g if b is None else b + g for g, b in zip(grads, self.before, strict=True)]

    def plain(self, emulation: Emulation, totals: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
        """The averages, the half and the scores that a launch without a handover makes of these gradients."""
        state, half, scores = self.state.clone(), self.half.clone(), self.scores.clone()
        state[1 - int(self.half)] = torch.nan
        emulation.importance_update(self.layout, self.params, totals, state, half, scores, *BETAS)
        return state, half, scores

    def commit(self, emulation: Emulation, totals: Sequence[Tensor | None], known: list[bool]) -> bool:
        """Take over what was handed over."""
        args = self.layout, self.params, totals, self.state, self.half, self.scores, *BETAS
        return bool(emulation.importance_update(*args, handed_over=(self.handover, known)))


def expected(
    shares: tuple[Tensor, Tensor], adapter: Adapter, term: OrthogonalityShare | None, dtype: torch.dtype
) -> list[Tensor]:
    """dA, dE, dB in the dtype given, by PyTorch; rounded to the parameters' dtypes unless that is fp64."""
    R = adapter.lora_A.shape[0]
    t, da = (share[:, :, :R].to(dtype).sum(0) for share in shares)
    mask = torch.ones(R) if adapter.mask is None else adapter.mask
    factor = adapter.scaling * mask.to(dtype)
    A, E, B = (p.to(dtype) for p in adapter[:3])
    dE = factor * (B * t).sum(0)
    grads = [da.t(), dE.view(-1, 1), t * factor * E.view(-1)]
    rounded = [g.to(p.dtype) if dtype == torch.float32 else g for g, p in zip(grads, adapter[:3], strict=True)]
    if term is None:
        return rounded
    slopes = [term.slopes[o : o + R * R].view(R, R).to(dtype) for o in (term.offset_A, term.offset_B)]
    scale = term.scale.to(dtype)
    added = [rounded[0] + (slopes[0] * scale) @ A, rounded[1], rounded[2] + B @ (slopes[1] * scale)]
    return [g.to(p.dtype) if dtype == torch.float32 else g for g, p in zip(added, adapter[:3], strict=True)]


CASES = {
    "alone": dict[str, bool](),
    "on top of gradients": {"before": True},
    "with orthogonality": {"term": True},
    "with all": {"before": True, "term": True, "mask": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtypes", [DTYPES[:1], DTYPES], ids=["fp32", "mixed"])
def test_gradients_and_importance(emulation: Emulation, case: str, dtypes: Sequence[torch.dtype]) -> None:
    emulation.draw_orders(1)
    model = Model(SHAPES, dtypes, **CASES[case])
    grads = model.finish(emulation)
    for i, adapter in enumerate(model.adapters):
        same = expected(model.shares[i], adapter, model.terms[i], torch.float32)
        exact = expected(model.shares[i], adapter, model.terms[i], torch.float64)
        for name, ours, theirs, truth in zip("AEB", grads[3 * i : 3 * i + 3], same, exact, strict=True):
            assert_within_budget(f"d{name} of layer {i}", ours, theirs, truth)

    totals = model.totals(grads)
    for i in range(len(SHAPES)):
        probes = probes_of(totals[3 * i : 3 * i + 3])
        assert torch.equal(model.handover.probes[3 * i : 3 * i + 3][~probes.isnan()], probes[~probes.isnan()])
    plain = model.plain(emulation, totals)
    assert model.commit(emulation, totals, [True] * len(totals))
    assert not model.handover.redone.any()
    assert torch.equal(model.state[0], plain[0][0]) and torch.equal(model.half, plain[1])
    torch.testing.assert_close(model.scores, plain[2], rtol=2e-6, atol=0)


def test_what_was_written_to_is_done_over(emulation: Emulation) -> None:
    emulation.draw_orders(2)
    model = Model((*SHAPES, (0, 4, 4), (16, 2100, 1500)), before=True)
    model.handover.redone.fill_(1)  # of the step before
    model.handover.redone[18:21] = 0  # of the layer without rank, which no step changes
    totals: list[Tensor | None] = list(model.totals(model.finish(emulation)))
    known = [True] * len(totals)
    unseen = (6, 11, 13, 21, 23)  # of which the host has no idea, though most probes tell
    for i in unseen:
        totals[i] = totals[i] * 0.5  # type: ignore[operator]
    known[4] = False
    totals[4] = totals[4] + 1  # type: ignore[operator]
    totals[8] = None
    plain = model.plain(emulation, totals)
    assert model.commit(emulation, totals, known)
    assert set(model.handover.redone.nonzero().flatten().tolist()) == set(unseen)
    assert torch.equal(model.state[0], plain[0][0]) and torch.equal(model.half, plain[1])
    torch.testing.assert_close(model.scores, plain[2], rtol=2e-6, atol=0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e25])
@pytest.mark.parametrize("where", [(0, 0), (0, 1), (2, 0), (2, 1)], ids=["B", "A", "B later", "A later"])
def test_overflow_is_handed_over(emulation: Emulation, poison: float, where: tuple[int, int]) -> None:
    emulation.draw_orders(3)
    model = Model(SHAPES)
    layer, which = where
    model.shares[layer][which][-1, -1, 0] = poison
    before, half, scores = model.state.clone(), model.half.clone(), model.scores.clone()
    totals = model.totals(model.finish(emulation))
    assert not model.commit(emulation, totals, [True] * len(totals))
    assert torch.equal(model.half, half) and torch.equal(model.scores, scores)
    assert torch.equal(model.state[1], before[1])


def test_bits_do_not_depend_on_the_order_of_execution(emulation: Emulation) -> None:
    results = []
    for seed in (0, 0, 4, 5):
        emulation.draw_orders(seed)
        model = Model(SHAPES, DTYPES, before=True, term=True, mask=True)
        results.append([*model.finish(emulation), model.state[0], *model.handover])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_any_block_may_be_the_last(emulation: Emulation) -> None:
    """Three of them finish B, all under way at a time."""
    shapes = ((64, 8, 48),)
    emulation.draw_orders(0)
    expected = Model(shapes).finish(emulation)
    for seed in range(1, 60):
        emulation.draw_orders(seed)
        assert all(map(torch.equal, Model(shapes).finish(emulation), expected))


FAULTS = {
    "the last block does not wait": ("  __syncthreads();\n  return last;", "  return last;"),
    "a block arrives before it has written": ("  __shared__ bool last;\n  __syncthreads();", "  __shared__ bool last;"),
    "groups are added up too early": (
        "  values[threadIdx.x] = value;\n  __syncthreads();",
        "  values[threadIdx.x] = value;",
    ),
    "the ticket stays": ("if (last) *ticket = 0;", ""),
    "a slot ends early": ("if (begin + p >= part.length) continue;", "if (begin + p + 1 >= part.length) continue;"),
    "slots overlap": ("slot * kPositions;\n  if (begin", "slot * (kPositions - 1);\n  if (begin"),
    "a slab is left out": ("slab < slabs; ++slab", "slab < slabs - 1; ++slab"),
    "what is not finite is summed": ("layer.r + triplet] = finite ? sum : NAN", "layer.r + triplet] = sum"),
    "probes of other triplets": ("probe % rank == triplet", "triplet == 0"),
    "any probe will do": ("same = bits_of(now) == bits_of", "same = true || bits_of(now) == bits_of"),
    "a slot of what is left is skipped": ("slot = begin; slot < end", "slot = begin; slot < end - 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_show(emulation: Emulation, fault: str, tmp_path: Path) -> None:
    faulty = emulation.with_fault(tmp_path, *FAULTS[fault])
    for test in (
        lambda: test_gradients_and_importance(faulty, "with all", DTYPES),
        lambda: test_what_was_written_to_is_done_over(faulty),
        lambda: test_overflow_is_handed_over(faulty, 1e25, (2, 1)),
        lambda: test_any_block_may_be_the_last(faulty),
    ):
        try:
            test()
        except AssertionError:
            return
    pytest.fail("nobody noticed")
