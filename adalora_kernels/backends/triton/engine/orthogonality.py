"""The orthogonality regulariser over all matrices: value and slopes in one launch, all gradients in another.

With C = A Aᵀ - I (Bᵀ B - I):

    forward   γ' Σ ‖C‖_F, with slopes D = γ' (2/‖C‖_F) C; or squared: γ' Σ ‖C‖_F², with D = 4 γ' C
    backward  dA = D A (dB = B D), times the gradient of the value

The forward reads each matrix once and leaves R² numbers of it; the backward reads it again and writes the gradient, or
adds it to one that is there. A program takes a piece of a matrix's length. In the forward the last program of a matrix
adds up what its pieces left, the last of all the matrices' values, each in a fixed order: bitwise repeatable.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adalora_kernels.backends.triton.engine.operands import advanced, read, write
from adalora_kernels.backends.triton.engine.pieces import BLOCK, ITEM_ROW, MATRIX_ROW, PIECE, Pieces, pieces_of
from adalora_kernels.backends.triton.engine.tables import Words, are_aligned, check, describe, on_device, words_of
from adalora_kernels.backends.triton.launch import launch
from adalora_kernels.backends.triton.products import product
from adalora_kernels.backends.triton.tickets import arrives_last, workspace

# By the padded rank: positions at a time in the forward and in the backward, warps. FMA units hold whole operands in
# registers, so that the inner extents of the products are short.
_TILES = {16: (32, 128, 4), 32: (16, 64, 4), 64: (16, 64, 8), 128: (16, 32, 8)}
_FLAT = tl.constexpr(1024)  # entries of a Gram matrix at a time where it is finished
_INNER = tl.constexpr(16)  # triplets at a time in the backward
_MATRIX_ROW = tl.constexpr(MATRIX_ROW)
_ITEM_ROW = tl.constexpr(ITEM_ROW)


@triton.jit
def _gram(
    word,
    i,
    j,
    R,
    length,
    positions,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A Aᵀ (Bᵀ B) of the triplets i and j over so many positions, [BLOCK, BLOCK]."""
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, positions, CHUNK):
        k = start + tl.arange(0, CHUNK)
        if COLUMNS:
            inside = (k < positions)[:, None]
            left = read(word, k[:, None] * R + i[None, :], inside & (i < R)[None, :], ALIGNED)
            right = read(word, k[:, None] * R + j[None, :], inside & (j < R)[None, :], ALIGNED)
            total = product(tl.trans(left), right, total)
        else:
            inside = (k < positions)[None, :]
            left = read(word, i[:, None] * length + k[None, :], (i < R)[:, None] & inside, ALIGNED)
            right = read(word, j[:, None] * length + k[None, :], (j < R)[:, None] & inside, ALIGNED)
            total = product(left, tl.trans(right), total)
    return total


@triton.jit
def _finish(shares_ptr, slopes_ptr, value_ptr, R, pieces, factor, SQUARED: tl.constexpr):
    """Value and slopes of a matrix, from its shares [pieces, R, R]."""
    f = tl.arange(0, _FLAT)
    size = R * R
    squares = tl.zeros((_FLAT,), tl.float32)
    for first in range(0, size, _FLAT):
        at = first + f
        deviation = tl.where(at % (R + 1) == 0, -1.0, tl.zeros((_FLAT,), tl.float32))
        for piece in range(0, pieces):
            deviation += tl.load(shares_ptr + piece * size + at, mask=at < size, other=0.0)
        squares += tl.where(at < size, deviation * deviation, 0.0)
        tl.store(slopes_ptr + at, deviation, mask=at < size)
    total = tl.sum(squares, axis=0)
    norm = tl.sqrt_rn(total)
    if SQUARED:
        slope = 4.0 * factor
        tl.store(value_ptr, factor * total)
    else:
        slope = tl.where(norm > 0.0, tl.div_rn(2.0 * factor, tl.where(norm > 0.0, norm, 1.0)), 0.0)
        tl.store(value_ptr, factor * norm)
    tl.debug_barrier()  # what is read again may have been stored by another thread
    for first_again in range(0, size, _FLAT):
        again = first_again + f
        tl.store(slopes_ptr + again, slope * tl.load(slopes_ptr + again, mask=again < size), mask=again < size)


