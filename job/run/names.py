"""The names that a run's own files have; whatever is named otherwise is never used or removed.

People keep copies beside a checkpoint, rename a bad one, or leave notes: `step-00000030.bak` is
theirs.
"""

from __future__ import annotations

import re
from pathlib import Path

ATTEMPT_FACTS, MACHINE = "attempt.json", "machine.json"  # of an attempt's folder
_CHECKPOINT = re.compile(r"step-([0-9]{8,})")
_UNFINISHED = re.compile(r"\.step-[0-9]{8,}\.attempt-[0-9]{4,}")
_BEING_REMOVED = re.compile(r"\.removed-step-[0-9]{8,}")
_ATTEMPT = re.compile(r"[0-9]{4,}")
_SCRATCH = re.compile(r"\..+\.attempt-([0-9]{4,})\.[0-9a-f]{32}")


def checkpoint_name(step: int) -> str:
    return f"step-{step:08}"


def checkpoint_step(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def checkpoint_steps(folder: Path) -> dict[int, Path]:
    """The folders of checkpoints in `checkpoints/`, by their steps, in their order."""
    named = [(int(m[1]), p) for p in folder.glob("*") if (m := _CHECKPOINT.fullmatch(p.name))]
    return {s: p for s, p in sorted(named) if p.name == checkpoint_name(s) and p.is_dir()}


def unfinished_name(step: int, attempt: int) -> str:
    """Of a checkpoint that is being written."""
    return f".{checkpoint_name(step)}.attempt-{attempt:04}"


def removed_name(checkpoint: str) -> str:
    """Of a checkpoint that is being removed."""
    return f".removed-{checkpoint}"


def is_leftover(name: str) -> bool:
    """Whether an entry of `checkpoints/` is one that was being written or removed."""
    return bool(_UNFINISHED.fullmatch(name) or _BEING_REMOVED.fullmatch(name))


def attempt_name(number: int) -> str:
    return f"{number:04}"


def attempt_numbers(folder: Path) -> list[int]:
    """The numbers of the attempts in a folder, in their order.

    Raises:
        OSError: it cannot be listed.
    """
    names = [entry.name for entry in folder.glob("*") if _ATTEMPT.fullmatch(entry.name)]
    return sorted(int(name) for name in names if name == attempt_name(int(name)))


def attempts_seen(folder: Path) -> list[int]:
    """The same; a file system that is away for a moment tells nothing."""
    try:
        return attempt_numbers(folder)
    except OSError:
        return []


def scratch_writer(attempt: int) -> str:
    """What an attempt adds to the names of its scratch files."""
    return f"attempt-{attempt:04}."


def scratch_files(run: Path, before: int) -> list[Path]:
    """What attempts before this number were about to put in place of a file of the run."""
    found = ((m, path) for path in run.glob(".*") if (m := _SCRATCH.fullmatch(path.name)))
    return [path for match, path in found if int(match[1]) < before]
