"""See whether this node, these GPUs and these files can do the job, before it is begun.

    python -m job.preflight --config configs/critic/critic_4gpu.yaml --gpus 4 --scratch /scratch
    torchrun --nproc_per_node 4 -m job.preflight --config FILE      also tries the ranks' network

Each finding is one line, and what is wrong says what to do. Exit code 0: all is well; 71: this
node is unfit, another may be fit; 78: the configuration's files are wrong.
"""

from __future__ import annotations

from pathlib import Path

from job.common.config import at_least, command_line, load_config
from job.common.errors import run_and_leave
from job.common.progress import set_up_logging
from job.common.schema import CriticConfig
from job.training.fitness import findings, raise_worst


def main() -> None:
    parser = command_line(__doc__ or "")
    parser.add_argument(
        "--gpus", type=at_least(0, int), default=0, help="that this node must have (0)"
    )
    parser.add_argument("--scratch", type=Path, help="a folder of this node that must take files")
    options = parser.parse_args()
    set_up_logging()
    config = load_config(CriticConfig, options.config, options.override)
    found = findings(config, options.gpus, options.scratch)
    for finding in found:
        print(finding)
    raise_worst(found)


if __name__ == "__main__":
    run_and_leave(main)
