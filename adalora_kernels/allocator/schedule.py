"""The budget schedule as pure host arithmetic (AdaLoRA, equation 14, in the form of the published codes).

With T total steps, t_i initial and t_f final warm-up, ΔT mask interval, b⁰ initial and b^T target total rank:

    t ≤ t_i              b = b⁰, no masking
    t_i < t ≤ T - t_f    b = int(b^T + (b⁰ - b^T) (1 - (t - t_i)/(T - t_f - t_i))³), masking where t % ΔT == 0
    t > T - t_f          b = b^T, masking at every step

The paper prints (t - t_i - t_f) in the numerator, which would not start at b⁰; both published codes use the above.
"""

from __future__ import annotations

from dataclasses import dataclass

from adalora_kernels.ops.checks import check_number

VARIANTS = ("original", "peft", "paper")


@dataclass(frozen=True)
class StepPlan:
    """What one step does, in this order.

    Attributes:
        budget: the total rank that may stay.
        update: whether the importance averages take this step's gradients.
        rank: whether triplets are ranked and masked to the budget.
        settle: whether the pattern that this ranking leaves is final.
        reset: whether the averages start anew after that.
        reapply: whether the stored pattern is applied again, without ranking.
    """

    budget: int
    update: bool = False
    rank: bool = False
    settle: bool = False
    reset: bool = False
    reapply: bool = False


@dataclass(frozen=True)
class BudgetSchedule:
    """The schedule of one run.

    Args:
        total_step: T, in optimizer steps counted from 0.
        init_warmup: t_i.
        final_warmup: t_f.
        mask_interval: ΔT.
        initial_rank: b⁰, the total rank at the start.
        target_rank: b^T; at or above ``initial_rank`` there is nothing to prune.
        variant: "original" and "paper" rank at every step after T - t_f; "peft" ranks once at T - t_f, resets the
            averages there and re-applies the pattern afterwards.

    Warm-ups may be fractions of a step, as shares of T come out; the others are whole.

    Raises:
        TypeError: a setting is no number.
        ValueError: a negative or unordered length, an interval below 1, a negative rank, or an unknown variant.
    """

    total_step: int
    init_warmup: int
    final_warmup: int
    mask_interval: int
    initial_rank: int
    target_rank: int
    variant: str = "original"

    def __post_init__(self) -> None:
        for name in ("init_warmup", "final_warmup"):
            check_number(name, getattr(self, name))
        for name in ("total_step", "mask_interval", "initial_rank", "target_rank"):
            check_number(name, value := getattr(self, name), whole=True)
            object.__setattr__(self, name, int(value))
        for name in ("init_warmup", "final_warmup", "initial_rank", "target_rank"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if self.mask_interval < 1:
            raise ValueError(f"mask_interval: expected at least 1, got {self.mask_interval}")
        if self.total_step <= self.init_warmup + self.final_warmup:
            raise ValueError(
                f"total_step: expected more than init_warmup + final_warmup = "
                f"{self.init_warmup + self.final_warmup}, got {self.total_step}"
            )
        if self.variant not in VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}; got {self.variant!r}")

    @property
    def pruning_end(self) -> int:
        """T - t_f, the last step at which the budget may still change."""
        return self.total_step - self.final_warmup

    def budget(self, step: int) -> int:
        """b at ``step``."""
        if step <= self.init_warmup:
            return self.initial_rank
        if step > self.pruning_end:
            return self.target_rank
        left = 1 - (step - self.init_warmup) / (self.pruning_end - self.init_warmup)
        return int(self.target_rank + (self.initial_rank - self.target_rank) * left**3)

    def plan(self, step: int, settled: bool = True) -> StepPlan:
        """What ``step`` does.

        Args:
            step: counted from 0.
            settled: whether the last ranking was made; where it was skipped, a later step of "peft" catches up with it.

        Raises:
            ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(f"step: expected at least 0, got {step}")
        budget, end = self.budget(step), self.pruning_end
        due = self.init_warmup < step <= end and step % self.mask_interval == 0
        if step < end:
            return StepPlan(budget, update=True, rank=due)
        if self.variant == "peft":
            last = step == end or not settled
            return StepPlan(budget, rank=last, settle=last, reset=last, reapply=not last)
        last = due or step > end
        return StepPlan(budget, rank=last, settle=last)


__all__ = ["VARIANTS", "BudgetSchedule", "StepPlan"]
