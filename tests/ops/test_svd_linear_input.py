"""What the layer's call refuses: the message names the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adalora_kernels import svd_linear
from adalora_kernels.ops.svd_linear import svd_linear_into
from adalora_kernels.testing.inputs import layer_inputs


class TestBadInput:
    def arguments(self) -> dict[str, Any]:
        i = layer_inputs(6, 9, 7, 3)
        return {n: getattr(i, n) for n in ("x", "weight", "lora_A", "lora_E", "lora_B", "bias")}

    @pytest.mark.parametrize(
        ("name", "value", "error"),
        (
            ("x", torch.randn(()), ValueError),
            ("x", torch.randn(6, 8), ValueError),
            ("x", torch.ones(6, 9, dtype=torch.int64), TypeError),
            ("x", [1.0], TypeError),
            ("weight", torch.randn(7, 8), ValueError),
            ("weight", torch.randn(7), ValueError),
            ("weight", torch.ones(7, 9, dtype=torch.int8), TypeError),
            ("weight", torch.ones(7, 9, device="meta"), ValueError),
            ("bias", torch.randn(6), ValueError),
            ("lora_A", torch.randn(3, 8), ValueError),
            ("lora_A", torch.randn(3, 9, 1), ValueError),
            ("lora_E", torch.randn(4, 1), ValueError),
            ("lora_E", torch.randn(3, 2), ValueError),
            ("lora_B", torch.randn(7, 4), ValueError),
            ("lora_B", torch.randn(7, 3, device="meta"), ValueError),
            ("mask", torch.ones(4), ValueError),
            ("mask", torch.ones(3, device="meta"), ValueError),
            ("mask", [1, 1, 1], TypeError),
            ("mask", torch.ones(3, dtype=torch.complex64), TypeError),
            ("weight", None, TypeError),
            ("lora_A", None, TypeError),
            ("dropout_p", "a", TypeError),
            ("scaling", "a", TypeError),
            ("scaling", None, TypeError),
            ("dropout_p", 1.5, ValueError),
            ("dropout_p", float("nan"), ValueError),
        ),
    )
    def test_message_names_the_argument(self, name: str, value: Any, error: type[Exception]) -> None:
        arguments = self.arguments() | {name: value}
        # A wrong x shows first in the argument that it no longer fits.
        with pytest.raises(error, match=f"^({name}|lora_A): expected" if name == "x" else f"^{name}: expected"):
            svd_linear(**arguments)

    def test_unknown_backend(self) -> None:
        with pytest.raises(ValueError, match="backend: expected one of auto, reference, native, triton; got 'cuda'"):
            svd_linear(**self.arguments(), backend="cuda")

    def test_base_output_of_another_shape(self) -> None:
        i = layer_inputs(6, 9, 7, 3)
        with pytest.raises(ValueError, match=r"^base_output: expected"):
            svd_linear_into(torch.zeros(6, 8), i.x, i.lora_A, i.lora_E, i.lora_B)
