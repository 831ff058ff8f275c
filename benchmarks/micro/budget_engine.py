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

# DeBERTa-v3-base: in each of 12 layers query, key, value and attention output, then intermediate and output.
DEBERTA_V3_BASE = ((768, 768),) * 4 + ((768, 3072), (3072, 768))
STEP, TOTAL_STEP = 50, 100


class _Matrices(nn.Module):
    """The adapted matrices of a model and nothing else; its forward answers a loss of 0."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(k, n, bias=False) for k, n in shapes)
        self.config = {"model_type": "custom"}

    def forward(self) -> Any:
        return SimpleNamespace(loss=torch.zeros((), requires_grad=True) + 0.0)


def build(layers: int, r: int) -> nn.Module:
    """A PEFT AdaLoRA model of ``layers`` DeBERTa-v3-base layers at rank r, with Λ and gradients away from zero."""
    from peft import AdaLoraConfig
    from peft.tuners.adalora import AdaLoraModel

    config = AdaLoraConfig(
        target_modules=r".*linears\.\d+",
        init_r=r,
        target_r=r // 2,
        tinit=10,
        tfinal=20,
        deltaT=1,
        total_step=TOTAL_STEP,
    )
    torch.manual_seed(0)
    model = AdaLoraModel(_Matrices(list(DEBERTA_V3_BASE) * layers), {"default": config}, "default")
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_E" in name:
            nn.init.normal_(p)
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator) * 1e-3
    return model


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


def measure(layers: int, r: int, threads: int, rounds: int) -> dict[str, Any]:
    """One case.

    Returns:
        A record: milliseconds of orthogonality (value, and gradient into ``.grad``), of importance + masking, and of
        both, for PEFT and for ours; their ratios; and importance + masking over a plain copy of the bytes that
        importance must move.
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

    def orthogonality(model: nn.Module) -> Contestant:
        def prepare() -> Callable[[], object]:
            for name, p in model.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    p.grad = None
            return lambda: model().loss.backward()

        return prepare

    def allocation(model: Any) -> Contestant:
        return lambda: lambda: model.update_and_allocate(STEP)

    elements = sum(p.numel() for n, p in peft.named_parameters() if p.requires_grad)
    source, target = torch.randn(3 * elements), torch.empty(3 * elements)
    seconds = interleave(
        {
            "peft orthogonality": orthogonality(peft),
            "peft importance + masking": allocation(peft),
            "ours orthogonality": orthogonality(ours),
            "ours importance + masking": allocation(ours),
            "copy of the same bytes": lambda: lambda: target.copy_(source),
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
        "case": {"matrices": len(DEBERTA_V3_BASE) * layers, "R": r, "elements": elements, "dtype": "float32",
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
        "ours_over_copy": ratio(seconds["ours importance + masking"], seconds["copy of the same bytes"]),
        "rounds": rounds,
    }  # fmt: skip


__all__ = ["build", "measure"]
