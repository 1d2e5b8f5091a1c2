"""Submit the training of a critic to Slurm, and look after it.

    python slurm/submit.py init                      once: your trunk, data, cluster and image
    python slurm/submit.py --gpus 4 --unfreeze 4
    python slurm/submit.py --gpus 4 --unfreeze 4 --override model.path=TRUNK \\
        data.train=train.jsonl data.validation=val.jsonl
    python slurm/submit.py --gpus 1 --unfreeze 0 1 2 4 --name depth     a sweep: one job array
    python slurm/submit.py --gpus 4 --nodes 2 --cluster a100-40gb --time 12:00:00 --watch
    python slurm/submit.py --gpus 4 --dry-run        all checks and the script; submits nothing
    python slurm/submit.py --resume runs/RUN         go on with a run that has ended
    python slurm/submit.py status runs/RUN [--watch] [--json]
    python slurm/submit.py logs runs/RUN [--rank 2] [--follow]
    python slurm/submit.py cancel runs/RUN

The job comes back by itself after preemption, its time limit, or the loss of a node. Exit codes:
0 done; 1 (of `status`) the run has failed, was cancelled or is lost; 69 no Slurm answers; 78
something asked for is wrong, and nothing was submitted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from job.common.config import add_verify, refuse_undecodable
from job.common.errors import Ending, Exit, InputError, file_error, listing
from job.memory.fit import as_dict, component_table, footprint_columns, verdicts
from job.memory.footprint import Setting, footprint
from slurm import scheduler
from slurm.arguments import Parser
from slurm.checks import Check, check, memory_setting
from slurm.init import add_options, set_up
from slurm.plan import Plan, Run, describe, make_plan, write_config
from slurm.record import Record
from slurm.status import log_file, runs_of, standing, standings
from slurm.submission import script, store, submit
from slurm.supervisor import Supervisor
from slurm.watch import page, watch

FOLLOW_SECONDS = 2.0
A100_40GB, A100_80GB = 42_300_000_000, 85_000_000_000  # bytes that their drivers give
_INIT = """Set your site up, once: what all your runs share, below what each configuration says
itself. On a terminal it asks for what no option gives."""
_STYLES = {"ok": "green", "warning": "yellow", "error": "red", "not checked": "dim"}
_console = Console(stderr=True)


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    refuse_undecodable(given)
    commands = {"init": _init, "status": _status, "logs": _logs, "cancel": _cancel}
    if given and given[0] in commands:
        commands[given[0]](given[1:])
    else:
        _submit(_options(given))


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="submit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--gpus", type=int, metavar="N", help="GPUs per node (1)")
    add("--nodes", type=int, metavar="N", help="nodes (1)")
    add("--unfreeze", type=int, nargs="+", metavar="N", help="blocks to train; several: a sweep")
    add("--config", metavar="FILE", help="default: critic_1gpu.yaml, or critic_4gpu.yaml for more")
    add("--override", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    add("--site", metavar="FILE", help="what `submit.py init` has written (your own)")
    add("--cluster", metavar="NAME", help="a profile in configs/cluster, or a file (the site's)")
    add("--name", help="of the run; time is added to it")
    add("--time", metavar="LIMIT", help="of one attempt, as sbatch reads it (the profile's)")
    add("--image", metavar="FILE", help="critic.sif, or none (the site's, or the profile's)")
    add("--resume", metavar="RUN", help="submit a run again, to go on where it stands")
    add("--after", metavar="JOB", help="start when this job (or run) has ended well")
    add_verify(parser)
    add("--dry-run", action="store_true", help="check and show everything, submit nothing")
    add("--watch", action="store_true", help="follow it; leaving does not touch the job")
    add("--json", action="store_true", help="the result as JSON on stdout")
    return parser.parse_args(given)


def _submit(options: argparse.Namespace) -> None:
    plan = make_plan(options)
    for run in plan.runs:
        if Record(run.folder).submission.exists():
            _refuse_active(run)
    checks = list(check(plan))
    memory = _memory(plan)
    result = describe(plan) | {"checks": [vars(one) for one in checks]}
    result["memory"] = [as_dict(setting, _capacities(plan)) for setting in memory]
    if options.dry_run:
        result["script"] = script(plan.submission, len(plan.runs))
    if not options.json:
        _show(result, checks)
    if options.dry_run and not options.json:
        _show_memory(plan, memory)
    if errors := [f"{one.name}: {one.text}" for one in checks if one.state == "error"]:
        _print_json(result, options.json)
        raise InputError("nothing was submitted" + listing(errors))
    if options.dry_run:
        _print_json(result, options.json)
        return
    result["job_ids"] = _send(plan)
    _print_json(result, options.json)
    if not options.json:
        here = f"submit.py status {plan.folder} --watch"
        text = f"submitted: job {', '.join(result['job_ids'])}\n{here}"
        _say(text)
    if options.watch:
        watch([run.folder for run in plan.runs], _console)


def _memory(plan: Plan) -> list[Setting]:
    """The memory settings of the plan's runs, where they can be known."""
    found = []
    for run in plan.runs:
        with contextlib.suppress(InputError):  # it is among the checks
            setting = memory_setting(plan, run.config)
            found += [] if setting is None else [setting]
    return found


