"""Train a critic, or go on with a training that was interrupted.

    python -m job.train --config configs/critic/critic_local.yaml
    python -m job.train --config configs/critic/critic_local.yaml \\
        --override training.num_unfrozen_layers=0 run.name=probe

The same command goes on from the last checkpoint in run.dir. Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2 or
a file named `stop` in run.dir make it save and end with exit code 75; a second Ctrl-C ends it.
"""

from __future__ import annotations

if __name__ == "__main__":  # a signal during the imports must not kill the process
    from job.common.signals import install_handlers

    install_handlers()

from job.common.config import add_verify, command_line, load_config
from job.common.errors import run_and_leave
from job.common.progress import set_up_logging
from job.common.schema import CriticConfig
from job.training.trainer import train


def main() -> None:
    parser = command_line(__doc__ or "")
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="go on where run.dir stands (the default), or refuse a run that exists",
    )
    parser.add_argument(
        "--init-from",
        metavar="PATH",
        help="begin with the weights of a run, a checkpoint or a delta",
    )
    add_verify(parser)
    options = parser.parse_args()
    set_up_logging()
    config = load_config(CriticConfig, options.config, options.override)
    if options.init_from is not None:
        config.model.init_from = options.init_from
    train(config, resume=options.resume == "auto", verify=options.verify)


if __name__ == "__main__":
    run_and_leave(main)
