"""``python -m benchmarks.readme``: write the README table from the records; ``--check`` only compares."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- measured: begin (python -m benchmarks.readme) -->", "<!-- measured: end -->"


def load() -> dict[str, Any]:
    """The committed records of the CPU."""
    record: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text())
    return record


def table(result: dict[str, Any]) -> str:
    """The section in Markdown."""
    about = result["environment"]
    lines = [
        f"On {about['cores']} cores of an {about['device']}, torch {about['torch']}, PEFT {about['peft']}, commit "
        f"`{about['commit']}`, by `make bench`; medians of interleaved rounds in one process.",
        "",
        "The layer, forward + backward, R = 12, as a multiple of the frozen `F.linear` (the floor is its arithmetic):",
        "",
        "| K×N | tokens | dtype | threads | ours | PEFT | `addmm_` by hand | floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    engines, parts, fused = [], [], []
    for record in result["records"]:
        case = record["case"]
        if "ratio_to_frozen" in record:
            r = record["ratio_to_frozen"]
            lines.append(
                f"| {case['K']}×{case['N']} | {case['M']} | {case['dtype']} | {case['threads']} | {r['ours']:.3f} "
                f"| {r['peft']:.3f} | {r['addmm_']:.3f} | {record['flop_floor']:.3f} |"
            )
        elif "importance_to_copy" in record:
            cells = [f"{by['native']:.1f} / {by['reference']:.0f}" for by in record["microseconds_per_layer"].values()]
            parts.append(
                f"| {case['layers']} × {case['model'].replace('x', '×')} | {case['threads']} | {' | '.join(cells)} "
                f"| {record['importance_to_copy']:.2f} |"
            )
        elif "added_to_backward" in record:
            way = {name: sample["median"] for name, sample in record["added_to_backward"].items()}
            fused.append(
                f"{case['layers']} layers of {case['K']}×{case['N']}, {case['M']} tokens: "
                f"{way['launched']:.2f} ms launched, {way['fused']:.2f} ms fused, beside "
                f"{record['milliseconds']['backward alone']['median']:.1f} ms"
            )
        else:
            added, times = record["added_milliseconds"], record["peft_over_ours"]
            engines.append(
                f"| {case['matrices']} | {case['threads']} | {record['milliseconds']['AdamW alone']['median']:.1f} | "
                f"{added['PEFT']:.1f} | {added['ours']:.2f} ({times['ours']:.1f}×) | "
                f"{added['ours, AdaLoraAdamW']:.2f} ({times['ours, AdaLoraAdamW']:.1f}×) |"
            )
    lines += [
        "",
        "What importance + masking + orthogonality add to the optimizer's step, DeBERTa-v3-base's matrices at r = 12, "
        "fp32, and how many times less that is than PEFT's:",
        "",
        "| matrices | threads | fused AdamW, ms | PEFT adds | ours adds, any optimizer | ours adds, `AdaLoraAdamW` |",
        "|---|---|---|---|---|---|",
        *engines,
        "",
        "How its parts grow: µs a layer, ours / backend `reference` (plain PyTorch, layer by layer), r = 12, fp32; and "
        "importance as a multiple of a plain copy that moves as many bytes:",
        "",
        "| layers | threads | importance | AdamW + importance | orthogonality | masking | importance / copy |",
        "|---|---|---|---|---|---|---|",
        *parts,
        "",
        "What importance adds to a backward, launched before the optimizer's step or fused into the backward (off by "
        f"default): {'; '.join(fused)}.",
    ]
    return "\n".join(lines)


def replaced(readme: str, section: str) -> str:
    """``readme`` with the part between the marks exchanged."""
    head, _, rest = readme.partition(BEGIN)
    _, mark, tail = rest.partition(END)
    if not mark:
        raise ValueError(f"README.md: expected the marks {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{section}\n{END}{tail}"


def main() -> int:
    """Write the table, or with --check exit 1 where README disagrees."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where README disagrees")
    path = ROOT / "README.md"
    now = path.read_text(encoding="utf-8")
    wanted = replaced(now, table(load()))
    if parser.parse_args().check:
        return int(now != wanted)
    path.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
