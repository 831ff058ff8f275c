"""These tests need PEFT, and leave it unpatched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def unpatched_peft() -> Iterator[None]:
    """A test that patches PEFT and fails doesn't patch the next one."""
    from adalora_kernels.integrations.peft import unpatch_peft

    yield
    unpatch_peft()
