"""What the launcher of a compiled kernel passes to the driver, written down once, for another one to pass.

Triton's launcher (``triton/backends/nvidia/driver.py`` and ``driver.c``, as 3.6 and 3.7 have it) passes, in order, what
the kernel's signature names and isn't constexpr: pointers; integers and floats in their width; a tensor descriptor as a
tensor map of 128 bytes, its shape and its strides. Two pointers to scratch memory follow. Grid, threads, shared memory
and the attribute for dependent launches come from the metadata.

Each width is held to what the kernel's PTX declares. Tensor maps are made by Triton; they are opaque, but for their
address, which the driver exchanges. Whatever is not as here is left to Triton's launcher.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import triton

from adalora_kernels.backends.launcher import Launcher
from adalora_kernels.backends.triton.launch import Kept
from adalora_kernels.backends.triton.places import Described, Descriptor, Pointer

_VERSIONS = ("3.6.", "3.7.")
_LAUNCHER = "triton.backends.nvidia.driver.CudaLauncher"
_WARP = 32
_POINTER = 8
_MAP = 128  # bytes, and their alignment
_ELSEWHERE = 256  # bytes, from one tensor map to another that differs in nothing else
_DECLARED = re.compile(r"^\s*\.param\s.*?\.[bfsu](\d+)\b.*?(?:\[(\d+)\])?,?$", re.MULTILINE)


class UnknownFormError(Exception):
    """A kernel is launched in a way that is not known here; the message says in which."""


class _Parameters:
    """Bytes of a kernel's parameters as they are gathered."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.offsets: list[int] = []
        self.sizes: list[int] = []
        self.places: list[tuple[int, int, int, bool]] = []

    def add(self, data: bytes, pointer: Pointer | None = None) -> None:
        self.data += bytes(-len(self.data) % len(data))  # aligned to its own size
        if pointer is not None:
            self.places.append((len(self.data), *pointer, len(data) == _MAP))
        self.offsets.append(len(self.data))
        self.sizes.append(len(data))
        self.data += data


def launch_of(
    kept: Kept, grid: tuple[int, int, int], terms: Sequence[Any], addresses: Sequence[int], launcher: Launcher
) -> tuple[Any, ...]:
    """A launch in the form of ``Launcher.make_replay``.

    Args:
        kept: the kernel.
        grid: its extents.
        terms: all arguments, constexprs among them, as ``Places.term`` gives them.
        addresses: some that the terms' pointers may have.
        launcher: which will make it.

    Raises:
        UnknownFormError: it is not what this module knows.
    """
    kernel = kept.kernel
    run: Any = kept.run
    _check_launcher(run)
    metadata = kernel.metadata
    if metadata.num_ctas != 1:
        raise UnknownFormError("a cluster of several blocks")
    parameters = _Parameters()
    signature = list(kernel.src.signature.values())
    if len(signature) != len(terms):
        raise UnknownFormError(f"{len(terms)} arguments for a signature of {len(signature)}")
    maps = iter(getattr(metadata, "tensordesc_meta", None) or ())
    for kind, term in zip(signature, terms, strict=True):
        if kind == "constexpr":
            continue
        if isinstance(term, Described):
            for data, pointer in _described(term, next(maps, None), addresses, launcher):
                parameters.add(data, pointer)
        elif isinstance(term, Pointer):
            parameters.add(bytes(_POINTER), term)
        else:
            parameters.add(_number(kind, term))
    for _ in ("global scratch", "profile scratch"):
        parameters.add(bytes(_POINTER))
    declared = _declared_sizes(kernel.asm.get("ptx", ""))
    if parameters.sizes != declared:
        raise UnknownFormError(f"{kernel.name}: parameters of {declared} bytes, expected {parameters.sizes}")
    return (
        kernel.name,
        kept.function,
        grid,
        _WARP * metadata.num_warps,
        metadata.shared,
        int(run.launch_pdl),
        bytes(parameters.data),
        tuple(parameters.offsets),
        tuple(parameters.places),
    )


def _check_launcher(run: Any) -> None:
    if not triton.__version__.startswith(_VERSIONS):
        raise UnknownFormError(f"triton {triton.__version__}")
    if f"{type(run).__module__}.{type(run).__qualname__}" != _LAUNCHER:
        raise UnknownFormError(f"a launcher of type {type(run).__qualname__}")
    if run.global_scratch_size or run.profile_scratch_size:
        raise UnknownFormError("a kernel that needs scratch memory")
    if run.launch_cooperative_grid:
        raise UnknownFormError("a cooperative launch")


def _described(
    term: Described, metadata: Any, addresses: Sequence[int], launcher: Launcher
) -> Iterator[tuple[bytes, Pointer | None]]:
    """A tensor map, shape and strides."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    if metadata is None:
        raise UnknownFormError("a tensor descriptor without a tensor map")

    def made(address: int) -> tuple[bytes, list[int]]:
        tensor_map, *numbers = make_tensordesc_arg(Descriptor(term.descriptor, address), metadata)
        # The map ends the object; what is before it is padded.
        return ctypes.string_at(id(tensor_map) + type(tensor_map).__basicsize__ - _MAP, _MAP), numbers

    address = term.pointer.among(addresses)
    (here, numbers), (there, _) = made(address), made(address + _ELSEWHERE)
    if here == there or launcher.relocated(here, address + _ELSEWHERE) != there:
        raise UnknownFormError("a tensor map whose address can't be exchanged")
    yield here, term.pointer
    shape, strides = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
    yield from ((_number("i32", extent), None) for extent in shape)
    yield from ((_number("i64", stride), None) for stride in strides)


def _number(kind: str, value: Any) -> bytes:
    """As the launcher converts an argument of this type of the signature."""
    if kind.startswith("*") and value in (None, 0):
        return bytes(_POINTER)
    if kind == "fp32":
        return struct.pack("<f", value)
    width = re.fullmatch(r"[iu](8|16|32|64)", kind)
    if width is None or not isinstance(value, int):
        raise UnknownFormError(f"an argument of type {kind}: {value!r:.40}")
    size = int(width[1])
    return (value % (1 << size)).to_bytes(size // 8, "little")


def _declared_sizes(ptx: str) -> list[int]:
    """Bytes of each parameter of the kernel in it."""
    start = ptx.find(".entry")
    head = ptx[start : ptx.find(")", start)] if start >= 0 else ""
    return [int(bits) // 8 * int(count or 1) for bits, count in _DECLARED.findall(head)]


__all__ = ["UnknownFormError", "launch_of"]
