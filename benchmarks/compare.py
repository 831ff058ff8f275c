"""``python -m benchmarks.compare BEFORE AFTER``: two files of records, or two commits; 1 where something got worse.

A figure is worse where the median of a contestant of ours has grown, relative to its baseline in the same record, by
more than both records' noise and the least that counts; or where a count or a number of bytes has grown at all. A
commit stands for the file that it holds; ``--file`` says which.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.records import TIMES, complaints, read

ROOT = Path(__file__).parents[1]
DEFAULT = "benchmarks/results/cpu.json"
LEAST = 0.03  # relative; less is not worth a word, whatever the noise was
OURS = ("ours", "native", "adalora")
BASELINES = (
    "frozen", "frozen model", "PEFT", "PEFT AdaLoRA", "peft", "AdamW alone", "copy", "PEFT LoRA, eager"
)  # fmt: skip
EXACT = ("operators", "saved_bytes", "launches")


class Change(NamedTuple):
    """One figure in two files.

    Attributes:
        what: benchmark, case and contestant.
        before, after: relative to the baseline; or exact.
        allowed: by how much it may grow, relative.
    """

    what: str
    before: float
    after: float
    allowed: float

    @property
    def worse(self) -> bool:
        """Whether it has grown by more than it may."""
        return self.after > self.before * (1 + self.allowed)

    def __str__(self) -> str:
        mark = "WORSE " if self.worse else "      "
        by = self.after / self.before - 1 if self.before else float("inf")
        return f"{mark}{self.what}: {self.before:.4g} -> {self.after:.4g} ({by:+.1%}, allowed {self.allowed:+.1%})"


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    """Every figure of ours that both files hold."""
    held = {_key(record): record for record in before["records"]}
    for record in after["records"]:
        earlier = held.get(_key(record))
        if earlier is not None:
            yield from _timed(earlier, record)
            yield from _exact(earlier, record)


def _key(record: Mapping[str, Any]) -> str:
    return json.dumps([record["benchmark"], record["case"]], sort_keys=True)


def _name(record: Mapping[str, Any]) -> str:
    return f"{record['benchmark']} {', '.join(f'{k} {v}' for k, v in record['case'].items())}"


def _timed(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    for unit in TIMES:
        if unit not in before or unit not in after:
            continue
        shared = [name for name in after[unit] if name in before[unit]]
        baseline = next((name for name in BASELINES if name in shared), None)
        for name in shared:
            if baseline is None or not any(ours in name for ours in OURS):
                continue
            spread = max(_spread(record[unit][name]) for record in (before, after))
            noise = max(record.get("noise", 0.0) for record in (before, after))
            was, now = (record[unit][name]["median"] / record[unit][baseline]["median"] for record in (before, after))
            yield Change(f"{_name(after)}: {name} / {baseline}", was, now, max(LEAST, noise, spread))


def _spread(times: Mapping[str, float]) -> float:
    return (times["p80"] - times["p20"]) / times["median"] / 2


def _exact(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    for kind in EXACT:
        for name, value in _flat(after.get(kind, {})):
            earlier = dict(_flat(before.get(kind, {}))).get(name)
            if earlier is not None and any(ours in name for ours in OURS):
                yield Change(f"{_name(after)}: {kind} of {name}", earlier, value, 0.0)


def _flat(values: Any, path: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from _flat(value, f"{path}, {name}" if path else name)
    else:
        yield path, values


def content(source: str, file: str) -> dict[str, Any]:
    """A file's records, or those of ``file`` at a commit.

    Raises:
        ValueError: neither a file nor a commit that has it, or not as the schema says.
    """
    if Path(source).is_file():
        return read(Path(source))
    shown = subprocess.run(["git", "show", f"{source}:{file}"], capture_output=True, text=True, cwd=ROOT, check=False)
    if shown.returncode:
        raise ValueError(f"{source}: expected a file, or a commit that holds {file}: {shown.stderr.strip()}")
    held: dict[str, Any] = json.loads(shown.stdout)
    for complaint in complaints(held):
        raise ValueError(f"{source}:{file}: {complaint}")
    return held


def main() -> int:
    """Print every figure of ours in both; 1 where one is worse, 2 where they can't be compared."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("before", help="a file of records, or a commit")
    parser.add_argument("after", help="likewise")
    parser.add_argument("--file", default=DEFAULT, help=f"what of a commit is compared (default {DEFAULT})")
    options = parser.parse_args()
    try:
        before, after = (content(source, options.file) for source in (options.before, options.after))
    except ValueError as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 2
    found = list(changes(before, after))
    print("\n".join(map(str, found)) or "The two have no figure of ours in common.")
    devices = [held.get("environment", {}).get("device") for held in (before, after)]
    if devices[0] != devices[1]:
        print(f"Mind: measured on {devices[0]} and on {devices[1]}.")
    return 2 if not found else int(any(change.worse for change in found))


if __name__ == "__main__":
    raise SystemExit(main())
