"""SVDLinear: the original class's names, behaviour and state_dict."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adalora_kernels import SVDLinear


def layer(**kwargs: object) -> SVDLinear:
    made = SVDLinear(12, 9, r=4, lora_alpha=8, **kwargs)  # type: ignore[arg-type]
    nn.init.normal_(made.lora_E)
    return made


def expression(m: SVDLinear, x: Tensor) -> Tensor:
    """The original's forward: scaling / (ranknum + 1e-5), Λ folded into A."""
    w = m.weight.t() if m.fan_in_fan_out else m.weight
    return F.linear(x, w, m.bias) + (x @ (m.lora_A * m.lora_E).T @ m.lora_B.T) * m.scaling / (m.ranknum + 1e-5)


@pytest.mark.parametrize("fan_in_fan_out", (False, True))
@pytest.mark.parametrize("bias", (False, True))
def test_forward_equals_the_original_expression(fan_in_fan_out: bool, bias: bool) -> None:
    m, x = layer(fan_in_fan_out=fan_in_fan_out, bias=bias, dtype=torch.float64), torch.randn(3, 5, 12).double()
    torch.testing.assert_close(m(x), expression(m, x))
    assert m.weight.shape == ((12, 9) if fan_in_fan_out else (9, 12))


def test_state_dict_has_the_original_names() -> None:
    assert set(layer().state_dict()) == {"weight", "bias", "lora_A", "lora_E", "lora_B", "ranknum"}
    assert set(SVDLinear(12, 9).state_dict()) == {"weight", "bias"}
    assert [n for n, p in layer().named_parameters() if p.requires_grad] == ["bias", "lora_A", "lora_E", "lora_B"]


def test_initial_increment_is_zero() -> None:
    m, x = SVDLinear(200, 300, r=16), torch.randn(3, 200)
    assert torch.equal(m(x), F.linear(x, m.weight, m.bias))
    assert not m.lora_E.any()
    assert abs(m.lora_A.std().item() - 0.02) < 0.002 and abs(m.lora_B.std().item() - 0.02) < 0.002
    assert m.ranknum.item() == 16 and not m.ranknum.requires_grad and not m.weight.requires_grad


@pytest.mark.parametrize(("alpha", "c"), ((8, 8 / 4.00001), (0, 4 / 4.00001), (-1, 4 / 4.00001)))
def test_scale(alpha: int, c: float) -> None:
    assert SVDLinear(12, 9, r=4, lora_alpha=alpha).c == pytest.approx(c, rel=1e-12)


def test_rank_zero_is_a_plain_linear() -> None:
    m, x = SVDLinear(12, 9, r=0), torch.randn(3, 12)
    assert torch.equal(m(x), F.linear(x, m.weight, m.bias)) and m.weight.requires_grad
    m.eval()
    m.merge()
    assert not m.merged


@pytest.mark.parametrize("fan_in_fan_out", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_merge_is_exactly_undone(fan_in_fan_out: bool, dtype: torch.dtype) -> None:
    m, x = layer(fan_in_fan_out=fan_in_fan_out, dtype=dtype), torch.randn(3, 12, dtype=dtype)
    frozen, before = m.weight.detach().clone(), m(x)
    m.eval()
    assert m.merged and not torch.equal(m.weight, frozen)
    torch.testing.assert_close(m(x), before, **({"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {}))
    assert torch.equal(m.state_dict()["weight"], frozen), "a checkpoint holds the frozen weight, merged or not"
    m.train()
    assert not m.merged and torch.equal(m.weight, frozen) and torch.equal(m(x), before)


def test_merge_follows_the_original() -> None:
    """A parent's eval() reaches a layer as train(False), which doesn't merge; merge_weights=False never does."""
    m = layer()
    nn.Sequential(m).eval()
    assert not m.merged and not m.training
    other = layer(merge_weights=False)
    other.eval()
    assert not other.merged
    other.merge()
    other.merge()
    assert other.merged
    other.unmerge()
    other.unmerge()
    assert not other.merged


def test_loading_into_a_merged_layer() -> None:
    source, target, x = layer(), layer(), torch.randn(3, 12)
    target.eval()
    target.load_state_dict(source.state_dict())
    assert target.merged
    torch.testing.assert_close(target(x), source(x))
    target.train()
    assert torch.equal(target.weight, source.weight)


def test_loaded_ranknum_scales() -> None:
    """The original reads ranknum in each forward; here once per load, so that no forward waits for the device."""
    m, x = layer(dtype=torch.float64), torch.randn(3, 12).double()
    m.load_state_dict(m.state_dict() | {"ranknum": torch.tensor([7.0])})
    torch.testing.assert_close(m(x), expression(m, x))


def test_dropout_in_training_only() -> None:
    m, x = layer(lora_dropout=0.5, merge_weights=False), torch.randn(3, 12)
    assert not torch.equal(m(x), m(x))
    m.eval()
    assert torch.equal(m(x), m(x))


@pytest.mark.parametrize("duplicate", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))))
def test_copies(duplicate: object) -> None:
    m, x = layer(), torch.randn(3, 12)
    assert torch.equal(duplicate(m)(x), m(x))  # type: ignore[operator]
    m.eval()
    assert torch.equal(duplicate(m)(x), m(x))  # type: ignore[operator]


def test_half_while_merged() -> None:
    m = layer()
    frozen = m.weight.detach().clone()
    m.eval()
    m.to(torch.bfloat16).train()
    assert torch.equal(m.weight, frozen.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"r": -1}, "^r: expected"),
        ({"r": 2.5}, "^r: expected a whole number, got 2.5"),
        ({"r": "4"}, "^r: expected a number, got '4'"),
        ({"lora_alpha": "8"}, "^lora_alpha: expected a number"),
        ({"lora_alpha": float("nan")}, "^lora_alpha: expected a finite number"),
        ({"lora_dropout": 1.5}, "^lora_dropout: expected"),
        ({"lora_dropout": "0.1"}, "^lora_dropout: expected a number"),
        ({"backend": "x"}, "^backend:"),
    ),
)
def test_bad_input(arguments: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        SVDLinear(3, 4, **arguments)  # type: ignore[arg-type]


def test_compiles_as_a_whole() -> None:
    m, x = layer(), torch.randn(5, 12)
    torch.testing.assert_close(torch.compile(m, fullgraph=True)(x), m(x))


def test_trains_with_any_optimizer() -> None:
    m, x = layer(), torch.randn(32, 12)
    optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (m(x) - x[:, :9]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
