"""Sets a site up: asks for what all runs of a user share, checks it, and writes it to a file."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from job.common.data_file import check_readable
from job.common.errors import InputError, listing
from job.common.nested import to_dict
from job.common.schema import EMBEDDED
from job.data.first_rows import first_bad_rows
from job.model.architecture_file import read_architecture
from slurm.cluster import load_profile
from slurm.plan import STANDARD_CLUSTER
from slurm.site import VARIABLE, SiteConfig, SiteData, find_site, impossible, site_file, write_site
from slurm.submission import PROJECT

_NONE, _PROFILE = "none", "profile"
_FIELDS = "{prompt: NAME, response: NAME, reward: NAME}, alpaca, or none"
Ask = Callable[[str], str]  # a question to a person on a terminal
Say = Callable[[str], None]


@dataclass(frozen=True)
class _Question:
    option: str
    key: str  # of the site file
    about: str
    read: Callable[[str], Any]  # the value that an answer means; InputError if it is none
    default: str | None = None  # None: an answer is needed


class _Option(_Question):
    """What is not asked for."""


def _whole(answer: str) -> str:
    """A path that means the same from everywhere; no shell has expanded what a person types."""
    return str(Path(os.path.expandvars(answer)).expanduser().absolute())


def _trunk(answer: str) -> str:
    folder = _whole(answer)
    read_architecture(folder)
    return folder


def _data(answer: str) -> str:
    if answer == EMBEDDED:
        return answer
    file = _whole(answer)
    check_readable(file)
    return file


def _fields(answer: str) -> Any:
    try:
        fields = None if answer == _NONE else yaml.safe_load(answer)
    except yaml.YAMLError:
        raise InputError(f"{answer}: write {_FIELDS}") from None
    return _possible(fields, SiteData(fields=fields))


def _fields_of(values: SiteConfig) -> Callable[[str], Any]:
    """`_fields`, of the files that `values` names already."""

    def read(answer: str) -> Any:
        fields = _fields(answer)
        for file in (values.data.train, values.data.validation):
            bad, looked_at = ([], 0) if file == EMBEDDED else first_bad_rows(str(file), fields)
            if looked_at and len(bad) == looked_at:  # some bad rows a configuration may skip
                raise InputError(f"{bad[0]}; write {_FIELDS}")
        return fields

    return read


def _template(answer: str) -> str | None:
    template = None if answer == _NONE else answer
    return _possible(template, SiteData(template=template))


def _possible(value: Any, data: SiteData) -> Any:
    if problems := list(impossible(SiteConfig(data=data))):
        raise InputError("; ".join(problems))
    return value


def _cluster(answer: str) -> str:
    profile = _whole(answer) if answer.endswith(".yaml") else answer
    load_profile(profile, "profile")
    return profile


def _image(answer: str) -> str | None:
    if answer == _PROFILE:
        return None
    if answer == _NONE:
        return answer
    file = _whole(answer)
    if not os.access(file, os.R_OK):
        raise InputError(f"cannot read {file}")
    return file


def _tracking(answer: str) -> str | None:
    return None if answer == _NONE else answer


_QUESTIONS = (
    _Question("trunk", "model.path", "trunk, the folder of a language model", _trunk),
    _Question("train", "data.train", "training data, a file", _data),
    _Question("validation", "data.validation", "validation data, a file", _data),
    _Question("fields", "data.fields", f"their fields, {_FIELDS}", _fields, _NONE),
    _Option("template", "data.template", "their template: chat, a text, or none", _template, _NONE),
    _Question(
        "cluster", "cluster", "cluster profile, a name or a file", _cluster, STANDARD_CLUSTER
    ),
    _Question(
        "image", "image", "image, a file, none, or profile (what that says)", _image, _PROFILE
    ),
    _Option("tracking-uri", "mlflow.tracking_uri", "MLflow's server, or none", _tracking, _NONE),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    for question in _QUESTIONS:
        parser.add_argument(f"--{question.option}", metavar="VALUE", help=question.about)
    where = f"the file to write (${VARIABLE}, or ~/.config/critic-job/site.yaml)"
    parser.add_argument("--site", metavar="FILE", help=where)
    parser.add_argument("--force", action="store_true", help="change a file that is there")


def set_up(options: argparse.Namespace, ask: Ask | None, say: Say) -> None:
    """Ask for what the options leave open, if there is somebody to ask, and write the site file.

    A file that is there gives the defaults.

    Raises:
        InputError: something is missing or wrong; then nothing is written.
    """
    file = _place(options.site)
    if os.access(file, os.F_OK) and not options.force and not _may_change(file, ask):
        say(f"{file} stays as it is")
        return
    write_site(file, _values(options, _before(file), ask, say))
    say(f"written: {file}\n\n{file.read_text(encoding='utf-8')}")
    say("from now on: python slurm/submit.py --gpus 4 --unfreeze 4")


def _values(
    options: argparse.Namespace, before: dict[str, str], ask: Ask | None, say: Say
) -> SiteConfig:
    given = {q.key: getattr(options, q.option.replace("-", "_")) for q in _QUESTIONS}
    defaults = {q.key: before.get(q.key, q.default) for q in _QUESTIONS}
    if ask is None:
        _refuse_gaps([q for q in _QUESTIONS if given[q.key] is None and defaults[q.key] is None])
    values = SiteConfig()
    for question in _QUESTIONS:
        key, asked = question.key, None if isinstance(question, _Option) else ask
        if key == "data.fields":
            question = replace(question, read=_fields_of(values))
        _set(values, key, _value(question, given[key], defaults[key], asked, say))
    if problems := list(impossible(values)):
        raise InputError("nothing was written" + listing(problems))
    return values


def _place(asked: str | None) -> Path:
    file = site_file(asked)
    if file is None:
        raise InputError(f"HOME is not set: name the site file with --site FILE or {VARIABLE}")
    if file.resolve().is_relative_to(PROJECT):
        raise InputError(f"{file}: in the checkout, which others may use; choose another --site")
    return file


def _may_change(file: Path, ask: Ask | None) -> bool:
    if ask is None:
        raise InputError(f"{file}: is there already; --force changes it")
    return ask(f"{file} is there already; change it? [y/N]: ").lower() in ("y", "yes")


def _before(file: Path) -> dict[str, str]:
    """What the file says so far, as a person would answer; nothing where it cannot be read."""
    found: dict[str, str] = {}
    with contextlib.suppress(InputError):
        tree = to_dict(find_site(str(file)).values)
        for key in (question.key for question in _QUESTIONS):
            section, _, name = key.rpartition(".")
            value = (tree.get(section, {}) if section else tree).get(name)
            if value is not None:
                found[key] = value if isinstance(value, str) else json.dumps(value)
    return found


def _refuse_gaps(gaps: list[_Question]) -> None:
    if gaps:
        missing = ", ".join(f"--{question.option}" for question in gaps)
        raise InputError(f"no terminal to ask on: {missing} must be given")


def _value(
    question: _Question, given: str | None, default: str | None, ask: Ask | None, say: Say
) -> Any:
    """What an option says, or the answer of a person, who is asked until there is a good one."""
    if given is None and ask is not None:
        return _answer(question, default, ask, say)
    try:
        return question.read(given or default or "")
    except InputError as error:
        raise InputError(f"--{question.option}: {error}") from None


def _answer(question: _Question, default: str | None, ask: Ask, say: Say) -> Any:
    shown = "" if default is None else f" [{default}]"
    while True:
        if said := ask(f"{question.about}{shown}: ") or default:
            try:
                return question.read(said)
            except InputError as error:
                say(str(error))


def _set(values: SiteConfig, key: str, value: Any) -> None:
    section, _, name = key.rpartition(".")
    setattr(getattr(values, section) if section else values, name, value)
