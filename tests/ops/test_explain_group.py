"""``explain`` of a call of ``svd_linear_group``: its backend, plan and reason, and the errors of the call."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from adalora_kernels import explain
from adalora_kernels.backends.select import BY_SHAPE, Backend, Selection
from adalora_kernels.ops.svd_linear_group import GroupedLayer
from adalora_kernels.testing.inputs import layer_inputs

ops_explain = import_module("adalora_kernels.ops.explain")  # the function of its name hides it
RANKS = (16, 16, 8)


def layers() -> list[GroupedLayer]:
    made = [layer_inputs(40, 64, 48, r, torch.float32, torch.float32, seed=i) for i, r in enumerate(RANKS)]
    return [GroupedLayer(i.weight, i.lora_A, i.lora_E, i.lora_B, i.bias) for i in made]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_one_by_one(backend: str) -> None:
    (line,) = explain(torch.randn(4, 10, 64), layers(), backend=backend)
    assert (line.name, line.backend) == ("svd_linear_group", backend)
    assert line.reason.endswith("3 layers one by one in one node of the autograd graph")
    assert explain(torch.randn(40, 64), layers=[tuple(layer) for layer in layers()], backend=backend) == [line]


@pytest.mark.parametrize(
    ("asked", "dropout_p", "training", "plan"),
    [
        ("shrink_tail/blas", 0.0, True, "stack/stack"),
        ("shrink_tail/split", 0.0, True, "stack/one by one: split"),
        ("shrink_tail/blas", 0.1, True, "one by one: shrink_tail/one by one: blas"),
        ("shrink_tail/blas", 0.1, False, "stack/stack"),
    ],
)
def test_on_triton(asked: str, dropout_p: float, training: bool, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    found = Selection(Backend.TRITON, BY_SHAPE, "asked for by name", "", asked)
    monkeypatch.setattr(ops_explain, "select", lambda *_: found)
    (line,) = explain(torch.randn(4, 512, 64), layers(), dropout_p=dropout_p, training=training, backend="triton")
    assert (line.backend, line.plan) == ("triton", plan)
    assert line.configuration.startswith("group_shrink " if plan.startswith("stack") else "shrink ")
    assert line.reason.startswith("asked for by name; forward: ")


def test_errors() -> None:
    x = torch.randn(40, 64)
    with pytest.raises(ValueError, match="layers: expected at least one layer, got none"):
        explain(x, [])
    with pytest.raises(RuntimeError, match="triton"):
        explain(x, layers(), backend="triton:shrink_tail")
    with pytest.raises(TypeError, match="unexpected keyword argument 'bias'"):
        explain(x, layers(), bias=None)
