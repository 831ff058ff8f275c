"""The methods train what the paper says that they train, and each of them learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from benchmarks.paper import presets
from benchmarks.paper.methods import METHODS, Setting, prepare, trained_parameters
from benchmarks.paper.methods.architecture import heads

DEBERTA_V3_BASE: dict[str, Any] = {
    "vocab_size": 128100, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "type_vocab_size": 0, "relative_attention": True, "position_buckets": 256,
    "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
}  # fmt: skip
SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def deberta(**changes: Any) -> nn.Module:
    return DebertaV2ForSequenceClassification(DebertaV2Config(**{**DEBERTA_V3_BASE, **changes}))


def described(kind: type[nn.Module], config: Any) -> nn.Module:
    """A model without memory for its weights."""
    with torch.device("meta"):
        return kind(config)


# The paper's table of GLUE, in millions as printed there; and of summarisation, the share of BART-large's parameters.
GLUE = [
    ("full", 0, "184"), ("bitfit", 0, "0.1"), ("lora", 8, "1.33"), ("lora", 2, "0.33"),
    ("houlsby", 32, "1.22"), ("houlsby", 16, "0.61"), ("houlsby", 8, "0.31"),
    ("pfeiffer", 64, "1.18"), ("pfeiffer", 32, "0.60"), ("pfeiffer", 16, "0.30"),
]  # fmt: skip
# The authors' scripts for XSum and CNN/DailyMail name target ranks 8 and 2; the other two are printed in proportion.
SUMMARIES = [(16, "2.20"), (8, "1.10"), (2, "0.26"), (1, "0.13")]


def agrees(value: float, printed: str) -> bool:
    """Within 2 % of what is printed, or rounded to it."""
    half_a_digit = 0.5 * 10.0 ** -len(printed.partition(".")[2])
    return abs(value - float(printed)) <= max(0.02 * float(printed), half_a_digit)


@pytest.mark.parametrize(("method", "size", "millions"), GLUE)
def test_parameters_are_the_papers_for_deberta_v3_base(method: str, size: int, millions: str) -> None:
    model = described(DebertaV2ForSequenceClassification, DebertaV2Config(**DEBERTA_V3_BASE))
    assert agrees(trained_parameters(prepare(model, method, Setting(size)).model) / 1e6, millions)


def test_ranks_for_bart_large_are_the_released_scripts() -> None:
    """The paper's shares can't hold them: but for the least, no rank comes within 2 % (16 gives 2.13 %, 17 2.26 %)."""
    total = sum(p.numel() for p in described(BartForConditionalGeneration, BartConfig()).parameters())
    counts = {}
    for rank in {r + d for r, _ in SUMMARIES for d in (0, 1)}:
        model = described(BartForConditionalGeneration, BartConfig())
        counts[rank] = trained_parameters(prepare(model, "lora", Setting(rank)).model)
        assert counts[rank] == rank * 12 * ((4 + 8) * 2 * 1024 + (2 + 2) * (1024 + 4096))
    shares = {rank: 100 * count / total for rank, count in counts.items()}
    for rank, printed in SUMMARIES:
        assert {p.size for p in presets.cells("summaries") if p.budget == f"{printed}%"} == {rank}
        assert abs(shares[rank] - float(printed)) < 0.035 * float(printed)
        assert [r for r, share in shares.items() if agrees(share, printed)] == ([1] if printed == "0.13" else [])


@pytest.mark.parametrize(("size", "initial", "total_rank"), [(8, 12, 576), (4, 6, 288), (2, 4, 144), (1, 2, 72)])
@pytest.mark.parametrize("method", ["adalora", "pruned-lora"])
def test_adaloras_total_rank_is_the_papers(method: str, size: int, initial: int, total_rank: int) -> None:
    model = deberta(**{**SMALL, "num_hidden_layers": 12})
    tuner: Any = prepare(model, method, Setting(size)).model.base_model
    allocator = tuner.rank_allocator()
    assert len(allocator.triplets) == 72 and allocator.target_rank == total_rank
    assert {triplet.lora_E.shape[0] for triplet in allocator.triplets} == {initial}


def batch() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(1, 33).view(4, 8), "labels": torch.tensor([0, 1, 1, 0])}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns_and_leaves_what_is_frozen(method: str) -> None:
    model = deberta(**SMALL)
    before = {id(p): p.detach().clone() for p in model.parameters()}
    head = {id(p) for name in heads(model) for p in getattr(model, name).parameters()}
    prepared = prepare(model, method, Setting(2)).model
    trained = [p for p in prepared.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(20):
        loss = prepared(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] or (method in ("head", "bitfit") and losses[-1] < losses[0])
    for p in model.parameters():
        if id(p) in before and id(p) not in head and not p.requires_grad:
            assert torch.equal(p, before[id(p)])
    assert (trained_parameters(prepared) == 0) == (method == "head")


def trained_by(method: str) -> Any:
    """The tuner after a step whose ranking follows the method's own score."""
    torch.manual_seed(0)
    setting = Setting(1, initial_rank=3, total_steps=10, initial_warmup=0, final_warmup=2, mask_interval=1)
    model = prepare(deberta(**SMALL), method, setting).model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(6):
        model(**batch()).loss.backward()
        optimizer.step()
        before = [e.detach().clone() for e in model.base_model.rank_allocator().begin(step).lora_E]
        model.base_model.update_and_allocate(step)
        if step < 5:
            optimizer.zero_grad()
    return model.base_model, before


