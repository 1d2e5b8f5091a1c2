"""Who a process is among the job's processes, and who is named when one of them fails."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from job.common.errors import Exit, InputError, Stopped, UnfitNode
from job.common.schema import DistributedConfig
from job.distributed import failure as lifeline
from job.distributed import rendezvous
from job.distributed.failure import Caller, Failure, Lifeline, Listener
from job.distributed.world import World, joined_world

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
# A batch script's own shell: the job has tasks, but it is none of them.
BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
LAUNCHERS = ("MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_JOB_NODELIST")
GRACE = 0.3  # seconds in which a test's failures count as one


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Sets variables, where none of any launcher are left."""
    for name in (*TORCHRUN, *SRUN, *LAUNCHERS, "SLURM_STEP_NODELIST", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)

    def put(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


Environment = Callable[[dict[str, str]], None]


# Ranks


@pytest.mark.parametrize("variables", [TORCHRUN, SRUN])
def test_ranks_come_from_the_launcher(environment: Environment, variables: dict[str, str]) -> None:
    environment(variables)
    assert rendezvous.ranks() == (5, 8, 1, 4)


def test_torchrun_inside_a_slurm_job_counts(environment: Environment) -> None:
    environment(TORCHRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"})
    assert rendezvous.ranks() == (5, 8, 1, 4)


@pytest.mark.parametrize("variables", [{}, BATCH, SRUN | {"SLURM_STEP_NUM_TASKS": "1"}])
def test_a_process_without_others_is_alone(
    environment: Environment, variables: dict[str, str]
) -> None:
    environment(variables)
    assert rendezvous.ranks() == (0, 1, 0, 1)


def test_ranks_of_one_node_need_no_count_of_their_own(environment: Environment) -> None:
    environment({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"})
    assert rendezvous.ranks() == (1, 2, 1, 2)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (TORCHRUN | {"RANK": "8"}, "RANK=8 .*WORLD_SIZE=8"),
        (TORCHRUN | {"RANK": "one"}, "RANK=one"),
        (TORCHRUN | {"RANK": "-1"}, "RANK=-1"),
        (TORCHRUN | {"WORLD_SIZE": ""}, "WORLD_SIZE="),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3.* 8 ranks"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0"),
        (TORCHRUN | {"LOCAL_RANK": "x"}, "LOCAL_RANK=x"),
        (SRUN | {"SLURM_PROCID": "9"}, "SLURM_PROCID=9 .*SLURM_STEP_NUM_TASKS=8"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "8.0"}, r"SLURM_STEP_NUM_TASKS=8\.0"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3(x2),2"}, r"SLURM_STEP_TASKS_PER_NODE=3\(x2\),2"),
    ],
)
def test_contradictions_are_named_with_variable_and_value(
    environment: Environment, variables: dict[str, str], message: str
) -> None:
    environment(variables)
    with pytest.raises(InputError, match=message):
        rendezvous.ranks()


# The address of rank 0


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("a,b", "a"),
        ("node[03-05,7]", "node03"),
        ("node[7,03-05]", "node7"),
        ("cn-a[10-11],cn-b2", "cn-a10"),
        ("10.0.0.7", "10.0.0.7"),
        ("rack1-node[001-100]", "rack1-node001"),
    ],
)
def test_the_first_host_of_a_node_list(environment: Environment, nodes: str, first: str) -> None:
    environment({"SLURM_JOB_NODELIST": nodes})
    assert rendezvous._first_host() == first


def test_the_step_s_nodes_come_before_the_job_s(environment: Environment) -> None:
    environment({"SLURM_JOB_NODELIST": "a,b", "SLURM_STEP_NODELIST": "b"})
    assert rendezvous.address()[0] == "b"


