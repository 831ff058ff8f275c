"""What configurations serve besides their widest calls, compiled ahead of time: no GPU is needed.

Held beside the limits: that a launch which may begin under the one before it waits for it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from adalora_kernels.backends.triton.configurations import Configuration  # noqa: E402
from adalora_kernels.backends.triton.forward import shrink_tail  # noqa: E402
from adalora_kernels.backends.triton.tiles import Family, Width  # noqa: E402
from tests.backends.triton.compiling import (  # noqa: E402
    Resources,
    assert_within_limits,
    compile_launch,
    products_in_flight,
    resources_of,
)
from tests.backends.triton.launches import HALF_ADAPTERS, RAGGED, Call, launch_of, table  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set in this process")

AMPERE, HOPPER = Family.AMPERE, Family.HOPPER


def compiled(c: Configuration, call: Call) -> tuple[dict[str, Any], Resources]:
    """The options of a launch, and what became of it; it holds the limits."""
    launch = launch_of(c, call)
    found = resources_of(compile_launch(launch, c.family))
    assert_within_limits(found, c.family, c.width is not Width.SINGLE)
    return launch.options, found


def test_product_with_u_beside_it() -> None:
    """Through pointers; Hopper's and Blackwell's tiles of rank 32 do it through descriptors (``test_compile``)."""
    options, _ = compiled(table(AMPERE, "gemm")[0], replace(HALF_ADAPTERS, rank=32))
    assert options["U"] == "beside" and not options["DESCRIPTORS"]


@pytest.mark.parametrize("kernel", ["one_gemm", "dx"])
def test_slabs_of_one_row_block(kernel: str) -> None:
    """With few tokens; on Hopper products run on while the next are issued."""
    options, found = compiled(table(HOPPER, kernel)[0], replace(HALF_ADAPTERS, tokens=1 << 10))
    assert options["DESCRIPTORS"] and options["ONE_BLOCK_SLABS"]
    assert products_in_flight(found) >= 1


@pytest.mark.parametrize("width", [Width.HALF, Width.SINGLE])
@pytest.mark.parametrize("family", Family)
def test_product_after_a_launch_that_makes_u(family: Family, width: Width) -> None:
    """W is [K, N] here; where launches can overlap this one waits for u, and otherwise not at all."""
    options, found = compiled(table(family, "gemm", width)[0], Call(transposed=True, plan=shrink_tail))
    assert options["U"] == "given" and not options["K_CONTIGUOUS"]
    overlaps = family is not AMPERE
    assert options["launch_pdl"] is options["DEPENDENT"] is overlaps
    assert ("griddepcontrol.wait" in found.ptx) is overlaps


@pytest.mark.parametrize("family", [AMPERE, HOPPER])
def test_shrink_lets_the_next_launch_begin(family: Family) -> None:
    """Where launches can overlap."""
    _, found = compiled(table(family, "shrink")[0], HALF_ADAPTERS)
    assert ("griddepcontrol.launch_dependents" in found.ptx) is (family is HOPPER)


@pytest.mark.parametrize("kernel", ["one_pass", "one_gemm", "dx", "x"])
@pytest.mark.parametrize("family", Family)
def test_rows_that_are_no_whole_16_bytes(family: Family, kernel: str) -> None:
    """Loads of single elements take the tiles of wider operands."""
    for configuration in table(family, kernel, Width.MIXED):
        options, _ = compiled(configuration, Call(features=RAGGED))
        assert not options.get("DESCRIPTORS")
