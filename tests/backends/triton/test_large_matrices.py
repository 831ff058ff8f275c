"""Large matrices: rows and columns far apart, and more of them than fit 32 bits; compiled, so no GPU is needed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from adalora_kernels.backends.triton.backward import one_gemm, split  # noqa: E402
from adalora_kernels.backends.triton.forward import blas, delta, one_pass, published, shrink_tail  # noqa: E402
from adalora_kernels.backends.triton.forward.group import shrink_stack  # noqa: E402
from adalora_kernels.backends.triton.stack import stacks  # noqa: E402
from adalora_kernels.backends.triton.tiles import Family  # noqa: E402
from adalora_kernels.reference.svd_linear import Adapter  # noqa: E402
from tests.backends.triton.compiling import compile_launch, recorded_launches  # noqa: E402
from tests.backends.triton.launches import on  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set in this process")

M, N, K, R = 4096, 512, 256, 16


def far(rows: int, columns: int) -> Tensor:
    """A matrix with both strides above 1, which are therefore arguments and no constants."""
    return torch.empty_strided((rows, columns), (1 << 24, 32), dtype=torch.bfloat16, device="meta")


ADAPTER = Adapter(far(R, K), far(R, 1), far(N, R), None, None, 1.0, 0.0, torch.bfloat16)
X, G, U, W = far(M, K), far(M, N), far(M, R), far(N, K)
CALLS: dict[str, Callable[[], Any]] = {
    "one_pass": lambda: one_pass.forward(X, W, None, None, ADAPTER),
    "gemm": lambda: published.forward(X, W, None, None, ADAPTER),
    "shrink": lambda: shrink_tail.forward(X, W, None, None, ADAPTER),
    "delta": lambda: delta.forward(X, None, None, G, ADAPTER),
    "group_shrink": lambda: shrink_stack(X, [ADAPTER.lora_A], stacks({0: ADAPTER})[0], torch.bfloat16, False),
    "backward_v": lambda: split.backward(G, X, U, W, ADAPTER, (False, True, False, False)),
    "backward_t": lambda: split.backward(G, X, U, W, ADAPTER, (False, False, False, True)),
    "backward_x": lambda: split.backward(G, X, U, None, ADAPTER, (True, True, True, True)),
    "backward_gemm": lambda: split.backward(G, X, U, W, ADAPTER, (True, True, True, True)),
}


@pytest.mark.parametrize("kernel", CALLS)
def test_no_stride_meets_a_block_in_32_bits(kernel: str) -> None:
    """128 rows at 2²⁴ elements are 2³¹: the g of a slice in time of 4096 steps by 4096 features."""
    with recorded_launches() as launches:
        CALLS[kernel]()
    launch = next(launch for launch in launches if launch.name == f"svd_linear_{kernel}_kernel")
    ttir = compile_launch(launch, Family.AMPERE).asm["ttir"]
    assert "%stride_" in ttir
    assert re.findall(r".*arith\.muli .*%stride_\w+.* : i32\b.*", ttir) == []


@pytest.mark.parametrize("plan", [published, shrink_tail, one_gemm, split])
def test_more_tokens_than_a_descriptor_counts(plan: Any) -> None:
    """Its coordinates are of 32 bits: then the product goes through pointers, and compiles."""

    def made(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    tokens = 1 << 31
    x, g, u, w = made(tokens, 64), made(tokens, 64), made(tokens, R), made(64, 64)
    adapter = Adapter(made(R, 64), made(R, 1), made(64, R), None, None, 1.0, 0.0, torch.bfloat16)
    with on(Family.HOPPER), recorded_launches() as launches:
        if plan in (published, shrink_tail):
            plan.forward(x, w, None, None, adapter)
        else:
            plan.backward(g, x, u, w, adapter, (True, True, True, True))
    launch = next(launch for launch in launches if launch.name.endswith("gemm_kernel"))
    assert launch.options["DESCRIPTORS"] is False
    assert "%M: i64" in compile_launch(launch, Family.HOPPER).asm["ttir"]


def test_columns_are_not_an_axis_of_the_grid() -> None:
    """An axis but the first has 65,535 blocks at most; fp32 tiles of the low-rank term have 32 columns."""
    n = 1 << 22
    adapter = ADAPTER._replace(lora_B=torch.empty(n, R, device="meta"), compute_dtype=torch.float32)
    with recorded_launches() as launches:
        blas.forward(X, torch.empty(n, K, device="meta"), None, None, adapter)
    launch = next(launch for launch in launches if "low_rank" in launch.name)
    assert launch.options["BLOCK_N"] * 65_535 < n and len(launch.grid) == 1
