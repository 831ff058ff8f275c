"""Second derivatives are refused: silently to take what is saved for constants would be wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adalora_kernels import svd_linear
from adalora_kernels.ops.orthogonality import orthogonality_loss
from adalora_kernels.ops.svd_linear_group import GroupedLayer, svd_linear_group
from adalora_kernels.testing.inputs import layer_inputs


def layer(a: Tensor) -> Tensor:
    i = layer_inputs(5, 13, 3, 2)
    return svd_linear(i.x, i.weight, a, i.lora_E, i.lora_B).sum()


def group(a: Tensor) -> Tensor:
    i = layer_inputs(5, 13, 3, 2)
    one = GroupedLayer(i.weight, a, i.lora_E, i.lora_B)
    return torch.stack(svd_linear_group(i.x, [one, one])).sum()


def orthogonality(a: Tensor) -> Tensor:
    return orthogonality_loss([a], [torch.ones(3, 2)], 0.1)


@pytest.mark.parametrize("made", [layer, group, orthogonality])
def test_gradients_of_gradients(made: Callable[[Tensor], Tensor]) -> None:
    a = layer_inputs(5, 13, 3, 2).lora_A.requires_grad_()
    (once,) = torch.autograd.grad(made(a), a)
    (grad,) = torch.autograd.grad(made(a), a, create_graph=True)
    assert torch.equal(grad, once)
    with pytest.raises(RuntimeError, match="no kernel has second derivatives"):
        grad.sum().backward()
