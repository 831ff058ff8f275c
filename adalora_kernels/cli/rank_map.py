"""The ranks left as a heat map, in the terminal and as a PNG: layers to the right, kinds of matrices downwards."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

COLOUR_SCALE = "viridis"
_SHADES = " ░▒▓█"
_MANY = 16  # columns side by side; more are drawn narrower


@dataclass(frozen=True)
class RankMap:
    """Ranks by kind of matrix and layer.

    Attributes:
        title: whose ranks they are.
        rows: kinds of matrices.
        columns: layers.
        ranks: triplets left by (kind, layer); a kind that a layer doesn't have is missing.
        initial: rank of every matrix at first.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    ranks: Mapping[tuple[str, str], int]
    initial: int

    @property
    def total(self) -> int:
        """Triplets left in all."""
        return sum(self.ranks.values())


def kinds_of(paths: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Kind and layer of each module path: the layer is the first number in it, "-" where there is none.

    "bert.encoder.layer.3.output.dense" is output.dense of layer 3. In models with several stacks of layers a kind
    begins with what tells its stack from the others: decoder.self_attn.k_proj.
    """
    split = {path: _split(path.split(".")) for path in paths}
    stacks = list(dict.fromkeys(stack for stack, layer, _ in split.values() if layer != "-"))
    first = _alike(stacks)
    last = _alike([stack[first:][::-1] for stack in stacks])
    own = {stack: stack[first : len(stack) - last] for stack in stacks}
    return {path: (".".join((*own.get(stack, ()), *rest)), layer) for path, (stack, layer, rest) in split.items()}


def _split(parts: Sequence[str]) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
    """What comes before the layer's number, the number, and what comes after it."""
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ((), "-", tuple(parts)) if at is None else (tuple(parts[:at]), parts[at], tuple(parts[at + 1 :]))


def _alike(sequences: Sequence[Sequence[str]]) -> int:
    """How many leading items all have in common."""
    return sum(1 for _ in takewhile(lambda items: len(set(items)) == 1, zip(*sequences, strict=False)))


def rank_map(title: str, ranks: Mapping[str, int], initial: int) -> RankMap:
    """The map of a model's live ranks, given by module path."""
    places = kinds_of(ranks)
    layers = {layer for _, layer in places.values()}
    return RankMap(
        title=title,
        rows=list(dict.fromkeys(kind for kind, _ in places.values())),
        columns=sorted(layers, key=lambda layer: (layer == "-", len(layer), layer)),
        ranks={places[path]: rank for path, rank in ranks.items()},
        initial=initial,
    )


def as_text(ranks: RankMap, width: int | None = None) -> str:
    """The map as text, shaded by the share of the initial rank; in several parts where it is wider than ``width``.

    Args:
        ranks: what to show.
        width: in characters; None for the terminal's.
    """
    width = width or shutil.get_terminal_size().columns
    label, digits = max(map(len, ranks.rows)), max(2, len(str(ranks.initial)))
    bar, gap = (4, 3) if label + len(ranks.columns) * (digits + 8) <= width else (1, 1)
    cell = gap + bar + (bar > 1) + digits
    at_once = max(1, (width - label) // cell)
    lines = [f"Triplets left of {ranks.initial} {ranks.title}, by layer:"]
    for start in range(0, len(ranks.columns), at_once):
        columns = ranks.columns[start : start + at_once]
        lines.append(" " * label + "".join(column.rjust(cell) for column in columns))
        for row in ranks.rows:
            cells = (_cell(ranks.ranks.get((row, column)), ranks.initial, bar, digits) for column in columns)
            lines.append((row.ljust(label) + "".join(text.rjust(cell) for text in cells)).rstrip())
    return "\n".join(lines)


def _cell(rank: int | None, initial: int, bar: int, digits: int) -> str:
    if rank is None:
        return ""
    shade = _SHADES[min(-(-rank * (len(_SHADES) - 1) // initial), len(_SHADES) - 1)]
    return shade * bar + " " * (bar > 1) + f"{rank:>{digits}}"


def draw(maps: Sequence[RankMap], heading: str, path: Path) -> None:
    """Write the maps as a PNG, side by side on one colour scale. They have the same rows and the same initial rank."""
    # The figure alone, without pyplot: no window system is asked for, and no global state is left behind.
    from matplotlib.figure import Figure

    rows, initial = maps[0].rows, maps[0].initial
    count = sum(len(ranks.columns) for ranks in maps)
    wide, size = (0.75, "medium") if count <= _MANY else (0.4, "x-small")
    width = max(5.0, 1.8 + 0.08 * max(map(len, rows)) + wide * count)
    figure = Figure(figsize=(width, 1.8 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    for ax, ranks in zip(axes, maps, strict=True):
        grid = [[ranks.ranks.get((row, column), float("nan")) for column in ranks.columns] for row in rows]
        image = ax.imshow(grid, cmap=COLOUR_SCALE, vmin=0, vmax=initial, aspect="auto")
        for (row, column), rank in ranks.ranks.items():
            # Dark cells at the low end of the scale want light figures.
            colour = "white" if rank < 0.6 * initial else "black"
            place = (ranks.columns.index(column), rows.index(row))
            ax.text(*place, str(rank), ha="center", va="center", color=colour, fontsize=size)
        ax.set_title(f"{ranks.title}\n{ranks.total} triplets left", fontsize="medium")
        ax.set_xticks(range(len(ranks.columns)), ranks.columns, fontsize=size)
        ax.set_xlabel("layer")
    axes[0].set_yticks(range(len(rows)), rows)
    figure.colorbar(image, ax=axes, label=f"rank left of {initial} ({COLOUR_SCALE})")
    figure.suptitle(heading)
    figure.savefig(path, format="png", dpi=150)


__all__ = ["COLOUR_SCALE", "RankMap", "as_text", "draw", "kinds_of", "rank_map"]
