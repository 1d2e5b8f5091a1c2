"""Small critics, trained once for all tests of what becomes of a critic after its training."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from micro_job import MicroRun, write_job

from job.common.config import load_config
from job.common.schema import CriticConfig
from job.training.pretraining import ensure_trunk
from job.training.trainer import train

SETTINGS = (
    "training.max_steps=6",
    "training.batch_size=16",
    "training.micro_batch_tokens=512",
    "training.learning_rate=0.01",
    "evaluation.every_steps=3",
    "checkpoint.every_steps=3",
)


@dataclass(frozen=True)
class MicroCritics:
    """Finished runs on one small trunk, in a folder that tests must leave as it is."""

    folder: Path

    @classmethod
    def prepare(cls, folder: Path, *trunk: str) -> MicroCritics:
        here = (f"data.cache_dir={folder}/cache",)
        write_job(
            folder,
            (
                *SETTINGS,
                *here,
                f"run.dir={folder}/runs/${{run.name}}",
                f"model.path={folder}/trunk",
                f"model.recipe={folder}/pretrain.yaml",
            ),
            (*here, *trunk),
        )
        return cls(folder)

    @functools.cache  # noqa: B019 - as long as the tests
    def run(self, name: str, *settings: str) -> MicroRun:
        """The run of that name, trained when first asked for."""
        train(
            load_config(CriticConfig, self.folder / "critic.yaml", (f"run.name={name}", *settings))
        )
        return MicroRun(self.folder / "runs" / name)

    @property
    def trunk(self) -> Path:
        """The folder of the trunk, which is made when first asked for."""
        ensure_trunk(self.folder / "trunk", str(self.folder / "pretrain.yaml"))
        return self.folder / "trunk"


def write_rows(file: Path, rows: Iterable[Mapping[str, Any] | str]) -> Path:
    """Write JSON lines; text stands as it is."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    file.write_text("".join(f"{line}\n" for line in lines))
    return file
