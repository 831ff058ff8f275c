"""Replayed calls: the launches that the launcher itself would make, with other tensors of the same layout."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

triton = pytest.importorskip("triton")

from triton import knobs  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from adalora_kernels.backends import triton as backend  # noqa: E402
from adalora_kernels.backends.triton import group, launch, measured, plans, replay, tickets, tiles  # noqa: E402
from adalora_kernels.backends.triton.places import Descriptor, Places  # noqa: E402
from adalora_kernels.backends.triton.relaunch import InPython  # noqa: E402
from adalora_kernels.backends.triton.replay import replayed  # noqa: E402
from adalora_kernels.reference.handover import PROBES, LayerImportance, slots_of  # noqa: E402
from adalora_kernels.reference.importance import OrthogonalityShare, TripletLayout  # noqa: E402
from adalora_kernels.reference.svd_linear import Adapter  # noqa: E402
from adalora_kernels.reference.svd_linear_group import Member  # noqa: E402
from tests.backends.triton.stub_driver import StubDriver, stub_driver  # noqa: E402

pytestmark = pytest.mark.skipif(knobs.runtime.interpret, reason="TRITON_INTERPRET is set in this process")

PLANS = [("forward", name) for name in plans.FORWARD] + [("backward", name) for name in plans.BACKWARD]
OF_THE_BLAS = [("forward", "blas"), ("backward", "blas")]
M, K, N, R = 40, 64, 48, 8


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubDriver]:
    """Triton takes CPU tensors as if they lay on a Hopper device, and launches nothing."""
    monkeypatch.setattr(tiles, "device_family", lambda device: tiles.Family.HOPPER)
    monkeypatch.setattr(replay, "_known", {})
    with stub_driver() as driver:
        yield driver


@contextmanager
def launches_of_replays() -> Iterator[list[tuple[Any, ...]]]:
    """What known calls launch: the kernel, then the arguments of its launcher."""
    found: list[tuple[Any, ...]] = []

    def noting(kept: launch.Kept) -> launch.Kept:
        return kept._replace(run=lambda *args: found.append((kept.kernel, *args)))

    before = dict(replay._known)
    for key, known in before.items():
        assert known is not None and isinstance(known.launch, InPython)
        launch_again = copy.copy(known.launch)
        launch_again.launches = tuple((noting(kept), grid) for kept, grid in known.launch.launches)
        replay._known[key] = known._replace(launch=launch_again)
    yield found
    replay._known.update(before)


def normal(*sizes: int, dtype: torch.dtype, shift: int = 0) -> Tensor:
    """Contiguous, ``shift`` elements past an aligned address."""
    whole = torch.randn(sizes[0] * sizes[1] + shift)
    return whole.to(dtype)[shift:].view(sizes)


def tensors_of(direction: str, name: str, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """A call's tensors in the order of ``layout``, and the rest, drawn from what the layer takes."""
    half = draw.choice([torch.bfloat16, torch.float16])
    dtype = draw.choice([half, half, torch.float32])
    adapter_dtype = draw.choice([dtype, torch.float32])
    shift = draw.choice([0, 0, 0, 1, 4])
    drop = draw.random() < 0.25
    layout: dict[str, Any] = {
        "dtype": dtype, "adapter": adapter_dtype, "shift": shift, "transposed": draw.random() < 0.3,
        "bias": draw.random() < 0.5, "mask": draw.random() < 0.3, "drop": drop, "m": draw.choice([M, 1, 130]),
        "strided": draw.random() < 0.2, "flat_e": draw.random() < 0.3,
    }  # fmt: skip
    others = {
        "needs": draw.choice([(True, True, True, True), (True, False, True, False), (True, True, False, False)]),
        "scaling": draw.choice([1.0, 2.5]),
        "dropout_p": 0.1 if drop else 0.0,
    }
    return layout, others


