"""What becomes of a job whose trainers have ended: one table.

| the trainer's end                        | code  | the job                                 |
|------------------------------------------|-------|-----------------------------------------|
| finished                                 | 0     | finished                                |
| superseded by a newer attempt            | 73    | leaves, touching nothing                |
| wrong input, or numerics beyond repair   | 78    | stops for good                          |
| this node is unfit                       | 71    | is requeued, without this node          |
| input or output failed                   | 74    | is requeued, and waits                  |
| stopped on request, checkpoint committed | 75    | is requeued, or stops if a person asked |
| killed by a signal                       | 128+n | is requeued                             |
| anything else: a crash                   | other | is requeued from its last checkpoint    |

It is requeued as often as attempts make progress, which is a newer checkpoint; after `max_attempts`
in a row without any, it stops for good. Whether the job was cancelled meanwhile, Slurm knows.
"""

from __future__ import annotations

import enum
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from job.common.errors import Exit
from slurm.record import Outcome


class Action(enum.Enum):
    FINISH = "finish"
    LEAVE = "leave"
    STOP = "stop"
    REQUEUE = "requeue"


@dataclass(frozen=True)
class Decision:
    """What the job does next, and why; `code` is its exit code if it ends."""

    action: Action
    reason: str
    code: int = 0
    avoid_node: str | None = None
    wait_seconds: int = 0  # before it runs again


@dataclass(frozen=True)
class Budget:
    """Attempts in a row without progress, this one included, and how many are given."""

    fruitless: int
    max_attempts: int


_BEFORE_OTHERS = (
    Exit.SUPERSEDED,
    Exit.BAD_INPUT,
    Exit.UNFIT_NODE,
    128 + signal.SIGKILL,
    Exit.IO_FAILED,  # who cannot write does not report
)
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 60, 3600  # for a disk; twice as long each time
_NOWHERE = "an unknown node"


def first_cause(outcomes: Sequence[Outcome], size: int) -> Outcome | None:
    """The outcome that explains the others; None if all ranks have finished.

    A rank that was killed comes before those that failed because it was gone, and a failure
    before a stop that the others were asked for.
    """
    missing = sorted(set(range(size)) - {outcome.rank for outcome in outcomes})
    ended = [outcome for outcome in outcomes if outcome.code != Exit.FINISHED]
    if missing and (ended or not outcomes):
        ended.append(_silent(missing[0]))
    return min(ended, key=lambda outcome: (_order(outcome), outcome.time), default=None)


def _silent(rank: int) -> Outcome:
    return Outcome(
        rank, _NOWHERE, Exit.CRASHED, 0.0, "it did not report: its node or task died", []
    )


def _order(outcome: Outcome) -> int:
    status = exit_status(outcome.code)
    if status in _BEFORE_OTHERS:
        return _BEFORE_OTHERS.index(status)
    if status == Exit.STOPPED:
        return 8
    if status - 128 in (signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1):
        return 7
    return 5 if outcome.node == _NOWHERE else 6


def decide(cause: Outcome | None, budget: Budget, *, by_a_person: bool = False) -> Decision:
    """What the table says; `by_a_person` tells that someone asked this run to stop."""
    if cause is None:
        return Decision(Action.FINISH, "finished")
    code = exit_status(cause.code)
    reason = f"rank {cause.rank} on {cause.node}: {cause.reason}"
    if code == Exit.SUPERSEDED:
        return Decision(Action.LEAVE, "a newer attempt has taken over", code)
    if code == Exit.BAD_INPUT:
        return Decision(Action.STOP, reason, code)
    if code == Exit.STOPPED and by_a_person:
        return Decision(Action.STOP, cause.reason, code)
    if budget.fruitless >= budget.max_attempts:
        tried = f"{budget.fruitless} attempts in a row without progress; the last: "
        return Decision(Action.STOP, tried + reason, code)
    avoid = cause.node if code == Exit.UNFIT_NODE else None
    wait = _wait_seconds(budget.fruitless) if code == Exit.IO_FAILED else 0
    return Decision(Action.REQUEUE, reason, code, avoid, wait)


def _wait_seconds(fruitless: int) -> int:
    return min(_FIRST_WAIT_SECONDS << max(0, fruitless - 1), _LONGEST_WAIT_SECONDS)


def exit_status(code: int) -> int:
    """A return code as a shell gives it."""
    return 128 - code if code < 0 else code
