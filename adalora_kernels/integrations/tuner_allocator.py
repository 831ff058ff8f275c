"""``RankAllocator`` on PEFT's terms: settings from the adapter's config, the pattern into ``config.rank_pattern``."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.adalora.config import AdaLoraConfig
from torch import Tensor
from torch.optim import Optimizer

from adalora_kernels.allocator import RankAllocator, Turn
from adalora_kernels.allocator.compact import Rows, spread
from adalora_kernels.allocator.saved import check_saved_rows
from adalora_kernels.allocator.schedule import BudgetSchedule
from adalora_kernels.allocator.watch import unwatch
from adalora_kernels.integrations.rank_pattern import Pattern, adopt_averages, by_layer, gather, path_key
from adalora_kernels.ops.checks import check_number, check_share

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adalora_kernels.integrations.adalora_model import FusedAdaLoraModel


_OF_CONFIG = {
    "lora_r": "init_r",
    "target_rank": "target_r",
    "init_warmup": "tinit",
    "final_warmup": "tfinal",
    "mask_interval": "deltaT",
}


class TunerAllocator(RankAllocator):
    """The allocator of one adapter of a patched PEFT model.

    Args:
        tuner: the model.
        name: the adapter's name.
        config: the adapter's config, which is read again at each step.

    Raises:
        ValueError: the config's rank pattern doesn't fit the layers, or as ``RankAllocator``.
    """

    def __init__(self, tuner: FusedAdaLoraModel, name: str, config: AdaLoraConfig) -> None:
        try:
            super().__init__(
                tuner.model,
                lora_r=config.init_r,
                target_rank=config.target_r,
                init_warmup=config.tinit,
                final_warmup=config.tfinal,
                mask_interval=config.deltaT,
                beta1=config.beta1,
                beta2=config.beta2,
                total_step=config.total_step,
                variant="peft",
                adapter=name,
                backend=tuner.backend_of("importance"),
            )
        except (TypeError, ValueError) as error:
            raise _in_words_of_the_config(error) from None
        unwatch(self)  # the model is watched
        self.tuner, self.name, self.config = tuner, name, config
        peft_allocator = tuner.__dict__.get("rankallocator")
        if peft_allocator is not None and peft_allocator.adapter_name == name:
            adopt_averages(self, peft_allocator)
        if config.rank_pattern:
            self._adopt_pattern()

    def _adopt_pattern(self) -> None:
        pattern = by_layer(self.config.rank_pattern, self.tuner.adalora_layers(), self.name)
        kept = self.tuner.fused_state.kept.setdefault(self.name, {})
        rows: list[bool] = []
        for triplet in self.triplets:
            rank = triplet.lora_E.shape[0]
            row = pattern.get(triplet.name, [True] * rank)
            if len(row) != rank and sum(row) == rank:
                kept.setdefault(triplet.name, row)
            current = gather(row, kept.get(triplet.name))
            if len(current) != rank:
                raise ValueError(
                    f"rank_pattern[{triplet.name!r}]: expected one entry for each of {rank} rows, got {len(row)}"
                )
            rows.extend(current)
        self.importance.live.copy_(torch.tensor(rows, dtype=torch.bool))

    def follow_config(self) -> None:
        """Take the schedule that the config holds now.

        Raises:
            TypeError, ValueError: its betas are not in (0, 1), or its target is no number.
        """
        config = self.config
        check_number("config.target_r", config.target_r)
        for name in ("beta1", "beta2"):
            if (beta := getattr(config, name)) != getattr(self, name):
                check_share(f"config.{name}", beta)
        self.total_step, self.mask_interval = config.total_step, config.deltaT
        self.initial_warmup, self.final_warmup = config.tinit, config.tfinal
        self.beta1, self.beta2 = config.beta1, config.beta2
        self.target_rank = config.target_r * len(self.triplets)

    def _schedule(self, total_step: int) -> BudgetSchedule:
        """As ``RankAllocator``'s, with errors in the words of PEFT's config."""
        try:
            return super()._schedule(total_step)
        except (TypeError, ValueError) as error:
            raise _in_words_of_the_config(error) from None

    def begin(self, step: int | None = None, params: Sequence[Tensor] | None = None) -> Turn:
        """As ``RankAllocator``'s, on the config's present schedule."""
        self.follow_config()
        self.tuner.fused_state.term_due = True  # also where the step is skipped for an overflow
        return super().begin(step, params)

    def expect(self, step: int) -> None:
        """As ``RankAllocator``'s."""
        self.tuner.fused_state.term_due = True
        super().expect(step)

    def finish(self, turn: Turn, finite: Tensor | None) -> Tensor | None:
        """As ``RankAllocator``'s; where it ranked, the pattern goes to the config, which waits for the device."""
        threshold = super().finish(turn, finite)
        state = self.tuner.fused_state
        if threshold is not None:
            self._write_pattern()
            if turn.plan.budget > 0 and not any(map(any, self.config.rank_pattern.values())):
                warnings.warn(
                    f"AdaLoRA: step {turn.step} has pruned every triplet for a budget of {turn.plan.budget}: all have "
                    "one score, as gradients that are zero give them. The allocator comes before zero_grad().",
                    stacklevel=2,
                )
        if self.config.orth_reg_weight > 0 and state.term_missed and not state.term_used:
            state.term_used = True
            warnings.warn(
                "AdaLoRA's orthogonality term is in no loss, since the model returned none: "
                "add base_model.orthogonality_loss() to yours.",
                stacklevel=2,
            )
        return threshold

    @property
    def loaded_rows(self) -> Pattern:
        """For each layer that has lost rows for good, which of the first ones it still has."""
        return self.tuner.fused_state.kept.get(self.name, {})

    def state_dict(self) -> dict[str, Any]:
        """As ``RankAllocator``'s, with what PEFT's config and this model know besides."""
        ranked = bool(self.config.rank_pattern)
        return {**super().state_dict(), "ranked": ranked, "loaded_rows": dict(self.loaded_rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As ``RankAllocator``'s; the pattern goes to the config."""
        layers = zip(self.triplets, self.importance.layout.shapes, strict=True)
        check_saved_rows(state, {t.name: rank for t, (rank, _, _) in layers})
        super().load_state_dict(state)
        self.tuner.fused_state.kept[self.name] = dict(state["loaded_rows"])
        self.config.rank_pattern = None
        if state["ranked"]:
            self._write_pattern()

    def _write_pattern(self) -> None:
        rows, kept = self.importance.pattern(), self.loaded_rows
        if kept:
            rows = [spread(row, kept.get(t.name)) for t, row in zip(self.triplets, rows, strict=True)]
        keys = (path_key(t.name, self.name) for t in self.triplets)
        self.config.rank_pattern = dict(zip(keys, rows, strict=True))

    def _shrink(self, rows: Rows, optimizer: Optimizer | None) -> None:
        super()._shrink(rows, optimizer)
        # Checkpoints keep PEFT's format, whose pattern has as many entries as there were rows at first.
        kept = self.tuner.fused_state.kept.setdefault(self.name, {})
        for t, row in zip(self.triplets, rows, strict=True):
            kept[t.name] = spread(row, kept.get(t.name))
        self._write_pattern()


def _in_words_of_the_config(error: TypeError | ValueError) -> TypeError | ValueError:
    """The error of a setting, which has another name in PEFT's config; others as they are."""
    name, colon, rest = str(error).partition(":")
    if name not in {*_OF_CONFIG, "total_step", "beta1", "beta2"}:
        return error
    for ours, theirs in _OF_CONFIG.items():
        rest = rest.replace(ours, theirs)
    return type(error)(f"config.{_OF_CONFIG.get(name, name)}{colon}{rest}")


__all__ = ["TunerAllocator"]
