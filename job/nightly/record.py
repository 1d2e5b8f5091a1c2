"""What is kept of a night, as JSON in a folder of its own. Free of torch.

night-000012/
    plan.json     what was submitted: entries, runs, commit; before the night
    runs/         the run directories: ENTRY, or ENTRY-sSEED
    baseline/     the baselines of the checkout that submitted it
    record.json   what was measured, and the findings
    summary.md, junit.xml, index.html, told.json

Nights are ordered by their number, since clocks jump.
"""

from __future__ import annotations

import enum
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from job.common.errors import InputError
from job.common.files import write_atomic
from job.nightly.matrix import Entry, Kind

VERSION = 1
_NAME = re.compile(r"night-(\d{6,})$")
_Kept = TypeVar("_Kept")


class Verdict(enum.Enum):
    """Of a figure, an entry or a night, the gravest first."""

    REGRESSED = "regressed"
    INCOMPLETE = "incomplete"
    NO_BASELINE = "no baseline yet"
    IMPROVED = "improved"
    PASSED = "passed"

    @property
    def exit_code(self) -> int:
        return {"regressed": 1, "incomplete": 3, "no baseline yet": 4}.get(self.value, 0)


def gravest(verdicts: Sequence[Verdict]) -> Verdict:
    """Of none: passed."""
    order = list(Verdict)
    return min(verdicts, key=order.index, default=Verdict.PASSED)


@dataclass(frozen=True)
class PlannedRun:
    """One run of an entry; `refused` says why it was not submitted."""

    entry: str
    path: str
    seed: int
    config: str  # file that it is started with
    refused: str | None = None
    job_id: str | None = None


@dataclass(frozen=True)
class Plan:
    """A night as it was submitted.

    Attributes:
        matrix: its name, by which nights and baselines belong together.
        matrix_file: where it is no file of the project's own.
        site, cluster: what the site file and the profile were, where any was found or asked for.
        edited: whether the checkout had changes that are in no commit.
        deadline: by when its jobs have ended, in any case; None without Slurm.
    """

    number: int
    matrix: str
    commit: str | None
    began: float  # seconds since 1970
    entries: dict[str, Entry]
    runs: list[PlannedRun]
    python: str  # that submitted it
    collector: str | None = None  # its job
    matrix_file: str | None = None
    site: str | None = None
    cluster: str | None = None
    deadline: float | None = None  # seconds since 1970
    edited: bool = False
    version: int = VERSION


@dataclass(frozen=True)
class Result:
    """What an entry has left. An entry that is not complete has a reason.

    Attributes:
        key: kind of device, instruction set, torch and image; None where nothing trained.
        figures: numbers, lists of them (losses by step, quality by seed), or texts.
        notes: figures that could not be taken, and why.
        deterministic: whether the same code gives the same bits and allocations.
        chosen_by_memory: whether micro-batch or strategy were, by what was free: memory varies.
    """

    entry: str
    complete: bool
    reason: str | None = None
    key: dict[str, str] | None = None
    commit: str | None = None
    on_gpu: bool = False
    figures: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    deterministic: bool = True
    chosen_by_memory: bool = False


@dataclass(frozen=True)
class Finding:
    """The verdict on a figure, or on a whole entry where `figure` is empty.

    Attributes:
        text: what, and by how much.
        rule: how it was judged, with the rule's rate of false alarms.
        value, before: tonight's, and what it was held against, if that is of earlier nights.
        between: commits, the last good one and the first bad one.
        waits: more nights are needed, and nothing of a person.
        since: number of the first night after which a series has moved.
        held_from: of a series, the first night that was accepted: none before it is held against.
    """

    entry: str
    figure: str
    verdict: Verdict
    text: str
    rule: str = ""
    value: Any = None
    before: Any = None
    between: tuple[str, str] | None = None
    bisect: str | None = None
    waits: bool = False
    since: int | None = None
    held_from: int | None = None

    @property
    def name(self) -> str:
        return f"{self.entry}/{self.figure}" if self.figure else self.entry


@dataclass(frozen=True)
class Night:
    """A night as it was judged."""

    plan: Plan
    results: dict[str, Result]
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def number(self) -> int:
        return self.plan.number

    @property
    def verdict(self) -> Verdict:
        return gravest([one.verdict for one in self.findings if not one.waits])

    def found(self, entry: str, figure: str) -> Finding | None:
        named = (one for one in self.findings if (one.entry, one.figure) == (entry, figure))
        return next(named, None)


