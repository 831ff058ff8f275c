"""The compiled extension as a launcher of kernels that others have compiled (``csrc/cuda/module.cpp``).

It is optional, as all of the extension is, and no GPU has run it yet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple


class Launcher(NamedTuple):
    """The extension's functions.

    Attributes:
        make_replay: (device, count, launches, kernels) -> a replay: launches in which ``count`` addresses vary; it
            holds ``kernels``. ValueError where they are more than it can hold. Each launch is (name, function,
            (x, y, z), threads, shared bytes, whether it may begin under the one before it, parameters' bytes, their
            offsets, places), each place (offset, number of the address, bytes past it, whether it is a tensor map's).
        replay: (replay, stream, *tensors) -> None; makes the launches at the tensors' addresses, 0 for None.
            RuntimeError where the driver refuses one.
        layout: (*tensors) -> their dtypes, devices, shapes, strides and addresses modulo 16, as bytes, within 0.3 µs;
            None where that of one can't be read.
        relocated: (tensor map, address) -> the same of what lies there, as bytes.
    """

    make_replay: Callable[[int, int, tuple[Any, ...], Any], Any]
    replay: Callable[..., None]
    layout: Callable[..., bytes | None]
    relocated: Callable[[bytes, int], bytes]


@cache
def launcher() -> Launcher | str:
    """The launcher, or why there is none."""
    from adalora_kernels.backends import native

    reason = native.unavailable_reason("cuda")
    if reason is not None:
        return reason
    found = of(import_module("adalora_kernels._C_cuda"))
    try:
        found.make_replay(0, 0, (), None)
    except RuntimeError as error:  # of the driver
        return str(error)
    return found


def of(module: Any) -> Launcher:
    """The launcher in an extension module."""
    return Launcher(*(getattr(module, name) for name in Launcher._fields))


__all__ = ["Launcher", "launcher", "of"]
