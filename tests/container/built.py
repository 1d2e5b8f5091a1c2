"""The image and what was written about it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Built:
    """What containers/build.sh has left."""

    sif: Path

    @property
    def facts(self) -> dict[str, Any]:
        return dict(json.loads(Path(f"{self.sif}.json").read_text()))

    @property
    def contents(self) -> dict[str, Any]:
        return dict(json.loads(Path(f"{self.sif}.cdx.json").read_text()))
