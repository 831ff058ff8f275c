"""The choice of a backend, as a pure function."""

from __future__ import annotations

import logging

import pytest
import torch

from adalora_kernels import SVDLinear, explain
from adalora_kernels.backends.select import (
    BY_SHAPE,
    OPS,
    Backend,
    Request,
    choose,
    offers,
    parse,
    parse_request,
    plans_of,
    select,
)

ALL = dict.fromkeys(Backend).get
NONE = {Backend.REFERENCE: None, Backend.NATIVE: "not built", Backend.TRITON: "not installed"}.get


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("rank", (0, 1, 8, 16, 64, 128))
def test_supported_cuda_layers_never_select_the_reference(dtype: torch.dtype, rank: int) -> None:
    chosen = choose("svd_linear", "cuda", dtype, rank, None, ALL)
    assert (chosen.backend, chosen.plan) == (Backend.TRITON, BY_SHAPE)


@pytest.mark.parametrize("op", [op for op in OPS if op != "svd_linear"])
def test_supported_cuda_budget_engine_never_selects_the_reference(op: str) -> None:
    chosen = choose(op, "cuda", torch.float32, 0, None, ALL)
    assert chosen.backend is Backend.TRITON and "not measured" in chosen.reason
    named = choose(op, "cuda", torch.float32, 0, Request(Backend.TRITON, "one_pass"), ALL)
    assert (named.plan, named.plan_asked_for) == (chosen.plan, None)


def test_fp64_on_cuda() -> None:
    for op in ("importance", "allocation"):
        assert choose(op, "cuda", torch.float64, 0, None, ALL).backend is Backend.NATIVE
    assert choose("adamw", "cuda", torch.float64, 0, None, ALL).backend is Backend.REFERENCE


@pytest.mark.parametrize("op", OPS)
def test_cpu_selects_native(op: str) -> None:
    assert choose(op, "cpu", torch.float32, 8, None, ALL).backend is Backend.NATIVE


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", ("cpu", "cuda", "mps", "xpu"))
def test_automatic_choice_never_fails(op: str, device: str) -> None:
    chosen = choose(op, device, torch.float64, 1000, None, NONE)
    assert chosen.backend is Backend.REFERENCE and chosen.reason


def test_reason_says_what_was_passed_over() -> None:
    assert "not installed" in choose("svd_linear", "cuda", torch.float32, 8, None, NONE).reason
    assert "float64" in choose("svd_linear", "cuda", torch.float64, 8, None, ALL).reason
    assert "up to 128, got 200" in choose("svd_linear", "cuda", torch.float32, 200, None, ALL).reason


@pytest.mark.parametrize(
    ("op", "device", "dtype", "rank", "backend", "reason"),
    (
        ("svd_linear", "cuda", torch.float32, 8, Backend.NATIVE, "native has no svd_linear for cuda"),
        ("svd_linear", "cuda", torch.float64, 8, Backend.TRITON, "not in float64"),
        ("svd_linear", "cuda", torch.float32, 129, Backend.TRITON, "up to 128, got 129"),
        ("importance", "cuda", torch.float64, 0, Backend.TRITON, "not in float64"),
    ),
)
def test_named_backend_that_cannot_run_raises(
    op: str, device: str, dtype: torch.dtype, rank: int, backend: Backend, reason: str
) -> None:
    with pytest.raises(RuntimeError, match=reason):
        choose(op, device, dtype, rank, Request(backend), ALL)
    with pytest.raises(RuntimeError, match=r"not (built|installed)"):
        choose("svd_linear", "cpu", torch.float32, 8, Request(Backend.NATIVE), NONE)


