"""``adalora-kernels ranks CHECKPOINT``: how an adapter's rank budget is spent, as a heat map and a table."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from adalora_kernels.cli.errors import make_folder, plain_errors
from adalora_kernels.cli.rank_map import as_text, draw, kinds_of, rank_map
from adalora_kernels.cli.tables import aligned
from adalora_kernels.integrations.adapter import Adapter, Factors, read_checkpoint


def main(arguments: argparse.Namespace) -> int:
    """Print map and table, write the picture; always 0.

    Raises:
        SystemExit: the checkpoint can't be read, or the picture can't be written.
    """
    with plain_errors("ranks"):
        adapter = read_checkpoint(arguments.checkpoint)
        ranks = rank_map(f"in {arguments.checkpoint}", adapter.ranks(), initial_rank(adapter))
        picture = arguments.output / "ranks.png" if arguments.output.is_dir() else arguments.output
        make_folder(picture.parent)
        draw([ranks], f"Budget {target_rank(adapter)}", picture)
    print(as_text(ranks), "", *budget_table(adapter), "", *notes(adapter), sep="\n")
    print(f"Picture: {picture}")
    return 0


def initial_rank(adapter: Adapter) -> int:
    """Of every matrix; from the config, since files hold live rows only."""
    return int(adapter.config["init_r"])


def target_rank(adapter: Adapter) -> int:
    """The budget at the end, in triplets."""
    return int(adapter.config["target_r"]) * len(adapter.layers)


def budget_table(adapter: Adapter) -> list[str]:
    """Live triplets by kind of matrix, with their share of the initial ones and their parameters."""
    by_kind: dict[str, dict[str, Factors]] = {}
    for path, (kind, _) in kinds_of(adapter.layers).items():
        by_kind.setdefault(kind, {})[path] = adapter.layers[path]
    initial = initial_rank(adapter)
    rows: list[tuple[str, ...]] = [("", "matrices", "live", "initial", "share", "parameters")]
    rows += [_row(kind, layers, initial) for kind, layers in by_kind.items()]
    rows.append(_row("total", adapter.layers, initial))
    target, count = target_rank(adapter), len(adapter.layers)
    rows.append(("target", "", str(target), "", _share(target, initial * count), ""))
    return aligned(rows)


def _row(name: str, layers: Mapping[str, Factors], initial: int) -> tuple[str, ...]:
    live = [f.live_rank for f in layers.values()]
    # A triplet has a row of A, a column of B and a singular value.
    parameters = sum(rank * (f.A.shape[1] + f.B.shape[0] + 1) for rank, f in zip(live, layers.values(), strict=True))
    at_first = initial * len(layers)
    return name, str(len(layers)), str(sum(live)), str(at_first), _share(sum(live), at_first), f"{parameters:,}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def notes(adapter: Adapter) -> list[str]:
    """What the figures mean for this adapter."""
    ranks, target = adapter.ranks(), target_rank(adapter)
    live, dead = sum(ranks.values()), sum(rank == 0 for rank in ranks.values())
    found = ["A triplet is live while its singular value is not 0; parameters are those of live triplets."]
    if live == 0:
        found.append("None is: the adapter is untrained, and gives what its base gives.")
    elif live > target:
        found.append(
            f"{live - target} more than the target: it was saved before pruning was over, or nothing is pruned."
        )
    if live and dead:
        found.append(f"{dead} of {len(ranks)} matrices have no rank left and are left to the base.")
    return found


__all__ = ["budget_table", "initial_rank", "main", "notes", "target_rank"]
