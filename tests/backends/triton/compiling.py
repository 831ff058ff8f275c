"""Ahead-of-time compilation of what launchers launch, for any GPU, and what the compiler made of it.

The launchers run with their launches recorded instead of made, so that what is compiled is what they launch: the same
arguments, specialised as Triton's front would, for the target in question.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction, mangle_type

from adalora_kernels.backends.triton.tiles import Family

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
CAPABILITY = {Family.AMPERE: 80, Family.HOPPER: 90, Family.BLACKWELL: 100}
# Ampere's table also serves what has no table of its own (sm_86, sm_89, sm_120), and they have 99 KiB.
SHARED_MEMORY = {Family.AMPERE: 101_376, Family.HOPPER: 232_448, Family.BLACKWELL: 232_448}
SHARED_MEMORY_OF_A100 = 166_912
# In PTX, and in the machine code, which has one for each in the PTX (test_compile holds it).
MATRIX_INSTRUCTION = {
    Family.AMPERE: ("mma.sync", "HMMA"),
    Family.HOPPER: ("wgmma.mma_async", "HGMMA"),
    Family.BLACKWELL: ("tcgen05.mma", "UTCHMMA"),
}


@dataclass
class Launch:
    """One recorded launch."""

    kernel: JITFunction
    args: tuple[Any, ...]
    options: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        """The kernel's name without underscores at its ends."""
        return str(self.kernel.__name__).strip("_")


@dataclass
class Resources:
    """What cuobjdump says of a cubin, with the PTX that it came from."""

    registers: int
    stack: int
    shared: int
    ptx: str
    cubin: bytes = field(repr=False)

    def __str__(self) -> str:
        return f"{self.registers} registers, stack {self.stack}, {self.shared} bytes of shared memory"

    @cached_property
    def products(self) -> dict[str, int]:
        """How often each matrix instruction stands in the PTX, by the operands' type, such as mma.sync f16."""
        found = re.findall(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.(\S*)", self.ptx)
        return dict(Counter(f"{name} {'f16' if 'f16' in types else types}" for name, types in found))

    @cached_property
    def instructions(self) -> dict[str, int]:
        """How often each opcode stands in the machine code. To take it apart takes half as long as to compile it."""
        opcode = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)"
        return dict(Counter(re.findall(opcode, _cuobjdump(self.cubin, "-sass"), re.MULTILINE)))


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collects launches in place of making them; tensors on the meta device may stand for the data."""
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(self, args, options, grid))

    front, JITFunction.run = JITFunction.run, run  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        JITFunction.run = front  # type: ignore[method-assign]


def compile_launch(launch: Launch, family: Family, capability: tuple[int, int] | None = None) -> CompiledKernel:
    """Compile a recorded launch for a device, by default a family's first, specialised as Triton's front does.

    1 and None become constants; multiples of 16 and aligned pointers are marked; descriptors carry their block.
    """
    options = dict(launch.options)
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = options.pop(name, parameter.default) if parameter.is_constexpr else arguments[name]
        free = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not free):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = mangle_type(value)
        address = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if not free and type(address) is int and address % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    arch = CAPABILITY[family] if capability is None else 10 * capability[0] + capability[1]
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources_of(kernel: CompiledKernel) -> Resources:
    """Registers, stack and shared memory of a compiled kernel."""
    cubin = kernel.asm["cubin"]
    dump = _cuobjdump(cubin, "--dump-resource-usage")
    usage = re.search(r"REG:(\d+) STACK:(\d+)", dump)
    assert usage is not None, dump[:1000]
    return Resources(int(usage[1]), int(usage[2]), kernel.metadata.shared, kernel.asm["ptx"], cubin)


def _cuobjdump(cubin: bytes, option: str) -> str:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([CUOBJDUMP, option, path], capture_output=True, text=True, check=True).stdout


def assert_within_limits(
    found: Resources, family: Family, matrix_instructions: bool = True, shared: int | None = None
) -> None:
    """No stack, no spills, shared memory within the limit, real code; matrix units: the family's own, or none.

    Args:
        found: of the compiled kernel.
        family: whose limits hold.
        matrix_instructions: whether the kernel multiplies tiles in 16 bits; if not, it uses no matrix units.
        shared: bytes of shared memory that a device has; None: as many as all of the family have.
    """
    assert found.registers >= 16, f"hardly any code: {found}"
    assert found.stack == 0, f"registers spill, or there are arrays on the stack: {found}"
    assert found.shared <= (SHARED_MEMORY[family] if shared is None else shared), f"shared memory: {found}"
    wanted = {f"{MATRIX_INSTRUCTION[family][0]} f16"} if matrix_instructions else set()
    assert found.products.keys() == wanted, f"matrix instructions: {found.products}, expected {wanted}"


def products_in_flight(found: Resources) -> int:
    """On Hopper, how many groups of wgmma may still run where the kernel waits for one."""
    return max(int(depth) for depth in re.findall(r"wgmma\.wait_group\S* (\d+)", found.ptx))


def narrow_loads(found: Resources, *bits: int) -> list[str]:
    """Loads of elements of so many bits that move less than 16 bytes at a time, as they stand in the PTX; not flags.

    Copies to shared memory, whose elements PTX doesn't tell, are among them where 32 bits are asked for.
    """
    copies = re.findall(r"(cp\.async\.c[ag]\.shared\.global[^;]*?\], \[[^]]*\], (0x\w+|\d+))", found.ptx)
    narrow = [copy for copy, size in copies if 32 in bits and int(size, 0) < 16]
    for load, count, width in re.findall(r"(ld\.global(?!\S*acquire)[\w.:]*?\.(?:v(\d)\.)?b(\d+)\b[^;]*)", found.ptx):
        if int(width) in bits and int(count or 1) * int(width) < 128:
            narrow.append(load)
    return narrow
