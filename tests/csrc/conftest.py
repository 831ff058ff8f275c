"""What tests of CUDA sources share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.csrc.emulation import Emulation


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    """The kernels on the CPU."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    return Emulation(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="session")
def emulated_ops(emulation: Emulation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of the ops around them; see ``Emulation.with_ops``."""
    return emulation.with_ops(tmp_path_factory.mktemp("ops"))
