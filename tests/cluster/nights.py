"""A folder of nights, submitted to a real Slurm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cluster_job import NO_SITE, SUBMIT, ClusterJob, Submitted
from lab import Lab
from micro_job import write_recipe

NIGHTLY = SUBMIT.with_name("nightly.py")
TRUNK = ("architecture.n_layers=3",)
STEPS = 40
MATRIX = """
config: {folder}/critic.yaml
time: "0:05:00"
deadline_hours: {hours}
override:
  - model.path={{night}}/trunk
  - model.recipe={folder}/pretrain.yaml
  - data.cache_dir={folder}/cache
  - training.max_steps={steps}
  - evaluation.every_steps=20
  - logging.every_steps=5
  - checkpoint.every_steps=10
  - checkpoint.keep_last=9
entries: {entries}
"""


@dataclass(frozen=True)
class Site:
    """A folder of nights in the lab."""

    job: ClusterJob
    folder: Path

    @classmethod
    def prepare(cls, lab: Lab, folder: Path) -> Site:
        job = ClusterJob.prepare(lab, folder)
        # jobs run in the checkout, where nothing is to be left
        write_recipe(job.folder / "pretrain.yaml", [*TRUNK, f"data.cache_dir={folder}/cache"])
        return cls(job, folder)

    def matrix(self, hours: float = 1.0, steps: int = STEPS, **entries: dict[str, Any]) -> str:
        file = self.folder / "little.yaml"
        text = json.dumps(entries)
        file.write_text(
            MATRIX.format(folder=self.job.folder, hours=hours, steps=steps, entries=text)
        )
        return str(file)

    def options(self, matrix: str, **profile: Any) -> list[str]:
        nights = ["--folder", str(self.folder / "nights")]
        return ["--matrix", matrix, *nights, "--cluster", self.job.profile(**profile)]

    def run(
        self, *arguments: str, environment: Mapping[str, str] = MappingProxyType({})
    ) -> subprocess.CompletedProcess[str]:
        environment = os.environ | self.job.lab.environment | NO_SITE | dict(environment)
        words = [sys.executable, str(NIGHTLY), *arguments]
        return subprocess.run(
            words, cwd="/", env=environment, capture_output=True, text=True, timeout=300
        )

    @property
    def nights(self) -> list[Path]:
        return sorted((self.folder / "nights").glob("night-*"))

    def entry(self, name: str) -> Submitted:
        return Submitted(self.job.lab, self.nights[-1] / "runs" / name)

    def wait_for_record(self, seconds: float = 240) -> dict[str, Any]:
        file = self.nights[-1] / "record.json"
        self.job.lab.wait_until(file.exists, f"{file}\n{self.logs()}", seconds)
        return dict(json.loads(file.read_text()))

    def logs(self) -> str:
        found = [*self.nights[-1].glob("slurm/*/*_log.out")] if self.nights else []
        return "\n".join(f"--- {one}\n{one.read_text()[-1500:]}" for one in found)
