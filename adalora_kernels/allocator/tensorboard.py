"""The scalars that the original package writes to TensorBoard, under its names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from adalora_kernels.ops.checks import check_number
from adalora_kernels.reference.orthogonality import orthogonality

if TYPE_CHECKING:
    from adalora_kernels.allocator.engine import BudgetEngine


def check_writer(writer: Any, interval: int, capturable: bool) -> None:
    """Hold a writer, and the steps from one record to the next, to be what ``RankAllocator`` can log by.

    Raises:
        TypeError, ValueError: they are not; named as its arguments are.
    """
    if writer is not None and capturable:
        raise ValueError("tb_writter: expected None with capturable=True, since to write waits for the device")
    if writer is not None and not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(f"tb_writter: expected a SummaryWriter or None, got {type(writer).__name__}")
    check_number("tb_writter_loginterval", interval, whole=True)
    if interval < 1:
        raise ValueError(f"tb_writter_loginterval: expected at least 1, got {interval}")


def write_scalars(writer: Any, allocator: BudgetEngine, threshold: Tensor | None, step: int) -> None:
    """Write Ranknum/*, Budget/* (where this step ranked) and Orth_regu_loss/*. Waits for the device.

    Args:
        writer: a SummaryWriter.
        allocator: whose state is written.
        threshold: of this step's ranking, or None.
        step: the step to file it under.
    """
    if threshold is not None:
        ranks = allocator.live_ranks()
        for triplet in allocator.triplets:
            writer.add_scalar(f"Ranknum/{triplet.parameter_names[1]}", ranks[triplet.name], step)
        writer.add_scalar("Budget/total_rank", sum(ranks.values()), step)
        writer.add_scalar("Budget/mask_threshold", threshold.item(), step)
        params = sum(ranks[t.name] * (t.lora_A.shape[1] + t.lora_B.shape[0]) for t in allocator.triplets)
        writer.add_scalar("Budget/sum_param", params, step)
    deviations = []
    for triplet in allocator.triplets:
        for name, a, b in (
            (triplet.parameter_names[0], [triplet.lora_A], []),
            (triplet.parameter_names[2], [], [triplet.lora_B]),
        ):
            deviation = orthogonality(a, b, 1.0, squared=False)[0].item()
            writer.add_scalar(f"Orth_regu_loss/{name}", deviation, step)
            deviations.append(deviation)
    writer.add_scalar("train/orth_regu_loss", sum(deviations) / len(deviations), step)


__all__ = ["check_writer", "write_scalars"]
