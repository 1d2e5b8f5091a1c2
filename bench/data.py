"""Data sets of millions of rows: time and memory until a training could take its first step.

    python bench/data.py --out bench/results/data.json
    python bench/data.py --rows 100000 1000000

Rows have GSM8K's length, four solutions a problem; their text is sentences drawn from a fixed few.
The file is written to a temporary folder (TMPDIR; half a gigabyte for a million rows, and as much
again for its tokens), and read in two processes, one after the other:

    tokenising   job.data.token_cache.load_split: rows to tokens, the first time
    starting     what job.train does with data that is tokenised already: found, looked at by
                 samples, checked against the model, ready to be packed. Then steps are planned: the
                 first, which draws an epoch's order, those after it, and one over the epoch's end;
                 and the prefix cache asks by which keys all sequences' states are kept

Memory is the most that a process has had resident, of that what it holds in memory of its own
(anonymous), and what it had before it began. MB are 1e6 bytes.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import ROOT, command_line, say, table, write_record

ROWS = (10_000_000,)
LIMIT_MB = 2 * 2**30 / 1e6
SOLUTIONS = 4  # a problem
SENTENCES, WORDS = 2048, 1500  # that text is made of
PROMPT, RESPONSE = (2, 4), (3, 7)  # sentences
VALIDATION = 1000  # rows
BATCH = 64  # sequences of a step
PLANS = 100
WAYS = ("tokenising", "starting")


# Data


def _sentences(rng: random.Random) -> list[str]:
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(WORDS)]
    found = []
    for _ in range(SENTENCES):
        chosen = rng.choices(words, k=rng.randint(6, 14))
        found.append(f"{' '.join(chosen).capitalize()} {rng.randint(2, 999)}.")
    return found


def rows(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """`count` solutions, SOLUTIONS in a row to each problem."""
    rng = random.Random(seed)
    sentences = _sentences(rng)
    prompt = ""
    for row in range(count):
        if row % SOLUTIONS == 0:
            chosen = rng.choices(sentences, k=rng.randint(*PROMPT))
            prompt = f"{row // SOLUTIONS}: {' '.join(chosen)}"
        response = "\n".join(rng.choices(sentences, k=rng.randint(*RESPONSE)))
        yield {"prompt": prompt, "response": response, "reward": float(rng.random() < 0.5)}


def write_rows(file: Path, count: int, seed: int) -> None:
    with file.open("w") as stream:
        for row in rows(count, seed):
            stream.write(json.dumps(row) + "\n")


def write_model(folder: Path, seed: int) -> None:
    """What a training reads of a model before its weights: sizes, and a byte-level BPE."""
    import tokenizers

    folder.mkdir()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentences(random.Random(seed)), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 4096}
    (folder / "params.json").write_text(json.dumps(sizes))


# Each way, in a process of its own


def tokenising(folder: Path) -> dict[str, Any]:
    from job.data.token_cache import load_split
    from job.data.tokenizer import load_tokenizer

    config, tokenizer = _config(folder), load_tokenizer(folder / "model")
    before, began = _memory(), time.perf_counter()
    found = load_split(config.data, "train", tokenizer)
    seconds = time.perf_counter() - began
    return _memory_since(before) | {
        "seconds": seconds,
        "rows_per_second": len(found) / seconds,
        "tokens": int(found.offsets[-1]),
        "tokens_per_row": int(found.offsets[-1]) / len(found),
    }


def starting(folder: Path) -> dict[str, Any]:
    from job.distributed.world import World
    from job.model.architecture_file import read_architecture
    from job.run.directory import RunDirectory
    from job.training.cache_boundary import Boundary
    from job.training.data import load_critic_data

    config = _config(folder)
    before, began = _memory(), time.perf_counter()
    packer = load_critic_data(config, RunDirectory(folder / "run"), World()).train
    seconds = time.perf_counter() - began
    per_epoch = len(packer.units) // BATCH

    def plan(step: int) -> float:
        planned = time.perf_counter()
        packer.plan(step, BATCH, 0)
        return time.perf_counter() - planned

    first = plan(0)
    later = [plan(step) for step in range(1, PLANS)]
    over_the_end = plan(per_epoch)
    packer.assemble(packer.plan(per_epoch, BATCH, 0)[0])
    boundary = Boundary.of(config, read_architecture(config.model.path))
    asked = time.perf_counter()
    boundary.stored(packer)
    seconds_of_keys = time.perf_counter() - asked
    return _memory_since(before) | {
        "seconds": seconds,
        "seconds_of_the_first_plan": first,
        "seconds_of_a_plan": statistics.median(later),
        "seconds_of_a_plan_over_the_end": over_the_end,
        "seconds_of_the_cache_s_keys": seconds_of_keys,
    }


def _config(folder: Path) -> Any:
    from job.common.schema import CriticConfig, DataConfig, ModelConfig, TrainingConfig

    return CriticConfig(
        model=ModelConfig(path=str(folder / "model")),
        data=DataConfig(
            train=str(folder / "train.jsonl"),
            validation=str(folder / "validation.jsonl"),
            cache_dir=str(folder / "cache"),
        ),
        training=TrainingConfig(batch_size=BATCH, num_unfrozen_layers=1),
    )


def _memory() -> dict[str, float]:
    """MB that this process has resident, most so far, and now of its own."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 / 1e6 for name in ("VmHWM", "RssAnon")}


