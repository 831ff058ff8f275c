"""Offsets of matrices whose rows and columns lie far apart, compiled ahead of time: no GPU is needed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from adalora_kernels.backends.triton.backward import split  # noqa: E402
from adalora_kernels.backends.triton.forward import delta, one_pass, published, shrink_tail  # noqa: E402
from adalora_kernels.backends.triton.forward.group import shrink_stack  # noqa: E402
from adalora_kernels.backends.triton.stack import stacks  # noqa: E402
from adalora_kernels.backends.triton.tiles import Family  # noqa: E402
from adalora_kernels.reference.svd_linear import Adapter  # noqa: E402
from tests.backends.triton.compiling import compile_launch, recorded_launches  # noqa: E402

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