def call(direction: str, name: str, layout: dict[str, Any], others: dict[str, Any]) -> tuple[Any, ...]:
    """Fresh tensors of the layout: (all tensors, hashable rest, the launcher's arguments)."""
    dtype, adapter_dtype, m = layout["dtype"], layout["adapter"], layout["m"]
    x = normal(m, K * (2 if layout["strided"] else 1), dtype=dtype, shift=layout["shift"])[:, :K]
    weight = normal(K, N, dtype=dtype).t() if layout["transposed"] else normal(N, K, dtype=dtype)
    e = normal(R, 1, dtype=adapter_dtype)
    adapter = Adapter(
        normal(R, K, dtype=adapter_dtype),
        e[:, 0] if layout["flat_e"] else e,
        normal(N, R, dtype=adapter_dtype),
        torch.ones(R, dtype=torch.bool) if layout["mask"] else None,
        torch.zeros(1, dtype=torch.int64) if layout["drop"] else None,
        others["scaling"],
        others["dropout_p"],
        dtype,
    )
    bias = normal(1, N, dtype=dtype)[0] if layout["bias"] else None
    if direction == "forward":
        based = name == "delta"
        base = normal(m, N, dtype=dtype) if based else None
        args = (x, None if based else weight, None if based else bias, base, adapter)
        return (*args[:4], *adapter[:5]), adapter[5:], args
    grad_y, u = normal(m, N, dtype=dtype), normal(m, 16, dtype=dtype)
    args = (grad_y, x, u, weight, adapter, others["needs"])
    return (*args[:4], *adapter[:5]), (*adapter[5:], others["needs"]), args


class Labels:
    """Addresses by what lies there, however they come."""

    def __init__(self, given: tuple[Tensor | None, ...], results: tuple[Tensor | None, ...]) -> None:
        self._names = {t.data_ptr(): f"given {i}" for i, t in enumerate(given) if t is not None}
        self._names |= {t.data_ptr(): f"result {i}" for i, t in enumerate(results) if t is not None}
        self._names |= {b.data_ptr(): "workspace" for b in tickets._buffers.values()}

    def of(self, value: Any) -> Any:
        if isinstance(value, TensorDescriptor | Descriptor):
            return self._named(value.base.data_ptr()), list(value.shape), list(value.strides), list(value.block_shape)
        if isinstance(value, Tensor):
            return self._named(value.data_ptr())
        if isinstance(value, int) and value > 1 << 32:
            return self._named(value)
        return value

    def _named(self, address: int) -> str | int:
        if address == 0:
            return 0
        if address not in self._names:
            self._names[address] = f"scratch {sum(name.startswith('scratch') for name in self._names.values())}"
        return self._names[address]


def check(direction: str, name: str, layout: dict[str, Any], others: dict[str, Any]) -> int:
    """Hold a call, replayed if it is known, to the launcher's own launches; returns how many launches were compared."""
    return held(plans.launcher(direction, name), *call(direction, name, layout, others))


