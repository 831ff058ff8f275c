"""The layers of the package and the legal arrows between them, read off the source; and what a bare import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import adalora_kernels

PACKAGE = Path(adalora_kernels.__file__).parent
# Each layer may import itself and what stands to the right of it here, or below it in the list.
ARROWS = {
    "reference": {"reference"},
    "backends": {"backends", "reference"},
    "ops": {"ops", "backends", "reference"},
    "nn": {"nn", "ops", "backends", "reference"},
    "allocator": {"allocator", "ops", "backends", "reference"},
    "integrations": {"integrations", "nn", "allocator", "ops", "backends", "reference"},
    "cli": {"cli", "integrations", "nn", "allocator", "ops", "backends", "reference", "adalora_kernels"},
    "testing": {"testing", "reference"},
}
# Outside packages that only some rooms may import.
ONLY_IN = {
    "triton": ("backends/triton/",),
    "peft": ("integrations/", "cli/"),
    "transformers": ("integrations/", "cli/"),
    "adalora_kernels._C": ("backends/native.py",),
    "adalora_kernels._C_cuda": ("backends/native.py", "backends/launcher.py"),
}


def imported_names(path: Path) -> set[str]:
    """Every module that a file imports, at any depth, type-checking blocks included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def sources() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path) -> None:
    allowed = ARROWS[room(path)]
    for name in imported_names(path):
        parts = name.split(".")
        if parts[0] != "adalora_kernels":
            continue
        # A public name counts as its home.
        home = adalora_kernels._HOME.get(parts[1], name) if len(parts) == 2 else name
        target = home.split(".")[1] if "." in home else "adalora_kernels"
        if target.startswith("_"):
            continue  # the version, or the extension, which ONLY_IN holds
        if len(parts) == 1 and any(n.startswith("adalora_kernels.") for n in imported_names(path)):
            continue  # the package part of `from adalora_kernels import x`
        assert target in allowed, f"{path.relative_to(PACKAGE)} ({room(path)}) must not import {name}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_outside_packages_stay_in_their_rooms(path: Path) -> None:
    relative = str(path.relative_to(PACKAGE))
    for name in imported_names(path):
        for package, rooms in ONLY_IN.items():
            if name == package or name.startswith(package + "."):
                assert relative.startswith(rooms), f"{relative} must not import {name}"


def test_reference_needs_torch_alone() -> None:
    for path in (PACKAGE / "reference").glob("*.py"):
        outside = {n.split(".")[0] for n in imported_names(path)} - set(sys.stdlib_module_names)
        assert outside <= {"torch", "adalora_kernels"}, path


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


BARE = """
import sys
for name in ('triton', 'peft', 'transformers', 'matplotlib', 'adalora_kernels._C', 'adalora_kernels._C_cuda'):
    sys.modules[name] = None  # what Python takes for a module that isn't there
import torch
import adalora_kernels as ak
"""


def test_works_with_every_option_absent() -> None:
    out = run_python(
        BARE
        + """
x = torch.randn(3, 4, requires_grad=True)
layer = ak.SVDLinear(4, 5, r=2)
torch.nn.init.normal_(layer.lora_E)
layer(x).sum().backward()
assert layer.lora_E.grad.abs().sum() > 0
print([(e.name, e.backend) for e in ak.explain()])
for name in ('patch_model', 'AdaLoraCallback'):
    try:
        getattr(ak, name)
    except ImportError as error:
        print(name, error)
"""
    )
    assert out.count("'reference'") == 5
    assert "patch_model" in out and "peft" in out


def test_import_costs_little_beyond_torch() -> None:
    """Under 50 ms: the best of five, since another process may be at work on the same cores."""
    code = "import torch, time; t = time.perf_counter(); import adalora_kernels; print(time.perf_counter() - t)"
    times = [float(run_python(code)) for _ in range(5)]
    assert min(times) < 0.050, times


def test_bare_import_loads_no_option() -> None:
    out = run_python(
        "import torch, sys; before = set(sys.modules); import adalora_kernels;"
        "print(sorted(m for m in set(sys.modules) - before))"
    )
    assert "triton" not in out and "peft" not in out and "transformers" not in out and "_C" not in out


def test_public_names_exist() -> None:
    for name in adalora_kernels.__all__:
        assert getattr(adalora_kernels, name) is not None
    assert set(adalora_kernels.__all__) <= set(dir(adalora_kernels))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = adalora_kernels.nonsense