def _capacities(plan: Plan) -> list[int]:
    """The profile's GPUs, and the two sizes of A100."""
    return sorted({A100_40GB, A100_80GB, *([plan.gpu_bytes] if plan.gpu_bytes else [])})


def _show_memory(plan: Plan, memory: Sequence[Setting]) -> None:
    for setting in memory:
        n, tokens = setting.num_unfrozen_layers, setting.micro_batch_tokens
        title = f"memory of each of {plan.world_size} GPU(s), N={n}, {tokens:,} tokens"
        _console.print(component_table(title, footprint_columns(footprint(setting))))
        for line in verdicts(setting, _capacities(plan)):
            _say(line)


def _refuse_active(run: Run) -> None:
    """Two jobs of one run would only push each other aside."""
    now = standing(run.folder)
    if now.job_id is not None and not now.is_final:
        raise InputError(f"{run.folder}: its job {now.job_id} is {now.state}; cancel it first")


def _show(result: dict[str, Any], checks: Sequence[Check]) -> None:
    title = Text(result["run"])
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    for one in checks:
        state, text = Text(one.state, _STYLES[one.state]), Text(one.text, overflow="fold")
        table.add_row(one.name, state, text)
    _console.print(table)
    if "script" in result:
        _say(f"\n{result['script']}")


def _print_json(result: dict[str, Any], wanted: bool) -> None:
    if wanted:
        print(json.dumps(result, indent=2))


def _send(plan: Plan) -> list[str]:
    """Write what the job needs, and submit it; if that fails, nothing of it stays."""
    records = [Record(run.folder) for run in plan.runs]
    new = [one for one in (plan.folder, *(r.folder for r in records)) if not one.exists()]
    with contextlib.ExitStack() as held:
        try:
            for record in records:
                held.enter_context(record.being_submitted())
        except OSError as error:
            raise file_error(error, f"{plan.folder}: cannot write: {error.strerror}") from None
        for run, record in zip(plan.runs, records, strict=True):
            if record.submission.exists():  # also by a submission that was at it until now
                _refuse_active(run)
        return _send_held(plan, records, new)


def _send_held(plan: Plan, records: Sequence[Record], new: Sequence[Path]) -> list[str]:
    """What `_send` does once no other submission is at these runs; `new` folders are its own."""
    before = {file: file.read_bytes() for r in records for file in r.prepared if file.exists()}
    try:
        for run in plan.runs:
            _prepare(plan, run)
        supervisors = [Supervisor(str(run.folder), plan.submission) for run in plan.runs]
        ids = submit(supervisors, plan.submission)
    except (Ending, OSError) as error:  # at Ctrl-C there may be a job already
        for folder in new:
            shutil.rmtree(folder, ignore_errors=True)
        for file, content in before.items():
            file.write_bytes(content)
        if isinstance(error, OSError):
            raise file_error(error, f"{plan.folder}: cannot write: {error.strerror}") from None
        raise
    for record, job_id in zip(records, ids, strict=True):
        record.add_job(job_id)
    return ids


