"""Write a trained critic in a form that others load.

    python -m job.export --critic runs/critic --format token-classification --out DIR

    token-classification     a Hugging Face folder for AutoModelForTokenClassification, one label:
                             a value for each token, as verl loads it
    sequence-classification  one for AutoModelForSequenceClassification, one label: the value at
                             the last token, as TRL and OpenRLHF load it. Its head has no bias
    meta                     params.json and consolidated.pth of the trunk, value_head.safetensors
    delta                    the trained parameters alone, for job.score, job.train --init-from and
                             job.export together with the trunk

The trained blocks are in each of them. The critic is a run (its newest good checkpoint), a
checkpoint or a delta.
"""

from __future__ import annotations

if __name__ == "__main__":  # a signal during the imports must not kill the process
    from job.common.signals import install_handlers

    install_handlers()

from pathlib import Path

from job.common.config import command_line
from job.common.errors import run_and_leave
from job.common.progress import set_up_logging
from job.export.formats import WRITERS, export
from job.run.trained import TrainedCritic


def main() -> None:
    parser = command_line(__doc__ or "", of_a_critic=True)
    parser.add_argument("--format", required=True, choices=WRITERS, dest="form")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    options = parser.parse_args()
    set_up_logging()
    trained = TrainedCritic.find(options.critic, options.trunk, options.override)
    export(trained, options.form, options.out)


if __name__ == "__main__":
    run_and_leave(main)
