"""What figures are held against: files under version control, one a matrix and kind of machine.

Nothing but `nightly.py accept` writes them, with a reason. Free of torch.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeGuard

from job.common.errors import InputError, listing
from job.common.files import write_atomic
from job.nightly.figures import rule_of
from job.nightly.matrix import MATRICES
from job.nightly.record import Night, Result, Verdict, made
from job.nightly.table import FIGURES, Rule

FOLDER = MATRICES / "baseline"
VERSION = 1
LEAST_VALUES = 12  # of a noisy quality: four nights of three seeds
_MOST_NIGHTS = 7
_GO_ON = "series that have not moved go on; one named in full begins anew"


class BaselineError(InputError):
    """A baseline that is there and cannot be used."""


@dataclass(frozen=True)
class Accepted:
    """One figure's baseline.

    Attributes:
        value: of an exact figure.
        mean, spread, count: of a noisy one, over seeds.
        of_spread: how many values the spread is of, where they are others than those of the mean.
        since: nights that began earlier (seconds since 1970) do not count: of a series, and of a
            noisy figure whose level has been accepted anew.
    """

    commit: str | None
    reason: str
    when: str
    value: Any = None
    mean: float | None = None
    spread: float | None = None
    count: int = 0
    of_spread: int | None = None
    since: float | None = None

    @property
    def spread_count(self) -> int:
        return self.count if self.of_spread is None else self.of_spread


@dataclass(frozen=True)
class Baseline:
    """What is accepted on one kind of machine, by ENTRY/FIGURE."""

    key: dict[str, str]
    figures: dict[str, Accepted] = field(default_factory=dict)


def baseline_file(folder: Path, matrix: str, key: Mapping[str, str]) -> Path:
    """Where the baseline of a kind of machine is, or would be."""
    words = [
        re.sub(r"[^a-z0-9.+]+", "-", one.lower()).strip("-") for one in (matrix, *key.values())
    ]
    return folder / f"{'_'.join(words)}.json"


def load_baseline(folder: Path, matrix: str, key: dict[str, str]) -> Baseline:
    """The baseline of a kind of machine; empty if there is none yet.

    Raises:
        BaselineError: it is there, but damaged, of another version or of another machine.
    """
    file = baseline_file(folder, matrix, key)
    restore = f"restore it: git checkout -- configs/nightly/baseline/{file.name}"
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        version, of = stored["version"], stored["key"]
        if version == VERSION:
            figures = {name: _read(name, one) for name, one in stored["figures"].items()}
    except FileNotFoundError:
        return Baseline(key)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BaselineError(f"the baseline {file.name} is damaged; {restore}") from None
    if version != VERSION:
        text = f"the baseline {file.name} is of version {version}, and this code reads {VERSION}"
        raise BaselineError(f"{text}: check out the code that goes with it, or {restore}")
    if of != key:
        raise BaselineError(f"the baseline {file.name} is of another machine, {of}; {restore}")
    return Baseline(key, figures)


def _read(name: str, stored: dict[str, Any]) -> Accepted:
    """Raises TypeError where a value is missing, or is none that this figure can have."""
    one, figure = made(Accepted, stored), name.partition("/")[2]
    sound = one.since is None or _is_finite(one.since)
    if one.mean is not None or one.spread is not None:
        sound = sound and _is_level(one)
    elif figure in FIGURES and FIGURES[figure].rule is not Rule.SERIES:
        is_list = isinstance(one.value, list)
        sound = sound and _is_value(figure, one.value) and is_list == (figure == "loss")
    if not sound:
        raise TypeError
    return one


def _is_level(one: Accepted) -> bool:
    counts = [isinstance(count, int) and count > 1 for count in (one.count, one.spread_count)]
    return all(counts) and _is_finite(one.mean) and _is_finite(one.spread) and one.spread >= 0


def _is_value(figure: str, value: Any) -> bool:
    """Whether a figure can be this: a checksum is a text, others are numbers or lists of them."""
    if figure == "parameters":
        return isinstance(value, str)
    several = value if isinstance(value, list) else [value]
    return bool(several) and all(map(_is_finite, several))


def _is_finite(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def accept(
    folder: Path, night: Night, earlier: Sequence[Night], pattern: str, reason: str
) -> tuple[dict[Path, list[str]], list[str]]:
    """Make a night's figures the baseline.

    Returns:
        The figures in each file that was written, and why others of the pattern are not in any.

    Raises:
        InputError: no figure of this name can be accepted, or a file cannot be used.
    """
    known: dict[Path, Baseline] = {}
    taken: dict[Path, list[str]] = {}
    refused, going_on = [], []
    for result, name in _acceptable(night, pattern):
        key = result.key or {}
        file = baseline_file(folder, night.plan.matrix, key)
        if file not in known:
            known[file] = load_baseline(folder, night.plan.matrix, key)
        before = known[file].figures.get(f"{result.entry}/{name}")
        exactly = pattern == f"{result.entry}/{name}"
        accepted = _accepted([*earlier, night], result, name, before, reason, exactly)
        if accepted is None:
            going_on.append(f"{result.entry}/{name}")
        elif isinstance(accepted, str):
            refused.append(f"{result.entry}/{name}: {accepted}")
        else:
            known[file].figures[f"{result.entry}/{name}"] = accepted
            taken.setdefault(file, []).append(f"{result.entry}/{name}")
    if going_on:
        refused.append(f"{', '.join(going_on)}: {_GO_ON}")
    if not taken:
        _refuse(night, pattern, refused)
    for file in taken:
        _write(file, known[file])
    return taken, refused


def _refuse(night: Night, pattern: str, refused: Sequence[str]) -> None:
    if refused:
        raise InputError("nothing was accepted" + listing(refused))
    there = [f"{result.entry}/{name}" for result, name in _acceptable(night, "*")]
    listed = listing(there, 50) if there else ": none of its entries is complete"
    raise InputError(f"no figure {pattern} in night {night.number}; there are{listed}")


def _acceptable(night: Night, pattern: str) -> Iterator[tuple[Result, str]]:
    """Figures whose name is of the pattern, and which are held against a baseline."""
    for result in night.results.values():
        if result.complete and result.key is not None:
            for name in result.figures:
                judged = name in FIGURES and rule_of(result, name) is not Rule.SHOWN
                if judged and fnmatchcase(f"{result.entry}/{name}", pattern):
                    yield result, name


def _accepted(
    nights: Sequence[Night],
    result: Result,
    name: str,
    before: Accepted | None,
    reason: str,
    exactly: bool,
) -> Accepted | str | None:
    """The last night's figure as a baseline, or why it cannot be one yet; None for a series that
    goes on, as one of several (not `exactly` this one) that has not moved.
    """
    night, value = nights[-1], result.figures[name]
    if not _is_value(name, value):
        return f"it is {value}, and no number"
    when = time.strftime("%Y-%m-%d", time.gmtime())
    told = Accepted(result.commit or night.plan.commit, reason, when)
    if FIGURES[name].rule is Rule.SERIES:
        if exactly or has_moved(night, result, name):
            return replace(told, since=night.plan.began)
        return told if before is None else None
    if FIGURES[name].rule is not Rule.QUALITY or not isinstance(value, list):
        return replace(told, value=value)
    if before is not None and before.mean is not None and has_moved(night, result, name):
        return _level(told, before, value, night.plan.began)
    return _spread(told, nights, result, name, None if before is None else before.since)


def _level(told: Accepted, before: Accepted, values: list[float], began: float) -> Accepted:
    """A night's mean alone, as it has moved, with the spread that was known before."""
    told = replace(told, spread=before.spread, of_spread=before.spread_count)
    return replace(told, mean=statistics.mean(values), count=len(values), since=began)


