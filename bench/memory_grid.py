"""The closed form of a GPU's memory against the simulation, over models, N, GPUs and strategies.

    python bench/memory_grid.py --out bench/results/memory_grid.csv           about half an hour
    python bench/memory_grid.py --all --out bench/results/memory_grid.csv     all of the grid

Trunks of 7, 13 and 70 billion parameters (the last with grouped queries), N in 0, 1, 4, 8 and 32,
every sharding strategy, 1, 2, 4, 8 and 64 GPUs with 8 on a node, 8192 tokens in sequences of 512.
Without `--all`, 13 and 70 billion only with N in 0, 4 and 32, on 2 and 64 GPUs. NO_SHARD on more
than 2 GPUs is left out: nothing in it has a size that depends on how many replicas there are, so
that it is the program of 2 GPUs. A thinner grid varies the rest.

Ends with 1 unless the predicted peak and the memory after the backward pass are within 2 % of the
simulated ones, and each component above 100 MB within 5 %. The simulation cannot tell activations
from the working set; their sums are compared. Where several moments of a step are within 2 % of the
peak, either side may take another one for it: then the components are those of the closed form's
moment, of these, that is nearest to the simulated one.

The results are a line a setting, in bytes, under comment lines that say whence they come.
"""

from __future__ import annotations

import csv
import json
import logging
import multiprocessing
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import command_line, origin, say, table

from job.common.progress import progress, set_up_logging
from job.common.schema import FsdpConfig, ShardingStrategy
from job.memory.footprint import COMPONENTS, Moment, Setting, footprint
from job.memory.settings import SHAPES
from job.training.simulation import simulate

UNFROZEN, GPUS = (0, 1, 4, 8, 32), (1, 2, 4, 8, 64)
FEWER_UNFROZEN, FEWER_GPUS = (0, 4, 32), (2, 64)  # of the larger trunks, without --all
PER_NODE = 8
TOKENS = 8192
VARIED: dict[str, dict[str, Any]] = {  # each alone, against the grid's own
    "float32": {"mixed_precision": False},
    "activation checkpointing": {"activation_checkpointing": True},
    "prefix cached": {"prefix_cached": True},
    "64 tokens": {"micro_batch_tokens": 64, "sequence_tokens": 64},
    "2048 tokens": {"micro_batch_tokens": 2048},
    "one micro-batch a step": {"accumulates": False},
}
TOTAL, COMPONENT, SMALL = 0.02, 0.05, 100_000_000  # tolerances, and the bytes they begin with
PROCESSES = 2

# No moment of the simulation has the workspaces of cuBLAS.
JOINED = tuple(name for name in COMPONENTS if name not in ("working_set", "workspaces"))
PLAIN = ("name", "peak_moment", "compared_moment", "peak_difference")
WHEN, SIDES = ("peak", "after_backward"), ("predicted", "simulated")

Bytes = dict[str, int]


@dataclass(frozen=True)
class Case:
    """A setting of the grid."""

    trunk: str
    varied: str
    setting: Setting

    @property
    def name(self) -> str:
        s = self.setting
        strategy = s.fsdp.sharding_strategy.name
        plain = f"{self.trunk} N={s.num_unfrozen_layers} {s.world_size} GPUs {strategy}"
        return f"{plain}, {self.varied}" if self.varied else plain


@dataclass(frozen=True)
class Simulated:
    """What a simulation found, by component."""

    peak: Bytes
    after_backward: Bytes


# The grid


def grid(everything: bool) -> list[Case]:
    return [*_plain(everything), *_full_training(), *_varied()]


def _plain(everything: bool) -> Iterator[Case]:
    for trunk in SHAPES:
        thinner = not everything and trunk != "7b"
        for gpus in FEWER_GPUS if thinner else GPUS:
            for n in FEWER_UNFROZEN if thinner else UNFROZEN:
                yield from (_case(trunk, n, gpus, s) for s in _strategies(gpus))


def _strategies(gpus: int) -> list[ShardingStrategy]:
    left_out = {ShardingStrategy.auto} | ({ShardingStrategy.NO_SHARD} if gpus > 2 else set())
    return [s for s in ShardingStrategy if s not in left_out]


def _full_training() -> Iterator[Case]:
    for gpus in (2, PER_NODE):
        yield from (_case("7b", 33, gpus, s, "full training") for s in _strategies(gpus))


