"""The budget engine's kernels, compiled ahead of time for each device family: no GPU is needed.

Held: no spills, no stack, shared memory within the family's limit, loads in fours where the shapes allow it.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from adalora_kernels.backends.triton.engine import adamw, allocation, importance, norm, orthogonality  # noqa: E402
from adalora_kernels.backends.triton.tiles import Family  # noqa: E402
from adalora_kernels.reference.adamw import Importance  # noqa: E402
from adalora_kernels.reference.importance import TripletLayout  # noqa: E402
from tests.backends.triton.compiling import (  # noqa: E402
    Launch,
    Resources,
    assert_within_limits,
    compile_launch,
    recorded_launches,
    resources_of,
)

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set in this process")

# (R, K, N): loaded in fours or not, at the ranks that choose the tiles.
EVEN, RAGGED, WIDE, WIDE_RAGGED = (16, 4096, 4096), (13, 99, 99), (128, 4096, 4096), (127, 99, 99)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_of(op: str, shape: tuple[int, int, int]) -> Launch:
    """What the launcher launches for one layer of that shape; meta tensors stand for the data."""
    r, k, n = shape
    layout = TripletLayout((shape,))
    params = [meta(r, k), meta(r, 1), meta(n, r)]
    averages = Importance(
        meta(2, 2, layout.total_elements), meta(1, dtype=torch.int32), meta(r), 0.85, 0.85, op == "adamw pre_step"
    )
    with recorded_launches() as launches:
        if op == "importance":
            importance.importance_update(layout, params, params, *averages[:5])
        elif op.startswith("adamw"):
            adamw.adamw_update(
                layout, params, params, meta(2, layout.total_elements), meta(3), meta(3, dtype=torch.int64),
                torch.zeros(1, 5, dtype=torch.float64), meta(1, dtype=torch.float64),
                None if op == "adamw alone" else averages,
            )  # fmt: skip
        elif op == "norm":
            norm.total_norm(params)
        elif op == "orthogonality":
            orthogonality.orthogonality(params[:1], params[2:], 0.1, False)
        elif op == "gradients":
            slopes = meta(2 * r * r)
            orthogonality.orthogonality_gradients(params[:1], params[2:], slopes, meta(), params[::2], True)
        elif op == "mask":
            enabled = meta(1, dtype=torch.bool)
            allocation.mask_to_budget(meta(r), params[1:2], r // 2, meta(r, dtype=torch.bool), enabled)
        else:
            allocation.zero_pruned(meta(r, dtype=torch.bool), params[1:2])
    (launch,) = launches
    return launch


def compiled(op: str, shape: tuple[int, int, int], family: Family) -> Resources:
    return resources_of(compile_launch(launch_of(op, shape), family))


# On every family what takes most registers, on Hopper all that is launched.
CASES = [
    *((op, RAGGED) for op in ("importance", "adamw post_step", "mask")),
    *((op, shape) for op in ("orthogonality", "gradients") for shape in ((63, 99, 99), WIDE_RAGGED)),
]
MORE_CASES = [
    *((op, shape) for op in ("importance", "adamw post_step") for shape in (EVEN, WIDE)),
    *((op, shape) for op in ("adamw pre_step", "adamw alone", "norm") for shape in (EVEN, RAGGED)),
    *((op, shape) for op in ("orthogonality", "gradients") for shape in (EVEN, (31, 99, 99), WIDE)),
    ("zero", RAGGED),
]


@pytest.mark.parametrize(
    ("op", "shape", "family"),
    [
        pytest.param(op, shape, family, id=f"{family.value}-{op}-r{shape[0]}")
        for family in Family
        for op, shape in (CASES + MORE_CASES if family is Family.HOPPER else CASES)
    ],
)
def test_compiles_within_its_limits(op: str, shape: tuple[int, int, int], family: Family) -> None:
    found = compiled(op, shape, family)
    assert_within_limits(found, family, matrix_instructions=False)
    if op in ("importance", "adamw post_step", "orthogonality", "gradients"):
        assert bool(re.search(r"ld\.global\.v4\.b32", found.ptx)) == (shape[0] % 4 == 0)


@pytest.mark.parametrize("op", ["importance", "adamw post_step"])
def test_nothing_is_contracted(op: str) -> None:
    """Products are rounded before they are added, as on the CPU; divisions and roots are rounded to the nearest."""
    ptx = compiled(op, EVEN, Family.HOPPER).ptx
    assert not re.search(r"\bfma\.rn\.f32", ptx) and not re.search(r"\b(div|sqrt)\.(full|approx)", ptx)
    assert op == "importance" or ("div.rn.f32" in ptx and "sqrt.rn.f32" in ptx)
