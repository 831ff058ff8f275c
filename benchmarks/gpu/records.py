"""Records on disk: one file per device and kind, and for the sweep one that grows case by case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


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


__all__ = ["Sweep", "write"]
