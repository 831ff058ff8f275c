"""What tests of CUDA sources share."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.csrc.emulation import Emulation


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    """The kernels on the CPU."""
    if sys.platform != "linux" or not all(map(shutil.which, ("c++", "objcopy"))):
        pytest.skip("no Linux with a C++ compiler and objcopy")
    return Emulation(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="session")
def emulated_ops(emulation: Emulation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of the ops around them; see ``Emulation.with_ops``."""
    return emulation.with_ops(tmp_path_factory.mktemp("ops"))
