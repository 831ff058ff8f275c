"""``python -m benchmarks.paper.teacher run | collect | table``: who finds the ranks of a teacher's increment.

``run`` makes the runs of the protocol and logs them; killed and begun again, it goes on where it was. ``collect`` makes
from the logs what is committed: teacher.json and, from that, the table teacher.md and two pictures. ``table`` prints
the table of what exists, and exits 1 where a criterion is missed.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import commit, processor
from benchmarks.paper.teacher.protocol import Protocol
from benchmarks.paper.teacher.records import Log, load, merged, read_log, save
from benchmarks.paper.teacher.runner import PARTS, run_all
from benchmarks.paper.teacher.summary import verdicts
from benchmarks.paper.teacher.tables import table

ROOT = Path(__file__).parents[3]
LOG = ROOT / "build" / "teacher.jsonl"
RESULTS = ROOT / "benchmarks" / "results"


def environment() -> dict[str, Any]:
    """What the results may depend on."""
    versions = {name: version(name) for name in ("torch", "adalora-kernels")}
    return {"device": processor(), "commit": commit(), "python": platform.python_version(), **versions}


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what was asked for; 1 where a criterion is missed, 2 where there is nothing to do it with."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.teacher", description=__doc__)
    parser.add_argument("command", choices=("run", "collect", "table"))
    parser.add_argument("--part", choices=tuple(PARTS), help="run this alone, with a log of its own (default: all)")
    where = "the log (default: build/teacher.jsonl; for table: none); collect and table take several"
    parser.add_argument("--log", type=Path, action="append", default=[], help=where)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the committed files")
    options = parser.parse_args(arguments)
    logs = options.log or ([] if options.command == "table" else [LOG])
    if options.command == "run" and len(logs) > 1:
        parser.error("--log: expected one for run")
    try:
        if options.command == "run":
            torch.set_num_threads(1)
            with Log(logs[0], Protocol(), environment()) as log:
                run_all(log, (options.part,) if options.part else tuple(PARTS))
            return 0
        if options.command == "collect":
            collect(logs, options.results)
            return 0
        results = merged([read_log(log) for log in logs]) if logs else load(options.results / "teacher.json")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(results))
    return int(any(held is False for _, held in verdicts(results)))


def collect(logs: Sequence[Path], folder: Path) -> None:
    """Write the committed files, tables and pictures from the compact file alone."""
    from benchmarks.paper.teacher.picture import draw_border, draw_ranks

    save(folder / "teacher.json", merged([read_log(log) for log in logs]))
    results = load(folder / "teacher.json")
    (folder / "teacher.md").write_text(table(results) + "\n", encoding="utf-8")
    draw_ranks(results, folder / "teacher-ranks.png")
    draw_border(results, folder / "teacher-border.png")


if __name__ == "__main__":
    raise SystemExit(main())
