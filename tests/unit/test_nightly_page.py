"""The page on a night: what each row shows, and that it fits a narrow window."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from job.nightly.judge import judge
from job.nightly.matrix import Entry, Kind
from job.nightly.page import page
from job.nightly.record import Night, NightFolder, Plan, Result

COMMIT = "0123456789abcdef0123456789abcdef01234567"
KEY = {"device": "A100", "instructions": "AVX512", "torch": "2.11", "image": "none"}


def _night(results: list[Result], earlier: list[Night] | None = None, **entries: Entry) -> Night:
    plan = Plan(1, "little", COMMIT, 1e9, entries, [], "python")
    of_all = {one.entry: one for one in results}
    return judge(NightFolder(Path("/nowhere")), plan, of_all, earlier or [])


def _trained(name: str = "one", device: str = "A100", **figures: Any) -> Result:
    return Result(name, True, None, KEY | {"device": device}, COMMIT, figures=figures)


def _row(text: str, name: str) -> str:
    found = re.search(rf'<tr><th scope="row">{name}</th>.*?</tr>', text)
    assert found is not None
    return found[0]


def test_no_text_that_cannot_be_broken_is_shown() -> None:
    text = page([_night([_trained(loss=[0.5])], one=Entry())])
    words = re.sub(r"<style>.*?</style>|<[^>]*>", " ", text, flags=re.DOTALL).split()
    assert max(map(len, words)) < 30
    assert f'title="{COMMIT}"' in text


def test_what_a_command_has_found_has_a_row() -> None:
    validated = Result("memory", True, figures={"memory_validation": ["N=4: <2 GB", "N=8: 3 GB"]})
    looked = Result("preflight", True, figures={"preflight": []})
    entries = {"memory": Entry(kind=Kind.memory), "preflight": Entry(kind=Kind.preflight)}
    text = page([_night([validated, looked], **entries)])
    memory, preflight = _row(text, "memory_validation"), _row(text, "preflight")
    assert "2 problem(s)" in memory
    assert ">regressed<" in memory
    assert "N=4: &lt;2 GB; N=8: 3 GB" in memory
    assert "0 problem(s)" in preflight
    assert ">passed<" in preflight
    assert "as it should be" in preflight


def test_why_an_entry_is_not_complete_is_told_once() -> None:
    text = page([_night([Result("one", False, "failed: rank 0 was killed")], one=Entry())])
    assert text.count("rank 0 was killed") == 1
    assert '"alarm"' not in text


def test_of_seeds_the_mean_is_shown_however_many_there_are_and_of_losses_the_last() -> None:
    several = _trained(r2=[0.1, 0.2, 0.3, 0.4, 0.5, 0.9], loss=[0.5, 0.4, 0.25])
    text = page([_night([several], one=Entry())])
    assert "<td>0.4</td>" in _row(text, "r2")
    assert "<td>0.25</td>" in _row(text, "loss")


def test_another_machine_is_a_note_and_no_alarm() -> None:
    entries = {"one": Entry(), "two": Entry()}
    results = [_trained(name, loss=[0.5]) for name in entries]
    before = _night([_trained(name, "V100", loss=[0.5]) for name in entries], **entries)
    text = page([before, _night(results, [before], **entries)])
    assert "V100 -&gt; A100" in text
    assert text.count('<div class="notes">') == 1
    assert '"alarm"' not in text


def test_what_is_no_number_is_shown_as_it_is() -> None:
    nights = [_night([_trained(r2=[0.5, None, 0.4], loss=[0.5, None])], one=Entry())] * 2
    text = page(nights)
    assert "[0.5, None" in _row(text, "r2")
    assert "[0.5, None" in _row(text, "loss")
    assert "<svg" not in text
