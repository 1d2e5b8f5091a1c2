"""The line by which cron submits the same night as the shell that prints it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from job.nightly.baseline import FOLDER as BASELINES
from slurm.plan import VARIABLES
from slurm.scheduler import outside_environment
from slurm.site import find_site
from slurm.submission import PROJECT

_CRON_PATH = ("/usr/bin", "/bin")
_PROGRAMS = ("sbatch", "apptainer", "singularity", "git")  # whose folders jobs and cron must know
_WHEN = "17 2 * * *"
_CARRIED = (
    *VARIABLES.values(),
    *("SLURM_CONF", "SLURM_CLUSTERS", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME"),
    *("MLFLOW_TRACKING_INSECURE_TLS", "MLFLOW_TRACKING_SERVER_CERT_PATH"),
)
# Of others, what a night's jobs would have from the shell: passwords, and settings of their own.
_NAMED = re.compile("(MLFLOW|AWS|CUDA|NCCL|GLOO)_")
_MAY_HIDE = re.compile("[=@?]")  # a secret: in addresses' logins and queries, in lists of variables


def install_lines(options: Namespace) -> Iterator[str]:
    """The line for crontab, and for scrontab, with what is to be known of it."""
    line = f"{_WHEN} {_shell_line(options)}".replace("%", r"\%")  # for cron the end of a line
    yield f"# crontab -e\n{line}"
    if not options.local:
        yield f"\n# scrontab -e\n#SCRON --time=15 --mem=2G\n{line}"
    if named := [name for name in _set_here() if name not in _carried()]:
        why = "secrets, or settings of jobs, which the profile's `environment` can have"
        yield f"\n# set in this shell, and not in the line ({why}): {', '.join(named)}"
        yield "# set them for cron yourself if a night needs them"


def site_of(options: Namespace) -> str | None:
    """The site file, also where another user or cron would not find it."""
    file = find_site(options.site).file
    return None if file is None else str(file)


def _shell_line(options: Namespace) -> str:
    """A night as cron's shell starts it, with whole paths and what cron does not set."""
    named = [f"{key}={shlex.quote(value)}" for key, value in (_carried() | _path()).items()]
    command = " ".join(
        [*named, shlex.join([sys.executable, "slurm/nightly.py", *_arguments(options)])]
    )
    where, log = shlex.quote(str(PROJECT)), shlex.quote(f"{options.folder}/cron.log")
    folder = shlex.quote(str(options.folder))
    return f"mkdir -p {folder} && cd {where} && {command} >> {log} 2>&1"


def _arguments(options: Namespace) -> Iterator[str]:
    """The arguments that ask for the same night from anywhere."""
    yield from ("--matrix", options.matrix, "--folder", str(options.folder))
    if options.local:
        yield "--local"
    if options.only:
        yield from ("--only", *options.only)
    if options.baseline != BASELINES:
        yield from ("--baseline", str(options.baseline))
    # of sites the user's own too, which cron, without HOME, would not find
    given = {name: getattr(options, name) for name in ("cluster", "image", "webhook", "mail")}
    for name, value in ({"site": site_of(options)} | given).items():
        if value is not None:
            yield from (f"--{name}", value)


def _set_here() -> list[str]:
    """The variables of this shell by which a night may be another one than cron's."""
    to_sbatch = outside_environment(os.environ)  # without what is set aside
    of_slurm = [name for name in to_sbatch if name.startswith("SBATCH_")]
    others = [name for name in os.environ if name in _CARRIED or _NAMED.match(name)]
    return sorted(name for name in {*of_slurm, *others} if os.environ[name])


def _carried() -> dict[str, str]:
    """The variables of the line; none whose value may have a secret."""
    names = [name for name in _set_here() if name in _CARRIED or name.startswith("SBATCH_")]
    values = {name: os.environ[name] for name in names if name.isidentifier()}
    return {k: v for k, v in values.items() if v.isprintable() and not _MAY_HIDE.search(unquote(v))}


def _path() -> dict[str, str]:
    """A PATH for cron and the jobs, where the one that cron gives lacks a program."""
    found = [shutil.which(program) for program in _PROGRAMS]
    folders = dict.fromkeys(str(Path(file).parent) for file in found if file is not None)
    more = [folder for folder in folders if folder not in _CRON_PATH]
    return {"PATH": ":".join([*more, *_CRON_PATH])} if more else {}
