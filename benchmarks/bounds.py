"""What the CPU's figures must reach; it needs the records alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.micro.layer import NAME as LAYER
from benchmarks.micro.scaling import DEBERTA
from benchmarks.report.wording import name, sentence
from benchmarks.step.names import OURS_SWEPT

FLOOR_MARGIN = 0.08
ENGINE = OURS_SWEPT  # the way of it that is held to the bound
ENGINE_MUST = 10.0  # on all cores; with one thread the sweeps' share of the time doubles, PEFT's hardly
COPY_MUST = 1.5


def misses(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each figure that doesn't reach what it must."""
    cores = max((record["case"].get("threads", 1) for record in records), default=1)
    return [f"{miss}." for record in records for miss in _missed(record, cores)]


def _missed(record: Mapping[str, Any], cores: int) -> Iterator[str]:
    case, about = record["case"], sentence(record["case"])
    if record.get("benchmark") == LAYER and case["dtype"] == "float32":
        ratios, bound = record["ratio_to_frozen"], record["flop_floor"] + FLOOR_MARGIN
        if ratios["ours"] > bound:
            wanted = f"{bound:.3f}, its floor + {FLOOR_MARGIN}"
            yield f"Layer, {about}: {ratios['ours']:.3f} of the frozen linear exceeds {wanted}"
        for rival in ("peft", "addmm_"):
            if ratios["ours"] > ratios[rival]:
                yield f"Layer, {about}: {ratios['ours']:.3f} is slower than the {ratios[rival]:.3f} of {name(rival)}"
    if record.get("benchmark") == "training step":
        for contestant, times in record["peft_over_ours"].items():
            if times < 1:
                yield f"Training step, {about}: {contestant} takes {1 / times:.3f} of PEFT AdaLoRA's time"
    elif "peft_over_ours" in record and case["threads"] == cores:
        times = record["peft_over_ours"][ENGINE]
        if times < ENGINE_MUST:
            yield f"Budget engine, {about}: it adds {times:.1f} times less than PEFT's, which must be {ENGINE_MUST:g}"
    if case.get("model") == DEBERTA and (times := record["importance_to_copy"]) > COPY_MUST:
        yield f"Importance, {about}: {times:.2f} x the time of a plain copy exceeds {COPY_MUST} x"


__all__ = ["COPY_MUST", "ENGINE", "ENGINE_MUST", "FLOOR_MARGIN", "LAYER", "misses"]
