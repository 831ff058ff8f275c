"""What layers that read the same x must compute together: run by ``test_kernels.py`` in a process of its own.

To debug one: ``TRITON_INTERPRET=1 pytest tests/backends/triton/group_cases.py -k <case>``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from adalora_kernels.backends.triton import configurations, group, rank_padding, tickets
from adalora_kernels.backends.triton.problem import Problem
from adalora_kernels.backends.triton.stack import stacks
from adalora_kernels.backends.triton.tiles import Family, Tile
from adalora_kernels.ops.svd_linear_group import GroupedLayer, shares_passes, svd_linear_group
from adalora_kernels.reference import svd_linear_group as reference
from adalora_kernels.reference.svd_linear import Adapter
from adalora_kernels.reference.svd_linear_group import Member
from adalora_kernels.testing.inputs import LayerInputs, layer_inputs
from adalora_kernels.testing.tolerances import assert_within_budget
from tests.backends.triton.kernel_cases import DEVICE, DTYPES, inside_nan, poisoned

__all__ = ["poisoned"]  # applies to every case here, too

INTERPRETED = triton.knobs.runtime.interpret
M, K = 70, 42  # two tiles and an end; no multiples of 8
NS = (50, 30, 74, 20)
ALL = (True, True, True)
CHOICE = {name: getattr(group, name) for name in ("_forward_pays", "_backward_pays")}


@pytest.fixture(autouse=True)
def few_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, where time goes by the step, kernels run with tiles for these shapes, whatever their tables say."""
    lookup = configurations.lookup
    if INTERPRETED:
        monkeypatch.setattr(configurations, "lookup", lambda *args: lookup(*args) and Tile(64, 64, 32, 8, 2))