class NightFolder:
    """The folder of one night."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan_file, self.record_file = path / "plan.json", path / "record.json"
        self.baselines = path / "baseline"

    @property
    def number(self) -> int:
        match = _NAME.match(self.path.name)
        return int(match[1]) if match else 0

    def run(self, entry: str, seed: int, seeds: int) -> Path:
        name = entry if seeds == 1 else f"{entry}-s{seed}"
        return self.path / "runs" / name

    def write_plan(self, plan: Plan) -> None:
        write_atomic(self.plan_file, _text(plan))

    def plan(self) -> Plan:
        """Raises InputError if there is none that can be read."""
        return _read(self.plan_file, "submit a new night", _plan)

    def write(self, night: Night) -> None:
        write_atomic(self.record_file, _text(night))

    def night(self) -> Night:
        """Raises InputError if it was not judged, or cannot be read."""
        again = f"judge it again: {shlex.join(['python', '-m', 'job.nightly', str(self.path)])}"
        return _read(self.record_file, again, lambda stored: _night(self.plan(), stored))


def nights(folder: Path) -> list[NightFolder]:
    """Every night of a folder, the oldest first."""
    found = [NightFolder(path) for path in folder.glob("night-*") if _NAME.match(path.name)]
    return sorted(found, key=lambda one: one.number)


def judged(folder: Path, matrix: str, before: int) -> Iterator[Night]:
    """The nights of a matrix before this one that can be read, the oldest first."""
    for one in nights(folder):
        if one.number < before and one.record_file.exists():
            try:
                night = one.night()
            except InputError:  # its own report has told; it is no history
                continue
            if night.plan.matrix == matrix:
                yield night


def _text(content: Any) -> str:
    return json.dumps(asdict(content) | {"version": VERSION}, indent=1, default=_value) + "\n"


def _value(one: object) -> object:
    if isinstance(one, enum.Enum):
        return one.value
    raise TypeError(type(one).__name__)


def _read(file: Path, advice: str, build: Callable[[dict[str, Any]], _Kept]) -> _Kept:
    """What a file keeps. Raises InputError if it is not there, damaged or of another version."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        version = stored["version"]
        if version == VERSION:
            return build(stored)
    except FileNotFoundError:
        raise InputError(f"{file}: is not there; {advice}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{file}: damaged; {advice}") from None
    raise InputError(f"{file}: of version {version}, and this code reads {VERSION}")


def _plan(stored: dict[str, Any]) -> Plan:
    entries = {name: _entry(one) for name, one in stored["entries"].items()}
    runs = [made(PlannedRun, one) for one in stored["runs"]]
    return made(Plan, stored | {"entries": entries, "runs": runs})


def _entry(stored: dict[str, Any]) -> Entry:
    return made(Entry, stored | {"kind": Kind(stored["kind"])})


def _night(plan: Plan, stored: dict[str, Any]) -> Night:
    results = {name: made(Result, one) for name, one in stored["results"].items()}
    findings = [_finding(one) for one in stored["findings"]]
    kept = {"plan": plan, "results": results, "findings": findings, "notes": stored["notes"]}
    return made(Night, kept)


def _finding(stored: dict[str, Any]) -> Finding:
    good, bad = stored["between"] or (None, None)
    between = (good, bad) if stored["between"] else None
    return made(Finding, stored | {"verdict": Verdict(stored["verdict"]), "between": between})


def made(of: type[_Kept], values: dict[str, Any]) -> _Kept:
    """A dataclass of values that have its fields' kinds, or TypeError.

    Values that it has no field for are of newer code, and bisecting runs older one: they are left.
    """
    hints = get_type_hints(of)
    one = of(**{name: value for name, value in values.items() if name in hints})
    for name, value in vars(one).items():
        if not _is(value, hints[name]):
            raise TypeError(f"{of.__name__}.{name}: {type(value).__name__}")
    return one


def _is(value: object, hint: Any) -> bool:
    """Whether a value is of this kind; what is inside of lists and objects is not looked at."""
    of_union = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kinds = tuple(int | float if one is float else get_origin(one) or one for one in of_union)
    return Any in kinds or isinstance(value, kinds)
