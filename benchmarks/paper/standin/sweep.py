"""Every method on every stand-in: runs that are alike in length, shared out to processes of one thread each."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset

from benchmarks.paper import presets
from benchmarks.paper.records import Run
from benchmarks.paper.run import execute
from benchmarks.paper.standin import STAND_INS, base
from benchmarks.paper.training import Machine

Rows = Mapping[str, Mapping[str, Dataset]]


def bases(text: base.Text, folder: Path, processes: int) -> dict[str, str]:
    """The folder of each kind's base model; what isn't there yet is trained, side by side."""
    kinds = base.KINDS
    with _pool(processes) as pool:
        waiting = [pool.submit(base.pretrained, kind, text, base.BaseSettings.of(kind), folder) for kind in kinds]
        return {kind: str(one.result()) for kind, one in zip(kinds, waiting, strict=True)}


def runs(
    folders: Mapping[str, str], output: Path, seeds: Sequence[int], tasks: Sequence[str], methods: Sequence[str],
    learning_rate: float | None = None,
) -> list[Run]:  # fmt: skip
    """What is to be run, seed after seed, so that a table that was cut off has all methods.

    Args:
        folders: of ``bases``.
        output: of the runs.
        seeds, tasks, methods: of each cell.
        learning_rate: in place of the presets', to find better ones.
    """
    found = []
    for seed in seeds:
        for task in tasks:
            for method in methods:
                cell = presets.find(task, method, None)
                cell = cell if learning_rate is None else replace(cell, learning_rate=learning_rate)
                found.append(Run(STAND_INS[task], method, cell, seed, folders[cell.model], output))
    return found


def sweep(wanted: Sequence[Run], rows: Rows, machine: Machine, processes: int) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Run all, and give each run with its record as it ends.

    Args:
        wanted: of ``runs``.
        rows: of each task, by split.
        machine: how.
        processes: that work side by side.
    """
    quiet = replace(machine, bars=False)
    with _pool(processes) as pool:
        waiting = {pool.submit(execute, run, rows[run.task.name], quiet): run for run in wanted}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what runs now ends; nothing else begins
            raise


def _pool(processes: int) -> ProcessPoolExecutor:
    # Not forked: the threads of torch and of the tokenizers don't outlive a fork.
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_alone)


def _alone() -> None:
    """One thread, and no bars but the caller's."""
    torch.set_num_threads(1)
    gc.freeze()  # the Trainer collects garbage before each training: what was imported is none
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


__all__ = ["bases", "runs", "sweep"]
