"""The container tools that the tests use, installed where they are missing.

What Debian packages comes from apt. Apptainer is in Debian's unstable suite alone and needs a newer
libc than the stable one has, so it is unpacked beside the system, with the libraries it needs, into
a cache folder. What is configured is configured there too; of /etc, only the ranges of subordinate
ids are touched, and only where root has none.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

# command: its package
_PACKAGES = {
    "podman": "podman",
    "runc": "runc",  # podman's own choice, crun, refuses a machine that has both cgroup versions
    "mksquashfs": "squashfs-tools",
    "squashfuse": "squashfuse",
    "newuidmap": "uidmap",
    "patchelf": "patchelf",
    "mmdebstrap": "mmdebstrap",
}
_APPTAINER = ("apptainer", "libc6", "libseccomp2", "libsqlite3-0", "zlib1g")
_SUITE = "sid"
_CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
netns = "host"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
_STORAGE_CONF = """
[storage]
driver = "overlay"
graphroot = "{folder}/{name}"
runroot = "{folder}/run-{name}"
[storage.options]
additionalimagestores = [{others}]
"""


class Missing(Exception):  # noqa: N818 - a state of the machine
    """A tool that cannot be had here; the message names it."""


class NotPackaged(Missing):
    """Not this machine's fault: where Debian's packages come from, there is none of it."""


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "critic-container-tools"


@dataclass(frozen=True)
class Tools:
    """Everything that builds and runs images here, and the environment it runs in."""

    folder: Path
    environment: Mapping[str, str] = field(repr=False)

    def run(
        self, *command: str | Path, seconds: float = 600, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, whatever its exit code."""
        words = [str(word) for word in command]
        return subprocess.run(
            words,
            env=dict(self.environment),
            cwd=cwd,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )

    def output(self, *command: str | Path, seconds: float = 600, cwd: Path | None = None) -> str:
        """What a command prints; it must end well."""
        done = self.run(*command, seconds=seconds, cwd=cwd)
        assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stderr[-4000:]}"
        return done.stdout

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One process at a time installs or builds."""
        with (self.folder / "lock").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    @contextmanager
    def with_another_storage(self) -> Iterator[Tools]:
        """The same tools, which see the images here and leave none."""
        config = _storage(self.folder, "another", f'"{self.folder}/storage"')
        other = Tools(self.folder, {**self.environment, "CONTAINERS_STORAGE_CONF": config})
        try:
            yield other
        finally:
            other.run("podman", "rmi", "--all", "--force")
            other.run("umount", self.folder / "another/overlay")  # podman may leave it mounted
            for name in ("another", "run-another"):
                shutil.rmtree(self.folder / name, ignore_errors=True)


def find_tools() -> Tools:
    """Raises: Missing."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    # what a developer has set for the outside must not reach the inside
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("APPTAINER", "SINGULARITY"))}
    tools = Tools(folder, kept)
    with tools.alone():
        _install_packages()
        _give_root_subordinate_ids()
        settings = {
            "PATH": os.pathsep.join([str(_apptainer(folder)), kept["PATH"]]),
            "CONTAINERS_CONF": _written(folder / "containers.conf", _CONTAINERS_CONF),
            "CONTAINERS_STORAGE_CONF": _storage(folder, "storage"),
            "APPTAINER_CACHEDIR": str(folder / "apptainer-cache"),
            # by a namespace: a root that lacks a capability, as in a container, needs it
            "APPTAINER_USERNS": "1",
        }
    return Tools(folder, kept | settings)


def _storage(folder: Path, name: str, others: str = "") -> str:
    text = _STORAGE_CONF.format(folder=folder, name=name, others=others)
    return _written(folder / f"{name}.conf", text)


def _written(file: Path, text: str) -> str:
    file.write_text(text)
    return str(file)


def _do(
    what: str,
    command: Sequence[str | Path],
    cwd: Path | None = None,
    failure: type[Missing] = Missing,
) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise failure(f"{what}: `{command[0]}` failed: {(done.stderr or done.stdout)[-600:]}")
    return done.stdout


# Debian's packages


