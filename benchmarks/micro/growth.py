"""How the layer's cost grows: with tokens, width and rank; and what pruned rank costs before and after compaction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adalora_kernels import svd_linear
from benchmarks.micro import layer
from benchmarks.timing import Contestant, Sample, interleave, ratio

WIDTH, TOKENS, RANK = 768, 1024, 12
CURVES: dict[str, tuple[int, ...]] = {
    "tokens": (64, 256, 1024, 4096),
    "width": (256, 512, 1024, 2048),
    "rank": (4, 8, 16, 32, 64),
}
LIVE = (12, 9, 6, 3, 0)


def curves(threads: int, rounds: int) -> Iterator[Callable[[], dict[str, Any]]]:
    """Every point of every curve, fp32, as a measurement whose benchmark names its curve."""
    for name, values in CURVES.items():
        for value in values:
            yield partial(_point, name, value, threads, rounds)


def _point(curve: str, value: int, threads: int, rounds: int) -> dict[str, Any]:
    width = value if curve == "width" else WIDTH
    tokens = value if curve == "tokens" else TOKENS
    rank = value if curve == "rank" else RANK
    record = layer.measure(width, width, tokens, rank, torch.float32, threads, rounds)
    return record | {"benchmark": f"layer by {curve}"}


def measure_pruned(live: int, threads: int, rounds: int) -> dict[str, Any]:
    """A layer of which ``live`` of 12 triplets are left: with the others' Λ at zero, and compacted to those.

    Returns:
        A record, as ``layer.measure`` makes them.
    """
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    w, bias = normal(WIDTH, WIDTH) / WIDTH**0.5, normal(WIDTH)
    whole = [normal(RANK, WIDTH) / WIDTH**0.5, normal(RANK, 1), normal(WIDTH, RANK)]
    whole[1][live:] = 0
    compact = [whole[0][:live].clone(), whole[1][:live].clone(), whole[2][:, :live].clone()]
    x, g = normal(TOKENS, WIDTH).requires_grad_(), normal(TOKENS, WIDTH)
    leaves = [t.requires_grad_() for t in (x, *whole, *compact)]
    c = layer.ALPHA / RANK
    calls: dict[str, layer.Call] = {
        "frozen": lambda x: F.linear(x, w, bias),
        "ours, pruned": lambda x: svd_linear(x, w, *whole, bias=bias, scaling=c),
        "ours, compacted": lambda x: svd_linear(x, w, *compact, bias=bias, scaling=c),
        layer.AGAIN: lambda x: svd_linear(x, w, *compact, bias=bias, scaling=c),
    }
    with torch.no_grad():
        pruned, compacted = calls["ours, pruned"](x), calls["ours, compacted"](x)
    if not torch.allclose(pruned, compacted, rtol=1e-4, atol=1e-4):
        raise AssertionError("the compacted layer's output differs from the pruned one's")

    def contestant(call: layer.Call) -> Contestant:
        def prepare() -> Callable[[], object]:
            for leaf in leaves:
                leaf.grad = None
            return lambda: call(x).backward(g)

        return prepare

    seconds = interleave({name: contestant(call) for name, call in calls.items()}, rounds)
    return {
        "benchmark": "pruned rank",
        "case": {"K": WIDTH, "N": WIDTH, "M": TOKENS, "R": RANK, "live": live, "dtype": "float32", "threads": threads},
        "milliseconds": {name: {q: 1e3 * v for q, v in vars(Sample.of(s)).items()} for name, s in seconds.items()},
        "ratio_to_frozen": {name: ratio(s, seconds["frozen"]) for name, s in seconds.items() if name != layer.AGAIN},
        "noise": abs(ratio(seconds[layer.AGAIN], seconds["ours, compacted"]) - 1),
        "rounds": rounds,
    }


__all__ = ["CURVES", "LIVE", "curves", "measure_pruned"]
