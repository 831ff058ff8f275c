"""What a launch over all tensors of a model reads about them, handed over without a host sync.

A tensor is one int64 word: its address, and above it a code of its dtype; 0 stands for one that isn't there. What
depends on shapes alone is put on the device once and kept. Words change from step to step, since gradients move: they
go to the device in one asynchronous copy, and in none where nothing has changed. Each copy has a pinned buffer of its
own, which PyTorch's allocator hands out again only after that copy's event: none is rewritten while it is read.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from array import array
from collections.abc import Hashable, Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from adalora_kernels.backends import native_views

ADDRESS_BITS = 60
CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_FLAGS = {dtype: code << ADDRESS_BITS for dtype, code in CODES.items()}
_SIZES = 16  # bytes of rows and columns of a matrix
_KEPT_TABLES = 64


class _Table(NamedTuple):
    """Numbers on the device, and what they are."""

    on_device: Tensor
    numbers: list[int]


_tables: dict[tuple[Hashable, torch.device, int], _Table] = {}  # the last is a stream
_spares: dict[tuple[torch.device, int], Tensor] = {}  # pinned, by size: a capture may not be able to allocate one
_captured: list[Tensor] = []


class Words(NamedTuple):
    """What a launch reads about many tensors.

    Attributes:
        words: a number each; 0 for None.
        held: those that are there, or copies of them where they are not contiguous: to be kept until the launch.
        sizes: their rows and columns as ``sizes_of`` packs them; -1 for None, a tensor of other than two dimensions as
            one row.
    """

    words: list[int]
    held: list[Tensor]
    sizes: bytes


def sizes_of(shapes: Iterable[tuple[int, int]]) -> bytes:
    """Rows and columns of many matrices, to be compared and hashed at once."""
    return array("q", chain.from_iterable(shapes)).tobytes()


def shapes_in(sizes: bytes) -> list[tuple[int, int]]:
    """The rows and columns that ``sizes_of`` has packed."""
    numbers = array("q", sizes)
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def words_of(
    name: str, tensors: Sequence[Tensor | None], sizes: bytes | None, device: torch.device, some_missing: bool = False
) -> Words:
    """The words of tensors on a device.

    Args:
        name: of the argument, for errors.
        tensors: None where there is none.
        sizes: what those that are there must have; None for any.
        device: theirs.
        some_missing: whether there may be None among them.

    Raises:
        ValueError: their number, a shape or a device is another.
        TypeError: a dtype is none of ``CODES``, or there is no tensor where there must be.
    """
    there = [t for t in tensors if t is not None]
    if len(there) < len(tensors) and not some_missing:
        missing = next(i for i, t in enumerate(tensors) if t is None)
        raise TypeError(f"{name}[{missing}]: expected a tensor, got None")
    if there and there[0].device == device and (sizes is None or len(sizes) == _SIZES * len(tensors)):
        found = native_views.words_of(tensors, there[0], sizes)
        if found is not None:
            return Words(found[0], there, found[1])
    return _words_of(name, tensors, None if sizes is None else shapes_in(sizes), device)


def _words_of(
    name: str, tensors: Sequence[Tensor | None], shapes: Sequence[tuple[int, int]] | None, device: torch.device
) -> Words:
    """The same one by one: what isn't contiguous is copied, what can't be read is named."""
    if shapes is not None and len(tensors) != len(shapes):
        raise ValueError(f"{name}: expected {len(shapes)} tensors, got {len(tensors)}")
    words: list[int] = []
    held: list[Tensor] = []
    found: list[tuple[int, int]] = []
    for i, tensor in enumerate(tensors):
        if tensor is None:
            words.append(0)
            found.append((-1, -1))
            continue
        shape = tensor.shape if shapes is None else shapes[i]
        if tensor.shape != shape or tensor.device != device:
            raise ValueError(f"{name}[{i}]: expected shape {list(shape)} on {device}, got {describe(tensor)}")
        if tensor.dtype not in _FLAGS:
            raise TypeError(f"{name}[{i}]: expected float32, bfloat16 or float16, got {describe(tensor)}")
        # Nothing launches on the meta device.
        if tensor.layout != torch.strided or (tensor.data_ptr() == 0 and tensor.numel() > 0 and not tensor.is_meta):
            raise TypeError(f"{name}[{i}]: expected a dense tensor with memory of its own, got {type(tensor).__name__}")
        if not tensor.is_contiguous():
            tensor = tensor.detach().contiguous()
        words.append(tensor.data_ptr() | _FLAGS[tensor.dtype])
        held.append(tensor)
        found.append((tensor.shape[0], tensor.shape[1]) if tensor.dim() == 2 else (1, tensor.numel()))
    return Words(words, held, sizes_of(found))


def are_aligned(words: Sequence[int]) -> bool:
    """Whether all addresses are multiples of 16 bytes."""
    bits = 0
    for word in words:
        bits |= word
    return bits & 15 == 0


def bits_of(value: float) -> int:
    """The fp64 number as an int64 of the same bits."""
    return int.from_bytes(struct.pack("=d", value), sys.byteorder, signed=True)


def on_device(key: Hashable, numbers: list[int], device: torch.device) -> Tensor:
    """The numbers as int64 on the device, copied there on the current stream unless the last call put the same ones.

    Args:
        key: tells apart tables that are in use side by side. Each has memory of its own on each stream.
        numbers: at least one; not to be changed afterwards.
        device: where to.

    A captured copy has a pinned buffer and a table of its own, which are kept for good: every replay reads them.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _captured_copy(numbers, device)
        stream = torch.cuda.current_stream(device).cuda_stream
        if (device, len(numbers)) not in _spares:
            _spares[device, len(numbers)] = _staging(len(numbers), device)
    place = (key, device, stream)
    table = _tables.pop(place, None)
    if table is None or table.numbers != numbers:
        if table is None or len(table.numbers) != len(numbers):
            target = torch.empty(len(numbers), dtype=torch.int64, device=device)
        else:
            target = table.on_device
        _copy(numbers, _staging(len(numbers), device), target)
        table = _Table(target, numbers)
    _tables[place] = table
    if len(_tables) > _KEPT_TABLES:
        del _tables[next(iter(_tables))]
    return table.on_device


