"""What was measured on a device: the plans and tiles that take the place of the calculated ones there.

``measured.json``, which ``benchmarks/tune.py`` writes, holds for a compute capability and a minor version of triton

    {"9.0": {"3.6": {"evidence": [...], "tiles": [...], "plans": [...]}}}

(the evidence are files in benchmarks/results). A tile serves the ranks up to its own, above the next lower. A plan
serves calls near the one that was measured: loads of the same width, and M, K, N and R within a factor of four
altogether. Each entry names the source of the kernels that it was measured with (``sources``), and is left aside when
that has changed since; the reason that ``explain`` gives says so. Where nothing of the kind was measured, as on every
device that is not in the file, the static tables and the calculated costs hold.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from math import log2
from pathlib import Path
from typing import Any, NamedTuple

from adalora_kernels.backends.triton.sources import fingerprint, fingerprint_of_all

PATH = Path(__file__).with_name("measured.json")
_REACH = 2.0  # in powers of two, summed over M, K, N and R
Fields = tuple[int, int, int, int, int]  # block_m, block_n, block_k, num_warps, num_stages


class Point(NamedTuple):
    """A call whose plans were timed: with every gradient asked for, that of x too, and nothing dropped.

    Attributes:
        M, K, N, R: its sizes.
        width: of the loads of its main loops (``tiles.Width``).
        adapter_bytes: of an element of the adapter.
    """

    M: int
    K: int
    N: int
    R: int
    width: str
    adapter_bytes: int


class Table(NamedTuple):
    """What was measured for one capability and one minor version of triton.

    Attributes:
        evidence: the records that it comes from.
        tiles: (kernel, width) -> largest rank -> the fields of its tile.
        plans: (direction, point) -> the fastest plan.
        stale: kernels with a tile, and directions with a plan, that were measured when the kernels were others.
    """

    evidence: tuple[str, ...]
    tiles: dict[tuple[str, str], dict[int, Fields]]
    plans: dict[tuple[str, Point], str]
    stale: tuple[str, ...] = ()

    def tile(self, kernel: str, width: str, rank: int) -> Fields | None:
        """The fields of the tile of a kernel; None where none was measured for such a rank."""
        by_rank = self.tiles.get((kernel, width), {})
        return next((by_rank[largest] for largest in sorted(by_rank) if rank <= largest), None)

    def plan(self, direction: str, point: Point, able: tuple[str, ...]) -> tuple[str, Point] | None:
        """The fastest plan at the nearest point, and that point; None where none is near, or it isn't ``able``."""
        alike = (other for way, other in self.plans if way == direction and other[4:] == point[4:])
        candidates = [(_distance(point, other), other) for other in alike]
        distance, nearest = min(candidates, default=(_REACH + 1, point))
        if distance > _REACH or self.plans[direction, nearest] not in able:
            return None
        return self.plans[direction, nearest], nearest


def _distance(a: Point, b: Point) -> float:
    return sum(abs(log2(max(1, p)) - log2(max(1, q))) for p, q in zip(a[:4], b[:4], strict=True))


def read(content: dict[str, Any]) -> dict[tuple[str, str], Table]:
    """The tables of a file's content, by capability and minor version of triton, without what is stale.

    Raises:
        KeyError, TypeError, ValueError: it is not as ``tune`` writes it.
    """
    tables = {}
    for capability, by_version in content.items():
        for minor, entry in by_version.items():
            tiles: dict[tuple[str, str], dict[int, Fields]] = {}
            plans, stale = {}, set()
            for t in entry["tiles"]:
                m, n, k, warps, stages = t["tile"]
                if t["source"] == fingerprint(t["kernel"]):
                    tiles.setdefault((t["kernel"], t["width"]), {})[t["max_rank"]] = (m, n, k, warps, stages)
                else:
                    stale.add(t["kernel"])
            for p in entry["plans"]:
                if p["source"] == fingerprint_of_all():
                    plans[p["direction"], Point(**p["point"])] = p["plan"]
                else:
                    stale.add(f"{p['direction']} plans")
            tables[capability, minor] = Table(tuple(entry["evidence"]), tiles, plans, tuple(sorted(stale)))
    return tables


@cache
def tables() -> dict[tuple[str, str], Table]:
    """Those of ``measured.json``."""
    return read(json.loads(PATH.read_text(encoding="utf-8"))) if PATH.exists() else {}


@cache
def table(capability: tuple[int, int] | None) -> Table | None:
    """That of a device under the triton that is installed; None where there is none, as always on the CPU."""
    if capability is None:
        return None
    return tables().get((f"{capability[0]}.{capability[1]}", minor_version(version("triton"))))


def left_aside(capability: tuple[int, int] | None) -> str:
    """What was measured on such a device and is stale, as a remark; empty where nothing is."""
    found = table(capability)
    stale = () if found is None else found.stale
    return f" (measured with other kernels, and left aside: {', '.join(stale)}; make tune)" if stale else ""


def minor_version(full: str) -> str:
    """Major and minor of a version: tiles that one compiler holds in registers another may spill."""
    return ".".join(full.split(".")[:2])


_trials: dict[str, Fields] = {}


@contextmanager
def trial(kernel: str, fields: Fields) -> Iterator[None]:
    """Within, launches of a kernel take this tile, whatever the tables say. For the tuner; not safe with threads."""
    _trials[kernel] = fields
    try:
        yield
    finally:
        del _trials[kernel]


def on_trial() -> bool:
    """Whether any kernel is."""
    return bool(_trials)


def tile(
    kernel: str, capability: tuple[int, int] | None, width: str, rank: int, dropout: bool = False
) -> Fields | None:
    """The fields of the tile that a kernel is on trial with, else those measured fastest; None where nothing was.

    With dropout nothing was: it takes registers that a tile measured without it need not have left.
    """
    return _trials.get(kernel) or (None if dropout else _tile(kernel, capability, width, rank))


@cache
def _tile(kernel: str, capability: tuple[int, int] | None, width: str, rank: int) -> Fields | None:
    found = table(capability)
    return None if found is None else found.tile(kernel, width, rank)


__all__ = [
    "PATH", "Fields", "Point", "Table", "left_aside", "minor_version", "on_trial", "read", "table", "tables", "tile",
    "trial",
]  # fmt: skip
