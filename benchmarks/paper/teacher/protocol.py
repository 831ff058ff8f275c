"""What is run and what counts as reached: fixed here before the runs were made, and kept beside their results.

Every setting has its learning rate tuned on seeds of its own, at budget 1; the final seeds then run with that rate.
AdaLoRA trains its initial rank, twice the true total, until T - t_f: it spends more than the rank that it ends with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Method = Literal["adalora", "lora", "lora-true", "lora-truncated"]
Teacher = Literal["varied", "uniform"]

METHODS: tuple[Method, ...] = get_args(Method)
TEACHERS: tuple[Teacher, ...] = get_args(Teacher)


@dataclass(frozen=True)
class AdaLora:
    """The settings of AdaLoRA.

    Attributes:
        gamma: weight of the orthogonality term.
        of_loss: whether ``gamma`` is in units of the loss that training starts from, rather than a plain number.
        alpha: numerator of the increment's factor.
        init_warmup, final_warmup: t_i and t_f, as shares of T.
        mask_interval: ΔT, in steps.
    """

    gamma: float = 0.1
    of_loss: bool = False
    alpha: float = 24.0
    init_warmup: float = 0.1
    final_warmup: float = 0.4
    mask_interval: int = 10


@dataclass(frozen=True)
class Setting:
    """What one learning rate is tuned for.

    Attributes:
        method: "adalora"; "lora", of the same rank everywhere; "lora-true", of ranks in proportion to the true ones;
            "lora-truncated", trained at AdaLoRA's initial rank and cut to the budget's largest singular values.
        teacher: "varied", another rank in each matrix, or "uniform", the same rank everywhere, the control.
        scale: each singular value of the teacher's increment; those of the frozen matrices lie between 0 and 2.
        adalora: its settings, for that method.
    """

    method: Method
    teacher: Teacher
    scale: float
    adalora: AdaLora | None = None


@dataclass(frozen=True)
class Run:
    """One training. ``budget`` is a share of the true total rank."""

    setting: Setting
    budget: float
    rate: float
    seed: int


@dataclass(frozen=True)
class Protocol:
    """All that the results depend on.

    Attributes:
        width: K and N of every matrix.
        true_ranks: of the varied teacher's matrices, in an order that each seed draws.
        initial_rank: AdaLoRA's, and that of the LoRA that is truncated.
        steps: T.
        batch: inputs a step.
        training, held_out: inputs that are trained on, and that the losses are of.
        scales, budgets: the grid.
        rates: candidates for each setting's learning rate, which then falls linearly to 0.
        tuning_seeds, seeds: of tuning, and of the results.
        gammas: γ in units of the initial loss, for the study of the border, at every scale.
        others: what else that study changes, one at a time, at the smallest scale and the default γ.
        must_win: seeds of ten in which AdaLoRA's loss must be below LoRA's at budget 1 and the largest scale.
        may_win: seeds of ten in which it may be so on the control there.
        must_correlate: rank correlation to reach in the mean there.
    """

    width: int = 32
    true_ranks: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12)
    initial_rank: int = 12
    steps: int = 600
    batch: int = 128
    training: int = 4096
    held_out: int = 1024
    scales: tuple[float, ...] = (0.1, 0.3, 1.0)
    budgets: tuple[float, ...] = (0.5, 1.0, 1.5)
    rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
    tuning_seeds: tuple[int, ...] = (1, 2)
    seeds: tuple[int, ...] = tuple(range(100, 110))
    gammas: tuple[float, ...] = (0.0, 0.01, 0.1, 1.0, 10.0)
    others: tuple[AdaLora, ...] = (
        AdaLora(alpha=6.0),
        AdaLora(alpha=96.0),
        AdaLora(init_warmup=0.3),
        AdaLora(final_warmup=0.2),
    )
    must_win: int = 9
    may_win: int = 1
    must_correlate: float = 0.9

    def __post_init__(self) -> None:
        for budget in self.budgets:
            if self.total_rank(budget) % len(self.true_ranks):
                raise ValueError(
                    f"budgets: expected shares of {sum(self.true_ranks)} that give {len(self.true_ranks)} matrices the "
                    f"same whole rank, got {budget}"
                )
        if 1.0 not in self.budgets or set(self.seeds) & set(self.tuning_seeds):
            raise ValueError("budgets: expected 1.0 among them; seeds: expected none of tuning_seeds among them")

    def total_rank(self, budget: float) -> int:
        """Triplets of the whole model at this share of the true total."""
        return round(budget * sum(self.true_ranks))

    def uniform_rank(self, budget: float) -> int:
        """The rank of each matrix where all are given the same."""
        return self.total_rank(budget) // len(self.true_ranks)


def main_settings(protocol: Protocol) -> Iterator[Setting]:
    """Those of the grid. On the control the true ranks are uniform LoRA's."""
    for teacher in TEACHERS:
        for scale in sorted(protocol.scales, reverse=True):
            for method in METHODS:
                if teacher == "varied" or method != "lora-true":
                    yield Setting(method, teacher, scale, AdaLora() if method == "adalora" else None)


def study_settings(protocol: Protocol) -> Iterator[Setting]:
    """Those that look for what moves the border, all at budget 1."""
    for scale in protocol.scales:
        for gamma in protocol.gammas:
            yield Setting("adalora", "varied", scale, AdaLora(gamma=gamma, of_loss=True))
    for adalora in protocol.others:
        yield Setting("adalora", "varied", min(protocol.scales), adalora)


def tuning_runs(protocol: Protocol, setting: Setting) -> list[Run]:
    """Every candidate rate on every tuning seed, at budget 1."""
    return [Run(setting, 1.0, rate, seed) for rate in protocol.rates for seed in protocol.tuning_seeds]


def final_runs(protocol: Protocol, setting: Setting, rate: float) -> list[Run]:
    """The runs whose losses are published, of a setting of the grid."""
    return [Run(setting, budget, rate, seed) for seed in protocol.seeds for budget in protocol.budgets]


def study_runs(protocol: Protocol, setting: Setting, rate: float) -> list[Run]:
    """The runs whose losses are published, of a setting of the study."""
    return [Run(setting, 1.0, rate, seed) for seed in protocol.seeds]


def proportional(ranks: Sequence[int], total: int) -> list[int]:
    """``total`` shared out in proportion to ``ranks``, by largest remainders.

    Raises:
        ValueError: all ranks are 0.
    """
    if not sum(ranks):
        raise ValueError("ranks: expected one above 0")
    exact = [total * rank / sum(ranks) for rank in ranks]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(ranks)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


__all__ = [
    "METHODS",
    "TEACHERS",
    "AdaLora",
    "Method",
    "Protocol",
    "Run",
    "Setting",
    "Teacher",
    "final_runs",
    "main_settings",
    "proportional",
    "study_runs",
    "study_settings",
    "tuning_runs",
]
