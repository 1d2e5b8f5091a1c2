"""Judge a critic by what it is used for: to choose among solutions, and to find their errors.

    python -m job.evaluate --critic runs/critic --data solutions.jsonl --answer '####\\s*(.*)'
    python -m job.evaluate --values values.parquet --data solutions.jsonl
    python -m job.evaluate --values values.parquet

Values are those of a file that job.score wrote, or are written first, by a critic, for the data.
From values alone: best-of-n and pass@n against random choice, the shortest solution, one of the
same length and an oracle, for n = 1 to 64; how many solutions an error needs; pairs along the way;
calibration after a temperature. With the data: majorities of the answers, which a column
(--fields '{answer: NAME}') or a pattern (--answer) gives, the one right of four by part, and the
first wrong step where the data has steps (--fields processbench, for instance).

Writes evaluation.json and evaluation.html to --out; for a run that is RUN/evaluations/NAME, and
its report shows them too.
"""

from __future__ import annotations

if __name__ == "__main__":  # a signal during the imports must not kill the process
    from job.common.signals import install_handlers

    install_handlers()

import argparse
import functools
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from job.common.config import add_verify, command_line
from job.common.data_file import check_readable, described, one_or_all
from job.common.errors import InputError, file_error, run_and_leave
from job.common.files import check_place, write_atomic
from job.common.possible_values import impossible_fields, impossible_range
from job.common.progress import set_up_logging
from job.common.schema import EMBEDDED, BadRows, DataConfig
from job.evaluation.reading import (
    Data,
    answers_found,
    first_bad,
    named_parts,
    read_solutions,
)
from job.evaluation.steps import parts_with_steps
from job.evaluation.summary import ERRORS, Summary, summarise, tables
from job.run.evaluations import (
    DATA,
    FILE,
    Evaluation,
    data_place,
    evaluation_folder,
    evaluation_section,
)
from job.run.html import document

if TYPE_CHECKING:
    from job.run.trained import TrainedCritic

_PAGE, _VALUES = "evaluation.html", "values.parquet"


def _options() -> argparse.Namespace:
    parser = command_line(__doc__ or "", of_a_critic=True, required=False)
    parser.add_argument("--values", type=Path, metavar="FILE", help="what job.score has written")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="as for training")
    parser.add_argument("--fields", help="as data.fields; default: the run's, or none")
    parser.add_argument("--reward-range", nargs=2, type=float, metavar=("LOW", "HIGH"))
    parser.add_argument("--answer", metavar="REGEX", help="its last match is a solution's answer")
    about = "the part whose first errors choose the threshold; default: the first"
    parser.add_argument("--tune-on", metavar="PART", help=about)
    about = f"how rarely a choice may be wrong; default: {' '.join(map(str, ERRORS))}"
    parser.add_argument("--error", nargs="+", type=float, default=ERRORS, help=about)
    parser.add_argument("--logits", action="store_true", help="the values only rank (--values)")
    about = "a folder; default: in the run, or beside the values"
    parser.add_argument("--out", type=Path, metavar="DIR", help=about)
    add_verify(parser)
    return _checked(parser.parse_args())


def _checked(options: argparse.Namespace) -> argparse.Namespace:
    """The options, parsed further, if they fit each other."""
    if (options.values is None) == (options.critic is None):
        raise InputError("give either --critic and --data, or --values")
    if options.critic is not None and options.data is None:
        raise InputError("--critic: name the solutions with --data")
    if options.values is not None and not options.values.is_file():
        raise InputError(f"{options.values}: no such file; job.score writes values")
    for problem in _without_effect(options):
        raise InputError(problem)
    if wrong := [error for error in options.error if not 0 <= error < 1]:
        raise InputError(f"--error {wrong[0]:g}: a share from 0 to 1")
    options.fields = _fields(options.fields)
    if wrong_range := list(impossible_range(options.reward_range, options.fields)):
        raise InputError("; ".join(wrong_range))
    options.answer = _pattern(options.answer)
    options.data = options.data and one_or_all(options.data)
    if options.data == EMBEDDED:
        raise InputError("--data embedded: an evaluation takes files")
    options.out = options.out or _folder(options)
    check_place(options.out, "--out")
    return options


def _without_effect(options: argparse.Namespace) -> Iterator[str]:
    """What is wrong with options that would change nothing."""
    if options.data is None:
        for name in _given_of(options, "answer", "fields", "reward_range", "tune_on"):
            yield f"{name}: it is about the data; name it with --data"
    if options.values is not None:
        for name in _given_of(options, "trunk", "override", "verify"):
            yield f"{name}: it is about a critic, and with --values none is used"
    elif options.logits:
        yield "--logits: it is about --values; of a critic, its run says whether values only rank"


def _given_of(options: argparse.Namespace, *names: str) -> Iterator[str]:
    given = (name for name in names if getattr(options, name) not in (None, False, []))
    return (f"--{name.replace('_', '-')}" for name in given)


