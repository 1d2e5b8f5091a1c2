"""Memory of a training: predicted without a GPU, or run and held against its prediction.

python -m job.memory predict --config configs/critic/critic_4gpu.yaml --gpus 4 --shape 7b
python -m job.memory predict --config FILE --gpus 4 --override model.path=TRUNK --simulate
python -m job.memory validate --config configs/critic/critic_local.yaml --unfreeze 0 4
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from job.common.config import at_least, command_line, load_config
from job.common.errors import InputError, listing, run_and_leave
from job.common.progress import set_up_logging
from job.common.schema import CriticConfig
from job.memory.fit import as_dict, component_table, footprint_columns, verdicts
from job.memory.footprint import Footprint, Setting, footprint
from job.memory.settings import SHAPES, setting_of
from job.model.architecture_file import read_architecture

_console = Console()


def main() -> None:
    commands = {"predict": _predict, "validate": _validate, "measure": _measure}
    command, *given = sys.argv[1:] or ["--help"]
    if command not in commands:
        print(__doc__)
        if command not in ("-h", "--help"):
            raise InputError(f"{command}: no such command; there are predict and validate")
        return
    commands[command](given)


def _predict(given: Sequence[str]) -> None:
    parser = command_line("Predict the memory of each GPU, without one.", "memory predict")
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), help="of the trunk, instead of model.path")
    add("--gpus", type=int, default=1, metavar="N", help="GPUs per node (1)")
    add("--nodes", type=int, default=1, metavar="N", help="nodes (1)")
    add(
        "--gpu-memory",
        type=at_least(0.001),
        nargs="+",
        default=[42.3, 85.0],
        metavar="GB",
        help="of a GPU",
    )
    add("--cpu", action="store_true", help="CPU's kernels instead of CUDA's")
    add("--prefix-cached", action="store_true", help="as if the frozen blocks' result were cached")
    add("--simulate", action="store_true", help="also step through it on tensors without content")
    add("--json", action="store_true", help="as JSON")
    options = parser.parse_args(given)
    setting = _setting(options)
    if options.simulate:  # which steps through torch's own kernels
        setting = replace(setting, compiled=False)
    capacities = [int(size * 1e9) for size in options.gpu_memory]
    simulated = _simulated(setting) if options.simulate else None
    if options.json:
        result = as_dict(setting, capacities)
        if simulated is not None:
            result["simulated_peak"] = simulated.peak.components
        print(json.dumps(result, indent=2))
        return
    _show(setting, capacities, simulated)


def _setting(options: argparse.Namespace) -> Setting:
    # a prediction needs no data; what else lacks a value is an error
    given = ["data.train=embedded", "data.validation=embedded", *options.override]
    if options.shape is not None:
        given.insert(0, f"model.path={options.shape}")
    if options.gpus < 1 or options.nodes < 1:
        raise InputError("--gpus and --nodes: at least one")
    config = load_config(CriticConfig, options.config, given)
    architecture = SHAPES.get(options.shape) or read_architecture(config.model.path)
    return setting_of(
        config,
        architecture,
        world_size=options.gpus * options.nodes,
        per_node=options.gpus,
        capacity=int(max(options.gpu_memory) * 1e9),
        cuda=not options.cpu,
        prefix_cached=options.prefix_cached,
    )


def _simulated(setting: Setting) -> Footprint:
    if setting.fsdp.cpu_offload:
        raise InputError(
            "--simulate: not with distributed.fsdp.cpu_offload, whose host memory the "
            "simulation cannot tell from the GPU's"
        )
    from job.training.simulation import simulate

    return simulate(setting)


def _show(setting: Setting, capacities: Sequence[int], simulated: Footprint | None) -> None:
    columns = footprint_columns(footprint(setting))
    if simulated is not None:
        columns |= {
            "simulated peak": simulated.peak.components,
            "simulated after backward": simulated.after_backward.components,
        }
    n, tokens = setting.num_unfrozen_layers, setting.micro_batch_tokens
    title = f"memory of each of {setting.world_size} GPU(s), N={n}, {tokens:,} tokens"
    title += f", {setting.fsdp.sharding_strategy.name}"
    title += ", compiled blocks" if setting.compiled else ""
    _console.print(component_table(title, columns))
    if simulated is not None:
        _console.print("The simulation has activations and working set as one.")
    for line in verdicts(setting, capacities):
        _console.print(line, markup=False, highlight=False, soft_wrap=True)


def _validate(given: Sequence[str]) -> None:
    import torch

    from job.memory import validation

    parser = command_line(
        "Measure configurations and hold them against their predictions.", "memory validate"
    )
    add = parser.add_argument
    add("--unfreeze", type=int, nargs="+", required=True, metavar="N", help="blocks to train")
    add("--gpus", type=int, default=1, metavar="N", help="processes on this machine (1)")
    add("--out", type=Path, default=Path("runs/memory"), metavar="DIR", help="(runs/memory)")
    options = parser.parse_args(given)
    if options.gpus < 1:
        raise InputError("--gpus: at least one")
    if len(set(options.unfreeze)) < 2 and not torch.cuda.is_available():
        raise InputError("--unfreeze: two or more; without a GPU it is the growth that is compared")
    for n in options.unfreeze:
        given_n = f"training.num_unfrozen_layers={n}"
        load_config(CriticConfig, options.config, [*options.override, given_n])
    measured = validation.validate(options.config, options.override, options.unfreeze, options.gpus)
    validation.write(measured, options.out)
    _console.print(validation.component_table(measured))
    for line in validation.verdict(measured):
        _console.print(line, markup=False, highlight=False, soft_wrap=True)
    _console.print(f"{options.out}/memory-validation.json, .md, .png", highlight=False)
    if found := validation.disagreements(measured):
        raise validation.Disagreement("prediction and measurement differ" + listing(found))


def _measure(given: Sequence[str]) -> None:
    from job.training.measurement import measure

    parser = command_line("One process of `validate`.", "memory measure")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(given)
    config = load_config(CriticConfig, options.config, options.override)
    set_up_logging()
    ranks = measure(config, options.out.parent)
    if ranks is not None:
        options.out.write_text(json.dumps(ranks))


if __name__ == "__main__":
    run_and_leave(main)
