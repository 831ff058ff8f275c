"""The table that the demo ends with, the ranks in the terminal, and whether the run holds what it must."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from adalora_kernels.cli.demo.accuracy import MAJORITY, Estimate, estimate
from adalora_kernels.cli.demo.settings import MATRICES, Settings
from adalora_kernels.cli.demo.train import PHASES, Contender
from adalora_kernels.cli.rank_map import RankMap
from adalora_kernels.cli.tables import aligned

_LAST = 50


@dataclass(frozen=True)
class Outcome:
    """All that is reported.

    Attributes:
        settings: of the run.
        base: correctness of the base model, [held-out signatures].
        peft, ours: the two trainings.
        peft_correct, ours_correct: correctness of the adapted models, [held-out signatures].
        corpus: number of pairs of each part.
    """

    settings: Settings
    base: Tensor
    peft: Contender
    ours: Contender
    peft_correct: Tensor
    ours_correct: Tensor
    corpus: Mapping[str, int]

    @property
    def loss_difference(self) -> float:
        """Largest relative difference of the compared leading losses, with and without the orthogonality term."""
        count = self.settings.compared
        return max(
            abs(ours - peft) / abs(peft)
            for a, b in ((self.peft.losses, self.ours.losses), (self.peft.task_losses, self.ours.task_losses))
            for peft, ours in zip(a[:count], b[:count], strict=True)
        )

    @property
    def gain(self) -> Estimate:
        """Accuracy of our training minus the base's, paired by signature."""
        return estimate(self.ours_correct - self.base)

    def failures(self) -> list[str]:
        """What the run was to hold and did not."""
        found = []
        accuracy, least = estimate(self.ours_correct).mean, self.settings.least_accuracy
        # Written so that a NaN fails.
        if not accuracy >= least:
            found.append(f"held-out accuracy is {100 * accuracy:.1f}%, below {100 * least:.0f}%")
        if not self.loss_difference <= self.settings.tolerance:
            found.append(
                f"the first {self.settings.compared} losses differ by {self.loss_difference:.1e}, "
                f"more than {self.settings.tolerance:.0e} relative"
            )
        budget = self.settings.target_budget
        for contender in (self.peft, self.ours):
            live = sum(contender.live_ranks().values())
            if not 0 < live <= budget:
                found.append(f"{contender.name} is left with {live} triplets, the budget is {budget}")
        return found


def table(outcome: Outcome) -> str:
    """Losses, accuracy and times of both trainings, with their ratios and how each figure came about."""
    peft, ours, settings = outcome.peft, outcome.ours, outcome.settings
    last = f"loss, mean of the last {min(_LAST, settings.steps)} steps"
    rows = [
        ("", "PEFT", "ours", "PEFT / ours"),
        (last, f"{_tail(peft.losses):.4f}", f"{_tail(ours.losses):.4f}", ""),
        ("  of it the task's", f"{_tail(peft.task_losses):.4f}", f"{_tail(ours.task_losses):.4f}", ""),
        ("held-out accuracy", str(estimate(outcome.peft_correct)), str(estimate(outcome.ours_correct)), ""),
        ("triplets left", str(sum(peft.live_ranks().values())), str(sum(ours.live_ranks().values())), ""),
    ]
    before, after = peft.medians(), ours.medians()
    for name, phase in (("ms per step", "step"), *((f"  {phase}", phase) for phase in PHASES)):
        ratio = f"{before[phase] / after[phase]:.2f}"
        rows.append((name, f"{before[phase]:.2f}", f"{after[phase]:.2f}", ratio))
    return "\n".join([*aligned(rows), "", *_notes(outcome, settings)])


def _tail(values: list[float]) -> float:
    last = values[-_LAST:]
    return sum(last) / len(last)


def _notes(outcome: Outcome, settings: Settings) -> list[str]:
    gain = outcome.gain
    if gain.mean > 2 * gain.standard_error:
        verdict = "a gain"
    elif gain.mean < -2 * gain.standard_error:
        verdict = "a loss"
    else:
        verdict = "inside two standard errors, so no gain is claimed"
    count, corpus = settings.compared, outcome.corpus
    return [
        f"Held-out accuracy: base {estimate(outcome.base)}, majority {100 * MAJORITY:.1f} %, "
        f"adapted {estimate(outcome.ours_correct)}.",
        f"Adapted minus base: {100 * gain.mean:+.1f} ± {100 * gain.standard_error:.1f} points, {verdict}.",
        f"First {min(count, settings.steps)} losses: at most {outcome.loss_difference:.1e} apart, relative "
        f"(allowed: {settings.tolerance:.0e}), with and without the orthogonality term.",
        f"{corpus['base']} pairs of base packages; of the other packages {corpus['train']} to adapt to, "
        f"{corpus['calibration']} for the threshold, {corpus['held_out']} held out, no module in two of them.",
        "Accuracy weighs a signature's own summary as much as all the others together; ± is one standard error.",
        "Both trainings: fp32, same initial weights, same batches, no dropout, step by step in turns. Times: medians.",
        "The orthogonality term is timed where it runs, inside forward and backward, and moved to the last row.",
    ]


def rank_map_of(contender: Contender, settings: Settings) -> RankMap:
    """The triplets left of one training."""
    layers = [str(layer) for layer in range(settings.layers)]
    ranks = {(name, str(layer)): rank for (layer, name), rank in contender.live_ranks().items()}
    return RankMap(f"through {contender.name}", list(MATRICES.values()), layers, ranks, settings.init_rank)


__all__ = ["Outcome", "rank_map_of", "table"]
