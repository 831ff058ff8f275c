"""``python -m benchmarks.paper``: run a cell of the paper's tables, or show what was run beside the paper's figures.

run --task rte --method adalora --budget 0.32M --seeds 5    one cell
run --task rte --method adalora --data FOLDER               with rows from files
stand-ins                                                   all methods on small tasks that need no hub
table glue                                                  the runs that exist, beside the paper's figures
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.paper import presets, tables
from benchmarks.paper.methods import METHODS
from benchmarks.paper.run import Run, execute
from benchmarks.paper.standin import base, rows
from benchmarks.paper.tasks import TASKS
from benchmarks.paper.tasks.load import load
from benchmarks.paper.training import PRECISIONS, Machine

STAND_INS = "stand-ins"


def main() -> int:
    """Do what was asked for; 1 where a stand-in misses what it must beat."""
    options = _parser().parse_args()
    try:
        return int(options.do(options))
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        if options.debug:
            raise
        print(f"benchmarks.paper: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """One cell, with as many seeds as were asked for."""
    preset = presets.find(options.task, options.method, options.budget)
    task, machine = TASKS[options.task], _machine(options)
    found = load(task, options.data)
    for seed in range(options.seeds):
        one = Run(task, options.method, preset, seed, options.model or preset.model, options.output)
        print(one.name)
        print(tables.line(execute(one, found, machine)))
    return 0


def stand_ins(options: argparse.Namespace) -> int:
    """Every method on every stand-in, the table, and whether each beats what needs no training."""
    torch.set_num_threads(options.threads or torch.get_num_threads())
    parts, machine = rows.read(options.sources), _machine(options)
    bases = {kind: base.pretrained(kind, parts, base.BaseSettings(), options.output) for kind in base.KINDS}
    wanted = presets.cells(STAND_INS)
    for name, task in rows.TASKS.items():
        if options.task not in (None, name):
            continue
        made = rows.make(name, parts)
        for preset in wanted:
            if preset.task == name and options.method in (None, preset.method):
                for seed in range(options.seeds):
                    one = Run(task, preset.method, preset, seed, str(bases[preset.model]), options.output)
                    print(one.name, flush=True)
                    print(tables.line(execute(one, made, machine)), flush=True)
    print(tables.table(STAND_INS, options.output))
    missed = tables.not_beaten(options.output)
    print("\n".join(missed) if missed else "Every method that has run beats its baselines by two standard errors.")
    return int(bool(missed))


def table(options: argparse.Namespace) -> int:
    """The runs that exist."""
    print(tables.table(options.name, options.output))
    return 0


def _machine(options: argparse.Namespace) -> Machine:
    return Machine(options.precision, options.device_batch, options.workers, options.save_steps)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--output", type=Path, default=Path("paper-runs"), help="folder of the runs (default paper-runs)"
    )
    training = argparse.ArgumentParser(add_help=False)
    training.add_argument("--seeds", type=int, default=1, help="runs, each with a seed of its own (default 1)")
    training.add_argument("--precision", choices=PRECISIONS, default="fp32")
    training.add_argument("--device-batch", type=int, default=32, help="rows a device takes at a time (default 32)")
    training.add_argument("--workers", type=int, default=1, help="processes that make tokens (default 1)")
    training.add_argument("--save-steps", type=int, default=500, help="steps between checkpoints (default 500)")

    one = commands.add_parser("run", parents=[common, training], help="one cell of the paper's tables")
    one.add_argument("--task", choices=TASKS, required=True)
    one.add_argument("--method", choices=METHODS, required=True)
    one.add_argument("--budget", help="as the paper prints it, such as 0.32M; may be left out where there is one alone")
    one.add_argument("--data", default="hub", help="a folder with train.json and the like (default: the hub)")
    one.add_argument("--model", help="a folder, or a repository on the hub (default: the paper's)")
    one.set_defaults(do=run)

    small = commands.add_parser(STAND_INS, parents=[common, training], help="all methods on tasks that need no hub")
    small.add_argument("--task", choices=rows.TASKS, help="only this one")
    small.add_argument("--method", choices=METHODS, help="only this one")
    small.add_argument("--sources", type=Path, help="folder of Python sources (default: the standard library)")
    small.add_argument("--threads", type=int, help="of the CPU")
    small.set_defaults(do=stand_ins, seeds=3)

    shown = commands.add_parser("table", parents=[common], help="the runs that exist beside the paper's figures")
    shown.add_argument("name", choices=presets.TABLES)
    shown.set_defaults(do=table)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
