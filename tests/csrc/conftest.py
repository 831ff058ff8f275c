"""What tests of CUDA sources share."""

from __future__ import annotations

import shutil

import pytest

from tests.csrc.emulation import Emulation


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    """The kernels on the CPU."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    return Emulation(tmp_path_factory.mktemp("emulated"))
