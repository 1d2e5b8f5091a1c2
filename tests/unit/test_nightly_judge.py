"""Nights with planted faults: each is told as what it is, and nothing else is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from job.common.errors import InputError
from job.nightly import rules
from job.nightly.baseline import VERSION, Accepted, Baseline, accept, baseline_file, covered
from job.nightly.judge import _missing, judge
from job.nightly.matrix import Entry
from job.nightly.record import (
    Finding,
    Night,
    NightFolder,
    Plan,
    Result,
    Verdict,
    judged,
    nights,
)
from job.nightly.summary import markdown

KEY = {"device": "A100", "instructions": "AVX512", "torch": "2.11", "image": "none"}
ENTRIES = {
    "plain": Entry(),
    "stopped": Entry(stop_at=5, same_as="plain"),
    "seeds": Entry(seeds=[0, 1, 2], floor={"r2": 0.3}),
}
LOSSES = [0.25 / (1 + k) for k in range(10)]
SPREAD = 0.01
FIGURES: dict[str, dict[str, Any]] = {
    "plain": {"loss": LOSSES, "parameters": "ab12", "mse": 0.1, "r2": 0.5},
    "stopped": {"loss": LOSSES, "parameters": "ab12", "signal_to_saved_seconds": 2.0},
    "seeds": {"r2": [0.5, 0.51, 0.49], "mse": [0.1, 0.11, 0.09], "std_prediction": [0.3] * 3},
}
FIGURES["plain"] |= {"memory_predicted": 10e9, "memory_measured": 10.1e9, "speed": 20.0}
Change = Callable[[dict[str, Result]], None]


def _plan(number: int) -> Plan:
    began = 1e9 + 86400.0 * number
    return Plan(number, "small", f"commit{number}", began, ENTRIES, [], "python")


def _results(number: int, variation: float = 0.005) -> dict[str, Result]:
    """A night in which nothing is wrong; speed and quality vary as they do."""
    rng = np.random.default_rng(number)
    results = {}
    for entry, figures in FIGURES.items():
        own = dict(figures)
        for name in ("speed", "signal_to_saved_seconds"):
            if name in own:
                own[name] *= 1 + variation * rng.standard_normal()
        if entry == "seeds":
            noise = SPREAD * rng.standard_normal(3)
            own |= {"r2": [*(0.5 + noise)], "mse": [*(0.1 - noise / 5)]}
            own |= {"std_prediction": [*(0.3 + noise)]}
        commit = f"commit{number}"
        results[entry] = Result(entry, True, None, KEY, commit, on_gpu=True, figures=own)
    return results


class Site:
    """A folder of nights."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.baselines = folder, folder / "accepted"

    def night(
        self,
        number: int,
        change: Change | None = None,
        later: float = 0.0,
        plan: Plan | None = None,
    ) -> Night:
        folder = NightFolder(self.folder / f"night-{number:06}")
        folder.path.mkdir(parents=True, exist_ok=True)
        plan, results = plan or _plan(number), _results(number)
        plan = replace(plan, began=plan.began + later)  # by its clock
        if change is not None:
            change(results)
        folder.write_plan(plan)
        if self.baselines.exists():
            folder.baselines.mkdir(exist_ok=True)
            for file in self.baselines.iterdir():
                (folder.baselines / file.name).write_text(file.read_text())
        earlier = list(judged(self.folder, "small", number))
        night = judge(folder, plan, results, earlier)
        folder.write(night)
        return folder.night()

    def accept(self, pattern: str = "*", reason: str = "looked at") -> None:
        *earlier, night = (one.night() for one in nights(self.folder))
        accept(self.baselines, night, earlier, pattern, reason)

    @property
    def file(self) -> Path:
        return baseline_file(self.baselines, "small", KEY)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Thirty nights, accepted after the fifth."""
    site = Site(tmp_path_factory.mktemp("site"))
    for number in range(1, 6):
        site.night(number)
    site.accept()
    for number in range(6, 31):
        site.night(number)
    return site


@pytest.fixture
def site(history: Site, tmp_path: Path) -> Site:
    """The same thirty nights, to add to."""
    copy = Site(tmp_path)
    for one in [*nights(history.folder)]:
        (tmp_path / one.path.name).symlink_to(one.path)
    copy.baselines.mkdir()
    (copy.baselines / history.file.name).write_text(history.file.read_text())
    return copy


def _figure(entry: str, name: str, value: Any) -> Change:
    def change(results: dict[str, Result]) -> None:
        results[entry].figures[name] = value

    return change


def _bad(night: Night) -> list[Finding]:
    return [one for one in night.findings if one.verdict is not Verdict.PASSED]


def _only(night: Night, verdict: Verdict, name: str) -> Finding:
    (found,) = _bad(night)
    assert (found.verdict, found.name) == (verdict, name), found
    assert night.verdict is verdict
    return found


def test_a_night_in_which_nothing_is_wrong_passes(site: Site) -> None:
    night = site.night(31)
    assert not _bad(night)
    assert night.verdict.exit_code == 0
    assert {one.name for one in night.findings} >= {"plain/loss", "plain/speed", "seeds/r2"}


def test_another_loss_by_one_bit(site: Site) -> None:
    losses = [*LOSSES]
    losses[6] = math.nextafter(losses[6], 1)
    night = site.night(31, _figure("plain", "loss", losses))
    plain, stopped = _bad(night)
    assert (plain.name, plain.verdict) == ("plain/loss", Verdict.REGRESSED)
    assert plain.text.startswith(f"step 7: {losses[6]!r} instead of {LOSSES[6]!r}")
    assert plain.between == ("commit30", "commit31")
    assert plain.bisect is not None
    assert plain.bisect.startswith("git bisect start commit31 commit30 && git bisect run python")
    assert stopped.name == "stopped/loss"
    assert "not as plain: step 7" in stopped.text
    assert night.verdict.exit_code == 1


@pytest.mark.parametrize("edited", [31, 32])
def test_what_may_be_in_no_commit_is_not_bisected(site: Site, edited: int) -> None:
    plans = [replace(_plan(number), edited=number == edited) for number in (31, 32)]
    assert not _bad(site.night(31, plan=plans[0]))
    night = site.night(32, _figure("plain", "mse", 0.2), plan=plans[1])
    found = _only(night, Verdict.REGRESSED, "plain/mse")
    assert (found.between, found.bisect) == (("commit31", "commit32"), None)
    assert found.text.endswith("edited, and what moved it may be in no commit")
    assert (", edited." in markdown(night)) == (edited == 32)


def test_a_commit_that_has_run_unedited_too_is_bisected(site: Site) -> None:
    def of_the_first(results: dict[str, Result]) -> None:
        for name, result in results.items():
            results[name] = replace(result, commit="commit31")

    assert not _bad(site.night(31, plan=replace(_plan(31), edited=True)))
    unedited = replace(_plan(32), commit="commit31")
    assert not _bad(site.night(32, of_the_first, plan=unedited))
    found = _only(site.night(33, _figure("plain", "mse", 0.2)), Verdict.REGRESSED, "plain/mse")
    assert found.bisect is not None
    assert found.bisect.startswith("git bisect start commit33 commit31 && ")


def test_an_edit_of_the_commit_that_was_good_is_no_fault_of_the_machine(site: Site) -> None:
    assert not _bad(site.night(31))
    edited = replace(_plan(32), edited=True, commit="commit31")
    night = site.night(32, _figure("plain", "mse", 0.2), plan=edited)
    assert _only(night, Verdict.REGRESSED, "plain/mse").bisect is None
    assert "edited, and what moved it may be in no commit" in markdown(night)
    assert "look at the machine" not in markdown(night)


def test_a_resumed_training_with_other_bits(site: Site) -> None:
    other = _figure("stopped", "parameters", "cd34")
    assert [one.name for one in _bad(site.night(31, other))] == ["stopped/parameters"] * 2


def test_a_leak_of_memory(site: Site) -> None:
    night = site.night(31, _figure("plain", "memory_measured", 10.5e9))
    found = _only(night, Verdict.REGRESSED, "plain/memory_measured")
    assert found.text == "10.500 GB instead of 10.000 GB as predicted (+5.0 %)"


@pytest.mark.parametrize(
    ("measured", "parted"), [(0.96, True), (0.971, False), (1.029, False), (1.031, True)]
)
def test_memory_parts_at_three_percent_of_the_prediction(measured: float, parted: bool) -> None:
    assert (rules.parted(1e9, measured * 1e9) is not None) is parted


def test_memory_that_is_not_deterministic_is_held_to_the_prediction_alone(site: Site) -> None:
    def night(number: int, measured: float) -> Night:
        plan = replace(_plan(number), entries=ENTRIES | {"stopped": Entry()})
        return site.night(number, _varying(memory_measured=measured), plan=plan)

    assert not _bad(night(31, 10.29e9))
    _only(night(32, 10.31e9), Verdict.REGRESSED, "plain/memory_measured")
    _only(night(33, 9.69e9), Verdict.REGRESSED, "plain/memory_measured")


def _varying(name: str = "plain", **figures: Any) -> Change:
    """A training whose bits differ from night to night."""

    def change(results: dict[str, Result]) -> None:
        own = results[name].figures | figures
        results[name] = replace(results[name], deterministic=False, figures=own)

    return change


@pytest.mark.parametrize(
    "figures", [{"loss": [*LOSSES[:3], 0.06], "parameters": "cd34"}, {"mse": 0.2, "r2": 0.1}]
)
def test_bits_that_vary_are_held_against_nothing(site: Site, figures: dict[str, Any]) -> None:
    plan = replace(_plan(31), entries=ENTRIES | {"stopped": Entry()})
    night = site.night(31, _varying(**figures), plan=plan)
    assert not _bad(night)
    held = {one.figure for one in night.findings if one.entry == "plain"}
    assert held == {"memory_predicted", "memory_measured", "speed"}
    assert night.notes == [
        "plain: accepted, and held against nothing (training.deterministic is false, or "
        "micro_batch_tokens auto): loss, parameters, mse, r2"
    ]


def test_bits_that_vary_are_no_baseline(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.night(1, _varying(), plan=replace(_plan(1), entries=ENTRIES | {"stopped": Entry()}))
    site.accept("plain/*")
    names = json.loads(site.file.read_text())["figures"]
    assert sorted(names) == ["plain/memory_measured", "plain/memory_predicted", "plain/speed"]
    with pytest.raises(InputError, match="no figure plain/loss"):
        site.accept("plain/loss")


@pytest.mark.parametrize(
    ("r2", "verdict", "text"),
    [
        (0.31, Verdict.PASSED, "0.31, and the hard floor is 0.3"),
        (0.29, Verdict.REGRESSED, "0.29, below the hard floor of 0.3"),
    ],
)
def test_a_floor_holds_though_bits_vary(site: Site, r2: float, verdict: Verdict, text: str) -> None:
    entries = ENTRIES | {"plain": Entry(floor={"r2": 0.3}), "stopped": Entry()}
    night = site.night(31, _varying(r2=r2), plan=replace(_plan(31), entries=entries))
    found = night.found("plain", "r2")
    assert found is not None
    assert (found.verdict, found.text, night.verdict) == (verdict, text, verdict)


def test_a_prediction_is_exact_unless_the_micro_batch_was_chosen_by_free_memory(
    site: Site,
) -> None:
    def chosen(by_memory: bool) -> Change:
        def change(results: dict[str, Result]) -> None:
            _varying(memory_predicted=10.2e9)(results)
            results["plain"] = replace(results["plain"], chosen_by_memory=by_memory)

        return change

    plan = replace(_plan(31), entries=ENTRIES | {"stopped": Entry()})
    assert not _bad(site.night(31, chosen(True), plan=plan))
    plan = replace(_plan(32), entries=ENTRIES | {"stopped": Entry()})
    night = site.night(32, chosen(False), plan=plan)
    _only(night, Verdict.REGRESSED, "plain/memory_predicted")


def test_two_trainings_of_which_one_varies_cannot_be_the_same(site: Site) -> None:
    found = _only(site.night(31, _varying("stopped")), Verdict.INCOMPLETE, "stopped")
    assert found.text.startswith("same_as plain cannot be told: the bits of one of the two vary")


def test_memory_within_the_prediction_must_be_exact_too(site: Site) -> None:
    night = site.night(31, _figure("plain", "memory_measured", 10.1e9 + 512))
    assert "instead of" in _only(night, Verdict.REGRESSED, "plain/memory_measured").text


def test_a_quality_lower_by_three_spreads(site: Site) -> None:
    low = [0.5 - 3 * SPREAD + noise for noise in (-SPREAD, 0.0, SPREAD)]
    found = _only(site.night(31, _figure("seeds", "r2", low)), Verdict.REGRESSED, "seeds/r2")
    assert "spreads away" in found.text


@pytest.mark.parametrize("value", [0.001, 0.6])
def test_predictions_that_spread_otherwise_are_told_on_either_side(
    site: Site, value: float
) -> None:
    spread = [value, value * 1.01, value * 0.99]
    night = site.night(31, _figure("seeds", "std_prediction", spread))
    _only(night, Verdict.REGRESSED, "seeds/std_prediction")


def test_a_quality_below_its_floor(site: Site) -> None:
    low = [0.29, 0.3, 0.28]
    found = _only(site.night(31, _figure("seeds", "r2", low)), Verdict.REGRESSED, "seeds/r2")
    assert found.text == "0.29, below the hard floor of 0.3"


def test_a_better_quality_is_kept_only_once_it_is_accepted(site: Site) -> None:
    better = _figure("plain", "mse", 0.09)
    found = _only(site.night(31, better), Verdict.IMPROVED, "plain/mse")
    assert found.text == "0.09 instead of 0.1 (-10.0 %)"
    assert site.night(32, better).verdict is Verdict.IMPROVED
    site.accept("plain/mse", "a better head")
    assert site.night(33, better).verdict is Verdict.PASSED
    stored = json.loads(site.file.read_text())["figures"]["plain/mse"]
    assert (stored["value"], stored["commit"]) == (0.09, "commit32")
    assert stored["reason"] == "a better head"


def _seeds(number: int, away: float) -> Change:
    """Qualities of seeds some spreads away from where they were."""

    def change(results: dict[str, Result]) -> None:
        noise = SPREAD * np.random.default_rng(number).standard_normal(3)
        results["seeds"].figures["r2"] = [*(0.5 + away * SPREAD + noise)]

    return change


def _r2(night: Night) -> Verdict | None:
    found = night.found("seeds", "r2")
    return None if found is None else found.verdict


def _accepted_r2(site: Site) -> dict[str, Any]:
    return dict(json.loads(site.file.read_text())["figures"]["seeds/r2"])


@pytest.mark.parametrize(("away", "told"), [(5.0, Verdict.IMPROVED), (-5.0, Verdict.REGRESSED)])
def test_an_accepted_level_is_the_baseline_from_the_next_night_on(
    site: Site, away: float, told: Verdict
) -> None:
    before = _accepted_r2(site)
    night = site.night(31, _seeds(31, away))
    assert _r2(night) is told
    site.accept("seeds/r2", "another head")
    after = _accepted_r2(site)
    assert after["mean"] == pytest.approx(np.mean(night.results["seeds"].figures["r2"]))
    assert (after["spread"], after["of_spread"]) == (before["spread"], before["count"])
    assert (after["count"], after["since"], after["commit"]) == (3, _plan(31).began, "commit31")
    assert [_r2(site.night(n, _seeds(n, away))) for n in range(32, 36)] == [Verdict.PASSED] * 4
    back = Verdict.REGRESSED if told is Verdict.IMPROVED else Verdict.IMPROVED
    assert _r2(site.night(36)) is back


def test_nights_before_an_accepted_level_are_never_pooled_again(site: Site) -> None:
    site.night(31, _seeds(31, 5))
    site.accept("seeds/r2")
    for number in (32, 33):
        site.night(number, _seeds(number, 5))
    with pytest.raises(InputError, match="seeds/r2: 9 values so far; a spread takes 12"):
        site.accept("seeds/r2")
    of_level = [site.night(n, _seeds(n, 5)).results["seeds"].figures["r2"] for n in range(34, 37)]
    site.accept("seeds/r2")
    stored = _accepted_r2(site)
    assert (stored["count"], stored["of_spread"], stored["since"]) == (18, None, _plan(31).began)
    assert stored["mean"] == pytest.approx(0.5 + 5 * SPREAD, abs=SPREAD)
    assert np.mean(of_level) == pytest.approx(stored["mean"], abs=SPREAD)


def test_a_night_that_was_worse_is_no_part_of_a_mean(site: Site) -> None:
    site.night(31, _seeds(31, -20))
    site.night(32)
    site.accept("seeds/r2")
    assert _accepted_r2(site)["mean"] == pytest.approx(0.5, abs=SPREAD)
    assert _accepted_r2(site)["spread"] == pytest.approx(SPREAD, rel=0.5)


def test_a_baseline_from_before_levels_were_kept_is_read(site: Site) -> None:
    stored = json.loads(site.file.read_text())
    for one in stored["figures"].values():
        del one["of_spread"]
    site.file.write_text(json.dumps(stored))
    assert not _bad(site.night(31))


def test_a_level_of_one_night_gives_as_many_false_alarms_as_another() -> None:
    """A mean of three seeds, and a spread of 21 values: t has 20 degrees of freedom."""
    rng = np.random.default_rng(0)
    old, level, tonight = (rng.standard_normal((4000, k)) for k in (21, 3, 3))
    spread = old.std(-1, ddof=1)
    p = [
        rules.worse_p([*now], float(np.mean(first)), 3, float(s), 21, 1)
        for now, first, s in zip(tonight, level, spread, strict=True)
    ]
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=0.008)


def _slow(results: dict[str, Result]) -> None:
    results["plain"].figures["speed"] *= 0.95


@pytest.mark.slow
def test_a_slow_down_that_is_mended_leaves_nothing_behind(site: Site) -> None:
    for number in range(31, 45):
        site.night(number, _slow)
    after = [_bad(site.night(number)) for number in range(45, 60)]
    assert not any(after[9:])  # ten nights are looked at
    again = [_bad(site.night(number, _slow)) for number in range(60, 65)]
    assert again[-1][0].between == ("commit59", "commit60")


@pytest.mark.slow
def test_a_slow_down_that_was_accepted_stays_so_without_the_baseline(site: Site) -> None:
    for number in range(31, 36):
        site.night(number, _slow)
    site.accept("plain/speed", "a check that is worth it")
    for number in range(36, 61):
        assert site.night(number, _slow).verdict is Verdict.PASSED
    kept = site.file.read_text()
    site.file.write_text("{")
    _only(site.night(61, _slow), Verdict.INCOMPLETE, "baseline")
    site.file.unlink()
    assert {one.verdict for one in _bad(site.night(62, _slow))} == {Verdict.NO_BASELINE}
    site.file.write_text(kept)
    assert site.night(63, _slow).verdict is Verdict.PASSED


@pytest.mark.slow
def test_a_clock_that_is_a_year_behind_blinds_no_series(site: Site) -> None:
    site.night(31)
    site.accept("plain/speed")
    for number in range(32, 60):
        site.night(number, later=-3e7)
    found = [
        site.night(number, _slow, later=-3e7).found("plain", "speed") for number in range(60, 65)
    ]
    assert found[-1] is not None
    assert found[-1].verdict is Verdict.REGRESSED
    assert found[-1].between == ("commit59", "commit60")


@pytest.mark.slow
def test_a_slow_down_from_night_31_on(site: Site) -> None:
    told = {number: _bad(site.night(number, _slow)) for number in range(31, 60)}
    first = next(number for number, found in told.items() if found)
    assert first <= 35
    for number in range(first, 60):  # for as long as nobody has accepted it
        (found,) = told[number]
        assert (found.name, found.verdict) == ("plain/speed", Verdict.REGRESSED)
        assert found.between == ("commit30", "commit31"), number
        assert "from night 31 on" in found.text
    site.accept("plain/speed", "a check that is worth it")
    assert not [one for one in site.night(60, _slow).findings if one.verdict is Verdict.REGRESSED]


def test_accepting_a_pattern_begins_no_series_anew_that_has_not_moved(site: Site) -> None:
    before = json.loads(site.file.read_text())["figures"]
    site.night(31, _figure("plain", "mse", 0.09))
    site.accept("plain/*", "a better head")
    after = json.loads(site.file.read_text())["figures"]
    assert after["plain/speed"] == before["plain/speed"]
    assert (before["plain/mse"]["value"], after["plain/mse"]["value"]) == (0.1, 0.09)
    with pytest.raises(
        InputError, match="plain/speed: series that have not moved go on; one named"
    ):
        site.accept("*/speed")
    found = [site.night(number, _slow).found("plain", "speed") for number in range(32, 37)]
    assert found[-1] is not None
    assert found[-1].verdict is Verdict.REGRESSED
    site.accept("*/speed", "a check that is worth it")
    assert json.loads(site.file.read_text())["figures"]["plain/speed"]["since"] == _plan(36).began


def test_a_series_that_is_named_in_full_begins_anew(site: Site) -> None:
    site.night(31)
    site.accept("plain/speed")
    found = site.night(32).found("plain", "speed")
    assert found is not None
    assert (found.waits, found.held_from) == (True, 31)


def test_a_series_of_another_machine_that_was_accepted_shortens_none_here(site: Site) -> None:
    def moved(results: dict[str, Result]) -> None:
        for name, one in results.items():
            results[name] = replace(one, key=KEY | {"device": "H100"})

    site.night(31, moved)
    site.accept("plain/speed")
    site.night(32, moved)
    found = site.night(33).found("plain", "speed")
    assert found is not None
    assert (found.verdict, found.held_from) == (Verdict.PASSED, None)


def _gone(*names: str) -> Change:
    def change(results: dict[str, Result]) -> None:
        for name in names:
            entry, _, figure = name.partition("/")
            del results[entry].figures[figure]

    return change


def test_a_figure_that_is_missing_is_never_a_pass(site: Site) -> None:
    names = ["plain/memory_measured", "plain/r2", "plain/speed", "seeds/mse"]
    night = site.night(31, _gone(*names))
    assert sorted(one.name for one in _bad(night)) == names
    assert {one.text for one in _bad(night)} == {"it was accepted, and is missing"}
    assert night.verdict.exit_code == 3
    assert len(_bad(site.night(32, _gone(*names)))) == 4
    site.file.unlink()
    site.night(33)
    found = site.night(34, _gone("plain/speed")).found("plain", "speed")
    assert found is not None
    assert (found.verdict, found.text) == (
        Verdict.INCOMPLETE,
        "it was there in the last night, and is missing",
    )


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("seeds/r2", [0.5, math.nan, 0.5], "it is nan, and no number"),
        ("plain/r2", None, "it is None, and no number"),
        ("plain/speed", math.inf, "it is inf, and no number"),
        ("plain/speed", 0.0, "no time or no rate"),
    ],
)
def test_what_is_no_number_is_never_a_pass(site: Site, name: str, value: Any, text: str) -> None:
    entry, _, figure = name.partition("/")
    found = _only(site.night(31, _figure(entry, figure, value)), Verdict.INCOMPLETE, name)
    assert text in found.text
    assert not _bad(site.night(32))


def test_memory_without_a_prediction_is_not_judged(site: Site) -> None:
    found = {one.name: one for one in _bad(site.night(31, _gone("plain/memory_predicted")))}
    assert sorted(found) == ["plain/memory_measured", "plain/memory_predicted"]
    assert found["plain/memory_measured"].text == "there is no prediction to hold it against"


def test_an_entry_that_is_left_out_is_noted(site: Site) -> None:
    plan = replace(_plan(31), entries={"plain": ENTRIES["plain"]})
    results = {"plain": _results(31)["plain"]}
    earlier = list(judged(site.folder, "small", 31))
    night = judge(NightFolder(site.folder / "night-000031"), plan, results, earlier)
    assert (
        night.notes == [f"{n}: not in this night, and it was in the last one" for n in ENTRIES][1:]
    )


def test_nights_that_count_begin_with_the_one_accepted_whatever_clocks_said() -> None:
    nights: list[Any] = [
        SimpleNamespace(plan=SimpleNamespace(began=began)) for began in (100.0, 9e9, 300.0, 400.0)
    ]
    assert covered(nights, 400.0) == nights[3:]
    assert covered(nights, 350.0) == nights[1:]  # of a night that is not there any more
    assert covered(nights, None) == nights


@pytest.mark.parametrize(("seeds", "missing"), [(1, ["loss", "mse"]), (3, ["mse"])])
def test_of_several_seeds_no_bits_are_missing(seeds: int, missing: list[str]) -> None:
    once = Accepted("commit", "why", "2026-01-01", value=0.1)
    baseline = Baseline({}, {"one/loss": once, "one/mse": once})
    assert [*_missing(Result("one", True), baseline, [], seeds)] == missing


def test_a_clock_that_goes_back_is_told_and_moves_nothing_else(site: Site) -> None:
    def back(results: dict[str, Result]) -> None:
        figures = dict(results["stopped"].figures)
        del figures["signal_to_saved_seconds"]
        notes = {"signal_to_saved_seconds": "the clock went back by 3600 s or more meanwhile"}
        results["stopped"] = replace(results["stopped"], figures=figures, notes=notes)

    found = _only(site.night(31, back), Verdict.INCOMPLETE, "stopped/signal_to_saved_seconds")
    assert "clock went back" in found.text


def test_an_entry_that_is_not_complete_is_never_a_pass(site: Site) -> None:
    def dead(results: dict[str, Result]) -> None:
        results["seeds"] = Result("seeds", False, "failed: rank 0 was killed")

    night = site.night(31, dead)
    assert _only(night, Verdict.INCOMPLETE, "seeds").text == "failed: rank 0 was killed"
    assert night.verdict.exit_code == 3


def test_another_machine_starts_a_series_of_its_own(site: Site) -> None:
    def moved(results: dict[str, Result]) -> None:
        for name, one in results.items():
            results[name] = replace(one, key=KEY | {"device": "H100"})
        results["plain"].figures["speed"] *= 0.5

    night = site.night(31, moved)
    assert {one.verdict for one in _bad(night)} == {Verdict.NO_BASELINE}
    assert night.verdict.exit_code == 4
    assert night.notes[0] == "plain: device A100 -> H100: a series of its own begins"
    back = site.night(32)
    assert back.verdict is Verdict.PASSED
    assert back.notes[0] == "plain: device H100 -> A100: its series there goes on"
    assert not site.night(33).notes


# Baselines


def test_without_a_baseline_nothing_is_held_against_anything(site: Site) -> None:
    site.file.unlink()
    night = site.night(31)
    assert {one.verdict for one in _bad(night)} == {Verdict.NO_BASELINE}
    assert night.verdict.exit_code == 4


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"version": 1, "key": {}}', "[" * 100_000], ids=lambda one: one[:9]
)
def test_a_damaged_baseline(site: Site, content: str) -> None:
    site.file.write_text(content)
    found = _only(site.night(31), Verdict.INCOMPLETE, "baseline")
    assert f"{site.file.name} is damaged" in found.text
    assert "git checkout" in found.text
    with pytest.raises(InputError, match="damaged"):
        site.accept()


def test_a_baseline_of_another_version(site: Site) -> None:
    site.file.write_text(json.dumps(json.loads(site.file.read_text()) | {"version": VERSION + 1}))
    found = _only(site.night(31), Verdict.INCOMPLETE, "baseline")
    assert f"of version {VERSION + 1}, and this code reads {VERSION}" in found.text


def test_a_baseline_of_another_machine(site: Site) -> None:
    stored = json.loads(site.file.read_text())
    site.file.write_text(json.dumps(stored | {"key": KEY | {"torch": "1"}}))
    assert "another machine" in _only(site.night(31), Verdict.INCOMPLETE, "baseline").text


def test_a_spread_waits_for_its_nights_and_then_for_a_person(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.night(1)
    site.accept()
    for number in (2, 3):
        night = site.night(number)
        found = night.found("seeds", "r2")
        assert found is not None
        assert (found.verdict, found.text) == (Verdict.NO_BASELINE, f"{3 * number} of 12 values")
        assert night.verdict is Verdict.PASSED
    assert site.night(4).verdict is Verdict.NO_BASELINE
    site.accept("seeds/*")
    assert site.night(5).verdict is Verdict.PASSED


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("seeds/r2", {"mean": mean}) for mean in ("high", None, math.nan, True)),
        *(("seeds/r2", {"spread": spread}) for spread in (None, -1.0, math.inf)),
        ("seeds/r2", {"mean": None, "spread": None}),
        *(("seeds/r2", {"count": count}) for count in (0, 1, 12.5, None)),
        ("seeds/r2", {"of_spread": 1}),
        *(("plain/r2", {"value": value}) for value in (None, "0.5", math.nan, True, [0.5])),
        *(("plain/loss", {"value": value}) for value in ("low", 0.5, [], [0.5, None], [[0.5]])),
        ("plain/loss", {"value": [10**400]}),
        *(("plain/parameters", {"value": value}) for value in (None, 7)),
        ("plain/memory_measured", {"value": None}),
        *(("plain/speed", {"since": since}) for since in ("now", math.nan)),
    ],
)
def test_a_baseline_whose_values_cannot_be_is_damaged(
    site: Site, name: str, damage: dict[str, Any]
) -> None:
    stored = json.loads(site.file.read_text())
    stored["figures"][name] |= damage
    site.file.write_text(json.dumps(stored))
    assert "is damaged" in _only(site.night(31), Verdict.INCOMPLETE, "baseline").text


def test_a_baseline_without_a_value_is_damaged(site: Site) -> None:
    stored = json.loads(site.file.read_text())
    del stored["figures"]["plain/r2"]["value"]
    site.file.write_text(json.dumps(stored))
    assert "is damaged" in _only(site.night(31), Verdict.INCOMPLETE, "baseline").text


def test_a_figure_that_is_no_number_is_not_accepted(site: Site) -> None:
    before = site.file.read_text()
    values = {"r2": math.nan, "mse": None, "loss": [0.5, math.inf]}

    def broken(results: dict[str, Result]) -> None:
        results["plain"].figures.update(values)
        results["seeds"].figures["r2"] = [0.5, math.nan, 0.5]

    site.night(31, broken)
    for name in ("plain/r2", "plain/mse", "plain/loss", "seeds/r2"):
        with pytest.raises(InputError, match=f"{name}: it is .*, and no number"):
            site.accept(name)
    assert site.file.read_text() == before
    site.night(32)
    site.accept("seeds/r2")
    assert math.isfinite(_accepted_r2(site)["mean"])


def test_what_cannot_be_accepted_is_named(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.night(1)
    with pytest.raises(InputError, match=r"no figure plain/lost in night 1; there are\n  plain"):
        site.accept("plain/lost")
    with pytest.raises(InputError, match="seeds/r2: 3 values so far; a spread takes 12"):
        site.accept("seeds/r2")
    assert not site.baselines.exists()
    earlier: list[Night] = []
    taken, refused = accept(
        site.baselines, NightFolder(tmp_path / "night-000001").night(), earlier, "*", "x"
    )
    assert "plain/loss" in taken[site.file]
    assert [one.partition(":")[0] for one in refused] == [
        "seeds/r2",
        "seeds/mse",
        "seeds/std_prediction",
    ]


def test_one_seed_is_not_held_against_the_mean_of_several(site: Site) -> None:
    night = site.night(31, _figure("seeds", "r2", 0.5))
    found = _only(night, Verdict.NO_BASELINE, "seeds/r2")
    assert "of several seeds were accepted, and this is of one" in found.text
    site.accept("seeds/r2", "one seed is enough")
    assert not _bad(site.night(32, _figure("seeds", "r2", 0.5)))
    lower = site.night(33, _figure("seeds", "r2", 0.49))
    assert "0.49 instead of 0.5" in _only(lower, Verdict.REGRESSED, "seeds/r2").text


def test_several_seeds_are_not_held_against_the_value_of_one(site: Site) -> None:
    told = []
    for number in range(31, 35):
        night = site.night(number, _figure("plain", "r2", [0.5, 0.51, 0.49 + number / 1e4]))
        found = _only_r2(night)
        told.append((found.text, found.waits))
    waits = [(f"{3 * count} of 12 values", True) for count in (1, 2, 3)]
    assert told == [*waits, ("no baseline on this kind of machine", False)]
    site.accept("plain/r2")
    assert not _bad(site.night(35, _figure("plain", "r2", [0.5, 0.51, 0.49])))


def _only_r2(night: Night) -> Finding:
    (found,) = _bad(night)
    assert (found.name, found.verdict) == ("plain/r2", Verdict.NO_BASELINE)
    return found


def test_verdicts_are_ordered_by_gravity() -> None:
    assert [one.exit_code for one in Verdict] == [1, 3, 4, 0, 0]
