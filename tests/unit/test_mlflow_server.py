"""The MLflow copy of a run directory at a real server, which may be down or silent."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from mirrored_runs import (
    MARKS,
    Example,
    assert_complete,
    assert_states,
    copies,
    copy_of,
    finished,
    noted,
)
from waiting import wait_for

from job.run.mlflow_mirror import Mirror
from job.run.mlflow_sync import sync_run

pytestmark = MARKS


class Gate:
    """A port before the server that passes connections on, or takes them and stays silent."""

    def __init__(self, target: int, port: int = 0) -> None:
        self.silent = False
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._open.append(client)
                if not self.silent:
                    server = socket.create_connection(("127.0.0.1", self._target))
                    self._open.append(server)
                    self._threads.append(
                        threading.Thread(target=self._pass_on, args=(client, server))
                    )
                    self._threads[-1].start()

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        other = {client: server, server: client}
        with suppress(OSError):
            while True:
                for ready in select.select([client, server], [], [])[0]:
                    data = ready.recv(1 << 16)
                    if not data:
                        return other[ready].shutdown(socket.SHUT_RDWR)
                    if not self.silent:
                        other[ready].sendall(data)

    def close(self) -> None:
        # Closing alone does not wake a thread that waits on the socket.
        for opened in (self._listener, *self._open):
            with suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for opened in (self._listener, *self._open):
            opened.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an MLflow server process."""
    folder = tmp_path_factory.mktemp("server")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder}/server.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(lambda: _healthy(port) or process.poll() is not None, 120)
        assert process.poll() is None, (folder / "log").read_text()
        yield port
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def _healthy(port: int) -> bool:
    with (
        suppress(OSError),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer,
    ):
        return bool(answer.status == 200)
    return False


@pytest.fixture
def gate(server: int) -> Iterator[Gate]:
    opened = Gate(server)
    yield opened
    opened.close()


def test_a_run_arrives_whole_at_a_server(tmp_path: Path, server: int) -> None:
    example = finished(tmp_path / "served", f"http://127.0.0.1:{server}", steps=1500)
    example.step(1501, told_at=1500, **{"explained (%)": 0.5})
    example.metrics["explained ___", 1501] = example.metrics.pop(("explained (%)", 1501))
    sync_run(example.path)
    assert_complete(example, tmp_path)
    assert copy_of(example).info.status == "FINISHED"
    second = sync_run(example.path)
    assert (second.metrics, second.params, second.artifacts) == (0, 0, 0)


def test_a_run_on_a_server_goes_on_from_every_state(tmp_path: Path, server: int) -> None:
    assert_states(Example(tmp_path / "served states", f"http://127.0.0.1:{server}"))


def follow(example: Example, deadline: float) -> subprocess.Popen[bytes]:
    """The child process with another deadline than its own."""
    code = (
        "import os, pathlib, sys; from job.run.mlflow_mirror import follow\n"
        "os._exit(follow(pathlib.Path(sys.argv[1]), float(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, str(example.path), str(deadline)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)


def test_a_server_that_never_answers_holds_the_process_no_longer_than_its_deadline(
    tmp_path: Path, gate: Gate
) -> None:
    gate.silent = True
    example = finished(tmp_path / "silent", gate.uri)
    process = follow(example, deadline=2)
    wait_for(lambda: "token" in (example.note() if noted(example) else {}))
    began = time.monotonic()
    process.communicate(timeout=20)
    assert time.monotonic() - began < 5
    assert process.returncode == 1
    gate.silent = False
    sync_run(example.path)
    assert_complete(example, tmp_path)
    assert len([r for r in copies(gate.uri, "critic") if r.info.run_name == "silent"]) == 1


def test_a_server_that_falls_silent_during_the_run_gets_the_rest_later(
    tmp_path: Path, gate: Gate
) -> None:
    example = Example(tmp_path / "falls", gate.uri)
    example.status("running")
    example.steps(1, 4)
    live = Mirror.start(example.path)
    wait_for(lambda: noted(example) and len(example.note()["steps"]) == 2)
    gate.silent = True
    example.steps(5, 8)
    assert not live.close(timeout=2)
    assert live.process is not None
    assert live.process.returncode == -signal.SIGKILL
    gate.silent = False
    example.artifacts()
    example.status("finished")
    sync_run(example.path)
    assert_complete(example, tmp_path)


def test_a_server_that_is_down_at_first_gets_everything_when_it_is_up(
    tmp_path: Path, server: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    example = Example(tmp_path / "down", f"http://127.0.0.1:{port}")
    example.status("running")
    example.steps(1, 4)
    live = Mirror.start(example.path)
    wait_for(lambda: "MLflow gets it later" in example.log())
    time.sleep(7)  # more attempts, none of them logged
    gate = Gate(server, port)
    try:
        example.steps(5, 8)
        example.artifacts()
        example.status("finished")
        assert live.close(timeout=60)
        assert_complete(example, tmp_path)
    finally:
        gate.close()
    assert example.log().count("MLflow gets it later") == 1
    assert example.log().count("MLflow takes the run again") == 1
