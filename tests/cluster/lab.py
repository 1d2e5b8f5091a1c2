"""A real Slurm cluster of two nodes on this machine, for tests: no systemd, all in one folder.

python tests/cluster/lab.py start|stop FOLDER
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path

PACKAGES = ("slurmd", "slurmctld", "slurm-client", "munge", "slurmdbd", "mariadb-server")
GPUS_PER_NODE = 4
USER_SIGNAL = "preempt_send_user_signal"
DEFAULT_CONF = Path("/etc/slurm/slurm.conf")
HOSTS = Path("/etc/hosts")
PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
LONGEST_FOLDER = 60  # a socket's path has 107 bytes, and those of steps have long names

SLURM_CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
{communication}
AuthType=auth/munge
CredType=cred/munge
# A requeued job starts again only after cred_expire seconds.
AuthInfo=socket={folder}/run/munge.socket,cred_expire=5
# No two labs give the same job id: results of an old job are never taken for a new one's, and the
# ports that ranks derive from it are others than those of another lab's jobs.
FirstJobId={first_job}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType={proctrack}
TaskPlugin={task}
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=4000
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MinJobAge=300
CompleteWait=0
# Lets nodes claim more than the machine has.
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
EnforcePartLimits=ALL
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports[1]}
AccountingStoragePass={folder}/run/munge.socket
AccountingStorageTRES=gres/gpu
GresTypes=gpu
NodeName=DEFAULT CPUs=16 Boards=1 Sockets=1 CoresPerSocket=16 ThreadsPerCore=1 RealMemory=64000 \
Gres=gpu:a100:{gpus} State=UNKNOWN
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]}
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]}
PartitionName=DEFAULT Nodes=ALL MaxNodes=2 MaxTime=1-0 PriorityTier=1 State=UP
PartitionName=main Default=YES PreemptMode=OFF
PartitionName=low PreemptMode=REQUEUE GraceTime=15
PartitionName=low0 PreemptMode=REQUEUE GraceTime=0
PartitionName=lowc PreemptMode=CANCEL GraceTime=15
PartitionName=lowc0 PreemptMode=CANCEL GraceTime=0
PartitionName=high PriorityTier=100 PreemptMode=OFF
"""

CGROUP_CONF = """\
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
ConstrainRAMSpace=yes
ConstrainSwapSpace=no
ConstrainCores=no
ConstrainDevices=no
"""

