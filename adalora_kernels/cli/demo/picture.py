"""The ranks left, as a heat map: layers to the right, matrices downwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adalora_kernels.cli.demo.settings import MATRICES, Settings
from adalora_kernels.cli.demo.train import Contender

COLOUR_SCALE = "viridis"


def draw_ranks(contenders: Sequence[Contender], settings: Settings, path: Path) -> None:
    """Write one heat map for each contender, side by side on one colour scale, as a PNG."""
    # The figure alone, without pyplot: no window system is asked for, and no global state is left behind.
    from matplotlib.figure import Figure

    names = list(MATRICES.values())
    figure = Figure(figsize=(2.5 + 0.75 * settings.layers * len(contenders), 4.2), layout="constrained")
    axes = figure.subplots(1, len(contenders), sharey=True, squeeze=False)[0]
    for ax, contender in zip(axes, contenders, strict=True):
        ranks = contender.live_ranks()
        grid = [[ranks[layer, name] for layer in range(settings.layers)] for name in names]
        image = ax.imshow(grid, cmap=COLOUR_SCALE, vmin=0, vmax=settings.init_rank, aspect="auto")
        for row, values in enumerate(grid):
            for column, rank in enumerate(values):
                # Dark cells at the low end of the scale want light figures.
                colour = "white" if rank < 0.6 * settings.init_rank else "black"
                ax.text(column, row, str(rank), ha="center", va="center", color=colour)
        ax.set_title(f"{contender.name}\n{sum(ranks.values())} triplets left", fontsize="medium")
        ax.set_xticks(range(settings.layers))
        ax.set_xlabel("layer")
    axes[0].set_yticks(range(len(names)), names)
    figure.colorbar(image, ax=axes, label=f"rank left of {settings.init_rank} (colour scale: {COLOUR_SCALE})")
    figure.suptitle(f"Ranks after {settings.steps} steps, budget {settings.target_budget}")
    figure.savefig(path, dpi=150)


__all__ = ["COLOUR_SCALE", "draw_ranks"]
