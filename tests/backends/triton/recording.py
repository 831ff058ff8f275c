"""Launches byte by byte, as they reach a driver that writes them down (``recording_driver.cpp``).

For a process of its own, in which ``libcuda.so.1`` is that driver: ``built`` makes it, and the extension's launcher.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from adalora_kernels.backends.launcher import Launcher, of
from adalora_kernels.backends.triton import tickets
from tests.backends.triton.stub_driver import StubDriver

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
SOURCES = [ROOT / "csrc" / "cuda" / name for name in ("module.cpp", "replay.cpp", "driver.cpp")]
FOLDER = "ADALORA_RECORDING"  # the variable that names what ``built`` has made
FLAGS = ["-O1", "-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Werror"]
_ADDRESS = 1 << 32  # what is larger, and isn't negative, is taken for one


def execute(*command: str | Path) -> None:
    """Run a command that must succeed."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compiled(source: Path, folder: Path, *flags: str) -> Path:
    """The object file of a source. Triton brings along the header of the driver."""
    target = folder / f"{source.name}.o"
    header = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    execute("c++", *FLAGS, *flags, f"-I{ROOT / 'csrc'}", "-isystem", header, "-c", source, "-o", target)
    return target


def built(folder: Path) -> dict[str, str]:
    """Compile the driver and the launcher into ``folder``; the environment of a process that finds them."""
    library = folder / "libcuda.so.1"
    recording = compiled(HERE / "recording_driver.cpp", folder, "-Wno-unused-parameter")
    execute("c++", "-shared", "-Wl,-soname,libcuda.so.1", recording, "-o", library)
    (folder / "libcuda.so").symlink_to(library)
    execute("c++", "-shared", *(compiled(source, folder) for source in SOURCES), "-o", folder / "launcher.so")
    names = ("LD_LIBRARY_PATH", "TRITON_LIBCUDA_PATH", FOLDER)
    return {**os.environ, **dict.fromkeys(names, str(folder)), "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}


def loaded(library: Path) -> Launcher:
    """The launcher in it."""
    loader = ExtensionFileLoader("_C_cuda", str(library))
    spec = spec_from_file_location("_C_cuda", library, loader=loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return of(module)


def with_fault(folder: Path, old: str, new: str) -> Launcher:
    """A launcher with a piece of one source replaced: what a comparison must notice."""
    (source,) = [source for source in SOURCES if source.read_text(encoding="utf-8").count(old) == 1]
    faulty = folder / source.name
    faulty.write_text(source.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    rest = [Path(os.environ[FOLDER]) / f"{other.name}.o" for other in SOURCES if other is not source]
    target = folder / "faulty.so"
    execute("c++", "-shared", compiled(faulty, folder, "-Wno-unused-parameter"), *rest, "-o", target)
    return loaded(target)


class Recorder:
    """The driver's side of it."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self.library.recorded.restype = ctypes.c_char_p

    def take(self) -> list[str]:
        """What was launched since the last time."""
        found = [self.library.recorded(i).decode() for i in range(self.library.recorded_count())]
        self.library.forget()
        return found


class RecordingDriver(StubDriver):
    """The stub with Triton's own launchers over the driver that records."""

    def __init__(self) -> None:
        from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

        super().__init__()
        self.stream = 77
        self.utils = CudaUtils()  # type: ignore[assignment]
        self.launcher_cls = CudaLauncher  # type: ignore[method-assign]


@contextmanager
def recording_driver() -> Iterator[RecordingDriver]:
    """Make it the active driver."""
    before, made = driver._active, RecordingDriver()
    driver.set_active(made)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        driver._active = before


def labelled(records: list[str], given: tuple[Tensor | None, ...], results: tuple[Any, ...]) -> list[str]:
    """Records with addresses by what lies there, however they come; other memory is counted as it appears."""
    names = {t.data_ptr(): f"<workspace {i}>" for i, t in enumerate(tickets._buffers.values())}
    names |= {t.data_ptr(): f"<result {i}>" for i, t in enumerate(results) if isinstance(t, torch.Tensor)}
    names |= {t.data_ptr(): f"<given {i}>" for i, t in enumerate(given) if t is not None}
    names.pop(0, None)

    def label(match: re.Match[str]) -> str:
        address = int.from_bytes(bytes.fromhex(match[2]), "little")
        if not _ADDRESS < address < 1 << 63:
            return match[0]
        return match[1] + names.setdefault(address, f"<scratch {sum('scratch' in name for name in names.values())}>")

    def relabel(record: str) -> str:
        head, parameters = record.split(" parameters:")
        # Of 8 bytes, or a tensor map, which ends with its address.
        return head + " " + re.sub(r"\b((?:[0-9a-f]{240})?)([0-9a-f]{16})(?=,)", label, parameters)

    return [relabel(record) for record in records]


__all__ = ["FOLDER", "Recorder", "built", "labelled", "loaded", "recording_driver", "with_fault"]
