"""What becomes of a job is decided by the first cause of its end, and by what is left to try."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from job.common.errors import Exit
from slurm.policy import Action, Budget, decide, exit_status, first_cause
from slurm.record import Outcome

PLENTY = Budget(fruitless=1, max_attempts=10)
KILL, TERM, USR1, USR2, SEGV = -9, -15, -10, -12, -11


def _outcome(rank: int, code: int, time: float = 0.0) -> Outcome:
    return Outcome(rank, f"node{rank}", code, time, f"its code is {code}", ["last line"])


def _outcomes(codes: Sequence[int | None]) -> list[Outcome]:
    """One outcome a rank, in the order of time; None for a rank that is missing."""
    return [_outcome(rank, code, rank) for rank, code in enumerate(codes) if code is not None]


# The table


@pytest.mark.parametrize(
    ("code", "action", "exit_code"),
    [
        (Exit.SUPERSEDED, Action.LEAVE, 73),
        (Exit.BAD_INPUT, Action.STOP, 78),
        (Exit.UNFIT_NODE, Action.REQUEUE, 71),
        (Exit.IO_FAILED, Action.REQUEUE, 74),
        (Exit.STOPPED, Action.REQUEUE, 75),
        (KILL, Action.REQUEUE, 137),
        (TERM, Action.REQUEUE, 143),
        (SEGV, Action.REQUEUE, 139),
        (Exit.CRASHED, Action.REQUEUE, 1),
        (Exit.UNAVAILABLE, Action.REQUEUE, 69),
        (137, Action.REQUEUE, 137),
    ],
)
def test_what_becomes_of_the_job(code: int, action: Action, exit_code: int) -> None:
    verdict = decide(_outcome(3, code), PLENTY)
    assert (verdict.action, verdict.code) == (action, exit_code)


def test_without_a_cause_the_job_has_finished() -> None:
    verdict = decide(None, Budget(99, 1))
    assert (verdict.action, verdict.code, verdict.reason) == (Action.FINISH, 0, "finished")


def test_the_reason_says_who_and_where() -> None:
    assert decide(_outcome(3, 1), PLENTY).reason == "rank 3 on node3: its code is 1"
    assert decide(_outcome(3, 78), PLENTY).reason == "rank 3 on node3: its code is 78"


def test_only_an_unfit_node_is_avoided() -> None:
    assert decide(_outcome(3, Exit.UNFIT_NODE), PLENTY).avoid_node == "node3"
    for code in (0, 1, 73, 75, 78, KILL):
        assert decide(_outcome(3, code), PLENTY).avoid_node is None


def test_a_stop_that_a_person_asked_for_is_final() -> None:
    verdict = decide(_outcome(0, Exit.STOPPED), PLENTY, by_a_person=True)
    assert (verdict.action, verdict.code) == (Action.STOP, Exit.STOPPED)
    assert verdict.reason == "its code is 75"  # no rank's fault
    for code in (1, KILL, Exit.UNFIT_NODE):
        assert decide(_outcome(0, code), PLENTY, by_a_person=True).action is Action.REQUEUE


# Budgets


def test_who_waits_for_a_disk_waits_twice_as_long_each_time_up_to_an_hour() -> None:
    waits = [
        decide(_outcome(0, Exit.IO_FAILED), Budget(n, 99)).wait_seconds for n in (0, 1, 2, 3, 7, 50)
    ]
    assert waits == [60, 60, 120, 240, 3600, 3600]
    for code in (1, KILL, Exit.UNFIT_NODE, Exit.STOPPED):
        assert decide(_outcome(0, code), PLENTY).wait_seconds == 0


@pytest.mark.parametrize("code", [Exit.UNFIT_NODE, Exit.IO_FAILED, Exit.STOPPED, KILL, 1])
def test_the_last_attempt_without_progress_is_the_last(code: int) -> None:
    assert decide(_outcome(0, code), Budget(2, 3)).action is Action.REQUEUE
    for fruitless in (3, 4):
        verdict = decide(_outcome(0, code), Budget(fruitless, 3))
        assert (verdict.action, verdict.code) == (Action.STOP, exit_status(code))
        assert verdict.reason == (
            f"{fruitless} attempts in a row without progress; the last: "
            f"rank 0 on node0: its code is {code}"
        )
        assert verdict.avoid_node is None


def test_a_newer_attempt_or_wrong_input_is_said_even_without_a_budget() -> None:
    assert decide(_outcome(0, Exit.SUPERSEDED), Budget(3, 3)).action is Action.LEAVE
    assert "without progress" not in decide(_outcome(0, Exit.BAD_INPUT), Budget(3, 3)).reason


# The first cause


@pytest.mark.parametrize(
    ("codes", "cause"),
    [
        pytest.param([1, KILL, 1], 1, id="killed, though its peers failed before"),
        pytest.param([KILL, KILL], 0, id="of two that were killed, the earlier"),
        pytest.param([1, 78], 1, id="wrong input before a crash"),
        pytest.param([KILL, 78], 1, id="wrong input before a kill"),
        pytest.param([78, 71], 0, id="wrong input before an unfit node"),
        pytest.param([1, 71, KILL], 1, id="an unfit node before what it has caused"),
        pytest.param([78, 1, 73], 2, id="superseded before all"),
        pytest.param([73, 73], 0, id="all superseded"),
        pytest.param([75, 75], 0, id="all stopped"),
        pytest.param([75, 1], 1, id="a crash before a stop"),
        pytest.param([75, TERM], 1, id="a signal before a stop"),
        pytest.param([TERM, USR1, USR2, 1], 3, id="a crash before stop signals"),
        pytest.param([TERM, SEGV], 1, id="a crash by a signal before stop signals"),
        pytest.param([0, 1, 0], 1, id="one failed and the others finished"),
        pytest.param([0, 75], 1, id="one stopped and the others finished"),
        pytest.param([1, 1], 0, id="of two crashes, the earlier"),
    ],
)
def test_the_cause_among_ranks_that_ended_differently(codes: list[int], cause: int) -> None:
    outcomes = _outcomes(codes)
    assert first_cause(outcomes, len(codes)) == outcomes[cause]
    assert first_cause(outcomes[::-1], len(codes)) == outcomes[cause]


def test_the_earlier_of_two_crashes_is_found_by_time_and_not_by_rank() -> None:
    outcomes = [_outcome(0, 1, time=5.0), _outcome(1, 2, time=4.0)]
    assert first_cause(outcomes, 2) == outcomes[1]


def test_when_all_have_finished_there_is_no_cause() -> None:
    assert first_cause(_outcomes([0, 0, 0]), 3) is None


def test_a_rank_that_is_missing_while_others_finished_changes_nothing() -> None:
    assert first_cause(_outcomes([0, None, 0]), 3) is None


@pytest.mark.parametrize("codes", [[75, None, 75], [TERM, None, TERM], [0, None, 75]])
def test_a_rank_that_is_missing_comes_before_stops(codes: list[int | None]) -> None:
    cause = first_cause(_outcomes(codes), 3)
    assert cause is not None
    assert (cause.rank, cause.code) == (1, Exit.CRASHED)
    assert "its node or task died" in cause.reason
    assert decide(cause, PLENTY).action is Action.REQUEUE


@pytest.mark.parametrize(("codes", "cause"), [([None, KILL], 1), ([None, 78], 1), ([73, None], 0)])
def test_a_rank_that_is_missing_explains_nothing_better_known(
    codes: list[int | None], cause: int
) -> None:
    found = first_cause(_outcomes(codes), 2)
    assert found is not None
    assert found.rank == cause
    assert found.reason.startswith("its code")


def test_when_nobody_reports_the_first_rank_is_missing() -> None:
    cause = first_cause([], 4)
    assert cause is not None
    assert (cause.rank, cause.code) == (0, Exit.CRASHED)


@pytest.mark.parametrize(
    ("code", "status"), [(0, 0), (1, 1), (75, 75), (KILL, 137), (TERM, 143), (USR2, 140)]
)
def test_an_exit_status_is_that_of_a_shell(code: int, status: int) -> None:
    assert exit_status(code) == status