# DbdAddr is only where clients look for slurmdbd; where it listens, {communication} says.
SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={ports[1]}
SlurmUser=root
PidFile={folder}/run/slurmdbd.pid
LogFile={folder}/log/slurmdbd.log
DebugLevel=info
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_accounting
{communication}
"""


class LabImpossible(Exception):  # noqa: N818 (a verdict on the machine, not a failure)
    """This machine cannot hold a lab."""


class LabError(RuntimeError):
    """The lab, or a command in it, failed."""


class Lab:
    """Two nodes of four pretended GPUs each, a controller and accounting."""

    def __init__(self, folder: Path, nodes: tuple[str, str]) -> None:
        self.folder = folder
        self.nodes = nodes
        self.environment = {"SLURM_CONF": str(folder / "etc/slurm.conf")}
        self.seconds = 0.0  # from installed packages to two idle nodes

    @classmethod
    def start(cls, folder: Path) -> Lab:
        """Bring up what is not there yet of the lab in this folder."""
        folder = folder.resolve()
        _require_possible(folder)
        for name in ("etc", "run", "log", "spool", "state", "dev"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)
        with _alone("start"):  # packages and names of nodes: what is free is free until it is used
            _install(folder / "log/apt.log")
            began = time.monotonic()
            _configure(folder)
            lab = cls.attach(folder)
            try:
                lab._bring_up()
            except Exception as error:
                logs = lab._ends_of_logs()
                lab.stop()
                raise LabError(f"the lab in {folder} did not come up: {error}\n{logs}") from error
        lab.seconds = time.monotonic() - began
        return lab

    @classmethod
    def attach(cls, folder: Path) -> Lab:
        """The lab that somebody has started in this folder."""
        folder = folder.resolve()
        conf = folder / "etc/slurm.conf"
        if not conf.exists():
            raise LabError(
                f"no lab in {folder}: start one with {Path(__file__).name} start {folder}"
            )
        first, second = re.findall(r"^NodeName=(\w+) NodeHostname", conf.read_text(), re.MULTILINE)
        return cls(folder, (first, second))

    def run(self, *command: str, check: bool = True) -> str:
        """Run a Slurm client command as a user would; its stdout."""
        result = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, timeout=120
        )
        if check and result.returncode:
            raise LabError(f"{' '.join(command)} ended with {result.returncode}: {result.stderr}")
        return result.stdout

    def send_user_signal(self, on: bool) -> None:
        """Whether preemption sends the signal that the job has asked for with --signal."""
        if self._sends_user_signal() == on:
            return
        line = f"SlurmctldParameters={USER_SIGNAL}"
        conf = self.folder / "etc/slurm.conf"
        text = conf.read_text().replace(f"#{line}", line)
        _write(conf, text if on else text.replace(line, f"#{line}"))
        # Preemption looks again only at a configuration of another second than the one it knows.
        time.sleep(1)
        self.run("scontrol", "reconfigure")
        self.wait_until(lambda: self._sends_user_signal() == on, "the new SlurmctldParameters", 10)

    def _sends_user_signal(self) -> bool:
        lines = self.run("scontrol", "show", "config").splitlines()
        return any(USER_SIGNAL in line for line in lines if line.startswith("SlurmctldParam"))

    def be_the_default(self) -> bool:
        """Be the Slurm of those without $SLURM_CONF; not where the machine has one of its own."""
        with _alone("default"):
            if DEFAULT_CONF.exists() and not DEFAULT_CONF.is_symlink():
                return False
            DEFAULT_CONF.parent.mkdir(exist_ok=True)
            draft = DEFAULT_CONF.with_name(f".{self.nodes[0]}.conf")
            draft.symlink_to(self.folder / "etc/slurm.conf")
            draft.replace(DEFAULT_CONF)
        return True

    def stop_controller(self) -> None:
        """The controller goes away; what it knows stays on disk."""
        self._end("slurmctld", signal.SIGTERM)

    def start_controller(self) -> None:
        if not self._pid("slurmctld"):
            self._daemon("slurmctld", "-f", self.environment["SLURM_CONF"])
        self.wait_until(lambda: "is UP" in self.run("scontrol", "ping", check=False), "slurmctld")

    def kill_slurmd(self, node: str) -> None:
        """Only slurmd dies: its jobs go on, unknown to the controller after SlurmdTimeout."""
        self._end(f"slurmd.{node}", signal.SIGKILL)

    def kill_node(self, node: str) -> None:
        """As if power went: everything of this node dies at once."""
        self._end(f"slurmd.{node}", signal.SIGKILL)
        frozen = self._cgroup(node) / "freezer.state"
        # Frozen, no process can start another or write a last word while the others are killed.
        if frozen.exists():
            frozen.write_text("FROZEN")
            self.wait_until(lambda: frozen.read_text().strip() == "FROZEN", f"a frozen {node}")
        self._kill_processes(node)
        if frozen.exists():
            frozen.write_text("THAWED")
        self.wait_until(lambda: not self._kill_processes(node), f"the end of all on {node}")

    def _kill_processes(self, node: str) -> set[int]:
        found = self._processes(node)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return found

    def start_node(self, node: str) -> None:
        """Start slurmd (again) and return when the node takes jobs."""
        if not self._pid(f"slurmd.{node}"):
            if not self._processes(node) and self.run("squeue", "-h", "-w", node, "-t", "R"):
                # A machine that came back has a new boot time, which tells Slurm that its jobs are
                # gone. Here it has the old one, and they would count as running for ever.
                self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=dead")
            began = datetime.now().replace(microsecond=0)
            (self.folder / "spool" / node).mkdir(exist_ok=True)
            self._daemon("slurmd", "-f", self.environment["SLURM_CONF"], "-N", node)
            self.wait_until(lambda: self._started(node) >= began, f"{node} to register")
        self.wait_until(lambda: self._takes_jobs(node), f"{node} to take jobs")

    def _started(self, node: str) -> datetime:
        """When the slurmd that the controller knows was started."""
        found = re.search(r"SlurmdStartTime=(\d\S*)", self.run("scontrol", "show", "node", node))
        return datetime.fromisoformat(found[1]) if found else datetime.min

    def _takes_jobs(self, node: str) -> bool:
        state = self.run("sinfo", "-h", "-p", "main", "-n", node, "-o", "%T").strip()
        if state.startswith(("down", "drain")) and not state.endswith("*"):
            self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        return state in ("idle", "mixed", "allocated", "completing")

    def cancel_all(self) -> None:
        """Cancel all jobs and return when none is left."""
        if jobs := set(self.run("squeue", "-h", "-o", "%F").split()):
            self.run("scancel", *jobs, check=False)
            self.wait_until(lambda: not self.run("squeue", "-h").strip(), "an empty queue", 60)

    def wait_until(self, condition: Callable[[], object], what: str, seconds: float = 30) -> None:
        """Return as soon as the condition holds; a LabError names what did not come about."""
        limit = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > limit:
                raise LabError(f"{seconds:.0f} s without: {what}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End every process of the lab and leave nothing outside its folder."""
        if self._pid("slurmctld") and self._pid("munged"):
            with contextlib.suppress(LabError, subprocess.TimeoutExpired):
                self.cancel_all()
        for node in self.nodes:
            self.kill_node(node)
        for daemon in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
            self._end(daemon, signal.SIGTERM)
        for node in self.nodes:
            _remove_cgroups(node)
        with _alone("default"):
            if _points_to(DEFAULT_CONF, self.folder / "etc/slurm.conf"):
                DEFAULT_CONF.unlink()
        _write_hosts(self.folder, ())

    def _bring_up(self) -> None:
        _write_hosts(self.folder, self.nodes)
        self._start_munge()
        self._start_accounting()
        self.start_controller()
        for node in self.nodes:
            self.start_node(node)

    def _start_munge(self) -> None:
        run, key = self.folder / "run", self.folder / "etc/munge.key"
        if self._pid("munged"):
            return
        if not key.exists():
            _write(key, secrets.token_bytes(128), 0o600)
        self._daemon(
            "munged",
            f"--key-file={key}",
            f"--socket={run}/munge.socket",
            f"--pid-file={run}/munged.pid",
            f"--seed-file={run}/munged.seed",
            f"--log-file={self.folder}/log/munged.log",
        )
        ask = ("munge", "-n", f"--socket={run}/munge.socket")
        self.wait_until(lambda: _succeeds(*ask), "munged")

    def _start_accounting(self) -> None:
        data, run = self.folder / "db", self.folder / "run"
        options = ("--no-defaults", "--user=root", f"--datadir={data}")
        if not data.exists():
            create = ("--auth-root-authentication-method=normal", "--skip-test-db")
            self._daemon("mariadb-install-db", *options, *create, "--skip-name-resolve")
        if not self._pid("mariadbd"):
            self._daemon(
                "setsid",
                "--fork",
                "mariadbd",
                *options,
                f"--socket={run}/mysql.sock",
                f"--pid-file={run}/mariadbd.pid",
                f"--log-error={self.folder}/log/mariadbd.log",
                "--skip-networking",
                "--innodb-flush-log-at-trx-commit=0",
                "--innodb-lock-wait-timeout=900",  # slurmdbd wants it
                "--innodb-buffer-pool-size=64M",
            )
        ask = ("mariadb-admin", "--no-defaults", f"--socket={run}/mysql.sock", "ping")
        self.wait_until(lambda: self._pid("mariadbd") and _succeeds(*ask), "mariadbd")
        if not self._pid("slurmdbd"):
            self._daemon("slurmdbd")
        show = ("sacctmgr", "-n", "-P", "show", "cluster", "format=cluster")
        self.wait_until(lambda: _succeeds(*show, environment=self.environment), "slurmdbd")
        if "lab" not in self.run(*show).split():
            self.run("sacctmgr", "-Qi", "add", "cluster", "lab")

    def _daemon(self, *command: str) -> None:
        """Run something that goes into the background by itself."""
        environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "MYSQL_UNIX_PORT": f"{self.folder}/run/mysql.sock",
            **self.environment,
        }
        with (self.folder / "log/start.log").open("ab") as log:
            code = subprocess.call(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/"
            )
        if code:
            raise LabError(f"{command[0]} ended with {code}")

    def _pid(self, daemon: str) -> int:
        """The process of a daemon, 0 if it is not there."""
        try:
            pid = int((self.folder / f"run/{daemon}.pid").read_text())
            name = (PROC / f"{pid}/comm").read_text()
        except (OSError, ValueError):
            return 0
        # Process ids come round again, and another lab may run: name and folder must be right. A
        # zombie that pid 1 has not reaped yet has an empty environment.
        ours = self.environment["SLURM_CONF"] in _environment(pid).values()
        return pid if ours and name.startswith(daemon.split(".")[0]) else 0

    def _end(self, daemon: str, number: signal.Signals) -> None:
        if pid := self._pid(daemon):
            os.kill(pid, number)
            try:
                self.wait_until(lambda: not self._pid(daemon), f"the end of {daemon}", 15)
            except LabError:
                os.kill(pid, signal.SIGKILL)
                self.wait_until(lambda: not self._pid(daemon), f"the end of {daemon}")
        (self.folder / f"run/{daemon}.pid").unlink(missing_ok=True)

    def _cgroup(self, node: str) -> Path:
        return CGROUPS / f"freezer/slurm_{node}"

    def _processes(self, node: str) -> set[int]:
        """The steps of a node: slurmstepds and what they have started."""
        found = set()
        for file in self._cgroup(node).rglob("cgroup.procs"):
            with contextlib.suppress(OSError):
                found |= {int(line) for line in file.read_text().split()}
        for pid, parent in _pids_and_parents():
            environment = _environment(pid)
            if environment.get("SLURMD_NODENAME") == node and self._is_here(environment):
                # slurmstepd itself is known only as the parent of its tasks.
                found |= {pid, parent} if _is_stepd(parent) else {pid}
        return {pid for pid in found if _is_alive(pid)}

    def _is_here(self, environment: Mapping[str, str]) -> bool:
        return environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]

    def _ends_of_logs(self) -> str:
        logs = sorted((self.folder / "log").iterdir())
        return "\n".join(
            f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs
        )


