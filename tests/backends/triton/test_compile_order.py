"""The order of stores, barriers, signals and loads in what is compiled: no GPU is needed, and the interpreter has none.

``test_tickets_model`` shows that the signals are right as they are written; here the compiler is held to them. A
barrier lies between what a program stores and the release, and another between the acquire and what it loads. No load
goes through the cache that no acquire empties (``ld.global.nc``). What an earlier launch may still be making, and where
it may still be reading, is touched after the wait for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

triton = pytest.importorskip("triton")

from adalora_kernels.backends.triton.forward import shrink_tail  # noqa: E402
from adalora_kernels.backends.triton.tiles import Family, Width  # noqa: E402
from tests.backends.triton.compiling import Launch, compile_launch  # noqa: E402
from tests.backends.triton.launches import FP32, HALF_ADAPTERS, launch_of, table  # noqa: E402
from tests.backends.triton.test_compile_engine import EVEN  # noqa: E402
from tests.backends.triton.test_compile_engine import launch_of as engine_launch_of  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set in this process")

RANK_16 = replace(HALF_ADAPTERS, rank=16)
FEW = replace(RANK_16, tokens=64)  # whose products are cut into slices of K
EVENTS = {
    "wait": r"griddepcontrol\.wait",
    "barrier": r"bar\.sync",
    "acquire_release": r"atom\.\S*acq_rel",
    "acquire": r"(?:atom|ld\.global)\.\S*acquire",
    "release": r"atom\.\S*release",
    "load": r"ld\.global\b|cp\.async\.c[ag]\.shared\.global",
    "store": r"st\.global\b",
}
LAUNCHES: dict[str, tuple[int, Callable[[Family], Launch]]] = {  # with how many signals of a kind they have
    "beside": (1, lambda family: launch_of(table(family, "gemm")[0], RANK_16)),
    "ahead": (1, lambda family: launch_of(table(family, "gemm")[0], replace(RANK_16, adapter=FP32))),
    "one_gemm": (1, lambda family: launch_of(table(family, "one_gemm")[0], RANK_16)),
    "shrink": (1, lambda family: launch_of(table(family, "shrink")[0], FEW)),
    "group_shrink": (1, lambda family: launch_of(table(family, "group_shrink")[0], replace(FEW, rank=32))),
    "finish": (1, lambda family: launch_of(table(family, "finish", Width.SINGLE)[0])),
    "norm": (1, lambda family: engine_launch_of("norm", EVEN)),
    "orthogonality": (2, lambda family: engine_launch_of("orthogonality", EVEN)),
}
CASES = [(name, Family.HOPPER) for name in LAUNCHES] + [
    (name, family) for name in ("beside", "one_gemm", "shrink") for family in (Family.AMPERE, Family.BLACKWELL)
]


def events(ptx: str) -> list[str]:
    """The names of what is in ``EVENTS``, as they follow each other."""
    assert "ld.global.nc" not in ptx
    kinds = "|".join(f"(?P<{name}>{pattern})" for name, pattern in EVENTS.items())
    return [str(found.lastgroup) for found in re.finditer(kinds, ptx)]


def up_to_wait(ptx: str) -> list[str]:
    """The lines that may run before the wait: blocks of code don't lie in the order in which they run."""
    lines = ptx.splitlines()
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith("$L")}
    reached: set[int] = set()
    starts = [0]
    while starts:
        for i in range(starts.pop(), len(lines)):
            if i in reached or re.search(EVENTS["wait"], lines[i]):
                break
            reached.add(i)
            branch = re.search(r"(@\S+\s+)?\bbra(?:\.uni)?\s+(\$L\w+)", lines[i])
            if branch:
                starts.append(labels[branch[2]])
            if lines[i].strip() == "ret;" or (branch and not branch[1]):
                break
    return [lines[i] for i in sorted(reached)]


@pytest.mark.parametrize(("name", "family"), CASES)
def test_barriers_stand_between_signals_and_memory(name: str, family: Family) -> None:
    signals, launch = LAUNCHES[name]
    found = events(compile_launch(launch(family), family).asm["ptx"])
    releases = [i for i, event in enumerate(found) if "release" in event]
    acquires = [i for i, event in enumerate(found) if "acquire" in event]
    assert len(releases) == len(acquires) == signals
    assert all(found[i - 1] == "barrier" for i in releases)
    assert all(found[i + 1] == "barrier" for i in acquires)
    assert "store" in found[: releases[-1]] and "load" in found[acquires[0] :]


@pytest.mark.parametrize("kernel", ["gemm", "low_rank"])
@pytest.mark.parametrize("family", [Family.HOPPER, Family.BLACKWELL])
def test_a_dependent_launch_touches_nothing_before_it_waits(family: Family, kernel: str) -> None:
    """But x and W, through descriptors, which the launch before it has no part in."""
    call = replace(RANK_16, plan=shrink_tail if kernel == "gemm" else None)
    launch = launch_of(table(family, kernel)[0], call)
    assert launch.options["launch_pdl"]
    ptx = compile_launch(launch, family).asm["ptx"]
    assert {*events(ptx)} >= {"wait", "load"}
    assert not {"load", "store"} & {*events("\n".join(up_to_wait(ptx)))}
