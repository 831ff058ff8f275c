"""The figures that kernels and steps must reach, read off the records: each with its bound and whether it holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.gpu import engine
from benchmarks.gpu.layers import FROZEN, OURS, PEFT
from benchmarks.step import names as step

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
# A training step of DeBERTa-v3-base.
_STEP_OVER_PEFT, _STEP_OVER_LORA = 3.0, 1.0
# The budget engine: PEFT / ours; importance / a copy that moves as many bytes; kernels, copies and fills of a step.
_ENGINE_OVER_PEFT, _IMPORTANCE_OVER_COPY, _LAUNCHES = 50.0, 1.3, 6
HELD, MISSED, OPEN = "held", "missed", "open"


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        name: what was measured.
        figure: the value; None where nothing was measured.
        bound: what it must not exceed, or reach.
        at_least: whether the bound is a lower one.
    """

    name: str
    figure: float | None
    bound: float
    at_least: bool = False

    @property
    def state(self) -> str:
        """Whether the figure is on the right side of its bound."""
        if self.figure is None:
            return OPEN
        return HELD if (self.figure >= self.bound if self.at_least else self.figure <= self.bound) else MISSED

    @property
    def holds(self) -> bool:
        """Whether there is a figure, on the right side of its bound."""
        return self.state == HELD

    def __str__(self) -> str:
        said = {HELD: "holds ", MISSED: "MISSED", OPEN: "open  "}[self.state]
        figure = "not measured" if self.figure is None else f"{self.figure:.3f}"
        return f"{said}  {self.name}: {figure} ({self.wanted})"

    @property
    def wanted(self) -> str:
        """The bound in words."""
        return f"{'at least' if self.at_least else 'at most'} {self.bound:g}"

    def record(self) -> dict[str, Any]:
        """As it is written down."""
        return asdict(self) | {"state": self.state}


def rows(records: list[dict[str, Any]]) -> Iterator[Row]:
    """Every bound on a layer; open where ours was withheld."""
    for record in records:
        if record["benchmark"] != "layer":
            continue
        case, direction, ratios = record["case"], record["direction"], record["ratio_to_frozen"]
        name = f"{direction}, {case['K']}x{case['N']}, {case['adapter']} adapter"
        yield Row(f"{name}: bytes kept beyond x", record.get("saved_bytes"), 2 * case["M"] * -(-case["R"] // 16) * 16)
        if (case["M"], case["R"]) != (TOKENS, RANK):
            continue
        if case["adapter"] == "bfloat16":
            wide, narrow = _OVER_FROZEN[direction]
            bound = wide if min(case["K"], case["N"]) >= _WIDE else narrow
            yield Row(f"{name}: ours / frozen", ratios.get(OURS), bound)
        rivals = {rival: ratio for rival, ratio in ratios.items() if rival not in (FROZEN, OURS)}
        best = min(rivals, key=lambda rival: rivals[rival])
        yield Row(f"{name}: ours / the best other ({best})", _over(ratios, OURS, best), _NOISE)
        bound = _OVER_PEFT[case["adapter"]].get((case["K"], case["N"]), 0.0)
        if direction == "forward + backward" and bound:
            yield Row(f"{name}: PEFT / ours", _over(ratios, PEFT, OURS), bound, at_least=True)


def _over(ratios: dict[str, float], one: str, other: str) -> float | None:
    return ratios[one] / ratios[other] if {one, other} <= set(ratios) else None


def engine_rows(records: list[dict[str, Any]]) -> Iterator[Row]:
    """What the budget engine must reach, whether there is a record or not."""
    found = {record["benchmark"]: record for record in records}
    whole = found.get(engine.WHOLE, {}).get("peft_over_ours", {})
    for ours in (step.OURS, engine.REPLAYED, step.OURS_SWEPT):
        yield Row(f"{engine.WHOLE}, {ours}: PEFT / ours", whole.get(ours), _ENGINE_OVER_PEFT, at_least=True)
    alone = found.get(engine.IMPORTANCE, {}).get("importance_to_copy", {"triton": None})
    for backend, figure in alone.items():
        yield Row(f"{engine.IMPORTANCE}, {backend}: ours / a copy of its bytes", figure, _IMPORTANCE_OVER_COPY)
    counts = found.get(engine.LAUNCHES, {}).get("launches", {"any model": None})
    for name, count in counts.items():
        yield Row(f"{engine.LAUNCHES}, {name}", count or None, _LAUNCHES)


def group_rows(records: list[dict[str, Any]]) -> Iterator[Row]:
    """A group must not be slower than its layers one by one."""
    for record in records:
        case, ratios = record["case"], record["ratio_to_frozen"]
        name = f"{record['direction']}, {case['K']}x{'+'.join(map(str, case['N']))}, one group"
        yield Row(f"{name}: ours / one by one", _over(ratios, OURS, "one by one"), _NOISE)


def step_rows(records: list[dict[str, Any]]) -> Iterator[Row]:
    """Of a training step of DeBERTa-v3-base: beside PEFT's AdaLoRA, and beside its LoRA at AdaLoRA's initial and final
    rank, eager against eager and graph against graph. Those that the records don't have are open."""
    found = {
        (record["benchmark"], record["case"]["lora"]): record
        for record in records
        if record["case"].get("model") == step.DEBERTA
    }

    def figure(field: str, mode: str, lora: int, ours: str) -> float | None:
        return found.get((mode, lora), {}).get(field, {}).get(ours)

    for ours in (step.OURS, step.OURS_SWEPT):
        about = f"{step.DEBERTA}, {ours}"
        over_peft = figure("peft_over_ours", step.EAGER, step.RANK, ours)
        yield Row(f"{about}: PEFT AdaLoRA / ours, {step.EAGER}", over_peft, _STEP_OVER_PEFT, at_least=True)
        for mode in (step.EAGER, step.GRAPHED):
            for lora in (step.RANK, step.TARGET):
                over_lora = figure("ours_over_lora", mode, lora, ours)
                yield Row(f"{about}: ours / PEFT LoRA r={lora}, {mode}", over_lora, _STEP_OVER_LORA)


__all__ = ["HELD", "MISSED", "OPEN", "RANK", "TOKENS", "Row", "engine_rows", "group_rows", "rows", "step_rows"]
