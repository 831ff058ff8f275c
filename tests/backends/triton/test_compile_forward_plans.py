"""Every configuration of ``forward.configurations``, compiled ahead of time for each device family: no GPU is needed.

The widest case is taken: the largest rank of each entry, fp32 adapters, mask, bias and dropout; what an entry serves
besides is tried with the first of its kind. Held: no spills, no stack, shared memory within the family's limit, matrix
instructions of the family's own kind for 16-bit products.
"""

from __future__ import annotations

from collections import Counter
from types import ModuleType
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from adalora_kernels.backends.triton import tiles  # noqa: E402
from adalora_kernels.backends.triton.forward import blas, configurations, published, shrink_tail  # noqa: E402
from adalora_kernels.backends.triton.tiles import Configuration, Family, Width  # noqa: E402
from adalora_kernels.reference.svd_linear import Adapter  # noqa: E402
from tests.backends.triton.compiling import (  # noqa: E402
    Launch,
    assert_within_limits,
    compile_launch,
    products_in_flight,
    recorded_launches,
    resources_of,
)

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set in this process")

PLANS = {"gemm": published, "shrink": shrink_tail, "low_rank": blas}
REGULAR, RAGGED = 4096, 4097  # rows at multiples of 16 bytes, and not: then loads are narrow and take more registers
RANK_BESIDE = 32


def launch_of(
    configuration: Configuration,
    plan: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    rank: int | None = None,
    adapter_dtype: torch.dtype = torch.float32,
    dropout_p: float = 0.1,
    transposed: bool = False,
) -> Launch:
    """What a plan launches of a configuration's kernel; meta tensors stand for the data."""
    monkeypatch.setattr(tiles, "device_family", lambda device: configuration.family)
    lookup = configurations.lookup

    def forced(kernel: str, *args: Any) -> tiles.Tile:
        return configuration.tile if kernel == configuration.kernel else lookup(kernel, *args)

    monkeypatch.setattr(configurations, "lookup", forced)
    rank = rank or configuration.max_rank
    compute = torch.float32 if configuration.width is Width.SINGLE else torch.bfloat16
    size = RAGGED if configuration.width is Width.MIXED else REGULAR

    def empty(*shape: int, dtype: torch.dtype = compute) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weight = empty(size, size).t() if transposed else empty(size, size)
    lora_A, lora_E, lora_B = (empty(*shape, dtype=adapter_dtype) for shape in ((rank, size), (rank, 1), (size, rank)))
    seed = empty(1, dtype=torch.int64) if dropout_p else None
    adapter = Adapter(lora_A, lora_E, lora_B, empty(rank), seed, 1.0, dropout_p, compute)
    with recorded_launches() as launches:
        plan.forward(empty(size, size), weight, empty(size), None, adapter)
    return next(launch for launch in launches if launch.name == f"svd_linear_{configuration.kernel}_kernel")


def name_of(configuration: Configuration) -> str:
    """Test id, such as hopper-gemm-half-r32."""
    c = configuration
    return f"{c.family.value}-{c.kernel}-{c.width.value}-r{c.max_rank}"


def first_of_each_family(kernel: str, *widths: Width) -> list[Configuration]:
    """The entry for the lowest ranks, for each family and width."""
    found = {(c.family, c.width): c for c in reversed([*configurations.configurations()]) if c.kernel == kernel}
    return [c for (_, width), c in found.items() if width in widths]


@pytest.mark.parametrize("configuration", list(configurations.configurations()), ids=name_of)
def test_configuration_compiles_within_its_limits(
    configuration: Configuration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``published`` makes u ahead of the product here."""
    family, tile, width = configuration.family, configuration.tile, configuration.width
    launch = launch_of(configuration, PLANS[configuration.kernel], monkeypatch)
    assert (launch.options["num_warps"], launch.options["num_stages"]) == (tile.num_warps, tile.num_stages)
    if configuration.kernel == "gemm":
        assert launch.options["U"] == "ahead"
        assert launch.options["DESCRIPTORS"] is (width is Width.HALF and family is not Family.AMPERE)
    assert_within_limits(resources_of(compile_launch(launch, family)), family, width is not Width.SINGLE)


@pytest.mark.parametrize("configuration", first_of_each_family("gemm", Width.HALF), ids=name_of)
def test_product_with_u_beside_it(configuration: Configuration, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 16-bit adapters and no dropout, products of one step over K still run while the next are issued."""
    family = configuration.family
    launch = launch_of(configuration, published, monkeypatch, RANK_BESIDE, torch.bfloat16, dropout_p=0.0)
    assert launch.options["U"] == "beside"
    found = resources_of(compile_launch(launch, family))
    assert_within_limits(found, family)
    if family is Family.HOPPER:
        assert products_in_flight(found) >= 1


@pytest.mark.parametrize("configuration", first_of_each_family("gemm", Width.HALF, Width.SINGLE), ids=name_of)
def test_product_after_a_launch_that_makes_u(configuration: Configuration, monkeypatch: pytest.MonkeyPatch) -> None:
    """W is [K, N] here; where launches can overlap this one waits for u, and otherwise not at all."""
    family = configuration.family
    launch = launch_of(configuration, shrink_tail, monkeypatch, transposed=True)
    assert launch.options["U"] == "given" and not launch.options["K_CONTIGUOUS"]
    overlaps = family is not Family.AMPERE
    assert launch.options["launch_pdl"] is launch.options["DEPENDENT"] is overlaps
    found = resources_of(compile_launch(launch, family))
    assert_within_limits(found, family, configuration.width is not Width.SINGLE)
    assert ("griddepcontrol.wait" in found.ptx) is overlaps


@pytest.mark.parametrize("family", Family)
def test_shrink_lets_the_next_launch_begin(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    configuration = next(c for c in first_of_each_family("shrink", Width.HALF) if c.family is family)
    found = resources_of(compile_launch(launch_of(configuration, shrink_tail, monkeypatch), family))
    assert ("griddepcontrol.launch_dependents" in found.ptx) is (family is not Family.AMPERE)


def test_at_most_six_configurations_per_kernel_and_family() -> None:
    counts = Counter((c.family, c.kernel) for c in configurations.configurations())
    assert counts and max(counts.values()) <= 6


@pytest.mark.parametrize("family", Family)
def test_every_rank_has_a_tile(family: Family) -> None:
    for kernel, widths in {"gemm": Width, "shrink": Width, "low_rank": (Width.HALF, Width.SINGLE)}.items():
        for width in widths:
            for rank in (0, 1, 16, 33, tiles.MAX_RANK):
                assert configurations.lookup(kernel, family, width, rank)
            with pytest.raises(ValueError, match="lora_A: expected a rank of at most 128, got 129"):
                configurations.lookup(kernel, family, width, 129)


def test_shape_decides_between_tiles() -> None:
    """The large tile where it fills whole waves, a smaller one where it would leave most of the last wave idle."""

    def blocks(m: int, n: int) -> tuple[int, int]:
        tile = configurations.lookup("gemm", Family.HOPPER, Width.HALF, 16, m, n, 132)
        return tile.block_m, tile.block_n

    assert blocks(8192, 4096) == (128, 256)
    assert blocks(8192, 768) == (128, 128)
    assert blocks(1024, 768) == (64, 128)
