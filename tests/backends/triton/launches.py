"""What the launchers launch of each configuration; meta tensors stand for the data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from adalora_kernels.backends.triton import group, measured, tiles
from adalora_kernels.backends.triton.backward import blas as backward_blas
from adalora_kernels.backends.triton.backward import one_gemm, split
from adalora_kernels.backends.triton.configurations import Configuration, configurations
from adalora_kernels.backends.triton.forward import blas, delta, one_pass, published, shrink_tail
from adalora_kernels.backends.triton.tiles import Family, Width
from adalora_kernels.reference.svd_linear import Adapter
from adalora_kernels.reference.svd_linear_group import Member
from tests.backends.triton.compiling import Launch, recorded_launches

BF16, FP32 = torch.bfloat16, torch.float32
RAGGED = 4093  # rows that are no whole 16 bytes: then loads are narrow and take more registers
FORWARD: dict[str, Any] = {
    "one_pass": one_pass, "gemm": published, "shrink": shrink_tail, "low_rank": blas, "delta": delta
}  # fmt: skip
BACKWARD: dict[str, Any] = {"one_gemm": one_gemm, "x": backward_blas}  # the others' is split
BACKWARD_KERNELS = {"one_gemm": "gemm", "dx": "gemm", "g": "t"}
NEEDS = {"v": (False, True, False, False), "t": (False, False, False, True)}
ALL = (True, True, True, True)
PRODUCTS = ("one_gemm", "dx")  # whose slabs are of several row blocks where there are many tokens
MANY = 1 << 18


@dataclass(frozen=True)
class Call:
    """A layer's call in which a configuration is launched, the widest unless said otherwise.

    Attributes:
        rank: of the layer, or of the stack; None: the largest that the configuration serves.
        adapter: dtype of A and B.
        dropout: None: unless the configuration isn't for it.
        tokens: M.
        features: K and N; None: as they come, ragged where that is what makes loads narrow.
        transposed: W is [K, N].
        plan: a module that launches the kernel, in place of the usual one.
    """

    rank: int | None = None
    adapter: torch.dtype = FP32
    dropout: bool | None = None
    tokens: int | None = None
    features: int | None = None
    transposed: bool = False
    plan: Any = None


WIDEST = Call()
HALF_ADAPTERS = Call(adapter=BF16, dropout=False)


def launch_of(c: Configuration, call: Call = WIDEST) -> Launch:
    """What is launched of a configuration's kernel."""
    with on(c.family), measured.trial(c.kernel, astuple(c.tile)), recorded_launches() as launches:
        if c.kernel.startswith("group_"):
            name = c.kernel.replace("group_x", "group_backward_x")
            _run_group(c, call)
        else:
            name = c.kernel if c.kernel in FORWARD else f"backward_{BACKWARD_KERNELS.get(c.kernel, c.kernel)}"
            _run_layer(c, call)
    return next(launch for launch in launches if launch.name == f"svd_linear_{name}_kernel")


@contextmanager
def on(family: Family) -> Iterator[None]:
    """Every device is of this family, and what can be stacked is."""
    always = {"_forward_pays": lambda *_: True, "_backward_pays": lambda *_: True}
    with patch.object(tiles, "device_family", lambda device: family), patch.multiple(group, **always):
        yield


def name_of(c: Configuration) -> str:
    """Test id, such as hopper-gemm-half-r32."""
    about = {None: "", True: "-dropout", False: "-no-dropout"}[c.dropout]
    where = "" if c.capability is None else f"-measured-{c.capability[0]}.{c.capability[1]}"
    return f"{c.family.value}-{c.kernel}-{c.width.value}-r{c.max_rank}{about}{where}"


def table(family: Family, kernel: str, width: Width = Width.HALF) -> list[Configuration]:
    """The table's entries, for calls without dropout, in order of rank."""
    found = [c for c in configurations() if c.capability is None and c.dropout is not True]
    return [c for c in found if (c.family, c.kernel, c.width) == (family, kernel, width)]


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _dtypes(c: Configuration) -> tuple[torch.dtype, torch.dtype]:
    """Of the products, and of x, W and g."""
    compute = FP32 if c.width is Width.SINGLE else BF16
    return compute, BF16 if c.width is Width.HALF else FP32


def _run_layer(c: Configuration, call: Call) -> None:
    compute, operand = _dtypes(c)
    features, rank = call.features or 4096, call.rank or c.max_rank
    if c.width is Width.MIXED and c.kernel in ("gemm", "shrink"):
        features = call.features or RAGGED
    if features == RAGGED and c.width is Width.MIXED:
        operand = BF16
    M = call.tokens or (MANY if c.kernel in PRODUCTS else features)
    made = partial(_empty, dtype=operand)
    dropout = c.dropout is not False if call.dropout is None else call.dropout
    factors = _empty(rank, features, dtype=call.adapter), _empty(rank, 1, dtype=FP32)
    seed = _empty(1, dtype=torch.int64) if dropout else None
    lora_B = _empty(features, rank, dtype=call.adapter)
    mask = _empty(rank, dtype=FP32)
    adapter = Adapter(*factors, lora_B, mask, seed, 1.0, 0.1 if dropout else 0.0, compute)
    x, y, weight = made(M, features), made(M, features), made(features, features)
    weight = weight.t() if call.transposed else weight
    if c.kernel == "delta":
        delta.forward(x, None, None, y, adapter)
    elif c.kernel in FORWARD:
        plan = call.plan or FORWARD[c.kernel]
        plan.forward(x, weight, _empty(features, dtype=FP32), None, adapter)
    else:
        u = _empty(M, tiles.rank_padding(rank), dtype=compute)
        plan = call.plan or BACKWARD.get(c.kernel, split)
        plan.backward(y, x, u, weight, adapter, NEEDS.get(c.kernel, ALL))


def _run_group(c: Configuration, call: Call) -> None:
    """Layers that fill the stack; up to 64 tokens K is cut into slices."""
    compute, operand = _dtypes(c)
    features, tokens = 1024, call.tokens or 1 << 8
    if c.width is Width.MIXED and c.kernel == "group_shrink":
        features, operand = 1021, BF16
    total = call.rank or c.max_rank
    width = min(32, total // 2)
    members = []
    for rank in [width] * (total // width):
        shapes = ((rank, features), (rank, 1), (features, rank))
        factors = [_empty(*shape, dtype=call.adapter) for shape in shapes]
        adapter = Adapter(*factors, None, None, 1.0, 0.0, compute)
        members.append(Member(_empty(features, features, dtype=operand), None, adapter))
    x = _empty(tokens, features, dtype=operand)
    us = [u for _, u in group.forward(x, members)]
    grads: list[Any] = [_empty(tokens, features, dtype=operand)] * len(members)
    group.backward(grads, x, us, members, True, [ALL[1:]] * len(members))
