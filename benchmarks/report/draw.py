"""Plots as SVG, which follows the reader's light or dark theme, and as PNG.

All are as wide as a phone's column and shown at that size, so that no text shrinks. The colours are Okabe and Ito's,
which people with any kind of colour vision can tell apart; bars also bear their names, and curves their own marks.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import matplotlib.lines
import matplotlib.patches
import matplotlib.ticker
from matplotlib.figure import Figure

from benchmarks.report.wording import number

WIDTH = 340  # pixels
_INCHES = WIDTH / 96
_ROW, _HEADER, _AROUND = 0.2, 0.24, 0.62  # inches
_DPI = 200
# By role, on a light and on a dark page. Each light one is unlike all others: it is what the SVG's colour is found by.
_COLOURS = {
    "ink": ("#1b1c1e", "#e8e8ea"),
    "faint": ("#8a8d92", "#8b8f96"),
    "blue": ("#0072b2", "#4aa8e0"),
    "sky": ("#56b4e9", "#9ad4f7"),
    "vermilion": ("#d55e00", "#f08a3c"),
    "green": ("#009e73", "#2fc79a"),
    "orange": ("#e69f00", "#f5c04d"),
    "purple": ("#cc79a7", "#e3a3c6"),
    "grey": ("#6f7378", "#a9adb3"),
}
_OF_CONTESTANT = {
    "ours": "blue",
    "native": "blue",
    "ours, AdaLoraAdamW": "sky",
    "PEFT": "vermilion",
    "peft": "vermilion",
    "PEFT AdaLoRA": "vermilion",
    "addmm_": "green",
    "PEFT LoRA": "orange",
    "PEFT AdaLoRA, eager": "vermilion",
    "PEFT LoRA, eager": "orange",
    "reference": "purple",
    "full fine-tuning": "purple",
    "original": "purple",
    "original, torch.compile": "purple",
    "ours, torch.compile": "sky",
    "ours, pruned": "vermilion",
    "ours, compacted": "blue",
    "frozen": "grey",
    "frozen model": "grey",
    "copy": "grey",
    "AdamW alone": "grey",
    "launched": "blue",
    "fused": "orange",
}
_CYCLE = ("blue", "vermilion", "green", "orange", "purple", "sky", "grey")
_UNKNOWN = _CYCLE.index("grey")
_MARKS = "osD^vPX"
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.2,  # points, which is 12.3 pixels
    "axes.labelsize": 9.2,
    "xtick.labelsize": 9.2,
    "ytick.labelsize": 9.2,
    "legend.fontsize": 9.2,
    "text.color": _COLOURS["ink"][0],
    "axes.labelcolor": _COLOURS["ink"][0],
    "xtick.color": _COLOURS["ink"][0],
    "ytick.color": _COLOURS["ink"][0],
    "axes.edgecolor": _COLOURS["faint"][0],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.color": "white",
    "hatch.linewidth": 1.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "adalora-kernels",  # equal records give equal files
}


@dataclass(frozen=True)
class Plot:
    """A picture.

    Attributes:
        svg: for the page.
        png: for elsewhere, on white.
    """

    svg: str
    png: bytes


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        name: written beside it.
        values: its length; or its parts, by name.
        colour: a role, by contestant where there is none of that name.
        text: at its end; the length where it is empty.
        unsure: whether it is hatched, for a figure inside the noise.
    """

    name: str
    values: float | Mapping[str, float]
    colour: str
    text: str = ""
    unsure: bool = False


@dataclass(frozen=True)
class Group:
    """Bars under one heading, with a mark across them where there is a limit."""

    heading: str
    bars: Sequence[Bar]
    limit: float | None = None


