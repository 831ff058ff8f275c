"""The schedule on the device: which step it is and what that step does, without the host, so that a CUDA graph can
hold it.

Every step launches the same work. What a step doesn't do is undone, masked out or selected away by flags that are
looked up in tables of all steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adalora_kernels.allocator.schedule import BudgetSchedule
from adalora_kernels.allocator.state import ImportanceState
from adalora_kernels.backends.select import Backend


class Due(NamedTuple):
    """What one step does, as ``StepPlan``, on the device: budget int32 [1], the others bool [1].

    ``settled`` is whether the pattern is final after it.
    """

    budget: Tensor
    update: Tensor
    rank: Tensor
    settled: Tensor
    reset: Tensor
    reapply: Tensor


_TENSORS = ("steps", "updates", "settled", "cleared", "budget", "threshold", "last_threshold")


class DeviceClock:
    """The step, the tables of the schedule, and what the host would otherwise remember from step to step.

    Attributes:
        steps: int64 [2], the last step that was finished, and the next.
        updates, settled: int64 [1] and bool [1], as in ``ImportanceState``, whose own ``write_back`` brings up to date.
        cleared: bool [1], whether Ī and Ū count as 0, whatever they hold. To write zeros would be a pass over all of
            them at every step for the one step that resets, after which none reads them unless the host goes back.
        budget: int32 [1], of the last step that was begun.
        threshold: 0-d, of the last step that was finished; NaN where nothing was ranked.
        last_threshold: 0-d, as ``ImportanceState.threshold``, of the last ranking; NaN before it.
    """

    def __init__(self, state: ImportanceState) -> None:
        device = state.live.device
        self.steps = torch.zeros(2, dtype=torch.int64, device=device)
        self.updates = torch.zeros(1, dtype=torch.int64, device=device)
        self.settled = torch.zeros(1, dtype=torch.bool, device=device)
        self.cleared = torch.zeros(1, dtype=torch.bool, device=device)
        self.budget = torch.zeros(1, dtype=torch.int32, device=device)
        self.threshold = state.scores.new_full((), torch.nan)
        self.last_threshold = self.threshold.clone()
        self._schedule: BudgetSchedule | None = None
        self._at: int | None = None  # where the host has set the step, if nobody has counted since

    def tensors(self) -> list[Tensor]:
        """All that a step changes here."""
        return [getattr(self, name) for name in _TENSORS]

    def go_to(self, step: int, state: ImportanceState) -> None:
        """Make ``step`` the next one.

        Raises:
            ValueError: it is negative.
        """
        if step < 0:
            raise ValueError(f"step: expected at least 0, got {step}")
        if self._at is None or step <= self._at:
            self._write_zeros(state)
        self.steps[1:].fill_(step)
        self._at = step

    def follow(self, schedule: BudgetSchedule, state: ImportanceState) -> None:
        """Lay out the tables of this schedule: of the steps 0 … T, and one more row for all later ones.

        The budgets are int32 [T + 2]; the flags of ``Due`` bool [2 · (T + 2), 5], first for a pattern that is not
        settled, then for one that is.
        """
        if schedule == self._schedule:
            return
        self._write_zeros(state)
        steps, device = range(schedule.total_step + 2), self.steps.device
        plans = [schedule.plan(step, settled) for settled in (False, True) for step in steps]
        was_settled = [False] * len(steps) + [True] * len(steps)
        flags = [
            [p.update, p.rank, p.settle or (settled and p.reapply), p.reset, p.reapply]
            for p, settled in zip(plans, was_settled, strict=True)
        ]
        self._budgets = torch.tensor([p.budget for p in plans[: len(steps)]], dtype=torch.int32, device=device)
        self._flags = torch.tensor(flags, dtype=torch.bool, device=device)
        self._resets = any(p.reset for p in plans)
        self._schedule = schedule

    def due(self, step: int | None, state: ImportanceState) -> Due:
        """What ``step`` does; None is the next one."""
        if step is None:
            self._at = None
        else:
            self.go_to(step, state)
        last = self._budgets.numel() - 1
        row = self.steps[1:].clamp(max=last)
        budget = self._budgets.index_select(0, row)
        self.budget.copy_(budget)
        flags = self._flags.index_select(0, row + self.settled * (last + 1))
        return Due(budget, *flags.unbind(1))

    def finish(
        self,
        due: Due,
        state: ImportanceState,
        scores: Tensor,
        lora_E: Sequence[Tensor],
        offered: bool,
        enabled: Tensor | None,
        backend: Backend | None,
    ) -> Tensor:
        """Mask and count; ``BudgetEngine.finish`` on the device.

        Args:
            due: of this step.
            state: what it belongs to.
            scores: to rank by.
            lora_E: the singular values.
            offered: whether this step had gradients.
            enabled: bool [1], where False a ranking leaves the masks as they are; None for True.
            backend: of the masking.

        Returns:
            The threshold, 0-d, NaN where nothing was ranked.
        """
        if offered:
            self.updates.add_(due.update)
        seen = self.updates > 0
        ranked = due.rank & seen
        # Zeroing E by the pattern is ranking by the pattern itself, with as much budget as triplets live.
        again = due.reapply | (due.rank & ~seen)
        budget = torch.where(again, state.live.sum(), due.budget)
        scores = torch.where(again, state.live.to(scores.dtype), scores)
        masked = again | (ranked if enabled is None else ranked & enabled)
        threshold = torch.where(ranked[0], state.mask(scores, lora_E, budget, masked, backend), torch.nan)
        self.threshold.copy_(threshold)
        self.last_threshold.copy_(torch.where(ranked[0], threshold, self.last_threshold))
        self.settled.copy_(due.settled)
        if self._resets:
            state.scores.masked_fill_(due.reset, 0.0)
            self.updates.masked_fill_(due.reset, 0)
            self.cleared.logical_or_(due.reset)
        self.steps[:1].copy_(self.steps[1:])
        self.steps[1:].add_(1)
        return threshold

    def write_back(self, state: ImportanceState) -> None:
        """Bring the state up to date with what is noted here. Waits for the device."""
        state.updates, state.settled = int(self.updates), bool(self.settled)
        state.threshold = None if self.last_threshold.isnan() else self.last_threshold.clone()
        self._write_zeros(state)

    def follow_state(self, state: ImportanceState) -> None:
        """Take over what a checkpoint has put into the state."""
        self.updates.fill_(state.updates)
        self.settled.fill_(state.settled)
        self.last_threshold.fill_(torch.nan if state.threshold is None else state.threshold)
        self.cleared.zero_()

    def _write_zeros(self, state: ImportanceState) -> None:
        state.averages.masked_fill_(self.cleared, 0.0)
        self.cleared.zero_()

    def move_to(self, device: torch.device) -> None:
        """Follow the parameters to another device."""
        for name in _TENSORS:
            setattr(self, name, getattr(self, name).to(device))
        if self._schedule is not None:
            self._budgets, self._flags = self._budgets.to(device), self._flags.to(device)


Position = tuple[Tensor, Tensor]


def position(state: ImportanceState) -> Position:
    """What ``go_back_unless`` needs."""
    return state.half.clone(), state.scores.clone()


def go_back_unless(kept: Tensor, state: ImportanceState, before: Position) -> None:
    """Undo an update of the averages, which went to the other half of the pair, where ``kept`` (bool [1]) is False."""
    for now, then in zip((state.half, state.scores), before, strict=True):
        now.copy_(torch.where(kept, now, then))


__all__ = ["DeviceClock", "Due", "go_back_unless", "position"]
