"""Nightly regressions from the cluster's cron: --help, and slurm/night_commands.py."""

# Read by any Python, to say that it is too old: no syntax here that is newer than 2.7.
import os
import sys

# run as a file, so that neither this folder's neighbours nor an installed copy must be there
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import job  # noqa: F401 - ends a Python that is too old

if __name__ == "__main__":
    from job.common.errors import run_command
    from slurm.night_commands import main

    run_command(main)
