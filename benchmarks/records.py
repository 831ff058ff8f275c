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
from collections.abc import Iterator, Mapping, Sequence
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
        earlier: files of other runs, whose records count as well; a case is taken from the first that has it.
        aside: what two environments may differ in and count as one, where both tell their source.
    """

    def __init__(
        self, path: Path, environment: dict[str, Any], earlier: Sequence[Path] = (), aside: Sequence[str] = ("commit",)
    ) -> None:
        self.path, self._aside = path, frozenset(aside)
        self.environments: list[dict[str, Any]] = []
        self.records: list[dict[str, Any]] = []
        for file in dict.fromkeys((path, *earlier)):
            if file.exists():
                self._adopt(json.loads(file.read_text(encoding="utf-8")))
        self.current = self._place(environment)

    def _adopt(self, held: dict[str, Any]) -> None:
        known = [_key(record) for record in self.records]
        for record in held["records"]:
            if _key(record) not in known:
                place = self._place(held["environments"][record["environment"]])
                self.records.append(record | {"environment": place})

    def _place(self, environment: dict[str, Any]) -> int:
        if environment not in self.environments:
            self.environments.append(environment)
        return self.environments.index(environment)

    def is_current(self, record: dict[str, Any]) -> bool:
        """Whether it was measured in this environment."""
        return self._deciding(self.environments[record["environment"]]) == self._deciding(
            self.environments[self.current]
        )

    def _deciding(self, environment: dict[str, Any]) -> dict[str, Any]:
        aside = self._aside if "source" in environment else ()
        return {name: value for name, value in environment.items() if name not in aside}

    def holds(self, key: Any) -> bool:
        """Whether the case was measured in this environment; ``key``: its record's case, or the name it was put by."""
        return any(_key(record) == key and self.is_current(record) for record in self.records)

    def under(self, triton: str) -> list[dict[str, Any]]:
        """The records made with a minor version of triton."""
        return [
            record
            for record in self.records
            if str(self.environments[record["environment"]]["triton"]).startswith(f"{triton}.")
        ]

    def put(self, key: Any, records: list[dict[str, Any]]) -> None:
        """Replace what was known of the case, and write."""
        self.records = [record for record in self.records if _key(record) != key]
        named = {"name": key} if isinstance(key, str) else {}
        self.records += [record | named | {"environment": self.current} for record in records]
        self.write()

    def write(self) -> None:
        """All of it, with the environments that something was measured in."""
        used = sorted({self.current, *(record["environment"] for record in self.records)})
        place = {old: new for new, old in enumerate(used)}
        self.environments = [self.environments[old] for old in used]
        self.current = place[self.current]
        self.records = [record | {"environment": place[record["environment"]]} for record in self.records]
        write(self.path, {"environments": self.environments, "records": self.records})


def _key(record: dict[str, Any]) -> Any:
    return record.get("name", record["case"])


__all__ = ["Sweep", "complaints", "read", "write"]