def _install_packages() -> None:
    missing = {c: package for c, package in _PACKAGES.items() if shutil.which(c) is None}
    if not missing:
        return
    names = ", ".join(missing)
    if os.geteuid() or shutil.which("apt-get") is None:
        raise Missing(f"{names}: not installed, and only root on Debian can install them here")
    waiting = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=300"]
    _do(names, [*waiting, "update"])
    _do(names, [*waiting, "install", "-y", "--no-install-recommends", *missing.values()])


def _give_root_subordinate_ids() -> None:
    """`apptainer build --fakeroot` maps the image's users to a range of root's own."""
    for file in (Path("/etc/subuid"), Path("/etc/subgid")):
        lines = file.read_text() if file.exists() else ""
        if os.geteuid() == 0 and not any(x.startswith("root:") for x in lines.splitlines()):
            file.write_text(f"{lines.rstrip()}\nroot:100000:65536\n".lstrip())


# Apptainer


def _apptainer(folder: Path) -> Path:
    """The folder of a working `apptainer`."""
    installed = shutil.which("apptainer")
    if installed is not None:
        return Path(installed).parent
    root = folder / "apptainer"
    if not (root / "usr/bin/apptainer").exists():
        half = folder / "apptainer.half"
        shutil.rmtree(half, ignore_errors=True)
        _unpack(_download(folder / "apt"), half)
        _move_in(half, root)
        half.rename(root)
    said = _do("apptainer", [root / "usr/bin/apptainer", "--version"])
    if "apptainer version" not in said:
        raise Missing(f"apptainer: says {said!r} when asked for its version")
    return root / "usr/bin"


def mirror() -> str:
    """Where this machine gets Debian's packages from."""
    what = "apptainer"
    if shutil.which("apt-get") is None:
        raise Missing(f"{what}: not installed, and there is no apt to get it with")
    targets = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(ORIGIN) $(COMPONENT)"]
    for line in _do(what, [*targets, "Created-By: Packages"]).splitlines():
        address, origin, component = line.split()
        if (origin, component) == ("Debian", "main"):
            return address
    raise Missing(f"{what}: this machine's apt has no source of Debian's packages")


def _download(folder: Path) -> list[Path]:
    """Apptainer's packages, by an apt that shares nothing with the machine's own but its keys."""
    for name in ("lists/partial", "archives/partial", "debs", "parts"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    sources = _written(folder / "sources.list", f"deb {mirror()} {_SUITE} main\n")
    status = _written(folder / "status", "")
    options = {
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": folder / "parts",
        "Dir::Etc::Preferences": "/dev/null",
        "Dir::Etc::PreferencesParts": folder / "parts",
        "Dir::State::Lists": folder / "lists",
        "Dir::State::Status": status,
        "Dir::Cache": folder,
        "Dir::Cache::Archives": folder / "archives",
        "APT::Sandbox::User": "root",
    }
    apt: list[str | Path] = ["apt-get", "-q"]
    for key, value in options.items():
        apt += ["-o", f"{key}={value}"]
    _do("apptainer", [*apt, "update"])
    _do("apptainer", [*apt, "download", *_APPTAINER], folder / "debs", NotPackaged)
    return sorted((folder / "debs").glob("*.deb"))


def _unpack(packages: Sequence[Path], root: Path) -> None:
    root.mkdir(parents=True)
    for package in packages:
        _do("apptainer", ["dpkg", "-x", package, root])


def _move_in(root: Path, final: Path) -> None:
    """Let the programs below `root` find each other and their libraries once it is at `final`."""
    for link, target in {
        "usr/etc": "../etc",
        "usr/var": "../var",
        "usr/lib/etc": "../../etc",
        "usr/lib/var": "../../var",
    }.items():
        (root / link).symlink_to(target)
    loader = next(root.rglob("ld-linux-*.so.*"), None)
    starter = next(root.rglob("apptainer/bin/starter"), None)
    if loader is None or starter is None:
        raise Missing("apptainer: the packages lack its starter or libc's loader")
    libraries = sorted({str(final / x.parent.relative_to(root)) for x in root.rglob("lib*.so.*")})
    for program in (root / "usr/bin/apptainer", starter):
        _do(
            "apptainer",
            ["patchelf", "--set-interpreter", final / loader.relative_to(root), program],
        )
        _do("apptainer", ["patchelf", "--force-rpath", "--set-rpath", ":".join(libraries), program])
