"""The layer's figures: what it costs beyond the frozen linear, how that grows, and the roofline."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from benchmarks.report.draw import Axes, Bar, Curve, Group, bars, curves
from benchmarks.report.figures import Figure, Section, Table
from benchmarks.report.sources import Measured, Source
from benchmarks.report.wording import capital, labels, name, number, sentence, shared

FROZEN, OURS, PEFT = "frozen", "ours", "peft"
_MOST_CASES = 6  # in one plot
BYTES_COPIED = 24  # for each element, by importance (parameter, gradient, both averages, these again) and its copy
_GROWN = (OURS, PEFT, "addmm_", "PEFT LoRA", "ours, pruned", "ours, compacted")
_CYCLE = ("blue", "vermilion", "green", "orange", "purple", "sky")
_LEAST_POINTS = 3
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def sections(sources: Sequence[Source]) -> Iterator[Section]:
    """Bars, growth and roofline, as far as there are records."""
    drawn, grown, roofs = [], [], []
    for source in sources:
        everything = [m for m in source.measured if "ratio_to_frozen" in m.record]
        everything += [m for m in source.extra("groups") if "ratio_to_frozen" in m.record]
        swept = source.file.endswith("-sweep.json")
        for group in alike(everything, "benchmark", "direction", "dtype", "adapter", "threads", "R"):
            if not swept and not is_curve(group[0]):
                drawn += [beyond(part) for part in split(group)]
            if group[0].benchmark.startswith("layer") and not is_curve(group[0]):
                roofs += [roofline(group, source)]
        for group in alike(everything, "benchmark", "direction", "dtype", "adapter", "threads"):
            grown += growth(group)
    yield Section(
        "The layer",
        "Time beyond the frozen linear's, in percent of it: 0 would be an adapter that costs nothing. The mark "
        "across the bars is the floor, which is the low-rank term's own arithmetic at the frozen linear's speed.",
        drawn,
    )
    yield Section(
        "How the layer's cost grows",
        "With tokens, rank, width and pruned rank; everything else as most of the records have it.",
        grown,
    )
    yield Section(
        "Roofline of the layer",
        "Work done in a second against work for each byte that must be moved. The roof is a copy's bandwidth where it "
        "limits, and the fastest product of the same run.",
        [figure for figure in roofs if figure is not None],
    )


def is_curve(m: Measured) -> bool:
    """Whether it is one point of how the cost grows."""
    return m.benchmark.startswith("layer by ") or m.benchmark == "pruned rank"


def alike(measured: Sequence[Measured], *keys: str) -> list[list[Measured]]:
    """The records in groups that agree in these parts of record or case."""
    groups: dict[tuple[str, ...], list[Measured]] = defaultdict(list)
    for m in measured:
        group = (m.origin.file, *(str(m.case.get(key, m.record.get(key))) for key in keys))
        groups[group].append(m)
    return list(groups.values())


def split(group: list[Measured]) -> list[list[Measured]]:
    """One plot's worth each: by tokens, where it is too much for one."""
    return [group] if len(group) <= _MOST_CASES else alike(group, "M")


def what(group: Sequence[Measured]) -> str:
    """The benchmark, and what its cases have in common."""
    direction = group[0].record.get("direction")
    said = ", ".join([group[0].benchmark + (f" {direction}" if direction else ""), *shared([m.case for m in group])])
    return capital(said)


def beyond(group: list[Measured]) -> Figure:
    """Bars of the time beyond the frozen linear."""
    drawn, rows = [], []
    for m, label in zip(group, labels([m.case for m in group]), strict=True):
        ratios = {c: r for c, r in m.record["ratio_to_frozen"].items() if c != FROZEN}
        floor = m.record.get("flop_floor")
        chosen = {c: r for c, r in ratios.items() if OURS not in ratios or not c.startswith("triton:")}
        if OURS in chosen:
            chosen = {OURS: chosen[OURS]} | chosen
        noises = {c: m.noise(FROZEN, c) for c in ratios}
        unsure = {c: abs(ratio - 1) <= noises[c] for c, ratio in ratios.items()}
        bars_of = [
            Bar(name(c), 100 * (ratio - 1), c, f"{100 * (ratio - 1):.1f}" + " ≈" * unsure[c], unsure[c])
            for c, ratio in chosen.items()
        ]
        drawn.append(Group(label, bars_of, None if floor is None else 100 * (floor - 1)))
        rows += [
            [label or sentence(m.case), name(c), number(m.milliseconds[c]["median"]), f"{ratio:.3f}",
             "–" if floor is None else f"{floor:.3f}", f"±{100 * noises[c]:.1f}%", "yes" if unsure[c] else "no"]
            for c, ratio in ratios.items()
        ]  # fmt: skip
    return Figure(
        what(group),
        bars(drawn, Axes("time beyond the frozen linear, %"), limit="floor: its arithmetic"),
        Table(["case", "contestant", "ms", "of frozen", "floor", "noise", "inside it"], rows),
        group,
        "Hatched bars and ≈: inside the noise." if any(b.unsure for g in drawn for b in g.bars) else "",
    )


