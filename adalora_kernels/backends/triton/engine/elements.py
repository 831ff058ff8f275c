"""The arithmetic of the sweep over all adapters, element by element (csrc/common/adamw.h, csrc/common/importance.h).

    m ← m + (1-β₁)(g - m),  v ← β₂ v + (1-β₂) g²,  θ ← (1 - lr wd) θ - lr/(1-β₁ᵗ) · m / (√v/√(1-β₂ᵗ) + ε)
    I = |θ g|,  Ī ← β₁ Ī + (1-β₁) I,  Ū ← β₂ Ū + (1-β₂) |I - Ī|,  s = Ī Ū

Divisions and roots are rounded to the nearest and nothing is contracted, as on the CPU.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from adalora_kernels.backends.triton.engine.operands import as_stored, read, write

_SETTINGS = tl.constexpr(5)  # lr, weight decay, β₁, β₂, ε


@triton.jit
def adamw_constants(settings_ptr, group, t):
    """What all elements of a parameter share in its t-th step, in fp64 and then fp32, as csrc/common/adamw.h has it."""
    row_ptr = settings_ptr + group * _SETTINGS
    lr = tl.load(row_ptr).to(tl.float64, bitcast=True)
    decay = tl.load(row_ptr + 1).to(tl.float64, bitcast=True)
    beta1 = tl.load(row_ptr + 2).to(tl.float64, bitcast=True)
    beta2 = tl.load(row_ptr + 3).to(tl.float64, bitcast=True)
    eps = tl.load(row_ptr + 4).to(tl.float64, bitcast=True)
    step_size = lr / (1.0 - tl.exp(tl.log(beta1) * t))
    root = tl.sqrt(1.0 - tl.exp(tl.log(beta2) * t))
    keep = 1.0 - lr * decay
    return (
        keep.to(tl.float32),
        (1.0 - beta1).to(tl.float32),
        beta2.to(tl.float32),
        (1.0 - beta2).to(tl.float32),
        step_size.to(tl.float32),
        root.to(tl.float32),
        eps.to(tl.float32),
    )


@triton.jit
def _adamw(theta, g, moment_ptrs, square_ptrs, mask, constants):
    """Step both moments; returns the new θ."""
    keep, rest1, beta2, rest2, step_size, root, eps = constants
    moment = tl.load(moment_ptrs, mask=mask, other=0.0)
    square = tl.load(square_ptrs, mask=mask, other=0.0)
    moment += rest1 * (g - moment)
    square = beta2 * square + rest2 * g * g
    tl.store(moment_ptrs, moment, mask=mask)
    tl.store(square_ptrs, square, mask=mask)
    denominator = tl.div_rn(tl.sqrt_rn(square), tl.zeros_like(square) + root) + eps
    return theta * keep - step_size * tl.div_rn(moment, denominator)


@triton.jit
def averaged(theta, g, average, uncertainty, smoothing):
    """The new Ī and Ū."""
    beta1, rest1, beta2, rest2 = smoothing
    sensitivity = tl.abs(theta * g)
    average = beta1 * average + rest1 * sensitivity
    return average, beta2 * uncertainty + rest2 * tl.abs(sensitivity - average)


@triton.jit
def update(
    param,
    grad,
    at,
    inside,
    given,
    moments,
    averages,
    constants,
    smoothing,
    ADAMW: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    PRE_STEP: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Update the elements ``at`` of one parameter; returns their s, 0 where not ``inside``.

    ``given``: inside, and there is a gradient. ``moments``: pointers to the first and the second. ``averages``: to Ī
    and Ū, then to the new ones.
    """
    theta = read(param, at, given, ALIGNED)
    g = read(grad, at, given, ALIGNED)
    s = tl.zeros_like(g)
    if ADAMW:
        scale, shared = constants
        moment_ptr, square_ptr = moments
        g *= scale
        after = _adamw(theta, g, moment_ptr + at, square_ptr + at, given, shared)
        write(param, at, after, given, ALIGNED)
        if not PRE_STEP:
            theta = as_stored(param, after)
    if IMPORTANCE:
        average_ptr, uncertainty_ptr, new_average_ptr, new_uncertainty_ptr = averages
        average = tl.load(average_ptr + at, mask=inside, other=0.0)
        uncertainty = tl.load(uncertainty_ptr + at, mask=inside, other=0.0)
        new_average, new_uncertainty = averaged(theta, g, average, uncertainty, smoothing)
        average = tl.where(given, new_average, average)
        uncertainty = tl.where(given, new_uncertainty, uncertainty)
        tl.store(new_average_ptr + at, average, mask=inside)
        tl.store(new_uncertainty_ptr + at, uncertainty, mask=inside)
        s = average * uncertainty
    return s


__all__ = ["adamw_constants", "averaged", "update"]