def _memory_since(before: dict[str, float]) -> dict[str, float]:
    now = _memory()
    return {
        "peak_mb": now["VmHWM"],
        "own_mb_at_the_end": now["RssAnon"],
        "mb_before": before["VmHWM"],
    }


# All of them


def measure(count: int, seed: int) -> dict[str, Any]:
    """Both ways over so many rows."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        began = time.perf_counter()
        write_rows(folder / "train.jsonl", count, seed)
        write_rows(folder / "validation.jsonl", VALIDATION, seed + 1)
        write_model(folder / "model", seed)
        say(f"{count:,} rows written in {time.perf_counter() - began:.0f} s")
        found: dict[str, Any] = {
            "rows": count,
            "file_mb": (folder / "train.jsonl").stat().st_size / 1e6,
        }
        for way in WAYS:
            found[way] = _in_a_process(way, folder)
            say(f"{way}: {found[way]['seconds']:.1f} s, {found[way]['peak_mb']:.0f} MB at most")
    return found


def _in_a_process(way: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--way", way, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def growth(sizes: list[dict[str, Any]]) -> dict[str, float]:
    """Bytes of peak memory a row, from the last size but one to the last."""
    small, large = sorted(sizes, key=lambda one: one["rows"])[-2:]
    more = large["rows"] - small["rows"]
    return {way: 1e6 * (large[way]["peak_mb"] - small[way]["peak_mb"]) / more for way in WAYS}


def show(results: dict[str, Any]) -> str:
    header = [
        "rows",
        "rows/s",
        "peak MB",
        "starting s",
        "peak MB",
        "first plan s",
        "a plan ms",
        "keys s",
    ]
    lines = [
        [
            f"{one['rows']:,}",
            f"{one['tokenising']['rows_per_second']:,.0f}",
            f"{one['tokenising']['peak_mb']:.0f}",
            f"{one['starting']['seconds']:.2f}",
            f"{one['starting']['peak_mb']:.0f}",
            f"{one['starting']['seconds_of_the_first_plan']:.3f}",
            f"{1e3 * one['starting']['seconds_of_a_plan']:.2f}",
            f"{one['starting']['seconds_of_the_cache_s_keys']:.1f}",
        ]
        for one in results["sizes"]
    ]
    text = [table(header, lines)]
    if "bytes_per_row" in results:
        grown = (f"{way} {found:.0f}" for way, found in results["bytes_per_row"].items())
        text.append(f"peak memory grows by so many bytes a row: {', '.join(grown)}")
    text.append(f"below 2 GiB: {'yes' if results['below_2_gib'] else 'NO'}")
    return "\n".join(text)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="default: 10 million")
    parser.add_argument("--way", choices=WAYS, help="print what one way takes, for --folder")
    parser.add_argument("--folder", type=Path, help="with the data")
    options = parser.parse_args()
    if options.way is not None:
        way: Callable[[Path], dict[str, Any]] = {
            "tokenising": tokenising,
            "starting": starting,
        }[options.way]
        print(json.dumps(way(options.folder)))
        return
    sizes = [measure(count, options.seed) for count in options.rows]
    peaks = [one[way]["peak_mb"] for one in sizes for way in WAYS]
    results: dict[str, Any] = {"sizes": sizes, "below_2_gib": max(peaks) < LIMIT_MB}
    if len(sizes) > 1:
        results["bytes_per_row"] = growth(sizes)
    print(show(results))
    if options.out:
        write_record(options.out, results, seed=options.seed, packages=["numpy", "tokenizers"])


if __name__ == "__main__":
    main()
