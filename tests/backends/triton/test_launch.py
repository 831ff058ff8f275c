"""Kept kernels: told apart at least as finely as Triton's front does, launched with what it would launch, faster."""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton import knobs  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.compiler.compiler import make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from adalora_kernels.backends.triton import launch as module  # noqa: E402
from adalora_kernels.backends.triton.launch import launch  # noqa: E402
from tests.backends.triton.stub_driver import DEVICE, StubDriver, stub_driver  # noqa: E402

pytestmark = pytest.mark.skipif(knobs.runtime.interpret, reason="TRITON_INTERPRET is set in this process")

BUFFER = torch.zeros(4096, dtype=torch.uint8)


@triton.jit(do_not_specialize=["free", "free_ptr"])
def _kernel(x_ptr, y_ptr, free_ptr, n, free, scale, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if x_ptr is not None:
        tl.store(y_ptr + i, (tl.load(x_ptr + i, mask=i < n, other=0.0) * scale).to(DTYPE))


@triton.jit(do_not_specialize=["M", "last_dropped"])
def _layer_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, e_ptr, b_ptr, mask_ptr, seed_ptr, y_ptr, u_ptr, M, N, K, R,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_bias, stride_ar, stride_ak, stride_er, stride_bn, stride_br,
    stride_mask, stride_ym, stride_yn, scaling, last_dropped, keep_scale,
    COMPUTE: tl.constexpr, RANK_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """The parameters of the layer's forward; what it computes is of no account here."""
    tl.store(y_ptr, tl.load(x_ptr) * M)


@triton.jit
def _descriptor_kernel(x_desc, y_ptr, BLOCK: tl.constexpr):
    tile = x_desc.load([0, 0])
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.sum(tile, axis=1))


OPTIONS = {"DTYPE": tl.float32, "BLOCK": 16, "num_warps": 4}


def layer_launch() -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and options of a 4096x4096 layer of rank 16, 33 of them."""
    x, w, a, e, b, y, u = (torch.zeros(64, 64, dtype=torch.bfloat16) for _ in range(7))
    strides = (4096, 1, 4096, 1, 0, 4096, 1, 1, 16, 1, 0, 4096, 1)
    args = (x, w, None, torch.nn.Parameter(a), e, b, None, None, y, u, 8192, 4096, 4096, 16, *strides, 1.5, -1, 1.0)
    tiles = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "BLOCK_R": 16, "GROUP_M": 8}
    launch_options = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
    return args, {"COMPUTE": tl.bfloat16, "RANK_PADDED": 16, **tiles, **launch_options}


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Each test starts with nothing kept, here or by the front."""
    module._shapes.clear()
    for kernel in (_kernel, _layer_kernel, _descriptor_kernel):
        kernel.device_caches.clear()
    yield
    module._shapes.clear()


@pytest.fixture
def stub() -> Iterator[StubDriver]:
    with stub_driver() as driver:
        yield driver


