"""AdaLoRA's own work per step, importance, masking and orthogonality, for a whole model: PEFT's code against ours.

All sides go through PEFT's entry points on equal models; ours are models after ``patch_model``. A run is what a
training step does beside the model's own forward and backward: the orthogonality term forward and backward, into
gradients that are there, the optimizer, importance and masking. What AdaLoRA adds is that less the optimizer alone,
torch's fused AdamW, which a step of plain LoRA takes too. Before each run the caches are emptied, as activations do in
training.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from adalora_kernels import AdaLoraAdamW, patch_model
from benchmarks.timing import Contestant, Sample, interleave

STEP, TOTAL_STEP = 50, 100
LEARNING_RATE = 1e-6
EVICTED_BYTES = 1 << 26
TARGETS = r".*(query_proj|key_proj|value_proj|attention\.output\.dense|intermediate\.dense|\d\.output\.dense)"


def build(layers: int, r: int) -> nn.Module:
    """PEFT's AdaLoRA model of DeBERTa-v3-base with so many layers at rank r, Λ and gradients away from zero.

    Six matrices are adapted in each layer. The vocabulary is cut short, since no embedding takes part; the forward
    answers a loss of 0, since only AdaLoRA's own work is timed.
    """
    from peft import AdaLoraConfig
    from peft.tuners.adalora import AdaLoraModel
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    torch.manual_seed(0)
    base = DebertaV2ForSequenceClassification(
        DebertaV2Config(
            vocab_size=1000, hidden_size=768, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=3072,
            type_vocab_size=0, relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm",
            share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
        )
    )  # fmt: skip
    config = AdaLoraConfig(
        target_modules=TARGETS, init_r=r, target_r=r // 2, tinit=10, tfinal=20, deltaT=1, total_step=TOTAL_STEP
    )
    model = AdaLoraModel(base, {"default": config}, "default")
    base.forward = _loss_of_zero
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_E" in name:
            nn.init.normal_(p)
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator) * 1e-3
    return model


def _loss_of_zero() -> Any:
    return SimpleNamespace(loss=torch.zeros((), requires_grad=True) + 0.0)


def check_equal(*models: Any) -> None:
    """Same orthogonality, and after a step the same parameters and the same live triplets, before anything is timed."""
    steps = [*(with_optimizer(m, adamw(m)) for m in models[:-1]), in_one_sweep(models[-1])]
    terms = [m().loss.item() for m in models]
    for step in steps:
        step()
    if max(terms) - min(terms) > 1e-5 * max(terms):
        raise AssertionError(f"the orthogonality terms differ: {terms}")
    for name, *values in zip(
        [n for n, _ in models[0].named_parameters()], *(m.parameters() for m in models), strict=True
    ):
        first = values[0].detach()
        differing = 0
        for value in values[1:]:
            if "lora_E" in name:
                differing += int(((value == 0) != (first == 0)).sum())
            else:
                torch.testing.assert_close(value.detach(), first, rtol=1e-4, atol=1e-6)
        if differing > 2:
            raise AssertionError(f"{name}: the live triplets differ in {differing} places")


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def with_optimizer(model: Any, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A step's own work with any optimizer, importance and masking after it."""

    def run() -> None:
        model().loss.backward()
        optimizer.step()
        model.update_and_allocate(STEP)

    return run


def in_one_sweep(model: Any) -> Callable[[], None]:
    """A step's own work with AdaLoraAdamW, which scores and masks as it steps."""
    allocator = model.rank_allocator()
    optimizer = AdaLoraAdamW(_trained(model), lr=LEARNING_RATE, allocator=allocator)

    def run() -> None:
        model().loss.backward()
        allocator.expect(STEP)
        optimizer.step()

    return run


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """torch's fused AdamW of what trains."""
    return torch.optim.AdamW(_trained(model), lr=LEARNING_RATE, fused=True)


def copy_of(model: nn.Module) -> Any:
    """A deep copy, gradients included."""
    twin = copy.deepcopy(model)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        b.grad = None if a.grad is None else a.grad.clone()
    return twin


def measure(layers: int, r: int, threads: int, rounds: int) -> dict[str, Any]:
    """One case.

    Returns:
        A record: milliseconds of a step's own work and of the optimizer alone; what each side adds to the latter; and
        how many times as much PEFT adds as ours, with any optimizer and with AdaLoraAdamW.
    """
    torch.set_num_threads(threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = build(layers, r)
    plain, ours, swept = copy_of(peft), copy_of(peft), copy_of(peft)
    for model in (ours, swept):
        patch_model(model)
    check_equal(peft, ours, swept)
    runs: dict[str, Callable[[], object]] = {
        "AdamW alone": adamw(plain).step,
        "PEFT": with_optimizer(peft, adamw(peft)),
        "ours": with_optimizer(ours, adamw(ours)),
        "ours, AdaLoraAdamW": in_one_sweep(swept),
    }
    evicted = torch.zeros(EVICTED_BYTES // 4)

    def contestant(run: Callable[[], object]) -> Contestant:
        def prepare() -> Callable[[], object]:
            evicted.add_(1)
            return run

        return prepare

    seconds = interleave({name: contestant(run) for name, run in runs.items()}, rounds)
    samples = {name: Sample.of(s) for name, s in seconds.items()}
    alone = samples["AdamW alone"].median
    added = {name: 1e3 * (sample.median - alone) for name, sample in samples.items() if name != "AdamW alone"}
    return {
        "benchmark": "importance + masking + orthogonality",
        "case": {
            "matrices": 6 * layers,
            "R": r,
            "elements": sum(p.numel() for p in _trained(peft)),
            "dtype": "float32",
            "threads": threads,
        },
        "milliseconds": {name: {q: 1e3 * v for q, v in vars(sample).items()} for name, sample in samples.items()},
        "added_milliseconds": added,
        "peft_over_ours": {name: added["PEFT"] / value for name, value in added.items() if name != "PEFT"},
        "rounds": rounds,
    }


__all__ = ["build", "measure"]
