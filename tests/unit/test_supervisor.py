"""What a task makes of a command that cannot be started."""

from __future__ import annotations

import subprocess
from pathlib import Path

from slurm.supervisor import _not_started


def _refused(command: str, **surroundings: object) -> OSError:
    try:
        subprocess.Popen([command], **surroundings)  # type: ignore[call-overload]
    except OSError as error:
        return error
    raise AssertionError("it was started")


def test_a_program_that_is_missing_is_the_same_on_each_node(tmp_path: Path) -> None:
    code, reason = _not_started("apptainer", _refused("apptainer", env={"PATH": str(tmp_path)}))
    assert code == 78
    assert reason.startswith("cannot start apptainer: No such file or directory; ")
    assert "`setup`" in reason
    (tmp_path / "apptainer").touch()
    code, reason = _not_started("apptainer", _refused("apptainer", env={"PATH": str(tmp_path)}))
    assert (code, "Permission denied" in reason) == (78, True)


def test_a_folder_that_is_missing_may_be_on_another_node(tmp_path: Path) -> None:
    code, _ = _not_started("/bin/true", _refused("/bin/true", cwd=tmp_path / "nowhere"))
    assert code == 71


def test_a_node_that_is_full_is_unfit() -> None:
    assert _not_started("python", OSError(11, "Resource temporarily unavailable"))[0] == 71