def tensor(dtype: torch.dtype, offset: int) -> torch.Tensor:
    """A tensor whose address lies ``offset`` elements past a multiple of 64."""
    return BUFFER[: 2048 // dtype.itemsize * dtype.itemsize].view(dtype)[offset:]


def random_argument(draw: random.Random) -> Any:
    """Anything that a launcher may pass, near the limits at which the front turns."""
    kind = draw.choice(("tensor", "parameter", "descriptor", "int", "int", "int", "float", "bool", "none"))
    dtype = draw.choice((torch.float32, torch.bfloat16, torch.float16, torch.int64))
    if kind == "tensor":
        return tensor(dtype, draw.choice((0, 1, 2, 4, 8, 16)))
    if kind == "parameter":
        return torch.nn.Parameter(tensor(torch.bfloat16, draw.choice((0, 1, 8))), requires_grad=False)
    if kind == "descriptor":
        block = [draw.choice((16, 32)), draw.choice((16, 32))]
        return TensorDescriptor.from_tensor(torch.zeros(64, 64, dtype=dtype), block)
    edge = draw.choice((0, 1, 16, 2**31, -(2**31), 2**32, 2**63, draw.randrange(2**20)))
    values = {"int": edge + draw.choice((-16, -1, 0, 1, 15, 16, 17)), "float": draw.random(), "bool": edge % 2 == 0}
    return values.get(kind)


@pytest.mark.parametrize("specialised", [True, False], ids=["specialised", "do_not_specialize"])
def test_key_is_at_least_as_fine_as_the_fronts(specialised: bool, stub: StubDriver) -> None:
    """Over random arguments: one key of ours never meets two specialisations of Triton's."""
    draw = random.Random(0)
    place = 1 if specialised else 2  # y_ptr or free_ptr
    binder = create_function_from_signature(_kernel.signature, _kernel.params, make_backend(stub.target))
    first = tensor(torch.float32, 0)
    theirs: dict[Any, str] = {}
    for _ in range(20_000):
        value = random_argument(draw)
        args: list[Any] = [first, None, None, 5, 5, 1.0]
        args[place] = value
        ours = (type(value), *module._specialiser(_kernel, tuple(args))(*args))
        specialisation = str(binder(*args, **OPTIONS)[1][place])
        assert theirs.setdefault(ours, specialisation) == specialisation, value
    assert len(set(theirs.values())) >= (20 if specialised else 10)


def test_what_varies_from_call_to_call_is_not_in_the_key() -> None:
    """Tokens under ``do_not_specialize``, factors, addresses, and integers that differ in their middle bits."""
    args, _ = layer_launch()
    specialise = module._specialiser(_layer_kernel, args)
    key = specialise(*args)
    names = _layer_kernel.arg_names

    def key_with(name: str, value: object) -> tuple[Any, ...]:
        changed = list(args)
        changed[names.index(name)] = value
        return specialise(*changed)

    for name, value in {"M": 77, "scaling": 0.3, "N": 1024, "y_ptr": torch.zeros(2, dtype=torch.bfloat16)}.items():
        assert key_with(name, value) == key, name
    assert key_with("N", 1023) != key


def test_launches_what_the_front_launches(stub: StubDriver) -> None:
    """Grid, stream, function, metadata, arguments and constants of a hit are those of the front."""
    args, options = layer_launch()
    for grid, stream in itertools.product([(7,), (7, 3), (7, 3, 2)], [0, 99]):
        stub.stream = stream
        _layer_kernel[grid](*args, **options)
        launch(_layer_kernel, grid, *args, **options)
        launch(_layer_kernel, grid, *args, **options)
    for front, first, hit in zip(*[iter(stub.launches)] * 3, strict=True):
        for theirs, ours in ((front, first), (front, hit)):
            assert len(theirs) == len(ours)
            # Between them lie the metadata of a launch and its hooks: see test_hooks.
            assert theirs[:6] == ours[:6]
            assert all(a is b or a == b for a, b in zip(theirs[9:], ours[9:], strict=True))


def test_a_hit_does_not_enter_the_front(stub: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    args, options = layer_launch()
    launch(_layer_kernel, (1,), *args, **options)
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: pytest.fail("through the front"))
    launch(_layer_kernel, (1,), *args, **options)
    assert len(stub.launches) == 2


def test_each_variant_is_compiled_once(stub: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alignment, an absent pointer, an integer that becomes 1, constexprs and launch options."""
    compiled: list[Any] = []
    front = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda *a, **k: compiled.append(front(*a, **k)) or compiled[-1])
    aligned, shifted = tensor(torch.float32, 0), tensor(torch.float32, 1)
    variants: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((aligned, aligned, None, 5, 5, 1.0), OPTIONS),
        ((shifted, aligned, None, 5, 5, 1.0), OPTIONS),
        ((aligned, aligned, None, 16, 5, 1.0), OPTIONS),
        ((aligned, aligned, None, 1, 5, 1.0), OPTIONS),
        ((aligned, aligned, None, 5, 2**31, 1.0), OPTIONS),
        ((aligned, aligned, None, 5, 5, 1.0), {**OPTIONS, "BLOCK": 32}),
        ((aligned, aligned, None, 5, 5, 1.0), {**OPTIONS, "num_warps": 8}),
        ((aligned, aligned, None, 5, 5, 1.0), {**OPTIONS, "launch_pdl": True}),
    ]
    for _ in range(2):
        for args, options in variants:
            launch(_kernel, (1,), *args, **options)
    assert len(compiled) == len(variants) and len({id(kernel) for kernel in compiled}) == len(variants)
    assert [kernel.metadata.launch_pdl for kernel in compiled] == [False] * 7 + [True]


def test_descriptors(stub: StubDriver) -> None:
    """They reach the launcher as they are; it encodes them for the kernel."""
    y = tensor(torch.float32, 0)
    for _ in range(3):
        descriptor = TensorDescriptor.from_tensor(torch.zeros(64, 64), [16, 32])
        launch(_descriptor_kernel, (1,), descriptor, y, BLOCK=16)
        assert stub.launches[-1][9] is descriptor
    assert len(stub.launches) == 3
    (shape,) = module._shapes.values()
    assert len(shape.kept) == 1
    launch(_descriptor_kernel, (1,), TensorDescriptor.from_tensor(torch.zeros(64, 64), [16, 64]), y, BLOCK=16)
    assert len(shape.kept) == 2


def test_hooks(stub: StubDriver) -> None:
    """Read at each launch, and given what the front gives them."""
    args, options = layer_launch()
    launch(_layer_kernel, (1,), *args, **options)

    def hook(metadata: Any) -> None:
        """The launcher calls it; this one only has to be there."""

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        launch(_layer_kernel, (1,), *args, **options)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    launch(_layer_kernel, (1,), *args, **options)
    _, hooked, bare = stub.launches
    about, enter, leave = hooked[6:9]
    assert enter is knobs.runtime.launch_enter_hook and leave is knobs.runtime.launch_exit_hook
    assert about.get() == {"name": "_layer_kernel", "function": 4711, "stream": 0}
    assert bare[6:9] == (None, None, None)


def test_on_the_device_of_the_tensors(stub: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    args, options = layer_launch()
    launch(_layer_kernel, (1,), *args, **options)
    entered: list[int] = []

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            entered.append(self.index)
            self.before, stub.device = stub.device, self.index

        def __exit__(self, *_: object) -> None:
            stub.device = self.before

    monkeypatch.setattr(torch.cuda, "device", Device)
    launch(_layer_kernel, (1,), *args, **options)
    assert entered == []
    stub.device = 5
    launch(_layer_kernel, (1,), *args, **options)
    assert entered == [DEVICE] and stub.device == 5 and len(stub.launches) == 3


def test_what_a_hook_compiles_is_not_kept(stub: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook on the cache may answer for the front, which then hands back nothing."""
    args, options = layer_launch()
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **_: True)
    launch(_layer_kernel, (1,), *args, **options)
    assert not stub.launches
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", None)
    launch(_layer_kernel, (1,), *args, **options)
    (shape,) = module._shapes.values()
    (kept,) = shape.kept.values()
    assert isinstance(kept.kernel, CompiledKernel) and len(stub.launches) == 1


def test_arguments_that_do_not_fit(stub: StubDriver) -> None:
    x = tensor(torch.float32, 0)
    with pytest.raises(TypeError, match=r"_kernel: expected 6 arguments, constexprs after them and by name; got 5"):
        launch(_kernel, (1,), x, x, None, 5, 5, **OPTIONS)
    with pytest.raises(TypeError, match="_kernel: n: expected a tensor, tensor descriptor, number or None, got <class"):
        launch(_kernel, (1,), x, x, None, "5", 5, 1.0, **OPTIONS)
    with pytest.raises(TypeError, match="_kernel: expected a tensor among its arguments"):
        launch(_kernel, (1,), None, None, None, 5, 5, 1.0, **OPTIONS)


def python_calls(run: Callable[[], object]) -> int:
    """Calls of Python and C functions under ``run``."""
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def test_host_time(stub: StubDriver, record_property: Callable[[str, object], None]) -> None:
    """A hit takes less than half the front's host time for the layer's 33 arguments, whatever the driver takes."""
    args, options = layer_launch()

    def front() -> None:
        _layer_kernel[(64,)](*args, **options)

    def ours() -> None:
        launch(_layer_kernel, (64,), *args, **options)

    front(), ours()
    calls = {run.__name__: python_calls(run) for run in (front, ours)}
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(40):
        for run in (front, ours):
            stub.launches.clear()
            start = time.perf_counter()
            for _ in range(50):
                run()
            best[run.__name__] = min(best[run.__name__], (time.perf_counter() - start) / 50)
    ratio = best["front"] / best["ours"]
    times = ", ".join(f"{name} {1e6 * seconds:.1f} µs, {calls[name]} calls" for name, seconds in best.items())
    record_property("measured", f"host time of one launch: {times} ({ratio:.1f} x)")
    assert calls["ours"] <= 30
    assert ratio >= 2