def growth(group: list[Measured]) -> list[Figure]:
    """Against tokens, rank, width and share of pruned rank, where at least three values of it were measured."""
    found = []
    for key, axis in (("M", "tokens"), ("R", "rank"), ("live", "triplets left")):
        others = [other for other in ("M", "R", "live") if other != key]
        kept = [m for m in group if all(m.case.get(other) == _usual(group, other) for other in others)]
        shapes = [shape for shape in alike(kept, "K", "N") if len({m.case.get(key) for m in shape}) >= _LEAST_POINTS]
        lines = [line for i, shape in enumerate(shapes) for line in _lines(shape, key, len(shapes) > 1, _CYCLE[i % 6])]
        found += _grown(lines, [m for shape in shapes for m in shape], axis)
    squares = [m for m in group if m.case["K"] == m.case["N"]]
    kept = [m for m in squares if all(m.case.get(key) == _usual(squares, key) for key in ("M", "R"))]
    if len({m.case["K"] for m in kept}) >= _LEAST_POINTS:
        found += _grown(list(_lines(kept, "K", False, "")), kept, "width (in- and out-features)")
    return found


def _usual(group: Sequence[Measured], key: str) -> int | None:
    """The value that most have; of several such the one in the middle. None where they have none."""
    counts = Counter(int(m.case[key]) for m in group if key in m.case)
    usual = sorted(value for value, count in counts.items() if count == max(counts.values()))
    return usual[(len(usual) - 1) // 2] if usual else None


def _lines(points: Sequence[Measured], key: str, by_shape: bool, colour: str) -> Iterator[Curve]:
    """A curve for each contestant of one shape; or of ours alone, where there are several shapes; and the floor's."""
    shape = f"{points[0].case['K']}×{points[0].case['N']}"
    for contestant in (OURS,) if by_shape else _GROWN:
        held = [m for m in points if contestant in m.record["ratio_to_frozen"]]
        if held:
            line = [(m.case[key], m.record["ratio_to_frozen"][contestant]) for m in held]
            yield Curve(shape if by_shape else name(contestant), line, colour if by_shape else contestant)
    floors = [(m.case[key], m.record["flop_floor"]) for m in points if "flop_floor" in m.record]
    if floors:
        yield Curve(f"floor, {shape}" if by_shape else "floor", floors, colour if by_shape else "ink", dotted=True)


def _grown(lines: Sequence[Curve], used: Sequence[Measured], axis: str) -> list[Figure]:
    if not lines:
        return []
    ticks = sorted({x for line in lines for x, _ in line.points})
    rows = [[line.name, number(x), f"{y:.3f}"] for line in lines for x, y in sorted(line.points)]
    noise = max(m.noise(FROZEN, OURS) for m in used)
    return [
        Figure(
            f"Against {axis}: {what(used)}",
            curves(lines, Axes(axis, "time / frozen linear", log_x=min(ticks) > 0, ticks=ticks)),
            Table(["", axis, "of frozen"], rows),
            used,
            f"Noise of a point: up to ±{100 * noise:.1f}%.",
        )
    ]


def roofline(group: list[Measured], source: Source) -> Figure | None:
    """Measured points under the roof; None where the run has no copy to draw it by."""
    dtype = group[0].case.get("dtype", "bfloat16")  # on a GPU x and W are bf16
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for m in group:
        k, n, tokens, r = (m.case[key] for key in "KNMR")
        forward = m.record.get("direction") == "forward"
        flop, passes = (2, 1) if forward else (4, 2)
        moved = _BYTES[dtype] * (
            passes * k * n + (1 if forward else 3) * tokens * k + (1 if forward else 2) * tokens * n
        )
        for contestant in (FROZEN, OURS, PEFT, "addmm_"):
            if contestant in m.milliseconds:
                # The low-rank term's: forward 2 products of 2 M R (K or N), backward 4.
                low_rank = 0 if contestant == FROZEN else (2 if forward else 6) * tokens * r * (k + n)
                work = flop * tokens * k * n + low_rank
                points[contestant].append((work / moved, work / m.milliseconds[contestant]["median"] / 1e6))
    bandwidth = _bandwidth(source, group[0])
    if bandwidth is None:
        return None
    ceilings = source.content.get("ceilings") or {}
    peak = 1e3 * ceilings["teraflops"] if ceilings else max(y for line in points.values() for _, y in line)
    farthest = 1.3 * max(x for line in points.values() for x, _ in line)
    roof = [(1.0, bandwidth), (peak / bandwidth, peak), (max(farthest, 2 * peak / bandwidth), peak)]
    lines = [Curve("roof", roof, "ink", dotted=True)]
    lines += [Curve(name(c), of, c, joined=False) for c, of in points.items()]
    rows = [[name(c), number(x), number(y)] for c, of in points.items() for x, y in of]
    rows.insert(0, ["roof: product", "–", number(peak)])
    rows.insert(1, ["roof: copy, GB/s", "–", number(bandwidth)])
    return Figure(
        f"Roofline: {what(group)}",
        curves(lines, Axes("FLOP per byte", "GFLOP/s", log_x=True, log_y=True)),
        Table(["", "FLOP per byte", "GFLOP/s"], rows),
        group,
    )


def _bandwidth(source: Source, like: Measured) -> float | None:
    """GB/s of a plain copy in the same run."""
    ceilings = source.content.get("ceilings")
    if ceilings:
        return float(1e3 * ceilings["terabytes_per_second"])
    found = [
        BYTES_COPIED * m.case["elements"] / m.milliseconds["copy"]["median"] / 1e6
        for m in source.measured
        if "importance_to_copy" in m.record and m.case["threads"] == like.case.get("threads")
    ]
    return max(found, default=None)


__all__ = ["BYTES_COPIED", "FROZEN", "OURS", "PEFT", "alike", "is_curve", "sections", "split", "what"]
