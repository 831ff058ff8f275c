"""The rank budget: zero E wherever its triplet's score is at or below the (total - budget)-th smallest of the model.

One program selects the threshold exactly, by the bits of the scores in an order-preserving form: in each of four
rounds it counts how often each value of the next eight bits occurs among the scores that agree with the threshold so
far. Then it writes the pattern and zeroes E in place. Reads the scores five times, mostly from cache, and 8 bytes of
table for each triplet that dies; a model has at most some ten thousand triplets.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from adalora_kernels.backends.triton.engine.tables import ADDRESS_BITS, CODES, check, describe, on_device, words_of
from adalora_kernels.backends.triton.launch import launch

_PLACE_BITS = 32
_BLOCK = 2048
_OPTIONS = {"BLOCK": _BLOCK, "num_warps": 8, "num_stages": 1}
_PLACE = tl.constexpr((1 << _PLACE_BITS) - 1)
_PLACE_SHIFT = tl.constexpr(_PLACE_BITS)
_ADDRESS = tl.constexpr((1 << ADDRESS_BITS) - 1)
_SIZES_OF_CODES = {code: (dtype.itemsize - code) << ADDRESS_BITS for dtype, code in CODES.items()}  # to be added
_ADDRESS_SHIFT = tl.constexpr(ADDRESS_BITS)


@triton.jit
def _ordered(score):
    """The bits of fp32 numbers as uint32 that are in the same order."""
    bits = score.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit
def _kth_smallest(scores_ptr, total, k, BLOCK: tl.constexpr):
    """The k-th smallest of the scores, k from 1; of no meaning for another k."""
    i = tl.arange(0, BLOCK)
    digits = tl.arange(0, 256)
    found = tl.full((), 0, tl.uint32)
    for round in range(4):
        shift = (tl.full((), 24, tl.int32) - 8 * round).to(tl.uint32)
        counts = tl.zeros((256,), tl.int32)
        for start in range(0, total, BLOCK):
            inside = start + i < total
            keys = _ordered(tl.load(scores_ptr + start + i, mask=inside, other=0.0)) >> shift
            counts += tl.histogram((keys & 255).to(tl.int32), 256, mask=inside & ((keys >> 8) == found))
        value = tl.sum((tl.cumsum(counts, axis=0) < k).to(tl.int32), axis=0)
        k -= tl.sum(tl.where(digits < value, counts, 0), axis=0)
        found = (found << 8) | value.to(tl.uint32)
    bits = found.to(tl.int32, bitcast=True)
    return (bits ^ (~(bits >> 31) | -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _zero(owners_ptr, words_ptr, layers, triplets, dead):
    """Zero E of dead triplets. ``words``: of each E, the size of an element above its address; then their strides."""
    owner = tl.load(owners_ptr + triplets, mask=dead, other=0)
    layer = owner >> _PLACE_SHIFT
    word = tl.load(words_ptr + layer, mask=dead, other=0)
    place = (owner & _PLACE) * tl.load(words_ptr + layers + layer, mask=dead, other=0)
    size = word >> _ADDRESS_SHIFT
    address = (word & _ADDRESS) + place * size
    tl.store(address.to(tl.pointer_type(tl.int16)), 0, mask=dead & (size == 2))
    tl.store(address.to(tl.pointer_type(tl.int32)), 0, mask=dead & (size == 4))


@triton.jit(do_not_specialize=["total", "prune", "layers"])
def _mask_to_budget_kernel(
    scores_ptr,
    owners_ptr,
    words_ptr,
    live_ptr,
    enabled_ptr,
    threshold_ptr,
    budget_ptr,
    total,
    prune,
    layers,
    BLOCK: tl.constexpr,
):
    """Where there is a ``budget_ptr``, an integer, it takes the place of ``prune``."""
    if budget_ptr is not None:
        prune = total - tl.load(budget_ptr).to(tl.int32)
    threshold = tl.where(prune > 0, _kth_smallest(scores_ptr, total, prune, BLOCK), float("-inf"))
    tl.store(threshold_ptr, threshold)
    enabled = True
    if enabled_ptr is not None:
        enabled = tl.load(enabled_ptr) != 0
    for start in range(0, total, BLOCK):
        triplets = start + tl.arange(0, BLOCK)
        inside = (triplets < total) & enabled
        alive = tl.load(scores_ptr + triplets, mask=inside, other=0.0) > threshold
        tl.store(live_ptr + triplets, alive, mask=inside)
        _zero(owners_ptr, words_ptr, layers, triplets, inside & ~alive)


@triton.jit(do_not_specialize=["total", "layers"])
def _zero_pruned_kernel(owners_ptr, words_ptr, live_ptr, total, layers, BLOCK: tl.constexpr):
    triplets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    alive = tl.load(live_ptr + triplets, mask=triplets < total, other=1) != 0
    _zero(owners_ptr, words_ptr, layers, triplets, (triplets < total) & ~alive)


@lru_cache(maxsize=16)
def _owners_of(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """For each triplet its layer and its place there, the layer in the upper half, int64."""
    owners = [layer << _PLACE_BITS | place for layer, rank in enumerate(ranks) for place in range(rank)]
    return torch.tensor(owners, dtype=torch.int64).to(device)


def _values(lora_E: Sequence[Tensor], live: Tensor) -> tuple[Tensor, Tensor]:
    """The tables of the singular values on the device: owners and words."""
    device, total = live.device, live.numel()
    check("live", live, torch.bool, total, device)
    ranks = tuple(e.shape[0] if e.dim() == 2 and e.shape[1] == 1 else -1 for e in lora_E)
    if -1 in ranks:
        i = ranks.index(-1)
        raise ValueError(f"lora_E[{i}]: expected shape [R, 1] on {device}, got {describe(lora_E[i])}")
    if sum(ranks) != total:
        raise ValueError(f"lora_E: expected {total} values, as many as triplets, got {sum(ranks)}")
    strides = [e.stride(0) if rank > 1 else 1 for e, rank in zip(lora_E, ranks, strict=True)]
    # Of a strided one, the first value stands for all: it would be copied.
    whole = [e if stride == 1 else e[:1] for e, stride in zip(lora_E, strides, strict=True)]
    found = words_of("lora_E", whole, None, device)
    words = [word + _SIZES_OF_CODES[word >> ADDRESS_BITS] for word in found.words]
    return _owners_of(ranks, device), on_device(("allocation", ranks), words + strides, device)


def mask_to_budget(
    scores: Tensor, lora_E: Sequence[Tensor], budget: int | Tensor, live: Tensor, enabled: Tensor | None = None
) -> Tensor:
    """Zero E at or below the (total - budget)-th smallest score; see ``reference.allocation.mask_to_budget``.

    Raises:
        ValueError: the scores, the pattern and the singular values don't belong together.
        TypeError: where a dtype is none that the kernel reads.
    """
    total = scores.numel()
    check("scores", scores, torch.float32, live.numel(), live.device)
    if enabled is not None:
        check("enabled", enabled, torch.bool, 1, live.device)
    if total == 0:
        return scores.new_full((), -torch.inf)
    owners, words = _values(lora_E, live)
    threshold = torch.empty((), dtype=torch.float32, device=scores.device)
    launch(
        _mask_to_budget_kernel,
        (1,),
        scores,
        owners,
        words,
        live,
        enabled,
        threshold,
        budget if isinstance(budget, Tensor) else None,
        total,
        0 if isinstance(budget, Tensor) else total - budget,
        len(lora_E),
        **_OPTIONS,
    )
    torch.autograd.graph.increment_version(lora_E)
    return threshold


def zero_pruned(live: Tensor, lora_E: Sequence[Tensor]) -> None:
    """Zero E wherever ``live`` (bool [total_rank]) is False, in place; errors as in ``mask_to_budget``."""
    owners, words = _values(lora_E, live)
    total = live.numel()
    if total > 0:
        grid = (-(-total // _BLOCK),)
        launch(_zero_pruned_kernel, grid, owners, words, live, total, len(lora_E), **_OPTIONS)
        torch.autograd.graph.increment_version(lora_E)


__all__ = ["mask_to_budget", "zero_pruned"]
