"""Text and base models that the tests of runs share."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from benchmarks.paper.standin import base, rows
from tests.benchmarks.paper.small import SETTINGS


@pytest.fixture(scope="session")
def parts() -> rows.Parts:
    """A corner of the standard library."""
    return rows.read(Path(sysconfig.get_path("stdlib")) / "email")


@pytest.fixture(scope="session")
def bases(parts: rows.Parts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folder of each kind's base model."""
    folder = tmp_path_factory.mktemp("bases")
    return {kind: str(base.pretrained(kind, base.Text.of(parts), SETTINGS, folder)) for kind in base.KINDS}
