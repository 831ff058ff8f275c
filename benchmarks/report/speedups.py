"""The figures that people ask for first: how many times as long other ways take; and what has no other place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.report.draw import Axes, Bar, Group, bars
from benchmarks.report.figures import Figure, Section, Table
from benchmarks.report.layers import FROZEN, OURS, alike, is_curve, split, what
from benchmarks.report.sources import Measured, Source
from benchmarks.report.wording import labels, name, number, sentence

_NO_RIVALS = (FROZEN, OURS, "triton:")  # by how their names begin
_DRAWN = (
    "ratio_to_frozen", "added_milliseconds", "added_to_backward", "microseconds_per_layer", "phases", "operators",
    "not_captured", "not_compiled",
)  # fmt: skip


def sections(sources: Sequence[Source]) -> Iterator[Section]:
    """Speed-ups over each rival."""
    found = []
    for source in sources:
        if source.file.endswith("-sweep.json"):
            continue
        layers = [m for m in [*source.measured, *source.extra("groups")] if _layer_ratios(m) and not is_curve(m)]
        for group in alike(layers, "benchmark", "direction", "dtype", "adapter", "threads", "R"):
            found += [_figure("Speed-up", part, [_layer_ratios(m) for m in part]) for part in split(group)]
        engines = [m for m in source.measured if "added_milliseconds" in m.record]
        steps = [m for m in source.measured if "phases" in m.record]
        for group in (*alike(engines, "R"), *alike(steps, "dtype", "R", "threads")):
            found += [_figure("Speed-up", group, [_recorded(m) for m in group])]
    yield Section(
        "Speed-up",
        "How many times as long as ours each other way takes; right of the line at 1 ours is faster.",
        found,
    )


def others(sources: Sequence[Source]) -> Iterator[Section]:
    """What was timed and is on no other figure."""
    left = [m for source in sources for m in source.measured if m.milliseconds and not set(_DRAWN) & set(m.record)]
    left += [m for source in sources for m in source.extra("host") if m.milliseconds]
    yield Section("Other measurements", "", [times(m) for m in left])


def times(m: Measured) -> Figure:
    """Bars of one record's times."""
    rows = [
        [name(c), *(number(t[q]) for q in ("median", "p20", "p80"))]
        for c, t in m.milliseconds.items()
    ]  # fmt: skip
    drawn = [Bar(name(c), t["median"], c) for c, t in m.milliseconds.items()]
    return Figure(what([m]), bars([Group("", drawn)], Axes("ms")), Table(["contestant", "ms", "20%", "80%"], rows), [m])


def _layer_ratios(m: Measured) -> dict[str, tuple[float, float]]:
    """Each rival's time over ours, with the noise."""
    ratios = m.record.get("ratio_to_frozen", {})
    if OURS not in ratios:
        return {}
    return {c: (ratios[c] / ratios[OURS], m.noise(c, OURS)) for c in ratios if not c.startswith(_NO_RIVALS)}


def _recorded(m: Measured) -> dict[str, tuple[float, float]]:
    """PEFT's AdaLoRA over each way of ours; and PEFT's LoRA, as far as it is recorded."""
    over = m.record["peft_over_ours"]
    found = {f"PEFT / {name(c)}": (ratio, m.noise(c, "PEFT", "PEFT AdaLoRA")) for c, ratio in over.items()}
    lora = m.record.get("ours_over_lora", {})
    return found | {f"LoRA / {name(c)}": (1 / ratio, m.noise(c, "PEFT LoRA")) for c, ratio in lora.items()}


def _figure(title: str, group: Sequence[Measured], ratios: Sequence[dict[str, tuple[float, float]]]) -> Figure:
    drawn, rows = [], []
    for m, label, found in zip(group, labels([m.case for m in group]), ratios, strict=True):
        bars_of = []
        for rival, (ratio, noise) in found.items():
            inside = abs(ratio - 1) <= noise
            text = f"{ratio:.2f}×" + " ≈" * inside
            colour = rival if "/" not in rival else "orange" if rival.startswith("LoRA") else "vermilion"
            bars_of.append(Bar(name(rival), ratio, colour, text, inside))
            rows.append(
                [
                    label or sentence(m.case),
                    name(rival),
                    f"{ratio:.3f}",
                    f"±{100 * noise:.1f}%",
                    "yes" if inside else "no",
                ]
            )
        drawn.append(Group(label, bars_of))
    return Figure(
        f"{title}: {what(group)}",
        bars(drawn, Axes("times as long as ours"), line=1.0),
        Table(["case", "rival", "ratio to ours", "noise", "inside it"], rows),
        list(group),
        "Hatched bars and ≈: inside the noise." if any(b.unsure for g in drawn for b in g.bars) else "",
    )


__all__ = ["others", "sections"]
