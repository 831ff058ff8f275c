"""The records of a folder, each with where it comes from: file, commit, device and the command that makes it again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.records import TIMES, complaints

MAKE_BENCH = "make bench"
# By how the name of a file ends; what make gpu writes is named after the device.
_COMMANDS = (
    (r"cpu", MAKE_BENCH),
    (r"counts", "python -m benchmarks.step.counts"),
    (r"stand-ins|cost", "make paper"),
    (r"teacher", "python -m benchmarks.paper.teacher run"),
    (r".*-sweep", "make gpu PART=i/n"),
    (r".*-steps", "make gpu PART=steps"),
    (r".*-questions", "make gpu PART=questions"),
    (r".*-sanitizer", "make gpu PART=sanitizer"),
    (r".*-tuning(-.*)?", "make tune"),
    (r"dry", "make gpu"),
)
_SCALE = {"milliseconds": 1.0, "microseconds": 1e-3}


@dataclass(frozen=True)
class Origin:
    """Where a figure comes from.

    Attributes:
        file: its record's.
        command: that makes it again.
        environment: as recorded.
    """

    file: str
    command: str
    environment: Mapping[str, Any]

    @property
    def device(self) -> str:
        """The device, with the number of cores that were used where it is a CPU."""
        device, cores = str(self.environment["device"]), self.environment.get("cores")
        return f"{device}, {cores} core{'s' * (cores != 1)}" if cores else device

    @property
    def commit(self) -> str:
        """The commit; "-dirty" at its end says that the checkout was changed."""
        return str(self.environment["commit"])

    @property
    def dry(self) -> bool:
        """Whether nothing was timed in earnest."""
        return bool(self.environment.get("dry"))

    @property
    def versions(self) -> str:
        """Of what it was measured with."""
        names = ("torch", "triton", "peft", "transformers", "python", "cuda", "driver")
        return ", ".join(f"{name} {self.environment[name]}" for name in names if self.environment.get(name))

    def __str__(self) -> str:
        return f"{self.file}, commit {self.commit}, {self.device}, {self.command}"


@dataclass(frozen=True)
class Measured:
    """A record and its origin."""

    record: Mapping[str, Any]
    origin: Origin

    @property
    def benchmark(self) -> str:
        """What was measured."""
        return str(self.record["benchmark"])

    @property
    def case(self) -> Mapping[str, Any]:
        """What it was measured on."""
        case: Mapping[str, Any] = self.record.get("case", {})
        return case

    @cached_property
    def milliseconds(self) -> dict[str, dict[str, float]]:
        """Median and 20/80 percentiles by contestant; empty where nothing was timed."""
        return {
            name: {quantile: value * _SCALE[unit] for quantile, value in times.items()}
            for unit in TIMES
            for name, times in self.record.get(unit, {}).items()
        }

    def noise(self, *names: str) -> float:
        """How far a ratio between contestants may be from 1 and still be none, relative.

        That is the record's own check, the same contestant timed twice, where it was made; else half the way between
        the 20 and 80 percentiles of the contestant that spreads most.
        """
        if "noise" in self.record:
            return float(self.record["noise"])
        times = [self.milliseconds[name] for name in names if name in self.milliseconds]
        return max(((t["p80"] - t["p20"]) / t["median"] / 2 for t in times), default=0.0)


@dataclass(frozen=True)
class Source:
    """A file of records.

    Attributes:
        file: its name.
        content: all of it.
        origins: one for each environment.
        measured: its records.
    """

    file: str
    content: Mapping[str, Any]
    origins: tuple[Origin, ...]
    measured: tuple[Measured, ...]

    @property
    def is_gpu(self) -> bool:
        """Whether make gpu wrote it."""
        return any(origin.command.startswith("make gpu") for origin in self.origins)

    def extra(self, name: str) -> list[Measured]:
        """Records that stand outside the list, under a name of their own."""
        held = self.content.get(name) or []
        return [Measured(record, self.origins[0]) for record in (held if isinstance(held, list) else [held])]


def read_folder(folder: Path) -> tuple[list[Source], dict[str, str]]:
    """The files of a folder.

    Args:
        folder: that ``make bench`` and ``make gpu`` write to.

    Returns:
        Those that hold records of the schema; and what the others lack, by name.

    Raises:
        ValueError: no folder, or none of its files holds records.
    """
    if not folder.is_dir():
        raise ValueError(f"--results: expected a folder of records, {folder} is none; make bench writes one")
    sources, left_out = [], {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            left_out[path.name] = f"no JSON: {error}"
            continue
        complaint = next(complaints(content), None)
        if complaint is None and not content.get("records"):
            complaint = "no records"
        if complaint is None:
            sources.append(_source(path, content))
        else:
            left_out[path.name] = complaint
    if not sources:
        raise ValueError(f"--results: expected records, {folder} holds none; make bench writes them")
    return sources, left_out


def _source(path: Path, content: dict[str, Any]) -> Source:
    environments = content.get("environments", [content.get("environment")])
    origins = tuple(Origin(path.name, _command(path.stem, environment), environment) for environment in environments)

    def origin(record: Mapping[str, Any]) -> Origin:
        place = record.get("environment", 0)
        return origins[place]

    return Source(path.name, content, origins, tuple(Measured(record, origin(record)) for record in content["records"]))


def _command(stem: str, environment: Mapping[str, Any]) -> str:
    if "command" in environment:
        return str(environment["command"])
    unnamed = "make gpu" if "capability" in environment else "by a command that it does not name"
    made_by = next((command for pattern, command in _COMMANDS if re.fullmatch(pattern, stem)), unnamed)
    return made_by + " DRY=1" * bool(environment.get("dry"))


__all__ = ["MAKE_BENCH", "Measured", "Origin", "Source", "read_folder"]
