"""Everything that only a GPU can tell about this project, in ten minutes.

    python bench/gpu.py --out bench/results/gpu-NAME.json

Its sections, the most important first: the machine; the rate of large matrix products; attention
on packed sequences, a step's loss and gradients, each against the CPU; the same bits when run again
and when resumed; a 7B critic with random weights: predicted memory against the allocator's and
NVML's, tokens a second and their share of that rate, where the time goes, how long a save stops it;
the main job through the training loop; the 7B critic again with other N, batches and settings.

Each section is a process of its own with a time it may take. What it has found is in the file as
soon as it is there, and one that fails takes none of the others with it. On one GPU; needs
torch >= 2.11 and few packages besides (bench/README.md says which, and how to bring them along).
Without a GPU,

    python bench/gpu.py --device cpu --shape micro --budget 3000 --out FILE

runs the same, and says nothing about GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from common import ROOT, command_line, origin, say

sys.path.insert(0, str(ROOT))

import gpu_parity
from gpu_training import ALL_SHAPES, Case, measure

from job.common.errors import run_and_leave
from job.common.schema import ShardingStrategy
from job.memory.validation import MALLOC, Measured, markdown, outside
from job.training.allocator import set_up_allocator

BUDGET = 570  # seconds for everything
LEAST = 15  # seconds without which no section begins
MATRIX = {"cuda": 8192, "cpu": 512}
PRODUCTS = {"cuda": 200, "cpu": 20}  # back to back
SMALLER = 8  # than at 7B are micro-batches and sequences of the micro shape
STEPS = {"7b": 300, "micro": 20}  # of the main job
CASES = (
    Case(4, saves=True, profiled=True),
    # as one GPU trains by default
    Case(4, compiled=True, strategy=ShardingStrategy.REPLICATE_FROZEN, profiled=True),
    Case(0),
    Case(8),
    Case(4, sequence=2048),
    Case(4, sequence=300),
    Case(4, strategy=ShardingStrategy.REPLICATE_FROZEN),
    Case(4, tokens=2048),
    Case(4, compiled=True),
    Case(2),
    Case(4, activation_checkpointing=True),
    Case(0, compiled=True),
    Case(8, compiled=True),
    Case(2, compiled=True),
    Case(4, tokens=2048, compiled=True),
)
FIRST = 2  # of the cases come before the main job

Options = argparse.Namespace


@dataclass(frozen=True)
class Section:
    """A question, what answers it, and the seconds that this may take."""

    name: str
    answer: Callable[[Options], Any]
    seconds: float


def sections(shape: str) -> list[Section]:
    cases = [_section_of(case, shape) for case in CASES]
    return [
        Section("machine", machine, 60),
        Section("matrix products", matrix_products, 60),
        Section("attention", lambda o: gpu_parity.attention(_device(), o.seed), 90),
        Section("gradients", lambda o: gpu_parity.gradients(o.seed), 60),
        Section("same bits", lambda o: gpu_parity.same_bits(o.seed), 90),
        *cases[:FIRST],
        Section("main job", main_job, 120),
        *cases[FIRST:],
    ]


def _section_of(case: Case, shape: str) -> Section:
    scaled = case
    if shape == "micro":
        tokens, sequence = case.tokens // SMALLER, case.sequence // SMALLER
        scaled = replace(case, tokens=tokens, sequence=sequence)
    return Section(f"training, {case.name}", partial(training, scaled), 90)


def main() -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--shape", choices=sorted(ALL_SHAPES), default="7b", help="of the trunk (7b)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="what to measure (cuda)")
    add(
        "--budget",
        type=float,
        default=BUDGET,
        help=f"seconds for everything ({BUDGET}); with more, each section may take more",
    )
    add("--only", nargs="+", metavar="WORD", help="only sections with one of these in their names")
    add("--scratch", type=Path, help="folder for a checkpoint of 10 GB (default: a temporary one)")
    add("--section", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.section is not None:
        (one,) = (s for s in sections(options.shape) if s.name == options.section)
        set_up_allocator()  # as every command of the job does
        run_and_leave(lambda: print(json.dumps(one.answer(options))))
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here; --device cpu --shape micro runs the same without one")
    record = _run(options)
    print(page(record["sections"]))
    failed = [name for name, one in record["sections"].items() if "failed" in one]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


# Sections, one after the other


def _run(options: Options) -> dict[str, Any]:
    began = time.monotonic()
    record = origin(options.seed, ("numpy", "omegaconf")) | {
        "shape": options.shape,
        "device": options.device,
        "sections": {},
    }
    for section in sections(options.shape):
        if options.only and not any(word in section.name for word in options.only):
            continue
        left = options.budget - (time.monotonic() - began)
        record["sections"][section.name] = _answer(section, left, options)
        if options.out is not None:
            _write(options.out, record)
    return record


def _answer(section: Section, left: float, options: Options) -> dict[str, Any]:
    if left < LEAST:
        return {"left_out": f"{left:.0f} of {options.budget:.0f} seconds were left"}
    began = time.monotonic()
    slower = max(1.0, options.budget / BUDGET)
    found = _in_a_process(section, min(left, slower * section.seconds), options)
    seconds = round(time.monotonic() - began, 1)
    say(f"{seconds:6.1f} s  {section.name}{'  FAILED' if 'failed' in found else ''}")
    return found | {"seconds": seconds}


def _in_a_process(section: Section, seconds: float, options: Options) -> dict[str, Any]:
    given = ["--section", section.name, "--shape", options.shape, "--device", options.device]
    given += ["--seed", str(options.seed)]
    if options.scratch is not None:
        given += ["--scratch", str(options.scratch)]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [sys.executable, __file__, *given],
            stdout=out,
            stderr=err,
            env=os.environ | MALLOC | hidden,
            start_new_session=True,
        )
        code = _exit_code(process, seconds)
        answers, errors = (_content(file) for file in (out, err))
    answer = _last_answer(answers)
    found = {} if answer is None else {"found": answer}
    if code is None:
        return found | {"failed": f"not done after {seconds:.0f} s"}
    if code or answer is None:
        return found | {"failed": errors[-2000:] or f"exit code {code}", "exit_code": code}
    return found


def _exit_code(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """None if it has lasted too long; the processes that it has started end with it."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _content(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip()


