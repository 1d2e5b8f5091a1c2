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
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from job.common.errors import Ending, InputError, first_line
from job.common.version import commit, is_edited
from job.nightly.baseline import FOLDER as BASELINES
from job.nightly.baseline import accept
from job.nightly.matrix import Entry, Matrix, load_matrix
from job.nightly.record import NightFolder, Plan, Verdict, judged
from job.nightly.summary import markdown
from slurm.arguments import Parser
from slurm.night import alone, find_night, is_number, new_night, without_record
from slurm.night_bisect import side
from slurm.night_cron import install_lines, site_of
from slurm.night_jobs import COLLECTOR_HOURS, arrays, collect, scripts, submit_night
from slurm.night_local import run_here
from slurm.night_plan import NightRun, gpu_hours, plan_runs, prepare, reasons
from slurm.record import Record
from slurm.scheduler import ControllerAway, outside_of_jobs
from slurm.submission import PROJECT
from slurm.telling import Channels

_SKIP = 125  # what `git bisect run` takes for: cannot be tested


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
    add("--night", metavar="NUMBER", help="or its folder (the last one)")
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
    if options.baseline.exists() and not options.baseline.is_dir():
        raise InputError(f"--baseline {options.baseline}: no folder")
    options.matrix = _whole(options.matrix) or ("small" if options.local else "standard")
    options.site, options.cluster = _file(options.site), _whole(options.cluster)
    if options.night is not None and not is_number(options.night):
        options.night = _file(options.night)
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
    options: Namespace, night: NightFolder, *, asks_slurm: bool
) -> tuple[list[NightRun], Plan, tuple[int, float]]:
    """The runs, the plan that is kept of them, and what Slurm is told of their importance."""
    matrix, wanted = _wanted(options)
    runs = plan_runs(options, matrix, wanted, night, asks_slurm=asks_slurm)
    now, file = time.time(), Path(options.matrix)
    plan = Plan(
        night.number,
        file.stem,
        commit(),
        now,
        wanted,
        [run.planned() for run in runs],
        sys.executable,
        matrix_file=str(file) if file.suffix == ".yaml" else None,
        site=site_of(options),
        cluster=options.cluster,
        edited=is_edited(),
        deadline=None if options.local else now + 3600 * (matrix.deadline_hours + COLLECTOR_HOURS),
    )
    return runs, plan, (matrix.nice, matrix.deadline_hours)


def _wanted(options: Namespace) -> tuple[Matrix, dict[str, Entry]]:
    """The matrix, and its entries that are asked for."""
    matrix, entries = load_matrix(options.matrix)
    if unknown := [name for name in options.only or () if name not in entries]:
        raise InputError(f"--only {unknown[0]}: no such entry; there are {', '.join(entries)}")
    wanted = {name: one for name, one in entries.items() if name in (options.only or entries)}
    for entry in wanted.values():
        entry.same_as = entry.same_as if entry.same_as in wanted else None
    return matrix, wanted


def _prepare(night: NightFolder, runs: Sequence[NightRun], baselines: Path) -> None:
    """What the jobs find, and the baselines of this checkout."""
    prepare(runs)
    if baselines.exists():
        shutil.copytree(baselines, night.baselines)


def _submit(options: Namespace) -> None:
    with alone(options.folder):
        with new_night(options.folder) as night:
            runs, plan, (nice, hours) = _planned(options, night, asks_slurm=True)
            of_night = arrays(runs, nice, hours, night)
            _prepare(night, runs, options.baseline)
            night.write_plan(plan)
            channels = Channels(options.webhook, options.mail)
            note = partial(_note, night, plan, runs)
            jobs, collector = submit_night(of_night, night, channels, note)
        _note(night, plan, runs, jobs, collector)
    left_out = sum(run.refused is not None for run in runs)
    more = f"; {left_out} of {len(runs)} runs could not be" if left_out else ""
    print(f"submitted: {night.path}, judged by job {collector}{more}")


def _note(
    night: NightFolder,
    plan: Plan,
    runs: Sequence[NightRun],
    jobs: dict[Path, str],
    collector: str | None = None,
) -> None:
    """Keep which jobs there are: a later night waits for them, though this process is killed."""
    planned = [run.planned(jobs.get(run.path)) for run in runs]
    night.write_plan(replace(plan, runs=planned, collector=collector))
    for path, job in jobs.items():
        Record(path).add_job(job)


def _dry_run(options: Namespace) -> None:
    night = NightFolder(options.folder / "night-000000")
    try:
        runs, plan, (nice, hours) = _planned(options, night, asks_slurm=not options.local)
    except ControllerAway as away:
        print(f"Slurm was not asked whether it would take them: {away}")
        runs, plan, (nice, hours) = _planned(options, night, asks_slurm=False)
    for run in runs:
        asked = f"{run.entry.nodes} x {run.entry.gpus} GPU(s)"
        told = asked if run.refused is None else "cannot be submitted"
        print(f"{run.path.name:24} {run.entry.kind.value:10} {told}")
    for reason in reasons(runs):
        print(reason)
    print(f"{plan.matrix}: {len(runs)} runs, {gpu_hours(runs):,.1f} GPU-hours at most")
    if not options.local:
        for text in scripts(arrays(runs, nice, hours, night), night):
            print(f"\n{text}")


def _local(options: Namespace) -> None:
    with alone(options.folder):
        with new_night(options.folder) as night:
            runs, plan, _ = _planned(options, night, asks_slurm=False)
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
    folder = find_night(options.folder, options.night, judged=False)
    if folder.plan_file.exists() and not folder.record_file.exists():
        print(without_record(folder))
        sys.exit(Verdict.INCOMPLETE.exit_code)
    night = folder.night()
    print(markdown(night), end="")
    sys.exit(night.verdict.exit_code)


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
        print(f"not accepted: {one}")
    print("commit this file, so that the next night has it")


def _install_line(options: Namespace) -> None:
    """Print the line, with all that was asked for."""
    for other in ("reason", "night", "bisect", "dry_run"):
        if getattr(options, other):
            raise InputError(f"--{other.replace('_', '-')} is of no night that cron submits")
    _wanted(options)  # which says what is wrong with it now, not at night
    for text in install_lines(options):
        print(text)


def _bisect(options: Namespace) -> None:
    """Run one entry here as that night ran it, and say on which side its figure lies."""
    try:
        with outside_of_jobs():
            sys.exit(side(options))
    except Exception as error:  # whatever it is: 1 would say that this commit is bad
        text = str(error) if isinstance(error, Ending) else first_line(error, named=True)
        print(f"cannot be tested: {text}", file=sys.stderr)
        sys.exit(_SKIP)
