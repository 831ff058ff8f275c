"""What compilers make of csrc: no spills on a GPU, nothing an older CPU could stumble over, the stable ABI alone."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
# How many each file has, and registers that a thread may take: for four blocks of 256 on a multiprocessor, five of 128,
# two of 1024.
KERNELS = {"importance.cu": (4, 64), "finish.cu": (1, 96), "allocation.cu": (3, 32)}
ARCHITECTURES = {"sm_80": "compute_80", "sm_90a": "compute_90a", "sm_100a": "compute_100a"}


def output_of(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("source", sorted(CSRC.glob("cuda/*.cu")), ids=lambda path: path.name)
@pytest.mark.parametrize("code", ARCHITECTURES)
def test_kernels_spill_nothing(source: Path, code: str, tmp_path: Path) -> None:
    count, most = KERNELS[source.name]
    gencode = f"arch={ARCHITECTURES[code]},code={code}"
    command = ["nvcc", "-O3", "-std=c++20", "-fmad=false", f"-I{CSRC}", "-gencode", gencode, "-Xptxas", "-v"]
    report = output_of([*command, "-c", str(source), "-o", str(tmp_path / "kernel.o")])
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    assert len(spills) == len(registers) == count, report
    assert all(spill == ("0", "0") for spill in spills), report
    assert max(registers) <= most, report


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="hot loops are compiled once here")
@pytest.mark.parametrize("source", sorted(CSRC.glob("cpu/simd/*.cpp")), ids=lambda path: path.name)
def test_hot_loops_share_no_symbol(source: Path, tmp_path: Path) -> None:
    """A weak symbol compiled for AVX-512 may replace its baseline twin at link time, and fault on an older machine."""
    target = tmp_path / "hot.o"
    command = ["c++", "-O3", "-std=c++20", "-fPIC", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
    output_of([*command, "-DADALORA_ISA=avx512", f"-I{CSRC}", "-c", str(source), "-o", str(target)])
    symbols = [line.split() for line in output_of(["nm", "-C", "--defined-only", str(target)]).splitlines()]
    strong = [" ".join(words[2:]) for words in symbols if words[1].isupper()]
    assert not [words for words in symbols if words[1] in "WVu"]
    assert strong and all(name.startswith("adalora::cpu::avx512::") for name in strong), strong


@pytest.mark.parametrize("module", ["_C", "_C_cuda"])
def test_only_the_stable_abi_is_linked(module: str) -> None:
    spec = find_spec(f"adalora_kernels.{module}")
    if module == "_C_cuda" and spec is None:
        pytest.skip("built without nvcc")
    assert spec is not None and spec.origin is not None and ".abi3." in spec.origin
    undefined = [line.split()[-1] for line in output_of(["nm", "-D", "--undefined-only", spec.origin]).splitlines()]
    unstable = [name for name in undefined if re.match(r"_ZN[KRV]*(2at|3c10|5torch)", name)]
    assert undefined and not unstable, unstable


STUB = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'
LOAD = """
import ctypes, sys, torch
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
import adalora_kernels._C, adalora_kernels._C_cuda
for name in ("importance_update", "importance_handed_over", "finish_gradients", "mask_by_selection", "zero_pruned"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"adalora_native::{name}", "CUDA"), name
"""


def test_the_cuda_module_loads(tmp_path: Path) -> None:
    """Beside a PyTorch without CUDA too, given the one function that this lacks."""
    if find_spec("adalora_kernels._C_cuda") is None:
        pytest.skip("built without nvcc")
    source, stub = tmp_path / "stub.cpp", tmp_path / "stub.so"
    source.write_text(STUB, encoding="utf-8")
    output_of(["c++", "-shared", "-fPIC", str(source), "-o", str(stub)])
    output_of([sys.executable, "-c", LOAD, str(stub)])