def _last_answer(text: str) -> Any:
    """The last line that is JSON: a section may say what it has so far, and libraries something."""
    for line in reversed(text.splitlines()):
        with suppress(ValueError):
            return json.loads(line)
    return None


def _write(file: Path, record: dict[str, Any]) -> None:
    """Replace the file at once: it may be read, or this be killed, at any time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(file)
    file.with_suffix(".md").write_text(page(record["sections"]))


# What is asked


def machine(options: Options) -> dict[str, Any]:
    """The GPU and its software."""
    found: dict[str, Any] = {
        "cuda": torch.version.cuda,
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF", ""),
        "compiler": shutil.which("gcc") or shutil.which("cc"),
    }
    if _device().type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "capability": list(torch.cuda.get_device_capability()),
            "bytes": properties.total_memory,
            "nccl": list(torch.cuda.nccl.version()),
            "nvidia_smi": _nvidia_smi(),
        }
    return found


def _nvidia_smi() -> str | None:
    command = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.max.sm,power.limit,mig.mode.current",
    ]
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run([*command, "--format=csv,noheader"], capture_output=True, text=True)
    return done.stdout.strip()


def matrix_products(options: Options) -> dict[str, Any]:
    """Operations a second of large matrix products in the compute dtype, back to back."""
    device = _device()
    size, count = MATRIX[device.type], PRODUCTS[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = [_products(a, b, out, count) for _ in range(3)]  # the first warms up
    return {"size": size, "operations_per_second": 2 * size**3 * count / min(seconds[1:])}


def _products(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        torch.mm(a, b, out=out)
    if a.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def training(case: Case, options: Options) -> dict[str, Any]:
    return measure(case, options.shape, options.seed, options.scratch)


def main_job(options: Options) -> dict[str, Any]:
    """A trunk and a critic of configs/critic/critic_local.yaml through the training loop."""
    steps = STEPS["micro" if options.shape == "micro" else "7b"]
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        settings = _settings_of_main_job(Path(scratch), steps)
        config = str(ROOT / "configs/critic/critic_local.yaml")
        command = [sys.executable, "-m", "job.train", "--config", config, "--override", *settings]
        began = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        seconds = time.monotonic() - began
        if done.returncode != 0:
            raise RuntimeError(f"exit {done.returncode}: {done.stderr[-1500:]}")
        return {"steps": steps, "seconds": seconds} | _of_run(Path(scratch, "run"))


def _settings_of_main_job(scratch: Path, steps: int) -> list[str]:
    recipe = (ROOT / "configs/pretrain/arithmetic.yaml").read_text()
    shorter = recipe.replace("max_steps: 900", f"max_steps: {steps}")
    assert shorter != recipe, "configs/pretrain/arithmetic.yaml has another max_steps"
    (scratch / "recipe.yaml").write_text(shorter)
    return [
        f"run.dir={scratch}/run",
        f"model.path={scratch}/trunk",
        f"model.recipe={scratch}/recipe.yaml",
        f"data.cache_dir={scratch}/cache",
        "data.arithmetic.train_examples=9600",
        "data.arithmetic.validation_examples=500",
        f"training.max_steps={steps}",
        f"evaluation.every_steps={steps // 2}",
        f"checkpoint.every_steps={steps // 2}",
        f"logging.every_steps={steps // 4}",
        f"distributed.fsdp.mixed_precision={str(_device().type == 'cuda').lower()}",
        "mlflow.enabled=false",
        "report.enabled=false",
    ]


def _of_run(run: Path) -> dict[str, Any]:
    """The last evaluation, speed and memory of a finished run."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    telemetry = [json.loads(line) for line in (run / "telemetry.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_second"] for line in telemetry if "tokens_per_second" in line]
    wanted = ("validation/value/mse", "validation/value/mse_constant", "train/loss")
    return {
        "status": json.loads((run / "status.json").read_text())["state"],
        "last": {name: metrics[-1].get(name) for name in wanted},
        "tokens_per_second": speeds[-1] if speeds else None,
    }


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


