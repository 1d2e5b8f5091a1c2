"""A trained critic written in one of the forms that others load."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from job.common.errors import InputError, file_error
from job.common.files import atomic_folder
from job.common.progress import progress
from job.common.schema import Loss
from job.common.signals import stop_if_asked
from job.data.tokenizer import Tokenizer, load_tokenizer
from job.data.tokenizer_files import copy_tokenizer, reader_of, write_tokenizer
from job.export.chat_template import ReadText
from job.export.model_card import DELTA, META, SEQUENCES, TOKENS, bias_note, model_card
from job.export.one_label import Task, one_label_config
from job.export.whole_critic import (
    Spill,
    WholeCritic,
    write_hugging_face,
    write_meta,
)
from job.model.safetensors_file import save_tensors
from job.run.checkpoint_store import HEAD
from job.run.manifest import FACTS, FileSum, Manifest
from job.run.trained import TENSORS, TrainedCritic
from job.training.histogram import Histogram

CHAT_TEMPLATE = "chat_template.jinja"
_log = logging.getLogger("job.export")


def export(trained: TrainedCritic, form: str, out: Path) -> None:
    """Write a critic to a new folder, which appears when it is whole.

    Raises:
        InputError: the trunk or the tokenizer is another one, or the folder is there already.
        Ending: it cannot be written; a disk that is full may pass (StorageError).
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: there already; choose another --out, or remove it")
    _refuse_bins(trained, form)
    trained.check()
    source = trained.config.tokenizer.path or trained.config.model.path
    tokenizer = load_tokenizer(source)
    trained.check_tokenizer(tokenizer.fingerprint)
    try:
        with atomic_folder(out) as folder:
            read = ReadText(trained.config.data.template, trained.config.data.fields, tokenizer)
            WRITERS[form](trained, tokenizer, folder)
            card = model_card(trained, form, tokenizer, read)
            (folder / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise file_error(error, f"{out}: cannot be written: {error.strerror}") from None
    _log.info("%s: %s", out, form)
    if form == SEQUENCES and (note := bias_note(trained)):
        _log.warning("%s", note)


def _refuse_bins(trained: TrainedCritic, form: str) -> None:
    if form == SEQUENCES and trained.config.objective.loss is Loss.hl_gauss:
        raise InputError(
            f"--format {SEQUENCES}: its readers take one label, and this critic (hl_gauss) has "
            f"{trained.config.objective.bins}, whose expectation no linear head gives; choose "
            f"{TOKENS}, {META} or {DELTA}"
        )


def bin_centres(trained: TrainedCritic) -> list[float] | None:
    """What the outputs of a head with several stand for."""
    objective = trained.config.objective
    if objective.loss is not Loss.hl_gauss:
        return None
    return [float(x) for x in Histogram(objective.bins, objective.sigma).centres]


def _write_tokens(trained: TrainedCritic, tokenizer: Tokenizer, folder: Path) -> None:
    def named(head: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # transformers gives this head a bias whether it is stored or not
        bias = head.get("bias", head["weight"].new_zeros(len(head["weight"])))
        return {"score.weight": head["weight"], "score.bias": bias}

    _write_hugging_face(trained, tokenizer, folder, "TokenClassification", named)


def _write_sequences(trained: TrainedCritic, tokenizer: Tokenizer, folder: Path) -> None:
    def named(head: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"score.weight": head["weight"]}

    _write_hugging_face(trained, tokenizer, folder, "SequenceClassification", named)


def _write_hugging_face(
    trained: TrainedCritic,
    tokenizer: Tokenizer,
    folder: Path,
    task: Task,
    named: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
) -> None:
    config = trained.config
    described = one_label_config(
        config.model.path,
        trained.architecture,
        task,
        config.data.max_length,
        outputs_are_values=config.objective.loss is not Loss.bce,
        bin_centres=bin_centres(trained),
    )
    described |= write_tokenizer(tokenizer, folder, trained.architecture.vocab_size)
    _write_chat_template(trained, tokenizer, folder)
    with _whole(trained) as critic:
        write_hugging_face(critic, described, named(critic.head()), folder)


def _write_chat_template(trained: TrainedCritic, tokenizer: Tokenizer, folder: Path) -> None:
    data = trained.config.data
    text = ReadText(data.template, data.fields, tokenizer).jinja(reader_of(tokenizer, folder))
    if text is None:
        _log.warning("no chat template makes the run's tokens of a chat; README.md has the text")
    else:
        (folder / CHAT_TEMPLATE).write_text(text, encoding="utf-8")


def _write_meta(trained: TrainedCritic, tokenizer: Tokenizer, folder: Path) -> None:
    copy_tokenizer(tokenizer, folder)
    with _whole(trained) as critic:
        write_meta(critic, folder)
        centres = bin_centres(trained)
        named = {} if centres is None else {"bin_centres": torch.tensor(centres)}
        save_tensors(critic.head() | named, folder / HEAD)


@contextmanager
def _whole(trained: TrainedCritic) -> Iterator[WholeCritic]:
    """The critic's tensors, and a progress bar over those of its trunk."""
    trunk, done = trained.config.model.path, itertools.count(1)
    with progress("exporting") as advance:

        def at_boundary(name: str) -> None:
            stop_if_asked()
            advance(next(done), name)

        yield WholeCritic(trunk, trained.architecture, trained.weights, at_boundary)


def _write_delta(trained: TrainedCritic, tokenizer: Tokenizer, folder: Path) -> None:
    copy_tokenizer(tokenizer, folder)
    weights = trained.weights
    with Spill(folder / ".spill") as spill:
        tensors = {name: spill(weights.read(name)) for name in weights.shapes}
        save_tensors(tensors, folder / TENSORS)
    shutil.copyfile(trained.folder / "config.yaml", folder / "config.yaml")
    identity = trained.facts["identity"] | {"tokenizer": tokenizer.fingerprint}
    facts = json.dumps(trained.facts | {"identity": identity}, indent=2)
    (folder / FACTS).write_text(facts, encoding="utf-8")
    sums = {name: FileSum.of(folder / name) for name in (TENSORS, "config.yaml", FACTS)}
    Manifest(trained.facts["step"], trained.facts["attempt"], sums).write(folder)


WRITERS: dict[str, Callable[[TrainedCritic, Tokenizer, Path], None]] = {
    TOKENS: _write_tokens,
    SEQUENCES: _write_sequences,
    META: _write_meta,
    DELTA: _write_delta,
}
