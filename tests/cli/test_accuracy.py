"""The judgement: balanced accuracy, its threshold, its standard error."""

from __future__ import annotations

import math

import torch

from adalora_kernels.cli.demo.accuracy import best_threshold, correctness, estimate, pair_scores
from adalora_kernels.cli.demo.model import EncodedPairs, PairEncoder, deberta_v3_config


def test_both_kinds_of_question_weigh_the_same() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.6], [0.2, 0.3, 0.1], [0.8, 0.7, 0.95]])
    # Threshold 0.5: own summary right, wrong, right; others rejected 1 of 2, 2 of 2, 0 of 2.
    assert correctness(scores, 0.5).tolist() == [0.75, 0.5, 0.5]


def test_answering_always_the_same_is_right_in_half_of_the_cases() -> None:
    scores = torch.rand(20, 20)
    assert correctness(scores, -1.0).tolist() == [0.5] * 20
    assert correctness(scores, 1.0).tolist() == [0.5] * 20


def test_threshold_separates_what_can_be_separated() -> None:
    scores = 0.6 * torch.eye(10) + 0.2
    threshold = best_threshold(scores)
    assert 0.2 <= threshold < 0.8
    assert correctness(scores, threshold).eq(1).all()


def test_standard_error_is_that_of_a_mean() -> None:
    values = torch.tensor([0.0, 1.0] * 200, dtype=torch.float64)
    result = estimate(values)
    assert result.mean == 0.5
    assert math.isclose(result.standard_error, 0.5 / math.sqrt(399), rel_tol=1e-9)
    assert str(result) == "50.0 ± 2.5 %"


def test_scores_do_not_depend_on_the_order_of_the_work() -> None:
    """Texts are embedded by length, in chunks with padding of their own; the matrix must come out as if one by one."""
    torch.manual_seed(0)
    model = PairEncoder(deberta_v3_config(50, 32, 2, 12)).train()
    lengths = torch.randint(2, 13, (2, 300))
    mask = (torch.arange(12) < lengths[..., None]).long()
    pairs = EncodedPairs(torch.randint(2, 50, mask.shape) * mask, mask)
    scores = pair_scores(model, pairs)
    assert model.training
    picked = [0, 17, 258, 299]
    with torch.no_grad():
        alone = [model(pairs.ids[side, i, None, :n], pairs.mask[side, i, None, :n]).embeddings[0]
                 for side in (0, 1) for i in picked for n in [int(lengths[side, i])]]  # fmt: skip
    expected = torch.stack(alone[:4]) @ torch.stack(alone[4:]).t()
    torch.testing.assert_close(scores[picked][:, picked], expected, atol=1e-5, rtol=1e-5)