def held(launcher: Any, tensors: tuple[Tensor | None, ...], rest: tuple[Any, ...], args: tuple[Any, ...]) -> int:
    """As ``check``, of any launcher's call."""
    direct: list[launch.Launched] = []
    with launch.noted(direct):
        expected = launcher(*args)
    with launches_of_replays() as launches:
        known = len(replay._known)
        results = replayed(launcher, tensors, rest, *args)
        if len(replay._known) > known:
            return 0
    assert len(launches) == len(direct)
    ours, theirs = Labels(tensors, results), Labels(tensors, expected)
    for (own, *got), (kept, grid, values) in zip(launches, direct, strict=True):
        assert kept is not None and own is kept.kernel
        assert tuple(got[:3]) == (*grid, 1, 1)[:3]
        assert tuple(got[3:9]) == (0, kept.function, kept.metadata, None, None, None)
        assert [ours.of(v) for v in got[9:]] == [theirs.of(v) for v in (*values, *kept.constants)]
    for a, b in zip(results, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert (a.shape, a.dtype, a.is_contiguous()) == (b.shape, b.dtype, b.is_contiguous())
    return len(launches)


@pytest.mark.parametrize(("direction", "name"), [plan for plan in PLANS if plan not in OF_THE_BLAS])
def test_launches_are_the_launchers_own(stub: StubDriver, direction: str, name: str) -> None:
    draw = random.Random(name)
    for _ in range(8):
        drawn = tensors_of(direction, name, draw)
        check(direction, name, *drawn)
        assert check(direction, name, *drawn) > 0


@pytest.mark.parametrize(("direction", "name"), [("forward", "one_pass"), ("forward", "delta"), ("backward", "split")])
def test_layouts_are_told_apart(stub: StubDriver, direction: str, name: str) -> None:
    """Each way in which one may differ from a known one."""
    layout: dict[str, Any] = {
        "dtype": torch.bfloat16, "adapter": torch.bfloat16, "shift": 0, "transposed": False, "bias": True, "mask": True,
        "drop": True, "m": M, "strided": False, "flat_e": False,
    }  # fmt: skip
    others = {"needs": (True,) * 4, "scaling": 1.0, "dropout_p": 0.1}
    variations = {
        "dtype": torch.float16, "adapter": torch.float32, "shift": 1, "transposed": True, "bias": False, "mask": False,
        "drop": False, "m": M + 1, "strided": True, "flat_e": True,
    }  # fmt: skip
    check(direction, name, layout, others)
    for key, value in variations.items():
        check(direction, name, layout | {key: value}, others)
        assert check(direction, name, layout, others) > 0
    for key, value in {"needs": (True, True, False, False), "scaling": 2.0, "dropout_p": 0.2}.items():
        check(direction, name, layout, others | {key: value})
        assert check(direction, name, layout, others) > 0


@pytest.mark.parametrize("plan", ["shrink_tail", "one_pass"])
def test_a_group_is_replayed_whole(stub: StubDriver, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``shrink_tail`` its layers share a pass over x, as ``one_pass`` they don't."""
    drawn = tensors_of("forward", plan, random.Random(6))
    known = []

    def replayed_and_held(make: Any, tensors: Any, others: Any, *args: Any) -> Any:
        known.append(held(make, tensors, others, args))
        return make(*args)

    monkeypatch.setattr(replay, "replayed", replayed_and_held)
    for _ in range(2):
        layout = drawn[0] | {"drop": False, "flat_e": False}
        calls = [call("forward", plan, layout, drawn[1] | {"dropout_p": 0.0})[2] for _ in range(3)]
        made = group.forward(
            calls[0][0], [Member(weight, bias, adapter) for _, weight, bias, _, adapter in calls], plan
        )
        assert [(y.shape[1], u.shape[1]) for y, u in made] == [(N, 16)] * 3
    assert known == [0, 4 if plan == "shrink_tail" else 3]


@pytest.mark.parametrize(("direction", "name"), OF_THE_BLAS)
def test_products_of_the_blas_are_made_anew(stub: StubDriver, direction: str, name: str) -> None:
    layout, others = tensors_of(direction, name, random.Random(3))
    launcher = plans.launcher(direction, name)
    for _ in range(2):
        tensors, rest, args = call(direction, name, layout, others)
        launches: list[launch.Launched] = []
        with launch.noted(launches):
            replayed(launcher, tensors, rest, *args)
    assert list(replay._known.values()) == [None] and launches


@pytest.mark.parametrize("contiguous", [True, False])
def test_leading_shapes(stub: StubDriver, contiguous: bool) -> None:
    """x of three dimensions is replayed, with results of its shape that are no views; also where it must be copied."""
    layout, others = tensors_of("forward", "published", random.Random(7))
    layout |= {"dtype": torch.bfloat16, "adapter": torch.bfloat16, "shift": 0, "strided": False, "drop": False}
    for _ in range(3):
        x, weight, bias, _, adapter = call("forward", "published", layout | {"m": 40}, others)[2]
        x = x.view(2, 20, K) if contiguous else x.view(20, 2, K).transpose(0, 1)
        y, u = backend.svd_linear_forward(x, weight, bias, None, adapter, "published")
        grad_y = torch.ones(2, 20, N, dtype=y.dtype)
        dx, dA, _, _ = backend.svd_linear_backward(grad_y, x, u, weight, adapter, (True,) * 4, "/one_gemm")
        assert y.shape == (2, 20, N) and u.shape == (40, 16) and not y._is_view()
        assert dx is not None and dA is not None and dx.shape == x.shape and dA.shape == (R, K)
    assert len(replay._known) == 2 and None not in replay._known.values()
    assert len(stub.launches) == 3 * 3


def test_what_shares_memory_stays_apart(stub: StubDriver) -> None:
    """Scratch is one buffer: what is in it must not overlap, and must be aligned."""
    launcher = plans.launcher("backward", "one_gemm")
    layout = tensors_of("backward", "one_gemm", random.Random(0))[0] | {"dtype": torch.float32, "m": 300, "drop": False}
    others = {"needs": (True,) * 4, "scaling": 1.0, "dropout_p": 0.0}
    tensors, _, args = call("backward", "one_gemm", layout, others)
    with replay._Watch() as watch, launch.noted(watch.launches), tickets.noted(watch.workspaces):
        results = launcher(*args)
    found = replay._replay_of(watch, tensors, results)
    assert found is not None
    scratch = found.made[-1]
    own = {t.data_ptr() for t in results if t is not None}
    sizes = [t.untyped_storage().nbytes() for t in watch.made if t.data_ptr() not in own]
    places = Places(tensors, [], [t for t in watch.made if t.data_ptr() not in own], [])
    starts = [pointer.beyond for _, pointer in places._made]
    assert len(starts) > 2 and all(start % 256 == 0 for start in starts)
    ends = [start + size for start, size in zip(starts, sizes, strict=True)]
    assert all(end <= start for end, start in zip(ends, [*starts[1:], scratch.numel()], strict=True))


def test_arguments_of_one_address_are_not_remembered(stub: StubDriver) -> None:
    """With A standing for B too, the launches' pointers could be either's."""
    launcher = plans.launcher("backward", "split")
    layout, others = tensors_of("backward", "split", random.Random(1))
    tensors, rest, args = call("backward", "split", layout | {"m": N}, others)
    twice = (tensors[0], tensors[1], tensors[0], *tensors[3:])
    replayed(launcher, twice, rest, args[0], args[1], args[0], *args[3:])
    assert not replay._known


@pytest.mark.parametrize(("direction", "name"), [("forward", "published"), ("backward", "one_gemm")])
def test_a_known_call_holds_no_tensor(stub: StubDriver, direction: str, name: str) -> None:
    """Neither the one that was watched nor a replay: an output would keep its graph, and nodes that began elsewhere."""
    layout, others = tensors_of(direction, name, random.Random(1))
    layout |= {"dtype": torch.bfloat16, "adapter": torch.bfloat16, "shift": 0, "strided": False}
    gc.disable()
    try:
        for _ in range(2):
            tensors, rest, args = call(direction, name, layout, others)
            results = replayed(plans.launcher(direction, name), tensors, rest, *args)
            alive = [weakref.ref(t) for t in (*tensors, *results) if t is not None]
            stub.launches.clear()
            del tensors, args, results
            assert not [ref for ref in alive if ref() is not None]
    finally:
        gc.enable()
    assert any(isinstance(value, Descriptor) for known in replay._known.values() for value in _constants(known))


def _constants(known: Any) -> list[Any]:
    return [value for kind, value in known.launch._arguments.__globals__.items() if kind.startswith("c")]


def test_tiles_on_trial_and_hooks_are_heeded(stub: StubDriver) -> None:
    launcher = plans.launcher("forward", "one_pass")
    layout, others = tensors_of("forward", "one_pass", random.Random(2))
    layout |= {"dtype": torch.bfloat16, "adapter": torch.bfloat16}
    tensors, rest, args = call("forward", "one_pass", layout, others)

    def launched() -> list[launch.Launched]:
        launches: list[launch.Launched] = []
        with launch.noted(launches):
            replayed(launcher, tensors, rest, *args)
        return launches

    launched()
    assert not launched()
    with measured.trial("one_pass", (16, 16, 32, 4, 2)):
        assert launched()[0].grid == (-(-layout["m"] // 16) * N // 16,)
    assert not launched()
    hook = [].append
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        assert launched()
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)


def test_a_base_is_told_that_it_was_added_to(stub: StubDriver) -> None:
    layout, others = tensors_of("forward", "delta", random.Random(4))
    for _ in range(3):
        tensors, rest, args = call("forward", "delta", layout, others)
        before = args[3]._version
        y, _ = replayed(plans.launcher("forward", "delta"), tensors, rest, *args)
        assert y is args[3] and args[3]._version == before + 1


def test_what_lies_nowhere_is_refused(stub: StubDriver) -> None:
    """Though a call with its layout is known: a kernel would read address 0."""
    layout, others = tensors_of("forward", "one_pass", random.Random(4))
    launcher = plans.launcher("forward", "one_pass")
    for _ in range(2):
        tensors, rest, args = call("forward", "one_pass", layout | {"shift": 0}, others)
        replayed(launcher, tensors, rest, *args)
        wrapper = FakeTensorMode().from_tensor(args[1])
        with pytest.raises(
            TypeError, match=r"expected tensors with memory of their own, got a FakeTensor of \[48, 64\]"
        ):
            replayed(launcher, (tensors[0], wrapper, *tensors[2:]), rest, args[0], wrapper, *args[2:])
    assert len(replay._known) == 1


def test_few_layouts_are_remembered(stub: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_MOST", 3)
    layout, others = tensors_of("forward", "one_pass", random.Random(5))
    for m in range(1, 9):
        tensors, rest, args = call("forward", "one_pass", layout | {"m": m}, others)
        replayed(plans.launcher("forward", "one_pass"), tensors, rest, *args)
        assert len(replay._known) <= 3


def importance_of(layer: int, term: bool) -> LayerImportance:
    """What a backward updates on its way, for one of three layers."""
    layout = TripletLayout(((R, K, N),) * 3)
    state, half = torch.zeros(2, 2, layout.total_elements), torch.zeros(1, dtype=torch.int32)
    share = (
        OrthogonalityShare(torch.zeros(6 * R * R), layer * R * R, (3 + layer) * R * R, torch.ones(())) if term else None
    )
    sums, probes = torch.zeros(slots_of(layout)[layer], R), torch.zeros(3, PROBES)
    return LayerImportance(state, half, layout.offsets[3 * layer], (None,) * 3, share, sums, probes, 0.85, 0.75)


@pytest.mark.parametrize(("name", "term"), [("one_gemm", False), ("split", True)])
def test_importance_on_the_way(name: str, term: bool, stub: StubDriver) -> None:
    """Its tensors are among those that take the place of the known call's; each layer's place is a call of its own."""
    layout, others = tensors_of("backward", name, random.Random(6))
    layout |= {"dtype": torch.bfloat16, "adapter": torch.float32, "drop": False, "strided": False, "shift": 0}
    compared = []
    for layer in (0, 1, 0, 1):
        tensors, rest, args = call("backward", name, layout, others | {"needs": (True,) * 4})
        update = importance_of(layer, term)
        known = (*tensors, *update.tensors), (*rest, *update.numbers), (*args, update)
        compared.append(held(plans.launcher("backward", name), *known))
    assert compared[:2] == [0, 0] and all(compared[2:])
