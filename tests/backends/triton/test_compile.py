"""Every configuration of the table ``tiles``, compiled ahead of time for each device family: no GPU is needed.

The widest case is taken: the largest rank of each entry, fp32 adapters, mask, bias, dropout. Held: no spills, no stack,
shared memory within the family's limit, matrix instructions of the family's own kind for 16-bit products.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from adalora_kernels.backends.triton import tiles  # noqa: E402
from adalora_kernels.backends.triton.backward import blas, split  # noqa: E402
from adalora_kernels.backends.triton.forward import delta, one_pass  # noqa: E402
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

M, N, K = 4096, 4096, 4096  # multiples of 16, as at run time: the wide loads are what is to fit


def launch_of(
    configuration: Configuration,
    monkeypatch: pytest.MonkeyPatch,
    adapter_dtype: torch.dtype = torch.float32,
    dropout_p: float = 0.1,
) -> Launch:
    """What the launchers launch of a configuration's kernel at its largest rank; meta tensors stand for the data."""
    monkeypatch.setattr(tiles, "device_family", lambda device: configuration.family)
    kernel, rank = configuration.kernel, configuration.max_rank
    compute = torch.float32 if configuration.width is Width.SINGLE else torch.bfloat16
    operand = torch.bfloat16 if configuration.width is Width.HALF else torch.float32

    def empty(*shape: int, dtype: torch.dtype = operand) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight, y = empty(M, K), empty(N, K), empty(M, N)
    lora_A, lora_E, lora_B = (empty(*shape, dtype=adapter_dtype) for shape in ((rank, K), (rank, 1), (N, rank)))
    seed = empty(1, dtype=torch.int64) if dropout_p else None
    adapter = Adapter(lora_A, lora_E, lora_B, empty(rank), seed, 1.0, dropout_p, compute)
    with recorded_launches() as launches:
        if kernel == "delta":
            delta.forward(x, None, None, y, adapter)
        elif kernel == "one_pass":
            one_pass.forward(x, weight, empty(N), None, adapter)
        else:
            u = empty(M, tiles.rank_padding(rank), dtype=compute)
            needs = {"v": (False, True, False, False), "t": (False, False, False, True)}.get(kernel, (True,) * 4)
            (blas if kernel == "x" else split).backward(y, x, u, weight, adapter, needs)
    suffix = kernel if kernel in ("one_pass", "delta") else f"backward_{kernel}"
    return next(launch for launch in launches if launch.name == f"svd_linear_{suffix}_kernel")


def shipped() -> list[Configuration]:
    """The table, and the finishing kernel, which is the same everywhere, once per family."""
    finish = [Configuration("finish", f, Width.SINGLE, tiles.MAX_RANK, tiles.FINISH_TILE) for f in Family]
    return [*tiles.configurations(), *finish]


def name_of(configuration: Configuration) -> str:
    """Test id, such as hopper-forward-half-r64."""
    c = configuration
    return f"{c.family.value}-{c.kernel}-{c.width.value}-r{c.max_rank}"


def cases() -> list[Any]:
    """Each configuration with dropout; on the FMA units also without, which takes no fewer registers."""
    found = [pytest.param(c, 0.1, id=name_of(c)) for c in shipped()]
    on_fma = [c for c in shipped() if c.width is Width.SINGLE and c.kernel in ("one_pass", "delta", "x")]
    return found + [pytest.param(c, 0.0, id=f"{name_of(c)}-no-dropout") for c in on_fma]


@pytest.mark.parametrize(("configuration", "dropout_p"), cases())
def test_configuration_compiles_within_its_limits(
    configuration: Configuration, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, tile = configuration.family, configuration.tile
    launch = launch_of(configuration, monkeypatch, dropout_p=dropout_p)
    assert (launch.options["num_warps"], launch.options["num_stages"]) == (tile.num_warps, tile.num_stages)
    found = resources_of(compile_launch(launch, family))
    assert_within_limits(found, family, matrix_instructions=configuration.width is not Width.SINGLE)


@pytest.mark.parametrize("rank", [32, 64, 128])
def test_hopper_keeps_products_in_flight(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 16-bit adapters and no dropout, products of one step of the K loop still run while the next are issued."""
    configuration = next(
        c
        for c in tiles.configurations()
        if (c.kernel, c.family, c.width, c.max_rank) == ("one_pass", Family.HOPPER, Width.HALF, rank)
    )
    launch = launch_of(configuration, monkeypatch, adapter_dtype=torch.bfloat16, dropout_p=0.0)
    assert products_in_flight(resources_of(compile_launch(launch, Family.HOPPER))) >= 1
