"""Every configuration of the layer's kernels, compiled ahead of time for its device: no GPU is needed.

The table's and what was measured. Each in the widest call that takes it (its largest rank, fp32 adapters, mask, bias,
slabs of several row blocks, and dropout unless another row is for that), and those of 16-bit loads also with 16-bit
adapters and no dropout, where the compiler keeps more in flight. Held: no spills, shared memory within the device's
limit, matrix instructions of the family's own kind for 16-bit products, loads of 16 bytes at a time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from adalora_kernels.backends.triton import measured  # noqa: E402
from adalora_kernels.backends.triton.configurations import Configuration, configurations  # noqa: E402
from adalora_kernels.backends.triton.sources import fingerprint  # noqa: E402
from adalora_kernels.backends.triton.tiles import Family, Tile, Width  # noqa: E402
from tests.backends.triton.compiling import (  # noqa: E402
    MATRIX_INSTRUCTION,
    SHARED_MEMORY_OF_A100,
    Resources,
    assert_within_limits,
    compile_launch,
    narrow_loads,
    products_in_flight,
    resources_of,
)
from tests.backends.triton.launches import (  # noqa: E402
    HALF_ADAPTERS,
    RAGGED,
    WIDEST,
    Call,
    launch_of,
    name_of,
    table,
)

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set in this process")

SUMS = ("finish", "sum_v")
ONLY_MATRICES = ("shrink", "group_shrink", "x", "group_x", "g", "t")  # are what these load
PRODUCTS = ("one_pass", "gemm", "one_gemm", "dx")


def shipped() -> list[Configuration]:
    """All that may be launched under the triton that is installed."""
    minor = measured.minor_version(triton.__version__)
    return [c for c in configurations() if c.triton in (None, minor)]


def cases() -> list[Any]:
    """Each configuration; on the FMA units also without dropout, which takes no fewer registers."""
    found = [pytest.param(c, WIDEST, id=name_of(c)) for c in shipped()]
    on_fma = [c for c in shipped() if c.width is Width.SINGLE and c.kernel in ("one_pass", "delta", "shrink", "x")]
    return found + [pytest.param(c, Call(dropout=False), id=f"{name_of(c)}-no-dropout") for c in on_fma]


def half_adapters() -> list[Configuration]:
    """Those that also serve calls with 16-bit adapters and without dropout."""
    return [c for c in shipped() if c.width is Width.HALF and c.dropout is not True and c.kernel not in SUMS]


def check(c: Configuration, call: Call = WIDEST) -> Resources:
    launch, tile = launch_of(c, call), c.tile
    assert (launch.options["num_warps"], launch.options["num_stages"]) == (tile.num_warps, tile.num_stages)
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    if c.kernel not in SUMS:
        assert all(launch.options[name] == size for name, size in blocks.items() if size)
    multiplies = c.width is not Width.SINGLE and c.kernel not in SUMS
    shared = SHARED_MEMORY_OF_A100 if c.capability == (8, 0) else None
    found = resources_of(compile_launch(launch, c.family, c.capability))
    assert_within_limits(found, c.family, multiplies, shared)
    return found


@pytest.mark.parametrize(("configuration", "call"), cases())
def test_configuration_compiles_within_its_limits(configuration: Configuration, call: Call) -> None:
    check(configuration, call)


@pytest.mark.parametrize("configuration", half_adapters(), ids=name_of)
def test_with_half_adapters(configuration: Configuration) -> None:
    """Matrices are loaded 16 bytes at a time; on Hopper products run on while the next are issued."""
    c, found = configuration, check(configuration, HALF_ADAPTERS)
    # E, mask and bias are of 32 bits and loaded one by one, and so are one_gemm's tiles of B, which are that small.
    assert narrow_loads(found, 16) == []
    if c.kernel in ONLY_MATRICES:
        assert narrow_loads(found, 16, 32) == []
    if c.family is Family.HOPPER and c.kernel in PRODUCTS:
        assert products_in_flight(found) >= 1


@pytest.mark.parametrize("family", Family)
def test_machine_code_has_the_matrix_instructions_of_the_ptx(family: Family) -> None:
    """The limits are held of the PTX, since taking the machine code apart takes long."""
    ptx, opcode = MATRIX_INSTRUCTION[family]
    found = check(table(family, "gemm")[0])
    opcodes = {name for _, name in MATRIX_INSTRUCTION.values()} & found.instructions.keys()
    assert opcodes == {opcode} and found.instructions[opcode] == found.products[f"{ptx} f16"] > 0


def test_narrow_loads_are_found() -> None:
    """Where rows are no whole 16 bytes."""
    launch = launch_of(table(Family.HOPPER, "x")[0], replace(HALF_ADAPTERS, features=RAGGED))
    assert narrow_loads(resources_of(compile_launch(launch, Family.HOPPER)), 16)


def test_what_was_measured_is_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile that ``measured.json`` names is compiled for its own device, and one that does not fit is found out."""
    tiles = [
        {"kernel": "shrink", "width": "half", "max_rank": 16, "tile": [128, 0, 64, 4, 5]},
        {"kernel": "group_shrink", "width": "half", "max_rank": 48, "tile": [64, 0, 256, 8, 5]},
    ]
    tiles = [{**tile, "source": fingerprint(str(tile["kernel"]))} for tile in tiles]
    entry = {"evidence": ["some-device-tuning.json"], "tiles": tiles, "plans": []}
    tables = measured.read({"8.0": {measured.minor_version(triton.__version__): entry, "2.1": entry}})
    monkeypatch.setattr(measured, "tables", lambda: tables)
    fits, does_not = [c for c in shipped() if c.capability is not None]
    assert [case.id for case in cases() if "measured" in (case.id or "")] == [
        "ampere-shrink-half-r16-no-dropout-measured-8.0", "ampere-group_shrink-half-r48-no-dropout-measured-8.0"
    ]  # fmt: skip
    assert (fits.kernel, fits.tile, fits.max_rank) == ("shrink", Tile(128, 0, 64, 4, 5), 16)
    check(fits)
    with pytest.raises(AssertionError, match=r"^shared memory"):
        check(does_not)


def test_a_spill_is_found() -> None:
    """With a tile that the registers can't hold."""
    (c,) = table(Family.AMPERE, "v")
    with pytest.raises(AssertionError, match=r"^registers spill"):
        check(replace(c, tile=replace(c.tile, num_warps=1, num_stages=1)))
