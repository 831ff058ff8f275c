"""The figures that the layer's kernels must reach, read off the records: each with its bound and whether it holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.gpu.layers import FROZEN, OURS, PEFT

TOKENS, RANK = 8192, 16  # at which the bounds are meant
_WIDE = 4096
_NOISE = 1.02  # two plans of one speed
# PEFT / ours, forward + backward, by (K, N) and the adapter's dtype.
_OVER_PEFT = {
    "bfloat16": {(4096, 4096): 1.4, (768, 768): 2.5, (768, 3072): 2.5, (3072, 768): 1.9},
    "float32": {(4096, 4096): 2.0, (768, 768): 3.0, (768, 3072): 3.0, (3072, 768): 3.0},
}
# ours / frozen, (4096² and wider, 768-class), at most, by direction.
_OVER_FROZEN = {"forward": (1.08, 1.20), "forward + backward": (1.15, 1.40)}


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        name: what was measured.
        figure: the value.
        bound: what it must not exceed, or reach.
        at_least: whether the bound is a lower one.
    """

    name: str
    figure: float
    bound: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the figure is on the right side of its bound."""
        return self.figure >= self.bound if self.at_least else self.figure <= self.bound

    def __str__(self) -> str:
        return f"{'holds ' if self.holds else 'MISSED'}  {self.name}: {self.figure:.3f} ({self.wanted})"

    @property
    def wanted(self) -> str:
        """The bound in words."""
        return f"{'at least' if self.at_least else 'at most'} {self.bound:g}"

    def record(self) -> dict[str, Any]:
        """As it is written down."""
        return asdict(self) | {"holds": self.holds}


def rows(records: list[dict[str, Any]]) -> Iterator[Row]:
    """Every bound that the records have a figure for."""
    for record in records:
        case, direction, ratios = record["case"], record["direction"], record["ratio_to_frozen"]
        name = f"{direction}, {case['K']}x{case['N']}, {case['adapter']} adapter"
        yield Row(f"{name}: bytes kept beyond x", record["saved_bytes"], 2 * case["M"] * -(-case["R"] // 16) * 16)
        if (case["M"], case["R"]) != (TOKENS, RANK):
            continue
        if case["adapter"] == "bfloat16":
            wide, narrow = _OVER_FROZEN[direction]
            bound = wide if min(case["K"], case["N"]) >= _WIDE else narrow
            yield Row(f"{name}: ours / frozen", ratios[OURS], bound)
        rivals = {rival: ratio for rival, ratio in ratios.items() if rival not in (FROZEN, OURS)}
        best = min(rivals, key=lambda rival: rivals[rival])
        yield Row(f"{name}: ours / the best other ({best})", ratios[OURS] / rivals[best], _NOISE)
        bound = _OVER_PEFT[case["adapter"]].get((case["K"], case["N"]), 0.0)
        if direction == "forward + backward" and bound:
            yield Row(f"{name}: PEFT / ours", ratios[PEFT] / ratios[OURS], bound, at_least=True)


def group_rows(records: list[dict[str, Any]]) -> Iterator[Row]:
    """A group must not be slower than its layers one by one."""
    for record in records:
        case, ratios = record["case"], record["ratio_to_frozen"]
        name = f"{record['direction']}, {case['K']}x{'+'.join(map(str, case['N']))}, one group"
        yield Row(f"{name}: ours / one by one", ratios[OURS] / ratios["one by one"], _NOISE)


__all__ = ["RANK", "TOKENS", "Row", "group_rows", "rows"]
