"""``python -m benchmarks.cpu``: this CPU's figures, recorded and held to what they must reach.

Runs the layer, the budget engine and whole training steps against what users would otherwise run, and each as it grows,
in one process; writes ``benchmarks/results/cpu.json``, prints a table, and exits 1 where a figure misses its bound.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from benchmarks.bounds import ENGINE, misses
from benchmarks.environment import commit, processor
from benchmarks.micro import budget_engine, fused_importance, growth, layer, scaling
from benchmarks.records import write
from benchmarks.step import models
from benchmarks.step.case import Case
from benchmarks.step.measure import measure as measure_step

RESULTS = Path(__file__).parent / "results"
BUILD = Path(__file__).parents[1] / "build"
SHAPES = ((768, 768), (768, 3072))
TOKENS = (1024, 4096)
RANK = 12
LAYERS = (12, 72, 224, 1000)
FUSED_TOKENS = (256, 1024)
STEP_SWEEP = ((2, RANK), (32, RANK), (8, 4), (8, 48))  # rows of a batch, and rank
ABSENT = {
    "Liger": "its kernels are Triton's, for a GPU, and none of them is a LoRA layer",
    "LoRAFusion": "its kernels are Triton's, for a GPU",
}


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "device": processor(),
        "cores": torch.get_num_threads(),
        "commit": commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "peft", "transformers", "adalora-kernels")},
    }


def show(record: dict[str, Any]) -> str:
    """One line of the printed table."""
    case = record["case"]
    if "ratio_to_frozen" in record:
        ratios = ", ".join(f"{name} {r:.3f}" for name, r in record["ratio_to_frozen"].items() if name != "frozen")
        about = f"M={case['M']} R={case['R']} {case['dtype']} {case['threads']} thr"
        live = f" {case['live']} live" if "live" in case else f", floor {record['flop_floor']:.3f}"
        head = f"{record['benchmark']} {case['K']}x{case['N']} {about}{live}, of the frozen linear"
        return f"{head}: {ratios} (noise {record['noise']:.3f})"
    if record["benchmark"] == "training step":
        times = ", ".join(f"{name} {t['median']:.0f}" for name, t in record["milliseconds"].items())
        ratios = ", ".join(f"{name} {r:.2f}" for name, r in record["ours_over_lora"].items())
        head = f"step of {case['model']}, {case['rows']} rows, R={case['R']}"
        return f"{head}, ms: {times}; of PEFT LoRA's: {ratios} (noise {record['noise']:.3f})"
    if "importance_to_copy" in record:
        parts = [
            f"{part} {by['native']:.2f} / {by['reference']:.1f}"
            for part, by in record["microseconds_per_layer"].items()
        ]
        return (
            f"budget engine's parts, {case['model']}, {case['layers']} layers, R={case['R']}, {case['threads']} thr, "
            f"microseconds a layer, native / reference: {', '.join(parts)}; importance is "
            f"{record['importance_to_copy']:.2f} of a plain copy"
        )
    if "added_to_backward" in record:
        way = {name: sample["median"] for name, sample in record["added_to_backward"].items()}
        return (
            f"importance in a backward, {case['layers']} layers {case['K']}x{case['N']} M={case['M']} "
            f"{case['threads']} thr: to {record['milliseconds']['backward alone']['median']:.1f} ms it adds "
            f"{way['launched']:.2f} ms launched, {way['fused']:.2f} ms fused"
        )
    added, times = record["added_milliseconds"], record["peft_over_ours"]
    return (
        f"budget engine, {case['matrices']} matrices, R={case['R']}, {case['threads']} thr: beside AdamW's "
        f"{record['milliseconds']['AdamW alone']['median']:.1f} ms PEFT adds {added['PEFT']:.1f} ms, "
        + ", ".join(f"{name} {added[name]:.2f} ({times[name]:.1f} x)" for name in times)
    )


def newer_peft() -> Path | None:
    """The newest PEFT that ``make test-peft`` has put beside the installed one, if it is newer."""
    known = {Version(folder.name.removeprefix("peft-")): folder for folder in BUILD.glob("peft-*[0-9]")}
    newer = {v: folder for v, folder in known.items() if v > Version(version("peft"))}
    return newer[max(newer)] if newer else None


def cases(cores: int, rounds: int) -> Iterator[Callable[[], dict[str, Any]]]:
    """Everything that is measured."""
    for threads in sorted({1, cores}):
        shapes = [(k, n, m, torch.float32) for k, n in SHAPES for m in TOKENS]
        shapes += [(k, n, TOKENS[0], torch.bfloat16) for k, n in SHAPES]
        for k, n, m, dtype in shapes:
            yield partial(layer.measure, k, n, m, RANK, dtype, threads, rounds)
        yield partial(budget_engine.measure, 12, RANK, threads, 2 * rounds)
        yield partial(scaling.measure, scaling.DEBERTA, scaling.deberta(RANK), threads, 2 * rounds)
    for layers in LAYERS:
        # The reference takes seconds a round at 1000 layers.
        yield partial(
            scaling.measure, "256x256", scaling.square(layers, 256, RANK), cores,
            rounds if layers < 1000 else max(5, rounds // 5),
        )  # fmt: skip
    for m in FUSED_TOKENS:
        yield partial(fused_importance.measure, 24, 768, m, RANK, cores, 2 * rounds)
    k, n = SHAPES[0]
    yield partial(layer.measure, k, n, TOKENS[0], RANK, torch.float32, cores, rounds, True, newer_peft())
    for model in models.SMALL:
        yield partial(measure_step, Case(model, RANK, threads=cores), rounds)
    for rows, rank in STEP_SWEEP:
        model = replace(models.SMALL[0], rows=rows)
        yield partial(measure_step, Case(model, rank, threads=cores), max(5, rounds // 2))
    yield from growth.curves(cores, max(5, rounds // 2))
    for live in growth.LIVE:
        yield partial(growth.measure_pruned, live, cores, max(5, rounds // 2))


def main() -> int:
    """Measure, record, print; 1 where a bound is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds per case (default 15)")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu.json", help="where the record goes")
    options = parser.parse_args()
    about = environment()
    records = []
    for measure in cases(about["cores"], options.rounds):
        records.append(measure())
        print(show(records[-1]), flush=True)
    absent = ABSENT if newer_peft() else ABSENT | {"the newest PEFT": "make test-peft fetches it"}
    write(options.output, {"environment": about, "absent": absent, "records": records})
    missed = misses(records)
    print("\n".join(["Missed:", *missed] if missed else ["Every bound holds."]))
    return 1 if missed else 0


__all__ = ["ENGINE", "cases", "environment", "main", "misses", "show"]

if __name__ == "__main__":
    raise SystemExit(main())
