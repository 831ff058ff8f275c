"""Models whose layers read the same tensor, or not, and what is compared of them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn

from adalora_kernels.integrations.peft import patch_model
from adalora_kernels.integrations.siblings import Siblings
from tests.integrations.small_models import adapter_parameters, batch

LLAMA = {"layers": 1, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}


def linked(model: nn.Module) -> list[Siblings]:
    return list({id(s): s for m in model.modules() if (s := vars(m).get("_siblings")) is not None}.values())


def nodes(loss: Tensor) -> Counter[str]:
    """How often each kind of node is in the graph of a loss."""
    seen, queue = set[Any](), [loss.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue += [following for following, _ in node.next_functions]
    return Counter(node.name() for node in seen)


def steps(model: nn.Module, count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Loss and gradients of each step of AdamW."""
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2)
    found = []
    for step in range(count):
        torch.manual_seed(seed + step)
        loss = model(**batch(model, seed=step)).loss
        loss.backward()
        grads = {name: p.grad.clone() for name, p in adapter_parameters(model).items()}
        found.append({"loss": loss.detach(), **grads})
        optimizer.step()
        optimizer.zero_grad()
    return found


class Block(nn.Module):
    """q, k and v of x in turn; ``between`` is called with x before k, and ``last`` says whether v is called."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 6, bias=False), nn.Linear(8, 6)
        self.between: Callable[[Tensor], Tensor] = lambda x: x
        self.last = True

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        total = self.q(x).sum(-1) * self.k(self.between(x)).sum(-1)
        return total + self.v(x).square().sum(-1) if self.last else total


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def pair(**settings: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model whose layers run alone, one that knows which are siblings, in evaluation and fp64, and their input."""
    torch.manual_seed(0)
    config = AdaLoraConfig(target_modules=["q", "k", "v"], total_step=9, init_r=4, **settings)
    model = get_peft_model(Outer(), config).double()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    alone = patch_model(model.eval(), siblings=False)
    ours = patch_model(copy.deepcopy(alone), siblings=True)
    x = torch.randn(3, 8, dtype=torch.float64)
    with torch.no_grad():
        ours(x)
    return alone, ours, x


def block(model: nn.Module) -> Block:
    return model.get_base_model().block


def assert_same(alone: nn.Module, ours: nn.Module, x: Tensor) -> None:
    """Output and all gradients."""
    results = []
    for model in (alone, ours):
        leaves = [leaf := x.clone().requires_grad_(), *adapter_parameters(model).values()]
        y = model(leaf)
        results.append([y, *torch.autograd.grad(y.sum(), leaves, allow_unused=True)])
    for got, want in zip(*results[::-1], strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want)
    assert all(not s._frames for s in linked(ours))