def test_a_given_address_comes_before_slurm_s(environment: Environment) -> None:
    environment({"SLURM_JOB_NODELIST": "a", "MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "4711"})
    assert rendezvous.address() == ("10.1.2.3", 4711)


def test_two_jobs_of_one_node_meet_at_different_ports(environment: Environment) -> None:
    ports = []
    for job in ("1234567", "1234568"):
        environment({"MASTER_ADDR": "a", "SLURM_JOB_ID": job})
        ports.append(rendezvous.address()[1])
    assert ports == [34567, 34568]


def test_two_steps_of_one_job_meet_at_different_ports(environment: Environment) -> None:
    ports = []
    for step in ("0", "1"):
        environment({"MASTER_ADDR": "a", "SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": step})
        ports.append(rendezvous.address()[1])
    assert ports == [34567, 22486]


@pytest.mark.parametrize(
    ("variables", "message"),
    [({}, "MASTER_ADDR"), ({"MASTER_ADDR": "a", "MASTER_PORT": "ssh"}, "MASTER_PORT=ssh")],
)
def test_an_address_that_is_missing_or_wrong_is_named(
    environment: Environment, variables: dict[str, str], message: str
) -> None:
    environment(variables)
    with pytest.raises(InputError, match=message):
        rendezvous.address()


# A world of one


def test_a_lone_process_does_everything_itself() -> None:
    alone = World()
    assert alone.is_main
    assert alone.sum([1, 2.5, True]) == [1.0, 2.5, 1.0]
    assert alone.gather("item") == ["item"]
    calls: list[str] = []
    assert alone.main_decides(lambda: "decided") == "decided"
    alone.main_first(lambda: calls.append("work"))
    assert calls == ["work"]  # once


def test_a_lone_process_gets_errors_as_they_are() -> None:
    def fail() -> None:
        raise InputError("wrong")

    for share in (World().main_decides, World().main_first):
        with pytest.raises(InputError, match="wrong"):
            share(fail)


def test_a_lone_process_has_a_group_only_while_it_has_joined(environment: Environment) -> None:
    with joined_world(DistributedConfig()) as alone:
        assert (alone.rank, alone.size, alone.lifeline) == (0, 1, None)
        assert dist.is_initialized()
        (total,) = alone.sum([2.0])
        assert total == 2.0
    assert not dist.is_initialized()


# Failures


@pytest.mark.parametrize(
    ("error", "code", "consequence"),
    [
        (InputError("wrong"), Exit.BAD_INPUT, False),
        (UnfitNode("no GPU"), Exit.UNFIT_NODE, False),
        (Stopped("on request"), Exit.STOPPED, False),
        (RuntimeError("shapes differ"), Exit.CRASHED, False),
        (KeyboardInterrupt(), Exit.CRASHED, False),
        (torch.OutOfMemoryError("CUDA out of memory"), Exit.CRASHED, False),
        (ValueError("NCCL is no backend here"), Exit.CRASHED, False),
        (RuntimeError("[.../gloo/transport/tcp/pair.cc:553] Connection"), Exit.CRASHED, True),
        (RuntimeError("Connection closed by peer [127.0.0.1]:4711"), Exit.CRASHED, True),
        (dist.DistBackendError("NCCL communicator was aborted"), Exit.CRASHED, True),
    ],
)
def test_failures_tell_causes_from_consequences(
    error: BaseException, code: int, consequence: bool
) -> None:
    failure = Failure.of(3, error)
    assert (failure.rank, failure.code, failure.consequence) == (3, code, consequence)


def test_a_failure_is_one_line_that_names_rank_kind_and_text() -> None:
    failure = Failure.of(1, RuntimeError("boom\nframe #0: somewhere"))
    assert str(failure) == "rank 1 failed first: RuntimeError: boom"


def test_exit_codes_are_those_that_the_supervisor_reads() -> None:
    codes = {code.name: int(code) for code in Exit}
    assert codes == {
        "FINISHED": 0,
        "CRASHED": 1,
        "UNAVAILABLE": 69,
        "UNFIT_NODE": 71,
        "SUPERSEDED": 73,
        "IO_FAILED": 74,
        "STOPPED": 75,
        "BAD_INPUT": 78,
    }


# Who is named


@dataclass
class Rank:
    """One end of the connections, and what it would have left with."""

    end: Lifeline
    told: list[str] = field(default_factory=list)


@dataclass
class Party:
    """All ranks of a job in one process; what leaves it is only noted."""

    ranks: list[Rank]
    codes: list[int]  # of all that have left

    def fail(self, rank: int, error: BaseException) -> threading.Thread:
        """Let a rank fail; ends when it knows who was first."""
        thread = threading.Thread(target=self.ranks[rank].end.fail, args=(error,))
        thread.start()
        return thread

    def cut(self, rank: int) -> None:
        """Close a rank's connections, as the kernel does when a process dies."""
        end = self.ranks[rank].end
        connections = end._peers if isinstance(end, Listener) else [end._socket]
        for connection in connections:
            connection.shutdown(socket.SHUT_WR)  # its own threads, which would die, see nothing

    def leaves(self, count: int, seconds: float = 10.0) -> list[int]:
        """Exit codes, once `count` ranks have left."""
        limit = time.monotonic() + seconds
        while len(self.codes) < count and time.monotonic() < limit:
            time.sleep(0.01)
        return list(self.codes)


@contextmanager
def _party(size: int, codes: list[int]) -> Iterator[Party]:
    listener = Listener("127.0.0.1", size)
    callers = [Caller(rank, "127.0.0.1", listener.port, 10.0) for rank in range(1, size)]
    listener.connect(10.0)
    party = Party([Rank(listener), *map(Rank, callers)], codes)
    for rank in party.ranks:
        rank.end.on_failure = rank.told.append
    try:
        yield party
    finally:
        for rank in party.ranks:
            rank.end.close()
        for connection in [*listener._peers, *(caller._socket for caller in callers)]:
            connection.close()


@pytest.fixture
def party(monkeypatch: pytest.MonkeyPatch) -> Iterator[Party]:
    """Three ranks."""
    codes: list[int] = []
    monkeypatch.setattr(lifeline, "os", SimpleNamespace(_exit=codes.append))
    monkeypatch.setattr(lifeline, "GRACE_SECONDS", GRACE)
    monkeypatch.setattr(logging, "shutdown", lambda: None)
    with _party(3, codes) as joined:
        yield joined


def test_all_others_leave_with_the_code_of_the_first(party: Party) -> None:
    party.fail(2, InputError("rows.jsonl: empty")).join(10.0)
    assert party.leaves(2) == [Exit.BAD_INPUT] * 2
    named = ["rank 2 failed first: InputError: rows.jsonl: empty"]
    assert [rank.told for rank in party.ranks] == [named, named, []]


def test_the_cause_wins_over_consequences_that_come_earlier(party: Party) -> None:
    broken = RuntimeError("gloo: Connection closed by peer")
    threads = [party.fail(0, broken), party.fail(1, broken)]
    time.sleep(GRACE / 3)
    threads.append(party.fail(2, ValueError("bad day")))
    for thread in threads:
        thread.join(10.0)
    assert party.leaves(2) == [Exit.CRASHED] * 2
    named = ["rank 2 failed first: ValueError: bad day"]
    assert [rank.told for rank in party.ranks] == [named, named, []]


def test_of_two_causes_the_earlier_wins(party: Party) -> None:
    threads = [party.fail(1, InputError("early"))]
    time.sleep(GRACE / 3)
    threads.append(party.fail(0, ValueError("late")))
    for thread in threads:
        thread.join(10.0)
    assert party.leaves(2) == [Exit.BAD_INPUT] * 2
    assert [rank.told for rank in party.ranks] == [
        ["rank 1 failed first: InputError: early"],
        [],
        ["rank 1 failed first: InputError: early"],
    ]


def test_consequences_alone_name_the_first_of_them(party: Party) -> None:
    party.fail(1, RuntimeError("gloo: timed out")).join(10.0)
    assert party.leaves(2) == [Exit.CRASHED] * 2
    assert party.ranks[0].told == ["rank 1 failed first: RuntimeError: gloo: timed out"]


def test_rank_0_s_own_failure_is_named_by_the_others(party: Party) -> None:
    party.fail(0, UnfitNode("no GPU here")).join(10.0)
    assert party.leaves(2) == [Exit.UNFIT_NODE] * 2
    named = ["rank 0 failed first: UnfitNode: no GPU here"]
    assert [rank.told for rank in party.ranks] == [[], named, named]


def test_a_closed_connection_is_a_death(party: Party) -> None:
    party.cut(1)
    assert party.leaves(2) == [Exit.CRASHED] * 2
    named = ["rank 1 failed first: it died without a word"]
    assert [party.ranks[rank].told for rank in (0, 2)] == [named, named]


def test_a_death_wins_over_its_consequences(party: Party) -> None:
    thread = party.fail(0, RuntimeError("gloo: Connection reset by peer"))
    party.cut(1)
    thread.join(10.0)
    assert party.leaves(2) == [Exit.CRASHED] * 2
    named = ["rank 1 failed first: it died without a word"]
    assert [party.ranks[rank].told for rank in (0, 2)] == [named, named]


def test_rank_0_s_death_is_named_by_each_of_the_others(party: Party) -> None:
    party.cut(0)
    assert party.leaves(2) == [Exit.CRASHED] * 2
    named = ["rank 0 failed first: it died without a word"]
    assert [party.ranks[rank].told for rank in (1, 2)] == [named, named]


@pytest.mark.slow
def test_an_orderly_goodbye_ends_nobody(party: Party) -> None:
    for rank in (1, 2):
        party.ranks[rank].end.close()
        party.cut(rank)
    assert party.leaves(1, 3 * GRACE) == []
    assert [rank.told for rank in party.ranks] == [[], [], []]


@pytest.mark.slow
def test_rank_0_s_goodbye_ends_nobody(party: Party) -> None:
    party.ranks[0].end.close()
    party.cut(0)
    party.cut(1)
    assert party.leaves(1, 3 * GRACE) == []
