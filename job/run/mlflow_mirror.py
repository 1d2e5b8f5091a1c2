"""The process that keeps a run's copy in MLflow up to date while the run goes on.

The trainer starts this module as a process of its own that follows the run directory, so that no
server, however slow, slows training or stops it:

    python -m job.run.mlflow_mirror RUN_DIR
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from job.common.errors import InputError, first_line
from job.run.mlflow_sync import AT_REST, SyncResult, database_lock, sync_run, tracking_uri_of
from job.run.reader import StoredRun

SYNC_SECONDS = 5.0
ARTIFACT_SECONDS = 60.0  # train.log grows all the time and is sent whole
BACK_OFF_SECONDS = 30.0  # longest pause during an outage
DEADLINE_SECONDS = 30.0  # for what is left when the trainer is done

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_log = logging.getLogger("job.run.mlflow_mirror")


def live_mirror_allowed(uri: str) -> bool:
    """False for a local database in a cluster job: several nodes must never write one file."""
    in_job = "SLURM_PROCID" in os.environ or "SLURM_JOB_ID" in os.environ
    local = uri.startswith(("sqlite", "file:")) or ("://" not in uri and uri != "databricks")
    return not (in_job and local)


class _SystemMetrics:
    """CPU, memory and GPU of this machine by MLflow's monitor.

    The monitor's own thread is not started: it ends at the first call that fails.
    """

    def __init__(self) -> None:
        self._monitor: Any = None
        self._run_id: str | None = None
        self._due = 0.0

    def publish(self, result: SyncResult) -> None:
        """Take a sample for the run and send it, unless the last one is recent."""
        if time.monotonic() < self._due:
            return
        if self._run_id != result.run_id:
            self._run_id = result.run_id
            self._monitor = self._start(result)
        if self._monitor is not None:
            self._due = time.monotonic() + self._monitor.sampling_interval
            self._monitor.collect_metrics()
            with database_lock(result.tracking_uri):
                self._monitor.publish_metrics(self._monitor.aggregate_metrics())

    def _start(self, result: SyncResult) -> Any:
        try:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            monitor: Any = SystemMetricsMonitor
            return monitor(result.run_id, resume_logging=True, tracking_uri=result.tracking_uri)
        except Exception as error:
            _log.warning("no system metrics: %s", first_line(error))
            return None


class _Follower:
    """Syncs a run directory until told that it is closing, and once more then."""

    def __init__(self, run_dir: Path) -> None:
        self.closing = threading.Event()
        self.all_sent = False
        self._run_dir = run_dir
        self._system = _SystemMetrics()
        self._artifacts_due = 0.0
        self._down = False

    def run(self) -> None:
        pause = SYNC_SECONDS
        last = False
        while not last:
            last = self.closing.is_set()
            ok = self._attempt(last)
            self.all_sent = ok and last
            pause = SYNC_SECONDS if ok else min(2 * pause, BACK_OFF_SECONDS)
            self.closing.wait(pause)

    def _attempt(self, last: bool) -> bool:
        """Sync; an outage is logged when it begins and when it ends."""
        try:
            self._sync(last)
        except Exception as error:
            if not self._down:
                _log.warning("the run goes on, MLflow gets it later: %s", first_line(error))
            self._down = True
            return False
        if self._down:
            _log.info("MLflow takes the run again")
        self._down = False
        return True

    def _sync(self, last: bool) -> None:
        uri = tracking_uri_of(StoredRun(self._run_dir))
        if not live_mirror_allowed(uri):
            raise InputError(f"{uri}: not from a cluster job; use python -m job.report --sync RUN")
        artifacts = last or time.monotonic() >= self._artifacts_due
        result = sync_run(self._run_dir, artifacts=artifacts)
        if artifacts:
            self._artifacts_due = time.monotonic() + ARTIFACT_SECONDS
        if result.state not in AT_REST and not last:
            self._system.publish(result)


def follow(run_dir: Path, deadline: float = DEADLINE_SECONDS) -> int:
    """Mirror a run until something, or its end, comes on stdin; return the exit code.

    The last sync may hang, in a thread that does not end with this function: end the process
    with os._exit. The code is 0 if MLflow has everything, else 1.
    """
    for number in _SIGNALS:  # srun sends them to every process of a step
        signal.signal(number, signal.SIG_IGN)
    _log_to(run_dir / "mlflow.log")
    follower = _Follower(run_dir)
    worker = threading.Thread(target=follower.run, daemon=True)
    worker.start()
    sys.stdin.buffer.read(1)
    follower.closing.set()
    worker.join(deadline)
    if worker.is_alive():
        _log.warning("not everything was sent within %.0f s", deadline)
    return 0 if follower.all_sent else 1


def _log_to(path: Path) -> None:
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    _log.propagate = False


class Mirror:
    """The process that mirrors a run while it trains. No method raises."""

    def __init__(self, process: subprocess.Popen[bytes] | None) -> None:
        self.process = process  # None where it could not be started

    @classmethod
    def start(cls, run_dir: Path) -> Mirror:
        """Start the process. It ends when closed, or when the caller's process does."""
        command = [sys.executable, "-m", "job.run.mlflow_mirror", str(Path(run_dir).absolute())]
        # The child inherits the mask and so is safe until it ignores these signals itself.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            with Path(run_dir, "mlflow.log").open("ab") as log:
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
                )
        except Exception as error:
            _log.warning("no live mirror in MLflow: %s", error)
            return cls(None)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return cls(process)

    def close(self, timeout: float) -> bool:
        """Let the process send what is left and end, for so many seconds; whether all was sent."""
        if self.process is None:
            return False
        if self.process.returncode is None:
            self._end(self.process, timeout)
        return self.process.returncode == 0

    def _end(self, process: subprocess.Popen[bytes], timeout: float) -> None:
        try:
            # Not the end of the pipe alone: a forked worker of the trainer may hold it open.
            process.communicate(b"\n", timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # stuck in a file system
                process.wait(1)
        except Exception as error:
            _log.warning("the live mirror in MLflow: %s", error)


def main() -> None:
    os.nice(5)
    os._exit(follow(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
