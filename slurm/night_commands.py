"""Nightly regressions: submit a night of small jobs from cron, which judges itself at its end.

    python slurm/nightly.py --dry-run                entries, GPU-hours and scripts; submits nothing
    python slurm/nightly.py                          the night: configs/nightly/standard.yaml
    python slurm/nightly.py --install-line           the line for crontab, and for scrontab
    python slurm/nightly.py --local                  small.yaml on this machine, without Slurm
    python slurm/nightly.py report [--night 12]      the last night, or another one
    python slurm/nightly.py accept 'n4/mse' --reason "a better head"
    python slurm/nightly.py --bisect n4/loss --night FOLDER       for git bisect run

Trunk, data, cluster and image are those of the site file (slurm/submit.py init). Exit codes of
submitting: 0 submitted, or left out as another night goes on; 69 no Slurm answers; 75 the queue is
full; 78 something asked for is wrong. Of --local and report: 0 passed or improved, 1 regressed,
3 incomplete, 4 no baseline yet.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from job.common.errors import InputError
from job.common.version import commit
from job.nightly.baseline import FOLDER as BASELINES
from job.nightly.baseline import accept
from job.nightly.figures import FIGURES, Rule, result
from job.nightly.matrix import load_matrix
from job.nightly.record import Finding, NightFolder, Plan, PlannedRun, judged
from slurm.arguments import Parser
from slurm.night import alone, find_night, new_night
from slurm.night_jobs import arrays, collect, scripts, submit_night
from slurm.night_local import run_here
from slurm.night_plan import NightRun, gpu_hours, plan_runs
from slurm.plan import write_config
from slurm.record import Record
from slurm.scheduler import outside_of_jobs
from slurm.site import find_site
from slurm.submission import PROJECT, store
from slurm.telling import Channels

_SKIP = 125  # what `git bisect run` takes for: cannot be tested
_CRON_PATH = ("/usr/bin", "/bin")
_WHEN = "17 2 * * *"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(list(sys.argv[1:] if arguments is None else arguments))
    os.chdir(PROJECT)  # what a configuration names relative to it, cron finds too
    for asked, action in (
        (options.command == "report", _report),
        (options.command == "accept", _accept),
        (options.install_line, _install_line),
        (options.bisect is not None, _bisect),
        (options.dry_run, _dry_run),
        (options.local, _local),
    ):
        if asked:
            action(options)
            return
    _submit(options)


def _options(given: Sequence[str]) -> Namespace:
    parser = Parser(
        prog="nightly.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("command", nargs="?", choices=("report", "accept"), help="of a night that is over")
    add("figure", nargs="?", help="for accept: ENTRY/FIGURE, or a pattern of it")
    add("--reason", metavar="TEXT", help="for accept: why the figure is right as it is now")
    add("--matrix", metavar="NAME", help="in configs/nightly, or a file (standard; small if local)")
    add("--only", nargs="+", metavar="ENTRY", help="these entries of it")
    add("--folder", type=Path, metavar="DIR", help="of the nights (runs/nightly)")
    add("--baseline", type=Path, metavar="DIR", help="of baselines (configs/nightly/baseline)")
    add("--night", metavar="NUMBER", help="or its folder; the last one that was judged")
    add("--site", metavar="FILE", help="what `submit.py init` has written (your own)")
    add("--cluster", metavar="NAME", help="a profile in configs/cluster, or a file (the site's)")
    add("--image", metavar="FILE", help="critic.sif, or none (the site's, or the profile's)")
    add("--webhook", metavar="URL", help="is sent the summary as JSON")
    add("--mail", metavar="ADDRESS", help="is sent the summary, where there is sendmail")
    add("--local", action="store_true", help="run it here, without Slurm, and judge it")
    add("--dry-run", action="store_true", help="show everything, submit nothing")
    add("--install-line", action="store_true", help="print the line for crontab, and for scrontab")
    add("--bisect", metavar="FIGURE", help="0: as it was; 1: as in that night; 125: cannot tell")
    options = parser.parse_args(given)
    options.folder = (options.folder or PROJECT / "runs" / "nightly").absolute()
    options.baseline = (options.baseline or BASELINES).absolute()
    options.matrix = _whole(options.matrix) or ("small" if options.local else "standard")
    options.site, options.cluster = _whole(options.site), _whole(options.cluster)
    options.image = options.image if options.image == "none" else _file(options.image)
    return options


def _whole(named: str | None) -> str | None:
    """A file that is named as such, from wherever this was called."""
    is_file = named is not None and Path(named).suffix == ".yaml"
    return _file(named) if is_file else named


def _file(named: str | None) -> str | None:
    return None if named is None else str(Path(named).absolute())


# A night


def _planned(
    options: Namespace, night: NightFolder
) -> tuple[list[NightRun], Plan, tuple[int, float]]:
    """The runs, the plan that is kept of them, and what Slurm is told of their importance."""
    matrix, entries = load_matrix(options.matrix)
    if unknown := [name for name in options.only or () if name not in entries]:
        raise InputError(f"--only {unknown[0]}: no such entry; there are {', '.join(entries)}")
    wanted = {name: one for name, one in entries.items() if name in (options.only or entries)}
    for entry in wanted.values():
        entry.same_as = entry.same_as if entry.same_as in wanted else None
    runs = plan_runs(options, matrix, wanted, night)
    name = Path(options.matrix).stem
    planned = [run.planned() for run in runs]
    plan = Plan(night.number, name, commit(), time.time(), wanted, planned, sys.executable)
    return runs, plan, (matrix.nice, matrix.deadline_hours)


def _prepare(night: NightFolder, runs: Sequence[NightRun], baselines: Path) -> None:
    """What the jobs find: configurations, records and the baselines of this checkout."""
    for run in runs:
        if run.plan is None or run.refused is not None:
            continue
        write_config(run.plan.runs[0])
        record = Record(run.path)
        store(run.plan.submission, record)
        record.start_status(state="pending", submitted=time.time())
    if baselines.exists():
        shutil.copytree(baselines, night.baselines)


def _submit(options: Namespace) -> None:
    with alone(options.folder):
        night = new_night(options.folder)
        try:
            runs, plan, (nice, hours) = _planned(options, night)
            of_night = arrays(runs, nice, hours, night)
            _prepare(night, runs, options.baseline)
            night.write_plan(plan)
            channels = Channels(options.webhook, options.mail)
            jobs, collector = submit_night(of_night, night, channels)
        except BaseException:
            shutil.rmtree(night.path, ignore_errors=True)
            raise
        planned = [run.planned(jobs.get(run.path)) for run in runs]
        for path, job in jobs.items():
            Record(path).add_job(job)
        night.write_plan(_with(plan, planned, collector))
    left_out = sum(run.refused is not None for run in runs)
    more = f"; {left_out} of {len(runs)} runs could not be" if left_out else ""
    print(f"submitted: {night.path}, judged by job {collector}{more}")


def _with(plan: Plan, runs: list[PlannedRun], collector: str | None) -> Plan:
    return replace(plan, runs=runs, collector=collector)


def _dry_run(options: Namespace) -> None:
    night = NightFolder(options.folder / "night-000000")
    runs, plan, (nice, hours) = _planned(options, night)
    for run in runs:
        told = run.refused or f"{run.entry.nodes} x {run.entry.gpus} GPU(s)"
        print(f"{run.path.name:24} {run.entry.kind.value:10} {told}")
    print(f"{plan.matrix}: {len(runs)} runs, {gpu_hours(runs):,.1f} GPU-hours at most")
    if not options.local:
        for text in scripts(arrays(runs, nice, hours, night)):
            print(f"\n{text}")


def _local(options: Namespace) -> None:
    with alone(options.folder):
        night = new_night(options.folder)
        try:
            runs, plan, _ = _planned(options, night)
        except BaseException:
            shutil.rmtree(night.path, ignore_errors=True)
            raise
        _prepare(night, runs, options.baseline)
        night.write_plan(plan)
        for run in runs:
            if run.refused is None:
                began = time.monotonic()
                how = run_here(run)
                seconds = time.monotonic() - began
                print(f"{run.path.name:24} {seconds:5.0f} s  {how}", flush=True)
        submission = next(run.plan.submission for run in runs if run.plan is not None)
        code = collect(night, submission, Channels(options.webhook, options.mail))
    print(f"{night.path}/summary.md, index.html, junit.xml, record.json")
    sys.exit(code)


# Afterwards


def _report(options: Namespace) -> None:
    night = find_night(options.folder, options.night)
    judged_night = night.night()
    print((night.path / "summary.md").read_text(encoding="utf-8"), end="")
    sys.exit(judged_night.verdict.exit_code)


def _accept(options: Namespace) -> None:
    if not options.figure or not options.reason:
        raise InputError("accept: which FIGURE, and --reason TEXT: nothing moves without one")
    folder = find_night(options.folder, options.night)
    night = folder.night()
    earlier = list(judged(folder.path.parent, night.plan.matrix, night.number))
    taken, refused = accept(options.baseline, night, earlier, options.figure, options.reason)
    for file, names in taken.items():
        print(f"{file}: {len(names)} figure(s): {', '.join(names)}")
    for one in refused:
        print(f"not yet: {one}")
    print("commit this file, so that the next night has it")


def _install_line(options: Namespace) -> None:
    load_matrix(options.matrix)
    words = [sys.executable, "slurm/nightly.py", "--matrix", options.matrix]
    words += ["--folder", str(options.folder)]
    if options.baseline != BASELINES:
        words += ["--baseline", str(options.baseline)]
    if options.site is None and (own := find_site(None).file) is not None:
        options.site = str(own)  # which cron, without HOME, would not find
    for name in ("site", "cluster", "image", "webhook", "mail"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name}", value]
    variables = {"SLURM_CONF": os.environ.get("SLURM_CONF"), "PATH": _path()}
    named = [f"{key}={shlex.quote(value)}" for key, value in variables.items() if value]
    command = " ".join([*named, shlex.join(words)])
    where, log = shlex.quote(str(PROJECT)), shlex.quote(f"{options.folder}/cron.log")
    line = f"{_WHEN} mkdir -p {shlex.quote(str(options.folder))} && cd {where} && {command}"
    line = f"{line} >> {log} 2>&1".replace("%", r"\%")  # which cron takes for the end of a line
    print(f"# crontab -e\n{line}\n\n# scrontab -e\n#SCRON --time=15 --mem=2G\n{line}")


def _path() -> str | None:
    """A PATH for cron, where sbatch is not in the one that it gives."""
    found = shutil.which("sbatch")
    folder = str(Path(found).parent) if found else None
    if folder is None or folder in _CRON_PATH:
        return None
    return ":".join([folder, *_CRON_PATH])


def _bisect(options: Namespace) -> None:
    """Run one entry here as that night ran it, and say on which side its figure lies."""
    try:
        with outside_of_jobs():
            sys.exit(_side(options))
    except InputError as error:
        print(f"cannot be tested: {error}", file=sys.stderr)
        sys.exit(_SKIP)


def _side(options: Namespace) -> int:
    folder = find_night(options.folder, options.night)
    night = folder.night()
    entry, _, figure = options.bisect.partition("/")
    found = night.found(entry, figure)
    if found is None or found.before is None:
        raise InputError(f"night {night.number} holds nothing against {options.bisect}")
    options.local, options.image = True, "none"  # the checkout's code, not an image's
    with tempfile.TemporaryDirectory() as scratch:
        place = NightFolder(Path(scratch, "night-000001"))
        place.path.mkdir()
        matrix, _ = load_matrix(night.plan.matrix)
        runs = plan_runs(options, matrix, {entry: night.plan.entries[entry]}, place)
        _prepare(place, runs, options.baseline)
        for run in runs:
            run_here(run)
        here = result(_with(night.plan, [run.planned() for run in runs], None), entry)
    if not here.complete or figure not in here.figures:
        raise InputError(here.reason or f"{entry} has no {figure} here")
    return _nearer(found, here.figures[figure])


def _nearer(found: Finding, value: object) -> int:
    """1 if a value is as in the night that regressed, 0 if it is as before."""
    if FIGURES[found.figure].rule is not Rule.SERIES:
        return int(value != found.before)
    assert isinstance(value, float)
    return int(abs(value - found.value) < abs(value - found.before))
