"""PEFT in a folder of its own, with its tests: the wheel, and ``peft_tests`` from the source distribution.

The tests go by another name than the folder they come from, since that one is called as ours.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

TESTS = "peft_tests"


def newest() -> str:
    """The newest release of PEFT that the index has."""
    asked = _pip("index", "versions", "peft")
    found = re.match(r"peft \(([\d.]+)\)", asked)
    if found is None:
        raise RuntimeError(f"pip index versions peft: expected 'peft (version)' first, got {asked!r}")
    return found[1]


def obtain(version: str, build: Path) -> Path:
    """The folder ``peft-<version>`` in ``build``, to put on PYTHONPATH; downloaded where it isn't there yet."""
    folder = build / f"peft-{version}"
    if folder.exists():
        return folder
    unfinished = build / f"peft-{version}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    downloads = unfinished / "downloads"
    for kind in (("--only-binary", ":all:"), ("--no-binary", ":all:", "--no-build-isolation")):
        _pip("download", "--quiet", "--no-deps", *kind, "--dest", str(downloads), f"peft=={version}")
    with zipfile.ZipFile(next(downloads.glob("*.whl"))) as wheel:
        wheel.extractall(unfinished)
    with tarfile.open(next(downloads.glob("*.tar.gz"))) as source:
        source.extractall(downloads, filter="data")
    source_folder = downloads / f"peft-{version}"
    (source_folder / "tests").rename(unfinished / TESTS)
    (source_folder / "pyproject.toml").rename(unfinished / "pyproject.toml")  # pytest's settings
    (unfinished / TESTS / "__init__.py").touch()
    shutil.rmtree(downloads)
    unfinished.rename(folder)
    return folder


def _pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout
