"""Builds the compiled extension: adalora_kernels._C (CPU) always, adalora_kernels._C_cuda where nvcc is found.

Both use PyTorch's stable ABI (from torch 2.10 on) and Python's limited API (from 3.10 on). On x86-64 the hot loops in
csrc/cpu/simd are compiled once for every instruction set and chosen when they run, so that a build runs on any machine.
No device is probed and nothing is downloaded.

Environment: ADALORA_BUILD_CUDA=0 leaves _C_cuda out, =1 demands it. CXX and CXXFLAGS are honoured.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from torch.utils.cpp_extension import include_paths, library_paths

TORCH_TARGET = "0x020A000000000000"
COMMON = ["-O3", "-std=c++20", "-DNDEBUG", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
# No contraction (here, and -fmad=false with nvcc): the averages must not depend on which loop body, vector or scalar,
# CPU or GPU, an element falls into.
CPU_FLAGS = [*COMMON, "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off", "-Wall", "-Wextra"]
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
DARWIN_LINK = ["-bundle", "-undefined", "dynamic_lookup"]
# The PTX of compute_80 serves the architectures that have no code of their own.
GENCODE = ["arch=compute_80,code=[sm_80,compute_80]", "arch=compute_90a,code=sm_90a", "arch=compute_100a,code=sm_100a"]


def find_nvcc() -> str | None:
    """The nvcc to build with; None to leave CUDA out."""
    wish = os.environ.get("ADALORA_BUILD_CUDA")
    if wish not in (None, "", "0", "1"):
        raise SystemExit(f"ADALORA_BUILD_CUDA: expected 0 or 1, got {wish!r}")
    if wish == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if nvcc is None and wish == "1":
        raise SystemExit("ADALORA_BUILD_CUDA=1, but nvcc is neither in $CUDA_HOME/bin nor on PATH")
    return nvcc


def sources(pattern: str) -> list[str]:
    """Source files under csrc, in a fixed order."""
    return sorted(str(path) for path in Path("csrc").glob(pattern))


class BuildExtension(build_ext):
    """Compiles hot loops once per instruction set, and CUDA extensions with nvcc."""

    def build_extension(self, ext: Extension) -> None:
        """Compile the sources of ``ext`` side by side, and link them."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = Path(self.build_temp) / ext.name
        includes = ["-Icsrc", *(flag for path in include_paths() for flag in ("-isystem", path))]
        commands, outputs = [], []
        for source in ext.sources:
            for label, command in self.compilers(ext, source):
                output = objects / label / f"{source}.o"
                output.parent.mkdir(parents=True, exist_ok=True)
                commands.append([*command, *includes, "-c", source, "-o", str(output)])
                outputs.append(str(output))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self.execute_command, commands))
        # libtorch is needed for what it brings along: libtorch_cuda, where torch has one.
        libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
        self.execute_command([*self.linker(ext), *outputs, *libraries, "-o", str(target)])

    def compilers(self, ext: Extension, source: str) -> list[tuple[str, list[str]]]:
        """Labels and commands that compile ``source``, one or several."""
        if ext.name.endswith("_cuda"):
            command = [find_nvcc() or "nvcc", *COMMON, "-DUSE_CUDA", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
            if source.endswith(".cu"):
                command += ["-fmad=false", *(flag for arch in GENCODE for flag in ("-gencode", arch))]
            return [("cuda", command)]
        command = [*self.cxx(), *CPU_FLAGS]
        if Path(source).parent.name != "simd":
            return [("cpu", command)]
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        sets = INSTRUCTION_SETS if x86 else {"baseline": INSTRUCTION_SETS["baseline"]}
        return [(name, [*command, *flags, f"-DADALORA_ISA={name}"]) for name, flags in sets.items()]

    def linker(self, ext: Extension) -> list[str]:
        """Command that links ``ext``, without its inputs."""
        if ext.name.endswith("_cuda"):
            return [find_nvcc() or "nvcc", "-shared", "-cudart", "static", "-Xlinker", "--no-as-needed"]
        return [*self.cxx(), *(DARWIN_LINK if sys.platform == "darwin" else ["-shared"])]

    @staticmethod
    def cxx() -> list[str]:
        """The C++ compiler with the user's flags."""
        found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
        compiler = os.environ.get("CXX") or found
        if compiler is None:
            raise SystemExit("no C++ compiler: neither $CXX is set nor c++, g++ or clang++ on PATH")
        return [*shlex.split(compiler), *shlex.split(os.environ.get("CXXFLAGS", ""))]

    @staticmethod
    def execute_command(command: list[str]) -> None:
        """Run one command; its output is shown, its failure ends the build."""
        print(shlex.join(command), flush=True)
        subprocess.run(command, check=True)


def extensions() -> list[Extension]:
    """The extension modules of this build."""
    cpu = [*sources("registration.cpp"), *sources("python/*.cpp"), *sources("cpu/*.cpp"), *sources("cpu/simd/*.cpp")]
    modules = [Extension("adalora_kernels._C", cpu, py_limited_api=True)]
    if find_nvcc() is not None and sources("cuda/*.cu"):
        cuda = [*sources("registration_cuda.cpp"), *sources("cuda/*.cpp"), *sources("cuda/*.cu")]
        modules.append(Extension("adalora_kernels._C_cuda", cuda, py_limited_api=True))
    return modules


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