def _spread(
    told: Accepted, nights: Sequence[Night], result: Result, name: str, since: float | None
) -> Accepted | str:
    """Mean and spread over some nights."""
    values = pooled(nights, result, name, since)
    if len(values) < LEAST_VALUES:
        return f"{len(values)} values so far; a spread takes {LEAST_VALUES}"
    mean, spread = statistics.mean(values), statistics.stdev(values)
    return replace(told, mean=mean, spread=spread, count=len(values), since=since)


def covered(nights: Sequence[Night], since: float | None) -> list[Night]:
    """The nights from the one on that began then, by their order: clocks jump.

    Where that one is not there any more, from the first on that began later.
    """
    began = [night.plan.began for night in nights]
    if since in began:
        return [*nights[began.index(since) :]]
    first = (k for k, moment in enumerate(began) if since is None or moment >= since)
    return [*nights[next(first, len(nights)) :]]


def has_moved(night: Night, like: Result, name: str) -> bool:
    """Whether a figure was found worse or better than what was accepted."""
    found = night.found(like.entry, name)
    return found is not None and found.verdict in (Verdict.REGRESSED, Verdict.IMPROVED)


def pooled(
    nights: Sequence[Night], like: Result, name: str, since: float | None = None
) -> list[float]:
    """The newest nights' values over seeds, on the same kind of machine.

    Those that have moved are left out, but for the one whose level was accepted (`since`).
    """
    level = [
        night
        for night in covered(nights, since)
        if night.plan.began == since or not has_moved(night, like, name)
    ]
    of_all = (night.results.get(like.entry) for night in level)
    same = [one.figures.get(name) for one in of_all if one and one.key == like.key]
    over_seeds = [one for one in same if isinstance(one, list) and _is_value(name, one)]
    return [value for values in over_seeds[-_MOST_NIGHTS:] for value in values]


def _write(file: Path, baseline: Baseline) -> None:
    content = {"version": VERSION, **asdict(baseline)}
    content["figures"] = dict(sorted(content["figures"].items()))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"{file}: cannot write: {error.strerror}") from None
