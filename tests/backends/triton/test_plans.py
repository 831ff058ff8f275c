"""The choice of the layer's plans: pure, and what was asked for by name or the reason why not."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from adalora_kernels.backends.triton import explain, launched, plans, tiles
from adalora_kernels.backends.triton.plans import BACKWARD, FORWARD, choose
from adalora_kernels.backends.triton.problem import Problem, problem_of
from adalora_kernels.backends.triton.tiles import Family
from adalora_kernels.reference.svd_linear import Adapter

BF16, FP32 = torch.bfloat16, torch.float32
LAYER = Problem(8192, 4096, 4096, 16, BF16, BF16, FP32, BF16, False, False, True, Family.HOPPER)
BASE = LAYER._replace(weight_dtype=None)


def problems() -> Iterator[Problem]:
    """Every family, width and side, over shapes and ranks far apart."""
    shapes = ((0, 768, 768), (1, 8, 8), (512, 768, 3072), (8192, 4096, 14336), (1 << 20, 0, 16), (64, 16, 0))
    dtypes = ((BF16, BF16, BF16), (FP32, BF16, BF16), (BF16, FP32, torch.float16), (FP32, FP32, FP32))
    for family, shape, rank, (x, weight, compute) in itertools.product(Family, shapes, (0, 1, 33, 128), dtypes):
        for given, need_x in itertools.product((weight, None), (True, False)):
            yield Problem(*shape, rank, x, given, FP32, compute, False, True, need_x, family)


def adapter(r: int = 12, k: int = 33, n: int = 40, seed: bool = False) -> Adapter:
    drawn = torch.zeros(1, dtype=torch.int64) if seed else None
    return Adapter(torch.empty(r, k), torch.empty(r, 1), torch.empty(n, r), None, drawn, 1.0, 0.1, FP32)


def test_choice_is_pure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same problem, the same choice; and it asks neither a device nor triton."""

    def forbidden(*_: object) -> None:
        raise AssertionError("the choice asked the machine")

    for name in ("get_device_capability", "get_device_properties", "is_available", "current_device"):
        monkeypatch.setattr(torch.cuda, name, forbidden)
    monkeypatch.setattr(plans, "import_module", forbidden)
    for problem in problems():
        first, second = choose.__wrapped__(problem), choose.__wrapped__(problem)
        assert first == second
        assert FORWARD[first.forward].obstacle(problem) is None
        assert BACKWARD[first.backward].obstacle(problem) is None
        assert plans.configuration(problem, first)


def test_tokens_of_one_range_share_a_choice() -> None:
    def problem(m: int) -> Problem:
        return problem_of(torch.empty(m, 33), torch.empty(40, 33), adapter())

    assert problem(65) == problem(128) != problem(129)
    assert (problem(0).tokens, problem(1).tokens, problem(100).tokens) == (0, 1, 128)


def test_problem_of_a_call() -> None:
    x, weight = torch.empty(6, 33, dtype=BF16), torch.empty(33, 40).t()
    found = problem_of(x, weight, adapter(seed=True), need_x=False)
    assert found == Problem(8, 33, 40, 12, BF16, FP32, FP32, FP32, True, True, False, Family.AMPERE)
    assert problem_of(x, None, adapter()).weight_dtype is None
    assert not problem_of(x, torch.empty(40, 33), adapter()).transposed


@pytest.mark.parametrize("plan", FORWARD)
@pytest.mark.parametrize("problem", [LAYER, BASE], ids=["weight", "base"])
def test_forward_plan_by_name(plan: str, problem: Problem) -> None:
    obstacle = FORWARD[plan].obstacle(problem)
    assert (obstacle is None) == ((plan == "delta") == (problem is BASE))
    if obstacle is None:
        chosen = choose(problem, plan)
        assert chosen.forward == plan and f"forward {plan} asked for by name" in chosen.reason
    else:
        with pytest.raises(RuntimeError, match=f"forward plan '{plan}' can't run this call: {obstacle}"):
            choose(problem, plan)


