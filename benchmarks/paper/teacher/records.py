"""Runs on disk: a log that grows by one line a run and survives a kill, and the compact file that is committed."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.paper.teacher.protocol import AdaLora, Protocol, Run, Setting

Result = dict[str, Any]
BENCHMARK = "ranks of a teacher"


@dataclass
class Results:
    """What has been run under one protocol.

    Attributes:
        environments: versions and commits, in the order in which they were first used.
        runs: the result of each run, with the number of its environment.
    """

    protocol: Protocol
    environments: list[dict[str, Any]] = field(default_factory=list)
    runs: dict[Run, Result] = field(default_factory=dict)

    def of(self, runs: Iterable[Run]) -> list[Result]:
        """The results of those of ``runs`` that exist."""
        return [self.runs[run] for run in runs if run in self.runs]


def _setting(data: Mapping[str, Any]) -> Setting:
    adalora = data["adalora"]
    return Setting(**{**data, "adalora": None if adalora is None else AdaLora(**adalora)})


def _protocol(data: Mapping[str, Any]) -> Protocol:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    values["others"] = tuple(AdaLora(**other) for other in data["others"])
    return Protocol(**values)


class Log:
    """A file to which runs are appended, one JSON record a line, each in one write that is flushed to the disk.

    What a kill has left of a line is cut off when the log is opened again.

    Args:
        path: the file; it and its folder are made where they aren't there.
        protocol: that of the runs.
        environment: of the runs that this process makes.

    Raises:
        ValueError: the file holds something else, runs under another protocol, or another process appends to it.
    """

    def __init__(self, path: Path, protocol: Protocol, environment: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            content = path.read_bytes()
            os.truncate(self._file, content.rfind(b"\n") + 1)
            self.results = read_log(path) if b"\n" in content else Results(protocol)
            if self.results.protocol != protocol:
                raise ValueError(f"log: expected runs under this protocol, got others in {path}; name another file")
        except BlockingIOError:
            os.close(self._file)
            raise ValueError(f"log: expected a file of our own, got {path}, to which another process appends") from None
        except ValueError:
            os.close(self._file)
            raise
        if b"\n" not in content:
            self._append({"protocol": asdict(protocol)})
        if environment not in self.results.environments:
            self.results.environments.append(environment)
            self._append({"environment": environment})
        self._environment = self.results.environments.index(environment)

    def put(self, run: Run, result: Result) -> None:
        """Append one run."""
        result = result | {"environment": self._environment}
        self._append({"run": asdict(run), "result": result})
        self.results.runs[run] = result

    def _append(self, record: dict[str, Any]) -> None:
        os.write(self._file, json.dumps(record, allow_nan=False).encode() + b"\n")
        os.fsync(self._file)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._file)


def read_log(path: Path) -> Results:
    """The finished lines of a log.

    Raises:
        ValueError: the file is missing, or a line isn't a record.
    """
    if not path.exists():
        raise ValueError(f"log: expected a file, found none at {path}; python -m benchmarks.paper.teacher run makes it")
    results: Results | None = None
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            if results is None:
                results = Results(_protocol(record["protocol"]))
            elif "environment" in record:
                results.environments.append(record["environment"])
            else:
                data = record["run"]
                results.runs[Run(**{**data, "setting": _setting(data["setting"])})] = record["result"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"log: expected a record in line {number} of {path}, got {line[:80]!r}") from error
    if results is None:
        raise ValueError(f"log: expected records, found none in {path}")
    return results


def merged(parts: Sequence[Results]) -> Results:
    """The runs of several logs; of one that two of them hold, the first.

    Raises:
        ValueError: they were made under different protocols.
    """
    whole = Results(parts[0].protocol)
    for part in parts:
        if part.protocol != whole.protocol:
            raise ValueError("logs: expected runs under one protocol, got several")
        for about in part.environments:
            if about not in whole.environments:
                whole.environments.append(about)
        for run, result in part.runs.items():
            at = whole.environments.index(part.environments[result["environment"]])
            whole.runs.setdefault(run, result | {"environment": at})
    return whole


def save(path: Path, results: Results) -> None:
    """Write the compact file in one go: each setting once, one line a run, four digits; of tuning the losses alone.

    Its runs are records of the benchmarks' schema, whose cases name a setting by its number.
    """
    settings = list(dict.fromkeys(run.setting for run in results.runs))
    rows = []
    for run, result in results.runs.items():
        kept = ("loss", "environment") if run.seed in results.protocol.tuning_seeds else tuple(result)
        told = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in result.items() if k in kept}
        case = {"setting": settings.index(run.setting), "budget": run.budget, "rate": run.rate, "seed": run.seed}
        rows.append(json.dumps({"benchmark": BENCHMARK, "case": case} | told, separators=(",", ":")))
    head = {"protocol": asdict(results.protocol), "environments": results.environments}
    text = json.dumps(head | {"settings": [asdict(setting) for setting in settings]}, indent=1)
    unfinished = path.with_suffix(".unfinished")
    runs = ",\n".join(rows)
    unfinished.write_text(f'{text[:-2]},\n "records": [\n{runs}\n ]\n}}\n', encoding="utf-8")
    unfinished.replace(path)


def load(path: Path) -> Results:
    """Read the compact file.

    Raises:
        ValueError: it is missing or isn't such a file.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        settings = [_setting(setting) for setting in data["settings"]]
        results = Results(_protocol(data["protocol"]), data["environments"])
        for row in data["records"]:
            case = row.pop("case")
            del row["benchmark"]
            results.runs[Run(**{**case, "setting": settings[case["setting"]]})] = row
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"results: expected runs in {path}, got {type(error).__name__}: {error}") from error
    return results


__all__ = ["Log", "Result", "Results", "load", "merged", "read_log", "save"]
