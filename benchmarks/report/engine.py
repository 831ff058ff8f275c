"""The budget engine's figures: what importance, masking and orthogonality add to a step, and how they grow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from benchmarks.report.draw import Axes, Bar, Curve, Group, bars, curves
from benchmarks.report.figures import Figure, Section, Table
from benchmarks.report.layers import BYTES_COPIED, alike, what
from benchmarks.report.sources import Measured, Source
from benchmarks.report.wording import capital, labels, name, number, sentence, shared


def sections(sources: Sequence[Source]) -> Iterator[Section]:
    """What is added, and the growth of its parts."""
    every = [m for source in sources for m in source.measured]
    added = [added_to_step(g) for g in alike([m for m in every if "added_milliseconds" in m.record], "R")]
    added += [added_to_backward(g) for g in alike([m for m in every if "added_to_backward" in m.record], "threads")]
    yield Section(
        "The budget engine",
        "What AdaLoRA does beside forward and backward: importance, masking and orthogonality. Its cost is what a step "
        "takes beyond the optimizer's own.",
        added,
    )
    parts = [m for m in every if "microseconds_per_layer" in m.record]
    grown = [figure for group in alike(parts, "model", "threads") for figure in by_layers(group)]
    grown += [copy_floor(group) for group in alike([m for m in parts if "importance_to_copy" in m.record], "threads")]
    yield Section(
        "How the budget engine's cost grows",
        "Its parts by the number of adapted layers, beside plain PyTorch that goes through them one by one; and the "
        "bandwidth that importance reaches, beside a plain copy of as many bytes.",
        grown,
    )


def added_to_step(group: list[Measured]) -> Figure:
    """Milliseconds that each side adds to the optimizer's."""
    drawn, rows = [], []
    for m, label in zip(group, labels([m.case for m in group]), strict=True):
        added, over = m.record["added_milliseconds"], m.record["peft_over_ours"]
        drawn.append(
            Group(
                label,
                [
                    Bar(name(c), value, c, f"{number(value)}" + (f" ({over[c]:.1f}× less)" if c in over else ""))
                    for c, value in added.items()
                ],
            )
        )
        alone = m.milliseconds["AdamW alone"]["median"]
        rows += [
            [label or sentence(m.case), name(c), number(value), f"{over[c]:.2f}" if c in over else "–", number(alone),
             f"±{100 * m.noise('AdamW alone', c):.1f}%"]
            for c, value in added.items()
        ]  # fmt: skip
    return Figure(
        what(group),
        bars(drawn, Axes("ms added to a step")),
        Table(["case", "contestant", "ms added", "PEFT / it", "AdamW alone, ms", "noise"], rows),
        group,
    )


def added_to_backward(group: list[Measured]) -> Figure:
    """Milliseconds that importance adds to a backward, either way."""
    drawn, rows = [], []
    for m, label in zip(group, labels([m.case for m in group]), strict=True):
        found = m.record["added_to_backward"]
        unsure = {way: t["p20"] <= 0 <= t["p80"] for way, t in found.items()}
        drawn.append(
            Group(
                label,
                [
                    Bar(name(w), t["median"], w, number(t["median"]) + " ≈" * unsure[w], unsure[w])
                    for w, t in found.items()
                ],
            )
        )
        alone = number(m.milliseconds["backward alone"]["median"])
        rows += [
            [
                label or sentence(m.case),
                name(w),
                *(number(t[q]) for q in ("median", "p20", "p80")),
                "yes" if unsure[w] else "no",
                alone,
            ]
            for w, t in found.items()
        ]
    return Figure(
        what(group),
        bars(drawn, Axes("ms added to the backward")),
        Table(["case", "way", "ms added", "20%", "80%", "inside the noise", "backward alone, ms"], rows),
        group,
        "Hatched bars and ≈: inside the noise, since 0 lies between the percentiles." if "≈" in str(drawn) else "",
    )


def by_layers(group: list[Measured]) -> list[Figure]:
    """Microseconds a layer of each part, where several numbers of layers were measured."""
    counts = sorted({m.case["layers"] for m in group})
    if len(counts) < 2:
        return []
    found = []
    for part in group[0].record["microseconds_per_layer"]:
        lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for m in group:
            for backend, value in m.record["microseconds_per_layer"][part].items():
                lines[backend].append((m.case["layers"], value))
        rows = [[name(b), str(x), number(y)] for b, line in lines.items() for x, y in sorted(line)]
        found.append(
            Figure(
                capital(", ".join([name(part), *shared([m.case for m in group])])),
                curves(
                    [Curve(name(backend), line, backend) for backend, line in lines.items()],
                    Axes("adapted layers", "µs a layer", log_x=True, log_y=True, ticks=counts),
                ),
                Table(["backend", "layers", "µs a layer"], rows),
                group,
            )
        )
    return found


def copy_floor(group: list[Measured]) -> Figure:
    """Bandwidth of importance beside a copy's."""
    lines: dict[str, list[tuple[float, float]]] = {"copy": [], "native": []}
    rows = []
    for m in group:
        moved = BYTES_COPIED * m.case["elements"]
        for line, contestant in (("copy", "copy"), ("native", "importance, native")):
            lines[line].append((moved / 1e6, moved / m.milliseconds[contestant]["median"] / 1e6))
        rows.append(
            [f"{m.case['layers']} × {m.case['model']}", number(moved / 1e6), number(lines["native"][-1][1]),
             number(lines["copy"][-1][1]), f"{m.record['importance_to_copy']:.2f}",
             f"±{100 * m.noise('importance, native', 'copy'):.1f}%"]
        )  # fmt: skip
    return Figure(
        ", ".join(["Importance against the copy floor", *shared([m.case for m in group])]),
        curves(
            [Curve("plain copy", lines["copy"], "copy"), Curve("importance, ours", lines["native"], "native")],
            Axes("MB moved", "GB/s", log_x=True),
        ),
        Table(["layers", "MB", "importance, GB/s", "copy, GB/s", "time / copy", "noise"], rows),
        group,
    )


__all__ = ["sections"]