def _prepare(plan: Plan, run: Run) -> None:
    """What the job finds when it starts, which may be before sbatch has returned."""
    write_config(run)
    record = Record(run.folder)
    store(plan.submission.of_one_run(), record)
    record.cancelled.unlink(missing_ok=True)
    record.start_status(state="pending", submitted=time.time())
    record.add_event("submitted")


def _init(given: Sequence[str]) -> None:
    parser = Parser(prog="submit.py init", description=_INIT)
    add_options(parser)
    on_terminal = sys.stdin is not None and sys.stdin.isatty()
    try:
        set_up(parser.parse_args(given), _ask if on_terminal else None, _say)
    except (EOFError, KeyboardInterrupt):  # of a person at a question
        raise InputError("left before the end") from None


def _ask(question: str) -> str:
    print(question, end="", file=sys.stderr, flush=True)
    return input().strip()


def _say(text: str) -> None:
    _console.print(text, markup=False, highlight=False, soft_wrap=True)


def _run_options(name: str, given: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=f"submit.py {name}")
    parser.add_argument("run", type=Path, help="a run directory, or a sweep's")
    if name == "logs":
        parser.add_argument("--rank", type=int, default=0)
        parser.add_argument("--follow", action="store_true")
    if name == "status":
        parser.add_argument("--watch", action="store_true")
    if name != "logs":
        parser.add_argument("--json", action="store_true")
    return parser.parse_args(given)


def _status(given: Sequence[str]) -> None:
    options = _run_options("status", given)
    runs = runs_of(options.run.absolute())
    shown = watch(runs, _console) if options.watch else standings(runs)
    if options.json:
        print(json.dumps([one.to_dict() for one in shown], indent=2))
    elif not options.watch:
        _console.print(page(shown))
    if any(one.is_bad for one in shown):
        sys.exit(Exit.CRASHED)


def _logs(given: Sequence[str]) -> None:
    options = _run_options("logs", given)
    record = Record.of(options.run.absolute())
    file = log_file(record, options.rank)
    if file is None or not file.exists():
        raise InputError(f"{options.run}: rank {options.rank} has written nothing yet")
    if options.follow:
        _follow(record, options.rank)
    else:
        print(file.read_text(encoding="utf-8", errors="replace"), end="")


def _follow(record: Record, rank: int) -> None:
    """Print what a rank writes until the run has ended, over all attempts to come."""
    with contextlib.suppress(KeyboardInterrupt):
        ended, file = False, None
        stream: TextIO = io.StringIO()
        while not ended:
            ended = standing(record.run).is_final
            newest = log_file(record, rank)
            print(stream.read(), end="", flush=True)
            if newest is not None and newest != file and newest.exists():
                stream.close()
                file, stream = newest, newest.open(encoding="utf-8", errors="replace")
                print(stream.read(), end="", flush=True)
            time.sleep(0 if ended else FOLLOW_SECONDS)
        stream.close()


def _cancel(given: Sequence[str]) -> None:
    options = _run_options("cancel", given)
    records = [Record(run) for run in runs_of(options.run.absolute())]
    for record in records:
        record.cancelled.touch()  # first: who is about to requeue it must see this
    cancelled = [
        _cancel_job(record, now.job_id)
        for record, now in zip(records, standings([one.run for one in records]), strict=True)
        if now.job_id is not None and not now.is_final
    ]
    if options.json:
        print(json.dumps({"cancelled": cancelled}))
    else:
        _console.print(f"cancelled: {', '.join(cancelled) or 'nothing was queued'}")


def _cancel_job(record: Record, job_id: str) -> str:
    scheduler.cancel(job_id)
    record.add_event("cancelled", job_id=job_id)
    return job_id
