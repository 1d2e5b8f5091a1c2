"""A night's results against baselines, predictions and earlier nights: its findings."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from job.nightly import rules, series
from job.nightly.baseline import (
    LEAST_VALUES,
    Baseline,
    BaselineError,
    covered,
    load_baseline,
    pooled,
)
from job.nightly.figures import rule_of
from job.nightly.record import Finding, Night, NightFolder, Plan, Result, Verdict
from job.nightly.table import BITS, FIGURES, Figure, Rule

LEAST_NIGHTS = series.LEAST_BEFORE + series.WINDOWS[0][0]
SECONDS_SHIFT = 0.2  # times vary more than speeds
_NO_BASELINE = "no baseline on this kind of machine"
_OF_SEEDS = "mean and spread of several seeds were accepted, and this is of one: accept it anew"
_EDITED = "one of the two checkouts was edited, and what moved it may be in no commit"
_TAKE_OUT = "take same_as out of the matrix, or training.deterministic=false and auto out of both"


@dataclass(frozen=True)
class Judged:
    """A figure on its way to a finding."""

    result: Result
    name: str
    accepted: Any  # its Accepted, or None
    nights: Sequence[Night]  # earlier ones, oldest first

    @property
    def value(self) -> Any:
        return self.result.figures[self.name]

    @property
    def figure(self) -> Figure:
        return FIGURES[self.name]

    @property
    def rule(self) -> Rule:
        return rule_of(self.result, self.name)

    @property
    def has_level(self) -> bool:
        """Whether mean and spread of several seeds were accepted."""
        return self.accepted is not None and self.accepted.mean is not None

    def finding(self, verdict: Verdict, text: str, rule: str, **more: Any) -> Finding:
        return Finding(self.result.entry, self.name, verdict, text, rule, self.value, **more)


def judge(
    folder: NightFolder, plan: Plan, results: dict[str, Result], nights: list[Night]
) -> Night:
    """The night as judged; `nights` are the earlier ones of its matrix, the oldest first."""
    findings: list[Finding] = []
    judged: list[Judged] = []
    notes = [*_moved(results, nights), *_left_out(plan, nights)]
    broken: set[str] = set()
    for result in map(_judgeable, results.values()):
        if not result.complete:
            text = result.reason or "without a word"
            findings.append(Finding(result.entry, "", Verdict.INCOMPLETE, text))
            continue
        baseline = _baseline(folder, plan, result, broken)
        judged += [_judged(result, name, baseline, nights) for name in result.figures]
        notes += _not_held(result, baseline)
        notes_of_figures = result.notes | _missing(
            result, baseline, nights, len(plan.entries[result.entry].seeds)
        )
        findings += [
            Finding(result.entry, name, Verdict.INCOMPLETE, text)
            for name, text in notes_of_figures.items()
        ]
        findings += _same_as(plan, result, results)
    findings += [Finding("baseline", "", Verdict.INCOMPLETE, text) for text in sorted(broken)]
    findings += [found for one in judged for found in _alone(one, plan, bool(broken))]
    findings += [*_qualities(judged, plan), *_series(judged, plan)]
    order = list(results)
    findings.sort(key=lambda one: order.index(one.entry) if one.entry in order else -1)
    found = [_located(one, folder, plan, results, nights) for one in findings]
    return Night(plan, results, found, notes)


def _judgeable(result: Result) -> Result:
    """Without figures that are no numbers, which are notes instead."""
    bad = {name: rules.unjudgeable(value) for name, value in result.figures.items()}
    notes = {name: text for name, text in bad.items() if text is not None}
    if result.figures.get("speed", 1) == 0:
        notes["speed"] = "it is 0: no time or no rate of matrix products was measured"
    if "memory_measured" in result.figures and "memory_predicted" not in result.figures:
        notes["memory_measured"] = "there is no prediction to hold it against"
    figures = {name: value for name, value in result.figures.items() if name not in notes}
    return replace(result, figures=figures, notes=result.notes | notes)


def _missing(
    result: Result, baseline: Baseline, nights: Sequence[Night], seeds: int
) -> dict[str, str]:
    """Figures that were accepted, or were there in the last night on this machine, and are not.

    Of several seeds no bits are told, which a single one may have had.
    """
    accepted = {name.partition("/")[2] for name in baseline.figures if _is_of(name, result)}
    earlier = [one for one in _earlier(result.entry, nights) if one.key == result.key]
    last = set(earlier[-1].figures) if earlier else set()
    told = {"was accepted": accepted, "was there in the last night": last - accepted}
    return {
        name: f"it {how}, and is missing"
        for how, names in told.items()
        for name in sorted(names)
        if name not in result.figures and name not in result.notes
        if name in FIGURES and FIGURES[name].rule is not Rule.SHOWN
        if seeds == 1 or name not in BITS
    }


def _not_held(result: Result, baseline: Baseline) -> Iterator[str]:
    """Figures that were accepted when they were the same each night, and are not any more."""
    names = [name for name in result.figures if f"{result.entry}/{name}" in baseline.figures]
    if free := [name for name in names if rule_of(result, name) is Rule.SHOWN]:
        why = "training.deterministic is false, or micro_batch_tokens auto"
        yield f"{result.entry}: accepted, and held against nothing ({why}): {', '.join(free)}"


def _is_of(name: str, result: Result) -> bool:
    return name.startswith(f"{result.entry}/")


def _earlier(entry: str, nights: Sequence[Night]) -> list[Result]:
    """What an entry has left in earlier nights in which it trained, the oldest first."""
    found = (night.results.get(entry) for night in nights)
    return [one for one in found if one is not None and one.key is not None]


def _baseline(folder: NightFolder, plan: Plan, result: Result, broken: set[str]) -> Baseline:
    if result.key is None:
        return Baseline({})
    try:
        return load_baseline(folder.baselines, plan.matrix, result.key)
    except BaselineError as error:
        broken.add(str(error))
        return Baseline(result.key)


def _judged(result: Result, name: str, baseline: Baseline, nights: Sequence[Night]) -> Judged:
    return Judged(result, name, baseline.figures.get(f"{result.entry}/{name}"), nights)


def _moved(results: dict[str, Result], nights: Sequence[Night]) -> Iterator[str]:
    """Entries that ran on another kind of machine than the last time."""
    for name, result in results.items():
        keys = [one.key for one in _earlier(name, nights)]
        last = keys[-1] if keys else None
        if result.key is not None and last is not None and result.key != last:
            changes = [f"{k} {last[k]} -> {v}" for k, v in result.key.items() if v != last[k]]
            own = "its series there goes on" if result.key in keys else "a series of its own begins"
            yield f"{name}: {'; '.join(changes)}: {own}"


def _left_out(plan: Plan, nights: Sequence[Night]) -> Iterator[str]:
    """Entries that the last night had, and this one has not."""
    before = nights[-1].plan.entries if nights else {}
    for name in before:
        if name not in plan.entries:
            yield f"{name}: not in this night, and it was in the last one"


# One figure by itself


def _alone(one: Judged, plan: Plan, broken: bool) -> Iterator[Finding]:
    rule, several = one.rule, isinstance(one.value, list) and one.name != "loss"
    if (below := _beyond_floor(one, plan)) is not None:
        yield one.finding(Verdict.REGRESSED, below, rules.FLOOR)
    elif rule is Rule.SHOWN:
        yield from _shown(one, plan)
    elif rule is Rule.HOLDS:
        bad = bool(one.value)
        text = "; ".join(one.value) if bad else "as it should be"
        yield one.finding(Verdict.REGRESSED if bad else Verdict.PASSED, text, rules.HOLDS)
    elif rule is Rule.EXACT or (rule is Rule.QUALITY and not several):
        yield from _exact(one, rules.EXACT, broken)
    elif rule is Rule.MEMORY:
        yield from _memory(one, broken)
    elif rule is Rule.QUALITY and not one.has_level and not broken:
        yield _unaccepted(one)


def _shown(one: Judged, plan: Plan) -> Iterator[Finding]:
    """What is held against nothing, or against its floor alone."""
    floor = _floor(one, plan)
    if floor is not None:
        text = f"{_mean(one.value):.4g}, and the hard floor is {floor:g}"
        yield one.finding(Verdict.PASSED, text, rules.FLOOR)


def _memory(one: Judged, broken: bool) -> Iterator[Finding]:
    predicted = one.result.figures["memory_predicted"]
    parted = rules.parted(predicted, one.value)
    if parted is not None:
        yield one.finding(Verdict.REGRESSED, parted, rules.MEMORY, before=predicted)
    elif one.result.deterministic and not one.result.chosen_by_memory:
        yield from _exact(one, rules.MEMORY, broken)
    else:
        text = f"{one.value / 1e9:.3f} GB, within 3 % of the prediction"
        yield one.finding(Verdict.PASSED, text, rules.MEMORY, before=predicted)


def _unaccepted(one: Judged) -> Finding:
    """A noisy quality without a baseline, which takes some nights."""
    values = [*pooled(one.nights, one.result, one.name), *one.value]
    waits = len(values) < LEAST_VALUES
    text = f"{len(values)} of {LEAST_VALUES} values" if waits else _NO_BASELINE
    return one.finding(Verdict.NO_BASELINE, text, rules.QUALITY, waits=waits)


def _beyond_floor(one: Judged, plan: Plan) -> str | None:
    floor = _floor(one, plan)
    return None if floor is None else rules.beyond_floor(_mean(one.value), floor, one.figure.better)


def _floor(one: Judged, plan: Plan) -> float | None:
    return plan.entries[one.result.entry].floor.get(one.name)


def _mean(value: Any) -> float:
    """Of seeds their mean."""
    return float(np.mean(value))


def _exact(one: Judged, rule: str, broken: bool) -> Iterator[Finding]:
    if one.has_level:
        yield one.finding(Verdict.NO_BASELINE, _OF_SEEDS, rule)
    elif one.accepted is not None:
        yield _held_against(one, one.accepted.value, rule)
    elif not broken:  # else that is what is told
        yield one.finding(Verdict.NO_BASELINE, _NO_BASELINE, rule)


def _held_against(one: Judged, before: Any, rule: str) -> Finding:
    text = rules.different(one.value, before)
    if text is None:
        return one.finding(Verdict.PASSED, "as accepted", rule, before=before)
    numbers = rules.is_number(one.value) and rules.is_number(before)
    improved = numbers and one.figure.better * (one.value - before) > 0
    verdict = Verdict.IMPROVED if improved else Verdict.REGRESSED
    return one.finding(verdict, text, rule, before=before)


def _same_as(plan: Plan, result: Result, results: dict[str, Result]) -> Iterator[Finding]:
    """Whether an entry has the bits of another one, which was not interrupted for instance."""
    other = plan.entries[result.entry].same_as
    if other is None or not results[other].complete:
        return
    if not (result.deterministic and results[other].deterministic):
        told = f"same_as {other} cannot be told: the bits of one of the two vary; {_TAKE_OUT}"
        yield Finding(result.entry, "", Verdict.INCOMPLETE, told, rules.SAME)
        return
    for name in BITS:
        value, before = result.figures.get(name), results[other].figures.get(name)
        text = rules.different(value, before)
        if text is not None:
            told = f"not as {other}: {text}"
            yield Finding(result.entry, name, Verdict.REGRESSED, told, rules.SAME, value, before)


# Figures of a night together


def _qualities(judged: Sequence[Judged], plan: Plan) -> Iterator[Finding]:
    """Noisy qualities against their accepted mean and spread."""
    noisy = {
        f"{one.result.entry}/{one.name}": one
        for one in judged
        if one.figure.rule is Rule.QUALITY and isinstance(one.value, list)
        if one.has_level
        if _beyond_floor(one, plan) is None
    }
    down = {name: _worse_p(one, one.figure.better) for name, one in noisy.items()}
    up = {name: _worse_p(one, -one.figure.better) for name, one in noisy.items()}
    worse, better = rules.worse(down), rules.worse(up)  # what has no better side is worse
    for name, one in noisy.items():
        verdict = Verdict.PASSED
        if name in worse or name in better:
            verdict = Verdict.REGRESSED if name in worse else Verdict.IMPROVED
        text = rules.spreads(one.value, one.accepted.mean, one.accepted.spread)
        yield one.finding(verdict, text, rules.QUALITY, before=one.accepted.mean)


def _worse_p(one: Judged, better: int) -> float:
    accepted = one.accepted
    level = accepted.mean, accepted.count
    return rules.worse_p(one.value, *level, accepted.spread, accepted.spread_count, better)


def _series(judged: Sequence[Judged], plan: Plan) -> Iterator[Finding]:
    """Figures over nights, all of them together under one false-discovery rate."""
    histories = [_History.of(one, plan) for one in judged if _is_series(one)]
    fallen, risen = (_moved_together(histories, sign) for sign in (1, -1))
    for history, worse, better in zip(histories, fallen, risen, strict=True):
        moved = Verdict.REGRESSED if worse else Verdict.IMPROVED if better else None
        yield _moved_or_not(history, moved)


def _moved_or_not(history: _History, moved: Verdict | None) -> Finding:
    one, (before, now) = history.of_figure, history.around
    told: dict[str, Any] = {"rule": rules.SERIES, "held_from": history.held_from}
    if len(history.values) < LEAST_NIGHTS:
        text = f"{now:.4g} {one.figure.unit}; {len(history.values)} of {LEAST_NIGHTS} nights"
        return one.finding(Verdict.NO_BASELINE, text, waits=True, **told)
    text = f"{now:.4g} {one.figure.unit} instead of {before:.4g}{rules.relative(now, before)}"
    if moved is None:
        return one.finding(Verdict.PASSED, text, before=before, **told)
    since, between = history.moved_at(moved)
    text += f", from night {since} on"
    told |= {"since": since, "between": between if moved is Verdict.REGRESSED else None}
    return one.finding(moved, text, before=before, **told)


def _is_series(one: Judged) -> bool:
    return one.figure.rule is Rule.SERIES and rules.is_number(one.value)


@dataclass(frozen=True)
class _History:
    """A figure on one kind of machine, night by night, tonight last.

    Nights that were found to have moved are held against those before them, but nothing is held
    against them: what is not accepted does not become the rule by lasting.
    """

    of_figure: Judged
    held_from: int | None  # number of the first night that was accepted
    numbers: list[int]
    commits: list[str | None]
    values: list[float]

    @classmethod
    def of(cls, one: Judged, plan: Plan) -> _History:
        held_from = _held_from(one, plan)
        nights = [night for night in one.nights if held_from is None or night.number >= held_from]
        same = [night for night in nights if _value(night, one) is not None]
        newest, moved = same[1 - series.MOST_NEWEST :], set(_moved_nights(same, one))
        kept = [night for night in same if night in newest or night.number not in moved]
        commits = [night.results[one.result.entry].commit or night.plan.commit for night in kept]
        values = [_value(night, one) or 0.0 for night in kept]
        return cls(
            one,
            held_from,
            [*(night.number for night in kept), plan.number],
            [*commits, one.result.commit or plan.commit],
            [*values, float(one.value)],
        )

    @property
    def newest(self) -> int:
        """How many nights lie behind the step, if there is one."""
        return series.step(np.array(self.values)) if len(self.values) > 1 else 1

    @property
    def around(self) -> tuple[float, float]:
        """Typical values before and after the step."""
        before = self.values[: -self.newest] or self.values
        return float(np.median(before)), float(np.median(self.values[-self.newest :]))

    def moved_at(self, verdict: Verdict) -> tuple[int, tuple[str, str] | None]:
        """The first night after the step, and its commit with that of the night before.

        As it was told first: the more nights follow, the less of those before is looked at.
        """
        before = _last_finding(self.of_figure)
        if before is not None and before.verdict is verdict and before.since is not None:
            return before.since, before.between
        good, bad = self.commits[-self.newest - 1], self.commits[-self.newest]
        between = None if good is None or bad is None else (good, bad)
        return self.numbers[-self.newest], between

    def p(self, sign: int) -> float:
        """That it has moved for the worse (sign 1) or the better (-1) by chance."""
        figure, values = self.of_figure.figure, np.array(self.values)
        if figure.unit == "s":  # of short times, what matters is more than a share of them
            return float(series.fall((values + 1) ** (sign * figure.better), SECONDS_SHIFT).p)
        return float(series.fall(values ** (sign * figure.better)).p)


def _held_from(one: Judged, plan: Plan) -> int | None:
    """The first night that the newest acceptance covers, by the order of nights: clocks jump.

    Where the baseline cannot be read, as the last night had it.
    """
    if one.accepted is None or one.accepted.since is None:
        same = [night for night in one.nights if _value(night, one) is not None]
        told = (night.found(one.result.entry, one.name) for night in reversed(same))
        return next((found.held_from for found in told if found and found.held_from), None)
    first = next(iter(covered(one.nights, one.accepted.since)), None)
    return plan.number if first is None else first.number


def _last_finding(one: Judged) -> Finding | None:
    """What the last night on this kind of machine told of the figure."""
    same = [night for night in one.nights if _value(night, one) is not None]
    return same[-1].found(one.result.entry, one.name) if same else None


def _moved_nights(nights: Sequence[Night], one: Judged) -> Iterator[int]:
    """Numbers of nights after a step, those included in which it was not seen yet."""
    for night in nights:
        found = night.found(one.result.entry, one.name)
        if found is not None and found.verdict in (Verdict.REGRESSED, Verdict.IMPROVED):
            yield from range(found.since or night.number, night.number + 1)


def _value(night: Night, one: Judged) -> float | None:
    result = night.results.get(one.result.entry)
    if result is None or result.key != one.result.key:
        return None
    value = result.figures.get(one.name)
    if not isinstance(value, int | float) or rules.unjudgeable(value) is not None:
        return None
    return value if value > 0 or one.figure.unit == "s" else None  # speeds are divided by


def _moved_together(histories: Sequence[_History], sign: int) -> list[bool]:
    p = np.array([history.p(sign) for history in histories])
    return [bool(moved) for moved in series.discovered(p)] if histories else []


# Which commits


def _located(
    found: Finding, folder: NightFolder, plan: Plan, results: dict[str, Result], nights: list[Night]
) -> Finding:
    """A regression with the commits that it lies between, and how to find the one that did it."""
    if found.verdict is not Verdict.REGRESSED or found.entry not in results:
        return found
    if found.rule == rules.SAME:  # either of the two entries may be the one that has moved
        found = replace(found, before=None)
    between = found.between or _since_it_passed(found, plan, results[found.entry], nights)
    if between is not None and set(between) & _edited(plan, nights):
        commits = None if between[0] == between[1] else between
        return replace(found, between=commits, text=f"{found.text}; {_EDITED}")
    if between is None or between[0] == between[1] or found.before is None:
        return replace(found, between=between)
    words = [plan.python, "slurm/nightly.py", "--bisect", found.name, "--night", str(folder.path)]
    good, bad = between
    bisect = f"git bisect start {bad} {good} && git bisect run {shlex.join(words)}"
    return replace(found, between=between, bisect=bisect)


def _edited(plan: Plan, nights: Sequence[Night]) -> set[str | None]:
    """Commits that tonight, or each night that ran them, had with changes that are in none."""
    if plan.edited:
        nights = [night for night in nights if night.plan.commit != plan.commit]
    plans = [plan, *(night.plan for night in nights)]
    unedited = {one.commit for one in plans if not one.edited}
    return {one.commit for one in plans if one.edited} - unedited


def _since_it_passed(
    found: Finding, plan: Plan, result: Result, nights: list[Night]
) -> tuple[str, str] | None:
    """The commit of the last night in which the figure passed, and of the first one after it."""
    bad = result.commit or plan.commit
    for night in reversed(nights):
        before = night.results.get(found.entry)
        if before is None or before.key != result.key:
            continue
        verdict = _said(night, found)
        commit = before.commit or night.plan.commit
        if verdict is Verdict.PASSED and commit is not None and bad is not None:
            return commit, bad
        if verdict is Verdict.REGRESSED:
            bad = commit
    return None


def _said(night: Night, found: Finding) -> Verdict | None:
    """A night's verdict on the same figure: beside the entry it is `same_as`, or by itself."""
    own = [one for one in night.findings if one.name == found.name]
    beside = [one for one in own if one.rule == rules.SAME]
    if found.rule != rules.SAME:
        return next((one.verdict for one in own if one not in beside), None)
    other = night.plan.entries[found.entry].same_as
    two = [night.results.get(name) for name in (found.entry, other) if name is not None]
    whole = [one for one in two if one is not None and one.complete and one.deterministic]
    compared = own and len(whole) == 2
    return Verdict.REGRESSED if beside else Verdict.PASSED if compared else None