def _fields(text: str | None) -> Any:
    try:
        fields = None if text is None else yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--fields {text}: {error}") from None
    if problems := list(impossible_fields(fields)):
        raise InputError("; ".join(problems))
    return fields


def _pattern(text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise InputError(f"--answer {text}: {error}") from None


def _folder(options: argparse.Namespace) -> Path:
    """Where the evaluation of a run, or of values, is written if nothing else is said."""
    if options.values is not None:
        found: Path = options.values.with_name(f"{options.values.name}.evaluation")
        return found
    if (
        not (options.critic / "config.yaml").is_file()
        or not (options.critic / "checkpoints").is_dir()
    ):
        raise InputError(f"{options.critic}: not a run; say with --out where to write")
    return evaluation_folder(options.critic, described(options.data))


def _scored(options: argparse.Namespace) -> tuple[Path, Data, bool] | None:
    """Values of the critic, the data they belong to, and whether they only rank.

    None on ranks other than the first, which are done.
    """
    from job.run.trained import TrainedCritic
    from job.training.scoring import score

    given = {"fields": options.fields, "reward_range": options.reward_range}
    own = [f"data.{key}={json.dumps(value)}" for key, value in given.items() if value is not None]

    @functools.cache
    def find() -> TrainedCritic:
        return TrainedCritic.find(options.critic, options.trunk, [*options.override, *own])

    values = options.out / _VALUES

    def checked() -> TrainedCritic:
        kept, data = _of_tokens(find()), _data(options, find().config.data)
        _check_names(data, _data(options, kept.config.data))
        if options.tune_on is not None:
            _check_part(options.tune_on, named_parts(data))
        return kept

    if not score(checked, options.data, values, verify=options.verify):
        return None
    config = find().config
    return values, _data(options, config.data), config.objective.ranks_only


def _data(options: argparse.Namespace, config: DataConfig) -> Data:
    return Data(options.data, config.fields, config.reward_range, options.answer)


def _check_names(data: Data, kept: Data) -> None:
    """Refuse, before anything is scored, names of the evaluation's own that are not there.

    Args:
        kept: `data` without those names.
    """
    if data != kept and first_bad(kept) is None and (wrong := first_bad(data)) is not None:
        place, row = wrong
        raise InputError(f"--fields: {place.file}:{place.line}: {row.reason}")


def _of_tokens(trained: TrainedCritic) -> TrainedCritic:
    """The critic as if nobody had named what changes no value: kept ones need not be made again.

    Where rows may be left out those names count, as a row without such a field is.
    """
    data = trained.config.data
    if data.bad_rows is BadRows.skip or not isinstance(data.fields, dict):
        return trained
    kept = {key: name for key, name in data.fields.items() if key not in ("answer", "part")}
    fields = kept if kept.keys() - {"preset"} else kept.get("preset")
    return replace(trained, config=replace(trained.config, data=replace(data, fields=fields)))


def _given(options: argparse.Namespace) -> tuple[Path, Data | None, bool]:
    data = None
    if options.data is not None:
        check_readable(options.data)
        data = Data(options.data, options.fields, options.reward_range, options.answer)
    return options.values, data, options.logits


def _write(folder: Path, summary: Summary, name: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / FILE, json.dumps(summary, indent=1, allow_nan=False) + "\n")
        body = evaluation_section(Evaluation(name, summary))
        write_atomic(folder / _PAGE, document(f"Evaluation: {name}", body))
    except OSError as error:
        raise file_error(error, f"{folder}: cannot be written: {error.strerror}") from None


def _check_part(part: str, parts: Collection[str]) -> None:
    """Raise InputError unless a part is one of those with labelled steps."""
    if not parts:
        raise InputError(f"--tune-on {part}: no solution has labelled steps")
    if part not in parts:
        named = ", ".join(sorted(name for name in parts if name)) or "one without a name"
        raise InputError(f"--tune-on {part}: no such part with labelled steps; there is {named}")


def main() -> None:
    options = _options()
    set_up_logging()
    found = _given(options) if options.critic is None else _scored(options)
    if found is None:
        return
    values, data, logits = found
    solutions = read_solutions(values, data)
    if not solutions:
        raise InputError(f"{values}: no solution has values")
    if options.tune_on is not None:
        _check_part(options.tune_on, parts_with_steps(solutions))
    if data is not None and data.has_answers:
        print(answers_found(solutions, data))
    summary = summarise(solutions, errors=options.error, tuned_on=options.tune_on, logits=logits)
    if options.data is not None:
        summary[DATA] = data_place(described(options.data))
    _write(options.out, summary, options.out.name.removesuffix(".evaluation"))
    console = Console(width=80)
    for table in tables(summary):
        console.print(table)
    print(f"page     {(options.out / _PAGE).resolve()}\nnumbers  {options.out / FILE}")


if __name__ == "__main__":
    run_and_leave(main)