@pytest.mark.parametrize("plan", BACKWARD)
@pytest.mark.parametrize("problem", [LAYER, BASE, LAYER._replace(need_x=False)], ids=["weight", "base", "no dx"])
def test_backward_plan_by_name(plan: str, problem: Problem) -> None:
    obstacle = BACKWARD[plan].obstacle(problem)
    if obstacle is None:
        chosen = choose(problem, f"/{plan}")
        assert chosen.backward == plan and f"backward {plan} asked for by name" in chosen.reason
    else:
        with pytest.raises(RuntimeError, match=f"backward plan '{plan}' can't run this call: {obstacle}"):
            choose(problem, f"/{plan}")


def test_every_plan_is_a_module_that_has_its_function() -> None:
    pytest.importorskip("triton")
    for direction, known in (("forward", FORWARD), ("backward", BACKWARD)):
        for name in known:
            assert plans.launcher(direction, name).__module__.endswith(f"{direction}.{name}")


def test_explain_names_plan_configuration_and_reason() -> None:
    x, weight = torch.empty(6, 33), torch.empty(40, 33)
    plan, configuration, reason = explain(x, weight, adapter(), "one_pass/split")
    assert plan == "one_pass/split"
    assert configuration.startswith("one_pass 64×64×16, 8 warps, 3 stages; g ")
    assert reason == "forward one_pass asked for by name; backward split asked for by name"
    plan, configuration, reason = explain(x, None, adapter())
    assert plan == "delta/split" and configuration.startswith("delta 16×64×16, ")
    assert reason == "forward delta, the only plan that can run it; backward split, the only plan that can run it"
    plan, configuration, reason = explain(x, weight, adapter(r=0), "blas")
    assert configuration == "products of the BLAS alone"
    calculated = r"forward \w+ [\d.]+, .*times the frozen product, calculated, not measured; backward \w+ [\d.]+, .*not"
    assert re.match(calculated, explain(x, weight, adapter())[2])


DTYPES = {"half": (BF16, BF16, BF16), "mixed": (FP32, BF16, BF16), "single": (FP32, FP32, FP32)}


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_explained_tiles_are_those_that_are_launched(
    family: Family, dtypes: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every plan, over ranks, dropout, the gradients asked for, and rows that descriptors can't take."""
    pytest.importorskip("triton")
    from tests.backends.triton.compiling import recorded_launches

    monkeypatch.setattr(tiles, "device_family", lambda _: family)
    x_dtype, weight_dtype, compute = dtypes
    for rank, dropout_p, features in itertools.product(
        (0, 16, 33, 64, 128), (0.0, 0.1), ((768, 512), (760, 516), (765, 512))
    ):
        k, n = features
        meta = partial(torch.empty, device="meta")
        x, weight, base = meta(2048, k, dtype=x_dtype), meta(n, k, dtype=weight_dtype), meta(2048, n, dtype=compute)
        factors = meta(rank, k), meta(rank, 1), meta(n, rank)
        seed = meta(1, dtype=torch.int64) if dropout_p else None
        adapter = Adapter(*factors, None, seed, 1.0, dropout_p, compute)
        u = meta(2048, tiles.rank_padding(rank), dtype=compute)
        for given, need_x in itertools.product((weight, None), (True, False)):
            problem = problem_of(x, given, adapter, need_x)
            runs = {
                "forward": (x, given, None, base if given is None else None, adapter),
                "backward": (base, x, u, given, adapter, (need_x, True, True, True)),
            }
            for direction, plan in ((d, p) for d in runs for p in plans._DIRECTIONS[d].values()):
                if plan.obstacle(problem) is None:
                    with recorded_launches() as launches:
                        plans.launcher(direction, plan.name)(*runs[direction])
                    found = [blocks(launch.options) for launch in launches if not is_sum(launch.name)]
                    said = [
                        launched.tile(kernel, problem) for kernel in plan.kernels if launched.launches(kernel, problem)
                    ]
                    assert found == [blocks(tile.options | of(tile)) for tile in said], (plan.name, problem)


def is_sum(kernel: str) -> bool:
    """Whether it is the second stage of a sum, whose tile is the same everywhere."""
    return kernel.endswith(("finish_kernel", "sum_v_kernel"))


def of(tile: tiles.Tile) -> dict[str, int]:
    sizes = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    return {name: size for name, size in sizes.items() if size}


def blocks(options: dict[str, Any]) -> dict[str, Any]:
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    return {name: options[name] for name in names if name in options}
