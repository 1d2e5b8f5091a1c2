"""The figures of an entry, read from what its runs have left. Free of torch."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from job.common.errors import InputError
from job.common.state_files import read_json
from job.nightly.matrix import Entry, Kind
from job.nightly.record import Plan, PlannedRun, Result
from job.nightly.table import BITS, FIGURES, QUALITY, Rule
from job.run.committed import folders
from job.run.manifest import FACTS, MANIFEST
from job.run.names import MACHINE
from job.run.reader import Snapshot, StoredRun, complete_records

_GPU_TOLERANCE = 0.03  # between predicted and measured memory
TOLD_TO_STOP = "told to stop"  # an event of the run, beside submitted, started and so on
_UNWARMED = 1  # log lines before speeds count
_BY_MEMORY = "auto"  # micro-batch and strategy: by what memory is free at that moment
_VALIDATION = "memory-validation.json"


def rule_of(result: Result, name: str) -> Rule:
    """How a figure of this result is judged; none is held to what may differ from run to run."""
    rule = FIGURES[name].rule
    if name == "memory_predicted" and result.chosen_by_memory:
        return Rule.SHOWN
    if rule is Rule.MEMORY and not result.on_gpu:
        return Rule.SHOWN
    one_seed = rule is Rule.QUALITY and not isinstance(result.figures.get(name), list)
    return Rule.SHOWN if not result.deterministic and (one_seed or name in BITS) else rule


def memory_parted(predicted: float, measured: float) -> bool:
    """Whether a GPU's memory is not what was predicted; bytes."""
    return abs(predicted - measured) > _GPU_TOLERANCE * predicted


def result(plan: Plan, name: str) -> Result:
    """What an entry has left; it is not complete unless all of its runs are."""
    entry, runs = plan.entries[name], [run for run in plan.runs if run.entry == name]
    for run in runs:
        if (reason := _unfinished(entry, run)) is not None:
            return Result(name, complete=False, reason=reason)
    try:
        if entry.kind is Kind.memory:
            return Result(name, True, figures={"memory_validation": _validated(runs[0])})
        if entry.kind is Kind.preflight:
            return Result(name, True, figures={"preflight": []})
        return _trained(name, entry, [Path(run.path) for run in runs])
    except (InputError, OSError, ValueError, KeyError, TypeError) as error:
        text = f"{type(error).__name__}: {error}" if not isinstance(error, InputError) else error
        return Result(name, complete=False, reason=f"what it has left cannot be read: {text}")


def _unfinished(entry: Entry, run: PlannedRun) -> str | None:
    """Why a run is not complete; None if it is."""
    which = f"seed {run.seed}: " if len(entry.seeds) > 1 else ""
    if run.refused is not None:
        return f"{which}not submitted: {run.refused}"
    stored = StoredRun(run.path)
    job = _object(stored.file("slurm/status.json"))
    state = job.get("state", "pending")
    if entry.kind is not Kind.train:
        done = state == "finished"
        return None if done else f"{which}{_told(state, job.get('reason'))}"
    trainer = _object(stored.file("status.json"))
    if trainer.get("state") != "finished":
        return f"{which}{_told(state, job.get('reason') or trainer.get('error'))}"
    lines, steps = len(stored.records()), trainer.get("step", 0)
    if lines != steps:  # damaged lines are left out
        return f"{which}metrics.jsonl has {lines} readable lines of {steps} steps"
    if entry.stop_at is not None and not _resumed(stored):
        return f"{which}it was to be stopped at step {entry.stop_at} and to go on, and was not"
    return None


def _told(state: str, reason: str | None) -> str:
    if state == "pending":
        return f"given up in the queue, after: {reason}" if reason else "it never started"
    return f"{state}: {reason}" if reason else f"{state}, without a word"


def _resumed(stored: StoredRun) -> list[int]:
    """The steps from which attempts went on."""
    attempts = [_object(file) for file in sorted(stored.path.glob("attempts/*/attempt.json"))]
    return [one["resumed_step"] for one in attempts if one.get("resumed_step")]


def _validated(run: PlannedRun) -> list[str]:
    content = json.loads((Path(run.path) / _VALIDATION).read_text(encoding="utf-8"))
    return [str(one) for one in content["disagreements"]]


