"""Whole training steps: their phases, the memory that a forward keeps, and the operators that reach the dispatcher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.report.draw import Axes, Bar, Curve, Group, bars, curves
from benchmarks.report.figures import Figure, Section, Table
from benchmarks.report.layers import alike, what
from benchmarks.report.sources import Measured, Source
from benchmarks.report.wording import capital, labels, name, number, phrases, sentence, shared
from benchmarks.step.names import LORA, OURS, OURS_AGAIN, PEFT, eager

WHOLE = "step"
_MIB = 1 << 20
_REFUSED = {"not_captured", "not_compiled"}  # where records say which contestants are missing, and why


def sections(sources: Sequence[Source]) -> Iterator[Section]:
    """Time, memory and operators."""
    every = [m for source in sources for m in source.measured]
    timed = [m for m in every if "phases" in m.record]
    yield Section(
        "Training steps",
        "Forward, backward, optimizer and AdaLoRA's own work, medians; all contestants in turn on equal weights and "
        "batches, after a check that the AdaLoRAs' losses agree.",
        [phases(m) for m in timed],
    )
    yield Section(
        "Training steps as CUDA graphs and compiled",
        "The same steps, each replayed as one CUDA graph, or with forward and backward by torch.compile; beside PEFT's "
        "as they are.",
        [whole(m) for m in every if not _REFUSED.isdisjoint(m.record)],
    )
    grown = [
        figure
        for key, axis in (("rows", "sequences in a batch"), ("columns", "tokens in a sequence"), ("R", "rank"))
        for group in alike(timed, "model", "dtype", "threads", *({"rows", "columns", "R"} - {key}))
        for figure in growth(group, key, axis)
    ]
    yield Section("How a training step's cost grows", "Medians of whole steps.", grown)
    kept = [m for m in every if isinstance(m.record.get("saved_bytes"), Mapping)]
    seen = {(m.origin.file, str(m.case.get("model"))) for m in kept if "phases" in m.record}
    kept = [m for m in kept if "phases" in m.record or (m.origin.file, str(m.case.get("model"))) not in seen]
    peaks = [m for m in every if "peak_bytes" in m.record]
    yield Section(
        "Memory",
        "Bytes of the distinct storages that a forward keeps for its backward, parameters aside.",
        [memory(group, "saved_bytes", "Saved for the backward") for group in alike(kept, "dtype", "R")]
        + [memory(g, "peak_bytes", "Peak of a step, beyond what it finds") for g in alike(peaks, "dtype", "R")],
    )
    yield Section(
        "Operators of a training step",
        "Calls that reach the dispatcher, views aside; one that loops over tensors counts once for each. They are the "
        "same on every machine.",
        [operators(m) for m in every if "operators" in m.record],
    )


def phases(m: Measured) -> Figure:
    """One model's step as stacked bars."""
    held = {c: by for c, by in m.record["phases"].items() if c != OURS_AGAIN}
    times = m.milliseconds
    drawn = [Bar(name(c), by, c, number(times[c]["median"])) for c, by in held.items()]
    names = list(next(iter(held.values())))
    rows = [
        [name(c), number(times[c]["median"]), number(times[c]["p20"]), number(times[c]["p80"]),
         *(number(by[phase]) for phase in names)]
        for c, by in held.items()
    ]  # fmt: skip
    return Figure(
        ", ".join(phrases(m.case)),
        bars([Group("", drawn)], Axes("ms a step")),
        Table(["contestant", "ms", "20%", "80%", *(f"{phase}, ms" for phase in names)], rows),
        [m],
        _ratios(m),
    )


