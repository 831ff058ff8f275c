"""``python -m benchmarks.paper``: run a cell of the paper's tables, or show what was run beside the paper's figures.

run --task rte --method adalora --budget 0.32M --seeds 5    one cell
run --task rte --method adalora --data FOLDER               with rows from files
stand-ins                                                   all methods on small tasks that need no hub
table glue                                                  the runs that exist, beside the paper's figures
keep                                                        the stand-ins' runs, into results/ and README.md
cost                                                        AdaLoRA's time and memory beside LoRA's, at three budgets

``run`` works alike under torchrun and accelerate launch: each process takes its share of every batch.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# What needs torch is imported by the commands that do: tables are shown without it.
from benchmarks.paper import presets, publish, records, tables
from benchmarks.paper.standin import STAND_INS
from benchmarks.paper.tasks import TASKS

PRECISIONS = ("fp32", "bf16", "fp16")
RUNS = Path("paper-runs")


def main() -> int:
    """Do what was asked for; 1 where a stand-in misses what it must beat, 2 where it can't be done."""
    options = _parser().parse_args()
    try:
        return int(options.do(options))
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        if options.debug:
            raise
        print(f"benchmarks.paper: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """One cell, with as many seeds as were asked for."""
    preset = presets.find(options.task, options.method, options.budget)

    from benchmarks.paper.run import execute
    from benchmarks.paper.tasks.load import load
    from benchmarks.paper.training import Machine, processes

    task = TASKS[options.task]
    machine = Machine(options.precision, options.device_batch, options.workers, options.save_steps)
    found = load(task, options.data)
    for seed in _seeds(options):
        one = records.Run(task, options.method, preset, seed, options.model or preset.model, options.output)
        record = execute(one, found, machine)
        if processes().is_main_process:
            print(f"{one.name}\n{tables.line(record)}", flush=True)
    return 0


def stand_ins(options: argparse.Namespace) -> int:
    """Every method on every stand-in, the table, and whether each beats what needs no training."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("stand-ins: starts --processes of its own; call it without torchrun or accelerate launch")

    from tqdm import tqdm

    from benchmarks.paper.standin import base, rows, sweep
    from benchmarks.paper.training import Machine

    parts = rows.read(options.sources)
    folders = sweep.bases(base.Text.of(parts), options.output, options.processes)
    wanted = sweep.runs(folders, options.output, _seeds(options), options.task, options.method, options.learning_rate)
    made = {name: rows.make(name, parts) for name in options.task}
    machine = Machine(options.precision, options.device_batch, options.workers, options.save_steps)
    with tqdm(total=len(wanted), desc="runs") as bar:
        for one, record in sweep.sweep(wanted, made, machine, options.processes):
            bar.write(f"{one.name}\n{tables.line(record)}", file=sys.stdout)
            bar.update()
    held = records.below(options.output)
    print(tables.table(tables.NAME_OF_STAND_INS, held))
    missed = tables.not_beaten(held)
    print("\n".join(missed) if missed else "Every method that has run beats its baselines by two standard errors.")
    return int(bool(missed))


def table(options: argparse.Namespace) -> int:
    """The runs that exist."""
    print(tables.table(options.name, records.below(options.output)))
    return 0


def keep(options: argparse.Namespace) -> int:
    """Into the repository."""
    for path in publish.keep(records.below(options.output)):
        print(path)
    return 0


def cost(options: argparse.Namespace) -> int:
    """The paper's table 15."""
    from benchmarks.paper.cost import measured

    publish.keep_cost(measured(options.device, options.rounds))
    print(publish.cost_table())
    return 0


def _seeds(options: argparse.Namespace) -> range:
    return range(options.first_seed, options.first_seed + options.seeds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--output", type=Path, default=RUNS, help=f"folder of the runs (default {RUNS})")
    training = argparse.ArgumentParser(add_help=False)
    training.add_argument("--first-seed", type=int, default=0, help="the least of the seeds (default 0)")
    training.add_argument("--precision", choices=PRECISIONS, default="fp32")
    training.add_argument("--device-batch", type=int, default=32, help="rows a device takes at a time (default 32)")
    training.add_argument("--workers", type=int, default=1, help="processes that make tokens (default 1)")
    training.add_argument("--save-steps", type=int, default=500, help="steps between checkpoints (default 500)")

    one = commands.add_parser("run", parents=[common, training], help="one cell of the paper's tables")
    one.add_argument("--task", choices=TASKS, required=True)
    one.add_argument("--method", choices=presets.methods(), required=True)
    one.add_argument("--budget", help="as the paper prints it, such as 0.32M; may be left out where there is one alone")
    one.add_argument("--data", default="hub", help="a folder with train.json and the like (default: the hub)")
    one.add_argument("--model", help="a folder, or a repository on the hub (default: the paper's)")
    one.add_argument("--seeds", type=int, default=1, help="runs, each with a seed of its own (default 1)")
    one.set_defaults(do=run)

    small = commands.add_parser("stand-ins", parents=[common, training], help="all methods on tasks that need no hub")
    methods = presets.methods(tables.NAME_OF_STAND_INS)
    small.add_argument("--task", choices=STAND_INS, nargs="+", default=list(STAND_INS), help="only these")
    small.add_argument("--method", choices=methods, nargs="+", default=list(methods), help="only these")
    small.add_argument("--learning-rate", type=float, help="in place of the presets', to find better ones")
    small.add_argument("--sources", type=Path, help="folder of Python sources (default: the standard library)")
    small.add_argument("--processes", type=int, default=2, help="of one thread each (default 2)")
    small.add_argument("--seeds", type=int, default=3, help="runs of each method, each with its own (default 3)")
    small.set_defaults(do=stand_ins)

    shown = commands.add_parser("table", parents=[common], help="the runs that exist beside the paper's figures")
    shown.add_argument("name", choices=presets.TABLES)
    shown.set_defaults(do=table)

    kept = commands.add_parser("keep", parents=[common], help="the stand-ins' runs, into results/ and README.md")
    kept.set_defaults(do=keep)

    priced = commands.add_parser("cost", help="AdaLoRA's time and memory beside LoRA's, at three budgets")
    priced.add_argument("--device", default="cpu", help="cuda takes the paper's model, cpu (default) a small one")
    priced.add_argument("--rounds", type=int, default=20, help="timed steps of each contestant (default 20)")
    priced.set_defaults(do=cost)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
