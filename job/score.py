"""Value every token of every response in a file, with a trained critic.

    python -m job.score --critic runs/critic --data solutions.jsonl --out values.parquet
    torchrun --nproc_per_node 4 -m job.score --critic DELTA --trunk TRUNK --data FILE --out OUT

The critic is a run (its newest good checkpoint), a checkpoint or a delta; FILE (or several, a glob,
a folder) has the format of training data, rewards optional. Where there are any, a table says how
well the values predict them. The same command goes on where an earlier one was ended, and on
another number of ranks too.
"""

from __future__ import annotations

if __name__ == "__main__":  # a signal during the imports must not kill the process
    from job.common.signals import install_handlers

    install_handlers()

import functools
from pathlib import Path

from job.common.config import add_verify, command_line
from job.common.data_file import one_or_all
from job.common.errors import run_and_leave
from job.common.progress import set_up_logging
from job.data.values_text import SUFFIXES, check_suffix
from job.run.trained import TrainedCritic
from job.training.scoring import score


def main() -> None:
    parser = command_line(__doc__ or "", of_a_critic=True)
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help="as for training")
    kinds = ", ".join(SUFFIXES)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help=f"one in {kinds}")
    add_verify(parser)
    options = parser.parse_args()
    check_suffix(options.out)
    set_up_logging()
    find = functools.partial(
        TrainedCritic.find, options.critic, options.trunk, tuple(options.override)
    )
    score(find, one_or_all(options.data), options.out, verify=options.verify)


if __name__ == "__main__":
    run_and_leave(main)
