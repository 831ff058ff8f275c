"""Every shipped configuration, compiled ahead of time for each device family: no GPU is needed.

The launchers run with their launches recorded instead of made, so that what is compiled is what they launch: the same
arguments, specialised as triton's front would, for the target in question. The widest case is taken: the largest rank
of each entry, fp32 adapters, mask, bias, dropout. Held: no spills, no stack, shared memory within the family's limit,
matrix instructions of the family's own kind for 16-bit products.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, CompiledKernel  # noqa: E402
from triton.runtime.jit import JITFunction, mangle_type  # noqa: E402

from adalora_kernels.backends.triton import svd_linear_backward, svd_linear_forward, tiles  # noqa: E402
from adalora_kernels.backends.triton.tiles import Configuration, Family, Width  # noqa: E402
from adalora_kernels.reference.svd_linear import Adapter  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set in this process")

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
CAPABILITY = {Family.AMPERE: 80, Family.HOPPER: 90, Family.BLACKWELL: 100}
# Ampere's table also serves what has no table of its own (sm_86, sm_89, sm_120), and they have 99 KiB.
SHARED_MEMORY = {Family.AMPERE: 101_376, Family.HOPPER: 232_448, Family.BLACKWELL: 232_448}
MATRIX_INSTRUCTION = {Family.AMPERE: "HMMA", Family.HOPPER: "HGMMA", Family.BLACKWELL: "UTCHMMA"}
M, N, K = 4096, 4096, 4096  # multiples of 16, as at run time: the wide loads are what is to fit


@dataclass
class Launch:
    """One recorded launch."""

    kernel: JITFunction
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass
class Resources:
    """What cuobjdump says of a cubin, with the PTX it came from."""

    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]
    ptx: str


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Collects launches in place of making them."""
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(self, args, options))

    monkeypatch.setattr(JITFunction, "run", run)
    yield launches


def compile_launch(launch: Launch, capability: int) -> CompiledKernel:
    """Compile a recorded launch for a target, specialised as triton's front does.

    1 and None become constants; multiples of 16 and aligned pointers are marked.
    """
    options = dict(launch.options)
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = options.pop(name) if parameter.is_constexpr else arguments[name]
        free = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not free):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = mangle_type(value)
        aligned = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if not free and not isinstance(value, float) and aligned % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources_of(kernel: CompiledKernel, path: Path) -> Resources:
    """Registers, stack, shared memory and instruction counts of a compiled kernel."""
    path.write_bytes(kernel.asm["cubin"])

    def dump(option: str) -> str:
        return subprocess.run([CUOBJDUMP, option, path], capture_output=True, text=True, check=True).stdout

    usage = re.search(r"REG:(\d+) STACK:(\d+)", dump("--dump-resource-usage"))
    assert usage is not None
    counts: dict[str, int] = {}
    for opcode in re.findall(
        r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", dump("-sass"), re.MULTILINE
    ):
        counts[opcode] = counts.get(opcode, 0) + 1
    return Resources(int(usage[1]), int(usage[2]), kernel.metadata.shared, counts, kernel.asm["ptx"])


def launch_of(
    configuration: Configuration,
    monkeypatch: pytest.MonkeyPatch,
    launches: list[Launch],
    adapter_dtype: torch.dtype = torch.float32,
    dropout_p: float = 0.1,
) -> Launch:
    """What the launchers launch of a configuration's kernel at its largest rank; meta tensors stand for the data."""
    monkeypatch.setattr(tiles, "device_family", lambda device: configuration.family)
    kernel, rank = configuration.kernel, configuration.max_rank
    compute = torch.float32 if configuration.width is Width.SINGLE else torch.bfloat16
    operand = torch.bfloat16 if configuration.width is Width.HALF else torch.float32

    def empty(*shape: int, dtype: torch.dtype = operand) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight, y = empty(M, K), empty(N, K), empty(M, N)
    lora_A, lora_E, lora_B = (empty(*shape, dtype=adapter_dtype) for shape in ((rank, K), (rank, 1), (N, rank)))
    seed = empty(1, dtype=torch.int64) if dropout_p else None
    adapter = Adapter(lora_A, lora_E, lora_B, empty(rank), seed, 1.0, dropout_p, compute)
    if kernel == "delta":
        svd_linear_forward(x, None, None, y, adapter)
    elif kernel == "one_pass":
        svd_linear_forward(x, weight, empty(N), None, adapter)
    else:
        u = empty(M, tiles.rank_padding(rank), dtype=compute)
        svd_linear_backward(y, x, u, weight, adapter, (True, True, True, True))
    suffix = kernel if kernel in ("one_pass", "delta") else f"backward_{kernel}"
    return next(launch for launch in launches if launch.kernel.__name__.strip("_") == f"svd_linear_{suffix}_kernel")