def _require_possible(folder: Path) -> None:
    if os.geteuid() != 0:
        raise LabImpossible("a Slurm cluster for tests needs root")
    if not Path("/etc/debian_version").exists() or not shutil.which("apt-get"):
        raise LabImpossible("a Slurm cluster for tests needs Debian or Ubuntu, for its packages")
    if len(str(folder)) > LONGEST_FOLDER:
        raise LabImpossible(f"{folder} is too long for the names of sockets in it")


@contextlib.contextmanager
def _alone(what: str) -> Iterator[None]:
    """One lab at a time does this; another process may have one too."""
    with (Path(tempfile.gettempdir()) / f"slurm-lab.{what}.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _install(log: Path) -> None:
    query = ("dpkg-query", "-W", "-f", "${Package} ${Status}\n", *PACKAGES)
    listed = subprocess.run(query, capture_output=True, text=True).stdout
    missing = [name for name in PACKAGES if f"{name} install ok installed" not in listed]
    apt = ("apt-get", "-o", "DPkg::Lock::Timeout=600", "-qq")
    install = (*apt, "install", "-y", "--no-install-recommends", *missing)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in ((*apt, "update"), install) if missing else ():
        with log.open("ab") as output:
            code = subprocess.call(command, env=environment, stdout=output, stderr=output)
        if code:
            raise LabError(f"{' '.join(command)} ended with {code}:\n{log.read_text()[-2000:]}")


def _configure(folder: Path) -> None:
    """Write the configuration, unless it is there."""
    etc = folder / "etc"
    if (etc / "slurm.conf").exists():
        return
    for index in range(GPUS_PER_NODE):
        _make_device(folder / f"dev/nvidia{index}", index)
    cgroups = all(os.access(CGROUPS / name, os.W_OK) for name in ("freezer", "memory"))
    nodes = _free_names()
    values = {
        "folder": folder,
        "host": socket.gethostname().split(".")[0],
        "ports": _free_ports(4),
        "nodes": nodes,
        "gpus": GPUS_PER_NODE,
        "first_job": _first_job(nodes[0]),
        "communication": _communication(),
        "proctrack": "proctrack/cgroup" if cgroups else "proctrack/linuxproc",
        "task": "task/cgroup" if cgroups else "task/none",
    }
    files = f"{folder}/dev/nvidia[0-{GPUS_PER_NODE - 1}]"
    _write(etc / "cgroup.conf", CGROUP_CONF)
    _write(etc / "gres.conf", f"Name=gpu Type=a100 File={files} Flags=nvidia_gpu_env\n")
    _write(etc / "slurmdbd.conf", SLURMDBD_CONF.format_map(values), 0o600)
    _write(etc / "slurm.conf", SLURM_CONF.format_map(values))


def _make_device(path: Path, minor: int) -> None:
    # Slurm takes only device files for GPUs; nothing ever opens these.
    if path.exists():
        return
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(195, minor))
    except PermissionError:
        raise LabImpossible("a Slurm cluster for tests must be allowed to mknod") from None


