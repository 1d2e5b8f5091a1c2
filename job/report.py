"""Report on one run, or compare several, in one HTML page that needs nothing but itself.

    python -m job.report runs/critic                    one run: runs/critic/report.html
    python -m job.report runs/probe runs/critic         a comparison: runs/report.html
    python -m job.report runs/* --out comparison.html   the same, elsewhere
    python -m job.report --sync runs/critic             and bring the run's MLflow copy up to date

Works at any time: on runs that have just begun, still go on, have crashed or have finished.
The report of one run also leaves its plots as PNG files in RUN/plots.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from job.common.errors import run_command
from job.run.report_page import write_report


def _sync(run: Path) -> bool:
    """Bring a run's MLflow copy up to date and say how it went."""
    try:
        from job.run.mlflow_sync import sync_run

        print(f"{run}: {sync_run(run)}")
    except Exception as error:  # whatever one run's copy fails on, the next one gets its turn
        print(f"{run}: not synchronised: {error}", file=sys.stderr)
        return False
    return True


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
    print(f"report: {write_report(options.runs, options.out)}")
    synchronised = [_sync(run) for run in options.runs] if options.sync else []
    if not all(synchronised):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
