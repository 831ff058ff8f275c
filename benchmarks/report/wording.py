"""Cases and contestants in words, and what several cases have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

_NAMES = {
    "peft": "PEFT",
    "peft, torch.compile": "PEFT, compiled",
    "addmm_": "addmm_ by hand",
    "frozen": "frozen linear",
    "original": "original package",
    "original, torch.compile": "original, compiled",
    "ours, torch.compile": "ours, compiled",
    "adamw": "AdamW + importance",
    "native": "ours",
    "reference": "plain PyTorch",
    "launched": "launched on its own",
    "fused": "fused into the backward",
}
_WORDS: dict[str, Callable[[Any], str]] = {
    "M": lambda value: f"{value} tokens",
    "R": lambda value: f"rank {value}",
    "threads": lambda value: f"{value} thread{'s' * (value != 1)}",
    "layers": lambda value: f"{value} layers",
    "matrices": lambda value: f"{value} matrices",
    "adapter": lambda value: f"{value} adapter",
    "live": lambda value: f"{value} triplets left",
    "lora": lambda value: f"LoRA's rank {value}",
    "target": lambda value: f"target rank {value}",
    "rows": lambda value: f"{value} sequences",
    "columns": lambda value: f"{value} tokens each",
}
# They follow from the rest of the case, or the record's origin says them.
_UNSAID = ("elements", "device")


def name(contestant: str) -> str:
    """A contestant's name for people."""
    return _NAMES.get(contestant, contestant)


def phrases(case: Mapping[str, Any]) -> list[str]:
    """A case, a phrase for each thing that it says."""
    said = []
    if "K" in case and "N" in case:
        wide = case["N"] if isinstance(case["N"], list | tuple) else (case["N"],)
        said.append(f"{case['K']}×{'+'.join(map(str, wide))}")
    for key, value in case.items():
        if key in ("K", "N", *_UNSAID) or value is None:
            continue
        said.append(_WORDS[key](value) if key in _WORDS else _other(key, value))
    return said


def _other(key: str, value: Any) -> str:
    if isinstance(value, str):
        return value.replace("x", "×") if value.replace("x", "").isdigit() else value
    return f"{key} {value}"


def shared(cases: Iterable[Mapping[str, Any]]) -> list[str]:
    """The phrases that all cases have."""
    every = [phrases(case) for case in cases]
    return [phrase for phrase in every[0] if all(phrase in other for other in every)] if every else []


def labels(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tells each case from the others; nothing where there is but one."""
    common = shared(cases)
    return [", ".join(phrase for phrase in phrases(case) if phrase not in common) for case in cases]


def sentence(case: Mapping[str, Any]) -> str:
    """A case in one line."""
    return ", ".join(phrases(case))


def capital(text: str) -> str:
    """With its first letter as at the beginning of a sentence."""
    return text[:1].upper() + text[1:]


def number(value: float) -> str:
    """Three significant figures or so, thousands parted."""
    if abs(value) >= 100:
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


__all__ = ["capital", "labels", "name", "number", "phrases", "sentence", "shared"]
