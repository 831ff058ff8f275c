"""Where the harness runs: a CUDA device, whose work is timed as replays of a graph, or the CPU in a dry run."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from adalora_kernels.backends.triton.sources import fingerprint_of_all
from benchmarks.environment import commit, source
from benchmarks.timing import Contestant, interleave, wall_seconds

Run = Callable[[], object]
RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Machine:
    """A device and how to time work on it.

    Attributes:
        device: "cuda", or "cpu" in a dry run.
        rounds: timed rounds per case.
        results: the folder that records are written to.
    """

    device: str
    rounds: int
    results: Path

    @property
    def dry(self) -> bool:
        """Whether this only walks the code: kernels are interpreted on the CPU, and no time means anything."""
        return self.device == "cpu"

    @property
    def name(self) -> str:
        """The device's name, as a file name."""
        name = "dry" if self.dry else torch.cuda.get_device_name()
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

    def record(self, kind: str = "") -> Path:
        """The file of this device's records of a kind; the core set's has none."""
        return self.results / f"{self.name}{kind and '-'}{kind}.json"

    def earlier(self, kind: str = "") -> list[Path]:
        """That file, then the checkout's own: what another run has left there counts as well."""
        return list(dict.fromkeys((self.record(kind), RESULTS / self.record(kind).name)))

    @property
    def cache_bytes(self) -> int:
        """L2, or nothing to speak of in a dry run."""
        return 0 if self.dry else torch.cuda.get_device_properties(self.device).L2_cache_size

    def environment(self) -> dict[str, Any]:
        """What figures depend on."""
        found: dict[str, Any] = {"device": self.name, "dry": self.dry, "commit": commit()}
        if not self.dry:
            properties = torch.cuda.get_device_properties(self.device)
            found |= {
                "device": properties.name,
                "source": source(),
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "cuda": torch.version.cuda,
                "float32_products": torch.get_float32_matmul_precision(),
            }
        found["kernels"] = fingerprint_of_all()
        return found | {"python": platform.python_version(), **{name: installed(name) for name in _PACKAGES}}

    def pool(self) -> Any:
        """Memory that graphs may share, where none needs what another left and no two run at once."""
        return None if self.dry else torch.cuda.graph_pool_handle()

    def recorded(self, runs: Sequence[Run], pool: Any = None) -> Run:
        """The runs, one after the other, as one replay of a CUDA graph; in a dry run just called."""
        if self.dry:
            return lambda: [run() for run in runs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for run in runs:
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            for run in runs:
                run()
        return graph.replay

    def replays(self, graphs: Mapping[str, Run]) -> dict[str, list[float]]:
        """Device seconds of each, by round, interleaved."""
        return self.interleaved({name: partial(_unprepared, graph) for name, graph in graphs.items()}, self._seconds)

    def interleaved(
        self, contestants: Mapping[str, Contestant], clock: Callable[[Run], float] = wall_seconds
    ) -> dict[str, list[float]]:
        """Seconds of each contestant, by round."""
        return interleave(contestants, self.rounds, 0 if self.dry else 2, clock)

    def _seconds(self, run: Run) -> float:
        """Device time of one run, which is queued while the device is kept busy: its launch is no part of it."""
        if self.dry:
            return wall_seconds(run)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_BUSY_CLOCKS)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def repeats(self, runs: Sequence[Run]) -> int:
        """How often to record these runs in one graph, so that what a replay takes beside them does not count."""
        if self.dry:
            return 1
        graph = self.recorded(runs)
        graph()
        seconds = min(self._seconds(graph) for _ in range(3))
        return max(1, min(_MOST_RUNS // len(runs), math.ceil(_LONG_ENOUGH / seconds)))

    def state(self) -> dict[str, Any]:
        """Clock, power and temperature of the device as it is now, or why it does not tell."""
        found: dict[str, Any] = {}
        for name, read in _STATE.items() if not self.dry else ():
            try:
                found[name] = read()
            except Exception as error:  # NVML's, or that there is none: the times stand without
                found[name] = f"{type(error).__name__}: {error}"
        return found

    def wait(self) -> None:
        """Until the device is idle."""
        if not self.dry:
            torch.cuda.synchronize()

    def forget(self) -> None:
        """Give back memory that nothing holds."""
        if not self.dry:
            torch.cuda.empty_cache()


_BUSY_CLOCKS = 400_000  # 0.2 ms, in which a graph is queued
_LONG_ENOUGH, _MOST_RUNS = 1e-3, 128  # seconds, and runs, of a graph
_STATE: dict[str, Callable[[], int]] = {
    "megahertz": torch.cuda.clock_rate, "milliwatts": torch.cuda.power_draw, "celsius": torch.cuda.temperature
}  # fmt: skip
_PACKAGES = ("torch", "triton", "peft", "transformers", "numpy")


def _unprepared(run: Run) -> Run:
    return run


def installed(package: str) -> str | None:
    """Its version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


__all__ = ["RESULTS", "Machine", "Run", "installed"]
