"""The frozen blocks' states on disk: fill a cache, look at it, make room.

    python -m job.cache build  --config configs/critic/critic_1gpu.yaml --override ...
    python -m job.cache status --config configs/critic/critic_1gpu.yaml
    python -m job.cache prune  --dir runs/cache/prefix --keep-gb 200

`build` computes what a training of this configuration would read (`training.prefix_cache`; with
`auto` all that it could), with forward passes alone, as one process or as several (torchrun, srun).
`status` lists what is in the configuration's folder, or in --dir. `prune` removes what was damaged
or left by writers that were killed, and then what was not used for longest, until no more than
--keep-gb are left.
"""

from __future__ import annotations

if __name__ == "__main__":  # a signal during the imports must not kill the process
    from job.common.signals import install_handlers

    install_handlers()

import argparse
import sys
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from job.common.config import add_verify, at_least, command_line, load_config
from job.common.errors import InputError, run_and_leave
from job.common.progress import set_up_logging
from job.common.schema import CriticConfig
from job.training.cache_folders import CacheFolder, folders, may_hold_caches, prune

_WIDTH = 140  # of a table that goes to a file, so that no name is cut


def main() -> None:
    options = _options()
    set_up_logging()
    if options.verb == "build":
        _build(options)
    elif options.verb == "status":
        _show(_folder(options))
    else:
        _prune(options)


def _options() -> argparse.Namespace:
    parser = command_line(__doc__ or "", "cache", required=False)
    parser.add_argument("verb", choices=("build", "status", "prune"))
    parser.add_argument("--dir", type=Path, help="the folder of caches, without a configuration")
    parser.add_argument("--keep-gb", type=at_least(0), metavar="GB", help="of prune")
    add_verify(parser)
    options = parser.parse_args()
    if options.keep_gb is not None and options.verb != "prune":
        raise InputError(f"--keep-gb: it is about prune, not {options.verb}")
    return options


def _config(options: argparse.Namespace) -> CriticConfig:
    if options.config is None:
        raise InputError(f"{options.verb} needs --config FILE")
    return load_config(CriticConfig, options.config, options.override)


def _folder(options: argparse.Namespace) -> Path:
    folder: Path = options.dir or Path(_config(options).prefix_cache_folder)
    if not folder.is_dir() or not may_hold_caches(folder):
        raise InputError(f"{folder}: there is no cache here")
    return folder


def _build(options: argparse.Namespace) -> None:
    from job.training.cache_building import build

    if options.dir is not None:
        raise InputError(
            f"build writes where its configuration says: not --dir {options.dir}, but "
            f"--override training.prefix_cache_dir={options.dir}"
        )
    build(_config(options), verify=options.verify)


def _show(folder: Path) -> None:
    columns = ("trunk", "states before", "dtype", "sequences", "GB", "damaged GB", "last used")
    table = Table("cache", *columns)
    found = folders(folder)
    for one in found:
        table.add_row(*_row(one))
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(table)
    print(f"{sum(one.bytes for one in found) / 1e9:,.3f} GB in {folder}")


def _row(one: CacheFolder) -> tuple[str, ...]:
    before = "the head" if one.facts.get("of_read_rows") else f"block {one.facts.get('block')}"
    return (
        one.path.name,
        str(one.facts.get("base"))[:8],
        before,
        str(one.facts.get("dtype")),
        f"{one.sequences:,}",
        f"{one.bytes / 1e9:,.3f}",
        f"{one.damaged / 1e9:,.3f}" if one.damaged else "",
        f"{datetime.fromtimestamp(one.used):%Y-%m-%d %H:%M}",
    )


def _prune(options: argparse.Namespace) -> None:
    if options.keep_gb is None:
        raise InputError("prune needs --keep-gb GB: how much is to stay, 0 for nothing")
    folder = _folder(options)
    freed = prune(folder, options.keep_gb * 1e9)
    print(f"{freed / 1e9:,.3f} GB removed from {folder}")


if __name__ == "__main__":
    run_and_leave(main)
