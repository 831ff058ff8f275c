"""AdaLoRA's own work per step, importance, masking and orthogonality, for a whole model: PEFT's code against ours.

Both sides go through PEFT's own entry points (``AdaLoraModel.forward`` for the orthogonality term,
``update_and_allocate`` for the rest) on equal models; ours is the model after ``patch_model``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from adalora_kernels import patch_model
from benchmarks.timing import Contestant, Sample, interleave, ratio

STEP, TOTAL_STEP = 50, 100
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


def check_equal(peft: Any, ours: Any) -> None:
    """Same orthogonality, its gradient, and the same live triplets, before anything is timed."""
    terms = [m().loss for m in (peft, ours)]
    torch.testing.assert_close(terms[1], terms[0], rtol=1e-5, atol=0)
    for model in (peft, ours):
        model.update_and_allocate(STEP)
    zeros = [
        torch.cat([p.view(-1) == 0 for n, p in model.named_parameters() if "lora_E" in n]) for model in (peft, ours)
    ]
    differing = int((zeros[0] != zeros[1]).sum())
    if differing > 2:
        raise AssertionError(f"the live triplets differ in {differing} places")


def orthogonality(model: nn.Module) -> Contestant:
    """The term's value, and its gradient into ``.grad``; the gradients of the step before are cleared first."""
    matrices = [p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]

    def prepare() -> Callable[[], object]:
        for p in matrices:
            p.grad = None
        return lambda: model().loss.backward()

    return prepare


def allocation(model: Any) -> Contestant:
    """Importance and masking, where they stand in a training step: right after the optimizer's."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def prepare() -> Callable[[], object]:
        optimizer.step()
        return lambda: model.update_and_allocate(STEP)

    return prepare


def measure(layers: int, r: int, threads: int, rounds: int) -> dict[str, Any]:
    """One case.

    Returns:
        A record: milliseconds of orthogonality, of importance + masking, and of both, for PEFT and for ours; and their
        ratios.
    """
    torch.set_num_threads(threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = build(layers, r)
    ours = copy.deepcopy(peft)
    for a, b in zip(peft.parameters(), ours.parameters(), strict=True):
        b.grad = None if a.grad is None else a.grad.clone()
    patch_model(ours)
    check_equal(peft, ours)

    elements = sum(p.numel() for p in peft.parameters() if p.requires_grad)
    seconds = interleave(
        {
            f"{side} {part}": contestant(model)
            for side, model in (("peft", peft), ("ours", ours))
            for part, contestant in (("orthogonality", orthogonality), ("importance + masking", allocation))
        },
        rounds,
    )
    total = {
        side: [
            a + b
            for a, b in zip(seconds[f"{side} orthogonality"], seconds[f"{side} importance + masking"], strict=True)
        ]
        for side in ("peft", "ours")
    }
    return {
        "benchmark": "importance + masking + orthogonality",
        "case": {"matrices": 6 * layers, "R": r, "elements": elements, "dtype": "float32",
                 "threads": threads},
        "milliseconds": {
            name: {q: 1e3 * v for q, v in vars(Sample.of(s)).items()}
            for name, s in {**seconds, "peft all": total["peft"], "ours all": total["ours"]}.items()
        },
        "peft_over_ours": {
            part: ratio(seconds[f"peft {part}"], seconds[f"ours {part}"])
            for part in ("orthogonality", "importance + masking")
        }
        | {"all": ratio(total["peft"], total["ours"])},
        "rounds": rounds,
    }  # fmt: skip


__all__ = ["build", "measure"]
