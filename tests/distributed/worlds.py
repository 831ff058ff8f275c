"""Worlds of a few processes on this machine, with gloo over the loopback interface."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Forked from a server that has imported torch once and run nothing of it.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.distributed.jobs"])


def run(size: int, folder: Path, job: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """What ``job(*args)`` returns in each of ``size`` ranks; None for a rank that was killed by a signal.

    Args:
        size: number of processes.
        folder: an empty one, for what they leave.
        job: a function of a module.
        args: picklable.
        timeout: in seconds, for all of it.

    Raises:
        AssertionError: a rank has raised, and none was killed; or they took too long.
    """
    folder.mkdir(parents=True)
    processes = [
        _context.Process(target=_rank, args=(rank, size, folder, timeout, job, args), daemon=True)
        for rank in range(size)
    ]
    end = time.monotonic() + timeout
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
    errors = "\n".join(path.read_text() for path in sorted(folder.glob("*.error")))
    assert not late, f"ranks {late} have not ended after {timeout} s\n{errors}"
    codes = [process.exitcode for process in processes]
    assert -signal.SIGKILL in codes or not any(codes), f"ranks ended with {codes}\n{errors}"
    return [_result(folder / f"{rank}.result") for rank in range(size)]


def _result(path: Path) -> Any:
    return torch.load(path, weights_only=False) if path.exists() else None


def _rank(rank: int, size: int, folder: Path, timeout: float, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))  # DeepSpeed asks for them
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(folder / "store"), size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout / 2),
        )
        torch.manual_seed(0)
        torch.save(job(*args), folder / f"{rank}.result")
        dist.barrier()
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise SystemExit(1) from None
    dist.destroy_process_group()


__all__ = ["run"]
