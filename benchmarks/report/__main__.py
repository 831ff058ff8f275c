"""``python -m benchmarks.report``: the page and its plots; ``adalora-kernels bench --report`` runs it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.report.page import write

RESULTS = Path(__file__).parents[1] / "results"


def main() -> int:
    """Write the page and say where it is; 1 where it can't be made."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of records (default benchmarks/results)")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmark-report"), help="folder (default benchmark-report)"
    )
    options = parser.parse_args()
    try:
        page = write(options.results, options.output)
    except (OSError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 1
    print(f"Page: {page}\nPlots: {page.parent / 'plots'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
