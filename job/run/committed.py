"""Which checkpoints of a run count: those that no later attempt has passed over. Free of torch."""

from __future__ import annotations

from pathlib import Path

from job.common.schema import CheckpointConfig
from job.run.fence import Fence
from job.run.manifest import DamagedError, Manifest
from job.run.names import checkpoint_steps


def committed(run: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first, without those that came too late."""
    fence = Fence(run / "attempts", 0)
    return [folder for folder in folders(run / "checkpoints") if _is_in_time(folder, fence)]


def still_to_come(run: Path, config: CheckpointConfig, steps: int) -> int:
    """How many checkpoints a training of so many steps puts beside those of its run, at most.

    One is written before any is removed.
    """
    return max(1, config.at_once(steps) - len(folders(run / "checkpoints")))


def folders(checkpoints: Path) -> list[Path]:
    """All that were committed, in time or not, oldest first."""
    return list(checkpoint_steps(checkpoints).values())


def _is_in_time(folder: Path, fence: Fence) -> bool:
    try:
        manifest = Manifest.read(folder)
    except DamagedError:
        return True  # reading it will tell
    return fence.includes(manifest.attempt, manifest.step)
