"""How the layer's cost grows: with tokens, width and rank; and what pruned rank costs before and after compaction."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from adalora_kernels import SVDLinear
from adalora_kernels.allocator.compact import shrink
from adalora_kernels.allocator.triplets import find_triplets
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
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pruned = SVDLinear(WIDTH, WIDTH, RANK, lora_alpha=int(layer.ALPHA))
        nn.init.normal_(pruned.lora_E[:live].data)
        x, g = torch.randn(TOKENS, WIDTH).requires_grad_(), torch.randn(TOKENS, WIDTH)
    pruned.bias.requires_grad_(False)
    compacted = copy.deepcopy(pruned)
    whole = nn.Sequential(compacted)
    shrink(whole, find_triplets(whole), [[i < live for i in range(RANK)]], None)
    leaves = [x, *pruned.parameters(), *compacted.parameters()]
    calls: dict[str, layer.Call] = {
        "frozen": lambda x: F.linear(x, pruned.weight, pruned.bias),
        "ours, pruned": pruned,
        "ours, compacted": compacted,
        layer.AGAIN: compacted,
    }
    with torch.no_grad():
        if not torch.allclose(pruned(x), compacted(x), rtol=1e-4, atol=1e-4):
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