# The page


def page(found: dict[str, dict[str, Any]]) -> str:
    """What people look at first; the record has the rest."""
    trained = {n: s["found"] for n, s in found.items() if n.startswith("training") and "found" in s}
    products = found.get("matrix products", {}).get("found", {})
    lines = _table_of_speed(trained, products.get("operations_per_second"))
    if trained:
        plain = [_measured(one) for name, one in trained.items() if name.count(",") == 1]
        lines += ["", *([markdown(plain)] if plain else [])]
        for measured in plain:
            lines += [
                f"N={measured.num_unfrozen_layers}, {n}: {v / 1e9:.2f} GB"
                for n, v in outside(measured)
            ]
    for name, one in found.items():
        if not name.startswith("training") and "found" in one:
            lines += ["", f"{name}: {json.dumps(one['found'])}"]
        if "found" not in one or "failed" in one:
            why = one.get("left_out") or one["failed"].splitlines()[-1]
            lines += ["", f"{name}: {'left out' if 'left_out' in one else 'FAILED'}: {why}"]
    return "\n".join(lines) + "\n"


def _table_of_speed(trained: dict[str, dict[str, Any]], rate: float | None) -> list[str]:
    lines = ["| | tokens/s | of the matrix products' rate | idle | peak predicted, GB | measured |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, one in trained.items():
        share = "-" if rate is None else f"{one['operations_per_second'] / rate:.1%}"
        idle = f"{one['profile']['idle_share']:.1%}" if "profile" in one else "-"
        peak = _measured(one).rows[-1]
        lines.append(
            f"| {name.removeprefix('training, ')} | {one['tokens_per_second']:,.0f} | {share} "
            f"| {idle} | {peak.predicted / 1e9:.3f} | {peak.measured / 1e9:.3f} |"
        )
    return lines


def _measured(one: dict[str, Any]) -> Measured:
    names: Sequence[str] = ("num_unfrozen_layers", "predicted", "stages", "recorder")
    return Measured(**{name: one[name] for name in names})


if __name__ == "__main__":
    main()
