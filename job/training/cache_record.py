"""What a run has settled about the states that it keeps, for all its attempts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from job.common.state_files import name_unreadable, read_json
from job.data.state_shards import Shards
from job.run.directory import RunDirectory

RECORD = "prefix_cache.json"
_NAME = re.compile("[0-9a-f]{12}")  # files are removed by it


@dataclass
class Record:
    """What a run has settled about its cache, for all its attempts.

    Attributes:
        name: what the names of its shards begin with.
        given: the names of the shards that were there when it began.
        block: the boundary; see `Boundary`.
        validation, training: whether states are kept; None where that is still to be decided.
        earlier: a boundary before it at which all states were there when it began; None if none.
        earlier_given: the names of their shards.
        mode: of `training.prefix_cache`, by which this was settled.
    """

    name: str
    given: list[str]
    block: int
    validation: bool | None
    training: bool | None
    earlier: int | None = None
    earlier_given: list[str] = field(default_factory=list)
    mode: str = ""

    @classmethod
    def read(cls, run: RunDirectory, deepest: int) -> Record | None:
        """A run's record; None if there is none, or what it says cannot be.

        Args:
            deepest: boundary that the run can have.
        """
        file = run.file(RECORD)
        if (found := read_json(file, dict)) is None:
            return None
        try:
            if wrong := [key for key, fits in _fits(found, deepest).items() if not fits]:
                raise ValueError(f"{', '.join(wrong)}: no possible value")
            return cls(**found)
        except (TypeError, ValueError) as error:  # damaged, or of another version
            name_unreadable(file, error)
            return None

    def take_in(self, shards: Shards) -> None:
        """Let shards have what the run sees: what was given, and all of its own so far."""
        shards.refresh(f"{self.name}-", self.given)


def _fits(found: dict[str, Any], deepest: int) -> dict[str, bool]:
    """Whether a record may say what it says; of what it lacks, the default may."""
    block: Any = found.get("block")
    earlier = found.get("earlier")
    return {
        "name": isinstance(name := found.get("name"), str) and bool(_NAME.fullmatch(name)),
        "given": _are_names(found.get("given")),
        "block": _lies_in(block, deepest),
        "validation": isinstance(found.get("validation"), bool | None),
        "training": isinstance(found.get("training"), bool | None),
        "earlier": earlier is None or (_lies_in(block, deepest) and _lies_in(earlier, block - 1)),
        "earlier_given": _are_names(found.get("earlier_given", [])),
        "mode": isinstance(found.get("mode", ""), str),
    }


def _lies_in(block: Any, deepest: int) -> bool:
    return type(block) is int and 0 < block <= deepest


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
