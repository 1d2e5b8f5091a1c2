"""What is in data before anything is trained on it.

    python -m job.data solutions.jsonl
    python -m job.data 'train-*.parquet' --config configs/critic/critic_1gpu.yaml --override ...

Rows, problems and solutions, labels by row and by length, lengths, and the first rows. With a
configuration all that as its trunk will see it: its fields, template and tokens, where the response
begins and where targets lie, rows that are too long, and the problems that its validation data has
too, or that these are its files. Rows that job.train would refuse are named with their reasons.
Prints text, and writes a page with --page; ends with 78 where a training would have no row.
"""

from __future__ import annotations

if __name__ == "__main__":  # a signal while reading must not kill the process
    from job.common.signals import install_handlers

    install_handlers()

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from job.common.config import at_least, command_line, merge_config
from job.common.data_file import check_readable, described, one_or_all
from job.common.errors import InputError, listing, run_and_leave
from job.common.files import check_place
from job.common.possible_values import impossible_fields, impossible_range
from job.common.progress import set_up_logging
from job.common.schema import EMBEDDED, CriticConfig, DataConfig
from job.data.rows import BadRow
from job.data.survey import Piece, ShownRow, Survey, survey
from job.data.tokenizer import Tokenizer, load_tokenizer
from job.run.data_page import REFUSED, facts, heading, visible, write_data_page

_PIECES = 200  # of a row, in the text; the page has all
_BEGINS, _BETWEEN = " \N{BLACK RIGHT-POINTING TRIANGLE} ", "\N{MIDDLE DOT}"


def _options() -> argparse.Namespace:
    parser = command_line(__doc__ or "", "data", required=False)
    parser.add_argument("files", nargs="+", metavar="FILE", help="files, globs or folders")
    parser.add_argument("--fields", help="as data.fields; default: the configuration's")
    parser.add_argument("--reward-range", nargs=2, type=float, metavar=("LOW", "HIGH"))
    parser.add_argument(
        "--rows", type=at_least(0, int), default=3, metavar="N", help="so many are shown (3)"
    )
    parser.add_argument("--page", type=Path, metavar="FILE.html", help="write a page too")
    options = parser.parse_args()
    if options.page is not None:
        check_place(options.page.parent, "--page")
    return options


def _data(options: argparse.Namespace) -> tuple[DataConfig, Tokenizer | None]:
    """What to read and how, and the tokenizer of a configuration."""
    files = one_or_all(options.files)
    if files == EMBEDDED:
        raise InputError("embedded data is made, not read; see docs/configuration.md")
    check_readable(files)
    fields, span = _fields(options.fields), options.reward_range
    _refuse_impossible(fields, span)
    both = {"fields": fields, "reward_range": span}
    given = {key: value for key, value in both.items() if value is not None}
    if options.config is None:
        return DataConfig(train=files, validation=None, **given), None
    own = [f"data.{key}={json.dumps(value)}" for key, value in given.items()]
    train = f"data.train={json.dumps(files)}"
    config = merge_config(CriticConfig, options.config, [*options.override, *own, train])
    _refuse_impossible(config.data.fields, config.data.reward_range)
    if config.data.validation == EMBEDDED:
        config.data.validation = None
    tokenizer = load_tokenizer(config.tokenizer.path or config.model.path)
    return config.data, tokenizer


def _refuse_impossible(fields: Any, span: list[float] | None) -> None:
    if problems := [*impossible_fields(fields), *impossible_range(span, fields)]:
        raise InputError("; ".join(problems))


def _fields(text: str | None) -> Any:
    try:
        return None if text is None else yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--fields {text}: {error}") from None


def _tables(name: str, found: Survey) -> Iterator[Table]:
    about = Table(title=name, box=box.SIMPLE_HEAD, show_header=False)
    for row in facts(found):
        about.add_row(*row)
    yield about
    if not found.rows:
        return
    labels = Table("label", "rows", "by row", f"by response {found.unit}", box=box.SIMPLE_HEAD)
    for kind, n, by_row, by_length in found.labels():
        labels.add_row(kind, f"{n:,}", f"{by_row:.1%}", f"{by_length:.1%}")
    yield labels
    lengths = Table(found.unit, "rows", "", box=box.SIMPLE_HEAD)
    bins = found.histogram()
    most = max(n for _, _, n in bins)
    for low, high, n in bins:
        bar = "\N{FULL BLOCK}" * round(40 * n / most)
        lengths.add_row(f"{low:,} to {high:,}", f"{n:,}", bar)
    yield lengths


def as_text(shown: ShownRow) -> str:
    """A row in a paragraph: tokens with points between them, targets in braces behind theirs."""
    prompt, response = (_joined(pieces) for pieces in (shown.prompt, shown.response))
    return f"{heading(shown)}\n{prompt}{_BEGINS}{response}"


def _joined(pieces: Sequence[Piece]) -> str:
    texts = [
        visible(piece.text) + "".join(f"{{{target.value:g}}}" for target in piece.targets)
        for piece in pieces[:_PIECES]
    ]
    more = f" ... and {len(pieces) - _PIECES} more" if len(pieces) > _PIECES else ""
    return _BETWEEN.join(texts) + more


def _list(title: str, first: Sequence[BadRow], count: int) -> None:
    if first:
        more = f"\n  ... and {count - len(first):,} more" if count > len(first) else ""
        print(f"{title}: {count:,}{listing([*map(str, first)])}{more}")


def _refuse_useless(name: str, found: Survey) -> None:
    """Raise InputError where a training would have nothing to begin with."""
    if not found.rows:
        raise InputError(f"{name}: no usable row ({found.n_bad:,} read)")
    if found.n_unlabelled == found.rows:
        raise InputError(
            f"{name}: no row has a label that job.train takes; job.score needs none "
            "(--fields '{reward: NAME}' names the field, --reward-range what its numbers mean)"
        )


def main() -> None:
    options = _options()
    set_up_logging()
    data, tokenizer = _data(options)
    found = survey(data, tokenizer, options.rows)
    name = described(data.train)
    console = Console()
    for table in _tables(name, found):
        console.print(table)
    _list("Bad rows", found.bad, found.n_bad)
    _list(REFUSED, found.unlabelled, found.n_unlabelled)
    for shown in found.first:
        print(f"\n{as_text(shown)}")
    if options.page is not None:
        print(f"\npage     {write_data_page(name, found, options.page).resolve()}")
    _refuse_useless(name, found)


if __name__ == "__main__":
    run_and_leave(main)
