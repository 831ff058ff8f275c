"""Order and signals between the programs of one launch, and the workspace that they go through.

A plan whose first tile of each row block makes what the later tiles of that block use needs three things:

* Tiles are handed out by an atomic ticket. A producer's ticket is lower than its consumers', so whoever waits, waits
  for a program that already runs: no co-residency is assumed, neither within a launch nor beside another one.
* A flag per row block: the producer sets it to the number of consumers (release), each consumer waits until it isn't
  zero (acquire) and takes one off.
* Both return to zero by themselves: the flag with its last consumer, the ticket with the last program. So one zeroed
  buffer serves all launches of a stream, without a memset and without an epoch that a CUDA graph would bake in.

The workspace is int32: the ticket, then one flag per row block. What is published travels through plain pointers, never
through TMA, whose reads of data from the same launch need a proxy fence that Triton doesn't emit.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Lock, local

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

_SMALLEST = 1 << 12  # ints; 16 KiB is enough for 500,000 tokens in blocks of 128
_RESERVE = 1 << 18  # ints; 1 MiB a device for the launches that graphs hold
_ALIGNMENT = 4  # ints: 16 bytes, as fresh allocations have at least

_buffers: dict[tuple[torch.device, int], Tensor] = {}
_reserves: dict[torch.device, tuple[Tensor, int]] = {}  # with the number of ints handed out
_reserve_lock = Lock()
_notes = local()


@triton.jit
def take_ticket(workspace_ptr, tickets):
    """The next ticket; one that isn't below ``tickets`` says that nothing is left.

    Each program takes tickets until it gets such a one, so the launch ends with ticket tickets + programs - 1.
    """
    ticket = tl.atomic_add(workspace_ptr, 1, sem="relaxed")
    if ticket == tickets + tl.num_programs(0) - 1:
        tl.atomic_xchg(workspace_ptr, 0, sem="relaxed")
    return ticket


@triton.jit
def tile_of(ticket, blocks_m, blocks_n, GROUP_M: tl.constexpr):
    """(row block, column block) of a ticket: GROUP_M row blocks at a time, their first tiles first.

    Plain column order would stream all rows in every wave; here the tiles in flight share rows and columns in L2.
    """
    return tl.swizzle2d(ticket // blocks_n, ticket % blocks_n, blocks_m, blocks_n, GROUP_M)


@triton.jit
def publish(workspace_ptr, block, consumers):
    """What this program has stored so far may be read by the ``consumers`` tiles that await ``block``; 0 is allowed."""
    tl.debug_barrier()
    tl.atomic_xchg(workspace_ptr + 1 + block, consumers, sem="release")


@triton.jit
def await_published(workspace_ptr, block):
    """Wait until ``block`` is published. Each consumer calls this once."""
    flag_ptr = workspace_ptr + 1 + block
    while tl.atomic_add(flag_ptr, 0, sem="acquire") == 0:
        pass
    tl.atomic_add(flag_ptr, -1, sem="relaxed")
    tl.debug_barrier()


@triton.jit
def arrives_last(workspace_ptr, arrivals):
    """Whether this program is the last of ``arrivals`` to call this; if so, it may read what the others stored."""
    tl.debug_barrier()
    last = tl.atomic_add(workspace_ptr, 1, sem="acq_rel") == arrivals - 1
    if last:
        tl.atomic_xchg(workspace_ptr, 0, sem="relaxed")
    tl.debug_barrier()
    return last


@cache
def programs(device: torch.device) -> int:
    """Programs that take tickets: one for each multiprocessor, which 8 warps of a product fill."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def workspace(device: torch.device, row_blocks: int) -> Tensor:
    """Zeroed int32 for one launch on the current stream of ``device``: at least 1 + ``row_blocks`` of them.

    Launches on one stream follow each other and share a buffer. A captured launch has a piece of its own, since a graph
    may run its branches side by side and is replayed on any stream; the piece is never handed out again.
    """
    buffer = _buffer(device, -(-(1 + row_blocks) // _ALIGNMENT) * _ALIGNMENT)
    if (workspaces := getattr(_notes, "workspaces", None)) is not None:
        workspaces.append((buffer, row_blocks))
    return buffer


def _buffer(device: torch.device, ints: int) -> Tensor:
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _captured(device, ints)
        stream = driver.active.get_current_stream(device.index)  # its number, without an object around it
    buffer = _buffers.get((device, stream))
    if buffer is None or buffer.numel() < ints:
        if device.type == "cuda" and device not in _reserves:
            with _reserve_lock:
                if device not in _reserves:
                    _reserves[device] = (_lasting_zeros(device, _RESERVE), 0)
        buffer = _buffers[device, stream] = _lasting_zeros(device, max(ints, _SMALLEST))
    return buffer


@contextmanager
def noted(workspaces: list[tuple[Tensor, int]]) -> Iterator[None]:
    """Within, what this thread gets from ``workspace`` is appended to ``workspaces``, with the row blocks asked for."""
    before, _notes.workspaces = getattr(_notes, "workspaces", None), workspaces
    try:
        yield
    finally:
        _notes.workspaces = before


def _captured(device: torch.device, ints: int) -> Tensor:
    """A piece of the reserve; zeros set by each replay where none is left, or nothing ran before the capture."""
    with _reserve_lock:
        if device in _reserves:
            reserve, used = _reserves[device]
            if used + ints <= reserve.numel():
                _reserves[device] = (reserve, used + ints)
                return reserve[used : used + ints]
    return torch.zeros(ints, dtype=torch.int32, device=device)


def _lasting_zeros(device: torch.device, ints: int) -> Tensor:
    """Zeros that outlive the call, set on the current stream.

    Allocated by a thread of its own: the caller's may be allocating into the pool of a graph in the making (the warm-up
    of torch.compile's "reduce-overhead" does), which takes its memory back without asking.
    """
    if device.type != "cuda":
        return torch.zeros(ints, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device)

    def allocate() -> Tensor:
        with torch.cuda.stream(stream):
            return torch.zeros(ints, dtype=torch.int32, device=device)

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(allocate).result()


__all__ = ["arrives_last", "await_published", "noted", "programs", "publish", "take_ticket", "tile_of", "workspace"]
