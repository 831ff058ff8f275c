"""What must be reached, and what of it is held, missed, or not measured yet."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.bounds import misses
from benchmarks.report.sources import MAKE_BENCH, Origin, Source
from benchmarks.report.wording import capital, number, sentence

HELD, MISSED, OPEN = "held", "missed", "open"


@dataclass(frozen=True)
class Verdict:
    """One bound.

    Attributes:
        state: held, missed or open.
        said: a plain sentence.
        origin: of the record; None where there is none.
    """

    state: str
    said: str
    origin: Origin | None


@dataclass(frozen=True)
class Target:
    """What the kernels must reach on a GPU, in bf16 at rank 16 and 8192 tokens, and how its rows are known.

    Attributes:
        said: the figure and its bound.
        rows: a pattern for the names of the rows that ``make gpu`` writes.
        records: a pattern for benchmarks that have the ratio under ``field``.
        field: of such a record: a ratio, or ratios by contestant.
        bound: of them.
        at_least: whether the bound is a lower one.
    """

    said: str
    rows: str = ""
    records: str = ""
    field: str = ""
    bound: float = 0.0
    at_least: bool = False


_STEP, _OVER_LORA = "DeBERTa-v3-base training step (32×128)", r".*: ours / PEFT LoRA r=\d+, training step"
TARGETS = (
    Target("forward / bare F.linear: at most 1.08 at 4096² and wider, 1.20 below", r"forward,.*ours / frozen"),
    Target("never slower than the best other plan", r".*ours / the best other.*"),
    Target("forward + backward / bare F.linear: at most 1.15 and 1.40", r"forward \+ backward,.*ours / frozen"),
    Target("PEFT / ours, forward + backward, bf16 adapters: at least 1.4 to 2.5", r".*bfloat16 adapter: PEFT / ours"),
    Target("PEFT / ours, forward + backward, fp32 adapters: at least 2 and 3", r".*float32 adapter: PEFT / ours"),
    Target(
        "importance + masking + orthogonality, PEFT / ours: at least 50",
        records=r"importance \+ masking \+ orthogonality", field="peft_over_ours", bound=50, at_least=True,
    ),
    Target(
        "importance alone / memory floor: at most 1.3",
        records=r"budget engine by number of layers", field="importance_to_copy", bound=1.3,
    ),
    Target(f"{_STEP}: PEFT AdaLoRA / ours at least 3", r".*: PEFT AdaLoRA / ours, training step"),
    Target(f"{_STEP}: ours / PEFT LoRA at most 1, both eager", _OVER_LORA),
    Target(f"{_STEP}: ours / PEFT LoRA at most 1, both as a CUDA graph", rf"{_OVER_LORA}, CUDA graph"),
    Target("host time of an eager layer: ours / PEFT LoRA at most 1", r"host time.*"),
    Target("a group of layers: never slower than one by one", r".*one group.*"),
    Target("saved activations beyond x: u alone, 2·M·Rpad bytes", r".*bytes kept beyond x"),
)  # fmt: skip
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
    gpus = [source for source in sources if source.is_gpu and not any(origin.dry for origin in source.origins)]
    rows = [(row, source.origins[0]) for source in gpus for row in source.content.get("rows", ())]
    for target in TARGETS:
        found = [_row(row, origin) for row, origin in rows if target.rows and re.fullmatch(target.rows, row["name"])]
        found += [verdict for source in gpus for verdict in _recorded(target, source)]
        yield from found or [Verdict(OPEN, f"{capital(target.said)}. No GPU has measured it yet.", None)]
    known = "|".join(target.rows for target in TARGETS if target.rows)
    yield from (_row(row, origin) for row, origin in rows if not re.fullmatch(known, row["name"]))
    checked = [source for source in gpus if "checks_held" in source.content]
    for source in checked:
        failed = [check["name"] for check in source.content["checks"] if check["outcome"] == "FAILED"]
        what = f"{REPEATABLE}: {source.content['checks_held']} hold"
        yield Verdict(
            MISSED if failed else HELD, what + "".join(f"; {name} fails" for name in failed), source.origins[0]
        )
    if not checked:
        yield Verdict(OPEN, f"{REPEATABLE}. No GPU has run them yet.", None)


def _row(row: dict[str, Any], origin: Origin) -> Verdict:
    if row["figure"] is None:
        return Verdict(OPEN, f"{capital(row['name'])}: not measured in this run.", origin)
    return _verdict(row["name"], row["figure"], row["bound"], row["at_least"], origin)


def _recorded(target: Target, source: Source) -> Iterator[Verdict]:
    for m in source.measured:
        if not target.field or target.field not in m.record or not re.fullmatch(target.records, m.benchmark):
            continue
        found = m.record[target.field]
        ratios = found if isinstance(found, dict) else {"ours": found}
        for contestant, ratio in ratios.items():
            what = f"{sentence(m.case)}, {contestant}: {target.said.partition(':')[0]}"
            yield _verdict(what, ratio, target.bound, target.at_least, m.origin)


def _verdict(what: str, figure: float, bound: float, at_least: bool, origin: Origin) -> Verdict:
    if figure >= bound if at_least else figure <= bound:
        return Verdict(
            HELD, f"{capital(what)} is {number(figure)}, {'at least' if at_least else 'at most'} {bound:g}.", origin
        )
    wanted = f"less than the {bound:g} it must reach" if at_least else f"more than the {bound:g} it may be"
    return Verdict(MISSED, f"{capital(what)} is {number(figure)}, {wanted}.", origin)


__all__ = ["HELD", "MISSED", "OPEN", "TARGETS", "Verdict", "on_cpu", "on_gpu"]
