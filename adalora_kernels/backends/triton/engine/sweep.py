"""One sweep over all adapters of a model: the step of AdamW, of the averages Ī and Ū, and the score of every triplet.

    I = |θ g|,  Ī ← β₁ Ī + (1-β₁) I,  Ū ← β₂ Ū + (1-β₂) |I - Ī|,  s = Ī Ū
    S_i = s(E_i) + mean_k s(A_ik) + mean_j s(B_ji)

Importance alone reads θ, g, Ī, Ū and writes the other half of Ī, Ū: 24 bytes an element in fp32. With AdamW it reads
and writes both moments and writes θ too: 44 bytes.

A program takes an item: some triplets of one of a layer's parameters, and a range of their elements. It leaves a sum of
s for each. The last program of a layer adds them up in a fixed order, the last of all commits the scores and turns to
the new half if every s was finite. No float is added atomically and no product contracted, so results are bitwise
repeatable and follow the CPU's to rounding.

Where backwards have updated importance already (``handed_over``), the items of a parameter whose gradient has stayed
what it was sum up what is left of it and touch no element; those of the others do as ever, from the half that is still
current.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from adalora_kernels.backends.triton.engine.elements import adamw_constants, update
from adalora_kernels.backends.triton.engine.handed_over import is_as_seen, take_sums
from adalora_kernels.backends.triton.engine.items import A_ROWS, ITEM_ROW, LAYER_ROW, items_of
from adalora_kernels.backends.triton.engine.operands import advanced
from adalora_kernels.backends.triton.engine.scores import commit, score
from adalora_kernels.backends.triton.engine.tables import are_aligned, on_device
from adalora_kernels.backends.triton.launch import launch
from adalora_kernels.backends.triton.tickets import arrives_last, workspace
from adalora_kernels.reference.adamw import Importance
from adalora_kernels.reference.handover import POSITIONS, PROBES, Handover
from adalora_kernels.reference.importance import TripletLayout

_TILE = {True: 1024, False: 512}  # elements in flight at a time in a program, by whether they are loaded in fours
_LAYER_ROW = tl.constexpr(LAYER_ROW)
_ITEM_ROW = tl.constexpr(ITEM_ROW)
_INFINITY = tl.constexpr(0x7F800000)  # its bits in fp32; those of NaN are above


class Optimizer(NamedTuple):
    """The state of AdamW; see ``reference.adamw.adamw_update``.

    ``settings`` are the bits of its fp64 rows, or these rows on the device.
    """

    moments: Tensor
    steps: Tensor
    groups: Tensor
    grad_scale: Tensor
    settings: list[int] | Tensor


@triton.jit
def _sweep_item(
    param,
    grad,
    has_grad,
    triplets,
    positions,
    triplet_stride,
    position_stride,
    sum_ptr,
    overflow_ptr,
    moments,
    averages,
    constants,
    smoothing,
    POSITION_AXIS: tl.constexpr,
    TRIPLETS: tl.constexpr,
    POSITIONS: tl.constexpr,
    ADAMW: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    PRE_STEP: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Update up to TRIPLETS triplets at all positions of an item, and store their sums of s.

    The tile is [TRIPLETS, POSITIONS] where positions are the axis 1, as in A, else its transpose, as in B. Where some
    s is not finite the overflow flag is set.
    """
    i = tl.arange(0, TRIPLETS)
    across = tl.expand_dims(i, POSITION_AXIS)
    total = tl.zeros((TRIPLETS, POSITIONS) if POSITION_AXIS == 1 else (POSITIONS, TRIPLETS), tl.float32)
    largest = total.to(tl.int32)
    for start in range(0, positions, POSITIONS):
        along = tl.expand_dims(start + tl.arange(0, POSITIONS), 1 - POSITION_AXIS)
        inside = (across < triplets) & (along < positions)
        at = across * triplet_stride + along * position_stride
        s = update(
            param,
            grad,
            at,
            inside,
            inside & has_grad,
            moments,
            averages,
            constants,
            smoothing,
            ADAMW,
            IMPORTANCE,
            PRE_STEP,
            ALIGNED,
        )
        total += s
        largest = tl.maximum(largest, s.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    if IMPORTANCE:
        tl.store(sum_ptr + i, tl.sum(total, axis=POSITION_AXIS), mask=i < triplets)
        if tl.max(largest) >= _INFINITY:
            tl.atomic_or(overflow_ptr, 1, sem="relaxed")


@triton.jit
def _count_step(grads_ptr, steps_ptr, R):
    """One more step of those of a layer's parameters that have a gradient."""
    part = tl.arange(0, 4)
    stepped = (part < 3) & (R > 0)
    stepped &= tl.load(grads_ptr + part, mask=stepped, other=0) != 0
    tl.store(steps_ptr + part, tl.load(steps_ptr + part, mask=stepped, other=0.0) + 1.0, mask=stepped)


@triton.jit
def _at(pointer, offset, ALIGNED: tl.constexpr):
    pointer += offset
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit(do_not_specialize=["elements", "total_rank", "layers"])
def _sweep_kernel(
    layers_ptr,
    items_ptr,
    words_ptr,
    settings_ptr,
    moments_ptr,
    steps_ptr,
    groups_ptr,
    scale_ptr,
    state_ptr,
    half_ptr,
    scores_ptr,
    pending_ptr,
    sums_ptr,
    taken_ptr,
    workspace_ptr,
    left_sums_ptr,
    probes_ptr,
    redone_ptr,
    elements,
    total_rank,
    layers,
    beta1,
    rest1,
    beta2,
    rest2,
    ADAMW: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    PRE_STEP: tl.constexpr,
    HANDED_OVER: tl.constexpr,
    ALIGNED: tl.constexpr,
    A_ROWS: tl.constexpr,
    A_COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    B_ROWS: tl.constexpr,
    SLAB: tl.constexpr,
    POSITIONS: tl.constexpr,
    PROBES: tl.constexpr,
):
    """``words``: of all parameters, then of all gradients; where there is a handover, then whether the host knows of no
    write to each gradient since. ``settings``: bits of fp64. ``workspace``: the ticket of all
    layers, whether any s was not finite, and a ticket for each layer."""
    item_ptr = items_ptr + tl.program_id(0) * _ITEM_ROW
    layer = tl.load(item_ptr)
    part = tl.load(item_ptr + 1)
    triplet = tl.load(item_ptr + 2)
    position = tl.load(item_ptr + 3)
    layer_ptr = layers_ptr + layer * _LAYER_ROW
    R = tl.load(layer_ptr)
    K = tl.load(layer_ptr + 1)
    N = tl.load(layer_ptr + 2)
    first = tl.load(layer_ptr + 3)
    first_triplet = tl.load(layer_ptr + 4)
    first_sum = tl.load(layer_ptr + 5)
    items_of_layer = tl.load(layer_ptr + 6)
    if ALIGNED:
        R = tl.multiple_of(R, 4)
        K = tl.multiple_of(K, 4)

    tensor = 3 * layer + part
    slots_a = tl.cdiv(K, PIECE)
    slots_b = tl.cdiv(N, SLAB)
    length = tl.where(part == 0, K, tl.where(part == 1, 1, N))
    begin = tl.where(part == 0, triplet * K + position, position * R + triplet)
    slot = tl.where(part == 0, position // PIECE, slots_a + tl.where(part == 1, 0, 1 + position // SLAB))
    offset = first + tl.where(part == 0, 0, R * K) + tl.where(part == 2, R, 0) + begin
    param = advanced(tl.load(words_ptr + tensor), begin)
    grad = tl.load(words_ptr + 3 * layers + tensor)
    has_grad = grad != 0
    if HANDED_OVER:
        known = tl.load(words_ptr + 6 * layers + tensor) != 0
        as_seen = is_as_seen(grad, known, probes_ptr + tensor * PROBES, part, R, K, N, PROBES)
        tl.store(redone_ptr + tensor, (known & ~as_seen).to(tl.int32))
    else:
        as_seen: tl.constexpr = False  # type: ignore[no-redef]
    grad = advanced(grad, begin)
    moments = None
    averages = None
    constants = None
    sum_ptr = None
    if ADAMW:
        moments = (_at(moments_ptr, offset, ALIGNED), _at(moments_ptr, elements + offset, ALIGNED))
        scale = tl.load(scale_ptr).to(tl.float32)
        t = tl.load(steps_ptr + tensor).to(tl.float64) + 1.0
        constants = (scale, adamw_constants(settings_ptr, tl.load(groups_ptr + tensor), t))
    if IMPORTANCE:
        half = tl.load(half_ptr).to(tl.int64)
        old, new = half * 2 * elements + offset, (1 - half) * 2 * elements + offset
        averages = (
            _at(state_ptr, old, ALIGNED),
            _at(state_ptr, old + elements, ALIGNED),
            _at(state_ptr, new, ALIGNED),
            _at(state_ptr, new + elements, ALIGNED),
        )
        sums_ptr += first_sum
        sum_ptr = sums_ptr + slot * R + triplet
    smoothing = (beta1, rest1, beta2, rest2)
    triplets = (R - triplet).to(tl.int32)
    left = (length - position).to(tl.int32)
    if ALIGNED:
        triplets = tl.multiple_of(triplets, 4)
    if as_seen:
        slot_of_part = tl.where(part == 0, 0, tl.cdiv(K, POSITIONS) + tl.where(part == 1, 0, 1))
        left_ptr = left_sums_ptr + tl.load(layer_ptr + 9) + (slot_of_part + position // POSITIONS) * R + triplet
        slots = tl.cdiv(left, POSITIONS)
        if part == 0:
            take_sums(
                left_ptr, min(slots, PIECE // POSITIONS), R, triplets, sum_ptr, workspace_ptr + 1,
                PIECE // POSITIONS, A_ROWS,
            )  # fmt: skip
        else:
            take_sums(
                left_ptr, min(slots, SLAB // POSITIONS), R, triplets, sum_ptr, workspace_ptr + 1,
                SLAB // POSITIONS, BLOCK_R,
            )  # fmt: skip
    elif part == 0:
        positions = min(left, PIECE)
        if ALIGNED:
            positions = tl.multiple_of(positions, 4)
        _sweep_item(
            param, grad, has_grad, triplets, positions, K.to(tl.int32), 1, sum_ptr, workspace_ptr + 1, moments,
            averages, constants, smoothing, 1, A_ROWS, A_COLUMNS, ADAMW, IMPORTANCE, PRE_STEP, ALIGNED,
        )  # fmt: skip
    else:
        _sweep_item(
            param, grad, has_grad, triplets, min(left, SLAB), 1, R.to(tl.int32), sum_ptr, workspace_ptr + 1, moments,
            averages, constants, smoothing, 0, BLOCK_R, B_ROWS, ADAMW, IMPORTANCE, PRE_STEP, ALIGNED,
        )  # fmt: skip

    if arrives_last(workspace_ptr + 2 + layer, items_of_layer):
        if ADAMW:
            _count_step(words_ptr + 3 * (layers + layer), steps_ptr + 3 * layer, R)
        if IMPORTANCE:
            inverse_k = tl.load(layer_ptr + 7).to(tl.float64, bitcast=True)
            inverse_n = tl.load(layer_ptr + 8).to(tl.float64, bitcast=True)
            score(sums_ptr, pending_ptr + first_triplet, R, inverse_k, inverse_n, slots_a, slots_b, BLOCK_R)
        if arrives_last(workspace_ptr, layers):
            if IMPORTANCE:
                commit(workspace_ptr + 1, half_ptr, scores_ptr, pending_ptr, total_rank, taken_ptr)
            else:
                tl.store(taken_ptr, True)


def sweep(
    layout: TripletLayout,
    params: list[int],
    grads: list[int],
    device: torch.device,
    importance: Importance | None,
    optimizer: Optimizer | None,
    handed_over: tuple[Handover, list[bool]] | None = None,
) -> Tensor:
    """Launch it over checked tensors.

    Args:
        layout: where everything lies.
        params, grads: the words of the 3n parameters and gradients.
        device: of all of them.
        importance: what to update of the averages, all fp32; None for nothing.
        optimizer: of AdamW; None for importance alone.
        handed_over: what backwards have left, and of which gradients it is as far as the host knows; with importance
            alone.

    Returns:
        bool [1]: whether every new s was finite, that is, whether the averages' update was taken.
    """
    items = items_of(layout, device)
    layers = len(layout.shapes)
    settings = None if optimizer is None else optimizer.settings
    left, known = ((None, None, None), []) if handed_over is None else handed_over
    numbers = params + grads + [int(k) for k in known]
    if isinstance(settings, list):
        words = on_device(("sweep", layout), numbers + settings, device)
        settings = words[len(numbers) :]
    else:
        words = on_device(("sweep", layout, bool(known)), numbers, device)
        settings = None if settings is None else settings.view(torch.int64)
    state, half, scores, beta1, beta2, pre_step = importance or (None, None, None, 0.0, 0.0, False)
    moments, steps, groups, scale = (None,) * 4 if optimizer is None else optimizer[:4]
    sums = pending = None
    if importance is not None:
        sums = torch.empty(items.sum_count, dtype=torch.float32, device=device)
        pending = torch.empty(layout.total_rank, dtype=torch.float32, device=device)
    taken = torch.empty(1, dtype=torch.bool, device=device)
    addresses = [t.data_ptr() for t in (state, moments) if t is not None]
    fours = items.fours and are_aligned([*params, *grads, *addresses])
    tile = _TILE[fours]
    launch(
        _sweep_kernel,
        (items.item_count,),
        items.layers,
        items.items,
        words,
        settings,
        moments,
        steps,
        groups,
        scale,
        state,
        half,
        scores,
        pending,
        sums,
        taken,
        workspace(device, 1 + layers),
        *left,
        layout.total_elements,
        layout.total_rank,
        layers,
        float(beta1),
        1.0 - beta1,
        float(beta2),
        1.0 - beta2,
        ADAMW=optimizer is not None,
        IMPORTANCE=importance is not None,
        PRE_STEP=bool(pre_step),
        HANDED_OVER=handed_over is not None,
        ALIGNED=fours,
        A_ROWS=A_ROWS,
        A_COLUMNS=tile // A_ROWS,
        PIECE=items.piece,
        BLOCK_R=items.block_r,
        B_ROWS=tile // items.block_r,
        SLAB=items.slab,
        POSITIONS=POSITIONS,
        PROBES=PROBES,
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=False,
        maxnreg=128,
    )
    return taken


__all__ = ["Optimizer", "sweep"]
