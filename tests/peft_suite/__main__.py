"""PEFT's own AdaLoRA tests with and without ``patch_peft()``, and this package's tests, under several PEFTs.

``python -m tests.peft_suite 0.18.1 0.20.0 newest`` exits with 1 unless each of PEFT's tests has the same outcome in
both runs, the patched ones went through our layers, and our tests pass. Tests that load something from the Hugging Face
hub can't run offline; they are counted apart. PEFT's other files with AdaLoRA tests need the hub for every one of them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path

from tests.peft_suite.judge import Run, faults
from tests.peft_suite.obtain import TESTS, newest, obtain

ROOT = Path(__file__).parents[2]
PEFTS_FILES = ("custom_models", "config", "initialization", "mixed")
OUR_FILES = ("peft_patching", "peft_equality", "peft_checkpoints", "peft_allocation", "trainer")


def main() -> int:
    """The exit status: 0 where all holds for all versions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", help="of PEFT; 'newest' is the newest that the index has")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="where each PEFT gets a folder")
    arguments = parser.parse_args()
    if find_spec("diffusers") is None:
        parser.error("PEFT's tests import diffusers, which the test extra brings on Python 3.11 and newer: make setup")
    versions = dict.fromkeys(newest() if version == "newest" else version for version in arguments.versions)
    return int(any([not _holds(version, arguments.build.resolve(), arguments.jobs) for version in versions]))


def _holds(version: str, build: Path, jobs: int) -> bool:
    folder = obtain(version, build)
    pefts = ["-k", "adalora", "-o", "addopts=", "--continue-on-collection-errors"]
    pefts += [f"{TESTS}/test_{name}.py" for name in PEFTS_FILES]
    unpatched, patched = (_run(version, folder, mode, jobs, pefts, folder) for mode in ("unpatched", "patched"))
    found = faults(unpatched, patched)
    print(f"PEFT {version}, its tests: {patched.counts()}", "" if found else ", patched as unpatched", sep="")
    print(f"  {patched.calls.get('forward', 0)} fused forwards, {patched.op_calls()} calls of our ops")
    for test, outcome in sorted(patched.outcomes.items()):
        if outcome == "hub-only":
            print(f"  {'needs' if '::' in test else 'can not be collected without'} the hub: {test}")
    if version != installed_version("peft"):  # under that one they run in make test
        ours = [f"tests/integrations/test_{name}.py" for name in OUR_FILES]
        own = _run(version, folder, "own", jobs, ours, ROOT)
        found += [f"{test}: {outcome}" for test, outcome in own.outcomes.items() if outcome in ("failed", "hub-only")]
        print(f"PEFT {version}, our tests: {own.counts()}")
    for fault in found:
        print(f"  WRONG: {fault}")
    return not found


def _run(version: str, folder: Path, mode: str, jobs: int, arguments: list[str], where: Path) -> Run:
    record = folder / f"{mode}.json"
    record.unlink(missing_ok=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PEFT_SUITE_MODE": mode,
        "PEFT_SUITE_RECORD": str(record),
        "PEFT_SUITE_VERSION": version,
        "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT))),
    }
    plugin = ("-p", "tests.peft_suite.record", "-p", "no:cacheprovider", "-n", str(jobs), "-q", "--tb=short")
    log = folder / f"{mode}.log"
    begin = time.perf_counter()
    with log.open("w") as output:
        command = [sys.executable, "-m", "pytest", *plugin, *arguments]
        status = subprocess.run(command, cwd=where, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
    if status not in (0, 1) or not record.exists():
        raise SystemExit(f"{' '.join(command)} exited with {status}:\n{log.read_text()[-5000:]}")
    print(f"  {mode}: {time.perf_counter() - begin:.0f} s, {log}", flush=True)
    return Run.read(record)


if __name__ == "__main__":
    sys.exit(main())