@triton.jit
def _orthogonality_kernel(
    matrices_ptr,
    items_ptr,
    words_ptr,
    slopes_ptr,
    shares_ptr,
    values_ptr,
    value_ptr,
    workspace_ptr,
    matrices,
    factor,
    SQUARED: tl.constexpr,
    ALIGNED: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """``workspace``: the ticket of all matrices, then one of each. ``shares``: for each matrix [pieces, R, R]."""
    item_ptr = items_ptr + tl.program_id(0) * _ITEM_ROW
    matrix = tl.load(item_ptr)
    position = tl.load(item_ptr + 1)
    row_ptr = matrices_ptr + matrix * _MATRIX_ROW
    R = tl.load(row_ptr).to(tl.int32)
    length = tl.load(row_ptr + 1).to(tl.int32)
    is_b = tl.load(row_ptr + 2)
    slopes_ptr += tl.load(row_ptr + 3)
    shares_ptr += tl.load(row_ptr + 4)
    pieces = tl.load(row_ptr + 5)
    blocks = tl.load(row_ptr + 6)
    word = tl.load(words_ptr + matrix)
    rows = tl.load(item_ptr + 2).to(tl.int32) + tl.arange(0, BLOCK)
    cols = tl.load(item_ptr + 3).to(tl.int32) + tl.arange(0, BLOCK)
    positions = min(length - position.to(tl.int32), PIECE)
    if ALIGNED:
        R = tl.multiple_of(R, 4)
    if is_b == 1:
        gram = _gram(advanced(word, position * R), rows, cols, R, length, positions, True, BLOCK, CHUNK, ALIGNED)
    else:
        if ALIGNED:
            length = tl.multiple_of(length, 4)
            positions = tl.multiple_of(positions, 4)
        gram = _gram(advanced(word, position), rows, cols, R, length, positions, False, BLOCK, CHUNK, ALIGNED)

    share_ptr = shares_ptr + position // PIECE * R * R
    tl.store(share_ptr + rows[:, None] * R + cols[None, :], gram, mask=(rows < R)[:, None] & (cols < R)[None, :])
    if arrives_last(workspace_ptr + 1 + matrix, blocks):
        _finish(shares_ptr, slopes_ptr, values_ptr + matrix, R, pieces, factor, SQUARED)
        if arrives_last(workspace_ptr, matrices):
            m = tl.arange(0, 1024)
            values = tl.zeros((1024,), tl.float64)
            for first in range(0, matrices, 1024):
                values += tl.load(values_ptr + first + m, mask=first + m < matrices, other=0.0).to(tl.float64)
            tl.store(value_ptr, tl.sum(values, axis=0).to(tl.float32))


@triton.jit
def _gradient(
    word,
    grad,
    slopes_ptr,
    scale,
    R,
    length,
    positions,
    ADD: tl.constexpr,
    COLUMNS: tl.constexpr,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Write D A (B D) at so many positions, or add it."""
    i = tl.arange(0, P)
    for start in range(0, positions, CHUNK):
        k = start + tl.arange(0, CHUNK)
        gradient = tl.zeros((CHUNK, P) if COLUMNS else (P, CHUNK), tl.float32)
        for first in range(0, R, _INNER):
            j = first + tl.arange(0, _INNER)
            if COLUMNS:
                tile = read(word, k[:, None] * R + j[None, :], (k < positions)[:, None] & (j < R)[None, :], ALIGNED)
                at = j[:, None] * R + i[None, :]
                slopes = tl.load(slopes_ptr + at, mask=(j < R)[:, None] & (i < R)[None, :], other=0.0)
                gradient = product(tile, slopes * scale, gradient)
            else:
                tile = read(
                    word, j[:, None] * length + k[None, :], (j < R)[:, None] & (k < positions)[None, :], ALIGNED
                )
                at = i[:, None] * R + j[None, :]
                slopes = tl.load(slopes_ptr + at, mask=(i < R)[:, None] & (j < R)[None, :], other=0.0)
                gradient = product(slopes * scale, tile, gradient)
        if COLUMNS:
            at = k[:, None] * R + i[None, :]
            inside = (k < positions)[:, None] & (i < R)[None, :]
        else:
            at = i[:, None] * length + k[None, :]
            inside = (i < R)[:, None] & (k < positions)[None, :]
        if ADD:
            gradient += read(grad, at, inside, ALIGNED)
        write(grad, at, gradient, inside, ALIGNED)


@triton.jit
def _orthogonality_gradients_kernel(
    matrices_ptr,
    items_ptr,
    words_ptr,
    slopes_ptr,
    scale_ptr,
    matrices,
    ADD: tl.constexpr,
    ALIGNED: tl.constexpr,
    PIECE: tl.constexpr,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """``words``: of all matrices, then of all gradients."""
    item_ptr = items_ptr + tl.program_id(0) * _ITEM_ROW
    matrix = tl.load(item_ptr)
    position = tl.load(item_ptr + 1)
    row_ptr = matrices_ptr + matrix * _MATRIX_ROW
    R = tl.load(row_ptr).to(tl.int32)
    length = tl.load(row_ptr + 1).to(tl.int32)
    is_b = tl.load(row_ptr + 2)
    slopes_ptr += tl.load(row_ptr + 3)
    word = tl.load(words_ptr + matrix)
    grad = tl.load(words_ptr + matrices + matrix)
    positions = min(length - position.to(tl.int32), PIECE)
    scale = tl.load(scale_ptr).to(tl.float32)
    if ALIGNED:
        R = tl.multiple_of(R, 4)
    if is_b == 1:
        begin = position * R
        _gradient(
            advanced(word, begin), advanced(grad, begin), slopes_ptr, scale, R, length, positions,
            ADD, True, P, CHUNK, ALIGNED,
        )  # fmt: skip
    else:
        if ALIGNED:
            length = tl.multiple_of(length, 4)
            positions = tl.multiple_of(positions, 4)
        _gradient(
            advanced(word, position), advanced(grad, position), slopes_ptr, scale, R, length, positions,
            ADD, False, P, CHUNK, ALIGNED,
        )  # fmt: skip


def orthogonality(
    lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], weight: float, squared: bool
) -> tuple[Tensor, Tensor]:
    """Value and slopes of the regulariser over all matrices; see ``reference.orthogonality.orthogonality``.

    Bitwise repeatable. Matrices that aren't contiguous are copied.

    Raises:
        ValueError: no matrices, matrices that are not 2-d or on several devices, or ranks beyond 128.
        TypeError: where a dtype is none that the kernel reads.
    """
    matrices, pieces, device = _read_matrices(lora_A, lora_B)
    value = torch.empty((), dtype=torch.float32, device=device)
    slopes, shares, values = (
        torch.empty(count, dtype=torch.float32, device=device)
        for count in (pieces.slope_count, pieces.share_count, pieces.matrix_count)
    )
    launch(
        _orthogonality_kernel,
        (pieces.block_count,),
        pieces.matrices,
        pieces.blocks,
        on_device(("orthogonality", pieces.matrices.data_ptr()), matrices.words, device),
        slopes,
        shares,
        values,
        value,
        workspace(device, pieces.matrix_count),
        pieces.matrix_count,
        float(weight if squared else weight / pieces.matrix_count),
        SQUARED=squared,
        **_options(pieces, matrices.words, False),
        BLOCK=min(pieces.padded_rank, BLOCK),
    )
    del matrices
    return value, slopes


def orthogonality_gradients(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    slopes: Tensor,
    scale: Tensor,
    grads: Sequence[Tensor],
    add: bool,
) -> None:
    """The gradients of all matrices, written or added; see ``reference.orthogonality.orthogonality_gradients``.

    Raises:
        ValueError: a gradient is not contiguous, or of another shape or device than its matrix.
        TypeError: where a dtype is none that the kernel reads.
    """
    matrices, pieces, device = _read_matrices(lora_A, lora_B)
    check("slopes", slopes, torch.float32, pieces.slope_count, device)
    if scale.numel() != 1 or scale.device != device:
        raise ValueError(f"scale: expected one element on {device}, got {describe(scale)}")
    targets = words_of("grads", grads, matrices.sizes, device)
    if any(held is not grad for held, grad in zip(targets.held, grads, strict=True)):
        raise ValueError("grads: expected contiguous tensors")
    words = matrices.words + targets.words
    launch(
        _orthogonality_gradients_kernel,
        (pieces.piece_count,),
        pieces.matrices,
        pieces.pieces,
        on_device(("orthogonality_gradients", pieces.matrices.data_ptr()), words, device),
        slopes,
        scale,
        pieces.matrix_count,
        ADD=add,
        P=pieces.padded_rank,
        **_options(pieces, words, True),
    )
    del matrices


def _read_matrices(lora_A: Sequence[Tensor], lora_B: Sequence[Tensor]) -> tuple[Words, Pieces, torch.device]:
    """Their words, and how they are cut."""
    matrices = [*lora_A, *lora_B]
    if not matrices:
        raise ValueError("lora_A, lora_B: expected at least one matrix, got none")
    flat = [m for m in matrices if m.dim() != 2]
    if flat:
        raise ValueError(f"lora_A, lora_B: expected 2-d matrices, got {describe(flat[0])}")
    device = matrices[0].device
    found = words_of("lora_A, lora_B", matrices, None, device)
    return found, pieces_of(found.sizes, len(lora_A), device), device


def _options(pieces: Pieces, words: list[int], backward: bool) -> dict[str, Any]:
    *chunks, warps = _TILES[pieces.padded_rank]
    return {
        "ALIGNED": pieces.fours and are_aligned(words),
        "PIECE": PIECE,
        "CHUNK": chunks[backward],
        "num_warps": warps,
        "num_stages": 1,
        "enable_fp_fusion": True,
        "maxnreg": 240,
    }


__all__ = ["orthogonality", "orthogonality_gradients"]
