"""Pre-train a small trunk with multi-token heads, in Meta's layout and in Hugging Face's.

    python -m job.pretrain --config configs/pretrain/arithmetic.yaml

Reads prompt and response of each row as plain text (or the embedded chains, without errors),
trains a tokenizer first, and writes params.json, consolidated.pth, tokenizer.json and recipe.yaml;
the folder hf/ beside them is the same next-token model and tokenizer in Hugging Face's layout.
"""

from __future__ import annotations

if __name__ == "__main__":  # a signal during the imports must not kill the process
    from job.common.signals import install_handlers

    install_handlers()

from job.common.config import add_verify, command_line, load_config
from job.common.errors import run_and_leave
from job.common.progress import set_up_logging
from job.common.schema import PretrainConfig
from job.training.pretraining import make_trunk


def main() -> None:
    parser = command_line(__doc__ or "")
    add_verify(parser)
    options = parser.parse_args()
    set_up_logging()
    config = load_config(PretrainConfig, options.config, options.override)
    make_trunk(config, verify=options.verify)


if __name__ == "__main__":
    run_and_leave(main)