@pytest.fixture(autouse=True)
def always_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it costs by calculation: what is here is whether it is right."""
    for pays in ("_forward_pays", "_backward_pays"):
        monkeypatch.setattr(group, pays, lambda problems, passes, plan: True)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is launched."""
    from adalora_kernels.backends.triton.backward import g_pass, slab_sums
    from adalora_kernels.backends.triton.backward import group as backward_group
    from adalora_kernels.backends.triton.forward import gemm
    from adalora_kernels.backends.triton.forward import group as forward_group

    found: list[str] = []

    def spied(launch: Any, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        found.append(kernel.__name__.removeprefix("_svd_linear_").removesuffix("_kernel"))
        launch(kernel, grid, *args, **options)

    for module in (g_pass, slab_sums, backward_group, gemm, forward_group):
        monkeypatch.setattr(module, "launch", partial(spied, module.launch))
    return found


class Group:
    """Layers over one x. The second has no bias, the third a mask."""

    def __init__(
        self, ranks: tuple[int, ...], dtype: torch.dtype, *, m: int = M, k: int = K, adapter: Any = torch.float32
    ) -> None:
        self.compute = dtype
        self.layers = [
            layer_inputs(m, k, n, r, dtype, adapter, bias=i != 1, device=DEVICE, seed=i)
            for i, (n, r) in enumerate(zip(NS, ranks, strict=False))
        ]
        self.x = self.layers[0].x
        self.grads: list[Tensor | None] = [layer.grad_y for layer in self.layers]

    def members(self) -> list[Member]:
        found = []
        for i, layer in enumerate(self.layers):
            rank = layer.lora_A.shape[0]
            mask = torch.arange(rank, device=DEVICE) % 3 != 1 if i == 2 else None
            adapter = Adapter(layer.lora_A, layer.lora_E, layer.lora_B, mask, None, 0.7 + i, 0.0, self.compute)
            found.append(Member(layer.weight, layer.bias, adapter))
        return found

    def exact(self) -> Group:
        """The same in fp64."""
        wide = object.__new__(Group)
        wide.compute, wide.layers = torch.float64, [layer.to(torch.float64) for layer in self.layers]
        wide.x, wide.grads = self.x.double(), [None if g is None else g.double() for g in self.grads]
        return wide

    def run(
        self, how: Any, need_x: bool = True, needs: list[tuple[bool, bool, bool]] | None = None
    ) -> dict[str, Tensor | None]:
        members = self.members()
        made = how.forward(self.x, members)
        us = [u for _, u in made]
        dx, gradients = how.backward(self.grads, self.x, us, members, need_x, needs or [ALL] * len(members))
        found: dict[str, Tensor | None] = {"dx": dx}
        for i, (y, u) in enumerate(made):
            rank = members[i].adapter.lora_A.shape[0]
            if how is group:
                assert u.shape == (self.x.shape[0], rank_padding(rank)) and u.is_contiguous()
                assert (u[:, rank:] == 0).all(), "u: its padding is not zero"
            found |= {f"y{i}": y, f"u{i}": u[:, :rank]}
            found |= {f"{name}{i}": g for name, g in zip(("dA", "dE", "dB"), gradients[i], strict=True)}
        return found

    def check(self) -> dict[str, Tensor | None]:
        """Hold all to their budgets, and the workspace to zero."""
        found, same, exact = self.run(group), self.run(reference), self.exact().run(reference)
        for name, value in found.items():
            if value is None:
                assert same[name] is None, name
            elif not name.startswith("dE"):
                assert_within_budget(name, value, same[name], exact[name])
        # Over all members at once: a layer's dE may be one number, and how far one is off is chance, on both sides.
        given = [name for name, value in found.items() if name.startswith("dE") and value is not None]
        pooled = [torch.cat([results[name] for name in given]) for results in (found, same, exact)]
        assert_within_budget("dE", *pooled)
        assert not tickets.workspace(self.x.device, 1).any(), "workspace: not left at zero"
        return found


@pytest.mark.parametrize(
    ("ranks", "dtype"),
    [*(((1, 33, 16), dtype) for dtype in DTYPES), ((12, 12, 12), torch.bfloat16), ((64, 0, 64), torch.float16)],
    ids=str,
)
def test_group(ranks: tuple[int, ...], dtype: torch.dtype, kernels: list[str]) -> None:
    """Adapters in fp32; one launch over x in each direction."""
    Group(ranks, dtype).check()
    assert kernels.count("group_shrink") == kernels.count("group_backward_x") == 1
    assert kernels.count("gemm") == len(ranks)


@pytest.mark.parametrize(("ranks", "launches"), [((64, 64, 64, 64), 2), ((16, 16, 16, 16), 1), ((128, 1), 2)], ids=str)
def test_more_than_a_stack_holds(ranks: tuple[int, ...], launches: int, kernels: list[str]) -> None:
    """Then one launch for as many as fit; where none fit together, each layer's own."""
    Group(ranks, torch.float32, m=40).check()
    assert kernels.count("group_shrink") == (launches if len(ranks) > 2 else 0)
    assert kernels.count("group_backward_x") == (launches if len(ranks) > 2 else 0)


def test_stacks_hold_128_columns_and_four_members() -> None:
    def shapes(*ranks: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        of = {i: layer_inputs(1, 8, 8, r) for i, r in enumerate(ranks)}
        adapters = {i: Adapter(t.lora_A, t.lora_E, t.lora_B, None, None, 1.0, 0.0, t.x.dtype) for i, t in of.items()}
        return [(stack.members, stack.firsts) for stack in stacks(adapters)]

    assert shapes(12, 33, 16) == [((0, 1, 2), (0, 16, 64))]
    assert shapes(1, 1, 1, 1, 1) == [((0, 1, 2, 3), (0, 16, 32, 48)), ((4,), (0,))]
    assert shapes(64, 64, 1) == [((0, 1), (0, 64)), ((2,), (0,))]


@pytest.mark.parametrize("layout", ["strided", "transposed", "different"])
def test_layouts(layout: str, kernels: list[str]) -> None:
    """x, g and all parameters with other strides than fresh ones; factors whose layouts differ can't be stacked."""
    inputs = Group((12, 5, 20), torch.float32, m=40)
    view = inside_nan if layout == "strided" else lambda t: t if t.dim() == 1 else t.t().contiguous().t()
    if layout == "different":
        inputs.layers[1] = replace(inputs.layers[1], lora_A=inside_nan(inputs.layers[1].lora_A))
    else:
        inputs.layers = [
            LayerInputs(*(None if t is None else view(t) for t in vars(i).values())) for i in inputs.layers
        ]
        if layout == "transposed":  # factors of different ranks, which have different strides so
            for i, layer in enumerate(inputs.layers):
                inputs.layers[i] = replace(layer, lora_A=layer.lora_A.contiguous())
        inputs.x = inputs.layers[0].x
    inputs.check()
    assert kernels.count("group_shrink") == (0 if layout == "different" else 1)


@pytest.mark.parametrize("operand", ["x", "both"])
def test_wider_operands_than_products(operand: str) -> None:
    """Autocast: dx comes back in x's dtype."""
    inputs = Group((12, 5, 20), torch.bfloat16, m=40)
    inputs.x = inputs.x.float()
    if operand != "x":
        inputs.layers = [replace(layer, weight=layer.weight.float()) for layer in inputs.layers]
    inputs.check()


@pytest.mark.parametrize("m", [1, 140])
def test_slices_and_slabs(m: int, kernels: list[str]) -> None:
    """K in slices where rows are few; several slabs of rows where they are many."""
    Group((12, 5), torch.float32, m=m, k=600 if m == 1 else K).check()
    assert kernels.count("group_shrink") == kernels.count("group_backward_x") == 1


def test_no_tokens() -> None:
    found = Group((12, 5), torch.float16, m=0).run(group)
    assert found["y0"].shape == (0, NS[0]) and found["dx"].shape == (0, K)
    assert all((found[name] == 0).all() for name in ("dA0", "dE0", "dB0", "dA1", "dE1", "dB1"))


def test_only_what_is_asked_for(kernels: list[str]) -> None:
    inputs = Group((12, 5, 20), torch.float32, m=20)
    everything = inputs.run(group)
    for need_x in (False, True):
        for needs in ([(True, False, False)] * 3, [(False, True, True)] * 3, [ALL, (False,) * 3, (True, False, True)]):
            kernels.clear()
            found = inputs.run(group, need_x, needs)
            asked = {"dx": need_x}
            asked |= {
                f"{n}{i}": b for i, need in enumerate(needs) for n, b in zip(("dA", "dE", "dB"), need, strict=True)
            }
            for name, wanted in asked.items():
                if wanted:
                    # Sums may be taken in another order where fewer are asked for.
                    unit = everything[name].abs().max().item()
                    torch.testing.assert_close(found[name], everything[name], rtol=0, atol=2e-6 * unit)
                else:
                    assert found[name] is None
            assert kernels.count("group_backward_x") == (1 if need_x or any(need[0] for need in needs) else 0)


def test_outputs_that_are_not_used(kernels: list[str]) -> None:
    """What has no gradient costs no launch."""
    inputs = Group((12, 5, 20), torch.float32, m=40)
    inputs.grads[1] = None
    found = inputs.check()
    assert found["dA1"] is found["dE1"] is found["dB1"] is None
    assert kernels.count("backward_finish") == 2


def test_two_runs_agree_bit_for_bit() -> None:
    runs = [Group((12, 33), torch.float16, m=140).run(group) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_call_with_autograd(kernels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The public call: one launch of each kind, one node; with dropout, layer by layer in the same node."""
    inputs = Group((12, 5, 20), torch.float32, m=40)
    x = inputs.x.view(4, 10, K).requires_grad_()
    layers = [
        GroupedLayer(i.weight, i.lora_A.requires_grad_(), i.lora_E.requires_grad_(), i.lora_B.requires_grad_(), i.bias)
        for i in inputs.layers
    ]
    leaves = [x, *(t for layer in layers for t in layer[1:4])]
    for dropout_p, stacked in ((0.0, 1), (0.3, 0)):
        results = []
        for backend in ("triton", "reference"):
            kernels.clear()
            torch.manual_seed(1)
            ys = svd_linear_group(x, layers, dropout_p=dropout_p, backend=backend)
            assert len({y.grad_fn for y in ys}) == 1
            results.append([*ys, *torch.autograd.grad([y.square().sum() for y in ys], leaves)])
            if backend == "triton":
                assert kernels.count("group_shrink") == kernels.count("group_backward_x") == stacked
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize(
    ("plan", "stacked"),
    [("one_pass/split", (0, 0)), ("shrink_tail", (1, 0)), ("shrink_tail/blas", (1, 1)), ("published/blas", (0, 1))],
)
def test_plans_asked_for_by_name(
    plan: str, stacked: tuple[int, int], kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``shrink_tail`` and ``blas`` have a form for groups; any other plan is that of every layer."""
    for name in ("_forward_pays", "_backward_pays"):
        monkeypatch.setattr(group, name, CHOICE[name])
    inputs = Group((12, 5), torch.float32, m=40)
    x = inputs.x.requires_grad_()
    layers = [GroupedLayer(i.weight, i.lora_A, i.lora_E, i.lora_B, i.bias) for i in inputs.layers]
    results = []
    for backend in (f"triton:{plan}", "reference"):
        ys = svd_linear_group(x, layers, backend=backend)
        results.append([*ys, *torch.autograd.grad([y.square().sum() for y in ys], [x])])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)
    assert (kernels.count("group_shrink"), kernels.count("group_backward_x")) == stacked


def test_plan_that_cannot_run_raises() -> None:
    inputs = Group((12, 5), torch.float32, m=40)
    layers = [GroupedLayer(i.weight, i.lora_A, i.lora_E, i.lora_B, i.bias) for i in inputs.layers]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="forward plan 'delta' can't run"):
        patch.setattr(group, "_forward_pays", CHOICE["_forward_pays"])
        svd_linear_group(inputs.x, layers, backend="triton:delta")


def test_whether_passes_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_forward_pays", "_backward_pays"):
        monkeypatch.setattr(group, name, CHOICE[name])
    inputs = Group((12, 5), torch.float32)
    x = inputs.x.requires_grad_()
    layers = [GroupedLayer(i.weight, i.lora_A, i.lora_E, i.lora_B, i.bias) for i in inputs.layers]
    for plan, forward, backward in (("shrink_tail/split", True, True), ("one_pass/blas", False, True)):
        assert shares_passes(x, layers, backend=f"triton:{plan}") is backward
        with torch.no_grad():
            assert shares_passes(x, layers, backend=f"triton:{plan}") is forward
    assert not shares_passes(x, layers, backend="triton:published/one_gemm")
    assert not shares_passes(x, layers, dropout_p=0.1, backend="triton:shrink_tail/blas")
    assert not shares_passes(x, layers[:1], backend="triton:shrink_tail/blas")
    assert not shares_passes(x, layers, backend="reference")


def test_small_layers_wait_for_the_host() -> None:
    """On an H100: the projections of a BERT do, those of a large language model don't."""
    for features, tokens, waits in ((768, 4096, True), (4096, 8192, False), (4096, 256, True)):
        problem = Problem(
            tokens, features, features, 16, *(torch.bfloat16,) * 4, False, False, True, Family.HOPPER, programs=132
        )  # fmt: skip
        assert group.waits_for_the_host((problem,) * 3) is waits


def test_choice_by_calculated_cost() -> None:
    """One pass over dx in place of three pays at many tokens; a second launch before ``published`` doesn't."""
    problem = Problem(
        8192, 4096, 4096, 16, *(torch.bfloat16,) * 4, False, False, True, Family.HOPPER, None, programs=132
    )  # fmt: skip
    assert CHOICE["_backward_pays"]((problem,) * 3, 1, None)
    assert not CHOICE["_backward_pays"]((problem,) * 3, 1, "/one_gemm")
    assert not CHOICE["_forward_pays"]((problem,) * 3, 1, None)
    assert CHOICE["_forward_pays"]((problem,) * 3, 1, "shrink_tail")
