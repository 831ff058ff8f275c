"""The kernels of layers that read the same x, compiled ahead of time for each device family: no GPU is needed.

The widest case of each tile is taken: a full stack, fp32 adapters, a buffer of partial sums, dx and dA at once. Held as
in ``test_compile``; and that 16-bit v and x are loaded 16 bytes at a time, whoever owns the columns.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from adalora_kernels.backends.triton import group, tiles  # noqa: E402
from adalora_kernels.backends.triton.forward import configurations  # noqa: E402
from adalora_kernels.backends.triton.tiles import Configuration, Family, Width  # noqa: E402
from adalora_kernels.reference.svd_linear import Adapter  # noqa: E402
from adalora_kernels.reference.svd_linear_group import Member  # noqa: E402
from tests.backends.triton.compiling import (  # noqa: E402
    Launch,
    assert_within_limits,
    compile_launch,
    recorded_launches,
    resources_of,
)

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set in this process")

FEATURES, MANY, FEW = 1024, 1 << 16, 1 << 8
KERNELS = {"shrink": "svd_linear_group_shrink_kernel", "x": "svd_linear_group_backward_x_kernel"}


def entries() -> list[Configuration]:
    """The tiles that the kernels take."""
    found = [c for c in configurations.configurations() if c.kernel == "shrink"]
    return found + [c for c in tiles.configurations() if c.kernel == "x"]


def launch_of(
    c: Configuration,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int = FEW,
    adapter_dtype: torch.dtype = torch.float32,
) -> Launch:
    """What a group of layers launches that fills the stack of an entry; meta tensors stand for the data."""
    monkeypatch.setattr(tiles, "device_family", lambda device: c.family)
    for pays in ("_forward_pays", "_backward_pays"):
        monkeypatch.setattr(group, pays, lambda problems, passes, plan: True)
    compute = torch.float32 if c.width is Width.SINGLE else torch.bfloat16
    operand = torch.bfloat16 if c.width is Width.HALF else torch.float32

    def empty(*shape: int, dtype: torch.dtype = operand) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    members = []
    width = min(32, c.max_rank // 2)
    for rank in [width] * (c.max_rank // width):
        shapes = ((rank, FEATURES), (rank, 1), (FEATURES, rank))
        factors = [empty(*shape, dtype=adapter_dtype) for shape in shapes]
        adapter = Adapter(*factors, None, None, 1.0, 0.0, compute)
        members.append(Member(empty(FEATURES, FEATURES), None, adapter))
    x = empty(tokens, FEATURES)
    with recorded_launches() as launches:
        us = [u for _, u in group.forward(x, members)]
        grads: list[Any] = [empty(tokens, FEATURES)] * len(members)
        group.backward(grads, x, us, members, True, [(True, True, True)] * len(members))
    (found,) = [launch for launch in launches if launch.name == KERNELS[c.kernel]]
    return found


def name_of(c: Configuration) -> str:
    """Test id, such as hopper-x-half-r64."""
    return f"{c.family.value}-{c.kernel}-{c.width.value}-r{c.max_rank}"


@pytest.mark.parametrize("configuration", entries(), ids=name_of)
def test_stack_compiles_within_the_limits_of_its_tile(
    configuration: Configuration, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, tile = configuration.family, configuration.tile
    launch = launch_of(configuration, monkeypatch)
    options = launch.options
    assert (options["BLOCK_M"], options["BLOCK_K"], options["BLOCK_R"]) == (
        tile.block_m,
        tile.block_k,
        configuration.max_rank,
    )
    found = resources_of(compile_launch(launch, family))
    assert_within_limits(found, family, matrix_instructions=configuration.width is not Width.SINGLE)


@pytest.mark.parametrize("kernel", KERNELS)
def test_loads_are_wide(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper with 16-bit adapters: nothing is loaded in less than 16 bytes."""
    entry = next(c for c in entries() if (c.kernel, c.family, c.width) == (kernel, Family.HOPPER, Width.HALF))
    found = resources_of(compile_launch(launch_of(entry, monkeypatch, MANY, torch.bfloat16), Family.HOPPER))
    assert_within_limits(found, Family.HOPPER)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[\w.:]* \[[^]]*\], \[[^]]*\], (0x\w+|\d+)", found.ptx)
    loads = re.findall(r"ld\.global[\w.:]*?\.(v\d\.)?b(\d+)", found.ptx)
    assert copies or loads
    assert {int(size, 0) for size in copies} <= {16}, copies
    assert {int(count[1:-1] or 1) * int(bits) if count else int(bits) for count, bits in loads} <= {128}, loads
