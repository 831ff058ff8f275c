"""``python -m benchmarks.paper.teacher run | collect | table``: who finds the ranks of a teacher's increment.

``run`` makes the runs of the protocol and logs them; killed and begun again, it goes on where it was. ``collect`` makes
from the log what is committed: teacher.json and, from that, the table teacher.md and two pictures. ``table`` prints the
table of what exists, and exits 1 where a criterion is missed.
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

from benchmarks.environment import commit
from benchmarks.paper.teacher.protocol import Protocol
from benchmarks.paper.teacher.records import Log, load, read_log, save
from benchmarks.paper.teacher.runner import run_all
from benchmarks.paper.teacher.summary import verdicts
from benchmarks.paper.teacher.tables import table

ROOT = Path(__file__).parents[3]
LOG = ROOT / "build" / "teacher.jsonl"
RESULTS = ROOT / "benchmarks" / "results"


def environment() -> dict[str, Any]:
    """What the results may depend on."""
    versions = {name: version(name) for name in ("torch", "adalora-kernels")}
    return {"commit": commit(), "python": platform.python_version(), "machine": platform.machine(), **versions}


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what was asked for; 1 where a criterion is missed, 2 where there is nothing to do it with."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.teacher", description=__doc__)
    parser.add_argument("command", choices=("run", "collect", "table"))
    parser.add_argument("--log", type=Path, help="the log (run and collect: build/teacher.jsonl; table: none)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the committed files")
    options = parser.parse_args(arguments)
    try:
        if options.command == "run":
            torch.set_num_threads(1)
            with Log(options.log or LOG, Protocol(), environment()) as log:
                run_all(log)
            return 0
        if options.command == "collect":
            collect(options.log or LOG, options.results)
            return 0
        results = load(options.results / "teacher.json") if options.log is None else read_log(options.log)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(results))
    return int(any(held is False for _, held in verdicts(results)))


def collect(log: Path, folder: Path) -> None:
    """Write the committed files, tables and pictures from the compact file alone."""
    from benchmarks.paper.teacher.picture import draw_border, draw_ranks

    save(folder / "teacher.json", read_log(log))
    results = load(folder / "teacher.json")
    (folder / "teacher.md").write_text(table(results) + "\n", encoding="utf-8")
    draw_ranks(results, folder / "teacher-ranks.png")
    draw_border(results, folder / "teacher-border.png")


if __name__ == "__main__":
    raise SystemExit(main())