def test_variable_binds_what_its_backend_offers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADALORA_KERNELS_BACKEND", "reference")
    assert all(select(op, "cpu", torch.float32, 8).backend is Backend.REFERENCE for op in OPS)
    assert select("svd_linear", "cpu", torch.float32, 8, "native").backend is Backend.NATIVE
    assert not offers(Backend.NATIVE, "nonsense")
    on_cuda = [op for op in OPS if offers(Backend.NATIVE, op, "cuda")]
    assert on_cuda == ["importance", "allocation"]  # the others are not bound there, and not refused
    monkeypatch.setenv("ADALORA_KERNELS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match=r"got 'nonsense'"):
        select("svd_linear", "cpu", torch.float32, 8)


def test_parse() -> None:
    assert parse(None) is None and parse("auto") is None and parse("native") is Backend.NATIVE
    assert parse(Backend.TRITON) is Backend.TRITON
    assert parse("triton:one_pass/split") is Backend.TRITON


@pytest.mark.parametrize("plan", ("one_pass", "one_pass/split", "/split", "one_pass/"))
def test_plan_asked_for_by_name(plan: str) -> None:
    request = parse_request(f"triton:{plan}")
    assert request == Request(Backend.TRITON, plan)
    chosen = choose("svd_linear", "cuda", torch.float32, 8, request, ALL)
    assert (chosen.plan, chosen.plan_asked_for, chosen.reason) == (plan, plan, "asked for by name")
    assert choose("svd_linear", "cuda", torch.float32, 8, Request(Backend.TRITON), ALL).plan_asked_for is None


@pytest.mark.parametrize(
    ("backend", "message"),
    (
        ("triton:nonsense", r"backend: expected a forward plan of triton \(published, .*one_pass.*\), got 'nonsense'"),
        ("triton:one_pass/one_pass", r"backend: expected a backward plan of triton \(.*split.*\), got 'one_pass'"),
        ("triton:split", "backend: expected a forward plan"),
        ("triton:/", "backend: expected a plan of triton before or after the slash"),
        ("triton:", "backend: expected a forward plan of triton"),
        ("native:accumulate", "backend: expected no plan, since native has but one; got 'native:accumulate'"),
        ("reference:", "backend: expected no plan, since reference has but one"),
        ("cuda:one_pass", "backend: expected one of auto, reference, native, triton; got 'cuda:one_pass'"),
    ),
)
def test_unknown_plans(backend: str, message: str) -> None:
    for call in (parse, parse_request, lambda name: select("svd_linear", "cpu", torch.float32, 8, name)):
        with pytest.raises(ValueError, match=message):
            call(backend)


def test_plans_of_a_backend_are_what_it_can_be_asked_for() -> None:
    assert {"one_pass", "delta", "/split"} <= set(plans_of(Backend.TRITON))
    assert not plans_of(Backend.NATIVE) and not plans_of(Backend.REFERENCE)
    for plan in plans_of(Backend.TRITON):
        assert parse_request(f"triton:{plan}") == Request(Backend.TRITON, plan)


def test_backend_that_is_no_name() -> None:
    with pytest.raises(TypeError, match="backend: expected a name or None, got list"):
        parse(["triton"])  # type: ignore[arg-type]


def test_variable_may_carry_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADALORA_KERNELS_BACKEND", "triton:nonsense")
    with pytest.raises(ValueError, match="got 'nonsense'"):
        select("svd_linear", "cpu", torch.float32, 8)
    monkeypatch.setenv("ADALORA_KERNELS_BACKEND", "triton:one_pass")
    with pytest.raises(RuntimeError, match="backend 'triton' can't run svd_linear on cpu"):
        select("svd_linear", "cpu", torch.float32, 8)


def test_reason_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="adalora_kernels"):
        for _ in range(3):
            select("svd_linear", "cpu", torch.float32, 41)
            select("svd_linear", "cpu", torch.float64, 41)
    assert sum("svd_linear" in r.message for r in caplog.records) <= 1


def test_explain() -> None:
    lines = {e.name: e for e in explain()}
    assert set(lines) == set(OPS)
    layer = SVDLinear(8, 6, r=4)
    (line,) = explain(torch.nn.Sequential(layer))
    assert (line.name, line.backend, line.plan) == ("0", "native", "accumulate")
    (call,) = explain(torch.randn(3, 8), layer.weight, layer.lora_A, layer.lora_E, layer.lora_B, backend="reference")
    assert (call.backend, call.reason) == ("reference", "asked for by name")
    layer.eval()
    assert explain(layer)[0].reason == "the increment is merged"
    foreign = torch.nn.Module()
    foreign.lora_A = foreign.lora_E = foreign.lora_B = torch.nn.ParameterDict()
    assert explain(foreign)[0].backend == "none"
    with pytest.raises(TypeError, match=r"^target: expected"):
        explain(3)
