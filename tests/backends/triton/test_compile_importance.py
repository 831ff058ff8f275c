"""Importance inside the last stage of a backward, and the launch that takes it over, compiled ahead of time.

Held: no spills, no stack, no matrix units, shared memory within the family's limit, importance not contracted.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from adalora_kernels.backends.triton.backward import slab_sums  # noqa: E402
from adalora_kernels.backends.triton.engine import importance  # noqa: E402
from adalora_kernels.backends.triton.tiles import Family, rank_padding  # noqa: E402
from adalora_kernels.reference.handover import PROBES, Handover, LayerImportance, slots_of, sum_offsets  # noqa: E402
from adalora_kernels.reference.importance import OrthogonalityShare, TripletLayout  # noqa: E402
from adalora_kernels.reference.svd_linear import Adapter  # noqa: E402
from tests.backends.triton.compiling import (  # noqa: E402
    Launch,
    assert_within_limits,
    compile_launch,
    recorded_launches,
    resources_of,
)

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set in this process")

EVEN, RAGGED, WIDE = (16, 4096, 4096), (13, 99, 99), (128, 4096, 4096)  # R, K, N
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16


def meta(*shape: int, dtype: torch.dtype = FLOAT32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def last_stage(shape: tuple[int, int, int], dtype: torch.dtype, accumulating: bool, term: bool) -> Launch:
    """What finishes a layer's gradients, with importance, mask and eight slabs."""
    r, k, n = shape
    layout = TripletLayout((shape,))
    params = [meta(r, k, dtype=dtype), meta(r, 1, dtype=dtype), meta(n, r, dtype=dtype)]
    share = OrthogonalityShare(meta(2 * r * r), 0, r * r, meta()) if term else None
    update = LayerImportance(
        meta(2, 2, layout.total_elements), meta(1, dtype=torch.int32), 0, params if accumulating else [None] * 3,
        share, meta(slots_of(layout)[0], r), meta(3, PROBES), 0.85, 0.85,
    )  # fmt: skip
    adapter = Adapter(params[0], params[1], params[2], meta(r), None, 1.0, 0.0, BFLOAT16)
    shares = [meta(8, length, rank_padding(r)) for length in (n, k)]
    with recorded_launches() as launches:
        slab_sums.finish(shares[0], shares[1], adapter, (True,) * 4, update)
    (launch,) = launches
    assert update.done and launch.options["IMPORTANCE"]
    return launch


def before_the_step(shape: tuple[int, int, int]) -> Launch:
    """The launch that takes over what the last stages left."""
    r, k, n = shape
    layout = TripletLayout((shape,))
    params = [meta(r, k), meta(r, 1), meta(n, r)]
    left = Handover(meta(sum_offsets(layout)[-1]), meta(3, PROBES), meta(3, dtype=torch.int32))
    state = meta(2, 2, layout.total_elements), meta(1, dtype=torch.int32), meta(r), 0.85, 0.85
    with recorded_launches() as launches:
        importance.importance_update(layout, params, params, *state, (left, [True] * 3))
    (launch,) = launches
    assert launch.options["HANDED_OVER"]
    return launch


# On every family what takes most registers at a rank's tile, on Hopper other dtypes and features too.
CASES = {
    "r13": (RAGGED, FLOAT32, True, True),
    "r63": ((63, 99, 99), FLOAT32, True, True),
    "r127-fp16": ((127, 99, 99), FLOAT16, True, True),
}
MORE_CASES = {
    "r1": ((1, 99, 1), FLOAT32, True, True),
    "r16": (EVEN, FLOAT32, False, False),
    "r13-accumulating-bf16": (RAGGED, BFLOAT16, True, False),
    "r16-term-bf16": (EVEN, BFLOAT16, False, True),
    "r32": ((32, 99, 99), FLOAT32, True, True),
    "r128": (WIDE, FLOAT32, True, False),
}


@pytest.mark.parametrize(
    ("case", "family"),
    [
        pytest.param(case, family, id=f"{family.value}-{name}")
        for family in Family
        for name, case in (CASES | MORE_CASES if family is Family.HOPPER else CASES).items()
    ],
)
def test_last_stage_compiles_within_its_limits(
    case: tuple[tuple[int, int, int], torch.dtype, bool, bool], family: Family
) -> None:
    found = resources_of(compile_launch(last_stage(*case), family))
    assert_within_limits(found, family, matrix_instructions=False)
    _, _, _, term = case
    assert term or not re.search(r"\bfma\.rn\.f32", found.ptx), "importance rounds otherwise than in the launch"


@pytest.mark.parametrize(
    ("shape", "family"), [(EVEN, Family.HOPPER), (RAGGED, Family.AMPERE), (RAGGED, Family.BLACKWELL)]
)
def test_launch_before_the_step_compiles_within_its_limits(shape: tuple[int, int, int], family: Family) -> None:
    found = resources_of(compile_launch(before_the_step(shape), family))
    assert_within_limits(found, family, matrix_instructions=False)
    assert not re.search(r"\bfma\.rn\.f32", found.ptx)
    assert bool(re.search(r"ld\.global\.v4\.b32", found.ptx)) == (shape is EVEN)
