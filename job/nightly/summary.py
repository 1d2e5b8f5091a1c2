"""A judged night in words: Markdown for people, and JUnit XML for continuous integration."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from xml.etree import ElementTree

from job.nightly.record import Finding, Night, Verdict, gravest
from job.nightly.table import FIGURES, text_of

_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ASKS = {
    Verdict.REGRESSED: "find the commit (a line may be below), or accept the figure with a reason",
    Verdict.INCOMPLETE: "look at why; nothing is known of what is missing",
    Verdict.NO_BASELINE: "look at the figures, then accept them with a reason",
    Verdict.IMPROVED: "accept the figures with a reason, so that they are kept",
    Verdict.PASSED: "nothing",
}


def headline(night: Night) -> str:
    """One line: the verdict, and what led to it."""
    count = sum(one.verdict is night.verdict and not one.waits for one in night.findings)
    what = "" if night.verdict is Verdict.PASSED else f" ({count} finding(s))"
    return f"{night.plan.matrix} night {night.number}: {night.verdict.value}{what}"


def asks(verdict: Verdict) -> str:
    """What a verdict asks of a person."""
    return _ASKS[verdict]


def markdown(night: Night) -> str:
    """The whole night on a page, what matters first."""
    plan = night.plan
    began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(plan.began))
    commit = f"{plan.commit or 'unknown'}{', edited' if plan.edited else ''}"
    lines = [f"# {headline(night)}", "", f"Began {began}, commit {commit}."]
    lines += [f"Asked of you: {asks(night.verdict)}.", ""]
    for verdict in list(Verdict)[:-1]:
        lines += _section(night, verdict)
    lines += [f"* {note}" for note in night.notes]
    lines += ["", "| entry | verdict | figures |", "|---|---|---|"]
    lines += [
        f"| {name} | {_of_entry(night, name).value} | {_counts(night, name)} |"
        for name in night.results
    ]
    return "\n".join(lines) + "\n"


def _section(night: Night, verdict: Verdict) -> list[str]:
    found = [one for one in night.findings if one.verdict is verdict and not one.waits]
    if not found:
        return []
    shown = [line for one in found for line in _lines(one)]
    return [f"## {verdict.value.capitalize()}", "", *shown, ""]


def _lines(found: Finding) -> Iterator[str]:
    yield f"* **{found.name}**: {_text(found)}"
    if found.between is not None:
        good, bad = found.between
        same = f"  both nights ran {bad}: look at the machine"
        yield same if good == bad else f"  between {good} (good) and {bad} (bad)"
    if found.bisect is not None:
        yield f"  `{found.bisect}`"


def _text(found: Finding) -> str:
    """What was found; without a baseline with the value, which is to be looked at."""
    if found.verdict is not Verdict.NO_BASELINE or found.figure not in FIGURES:
        return found.text
    return f"{text_of(found.figure, found.value)}: {found.text}"


def _of_entry(night: Night, name: str) -> Verdict:
    own = [one.verdict for one in night.findings if one.entry == name and not one.waits]
    return gravest(own)


def _counts(night: Night, name: str) -> str:
    own = [one for one in night.findings if one.entry == name and one.figure]
    waiting = sum(one.waits for one in own)
    text = f"{len(own) - waiting} judged"
    return f"{text}, {waiting} wait for more nights" if waiting else text


def junit(night: Night) -> str:
    """A test case a finding: failed, an error (incomplete), skipped (no baseline), or passed."""
    suite = ElementTree.Element("testsuite", name=_plain(f"nightly {night.plan.matrix}"))
    counts = {"tests": len(night.findings), "failures": 0, "errors": 0, "skipped": 0}
    for found in night.findings:
        case = ElementTree.SubElement(
            suite, "testcase", classname=found.entry, name=found.figure or "complete"
        )
        kind = {
            Verdict.REGRESSED: ("failure", "failures"),
            Verdict.INCOMPLETE: ("error", "errors"),
            Verdict.NO_BASELINE: ("skipped", "skipped"),
        }.get(found.verdict)
        if kind is not None:
            ElementTree.SubElement(case, kind[0], message=_plain(_text(found)))
            counts[kind[1]] += 1
    suite.attrib |= {key: str(value) for key, value in counts.items()}
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _plain(text: str) -> str:
    """Without the characters that XML 1.0 has no place for (section 2.2)."""
    return _NOT_IN_XML.sub("", text)
