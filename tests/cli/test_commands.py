"""The commands: what they print, and their exit statuses."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adalora_kernels.backends.select import Backend, unavailable_reason
from adalora_kernels.cli import check, extras, main


def test_env_names_versions_devices_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["env"]) == 0
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    for backend in Backend:
        reason = unavailable_reason(backend, "cpu")
        expected = "can run" if reason is None else f"cannot run, {reason}"
        assert f"{backend.value} on cpu: {expected}" in printed
    for op in ("svd_linear", "importance", "allocation", "orthogonality"):
        assert f"{op}: " in printed


def test_check_holds_for_every_backend_that_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    status = main.main(["check"])
    printed = capsys.readouterr().out
    assert status == 0, printed
    for backend in Backend:
        able = unavailable_reason(backend, "cpu") is None
        assert f"{'ok     ' if able else 'skipped'}  {backend.value} on cpu: " in printed
    assert printed.splitlines()[-1].endswith("checks hold, 0 fail")


@pytest.mark.parametrize("factor", [1 + 1e-4, float("nan")])
def test_check_fails_for_a_wrong_result(
    factor: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = check.svd_linear
    monkeypatch.setattr(check, "svd_linear", lambda *a, **k: honest(*a, **k) * factor)
    assert main.main(["check"]) == 1
    assert "FAILED   reference on cpu: svd_linear float32" in capsys.readouterr().out


def test_check_reports_what_a_backend_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such kernel image")

    monkeypatch.setattr(check, "mask_to_budget", broken)
    assert main.main(["check"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED   reference on cpu: masking: RuntimeError: no such kernel image" in printed
    assert "ok       reference on cpu: orthogonality" in printed


@pytest.mark.parametrize("op", [check._importance, check._masking, check._orthogonality])
def test_each_check_can_fail(op: Callable[[Backend, str], Iterator[check.Result]]) -> None:
    for result in op(Backend.REFERENCE, "cpu"):
        wrong = result.actual + 1e-3 * result.exact.abs().max().float()
        assert result.holds
        assert not check.Result(result.name, wrong, result.same_dtype, result.exact).holds
        assert not check.Result(result.name, result.actual.double(), result.same_dtype, result.exact).holds


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    honest = importlib.util.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "peft" else honest(name))
    with pytest.raises(SystemExit, match=r"needs peft, of the extra 'demo': pip install 'adalora-kernels\[demo\]'"):
        main.main(["demo", "--output", str(tmp_path / "never")])
    assert not (tmp_path / "never").exists()


@pytest.mark.skipif(unavailable_reason(Backend.TRITON, "cpu") is None, reason="Triton's interpreter is on")
def test_backend_that_cannot_run_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"adalora-kernels demo: backend 'triton' can't run svd_linear on cpu"):
        main.main(["demo", "--backend", "triton", "--output", str(tmp_path / "never")])
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--steps", "5"], "expected at least 6 steps, got 5"),
        (["demo", "--steps", "many"], "expected a number, got 'many'"),
        (["demo", "--backend", "cuda"], "invalid choice: 'cuda'"),
        (["demo", "--device", "abacus"], "abacus"),
        ([], "COMMAND"),
        (["nonsense"], "invalid choice"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_unknown_backend_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADALORA_KERNELS_BACKEND", "foo")
    with pytest.raises(SystemExit, match=r"ADALORA_KERNELS_BACKEND: backend: expected one of .*got 'foo'"):
        main.main(["env"])
