"""The launchers for CUDA and the host's C++ behind them, around kernels that run on the CPU."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adalora_kernels.backends import native
from tests.backends.test_native_importance import DTYPES, Case, run
from tests.csrc.emulation import Emulation
from tests.csrc.test_emulated_finish import Model


@pytest.fixture
def launchers(emulated_ops: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``backends.native``, its ops those of ``_C_cuda`` made for tensors on the CPU."""
    torch.ops.load_library(str(emulated_ops))
    monkeypatch.setattr(torch.ops, "adalora_native", torch.ops.adalora_emulated)
    monkeypatch.setattr(native, "_ops", lambda device_type: torch.ops.adalora_emulated)
    return native


def test_importance_update(launchers: Any, emulation: Emulation) -> None:
    case, choice = Case(((12, 300, 200), (4, 64, 1000), (0, 3, 3), (16, 31, 17)), DTYPES), random.Random(0)
    for grads in case.grads:
        grads[:] = [g.to(DTYPES[i % len(DTYPES)]) for i, g in enumerate(grads)]
        for i in choice.sample(range(len(grads)), 4):
            grads[i] = None  # type: ignore[call-overload]
    expected = run(emulation.importance_update, case, case.params, case.grads, case.fresh())

    def strided(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.stack((tensor, torch.full_like(tensor, torch.nan)), -1)[..., 0]

    steps = [[strided(g) for g in grads] for grads in case.grads]
    actual = run(launchers.importance_update, case, [strided(p) for p in case.params], steps, case.fresh())
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.shares.__setitem__(0, (m.shares[0][0][:, 1:], m.shares[0][1])), "t_shares"),
        (lambda m: m.shares.__setitem__(0, (m.shares[0][0], m.shares[0][1][:, :, :9])), "a_shares"),
        (lambda m: m.shares.__setitem__(0, (m.shares[0][0].double(), m.shares[0][1])), "t_shares"),
        (lambda m: m.before.__setitem__(0, torch.zeros(12, 300, dtype=torch.bfloat16)), "before"),
        (lambda m: m.before.__setitem__(2, torch.zeros(12, 77)), "before"),
        (lambda m: setattr(m, "state", m.state.double()), "state"),
        (lambda m: setattr(m, "state", m.state[..., 1:].contiguous()), "first"),
        (lambda m: setattr(m, "half", m.half.long()), "half"),
        (lambda m: setattr(m, "ticket", m.ticket.float()), "ticket"),
        (lambda m: m.terms.__setitem__(0, m.terms[0]._replace(slopes=m.terms[0].slopes[3:])), "slopes"),
        (lambda m: m.adapters.__setitem__(0, m.adapters[0]._replace(mask=torch.ones(5))), "mask"),
        (lambda m: m.adapters.__setitem__(0, m.adapters[0]._replace(lora_B=torch.zeros(5, 12))), "t_shares"),
    ],
)
def test_bad_arguments_change_nothing(launchers: Any, change: Any, message: str) -> None:
    model = Model(((12, 300, 77),), term=True)
    change(model)
    before = model.state.clone()
    with pytest.raises(RuntimeError, match=message):
        model.finish(launchers)
    torch.testing.assert_close(model.state, before, rtol=0, atol=0, equal_nan=True)


def test_ranks_beyond_a_block_are_refused(launchers: Any) -> None:
    with pytest.raises(RuntimeError, match="rank from 1 to 128, got 129"):
        Model(((129, 4, 4),)).finish(launchers)


NO_GPU = pytest.mark.skipif(native.unavailable_reason("cuda") is not None, reason="no CUDA, or built without nvcc")


@pytest.mark.parametrize("mode", ["interpreted", pytest.param("compiled", marks=NO_GPU)])
def test_training(request: pytest.FixtureRequest, mode: str) -> None:
    """Layers on Triton, importance and masking in CUDA C++, through the public classes, in a process of its own."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
    environment["TRITON_INTERPRET"] = "1" if mode == "interpreted" else "0"
    if mode == "interpreted":
        environment["ADALORA_EMULATED_OPS"] = str(request.getfixturevalue("emulated_ops"))
    cases = Path(__file__).with_name("emulated_training_cases.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", "-q", "-rA", str(cases)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    report = child.stdout + child.stderr
    assert child.returncode == 0 and re.search(r"\d+ passed", report), report