def _communication() -> str:
    """Listen on loopback only, where the host's own name leads there.

    Slurm binds either to all interfaces or to what the host's name resolves to.
    """
    try:
        own = socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""
    return "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny" if own.startswith("127.") else ""


def _free_ports(count: int) -> list[int]:
    """Ports below the range that outgoing connections take theirs from."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found += [port] if port not in found else []
    return found


def _free_names() -> tuple[str, str]:
    """Names of nodes that no other lab uses: a node's cgroup has the node's name."""
    running = set()
    for pid, _ in _pids_and_parents():
        with contextlib.suppress(OSError):
            running |= set((PROC / f"{pid}/cmdline").read_text(errors="replace").split("\0"))
    number = next(n for n in range(1, 1000, 2) if not {f"critic{n}", f"critic{n + 1}"} & running)
    return f"critic{number}", f"critic{number + 1}"


def _first_job(node: str) -> int:
    """Of a thousand ids that change by the second, modulo 20,000 those of this node's lab alone."""
    place = int(node.removeprefix("critic")) // 2 % 20
    return (1 + int(time.time()) % 3000) * 20_000 + place * 1000


def _pids_and_parents() -> Iterator[tuple[int, int]]:
    for folder in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            status = (folder / "status").read_text(errors="replace")
            yield int(folder.name), int(status.split("\nPPid:")[1].split()[0])


