"""``python -m benchmarks.readme``: write README's measured section from the records; ``--check`` only compares."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bounds import COPY_MUST, ENGINE, ENGINE_MUST, FLOOR_MARGIN, LAYER, misses
from benchmarks.marked import exchanged
from benchmarks.report.sources import MAKE_BENCH, Measured, Source, read_folder
from benchmarks.report.verdicts import HELD, MISSED, OPEN, REPEATABLE, SANITIZED, Verdict, by_target, on_gpu
from benchmarks.report.wording import capital, number

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measured: begin (python -m benchmarks.readme) -->", "<!-- measured: end -->"
REPORT = "adalora-kernels bench --report"
# A contestant's column, in a table of layers and of steps.
_OF_LAYERS = {"ours": "ours", "peft": "PEFT", "addmm_": "`addmm_` by hand", "PEFT LoRA": "PEFT LoRA"}
_OF_STEPS = {
    "ours": "ours",
    ENGINE: "ours, `AdaLoraAdamW`",
    "PEFT AdaLoRA": "PEFT AdaLoRA",
    "PEFT LoRA": "PEFT LoRA",
    "full fine-tuning": "full",
}


def section(results: Path = RESULTS) -> str:
    """What README says of the records, in Markdown.

    Raises:
        ValueError: the folder has no record of ``make bench``.
    """
    sources, _ = read_folder(results)
    by_bench = [source for source in sources if any(origin.command == MAKE_BENCH for origin in source.origins)]
    if not by_bench:
        raise ValueError(f"results: expected a record of {MAKE_BENCH}, {results} holds none; run it")
    return "\n\n".join(part for part in (*_of_cpu(by_bench[0]), _of_gpu(sources)) if part)


def _of_cpu(source: Source) -> Iterator[str]:
    about, measured = source.origins[0].environment, source.measured
    cores = about["cores"]
    yield (
        f"On {cores} core{'s' * (cores != 1)} of an {about['device']}, torch {about['torch']}, PEFT {about['peft']}, "
        f"commit `{about['commit']}`, by `{MAKE_BENCH}` (`benchmarks/results/{source.file}`); medians of rounds in "
        f"turn in one process. `{REPORT}` makes a page of all that was recorded: growth, roofline, memory, operators."
    )
    yield from _layers([m for m in measured if m.benchmark == LAYER])
    yield " ".join(_engine(m) for m in measured if "added_milliseconds" in m.record)
    yield from _steps([m for m in measured if "phases" in m.record])
    yield _bounds([m.record for m in measured])


def _layers(measured: Sequence[Measured]) -> Iterator[str]:
    if not measured:
        return
    columns = {c: said for c, said in _OF_LAYERS.items() if all(c in m.record["ratio_to_frozen"] for m in measured)}
    ranks = " and ".join(sorted({str(m.case["R"]) for m in measured}))
    yield (
        f"The layer, forward + backward, R = {ranks}, as a multiple of the frozen `F.linear` (the floor is its "
        "arithmetic; the noise is how far a ratio may be from 1 and show nothing):"
    )
    rows = []
    for m in measured:
        case, ratios = m.case, m.record["ratio_to_frozen"]
        noise = m.noise("frozen", "ours")
        cells = [f"{ratios[c]:.3f}" + " ≈" * (abs(ratios[c] - 1) <= noise) for c in columns]
        shape = f"{case['K']}×{case['N']}"
        rows.append(
            [shape, case["M"], case["dtype"], case["threads"], *cells, f"{m.record['flop_floor']:.3f}", _percent(noise)]
        )
    yield _table(["K×N", "tokens", "dtype", "threads", *columns.values(), "floor", "noise"], rows)


def _engine(m: Measured) -> str:
    added, over, case = m.record["added_milliseconds"], m.record["peft_over_ours"], m.case
    alone = m.milliseconds["AdamW alone"]["median"]
    ways = {"ours": "ours with any optimizer", ENGINE: "ours with `AdaLoraAdamW`"}
    ours = ", ".join(f"{said} {added[c]:.2f} ms ({over[c]:.1f} times less)" for c, said in ways.items())
    return (
        f"Importance + masking + orthogonality of {case['matrices']} matrices of DeBERTa-v3-base at R = {case['R']}, "
        f"{case['threads']} thread{'s' * (case['threads'] != 1)}: to the {alone:.1f} ms of fused AdamW PEFT adds "
        f"{added['PEFT']:.1f} ms, {ours}."
    )


def _steps(measured: Sequence[Measured]) -> Iterator[str]:
    if not measured:
        return
    columns = {c: said for c, said in _OF_STEPS.items() if all(c in m.milliseconds for m in measured)}
    first = {m.case["model"]: m for m in reversed(measured)}  # the others are its sweeps
    yield "A whole training step, ms; in brackets what part of PEFT's LoRA's that is (≈: inside the noise):"
    rows = []
    for m in reversed(first.values()):
        case, times, lora = m.case, m.milliseconds, m.record["ours_over_lora"]
        noise = m.noise("ours", "PEFT LoRA")
        cells = [
            f"{times[c]['median']:.0f}" + (f" ({lora[c]:.2f}{' ≈' * (abs(lora[c] - 1) <= noise)})" if c in lora else "")
            for c in columns
        ]
        batch = f"{case['rows']}×{case['columns']}"
        rows.append([case["model"], batch, case["R"], case["dtype"], case["threads"], *cells, _percent(noise)])
    yield _table(["model", "batch", "R", "dtype", "threads", *columns.values(), "noise"], rows)


def _bounds(records: Sequence[Mapping[str, Any]]) -> str:
    missed = misses(records)
    wanted = (
        f"What must be reached: the layer in fp32 within {FLOOR_MARGIN} of its floor and no slower than PEFT's or "
        f"`addmm_` by hand; the budget engine with `AdaLoraAdamW` on all cores {ENGINE_MUST:g} times less than PEFT's; "
        f"importance at most {COPY_MUST} times a plain copy of its bytes; a training step no slower than PEFT's "
        "AdaLoRA. "
    )
    said = "\n".join(["`make bench` exits 1 for what is missed:", "", *(f"* {miss}" for miss in missed)])
    return wanted + (said if missed else "All of it holds.")


def _of_gpu(sources: Sequence[Source]) -> str:
    verdicts = list(on_gpu(sources))
    states = Counter(verdict.state for verdict in verdicts)
    devices = sorted({f"{v.origin.device} (`benchmarks/results/{v.origin.file}`)" for v in verdicts if v.origin})
    if not devices:
        return "Nothing has been timed on a GPU yet."
    said = (
        f"By `make gpu` on {', '.join(devices)}: {states[HELD]} bounds hold, {states[MISSED]} are missed, "
        f"{states[OPEN]} are not measured yet; the page has each. At 8192 tokens and rank 16, in bf16:"
    )
    rows = [[capital(target.said), *_of_target(found)] for target, found in by_target(sources)]
    rows += [[what, "", v.state] for what in (REPEATABLE, SANITIZED) for v in verdicts if v.said.startswith(what)]
    return f"{said}\n\n{_table(['what must be reached', 'measured', 'bounds'], rows)}"


def _of_target(found: Sequence[Verdict]) -> tuple[str, str]:
    """The range of what was measured, and how many bounds are in which state."""
    figures = sorted({verdict.figure for verdict in found if verdict.figure is not None})
    ends = dict.fromkeys(number(figure) for figure in (figures[0], figures[-1])) if figures else {}
    states = Counter(verdict.state for verdict in found)
    return " to ".join(ends), ", ".join(f"{states[state]} {state}" for state in (HELD, MISSED, OPEN) if states[state])


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _percent(noise: float) -> str:
    return f"±{100 * noise:.1f}%"


def replaced(readme: str, made: str) -> str:
    """``readme`` with the part between the marks exchanged."""
    return exchanged(readme, BEGIN, END, made)


def main() -> int:
    """Write the section, or with --check exit 1 where README disagrees."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where README disagrees")
    path = ROOT / "README.md"
    check = parser.parse_args().check
    now = path.read_text(encoding="utf-8")
    wanted = replaced(now, section())
    if check:
        return int(now != wanted)
    path.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