def _varied() -> Iterator[Case]:
    strategy = ShardingStrategy.FULL_SHARD
    for varied in VARIED:
        for n in (0, 4, 32):
            yield from (_case("7b", n, gpus, strategy, varied) for gpus in (1, PER_NODE))
        yield _case("7b", 4, PER_NODE, ShardingStrategy.SHARD_GRAD_OP, varied)
        yield _case("70b", 4, PER_NODE, strategy, varied)


def _case(trunk: str, n: int, gpus: int, strategy: ShardingStrategy, varied: str = "") -> Case:
    changes = VARIED.get(varied, {}).copy()
    fsdp = FsdpConfig(sharding_strategy=strategy)
    for key in changes.keys() & vars(fsdp):
        setattr(fsdp, key, changes.pop(key))
    setting = Setting(SHAPES[trunk], n, fsdp, TOKENS, world_size=gpus, per_node=min(gpus, PER_NODE))
    return Case(trunk, varied, replace(setting, **changes))


# Simulations


def simulate_all(cases: list[Case], kept: Path | None) -> dict[str, Simulated]:
    """Each case's simulation, some at a time, in processes of their own; `kept` ones first."""
    found = {} if kept is None else read_kept(kept)
    left = [case for case in cases if case.name not in found]
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(PROCESSES, spawn, _prepare) as pool,
        progress("simulated", len(left)) as advance,
    ):
        futures = {pool.submit(_simulate, case.setting): case.name for case in left}
        for done, future in enumerate(as_completed(futures), 1):
            name = futures[future]
            found[name] = future.result()
            if kept is not None:
                _keep(kept, name, found[name])
            advance(done, name)
    return {case.name: found[case.name] for case in cases}


def read_kept(file: Path) -> dict[str, Simulated]:
    lines = file.read_text().splitlines() if file.exists() else []
    rows = map(json.loads, lines)
    return {row["name"]: Simulated(row["peak"], row["after_backward"]) for row in rows}


def _keep(file: Path, name: str, simulated: Simulated) -> None:
    with file.open("a") as stream:
        stream.write(json.dumps({"name": name, **vars(simulated)}) + "\n")


def _prepare() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # which full training gives


def _simulate(setting: Setting) -> Simulated:
    found = simulate(setting)
    return Simulated(found.peak.components, found.after_backward.components)


# Comparison


def compare(case: Case, simulated: Simulated) -> dict[str, Any]:
    """Both sides of a case, in bytes, and their relative differences."""
    predicted = footprint(case.setting)
    nearest = _nearest(predicted.moments, simulated.peak)
    return {
        "name": case.name,
        "peak_moment": predicted.peak.name,
        "compared_moment": nearest.name,
        "peak_difference": relative(predicted.peak.total, sum(simulated.peak.values())),
        "peak": _sides(nearest.components, simulated.peak),
        "after_backward": _sides(predicted.after_backward.components, simulated.after_backward),
    }


def _nearest(moments: tuple[Moment, ...], simulated: Bytes) -> Moment:
    """Of the moments within the tolerance of the highest, the one most like the simulated peak."""
    highest = max(moment.total for moment in moments)
    among = [moment for moment in moments if moment.total >= highest * (1 - TOTAL)]
    theirs = joined(simulated)

    def distance(moment: Moment) -> int:
        return sum(abs(ours - theirs[name]) for name, ours in joined(moment.components).items())

    return min(among, key=distance)


def _sides(predicted: Mapping[str, int], simulated: Mapping[str, int]) -> dict[str, Any]:
    ours, theirs = joined(predicted), joined(simulated)
    large = [name for name in ours if max(ours[name], theirs[name]) > SMALL]
    return {
        "predicted": ours,
        "simulated": theirs,
        "difference": relative(sum(ours.values()), sum(theirs.values())),
        "component_differences": {name: relative(ours[name], theirs[name]) for name in large},
    }


def joined(components: Mapping[str, int]) -> Bytes:
    """Bytes by component, those of the working set with the activations."""
    one = {name: components.get(name, 0) for name in JOINED}
    return one | {"activations": one["activations"] + components.get("working_set", 0)}


