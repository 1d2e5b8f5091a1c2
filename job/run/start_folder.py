"""The working folder in which a run was started: to it relative paths in its configuration refer.

A run that calls itself runs/critic and lies at /home/me/project/runs/critic was started in
/home/me/project, or is used as if it had been, where the whole project has moved since. One whose
run.dir is a whole path says nothing so: its newest attempt has noted the folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from job.run.reader import StoredRun


def start_folder(run: Path, run_dir: str) -> Path | None:
    """Where a run was started; None where nothing says it.

    Args:
        run: its directory, as it lies now.
        run_dir: as its configuration calls it.
    """
    here, called = run.absolute(), Path(os.path.normpath(run_dir))
    if called.is_absolute():
        noted = StoredRun(run).attempt().get("cwd")
        return Path(noted) if isinstance(noted, str) else None
    depth = len(called.parts)
    return here.parents[depth - 1] if here.parts[-depth:] == called.parts else None
