"""What the choice of a plan may depend on: the ``Problem`` of one call of the layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adalora_kernels.backends.triton import tiles
from adalora_kernels.backends.triton.tiles import Family, Width
from adalora_kernels.reference.svd_linear import Adapter


class Problem(NamedTuple):
    """One call of the layer, as far as a choice may depend on it.

    Attributes:
        tokens: M, rounded up to a power of two, so that a choice serves a range of M.
        in_features, out_features, rank: K, N, R.
        x_dtype, adapter_dtype, compute_dtype: of x, of lora_A, and of the products.
        weight_dtype: of W; None where a base's output is added to instead.
        transposed: whether W lies as [K, N].
        dropout: whether any element of x may be dropped.
        need_x: whether the gradient of x is asked for; no forward depends on it.
        family: of the device.
        capability: of the device; None on the CPU.
        programs: as many as it has multiprocessors.
    """

    tokens: int
    in_features: int
    out_features: int
    rank: int
    x_dtype: torch.dtype
    weight_dtype: torch.dtype | None
    adapter_dtype: torch.dtype
    compute_dtype: torch.dtype
    transposed: bool
    dropout: bool
    need_x: bool
    family: Family
    capability: tuple[int, int] | None = None
    programs: int = 4

    @property
    def width(self) -> Width:
        """How wide the main loops' loads are; TypeError where the products are of no dtype that they have."""
        operands = (self.x_dtype,) if self.weight_dtype is None else (self.x_dtype, self.weight_dtype)
        return tiles.width_of(self.compute_dtype, *operands)

    @property
    def aligned(self) -> bool:
        """Whether, contiguous, x, W and y are 16-bit matrices with rows of whole 16 bytes."""
        sixteen_bits = self.x_dtype == self.weight_dtype == self.compute_dtype and self.compute_dtype.itemsize == 2
        return sixteen_bits and self.in_features % 8 == 0 and self.out_features % 8 == 0

    @property
    def describable(self) -> bool:
        """Whether the device has tensor descriptors and, contiguous, x, W and y can go through them."""
        return self.aligned and self.family is not Family.AMPERE


def problem_of(x: Tensor, weight: Tensor | None, adapter: Adapter, need_x: bool = True) -> Problem:
    """The problem of a call with these tensors, as a launcher gets them (``reference.svd_linear``)."""
    m, k = x.shape
    n, r = adapter.lora_B.shape
    transposed = weight is not None and weight.stride(1) != 1
    return Problem(
        1 << (m - 1).bit_length() if m else 0,
        k,
        n,
        r,
        x.dtype,
        None if weight is None else weight.dtype,
        adapter.lora_A.dtype,
        adapter.compute_dtype,
        transposed,
        adapter.seed is not None,
        need_x,
        tiles.device_family(x.device),
        tiles.capability_of(x.device),
        tiles.multiprocessors(x.device),
    )


__all__ = ["Problem", "problem_of"]
