"""What ``explain`` says of layers that read the same x: their plan, why, and the tiles that are launched."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from adalora_kernels.backends.triton import group, tiles
from adalora_kernels.backends.triton.plans import NO_TILES
from adalora_kernels.backends.triton.tiles import Family
from adalora_kernels.reference.svd_linear import Adapter
from adalora_kernels.reference.svd_linear_group import Member
from tests.backends.triton.compiling import Launch, recorded_launches

BF16, FP32 = torch.bfloat16, torch.float32
NEEDS = (True, True, True)
SIZES = ("BLOCK_M", "BLOCK_N", "BLOCK_K")


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def members(ranks: tuple[int, ...], *, k: int = 768, dropout_p: float = 0.0, dtype: torch.dtype = BF16) -> list[Member]:
    found = []
    for rank, n in zip(ranks, (768, 256, 512), strict=False):
        seed = empty(1, dtype=torch.int64) if dropout_p else None
        factors = empty(rank, k, dtype=FP32), empty(rank, 1, dtype=FP32), empty(n, rank, dtype=FP32)
        found.append(Member(empty(n, k, dtype=dtype), None, Adapter(*factors, None, seed, 1.0, dropout_p, dtype)))
    return found


def launched(x: torch.Tensor, layers: list[Member], plan: str | None) -> list[Launch]:
    with recorded_launches() as launches:
        us = [u for _, u in group.forward(x, layers, plan)]
        grads: Any = [empty(x.shape[0], layer.weight.shape[0], dtype=x.dtype) for layer in layers]
        group.backward(grads, x, us, layers, True, [NEEDS] * len(layers), plan)
    return launches


def said_of(launch: Launch) -> tuple[int, ...]:
    """Sizes of a tile's sides that there are, and warps."""
    sides = (launch.options[size] for size in SIZES if size in launch.options)
    return (*sides, launch.options["num_warps"])


def numbers(configuration: str) -> list[tuple[int, ...]]:
    """As ``said_of``, of each kernel in the words of ``explain``."""
    found = re.findall(r"(?:^|; )\w+ ([\d×]+), (\d+) warps", configuration)
    assert len(found) == configuration.count(";") + 1, configuration
    return [(*map(int, sides.split("×")), int(warps)) for sides, warps in found]


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("ranks", [(16, 16, 16), (8, 0, 33), (64, 64), (0, 0)], ids=str)
@pytest.mark.parametrize("plan", ["shrink_tail/blas", "one_pass/split", "/blas", "blas", None])
def test_tiles_are_those_that_are_launched(
    family: Family, ranks: tuple[int, ...], plan: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "device_family", lambda _: family)
    x, layers = empty(2048, 768), members(ranks)
    _, configuration, _ = group.explain(x, layers, plan=plan)
    made = [
        launch for launch in launched(x, layers, plan) if not launch.name.endswith(("finish_kernel", "sum_v_kernel"))
    ]
    if configuration == NO_TILES:
        assert not made
    else:
        assert set(numbers(configuration)) == {said_of(launch) for launch in made}


def test_plan_and_reason_of_a_stack() -> None:
    plan, configuration, reason = group.explain(empty(2048, 768), members((16, 16, 16)), plan="shrink_tail/blas")
    assert plan == "stack/stack" and configuration.startswith("group_shrink ") and "; group_x " in configuration
    assert reason == "forward: 1 pass over x for 3 layers; backward: 1 pass over x for 3 layers"


@pytest.mark.parametrize(
    ("plan", "layers", "names", "reason"),
    [
        ("one_pass/split", members((16, 16)), "one by one: one_pass/one by one: split",
         "forward: the plan asked for has no form for groups; backward: the plan asked for has no form for groups; "
         "a layer alone: forward one_pass asked for by name; backward split asked for by name"),
        ("shrink_tail/split", members((16, 16)), "stack/one by one: split",
         "forward: 1 pass over x for 2 layers; backward: the plan asked for has no form for groups; a layer alone"),
        ("shrink_tail/blas", members((16, 16), dropout_p=0.1), "one by one: shrink_tail/one by one: blas",
         "forward: no stack spares a pass, for dropout, ranks, layouts or dtypes of A; backward: no stack"),
        ("shrink_tail/blas", members((16, 0)), "one by one: shrink_tail/one by one: blas", "forward: no stack"),
    ],
    ids=["asked for", "in one direction", "dropout", "one rank"],
)  # fmt: skip
def test_why_layers_run_one_by_one(plan: str, layers: list[Member], names: str, reason: str) -> None:
    found, _, why = group.explain(empty(2048, 768), layers, plan=plan)
    assert found == names and why.startswith(reason)


def test_by_calculation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a stack was not asked for, what pays says so, and the layers' own plans are named with their costs."""
    monkeypatch.setattr(tiles, "device_family", lambda _: Family.HOPPER)
    x, layers = empty(8192, 768), members((16, 16, 16))
    for direction, pays in (("forward", group._forward_pays), ("backward", group._backward_pays)):
        monkeypatch.setattr(group, pays.__name__, lambda problems, passes, plan: False)
        plan, _, reason = group.explain(x, layers)
        assert "one by one: " in plan and f"{direction}: the layers" in reason
        assert re.search(r"a layer alone: forward \w+ [\d.]+.* times the frozen product, calculated", reason)


def test_errors_are_those_of_the_call() -> None:
    with pytest.raises(RuntimeError, match="forward plan 'delta' can't run this call"):
        group.explain(empty(64, 768), members((16, 16)), plan="delta")
