"""Every configuration of ``backward.configurations``, compiled ahead of time for each device family: no GPU is needed.

The widest case is taken: the largest rank of each entry, fp32 adapters, mask, slabs of several row blocks, and dropout
where no other entry is for it. Held: no spills, no stack, shared memory within the family's limit, matrix
instructions of the family's own kind for 16-bit products.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

triton = pytest.importorskip("triton")

from adalora_kernels.backends.triton import tiles  # noqa: E402
from adalora_kernels.backends.triton.backward import configurations, one_gemm, split  # noqa: E402
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

MANY, FEW = 1 << 18, 1 << 10  # tokens; with few, a slab is one row block
KERNELS = {"one_gemm": "gemm", "one_gemm_slim": "gemm", "dx": "gemm", "dx_slim": "gemm", "g": "t", "sum_v": "sum_v"}


def launch_of(
    configuration: Configuration,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int = MANY,
    adapter_dtype: torch.dtype = torch.float32,
    features: int = 4096,
) -> Launch:
    """What the plans launch of a configuration's kernel at its largest rank; meta tensors stand for the data."""
    monkeypatch.setattr(tiles, "device_family", lambda device: configuration.family)
    name, rank, width = configuration.kernel, configuration.max_rank, configuration.width
    compute = torch.float32 if width is Width.SINGLE else torch.bfloat16
    operand = torch.float32 if width is not Width.HALF and features % 8 == 0 else torch.bfloat16
    N = K = features
    slim_elsewhere = (f"{name}_slim", width) in {(c.kernel, c.width) for c in of_family(configuration.family)}
    dropout_p = 0.0 if slim_elsewhere else 0.1

    def empty(*shape: int, dtype: torch.dtype = operand) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    lora_A, lora_E, lora_B = (empty(*shape, dtype=adapter_dtype) for shape in ((rank, K), (rank, 1), (N, rank)))
    seed = empty(1, dtype=torch.int64) if dropout_p else None
    adapter = Adapter(lora_A, lora_E, lora_B, empty(rank), seed, 1.0, dropout_p, compute)
    x, u, grad_y = empty(tokens, K), empty(tokens, tiles.rank_padding(rank), dtype=compute), empty(tokens, N)
    plan = one_gemm if name.startswith("one_gemm") else split
    with recorded_launches() as launches:
        plan.backward(grad_y, x, u, empty(N, K), adapter, (True, True, True, True))
    return next(launch for launch in launches if launch.name == f"svd_linear_backward_{KERNELS[name]}_kernel")


def of_family(family: Family) -> list[Configuration]:
    return [c for c in configurations.configurations() if c.family is family]


def shipped() -> list[Configuration]:
    """The table, and the second stage of v, which is the same everywhere, once per family."""
    sums = [Configuration("sum_v", f, Width.HALF, configurations.largest_rank("g"), tiles.FINISH_TILE) for f in Family]
    return [*configurations.configurations(), *sums]


def name_of(configuration: Configuration) -> str:
    """Test id, such as hopper-one_gemm-half-r16."""
    c = configuration
    return f"{c.family.value}-{c.kernel}-{c.width.value}-r{c.max_rank}"


def hopper(kernel: str, rank: int) -> Configuration:
    return next(c for c in of_family(Family.HOPPER) if (c.kernel, c.width, c.max_rank) == (kernel, Width.HALF, rank))


@pytest.mark.parametrize("configuration", shipped(), ids=name_of)
def test_configuration_compiles_within_its_limits(
    configuration: Configuration, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = configuration.tile
    launch = launch_of(configuration, monkeypatch)
    assert (launch.options["num_warps"], launch.options["num_stages"]) == (tile.num_warps, tile.num_stages)
    multiplies = configuration.width is not Width.SINGLE and configuration.kernel != "sum_v"
    found = resources_of(compile_launch(launch, configuration.family))
    assert_within_limits(found, configuration.family, multiplies)


@pytest.mark.parametrize(("kernel", "rank"), [("one_gemm", 16), ("dx", 64)])
def test_hopper_keeps_products_in_flight(kernel: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 16-bit adapters and no dropout, products of one step of the loop over N run while the next are issued."""
    launch = launch_of(hopper(kernel, rank), monkeypatch, FEW, torch.bfloat16)
    assert launch.options["DESCRIPTORS"] and launch.options.get("ONE_BLOCK_SLABS")
    found = resources_of(compile_launch(launch, Family.HOPPER))
    assert_within_limits(found, Family.HOPPER)
    assert products_in_flight(found) >= 1


@pytest.mark.parametrize("kernel", ["one_gemm", "dx"])
@pytest.mark.parametrize("family", Family)
def test_rows_that_are_no_whole_16_bytes(family: Family, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads of single elements take the tile of wider operands."""
    widest = [c for c in of_family(family) if (c.kernel, c.width) == (kernel, Width.MIXED)][-1]
    launch = launch_of(widest, monkeypatch, features=4093)
    assert launch.options["BLOCK_M"] == widest.tile.block_m and not launch.options["DESCRIPTORS"]
    assert_within_limits(resources_of(compile_launch(launch, family)), family)


def test_at_most_six_configurations_per_kernel_and_family() -> None:
    counts = Counter((c.family, c.kernel.removesuffix("_slim")) for c in configurations.configurations())
    assert counts and max(counts.values()) <= 6