def _environment(pid: int) -> dict[str, str]:
    """What a process was started with; empty for a zombie."""
    try:
        text = (PROC / f"{pid}/environ").read_text(errors="replace")
    except OSError:
        return {}
    return dict(line.split("=", 1) for line in text.split("\0") if "=" in line)


def _is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie, which has an empty command line."""
    try:
        return bool((PROC / f"{pid}/cmdline").read_bytes())
    except OSError:
        return False


def _is_stepd(pid: int) -> bool:
    try:
        return (PROC / f"{pid}/comm").read_text().startswith("slurmstepd")
    except OSError:
        return False


def _succeeds(*command: str, environment: Mapping[str, str] | None = None) -> bool:
    quiet = subprocess.DEVNULL
    env = os.environ | (environment or {})
    return subprocess.call(command, env=env, stdout=quiet, stderr=quiet) == 0


def _write(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    """Write a file that readers see whole."""
    draft = path.with_name(f".{path.name}")
    draft.touch(mode=mode)
    draft.write_bytes(content.encode() if isinstance(content, str) else content)
    draft.replace(path)


def _write_hosts(folder: Path, nodes: tuple[str, ...]) -> None:
    """Make nodes known by name, for the ranks of a job to meet; none removes the folder's line."""
    mark = f"# lab in {folder}"
    new = [f"127.0.0.1 {' '.join(nodes)} {mark}"] if nodes else []
    with _alone("hosts"):
        lines = [line for line in HOSTS.read_text().splitlines() if not line.endswith(mark)]
        # In a container this file is a mount point: it can be written but not replaced. Whoever
        # looks a name up meanwhile must find it: what stays is never taken away.
        with HOSTS.open("r+") as stream:
            stream.write("\n".join([*lines, *new]) + "\n")
            stream.truncate()


def _points_to(link: Path, target: Path) -> bool:
    return link.is_symlink() and link.readlink() == target


def _remove_cgroups(node: str) -> None:
    for root in CGROUPS.glob(f"*/slurm_{node}"):
        below = [path for path in root.rglob("*") if path.is_dir()]
        for path in (*sorted(below, reverse=True), root):
            with contextlib.suppress(OSError):
                path.rmdir()


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in ("start", "stop"):
        sys.exit(f"usage: {sys.argv[0]} start|stop FOLDER")
    try:
        _start_or_stop(sys.argv[1], Path(sys.argv[2]))
    except (LabError, LabImpossible) as error:
        sys.exit(str(error))


def _start_or_stop(action: str, folder: Path) -> None:
    if action == "stop":
        Lab.attach(folder).stop()
        return
    lab = Lab.start(folder)
    print(f"up in {lab.seconds:.1f} s: {', '.join(lab.nodes)}")
    print(f"export SLURM_CONF={lab.environment['SLURM_CONF']} SLURM_LAB={lab.folder}")


if __name__ == "__main__":
    main()
