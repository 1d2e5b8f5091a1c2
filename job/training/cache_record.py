"""What a run has settled about the states that it keeps, for all its attempts."""

from __future__ import annotations

from dataclasses import dataclass, field

from job.common.state_files import read_json
from job.data.state_shards import Shards
from job.run.directory import RunDirectory

RECORD = "prefix_cache.json"


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
    def read(cls, run: RunDirectory) -> Record | None:
        found = read_json(run.file(RECORD), dict)
        try:
            return None if found is None else cls(**found)
        except TypeError:  # of another version
            return None

    def take_in(self, shards: Shards) -> None:
        """Let shards have what the run sees: what was given, and all of its own so far."""
        shards.refresh(f"{self.name}-", self.given)
