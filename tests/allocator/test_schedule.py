"""The budget schedule, step by step."""

from __future__ import annotations

from adalora_kernels.allocator import BudgetSchedule, StepPlan


def schedule(variant: str = "original", target: int = 24) -> BudgetSchedule:
    return BudgetSchedule(100, 10, 30, 7, initial_rank=96, target_rank=target, variant=variant)


def test_budget_falls_from_initial_to_target() -> None:
    s = schedule()
    budgets = [s.budget(t) for t in range(110)]
    assert budgets[:11] == [96] * 11
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[70:] == [24] * 40
    assert budgets[40] == int(24 + 72 * 0.5**3)


def test_original_plan() -> None:
    s = schedule()
    assert s.plan(7) == StepPlan(96, update=True)
    assert s.plan(14) == StepPlan(s.budget(14), update=True, rank=True)
    assert s.plan(15) == StepPlan(s.budget(15), update=True)
    assert s.plan(70) == StepPlan(24, rank=True, settle=True)  # 70 % 7 == 0: ranked, not updated
    assert s.plan(71) == StepPlan(24, rank=True, settle=True)
    assert s.plan(200) == StepPlan(24, rank=True, settle=True)


def test_peft_plan() -> None:
    s = schedule("peft")
    assert s.plan(69) == StepPlan(s.budget(69), update=True)
    assert s.plan(70) == StepPlan(24, rank=True, settle=True, reset=True)
    assert s.plan(71) == StepPlan(24, reapply=True)
    assert s.plan(71, settled=False) == s.plan(70)
    assert s.plan(69, settled=False) == s.plan(69)


def test_nothing_to_prune() -> None:
    assert min(schedule(target=96).budget(t) for t in range(100)) == 96
    assert min(schedule(target=200).budget(t) for t in range(100)) >= 96
