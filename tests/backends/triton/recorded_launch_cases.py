"""What the extension's launcher passes to the driver, held to what Triton's passes, byte by byte.

Run by ``test_recorded_launches.py`` in a process whose ``libcuda.so.1`` records.
"""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from adalora_kernels.backends import launcher as extension
from adalora_kernels.backends import triton as backend
from adalora_kernels.backends.launcher import Launcher
from adalora_kernels.backends.triton import group, parameters, plans, relaunch, replay, tiles
from adalora_kernels.reference.svd_linear_group import Member
from tests.backends.triton.recording import FOLDER, Recorder, labelled, loaded, recording_driver, with_fault
from tests.backends.triton.test_launch import python_calls
from tests.backends.triton.test_replay import call, importance_of

LAYOUT: dict[str, Any] = {
    "dtype": torch.bfloat16, "adapter": torch.bfloat16, "shift": 0, "transposed": False, "bias": True, "mask": False,
    "drop": False, "m": 40, "strided": False, "flat_e": False,
}  # fmt: skip
ALL = (True, True, True, True)
Case = tuple[Callable[..., Any], tuple[Tensor | None, ...], tuple[Any, ...], tuple[Any, ...]]


def layer(direction: str, name: str, **layout: Any) -> Case:
    """A layer's call: the launcher, its tensors, what else its launches follow from, and its arguments."""
    others = {"needs": ALL, "scaling": 1.5, "dropout_p": 0.1 if layout.get("drop") else 0.0}
    return plans.launcher(direction, name), *call(direction, name, LAYOUT | layout, others)


def of_three_dimensions(direction: str, plan: str) -> Case:
    """The backend's own way in, with x [2, 20, K]."""
    _, tensors, rest, args = layer(direction, plan)
    flat = (0,) if direction == "forward" else (0, 1)  # x; g and x
    tensors = tuple(t.view(2, 20, -1) if i in flat and t is not None else t for i, t in enumerate(tensors))
    make = backend._forward if direction == "forward" else backend._backward
    asked_for = plan if direction == "forward" else f"/{plan}"
    return make, tensors, (asked_for, *rest), (*tensors[:4], *args[4:], asked_for)


def fused(name: str, term: bool) -> Case:
    """A backward that updates its layer's importance on the way."""
    make, tensors, rest, args = layer("backward", name, adapter=torch.float32)
    update = importance_of(1, term)
    return make, (*tensors, *update.tensors), (*rest, *update.numbers), (*args, update)


def stack() -> Case:
    """Three layers that share a pass over x."""
    calls = [layer("forward", "shrink_tail", mask=True)[3] for _ in range(3)]
    members = [Member(weight, bias, adapter) for _, weight, bias, _, adapter in calls]
    x = calls[0][0]
    tensors = (x, *(t for m in members for t in (m.weight, m.bias, *m.adapter[:5])))
    return group._forward, tensors, ("shrink_tail", *(m.adapter[5:] for m in members)), (x, members, "shrink_tail")


# Each with how many launches there are, and what must be among their records.
CASES: dict[str, tuple[Callable[[], Case], int, str]] = {
    "descriptors": (lambda: layer("forward", "published"), 1, ""),
    "pointers": (lambda: layer("forward", "published", shift=1), 1, ""),
    "dropout": (lambda: layer("forward", "published", drop=True, mask=True, bias=False), 1, ""),
    "dependent": (lambda: layer("forward", "shrink_tail", transposed=True), 2, "attributes:6=01000000,"),
    "one pass": (lambda: layer("forward", "one_pass", dtype=torch.float32, flat_e=True), 1, ""),
    "base": (lambda: layer("forward", "delta", adapter=torch.float32), 1, ""),
    "one gemm": (lambda: layer("backward", "one_gemm"), 2, ""),
    "split": (lambda: layer("backward", "split", shift=1, drop=True, m=130), 5, ""),
    "three dimensions": (lambda: of_three_dimensions("forward", "published"), 1, ""),
    "three dimensions, backward": (lambda: of_three_dimensions("backward", "one_gemm"), 2, ""),
    "importance": (lambda: fused("one_gemm", False), 2, ""),
    "importance, term": (lambda: fused("split", True), 5, ""),
    "group": (stack, 4, "attributes:6=01000000,"),
}
LARGEST = "one gemm"


class Held(TorchDispatchMode):
    """Keeps all that is made, so that no address comes twice."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made.append(func(*args, **(kwargs or {})))
        return self.made[-1]


@pytest.fixture(scope="module")
def launcher() -> Launcher:
    return loaded(Path(os.environ[FOLDER]) / "launcher.so")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, launcher: Launcher) -> Iterator[Recorder]:
    """Triton takes CPU tensors as if they lay on a Hopper device."""
    monkeypatch.setattr(tiles, "device_family", lambda device: tiles.Family.HOPPER)
    monkeypatch.setattr(replay, "_known", {})
    use(monkeypatch, launcher)
    with recording_driver():
        yield Recorder()


def use(monkeypatch: pytest.MonkeyPatch, launcher: Launcher | str) -> None:
    """Make it the extension's."""
    monkeypatch.setattr(extension, "launcher", lambda: launcher)
    replay._reader.cache_clear()
    replay._known.clear()


