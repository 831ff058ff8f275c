"""``adalora-kernels env``: versions, devices, backends and why each can or can't run."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator
from importlib import metadata

import torch

from adalora_kernels import __version__, explain
from adalora_kernels.backends import native
from adalora_kernels.backends.select import ENVIRONMENT_VARIABLE, Backend, plans_of, unavailable_reason

_PACKAGES = ("torch", "triton", "transformers", "peft", "tokenizers", "numpy")
_EXTENSIONS = {"_C": "cpu", "_C_cuda": "cuda"}


def main(_: argparse.Namespace) -> int:
    """Print the report; always 0."""
    for title, lines in (
        ("Versions", versions()),
        ("Devices", devices()),
        ("Extension", extensions()),
        ("Backends", backends()),
        ("Automatic choice, fp32", (str(line) for line in explain())),
    ):
        print(title)
        for line in lines:
            print(f"  {line}")
    return 0


def versions() -> Iterator[str]:
    """Versions of this package and of those it works with."""
    yield f"adalora-kernels {__version__}"
    yield f"python {platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in _PACKAGES:
        try:
            yield f"{package} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            yield f"{package} not installed"


def devices() -> Iterator[str]:
    """The CPU with its threads, and each GPU with its compute capability and memory in GiB."""
    yield f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if not torch.cuda.is_available():
        built = "has CUDA but finds no GPU" if torch.version.cuda else "is built without CUDA"
        yield f"cuda: none, this PyTorch {built}"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        yield f"cuda:{index}: {properties.name}, capability {capability}, {properties.total_memory / 2**30:.0f} GiB"


def extensions() -> Iterator[str]:
    """Which of the compiled modules are loaded."""
    for module, device in _EXTENSIONS.items():
        reason = native.unavailable_reason(device)
        if reason is not None:
            yield f"{module}: not loaded, {reason}"
        else:
            yield f"{module}: loaded" + (f", instruction set {native.instruction_set()}" if device == "cpu" else "")


def backends() -> Iterator[str]:
    """Each backend on each device type: whether it can run, or why not."""
    for backend in Backend:
        for device in ("cpu", "cuda"):
            reason = unavailable_reason(backend, device)
            if reason is None and device == "cuda" and not torch.cuda.is_available():
                reason = "there is no GPU"
            yield f"{backend.value} on {device}: {'can run' if reason is None else f'cannot run, {reason}'}"
        if plans := plans_of(backend):
            yield f"{backend.value}'s plans of the layer, as in {backend.value}:forward/backward: {', '.join(plans)}"
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    yield f"{ENVIRONMENT_VARIABLE}: {named or 'not set, the choice is automatic'}"


__all__ = ["backends", "devices", "extensions", "main", "versions"]
