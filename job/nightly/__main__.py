"""Judge a night: read what its runs have left, hold it against what is known, and write it down.

    python -m job.nightly runs/nightly/night-000012

The jobs of a night do this at its end (slurm/nightly.py); again, it judges anew. Exit codes: 0
passed or improved, 1 regressed, 3 incomplete, 4 no baseline yet, 78 there is no such night.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from pathlib import Path

from job.common.errors import first_line, run_and_leave
from job.common.files import write_atomic
from job.common.progress import set_up_logging
from job.nightly.figures import result
from job.nightly.judge import judge
from job.nightly.matrix import Kind
from job.nightly.page import page
from job.nightly.record import Night, NightFolder, judged, nights
from job.nightly.summary import headline, junit, markdown
from job.run.reader import StoredRun

_WHOLE_NIGHTS = 3  # whose checkpoints stay; also those of the night itself, unless it passed
_log = logging.getLogger("job.nightly")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("night", type=Path, help="the folder of a night")
    options = parser.parse_args()
    set_up_logging()
    night = judge_night(NightFolder(options.night.absolute()))
    print(headline(night))
    sys.exit(night.verdict.exit_code)


def judge_night(folder: NightFolder) -> Night:
    """Judge a night, and write its record and reports.

    Raises:
        InputError: there is no night in the folder.
    """
    plan = folder.plan()
    results = {name: result(plan, name) for name in plan.entries}
    earlier = list(judged(folder.path.parent, plan.matrix, plan.number))
    night = judge(folder, plan, results, earlier)
    folder.write(night)
    write_atomic(folder.path / "summary.md", markdown(night))
    write_atomic(folder.path / "junit.xml", junit(night))
    write_atomic(folder.path / "index.html", page([*earlier, night]))
    _track(folder, night)
    _thin_out(folder)
    return night


def _track(folder: NightFolder, night: Night) -> None:
    """Send it to MLflow where its runs are sent; whatever is wrong there changes no verdict."""
    trained = [run for run in night.plan.runs if night.plan.entries[run.entry].kind is Kind.train]
    there = (stored for run in trained if (stored := StoredRun(run.path)).has_config)
    try:
        uri = next(there).config()["mlflow"]["tracking_uri"]
        from job.nightly.tracking import track

        track(night, folder.path, uri)
    except StopIteration:
        _log.warning("MLflow: nothing was trained")
    except Exception as error:
        _log.warning("MLflow has not received this night: %s", first_line(error, named=True))


def _thin_out(folder: NightFolder) -> None:
    """Remove the checkpoints of nights long past: their figures are kept."""
    for old in nights(folder.path.parent)[:-_WHOLE_NIGHTS]:
        if old.number != folder.number and old.record_file.exists():
            for run in (old.path / "runs").glob("*"):
                shutil.rmtree(run / "checkpoints", ignore_errors=True)
                (run / "critic.safetensors").unlink(missing_ok=True)


if __name__ == "__main__":
    run_and_leave(main)
