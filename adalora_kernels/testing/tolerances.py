"""The error budget, in one place.

A result may be at most twice as far from the fp64 result as the plain PyTorch expression of the same dtype is, plus one
rounding of the result's dtype. Loosening it needs a written cause here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(name: str, actual: Tensor, same_dtype: Tensor, exact: Tensor) -> None:
    """Hold ``actual`` to the error budget.

    Args:
        name: what is compared, for the message.
        actual: the result under test.
        same_dtype: the plain PyTorch expression on the same inputs in the same dtype.
        exact: the same in fp64.

    Raises:
        AssertionError: where shapes or dtypes differ, a value is not finite, or the budget is exceeded.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == same_dtype.dtype, f"{name}: dtype {actual.dtype}, expected {same_dtype.dtype}"
    if exact.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    exact = exact.detach().to(torch.float64)
    error = (actual.detach().to(torch.float64) - exact).abs().max().item()
    allowance = (same_dtype.detach().to(torch.float64) - exact).abs().max().item()
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    assert error <= 2 * allowance + rounding, (
        f"{name}: error {error:.3e} exceeds 2 x {allowance:.3e} (same dtype) + {rounding:.3e} (rounding)"
    )


__all__ = ["assert_within_budget"]