def relative(ours: int, theirs: int) -> float:
    """Of the larger, so that a component which only one side knows differs by 1."""
    return (ours - theirs) / max(ours, theirs, 1)


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst differences, and which settings are out of tolerance."""
    totals = {
        row["name"]: max(row["peak_difference"], row["after_backward"]["difference"], key=abs)
        for row in rows
    }
    components = {
        f"{row['name']}: {name}, {when}": difference
        for row in rows
        for when in WHEN
        for name, difference in row[when]["component_differences"].items()
    }
    worst = max(totals, key=lambda name: abs(totals[name]))
    worst_component = max(components, key=lambda name: abs(components[name]))
    out = [name for name, value in totals.items() if abs(value) > TOTAL]
    out += [name for name, value in components.items() if abs(value) > COMPONENT]
    return {
        "count": len(rows),
        "compared_at_another_moment": sum(r["peak_moment"] != r["compared_moment"] for r in rows),
        "worst_total": {"of": worst, "difference": totals[worst]},
        "worst_component": {"of": worst_component, "difference": components[worst_component]},
        "out_of_tolerance": out,
    }


# Results


def write_results(file: Path, facts: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    """A comment line `# name: JSON` for each fact, and a line for each row."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [_flat(row) for row in rows]
    with file.open("w", newline="") as stream:
        stream.writelines(f"# {name}: {json.dumps(value)}\n" for name, value in facts.items())
        writer = csv.DictWriter(stream, lines[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    say(f"wrote {file}")


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of a row what the rest of it follows from."""
    plain = {name: row[name] for name in PLAIN}
    return plain | {f"{w}.{s}.{c}": row[w][s][c] for w in WHEN for s in SIDES for c in JOINED}


def read_results(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The facts and the rows."""
    facts, lines = {}, []
    for line in file.read_text().splitlines():
        if line.startswith("# "):
            name, _, value = line[2:].partition(": ")
            facts[name] = json.loads(value)
        else:
            lines.append(line)
    return facts, [_whole(line) for line in csv.DictReader(lines)]


def _whole(line: Mapping[str, str]) -> dict[str, Any]:
    row: dict[str, Any] = {name: line[name] for name in PLAIN}
    for w in WHEN:
        row[w] = _sides(*({c: int(line[f"{w}.{s}.{c}"]) for c in JOINED} for s in SIDES))
    return row | {"peak_difference": float(line["peak_difference"])}


# Report


def show(rows: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    cells = [
        [
            row["name"],
            f"{sum(row['peak']['predicted'].values()) / 1e9:.2f}",
            f"{sum(row['peak']['simulated'].values()) / 1e9:.2f}",
            f"{row['peak_difference']:+.2%}",
            f"{max(row['peak']['component_differences'].values(), key=abs, default=0.0):+.2%}",
        ]
        for row in rows
    ]
    header = ["", "predicted GB", "simulated GB", "difference", "worst component"]
    worst, component = summary["worst_total"], summary["worst_component"]
    return "\n".join(
        [
            table(header, cells),
            f"{summary['count']} settings; worst total {worst['difference']:+.2%} ({worst['of']}), "
            f"worst component {component['difference']:+.2%} ({component['of']})",
            *(f"out of tolerance: {name}" for name in summary["out_of_tolerance"]),
        ]
    )


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--all", action="store_true", help="also what is left out to save time")
    parser.add_argument("--trunks", nargs="+", metavar="NAME", help="only these: 7b, 13b, 70b")
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="FILE",
        help="keep what is simulated here, line by line, and do not simulate again what is there: "
        "after an interruption, or when only the closed form has changed",
    )
    options = parser.parse_args()
    set_up_logging()
    cases = [c for c in grid(options.all) if c.trunk in (options.trunks or SHAPES)]
    simulated = simulate_all(cases, options.keep)
    rows = [compare(case, simulated[case.name]) for case in cases]
    summary = summarise(rows)
    print(show(rows, summary))
    if options.out:
        facts = origin(options.seed, []) | {
            "summary": summary,
            "tolerances": {"total": TOTAL, "component": COMPONENT, "component_from_bytes": SMALL},
            "left_out": _left_out(options.all),
            "trunks": options.trunks or [*SHAPES],
        }
        write_results(options.out, facts, rows)
    sys.exit(bool(summary["out_of_tolerance"]))


def _left_out(everything: bool) -> list[str]:
    same = "NO_SHARD on more than 2 GPUs: the same program as on 2"
    thinner = "13b and 70b with N in 1 and 8, and on 1, 4 and 8 GPUs: --all has them"
    return [same] if everything else [same, thinner]


if __name__ == "__main__":
    main()