@dataclass(frozen=True)
class Curve:
    """Points of one thing, joined; ``dotted`` for a floor or a ceiling, which is calculated."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str = ""
    dotted: bool = False
    joined: bool = True


@dataclass(frozen=True)
class Axes:
    """Titles with units, and scales."""

    x: str
    y: str = ""
    log_x: bool = False
    log_y: bool = False
    ticks: Sequence[float] = field(default=())


def bars(groups: Sequence[Group], axes: Axes, line: float | None = None, limit: str = "") -> Plot:
    """Horizontal bars, each with its name and value.

    Args:
        groups: from top to bottom.
        axes: the title of the lengths.
        line: a vertical line for what all are compared with.
        limit: what the groups' marks stand for.
    """
    rows = sum(len(group.bars) for group in groups)
    headings = sum(bool(group.heading) for group in groups)
    parts = list(dict.fromkeys(part for g in groups for b in g.bars for part in _parts(b) if part))
    limited = any(group.limit is not None for group in groups)
    keys = -(-len(parts) // 2) + limited
    with matplotlib.rc_context(_STYLE):
        figure, ax = _figure(_AROUND + _ROW * rows + _HEADER * headings + 0.22 * keys)
        at, places, names = 0.0, [], []
        longest = max(sum(_parts(b).values()) for g in groups for b in g.bars)
        for group in groups:
            if group.heading:
                at += _HEADER / _ROW / 2
                ax.annotate(
                    group.heading, (0, at), xycoords=("figure fraction", "data"), xytext=(3, 0),
                    textcoords="offset points", va="center", weight="bold", annotation_clip=False,
                )  # fmt: skip
                at += _HEADER / _ROW / 2 + 0.4
            first = at
            for bar in group.bars:
                _draw(ax, at, bar, parts, longest, line or 0.0)
                places.append(at)
                names.append(bar.name)
                at += 1
            if line is not None:
                ax.plot([line] * 2, [first - 0.5, at - 0.5], color=_hex("ink"), linewidth=1, linestyle="--")
            if group.limit is not None:
                ax.plot([group.limit] * 2, [first - 0.5, at - 0.5], color=_hex("ink"), linewidth=2)
        ax.set_yticks(places, names)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.set_ylim(at - 0.4, -0.7)
        ax.set_xlim(min(0.0, *(sum(_parts(b).values()) for g in groups for b in g.bars)), longest * 1.22)
        ax.locator_params(axis="x", nbins=5)
        ax.set_xlabel(axes.x)
        handles: list[Any] = [matplotlib.patches.Patch(color=_of(part, i), label=part) for i, part in enumerate(parts)]
        if limited:
            handles.append(matplotlib.lines.Line2D([], [], color=_hex("ink"), linewidth=2, label=limit))
        if handles:
            figure.legend(handles=handles, loc="outside upper left", ncols=min(2, len(handles)), frameon=False)
        return _saved(figure)


def curves(lines: Sequence[Curve], axes: Axes) -> Plot:
    """Points against a number."""
    with matplotlib.rc_context(_STYLE):
        figure, ax = _figure(2.3 + 0.2 * -(-len(lines) // 2))
        for i, line in enumerate(lines):
            xs, ys = zip(*sorted(line.points), strict=True)
            ax.plot(
                xs, ys, color=_hex(line.colour) if line.colour in _COLOURS else _of(line.colour or line.name, i),
                linestyle=":" if line.dotted else "-" if line.joined else "", linewidth=1.8,
                marker="" if line.dotted else _MARKS[i % len(_MARKS)], markersize=5, label=line.name,
            )  # fmt: skip
        if axes.log_x:
            _logarithmic(ax.set_xscale, ax.xaxis)
        if axes.log_y:
            _logarithmic(ax.set_yscale, ax.yaxis)
        else:
            heights = [y for line in lines for _, y in line.points]
            ax.set_ylim(min(0.0, *heights), 1.08 * max(heights))
        if axes.ticks:
            ax.set_xticks(axes.ticks, [f"{tick:g}" for tick in axes.ticks])
            ax.minorticks_off()
        ax.set_xlabel(axes.x)
        ax.set_ylabel(axes.y)
        ax.grid(color=_hex("faint"), linewidth=0.4)
        figure.legend(loc="outside upper left", ncols=2, frameon=False, columnspacing=1.0, handlelength=1.6)
        return _saved(figure)


def _figure(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(_INCHES, height), layout="constrained")
    return figure, figure.subplots()


def _logarithmic(scale: Any, axis: Any) -> None:
    """With numbers as they are, since powers of ten would be set too small to read."""
    scale("log")
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0), numticks=7))
    axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def _parts(bar: Bar) -> Mapping[str, float]:
    return bar.values if isinstance(bar.values, Mapping) else {"": bar.values}


def _draw(ax: Any, at: float, bar: Bar, parts: Sequence[str], longest: float, line: float) -> None:
    end = 0.0
    for part, value in _parts(bar).items():
        colour = _of(part, parts.index(part)) if part else _of(bar.colour, _UNKNOWN)
        ax.barh(at, value, left=end, height=0.78, color=colour, hatch="///" if bar.unsure else None)
        end += value
    ax.text(max(end, line) + 0.015 * longest, at, bar.text or number(end), va="center")


def _of(name: str, index: int) -> str:
    if name in _COLOURS:
        return _hex(name)
    whose = next(
        (known for known in (name, name.partition(",")[0], name.partition(" ")[0]) if known in _OF_CONTESTANT), ""
    )
    return _hex(_OF_CONTESTANT[whose] if whose else _CYCLE[index % len(_CYCLE)])


def _hex(role: str) -> str:
    return _COLOURS[role][0]


def _saved(figure: Figure) -> Plot:
    picture, text = io.BytesIO(), io.StringIO()
    figure.savefig(picture, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Plot(_themed(text.getvalue()), picture.getvalue())


def _themed(svg: str) -> str:
    """Colours by role, so that a dark page has its own."""
    for role, (light, _) in _COLOURS.items():
        svg = svg.replace(light, f"var(--{role})")
    light, dark = (";".join(f"--{role}:{both[i]}" for role, both in _COLOURS.items()) for i in (0, 1))
    style = f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}text{{font-family:sans-serif}}"
    return svg[svg.index("<svg") :].replace("<defs>", f"<style>{style}</style><defs>", 1)


__all__ = ["WIDTH", "Axes", "Bar", "Curve", "Group", "Plot", "bars", "curves"]