def _captured_copy(numbers: list[int], device: torch.device) -> Tensor:
    staging = _spares.pop((device, len(numbers)), None)
    if staging is None:
        staging = _staging(len(numbers), device)
    target = torch.empty(len(numbers), dtype=torch.int64, device=device)
    _copy(numbers, staging, target)
    _captured.extend((staging, target))
    return target


def _staging(count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")


def _copy(numbers: list[int], staging: Tensor, target: Tensor) -> None:
    source, _ = (packed := array("q", numbers)).buffer_info()
    ctypes.memmove(staging.data_ptr(), source, packed.itemsize * len(packed))
    target.copy_(staging, non_blocking=True)


def check(name: str, tensor: Tensor, dtype: torch.dtype, numel: int, device: torch.device) -> None:
    """Hold a tensor that a kernel reads where it lies to what the kernel takes it for.

    Raises:
        TypeError: its dtype is another.
        ValueError: its size or device is another, or it is not contiguous.
    """
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {describe(tensor)}")
    if tensor.numel() != numel or tensor.device != device or not tensor.is_contiguous():
        raise ValueError(f"{name}: expected {numel} contiguous elements on {device}, got {describe(tensor)}")


def describe(tensor: Tensor) -> str:
    """Dtype, shape and device in words."""
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


__all__ = [
    "ADDRESS_BITS",
    "CODES",
    "Words",
    "are_aligned",
    "bits_of",
    "check",
    "describe",
    "on_device",
    "shapes_in",
    "sizes_of",
    "words_of",
]
