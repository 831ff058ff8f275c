"""PEFT's AdaLoRA layers over quantised bases: bitsandbytes in 4 and 8 bits, GPTQ. The base runs as it is.

PEFT copies a 4-bit base's output before it adds the increment, and for an 8-bit base makes a new sum, in fp32 whatever
the base's dtype. Here the increment is added into the base's output, in its dtype. State, checkpoints, and what these
layers refuse (they can't be merged) are PEFT's. Quantised bases under PEFT's ``SVDLinear`` (torchao, float8, subclasses
of ``nn.Linear``) are in ``svd_layer``.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.adalora.gptq import SVDQuantLinear
from torch import Tensor

from adalora_kernels.integrations.increment import FusedIncrement, is_readable, may_keep_output


class _OverQuantizedBase(FusedIncrement):
    """The layer as the base's output with the increments added into it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's: the base where adapters are disabled, else also each active adapter's increment.

        Args:
            x: [..., K].
            args, kwargs: handed to the base layer.

        Returns:
            [..., N] in the dtype that the base answers in.

        Raises:
            RuntimeError: this is a replica that ``nn.DataParallel`` made.
        """
        adapters = self._adapters_in_use()
        if not adapters or not is_readable(x) or self._foreign_part(adapters) is not None:
            return self._pefts_forward(x, *args, **kwargs)
        base = self._base()
        result = base(x, *args, **kwargs)
        if may_keep_output(base):
            result = result.clone()  # what was kept stays the base's alone, as in PEFT
        return self._add_increments(result, x, adapters)

    def _base(self) -> Any:
        return self._modules["base_layer"]

    def _pefts_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = super().forward(x, *args, **kwargs)
        return y


class FusedSVDQuantLinear(_OverQuantizedBase, SVDQuantLinear):
    """In place of PEFT's ``SVDQuantLinear``, over a base of GPTQ."""

    def _base(self) -> Any:
        return self._modules["quant_linear_module"]  # which is what PEFT calls


QUANTIZED: dict[type, type[FusedIncrement]] = {SVDQuantLinear: FusedSVDQuantLinear}

if is_bnb_available():
    from peft.tuners.adalora.bnb import SVDLinear8bitLt

    class FusedSVDLinear8bitLt(_OverQuantizedBase, SVDLinear8bitLt):
        """In place of PEFT's ``SVDLinear8bitLt``, over ``bitsandbytes.nn.Linear8bitLt``."""

        def _pefts_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = super()._pefts_forward(x, *args, **kwargs)
            # PEFT's sum is in fp32; this base answers in the dtype of x.
            return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)

    QUANTIZED[SVDLinear8bitLt] = FusedSVDLinear8bitLt

if is_bnb_4bit_available():
    from peft.tuners.adalora.bnb import SVDLinear4bit

    class FusedSVDLinear4bit(_OverQuantizedBase, SVDLinear4bit):
        """In place of PEFT's ``SVDLinear4bit``, over ``bitsandbytes.nn.Linear4bit``."""

    QUANTIZED[SVDLinear4bit] = FusedSVDLinear4bit


__all__ = ["QUANTIZED", "FusedSVDQuantLinear"]