def _trained(name: str, entry: Entry, paths: Sequence[Path]) -> Result:
    runs = [Snapshot.read(path, path.name) for path in paths]
    figures: dict[str, Any] = {}
    for quality in QUALITY:
        values = [run.final[quality] for run in runs if quality in run.final]
        if len(values) == len(runs):
            figures[quality] = values if len(runs) > 1 else values[0]
    notes: dict[str, str] = {}
    for figure, of_run in _OF_EACH.items():
        taken = _taken(of_run, runs, figure, notes)
        if taken is not None:
            figures[figure] = taken
    if len(runs) == 1:
        figures["loss"] = runs[0].series("train/loss")[1]
        figures["parameters"] = _digest(runs[0].stored.file("critic.safetensors"))
    if entry.stop_at is not None:
        taken = _taken(_signal_to_saved, runs, "signal_to_saved_seconds", notes)
        figures |= {} if taken is None else {"signal_to_saved_seconds": taken}
    ranks = runs[0].memory.get("ranks", [])
    on_gpu = bool(ranks) and ranks[0]["backend"] != "process"
    training = runs[0].config.get("training", {})
    tokens_vary = training.get("micro_batch_tokens") == _BY_MEMORY
    same_bits = bool(training.get("deterministic", True)) and not tokens_vary
    fsdp = runs[0].config.get("distributed", {}).get("fsdp", {})
    by_memory = tokens_vary or (on_gpu and fsdp.get("sharding_strategy") == _BY_MEMORY)
    told = (_key(runs), _commit(runs[0]), on_gpu, figures, notes, same_bits, by_memory)
    return Result(name, True, None, *told)


def _object(file: Path) -> dict[str, Any]:
    return read_json(file, dict) or {}


class _NotTakenError(Exception):
    """Why a figure could not be taken."""


def _taken(
    of_run: Callable[[Snapshot], float | None],
    runs: Sequence[Snapshot],
    figure: str,
    notes: dict[str, str],
) -> float | None:
    """The median over an entry's runs; None if one has none, and a note if that is a fault."""
    try:
        values = [of_run(run) for run in runs]
    except _NotTakenError as reason:
        notes[figure] = str(reason)
        return None
    known = [value for value in values if value is not None]
    return statistics.median(known) if len(known) == len(runs) else None


def _key(runs: Sequence[Snapshot]) -> dict[str, str]:
    """Where all attempts of all runs ran; where they differ, all of it."""
    places = [
        _object(file)
        for run in runs
        for file in sorted(run.stored.path.glob(f"attempts/*/{MACHINE}"))
    ]
    names = ("device", "instructions", "torch", "image")
    return {n: " and ".join(sorted({str(one.get(n, "unknown")) for one in places})) for n in names}


def _commit(run: Snapshot) -> str | None:
    """The code that trained it, as its newest checkpoint says."""
    files = [folder / FACTS for folder in folders(run.stored.file("checkpoints"))]
    commit = _object(files[-1]).get("commit") if files else None
    return None if commit is None else str(commit)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _median(run: Snapshot, key: str) -> float | None:
    values = run.series(key)[1][_UNWARMED:]
    return statistics.median(values) if values else None


def _speed(run: Snapshot) -> float | None:
    """Tokens a billion operations of matrix products at the same moment: clocks cancel."""
    lines = [one for one in run.telemetry if one.get("product_rate")][_UNWARMED:]
    ratios = [one["tokens_per_second"] / one["product_rate"] * 1e9 for one in lines]
    return statistics.median(ratios) if ratios else None


def _memory(name: str) -> Callable[[Snapshot], float | None]:
    def last(run: Snapshot) -> float | None:
        values = run.series(f"memory/{name}_peak")[1]
        return values[-1] if values else None

    return last


def _startup(run: Snapshot) -> float | None:
    began = _event(run, "started")
    first = _object(run.stored.file("attempts/0001/attempt.json")).get("time")
    return None if began is None or first is None else _lasted(began, float(first))


def _signal_to_saved(run: Snapshot) -> float | None:
    told = _event(run, TOLD_TO_STOP)
    steps = _resumed(run.stored)
    file = run.stored.file(f"checkpoints/step-{steps[0]:08}/{MANIFEST}")
    if told is None or not file.exists():
        raise _NotTakenError("the checkpoint that followed the signal is gone")
    return _lasted(told, file.stat().st_mtime)


def _lasted(began: float, ended: float) -> float:
    if ended < began:
        raise _NotTakenError(f"the clock went back by {began - ended:.0f} s or more meanwhile")
    return ended - began


def _event(run: Snapshot, name: str) -> float | None:
    events = complete_records(run.stored.file("slurm/events.jsonl"))
    times = (float(one["time"]) for one in events if one.get("event") == name)
    return next(times, None)


def _save_seconds(run: Snapshot) -> float | None:
    return sum(run.series("save_seconds")[1])


def _checkpoint_bytes(run: Snapshot) -> float | None:
    """Of tensors: the other files have times and paths in them."""
    there = folders(run.stored.file("checkpoints"))
    return float(sum(_tensor_bytes(there[-1]))) if there else None


def _tensor_bytes(folder: Path) -> Iterator[int]:
    files = _object(folder / MANIFEST).get("files", {})
    yield from (one["bytes"] for name, one in files.items() if name.endswith(".distcp"))


_OF_EACH: dict[str, Callable[[Snapshot], float | None]] = {
    "memory_predicted": _memory("predicted"),
    "memory_measured": _memory("measured"),
    "speed": _speed,
    "startup_seconds": _startup,
    "save_seconds": _save_seconds,
    "checkpoint_bytes": _checkpoint_bytes,
    "tokens_per_second": lambda run: _median(run, "tokens_per_second"),
    "product_rate": lambda run: _median(run, "product_rate"),
}
