"""What Slurm's clients say is understood: of jobs in every state, of partitions, of refusals.

The lines are those of Slurm 22.05; tests/cluster asks a real one.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
from pathlib import Path

import pytest
from fake_slurm import STARTS, FakeSlurm, partition

from slurm import scheduler
from slurm.leader import deadline
from slurm.scheduler import ControllerAway, Job, Refused, outside_environment, parse_job

pytestmark = pytest.mark.slow

START = 1795396293
LINE = (
    "JobId=55399038 JobName={name} UserId=root(0) GroupId=root(0) MCS_label=N/A "
    "Priority=4294901752 Nice=0 Account=root QOS=normal JobState={state} Reason={reason} "
    "Dependency=(null) Requeue=1 Restarts={restarts} BatchFlag=1 Reboot=0 ExitCode=0:0 "
    "RunTime=00:00:02 TimeLimit={limit} TimeMin=N/A SubmitTime=1795396290 "
    "EligibleTime=1795396290 AccrueTime=1795396290 StartTime={start} EndTime={end} Deadline=N/A "
    "{preempt}SuspendTime=None SecsPreSuspend=0 LastSchedEval=1795396293 Scheduler=Main "
    "Partition=main AllocNode:Sid=localhost:20785 ReqNodeList=(null) ExcNodeList={avoided} "
    "NodeList={nodes} BatchHost=critic7 NumNodes=1 NumCPUs=1 NumTasks=1 CPUs/Task=1 "
    "ReqB:S:C:T=0:0:*:* TRES=cpu=1,mem=4G,node=1,billing=1,gres/gpu=1 Socks/Node=* "
    "NtasksPerN:B:S:C=1:0:*:* CoreSpec=* MinCPUsNode=1 MinMemoryNode=4G MinTmpDiskNode=0 "
    "Features=(null) DelayBoot=00:00:00 OverSubscribe=OK Contiguous=0 Licenses=(null) "
    "Network=(null) Command=/runs/critic/slurm/.submission_file_0139.sh WorkDir=/runs "
    "StdErr=/runs/critic/slurm/55399038_0_log.out StdIn=/dev/null "
    "StdOut=/runs/critic/slurm/55399038_0_log.out Power= KillOInInvalidDependent=Yes "
    "TresPerNode=gres:gpu:a100:1 \n"
)
DEFAULTS = {
    "name": "critic",
    "state": "RUNNING",
    "reason": "None",
    "restarts": 0,
    "limit": "1-00:00:00",
    "start": START,
    "end": START + 86400,
    "preempt": "",
    "avoided": "(null)",
    "nodes": "critic7",
}
UNKNOWN = "slurm_load_jobs error: Invalid job id specified\n"
AWAY = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"


def _line(**changes: object) -> str:
    return LINE.format(**DEFAULTS | changes)


def _job(**changes: object) -> Job:
    job = parse_job("7", _line(**changes))
    assert job is not None
    return job


# Jobs


def test_what_was_written_to_a_job_is_read_with_its_blanks_and_changes_nothing_else() -> None:
    text = "rank 0: No space left on device: '/runs/a b' JobState=FAILED Restarts=9"
    line = _line(state="PENDING", restarts=2).replace(" StdErr=", f" Comment={text} StdErr=")
    job = parse_job("7", line)
    assert job is not None
    assert (job.state, job.restarts, _job().comment) == ("PENDING", 2, "")
    assert job.comment.startswith("rank 0: No space left on device: '/runs/a b'")


def test_a_running_job() -> None:
    start, end = float(START), START + 86400.0
    assert _job() == Job("7", "RUNNING", False, "None", 0, start, end, "critic7")
    assert _job().active
    assert not _job().waits


def test_a_job_that_was_requeued_waits_for_its_time() -> None:
    job = _job(state="PENDING", reason="BeginTime", restarts=1, nodes="", end="Unknown")
    assert (job.state, job.reason, job.restarts, job.nodes) == ("PENDING", "BeginTime", 1, "")
    assert (job.start, job.end) == (START, None)
    assert job.waits
    assert job.active


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL"])
def test_a_job_that_has_ended_is_not_active(state: str) -> None:
    job = _job(state=state, end=START + 2)
    assert (job.state, job.completing, job.waits, job.active) == (state, False, False, False)


@pytest.mark.parametrize("state", ["CONFIGURING", "SUSPENDED"])
def test_a_job_that_holds_nodes_is_active(state: str) -> None:
    assert _job(state=state).active
    assert not _job(state=state).waits


@pytest.mark.parametrize(
    ("times", "state"),
    [
        pytest.param({"start": 1795396555, "end": 1795396557}, "CANCELLED", id="scancel"),
        pytest.param({"start": 1795396293, "end": 1795482693}, "PENDING", id="requeue"),
        pytest.param(
            {"start": 1795396395, "end": 1795396413, "preempt": "PreemptTime=1795396413 "},
            "PREEMPTED",
            id="preempted under PreemptMode=CANCEL",
        ),
        pytest.param(
            {"start": 1795396564, "end": 1795396569, "preempt": "PreemptTime=1795396565 "},
            "CANCELLED",
            id="scancel inside the grace time",
        ),
        pytest.param(
            {"start": 1795396573, "end": 1795396639, "limit": "00:01:00", "reason": "TimeLimit"},
            "TIMEOUT",
            id="time limit",
        ),
        pytest.param({"end": "Unknown", "limit": "UNLIMITED"}, "PENDING", id="requeue, no limit"),
        pytest.param({"end": START + 9, "limit": "UNLIMITED"}, "CANCELLED", id="scancel, no limit"),
        pytest.param({"start": "Unknown", "end": "Unknown"}, "PENDING", id="no times"),
    ],
)
def test_the_state_behind_completing(times: dict[str, object], state: str) -> None:
    job = _job(state="COMPLETING", **times)
    assert (job.state, job.completing) == (state, True)


def test_a_job_without_a_time_limit_has_no_end() -> None:
    assert _job(limit="UNLIMITED", end="Unknown").end is None


def test_a_save_budget_counts_from_the_jobs_real_end() -> None:
    # a limit of a day, of which an administrator has taken most; not what was asked for at first
    shortened = _job(restarts=3, end=START + 900)
    assert deadline(shortened, 120) == {"CRITIC_DEADLINE": str(START + 900 - 120)}
    assert deadline(_job(limit="UNLIMITED", end="Unknown"), 120) == {}
    assert deadline(None, 120) == {}


def test_an_element_of_an_array_is_known_by_the_name_it_was_asked_for() -> None:
    line = _line().replace("JobId=55399038", "JobId=55399040 ArrayJobId=55399038 ArrayTaskId=2")
    job = parse_job("55399038_2", line)
    assert job is not None
    assert (job.id, job.state) == ("55399038_2", "RUNNING")


def test_of_an_array_the_first_line_counts() -> None:
    job = parse_job("7", _line() + _line(state="PENDING"))
    assert job is not None
    assert job.state == "RUNNING"


def _element(tasks: str, **changes: object) -> str:
    of_array = f"JobId=7 ArrayJobId=55399038 ArrayTaskId={tasks}"
    return _line(**changes).replace("JobId=55399038", of_array)


def test_slurm_is_asked_once_for_all_elements_of_an_array(slurm: FakeSlurm) -> None:
    lines = _element("3,5-9:2%2", state="PENDING") + _element("1") + _element("2", state="FAILED")
    slurm.says("scontrol", lines)
    jobs = scheduler.show_jobs([f"55399038_{k}" for k in range(12)])
    waiting = {f"55399038_{k}": "PENDING" for k in (3, 5, 7, 9)}
    assert {name: job.state for name, job in jobs.items()} == waiting | {
        "55399038_1": "RUNNING",
        "55399038_2": "FAILED",
    }
    assert all(job.id == name for name, job in jobs.items())
    assert slurm.calls == ["scontrol show job -o 55399038"]


def test_jobs_that_are_no_array_are_asked_for_each(slurm: FakeSlurm) -> None:
    slurm.runs("scontrol", f'[ "$4" = 9 ] && {{ echo "{UNKNOWN}" >&2; exit 1; }}; echo "{_line()}"')
    assert scheduler.show_jobs(["8", "9", "8"]).keys() == {"8"}
    assert slurm.calls == ["scontrol show job -o 8", "scontrol show job -o 9"]
    assert scheduler.show_jobs([]) == {}


@pytest.mark.parametrize("name", ["a b", "a JobState=FAILED", "x=1 Reason=y Restarts=5", "="])
def test_a_job_may_have_any_name(name: str) -> None:
    assert _job(name=name) == _job()


@pytest.mark.parametrize("text", ["", "\n", "No jobs in the system\n"])
def test_where_no_job_is_described_there_is_none(text: str) -> None:
    assert parse_job("7", text) is None


# Clients


def test_a_job_is_asked_for_with_times_in_seconds(slurm: FakeSlurm) -> None:
    slurm.runs("scontrol", f'[ "$SLURM_TIME_FORMAT" = %s ] && printf "%s" "{_line()}"')
    assert scheduler.show_job("7") == _job()
    assert slurm.calls == ["scontrol show job -o 7"]


def test_a_name_in_another_encoding_does_not_matter(slurm: FakeSlurm) -> None:
    slurm.runs("scontrol", f"printf 'Comment=caf\\351 %s' '{_line()}'")
    assert scheduler.show_job("7") == _job()


def test_an_unknown_job_is_none(slurm: FakeSlurm) -> None:
    slurm.says("scontrol", stderr=UNKNOWN, code=1)
    assert scheduler.show_job("7") is None


@pytest.mark.parametrize("text", [AWAY, "slurm_load_jobs error: Access denied\n"])
def test_a_job_that_cannot_be_asked_for_is_not_taken_for_gone(slurm: FakeSlurm, text: str) -> None:
    slurm.says("scontrol", stderr=text, code=1)
    with pytest.raises(ControllerAway, match=text.strip()[-10:-1]):
        scheduler.show_job("7")


def test_a_missing_command_names_a_login_node(slurm: FakeSlurm) -> None:
    with pytest.raises(ControllerAway, match=r"scancel is not installed here: .* login node"):
        scheduler.cancel("7")


@pytest.mark.parametrize(
    "text",
    [
        AWAY,
        "scancel: error: Socket timed out on send/recv operation",
        "scancel: error: slurm_receive_msg: Zero Bytes were transmitted or received",
        "scancel: fatal: Could not establish a configuration source",
        "scancel: fatal: Unable to process configuration file",
        "slurm_kill_job error: Connection refused",
        "error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host",
        "error: _establish_config_source: failed to fetch config",
    ],
)
def test_a_controller_that_does_not_answer_is_away(slurm: FakeSlurm, text: str) -> None:
    slurm.says("scancel", stderr=text, code=1)
    with pytest.raises(ControllerAway, match=r"^scancel: "):
        scheduler.cancel("7")


def test_a_refusal_is_in_slurms_own_words(slurm: FakeSlurm) -> None:
    slurm.says("scancel", stderr="scancel: error: Kill job error on job id 7: Denied\n", code=1)
    with pytest.raises(Refused) as caught:
        scheduler.cancel("7")
    assert str(caught.value) == "Kill job error on job id 7: Denied"


def test_a_refusal_may_be_on_stdout(slurm: FakeSlurm) -> None:
    slurm.says("scontrol", "Partition nowhere not found", code=1)
    with pytest.raises(Refused, match="Partition nowhere not found"):
        scheduler.show_partition("nowhere")


def test_clients_run_as_if_outside_of_the_job(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SLURM_CONF", "mine")
    slurm.runs("scontrol", 'echo "$SLURM_JOB_ID,$SLURM_CONF"')
    assert scheduler.client("scontrol") == ",mine\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_to_the_whole_step_do_not_end_a_client(slurm: FakeSlurm, number: int) -> None:
    slurm.runs("scontrol", f"kill -{number:d} $$; echo done")
    assert scheduler.client("scontrol") == "done\n"


def test_a_client_that_was_killed_has_not_refused(slurm: FakeSlurm) -> None:
    slurm.runs("scontrol", "kill -9 $$")
    with pytest.raises(ControllerAway, match="scontrol: killed by signal 9"):
        scheduler.requeue("7")


def test_a_client_that_hangs_is_given_up(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "_PATIENCE_SECONDS", 0.05)
    for command in ("scontrol", "sbatch"):
        slurm.runs(command, "exec /bin/sleep 5")
    with pytest.raises(ControllerAway, match=r"scontrol: no answer in 0.05 s"):
        scheduler.show_job("7")
    with pytest.raises(ControllerAway, match=r"sbatch: no answer in 0.05 s"):
        scheduler.expected_start(Path("job.sh"))


# The environment of a job


def test_a_new_job_inherits_nothing_of_the_job_that_submits_it() -> None:
    of_a_job = ("SLURM_JOB_ID", "SBATCH_MEM_BIND", "SRUN_DEBUG", "SLURMD_NODENAME", "PMI_RANK")
    kept = {"SLURM_CONF": "c", "SLURM_CLUSTERS": "here", "PATH": "p", "MY_SLURM_JOB": "1"}
    assert outside_environment(dict.fromkeys(of_a_job, "1") | kept) == kept


def test_the_environment_comes_back_after_a_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    before = dict(os.environ)
    with contextlib.suppress(ValueError), scheduler.outside_of_jobs():
        assert "SLURM_JOB_ID" not in os.environ
        raise ValueError("any")
    assert dict(os.environ) == before


# Requeue, nodes, partitions


def test_a_job_that_waits_already_need_not_be_requeued(slurm: FakeSlurm) -> None:
    slurm.says("scontrol", stderr="Job is pending execution for job 7\n", code=1)
    scheduler.requeue("7")
    assert slurm.calls == ["scontrol requeue 7"]


def test_a_job_that_is_to_wait_is_told_until_when_and_why(slurm: FakeSlurm) -> None:
    slurm.says("scontrol")
    scheduler.delay("7_2", 120, "no space left")
    assert slurm.calls == ["scontrol update JobId=7_2 StartTime=now+120 Comment=no space left"]


def test_a_requeue_that_is_refused_says_why(slurm: FakeSlurm) -> None:
    text = "Requested operation is presently disabled for job 7\n"
    slurm.says("scontrol", stderr=text, code=1)
    with pytest.raises(Refused, match="presently disabled"):
        scheduler.requeue("7")


def _excluded(slurm: FakeSlurm, before: str, sbatch: str) -> str:
    """What critic8 is to be avoided together with, where sbatch answers so."""
    job, script = f'printf "%s" "{_line(avoided=before)}"', 'echo "#!/bin/bash"'
    slurm.runs("scontrol", f'case "$1" in show) {job};; write) {script};; esac')
    slurm.runs("sbatch", f'read line; [ "$line" = "#!/bin/bash" ] || exit 9\n{sbatch}')
    scheduler.exclude_node("7", "critic8")
    update = slurm.calls[-1]
    assert update.startswith("scontrol update JobId=7 ExcNodeList=")
    return update.partition("ExcNodeList=")[2]


@pytest.mark.parametrize(
    ("before", "after"), [("(null)", "critic8"), ("critic7,critic9", "critic7,critic9,critic8")]
)
def test_a_node_is_avoided_besides_those_before(slurm: FakeSlurm, before: str, after: str) -> None:
    assert _excluded(slurm, before, "exit 0") == after
    assert slurm.calls[-2] == f"sbatch --test-only --exclude={after}"


def test_where_no_node_would_be_left_fewer_are_avoided(slurm: FakeSlurm) -> None:
    only_one = 'case "$2" in *,*) echo "allocation failure" >&2; exit 1;; esac'
    assert _excluded(slurm, "critic7", only_one) == "critic8"
    assert _excluded(slurm, "critic7", "echo no >&2; exit 1") == ""


def test_a_node_is_avoided_where_sbatch_cannot_tell(slurm: FakeSlurm) -> None:
    away = f'echo "{AWAY.strip()}" >&2; exit 1'
    assert _excluded(slurm, "critic7", away) == "critic7,critic8"


def test_a_partition(slurm: FakeSlurm) -> None:
    slurm.says("scontrol", partition("low", grace=15, mode="REQUEUE", limit="1-00:00:00") + "\n")
    assert scheduler.show_partition("low") == scheduler.Partition("low", 86400, 15, "REQUEUE")
    assert slurm.calls == ["scontrol show partition -o low"]


def test_the_default_partition_is_found_among_all(slurm: FakeSlurm) -> None:
    lines = [partition("low"), partition("main", default=True), partition("high")]
    slurm.says("scontrol", "\n".join(lines) + "\n")
    assert scheduler.show_partition(None) == scheduler.Partition("main", math.inf, 0, "OFF")


def test_a_site_may_have_no_default_partition(slurm: FakeSlurm) -> None:
    slurm.says("scontrol", partition("low") + "\n")
    with pytest.raises(Refused, match="name one in the cluster profile"):
        scheduler.show_partition(None)


# Whether a job would be taken


def test_the_expected_start_is_what_sbatch_says(slurm: FakeSlurm) -> None:
    slurm.says("sbatch", stderr=STARTS + "\n")
    assert scheduler.expected_start(Path("job.sh")) == STARTS.removeprefix("sbatch: ")
    assert slurm.calls == ["sbatch --test-only job.sh"]


def test_an_impossible_job_is_refused_with_all_that_sbatch_says(slurm: FakeSlurm) -> None:
    text = (
        "sbatch: error: invalid partition specified: nowhere\n"
        "allocation failure: Invalid partition name specified\n"
    )
    slurm.says("sbatch", stderr=text, code=1)
    with pytest.raises(Refused, match=r"specified: nowhere\nallocation failure: Invalid"):
        scheduler.expected_start(Path("job.sh"))


def test_without_sbatch_nothing_is_known_of_the_start(slurm: FakeSlurm) -> None:
    with pytest.raises(ControllerAway, match="sbatch is not installed here"):
        scheduler.expected_start(Path("job.sh"))
    slurm.says("sbatch", stderr=f"allocation failure: {AWAY}", code=1)
    with pytest.raises(ControllerAway, match="Unable to contact"):
        scheduler.expected_start(Path("job.sh"))