def whole(m: Measured) -> Figure:
    """One model's steps as bars, and who is not among them."""
    times = {c: t for c, t in m.milliseconds.items() if c != OURS_AGAIN}
    refused = [f"not {name(c)}: {why}" for field in sorted(_REFUSED) for c, why in m.record.get(field, {}).items()]
    return Figure(
        ", ".join(phrases(m.case)),
        bars(
            [Group("", [Bar(name(c), t["median"], c, number(t["median"])) for c, t in times.items()])],
            Axes("ms a step"),
        ),
        Table(
            ["contestant", "ms", "20%", "80%"],
            [[name(c), *(number(t[q]) for q in ("median", "p20", "p80"))] for c, t in times.items()],
        ),
        [m],
        " ".join([capital(_ratios(m)), *(f"{capital(text)}." for text in refused)]),
    )


def _ratios(m: Measured) -> str:
    """Ours beside PEFT's AdaLoRA and LoRA, in a sentence, with the noise."""
    noise = m.noise(OURS, PEFT)
    said = [
        f"{peft} takes {_marked(ratio, noise)} of {name(c)}"
        for field, peft in (("peft_over_ours", PEFT), ("eager_peft_over_ours", f"{eager(PEFT)},"))
        for c, ratio in m.record.get(field, {}).items()
    ]
    said += [
        f"{name(c)} takes {_marked(ratio, noise)} of {LORA}" for c, ratio in m.record.get("ours_over_lora", {}).items()
    ]
    return "; ".join([*said, f"noise ±{100 * noise:.1f}%."])


def _marked(ratio: float, noise: float) -> str:
    return f"{ratio:.2f}×" + (" (≈, inside the noise)" if abs(ratio - 1) <= noise else "")


def growth(group: list[Measured], key: str, axis: str) -> list[Figure]:
    """Milliseconds against one number, where several of it were measured."""
    ticks = sorted({m.case[key] for m in group if m.case.get(key) is not None})
    if len(ticks) < 2:
        return []
    names = [c for c in group[0].milliseconds if c != OURS_AGAIN]
    lines = [
        Curve(name(c), [(m.case[key], m.milliseconds[c]["median"]) for m in group if c in m.milliseconds], c)
        for c in names
    ]
    rows = [[line.name, number(x), number(y)] for line in lines for x, y in sorted(line.points)]
    return [
        Figure(
            f"Against {axis}: {what(group)}",
            curves(lines, Axes(axis, "ms a step", log_x=True, ticks=ticks)),
            Table(["contestant", axis, "ms"], rows),
            group,
        )
    ]


def memory(group: list[Measured], field: str, title: str) -> Figure:
    """Bytes of each contestant under this field of the records, by model."""
    common = shared([m.case for m in group])
    drawn, rows = [], []
    for m, label in zip(group, labels([m.case for m in group]), strict=True):
        kept: Mapping[str, Any] = {c: b for c, b in m.record[field].items() if c != OURS_AGAIN}
        drawn.append(Group(label, [Bar(name(c), b / _MIB, c) for c, b in kept.items()]))
        rows += [
            [label or sentence(m.case), name(c), number(b / _MIB), f"{b:,}".replace(",", "\u202f")]
            for c, b in kept.items()
        ]
    return Figure(
        ", ".join([title, *common]),
        bars(drawn, Axes("MiB")),
        Table(["model", "contestant", "MiB", "bytes"], rows),
        group,
    )


def operators(m: Measured) -> Figure:
    """Operators of one model's step as stacked bars."""
    held: Mapping[str, Mapping[str, int]] = m.record["operators"]
    parts = {c: {phase: n for phase, n in by.items() if phase != WHOLE} for c, by in held.items()}
    names = list(next(iter(parts.values())))
    rows = [
        [name(c), str(held[c].get(WHOLE, sum(by.values()))), *(str(by[phase]) for phase in names)]
        for c, by in parts.items()
    ]
    return Figure(
        "Operators: " + ", ".join(phrases(m.case)),
        bars(
            [Group("", [Bar(name(c), by, c, number(sum(by.values()))) for c, by in parts.items()])], Axes("operators")
        ),
        Table(["contestant", "step", *names], rows),
        [m],
    )


__all__ = ["sections"]
