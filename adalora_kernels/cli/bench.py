"""``adalora-kernels bench``: the benchmarks of a source checkout, or with ``--report`` the page of their records."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import adalora_kernels
from adalora_kernels.cli.errors import plain_errors

MEASURE, REPORT = "benchmarks", "benchmarks.report"


def main(arguments: argparse.Namespace) -> int:
    """Run what ``make bench`` runs, or make the report; the exit status of either.

    Raises:
        SystemExit: this is no source checkout, or a folder was named that nothing would be done with.
    """
    with plain_errors("bench"):
        root = checkout()
        folders = {"--results": arguments.results, "--output": arguments.output}
        options = [f"{name}={path.resolve()}" for name, path in folders.items() if path is not None]
        if options and not arguments.report:
            raise ValueError(
                f"{options[0].partition('=')[0]}: expected it with --report alone; add that or leave it out"
            )
    if arguments.report and arguments.output is None:
        options.append(f"--output={Path('benchmark-report').resolve()}")
    module = REPORT if arguments.report else MEASURE
    return subprocess.run([sys.executable, "-m", module, *options], cwd=root, check=False).returncode


def checkout() -> Path:
    """The source checkout that the package runs from.

    Raises:
        ValueError: it is installed elsewhere.
    """
    root = Path(adalora_kernels.__file__).parents[1]
    if not (root / "benchmarks" / "report" / "__main__.py").is_file():
        raise ValueError(
            "expected a source checkout, which alone has the benchmarks, and this package is installed in "
            f"{root}: clone the repository and run make bench there"
        )
    return root


__all__ = ["checkout", "main"]
