"""Report on one run, or compare several, in one HTML page that needs nothing but itself.

    python -m job.report runs/critic                    one run: runs/critic/report.html
    python -m job.report runs/probe runs/critic         a comparison: runs/report.html
    python -m job.report runs/* --out comparison.html   the same, elsewhere
    python -m job.report --sync runs/critic             and bring the run's MLflow copy up to date

Of several paths, those that are there and hold no run (a cache, a database) are left out.
Works at any time: on runs that have just begun, still go on, have crashed or have finished.
The report of one run also leaves its plots as PNG files in RUN/plots.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from job.common.errors import InputError, run_and_leave
from job.run.report_page import is_run, write_report


def _sync(run: Path) -> bool:
    """Bring a run's MLflow copy up to date and say how it went."""
    try:
        from job.run.mlflow_sync import sync_run

        print(f"{run}: {sync_run(run)}")
    except Exception as error:  # whatever one run's copy fails on, the next one gets its turn
        print(f"{run}: not synchronised: {error}", file=sys.stderr)
        return False
    return True


def _runs(given: Sequence[Path]) -> Sequence[Path]:
    """The runs among several paths, as a shell's `runs/*` gives them.

    Raises:
        InputError: none of them is one.
    """
    if len(given) == 1:
        return given
    others = [path for path in given if path.exists() and not is_run(path)]
    if len(others) == len(given):
        raise InputError(f"{', '.join(map(str, given))}: none of them is a run directory")
    if others:
        print(f"left out, for they hold no run: {', '.join(map(str, others))}", file=sys.stderr)
    return [path for path in given if path not in others]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m job.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="where to write the page")
    parser.add_argument("--sync", action="store_true", help="also update the MLflow copies")
    return parser.parse_args()


def main() -> None:
    options = _options()
    runs = _runs(options.runs)
    print(f"report: {write_report(runs, options.out)}")
    synchronised = [_sync(run) for run in runs] if options.sync else []
    if not all(synchronised):
        sys.exit(1)


if __name__ == "__main__":
    run_and_leave(main)