def compared(recorder: Recorder, case: Case) -> tuple[list[str], list[str]]:
    """What Triton's launchers pass for a call, and what is passed when it is replayed."""
    make, tensors, others, args = case
    with Held():
        replay.replayed(make, tensors, others, *args)
        recorder.take()
        expected = make(*args)
        theirs = labelled(recorder.take(), tensors, expected)
        results = replay.replayed(make, tensors, others, *args)
        return theirs, labelled(recorder.take(), tensors, results)


@pytest.mark.parametrize("name", CASES)
def test_every_byte_is_tritons(name: str, recorder: Recorder) -> None:
    case, launches, holds = CASES[name]
    theirs, ours = compared(recorder, case())
    (known,) = replay._known.values()
    assert known is not None and isinstance(known.launch, partial), "replayed in Python"
    assert len(theirs) == launches and theirs == ours
    assert holds in "".join(ours) and all(" 0x4d " in record for record in ours)
    theirs, ours = compared(recorder, case())  # with other addresses
    assert theirs == ours and len(replay._known) == 1


def test_python_makes_the_same_launches(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extension; Triton 3.7 reads more of a descriptor than 3.6."""
    use(monkeypatch, "not built")
    theirs, ours = compared(recorder, CASES[LARGEST][0]())
    assert all(known is not None and isinstance(known.launch, relaunch.InPython) for known in replay._known.values())
    assert theirs == ours and len(ours) == 2


FAULTS = {
    "place": ("addresses[place.address] +", "addresses[place.address] + 16 +"),
    "beyond": ("+ static_cast<uint64_t>(place.beyond)", ""),
    "map": ("if (place.in_map) {", "if (false) {"),
    "offsets": ("parameters + launch.offsets[i]", "parameters + launch.offsets[i / 2]"),
    "shared memory": ("config.sharedMemBytes = launch.shared_bytes;", "config.sharedMemBytes = 0;"),
    "attribute": ("config.numAttrs = launch.dependent;", "config.numAttrs = 0;"),
    "stream": ("config.hStream = stream;", "config.hStream = nullptr;"),
    "grid": ("config.gridDimX = launch.grid[0];", "config.gridDimX = launch.grid[0] + 1;"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_show(fault: str, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, with_fault(tmp_path, *FAULTS[fault]))
    theirs, ours = compared(recorder, CASES["dependent" if fault == "attribute" else LARGEST][0]())
    assert theirs != ours and len(theirs) == len(ours)


@pytest.mark.parametrize("fault", ["number", "threads"])
def test_faults_in_what_is_written_down_show(fault: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    number = parameters._number
    if fault == "number":
        monkeypatch.setattr(parameters, "_number", lambda kind, value: number(kind, value + (kind == "fp32")))
    else:
        monkeypatch.setattr(parameters, "_WARP", 16)
    theirs, ours = compared(recorder, CASES[LARGEST][0]())
    assert theirs != ours and len(theirs) == len(ours)


UNKNOWN: dict[str, tuple[Any, str, Any]] = {
    "of another triton": (parameters.triton, "__version__", "9.0.0"),
    "parameters of": (parameters, "_declared_sizes", lambda ptx: [8]),
    "address can't be exchanged": (parameters, "_ELSEWHERE", 0),
    "a launcher of type": (parameters, "_LAUNCHER", "another.Launcher"),
}


@pytest.mark.parametrize("reason", UNKNOWN)
def test_what_is_not_known_is_left_to_triton(
    reason: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And said, once."""
    place, name, value = UNKNOWN[reason]
    monkeypatch.setattr(place, name, value)
    relaunch._log_once.cache_clear()
    with caplog.at_level("INFO", "adalora_kernels"):
        theirs, ours = compared(recorder, CASES[LARGEST][0]())
    assert theirs == ours
    assert all(known is not None and isinstance(known.launch, relaunch.InPython) for known in replay._known.values())
    (said,) = [record.getMessage() for record in caplog.records if "in Python" in record.getMessage()]
    assert reason.removeprefix("of another ") in said


@pytest.mark.parametrize("need", ["global_scratch_size", "profile_scratch_size", "launch_cooperative_grid"])
def test_kernels_that_need_more_are_left_to_triton(need: str, recorder: Recorder) -> None:
    from triton.backends.nvidia.driver import CudaLauncher

    run = object.__new__(CudaLauncher)
    run.global_scratch_size = run.profile_scratch_size = 0
    run.launch_cooperative_grid = False
    parameters._check_launcher(run)
    setattr(run, need, 1)
    with pytest.raises(parameters.UnknownFormError):
        parameters._check_launcher(run)


def test_what_the_extension_cannot_hold_is_left_to_triton(
    launcher: Launcher, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise ValueError("more than it holds")

    use(monkeypatch, launcher._replace(make_replay=refuse))
    theirs, ours = compared(recorder, CASES[LARGEST][0]())
    assert theirs == ours
    assert all(known is not None and isinstance(known.launch, relaunch.InPython) for known in replay._known.values())


def test_a_replay_takes_few_calls(recorder: Recorder, record_property: Callable[[str, object], None]) -> None:
    """Of one gemm: five allocations, the workspace, the layout, and one for its launches."""
    make, tensors, others, args = CASES[LARGEST][0]()
    replay.replayed(make, tensors, others, *args)
    calls = python_calls(lambda: replay.replayed(make, tensors, others, *args))
    record_property("measured", f"a replayed backward, in calls of Python: {calls}")
    assert calls <= 36


class Allocations(TorchDispatchMode):
    """What this thread allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in replay._ALLOCATIONS:
            self.made.append(StorageWeakRef(result.untyped_storage()))
        return result


def test_nothing_is_left_in_the_callers_pool(recorder: Recorder) -> None:
    """It may be that of a graph in the making, and torch.compile fails over what outlives the call."""
    make, tensors, others, args = CASES[LARGEST][0]()
    with Allocations() as watched:
        results = replay.replayed(make, tensors, others, *args)
    assert replay._known and len(watched.made) > 3
    del results
    assert all(storage.expired() for storage in watched.made)


def test_an_error_names_the_kernel(recorder: Recorder) -> None:
    make, tensors, others, args = CASES[LARGEST][0]()
    replay.replayed(make, tensors, others, *args)
    recorder.library.fail_next(719)
    with pytest.raises(RuntimeError, match=r"^_svd_linear_backward_gemm_kernel: CUDA: error 719$"):
        replay.replayed(make, tensors, others, *args)
    recorder.take()
    replay.replayed(make, tensors, others, *args)
    assert len(recorder.take()) == 2


def test_threads_share_a_replay(recorder: Recorder) -> None:
    """Each gets a context where it has none, and its own tensors' addresses."""
    make, tensors, others, args = CASES[LARGEST][0]()
    expected, _ = compared(recorder, (make, tensors, others, args))
    before = recorder.library.contexts_made()
    failures = []

    def run() -> None:
        for _ in range(20):
            try:
                replay.replayed(make, tensors, others, *args)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and recorder.library.contexts_made() == before + 4
    assert len(recorder.take()) == 4 * 20 * len(expected)


def test_arguments_of_other_types_raise(launcher: Launcher, recorder: Recorder) -> None:
    """Whatever comes, nothing is read or written out of bounds."""
    good = ("kernel", 4711, (1, 1, 1), 128, 0, 0, bytes(16), (0, 8), ((0, 0, 0, False),))
    made = launcher.make_replay(0, 1, (good,), None)
    x = torch.zeros(2)
    for wrong in ((), (made,), (made, 0), (made, 0, x, x), (3, 0, x), (made, "s", x), (made, 0, 3), (made, -1, x)):
        with pytest.raises((TypeError, RuntimeError, OverflowError)):
            launcher.replay(*wrong)
    for place in range(9):
        for bad in (None, 1 << 70, 2.5, ((0, 0),), ((9, 0, 0, False),), (b"",)):
            with pytest.raises((TypeError, ValueError, OverflowError, SystemError, IndexError)):
                launcher.make_replay(0, 1, ((*good[:place], bad, *good[place + 1 :]),), None)
    for places in (((0, 1, 0, False),), ((12, 0, 0, False),), ((0, 0, 0, True),)):
        with pytest.raises(ValueError, match="out of bounds"):
            launcher.make_replay(0, 1, ((*good[:8], places),), None)
    for launches, addresses in (((), 257), (((*good[:6], bytes(4097), *good[7:]),), 1)):
        with pytest.raises(ValueError, match="more than it holds"):
            launcher.make_replay(0, addresses, launches, None)
    with pytest.raises(ValueError, match="expected the bytes of a tensor map"):
        launcher.relocated(b"", 0)


def test_layouts(launcher: Launcher) -> None:
    """As fine as dtype, device, shape, strides and alignment; None where there is no telling."""
    base = torch.zeros(4, 6)
    kinds = [None, base, base.t(), base[:3], base[:, 1:], base.half(), base.bool(), base[None], base[0], base[:, :1]]
    found = [launcher.layout(kind, base) for kind in kinds]
    assert None not in found and len(set(found)) == len(kinds)
    assert launcher.layout(base) == launcher.layout(torch.nn.Parameter(torch.ones(4, 6)))
    assert launcher.layout(None, base) != launcher.layout(base, None)
    assert [launcher.layout(base, other) for other in (3, "x", torch.zeros(2, device="meta"))] == [None] * 3
    assert launcher.layout(base, FakeTensorMode().from_tensor(base)) is None  # it lies nowhere
    assert launcher.layout(*[base] * 200) is None  # more than fits


def test_a_replay_holds_its_kernels(launcher: Launcher) -> None:
    class Kernel:
        """Can be watched."""

    kernel = Kernel()
    alive = weakref.ref(kernel)
    made = launcher.make_replay(0, 0, (), (kernel,))
    del kernel
    gc.collect()
    assert alive() is not None
    del made
    gc.collect()
    assert alive() is None
