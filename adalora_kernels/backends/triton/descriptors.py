"""Which matrices can be moved in tiles by the tensor memory accelerator, through descriptors made on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from adalora_kernels.backends.triton import tiles


def has_descriptors(device: torch.device) -> bool:
    """Whether the device has the accelerator: capability 9.0 and up, with a table of its own."""
    return tiles.device_family(device) is not tiles.Family.AMPERE


def describable(matrix: Tensor) -> bool:
    """Whether a descriptor can address a matrix: fewer than 2³¹ contiguous rows, apart, at multiples of 16 bytes."""
    return (
        matrix.stride(1) == 1
        and matrix.stride(0) >= matrix.shape[1] > 0
        and matrix.stride(0) * matrix.itemsize % 16 == 0
        and matrix.data_ptr() % 16 == 0
        and matrix.shape[0] >> 31 == 0
    )


__all__ = ["describable", "has_descriptors"]
