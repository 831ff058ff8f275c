"""What must be reached, and what of it is held, missed, or not measured yet."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.bounds import misses
from benchmarks.report.sources import MAKE_BENCH, Origin, Source
from benchmarks.report.wording import capital, number

HELD, MISSED, OPEN = "held", "missed", "open"


@dataclass(frozen=True)
class Verdict:
    """One bound.

    Attributes:
        state: held, missed or open.
        said: a plain sentence.
        origin: of the record; None where there is none.
        figure: what was measured; None where nothing was.
    """

    state: str
    said: str
    origin: Origin | None
    figure: float | None = None


@dataclass(frozen=True)
class Target:
    """What the kernels must reach on a GPU, in bf16 at rank 16 and 8192 tokens, and how its rows are known.

    Attributes:
        said: the figure and its bound.
        rows: a pattern for the names of the rows that ``make gpu`` writes.
    """

    said: str
    rows: str


_STEP, _OVER_LORA = "DeBERTa-v3-base training step (32×128)", r".*: ours / PEFT LoRA r=\d+, training step"
TARGETS = (
    Target("forward / bare F.linear: at most 1.08 at 4096² and wider, 1.20 below", r"forward,.*ours / frozen"),
    Target("never slower than the best other plan", r".*ours / the best other.*"),
    Target("forward + backward / bare F.linear: at most 1.15 and 1.40", r"forward \+ backward,.*ours / frozen"),
    Target("PEFT / ours, forward + backward, bf16 adapters: at least 1.4 to 2.5", r".*bfloat16 adapter: PEFT / ours"),
    Target("PEFT / ours, forward + backward, fp32 adapters: at least 2 and 3", r".*float32 adapter: PEFT / ours"),
    Target(
        "importance + masking + orthogonality, PEFT / ours: at least 50", r"importance \+ masking \+ orthogonality.*"
    ),
    Target("importance alone / a copy of its bytes: at most 1.3", r"importance alone.*"),
    Target("launches of the budget engine in a step: at most 6", r"launches of the budget engine.*"),
    Target(f"{_STEP}: PEFT AdaLoRA / ours at least 3", r".*: PEFT AdaLoRA / ours, training step"),
    Target(f"{_STEP}: ours / PEFT LoRA at most 1, both eager", _OVER_LORA),
    Target(f"{_STEP}: ours / PEFT LoRA at most 1, both as a CUDA graph", rf"{_OVER_LORA}, CUDA graph"),
    Target("host time of an eager layer: ours / PEFT LoRA at most 1", r"host time.*"),
    Target("a group of layers: never slower than one by one", r".*one group.*"),
    Target("saved activations beyond x: u alone, 2·M·Rpad bytes", r".*bytes kept beyond x"),
)  # fmt: skip
SANITIZER = "PART=sanitizer"
SANITIZED = "compute-sanitizer over small shapes: memcheck, synccheck, initcheck, racecheck"
REPEATABLE = "Gradients: bitwise repeatable, like every other check of correctness"


def on_cpu(sources: Sequence[Source]) -> Iterator[Verdict]:
    """The bounds of make bench."""
    for source in sources:
        if any(origin.command == MAKE_BENCH for origin in source.origins):
            missed = misses([dict(m.record) for m in source.measured])
            for miss in missed:
                yield Verdict(MISSED, miss, source.origins[0])
            if not missed:
                yield Verdict(HELD, "Every bound of make bench holds.", source.origins[0])


def on_gpu(sources: Sequence[Source]) -> Iterator[Verdict]:
    """Every target with the figures that there are for it, or as open; then what else was recorded against a bound."""
    gpus, rows = _recorded(sources)
    for _, found in by_target(sources):
        yield from found
    known = "|".join(target.rows for target in TARGETS)
    yield from (_row(row, origin) for row, origin in rows if not re.fullmatch(known, row["name"]))
    checked = [source for source in gpus if "checks_held" in source.content]
    for source in checked:
        failed = [check["name"] for check in source.content["checks"] if check["outcome"] == "FAILED"]
        held = source.content["checks_held"]
        what = SANITIZED if source.origins[0].command.endswith(SANITIZER) else REPEATABLE
        said = f"{what}: {held} hold" + "".join(f"; {name} fails" for name in failed)
        yield Verdict(MISSED if failed else HELD if held else OPEN, said, source.origins[0])
    if not checked:
        yield Verdict(OPEN, f"{REPEATABLE}. No GPU has run them yet.", None)


def by_target(sources: Sequence[Source]) -> Iterator[tuple[Target, list[Verdict]]]:
    """Every target with its figures; with one verdict that it is open where there are none."""
    _, rows = _recorded(sources)
    for target in TARGETS:
        found = [_row(row, origin) for row, origin in rows if re.fullmatch(target.rows, row["name"])]
        yield target, found or [Verdict(OPEN, f"{capital(target.said)}. No GPU has measured it yet.", None)]


def _recorded(sources: Sequence[Source]) -> tuple[list[Source], list[tuple[dict[str, Any], Origin]]]:
    gpus = [source for source in sources if source.is_gpu and not any(origin.dry for origin in source.origins)]
    return gpus, [(row, source.origins[0]) for source in gpus for row in source.content.get("rows", ())]


def _row(row: dict[str, Any], origin: Origin) -> Verdict:
    if row["figure"] is None:
        return Verdict(OPEN, f"{capital(row['name'])}: not measured in this run.", origin)
    return _verdict(row["name"], row["figure"], row["bound"], row["at_least"], origin)


def _verdict(what: str, figure: float, bound: float, at_least: bool, origin: Origin) -> Verdict:
    if figure >= bound if at_least else figure <= bound:
        return Verdict(
            HELD,
            f"{capital(what)} is {number(figure)}, {'at least' if at_least else 'at most'} {bound:g}.",
            origin,
            figure,
        )
    wanted = f"less than the {bound:g} it must reach" if at_least else f"more than the {bound:g} it may be"
    return Verdict(MISSED, f"{capital(what)} is {number(figure)}, {wanted}.", origin, figure)


__all__ = [
    "HELD",
    "MISSED",
    "OPEN",
    "REPEATABLE",
    "SANITIZED",
    "TARGETS",
    "Target",
    "Verdict",
    "by_target",
    "on_cpu",
    "on_gpu",
]
