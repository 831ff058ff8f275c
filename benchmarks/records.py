"""The one schema of what is measured, and its files: one per device and kind, some of which grow case by case.

A file is {"environment": ..., "records": [...]}; one that several processes have added to has "environments", and each
record the number of its own. A record has

    benchmark   what was measured
    case        what it was measured on: names, numbers and lists of them
    milliseconds or microseconds, by contestant: {"median", "p20", "p80"}, where something was timed
    noise       how far the same contestant, timed twice, is from itself: the median of the ratios within rounds, less 1
    rounds      timed rounds

and whatever else its benchmark yields: ratios within rounds, counts, bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

TIMES = ("milliseconds", "microseconds")
QUANTILES = {"median", "p20", "p80"}


def complaints(content: Any) -> Iterator[str]:
    """What a file's content lacks to be as the schema says."""
    if not isinstance(content, Mapping) or not {"environment", "environments"} & set(content):
        yield "expected a mapping with an environment"
        return
    environments = content.get("environments", [content.get("environment")])
    for environment in environments:
        missing = [name for name in ("device", "commit", "python", "torch") if name not in environment]
        if missing:
            yield f"environment: expected {', '.join(missing)}"
    for i, record in enumerate(content.get("records", ())):
        yield from (f"records[{i}]: {complaint}" for complaint in _record_complaints(record, len(environments)))


def _record_complaints(record: Any, environments: int) -> Iterator[str]:
    if not isinstance(record, Mapping) or not {"benchmark", "case"} <= set(record):
        yield "expected a mapping with benchmark and case"
        return
    for name, value in record["case"].items():
        parts = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(part, str | int | float | bool | None) for part in parts):
            yield f"case[{name!r}]: expected a name, a number or a list of them, got {value!r:.40}"
    for unit in TIMES:
        for contestant, times in record.get(unit, {}).items():
            if set(times) != QUANTILES or not all(math.isfinite(t) for t in times.values()):
                yield f"{unit}[{contestant!r}]: expected median, p20 and p80, finite, got {times!r:.60}"
            elif not times["p20"] <= times["median"] <= times["p80"]:
                yield f"{unit}[{contestant!r}]: expected p20 <= median <= p80, got {times!r:.60}"
    if any(unit in record for unit in TIMES) and not (isinstance(record.get("rounds"), int) and record["rounds"] > 0):
        yield f"rounds: expected at least 1 where something was timed, got {record.get('rounds')!r}"
    if environments > 1 and record.get("environment") not in range(environments):
        yield f"environment: expected a number below {environments}, got {record.get('environment')!r}"


def read(path: Path) -> dict[str, Any]:
    """A file's content.

    Raises:
        ValueError: it is not as the schema says.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    for complaint in complaints(content):
        raise ValueError(f"{path}: {complaint}")
    assert isinstance(content, dict)
    return content


def write(path: Path, content: dict[str, Any]) -> None:
    """In one go, so that a run that is cut off leaves the file that was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


class Sweep:
    """Records of many cases, each kept with the environment that it was measured in.

    Args:
        path: the file, which may hold what earlier parts measured.
        environment: of this process.
    """

    def __init__(self, path: Path, environment: dict[str, Any]) -> None:
        self.path = path
        self.environments: list[dict[str, Any]] = [environment]
        self.records: list[dict[str, Any]] = []
        if path.exists():
            held = json.loads(path.read_text(encoding="utf-8"))
            self.environments, self.records = held["environments"], held["records"]
            if environment not in self.environments:
                self.environments.append(environment)
        self.current = self.environments.index(environment)

    def holds(self, case: dict[str, Any]) -> bool:
        """Whether the case was measured in this environment."""
        return any(record["case"] == case and record["environment"] == self.current for record in self.records)

    def under(self, triton: str) -> list[dict[str, Any]]:
        """The records made with a minor version of triton."""
        return [
            record
            for record in self.records
            if str(self.environments[record["environment"]]["triton"]).startswith(f"{triton}.")
        ]

    def put(self, case: dict[str, Any], records: list[dict[str, Any]]) -> None:
        """Replace what was known of the case, and write."""
        self.records = [record for record in self.records if record["case"] != case]
        self.records += [record | {"environment": self.current} for record in records]
        used = sorted({record["environment"] for record in self.records})
        place = {old: new for new, old in enumerate(used)}
        self.environments = [self.environments[old] for old in used]
        self.current = place[self.current]
        self.records = [record | {"environment": place[record["environment"]]} for record in self.records]
        write(self.path, {"environments": self.environments, "records": self.records})


__all__ = ["Sweep", "complaints", "read", "write"]