def shipped() -> list[Configuration]:
    """The table, and the finishing kernel, which is the same everywhere, once per family."""
    finish = [Configuration("finish", f, Width.SINGLE, tiles.MAX_RANK, tiles.FINISH_TILE) for f in Family]
    return [*tiles.configurations(), *finish]


def name_of(configuration: Configuration) -> str:
    """Test id, such as hopper-forward-half-r64."""
    c = configuration
    return f"{c.family.value}-{c.kernel}-{c.width.value}-r{c.max_rank}"


def cases() -> list[Any]:
    """Each configuration with dropout; on the FMA units also without, which takes no fewer registers."""
    found = [pytest.param(c, 0.1, id=name_of(c)) for c in shipped()]
    on_fma = [c for c in shipped() if c.width is Width.SINGLE and c.kernel in ("one_pass", "delta", "x")]
    return found + [pytest.param(c, 0.0, id=f"{name_of(c)}-no-dropout") for c in on_fma]


@pytest.mark.parametrize(("configuration", "dropout_p"), cases())
def test_configuration_compiles_within_its_limits(
    configuration: Configuration,
    dropout_p: float,
    monkeypatch: pytest.MonkeyPatch,
    record: list[Launch],
    tmp_path: Path,
) -> None:
    family, tile = configuration.family, configuration.tile
    launch = launch_of(configuration, monkeypatch, record, dropout_p=dropout_p)
    assert (launch.options["num_warps"], launch.options["num_stages"]) == (tile.num_warps, tile.num_stages)
    found = resources_of(compile_launch(launch, CAPABILITY[family]), tmp_path / "kernel.cubin")
    summary = f"{found.registers} registers, stack {found.stack}, {found.shared} bytes of shared memory"
    assert sum(found.instructions.values()) > 100, f"hardly any code: {found.instructions}"
    assert found.stack == 0, f"stack frame: {summary}"
    assert not {"LDL", "STL"} & found.instructions.keys(), f"spills: {summary}"
    assert found.shared <= SHARED_MEMORY[family], f"shared memory: {summary}"
    if configuration.width is not Width.SINGLE:
        assert MATRIX_INSTRUCTION[family] in found.instructions, f"matrix instructions: {found.instructions}"
        if family is not Family.AMPERE:
            assert "HMMA" not in found.instructions, "falls back to Ampere's matrix instruction"


@pytest.mark.parametrize("rank", [32, 64, 128])
def test_hopper_keeps_products_in_flight(
    rank: int, monkeypatch: pytest.MonkeyPatch, record: list[Launch], tmp_path: Path
) -> None:
    """With 16-bit adapters and no dropout, products of one step of the K loop still run while the next are issued."""
    configuration = next(
        c
        for c in tiles.configurations()
        if (c.kernel, c.family, c.width, c.max_rank) == ("one_pass", Family.HOPPER, Width.HALF, rank)
    )
    launch = launch_of(configuration, monkeypatch, record, adapter_dtype=torch.bfloat16, dropout_p=0.0)
    ptx = resources_of(compile_launch(launch, 90), tmp_path / "kernel.cubin").ptx
    assert max(int(depth) for depth in re.findall(r"wgmma\.wait_group\S* (\d+)", ptx)) >= 1
