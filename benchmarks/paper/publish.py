"""What of the runs is committed: compact records in ``results/``, and their tables in ``benchmarks/README.md``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.marked import exchanged
from benchmarks.paper import presets, records, tables
from benchmarks.paper.standin import STAND_INS
from benchmarks.paper.tasks import TASKS
from benchmarks.records import read, write
from benchmarks.step.names import LORA, OURS, PEFT

BENCHMARKS = Path(__file__).parents[1]
RUNS, COST = (BENCHMARKS / "results" / f"{name}.json" for name in ("stand-ins", "cost"))
README = BENCHMARKS / "README.md"
BEGIN, END = "<!-- stand-ins: begin (python -m benchmarks.paper keep) -->", "<!-- stand-ins: end -->"


def keep(held: records.Records) -> list[Path]:
    """Write the stand-ins' records and the table that is made from them.

    Returns:
        The files.

    Raises:
        ValueError: there is no run of a stand-in, or README.md lacks its marks.
    """
    own = {key: runs for key, runs in held.items() if key[0] in STAND_INS}
    if not own:
        raise ValueError("output: expected runs of the stand-ins, found none; make paper makes them")
    write(RUNS, records.kept(own))
    README.write_text(with_section(README.read_text(encoding="utf-8")), encoding="utf-8")
    return [RUNS, README]


def with_section(readme: str) -> str:
    """``readme`` with the tables of the committed records between its marks."""
    return exchanged(readme, BEGIN, END, section())


def section() -> str:
    """The tables in Markdown."""
    held = records.committed(RUNS)
    missed = tables.not_beaten(held)
    parts = [tables.table(tables.NAME_OF_STAND_INS, held)]
    parts.append(
        "Not beaten by two standard errors: " + "; ".join(missed) + "."
        if missed
        else "Every method beats the baseline and a head on the frozen model by two standard errors."
    )
    if COST.is_file():
        parts.append(cost_table())
    return "\n\n".join(parts)


def keep_cost(found: dict[str, Any]) -> None:
    """Write the record of the costs, and its table."""
    write(COST, found)
    if RUNS.is_file():
        README.write_text(with_section(README.read_text(encoding="utf-8")), encoding="utf-8")


def cost_table() -> str:
    """AdaLoRA's time and memory beside LoRA's, in Markdown, from the committed record."""
    found = read(COST)
    about, first = found["environment"], found["records"][0]
    lines = [
        f"**A training step of AdaLoRA and LoRA** (the paper's table 15), {first['case']['model']} on "
        f"{about['device']}, fp32; torch {about['torch']}, PEFT {about['peft']}, "
        f"commit {about['commit']}. Medians of {first['rounds']} steps in turn, {first['clock']}; every step ranks. "
        f"Memory is {first['memory']}.",
        "",
        "| task | budget | r | LoRA, ms | AdaLoRA by PEFT | ours | ours, `AdaLoraAdamW` | LoRA, MB | PEFT | ours |",
        "|---" * 10 + "|",
    ]
    for record in found["records"]:
        case, memory, over = record["case"], record["megabytes"], record["over_lora"]
        times = {name: taken["median"] for name, taken in record["milliseconds"].items()}
        cells = [f"{times[name]:.1f} ({over[name]:.2f}×)" for name in over]
        columns = [
            f"{TASKS[case['task']].title}, {case['rows']}×{case['columns']}", case["budget"],
            f"{case['R']} → {case['target']}", f"{times[LORA]:.1f}", *cells,
            *(f"{memory[name]:.1f}" for name in (LORA, PEFT, OURS)),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(columns)} |")
    paper = presets.table(presets.COST)
    said = []
    for task, of in paper["paper"].items():
        pairs = zip(of["adalora"]["minutes"], of["lora"]["minutes"], strict=True)
        said.append(f"{TASKS[task].title} {', '.join(f'{ours / lora:.2f}×' for ours, lora in pairs)}")
    lines += ["", f"The paper's AdaLoRA over its LoRA, in time: {'; '.join(said)}. {paper['source']}"]
    return "\n".join(lines)


__all__ = ["COST", "RUNS", "cost_table", "keep", "keep_cost", "section", "with_section"]
