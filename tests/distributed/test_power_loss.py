"""A run on a file system that loses power again and again goes on from what it had committed.

The file systems are images of their own, mounted by loop. Power is lost by the ioctl that XFS and
ext4 have for such tests: whatever is not on the disk by then is gone.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from launch import MicroJob
from micro_job import MicroRun

pytestmark = [pytest.mark.slow, pytest.mark.all]

LOSSES = 20
STEPS = 600
FURTHEST = 25  # steps between the start of an attempt and its end
SETTINGS = (
    f"training.max_steps={STEPS}",
    "checkpoint.every_steps=3",
    "logging.every_steps=5",
    "evaluation.every_steps=50",
)
PATIENCE = 1800  # seconds, for a machine that is busy with other tests
_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32), of both
_WITHOUT_LOG = (2).to_bytes(4, "little")  # what is in memory of the journal is lost too


@dataclass(frozen=True)
class Disk:
    """An image of a file system and where it is mounted."""

    image: Path
    folder: Path

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", self.image, self.folder], check=True)

    def lose_power(self) -> None:
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, _WITHOUT_LOG)
        finally:
            os.close(descriptor)

    def come_back(self) -> None:
        """Mount what is on the disk, as a disk of its own.

        A container that began meanwhile may hold the lost mount, and the file system with it.
        """
        subprocess.run(["umount", "-l", self.folder], check=True)
        left = self.image.with_suffix(".left")
        subprocess.run(["cp", "--sparse=always", self.image, left], check=True)
        left.replace(self.image)
        self.mount()


@pytest.fixture(params=["xfs", "ext4"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    make = shutil.which(f"mkfs.{request.param}")
    if make is None:
        pytest.skip(f"no mkfs.{request.param} here: apt-get install xfsprogs e2fsprogs")
    found = Disk(tmp_path / "image", tmp_path / "disk")
    found.folder.mkdir()
    with found.image.open("wb") as stream:
        stream.truncate(400 << 20)
    subprocess.run([make, "-q", found.image], check=True)
    try:
        found.mount()
    except subprocess.CalledProcessError:
        pytest.skip(f"this kernel mounts no {request.param} by loop")
    yield found
    subprocess.run(["umount", "-l", found.folder], check=False)


def _settings(folder: Path) -> list[str]:
    """Everything that a training writes lies in this folder."""
    places = {"run.dir": "run", "data.cache_dir": "cache", "model.path": "trunk"}
    return [f"{key}={folder / name}" for key, name in places.items()]


def test_a_run_that_loses_power_twenty_times_needs_no_hand(disk: Disk, tmp_path: Path) -> None:
    job, draw = MicroJob.prepare(tmp_path, *SETTINGS), random.Random(7)
    run, noted = MicroRun(disk.folder / "run"), 0
    for _ in range(LOSSES):
        with job.start("run", *_settings(disk.folder), world=1) as ranks:
            if draw.random() < 0.75:  # else at any moment of the start
                known = len(run.attempts)
                ranks.wait_until(
                    lambda known=known: len(run.attempts) > known and run.attempts[-1],
                    "a checkpoint that is read",
                )
                resumed = run.attempts[-1]["resumed_step"]
                assert resumed >= noted
                end = resumed + draw.randint(1, FURTHEST)
                ranks.wait_until(lambda end=end: run.step >= end, f"step {end}")
            time.sleep(draw.uniform(0, 0.3))
            noted = max(noted, run.status.get("checkpoint", 0))
            disk.lose_power()
        disk.come_back()
    with job.start("run", *_settings(disk.folder), world=1) as ranks:
        assert ranks.wait(PATIENCE) == [0], ranks.log()
    assert noted > 0
    assert run.attempts[-1]["resumed_step"] >= noted
    (tmp_path / "whole").mkdir()
    with job.start("run", *_settings(tmp_path / "whole"), world=1) as ranks:
        assert ranks.wait(PATIENCE) == [0], ranks.log()
    run.assert_equals(MicroRun(tmp_path / "whole" / "run"))
