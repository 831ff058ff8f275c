"""A driver for machines without a GPU: the front compiles for Hopper as ever, and launches are counted, not made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

DEVICE = -1  # where torch says that a CPU or meta tensor lies


class Count(list[Any]):
    """In place of a stub's list of launches: to hold their tensors would keep autograd from taking gradients over."""

    number = 0

    def append(self, launch: Any) -> None:
        """Count it."""
        self.number += 1

    def clear(self) -> None:
        """Begin again."""
        self.number = 0

    def __len__(self) -> int:
        return self.number


class StubDriver:
    """Stands for Triton's CUDA driver. ``launches`` holds the arguments of each call of a compiled launcher."""

    def __init__(self, capability: int = 90) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.target = GPUTarget("cuda", capability, 32)
        self.device, self.stream = DEVICE, 0
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (0, 4711, 32, 0, 1024),  # module, function, registers, spills, most threads
            get_device_properties=lambda _: {"max_shared_mem": 232_448},
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """In place of the launcher that Triton builds for a signature.

        It tells the driver that is active then: compiled kernels outlive the stub that they were compiled under.
        """
        return lambda *args: driver.active.launches.append(args)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextmanager
def stub_driver() -> Iterator[StubDriver]:
    """Make a stub the active driver."""
    before, stub = driver._active, StubDriver()
    driver.set_active(stub)  # type: ignore[arg-type]
    try:
        yield stub
    finally:
        driver._active = before