def test_ranked_by_singular_values() -> None:
    tuner, before = trained_by("adalora-singular-values")
    values = torch.cat(before).abs().flatten()
    live = torch.cat([t.lora_E.detach().flatten() != 0 for t in tuner.rank_allocator().triplets])
    assert 0 < live.sum() < len(live)
    assert values[live].min() > values[~live].max()


def test_ranked_by_sensitivity() -> None:
    tuner, before = trained_by("adalora-sensitivity")
    scores, live = [], []
    for triplet, e in zip(tuner.rank_allocator().triplets, before, strict=True):
        a, b = triplet.lora_A, triplet.lora_B
        score = (a * a.grad).abs().mean(1) + (e * triplet.lora_E.grad).abs().flatten() + (b * b.grad).abs().mean(0)
        scores.append(score.detach())
        live.append(triplet.lora_E.detach().flatten() != 0)
    s, kept = torch.cat(scores), torch.cat(live)
    assert 0 < kept.sum() < len(kept)
    assert s[kept].min() > s[~kept].max()


def test_pairs_that_pruned_lora_drops_stay_so() -> None:
    torch.manual_seed(0)
    setting = Setting(1, initial_rank=3, total_steps=12, initial_warmup=1, final_warmup=2, mask_interval=1)
    model = prepare(deberta(**SMALL), "pruned-lora", setting).model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    alive = [36]
    for step in range(12):
        model(**batch()).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        values = torch.cat([t.lora_E.detach() for t in model.base_model.rank_allocator().triplets])
        assert bool(((values == 0) | (values == 1)).all())
        alive.append(int(values.sum()))
    assert alive == sorted(alive, reverse=True) and alive[-1] <= 12


@pytest.mark.parametrize(
    ("method", "size", "message"),
    [("lorra", 8, "method: expected one of"), ("lora", 0, "size: expected at least 1 for lora, got 0")],
)
def test_bad_arguments(method: str, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(deberta(**SMALL), method, Setting(size))


def test_an_architecture_without_places_is_refused() -> None:
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1, n_positions=8, bos_token_id=0, eos_token_id=0)
    )
    with pytest.raises(ValueError, match="model: expected one of deberta-v2, bart, got gpt2"):
        prepare(model, "houlsby", Setting(4))
