"""``SVDLinear``: a linear layer with an AdaLoRA adapter, a drop-in for the class of the original package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adalora_kernels.backends.select import Backend, parse
from adalora_kernels.ops.checks import check_number
from adalora_kernels.ops.explain import described, explain_layer
from adalora_kernels.ops.shards import are_sharded
from adalora_kernels.ops.svd_linear import svd_linear

_PARAMETERS = ("weight", "bias", "lora_A", "lora_E", "lora_B")


class SVDLinear(nn.Linear):
    """y = x Wᵀ + b + c · (drop(x) Aᵀ ⊙ E) Bᵀ with W and ranknum frozen and c = scaling / (ranknum + 1e-5).

    Names, initialisation and ``state_dict`` are those of the original package (QingruZhang/AdaLoRA, loralib):
    ``weight``, ``bias``, ``lora_A`` [r, in], ``lora_E`` [r, 1], ``lora_B`` [out, r], ``ranknum`` [1]; with r = 0 it is
    a plain linear. ``ranknum`` is a constant, the initial rank; pruning does not change it.

    With ``merge_weights`` calling this layer's own ``eval()`` folds the increment into ``weight`` and ``train()``
    takes it out, as in the original; ``merge()`` and ``unmerge()`` do it by name. The frozen weight is kept meanwhile,
    so that going back is exact, and ``state_dict`` always holds it, merged or not.

    Args:
        in_features: K.
        out_features: N.
        r: initial rank R, at least 0.
        lora_alpha: the numerator of c if positive; otherwise r is.
        lora_dropout: probability of dropping an element of x before A.
        fan_in_fan_out: whether ``weight`` is stored as [in, out].
        merge_weights: whether ``eval()`` merges.
        backend: of the layer, as in ``adalora_kernels.svd_linear``; None for the best that can run.
        **kwargs: ``bias``, ``device``, ``dtype`` of nn.Linear.

    Raises:
        TypeError: a setting is no number.
        ValueError: a negative rank, a probability outside [0, 1], or an unknown backend.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        *,
        backend: str | Backend | None = None,
        **kwargs: Any,
    ) -> None:
        check_number("r", r, whole=True)
        check_number("lora_alpha", lora_alpha)
        check_number("lora_dropout", lora_dropout)
        if r < 0:
            raise ValueError(f"r: expected a rank of at least 0, got {r}")
        if not 0.0 <= lora_dropout <= 1.0:
            raise ValueError(f"lora_dropout: expected a probability in [0, 1], got {lora_dropout}")
        super().__init__(in_features, out_features, **kwargs)
        self.r = r = int(r)
        self.lora_alpha = lora_alpha
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self.fan_in_fan_out = fan_in_fan_out
        self.merge_weights = merge_weights
        parse(backend)  # an unknown name is refused here, not at the first call
        self.backend = backend
        self._frozen_weight: Tensor | None = None
        if r > 0:
            self.lora_A = nn.Parameter(self.weight.new_empty(r, in_features))
            self.lora_E = nn.Parameter(self.weight.new_empty(r, 1))
            self.lora_B = nn.Parameter(self.weight.new_empty(out_features, r))
            self.ranknum = nn.Parameter(self.weight.new_full((1,), float(r)), requires_grad=False)
            self.scaling = lora_alpha if lora_alpha > 0 else float(r)
            self.weight.requires_grad = False
            self._ranknum = float(r)
            self._reset_adapter()
        if fan_in_fan_out:
            self.weight.data = self.weight.data.t().contiguous()

    def reset_parameters(self) -> None:
        """nn.Linear's initialisation for W and b; A, B ~ N(0, 0.02²) and E = 0, so that the increment starts at 0."""
        super().reset_parameters()
        if hasattr(self, "lora_A"):
            self._reset_adapter()

    def _reset_adapter(self) -> None:
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)
        nn.init.zeros_(self.lora_E)

    @property
    def merged(self) -> bool:
        """Whether ``weight`` currently holds the increment."""
        return self._frozen_weight is not None

    @property
    def c(self) -> float:
        """The factor of the increment, scaling / (ranknum + 1e-5)."""
        return self.scaling / (self._ranknum + 1e-5)

    @property
    def dropout_p(self) -> float:
        """The probability of dropping an element of x before A."""
        dropout = self._modules["lora_dropout"]  # as an attribute it would cost host time at each call
        return dropout.p if isinstance(dropout, nn.Dropout) else 0.0

    def _weight_as_n_k(self) -> Tensor:
        return self.weight.t() if self.fan_in_fan_out else self.weight

    def increment(self) -> Tensor:
        """c · B diag(E) A, [N, K], in fp32 (fp64 for fp64 adapters)."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        scaled = self.lora_E.detach().to(dtype) * self.c
        return self.lora_B.detach().to(dtype) @ (self.lora_A.detach().to(dtype) * scaled)

    def merge(self) -> None:
        """Fold the increment into ``weight``, accumulated in fp32 and rounded once. No-op if merged, or if r is 0."""
        if self.r == 0 or self.merged:
            return
        delta = self.increment()
        frozen = self.weight.data
        total = frozen.to(delta.dtype) + (delta.t() if self.fan_in_fan_out else delta)
        self._frozen_weight, self.weight.data = frozen, total.to(frozen.dtype)

    def unmerge(self) -> None:
        """Put the frozen weight back, exactly. Does nothing if not merged."""
        if self._frozen_weight is not None:
            # .to(): the module may have been moved or cast while merged.
            self.weight.data = self._frozen_weight.to(device=self.weight.device, dtype=self.weight.dtype)
            self._frozen_weight = None

    def train(self, mode: bool = True) -> SVDLinear:
        """Set the mode and unmerge, as the original class does, also when a parent module switches to evaluation."""
        super().train(mode)
        self.unmerge()
        return self

    def eval(self) -> SVDLinear:
        """Evaluation mode, merged where ``merge_weights`` is set (a parent's ``eval()`` calls ``train(False)``
        instead)."""
        super().eval()
        if self.merge_weights:
            self.merge()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """The layer for x [..., K]; see ``adalora_kernels.svd_linear`` for dtypes and errors."""
        if self.r == 0 or self.merged:
            return F.linear(x, self._weight_as_n_k(), self.bias)
        registry: dict[str, Any] = self._parameters
        try:  # as attributes they would cost host time like a launch
            weight, bias, lora_A, lora_E, lora_B = map(registry.__getitem__, _PARAMETERS)
        except KeyError:  # parametrised, or flattened by a wrapper
            weight, bias, lora_A, lora_E, lora_B = (getattr(self, name) for name in _PARAMETERS)
        return svd_linear(
            x,
            weight.t() if self.fan_in_fan_out else weight,
            lora_A,
            lora_E,
            lora_B,
            bias=bias,
            scaling=self.c,
            dropout_p=self.dropout_p,
            training=self.training,
            backend=self.backend,
        )

    def explain_layer(self) -> tuple[str, str, str, str]:
        """Backend, plan, reason and configuration, for ``adalora_kernels.explain``."""
        if self.r == 0 or self.merged:
            return "torch", "linear", "no adapter" if self.r == 0 else "the increment is merged", ""
        adapter = (self.lora_A, self.lora_E, self.lora_B)
        dropout_p = self.dropout_p if self.training else 0.0
        return described(explain_layer(self._weight_as_n_k(), *adapter, dropout_p=dropout_p, backend=self.backend))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._frozen_weight is not None:
            destination[prefix + "weight"] = self._frozen_weight.to(self.weight.device)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        was_merged = self.merged
        self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.r > 0:
            ranknum: Any = self.ranknum
            if are_sharded([ranknum]):  # it lies on one rank
                ranknum = ranknum.full_tensor()
            self._ranknum = float(ranknum)  # one host read per load, none per forward
        if was_merged:
            self.merge()

    def extra_repr(self) -> str:
        """nn.Linear's, with the adapter's settings."""
        return f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}, dropout={self.dropout_p}"


__all__ = ["SVDLinear"]
