"""A small trunk, pre-trained with multi-token heads from a recipe; its tokenizer first."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from job.common.config import completed, load_config
from job.common.derived import SUMS, defect, find_or_make
from job.common.errors import InputError, file_error
from job.common.nested import refuse_differences, to_dict
from job.common.progress import progress
from job.common.schema import EMBEDDED, PretrainConfig
from job.common.signals import stop_if_asked
from job.common.state_files import read_yaml
from job.common.text_values import dump, load_plain
from job.data.arithmetic import ALPHABET
from job.data.packing import Batch, Packer, single_units
from job.data.rows import BadRow, read_source
from job.data.token_cache import load_split
from job.data.tokenizer import load_tokenizer, write_bpe_tokenizer, write_character_tokenizer
from job.model.architecture import TransformerConfig
from job.model.transformer import Transformer
from job.model.trunk_folder import PARAMS, WEIGHTS
from job.model.weights import save_hugging_face, save_transformer
from job.run.checkpoint_store import set_aside
from job.training.optimizer import build_language_model_optimizer, set_learning_rate

RECIPE = "recipe.yaml"
HUGGING_FACE = "hf"  # folder of the other layout
_LOG_EVERY = 50
_log = logging.getLogger("job.pretrain")


def ensure_trunk(folder: Path, recipe: str, *, verify: bool = False) -> None:
    """Make the trunk of a recipe in `folder` unless it is there, and whole.

    Args:
        verify: look at all of it, not only at samples.

    Raises:
        InputError: the folder holds a trunk that another recipe made.
    """
    config = load_config(PretrainConfig, recipe, ["out=."])  # a path is no YAML: put in as it is
    threads = torch.get_num_threads()
    make_trunk(replace(config, out=str(folder)), verify=verify)
    torch.set_num_threads(threads)  # the recipe's are the recipe's


def make_trunk(config: PretrainConfig, *, verify: bool = False) -> None:
    """Pre-train the trunk unless its folder is there, and whole; another one is set aside."""
    folder = Path(config.out)
    if any((folder / name).exists() for name in (PARAMS, RECIPE, SUMS)):
        problem = _defect(folder, verify)
        if problem is None or read_yaml(folder / RECIPE) is not None:
            _check_same_recipe(config, folder)
        if problem is None:
            _log.info("the trunk is there already: %s", folder)
            return
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"out: {folder}: not empty and no trunk in it; choose another folder")
    _architecture(config, vocab_size=1)
    try:
        find_or_make(folder, lambda scratch: pretrain(config, scratch), set_aside, verify=verify)
    except OSError as error:
        raise file_error(error, f"out: cannot write {folder}: {error.strerror}") from None


def _defect(folder: Path, verify: bool) -> str | None:
    """What a trunk's folder lacks."""
    if (folder / SUMS).exists():
        return defect(folder, verify=verify)
    # 0.1.0 kept no sums: what was changed cannot be told
    missing = [name for name in (PARAMS, WEIGHTS) if not (folder / name).exists()]
    return f"{folder / missing[0]} is missing" if missing else None


def _check_same_recipe(config: PretrainConfig, folder: Path) -> None:
    stored = _dependences(completed(_stored_recipe(folder / RECIPE), PretrainConfig))
    problem = (
        f"{folder}: the trunk here was made by another recipe (there -> asked for); "
        "remove the folder or choose another"
    )
    refuse_differences(stored, _recipe(config), problem)


def _stored_recipe(file: Path) -> dict[str, Any]:
    """A trunk's recipe; empty where the trunk came from elsewhere."""
    try:
        stored = load_plain(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        stored = None
    if not isinstance(stored, dict):
        raise InputError(f"{file}: not readable as a recipe")
    return stored


def _architecture(config: PretrainConfig, vocab_size: int) -> TransformerConfig:
    try:
        return TransformerConfig(**vars(config.architecture), vocab_size=vocab_size)
    except ValueError as error:
        raise InputError(f"architecture: {error}") from None


def _recipe(config: PretrainConfig) -> dict[str, object]:
    """What the result depends on."""
    return _dependences(to_dict(config))


def _dependences(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the keys that change nothing in the trunk."""
    del recipe["out"], recipe["data"]["cache_dir"], recipe["training"]["threads"]
    return recipe


def pretrain(config: PretrainConfig, folder: Path) -> None:
    """Train tokenizer and trunk and write them to `folder`."""
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    _write_tokenizer(config, folder)
    tokenizer = load_tokenizer(folder)
    data = load_split(config.data, "train", tokenizer)
    architecture = _architecture(config, tokenizer.vocab_size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = initialise(Transformer(architecture), config.training.seed).to(device)
    budget = config.training.micro_batch_tokens
    units = single_units(len(data))
    packer = Packer(data, units, dim=architecture.dim, budget=budget, device=device)
    _fit(config, model, packer)
    save_transformer(model, folder)
    _save_hugging_face(model, folder, config.data.max_length)
    (folder / RECIPE).write_text(dump(_recipe(config)), encoding="utf-8")


def _save_hugging_face(model: Transformer, folder: Path, max_positions: int) -> None:
    """Write model and tokenizer to the folder hf/."""
    save_hugging_face(model, folder / HUGGING_FACE, max_positions)
    for file in folder.glob("tokenizer*"):
        shutil.copyfile(file, folder / HUGGING_FACE / file.name)


def _write_tokenizer(config: PretrainConfig, folder: Path) -> None:
    if config.data.train == EMBEDDED:
        write_character_tokenizer(folder, ALPHABET)
    else:
        write_bpe_tokenizer(folder, _texts(config), config.data.vocab_size)


def _texts(config: PretrainConfig) -> Iterator[str]:
    for _, row in read_source(config.data.train, config.data.fields, rewards=False):
        if isinstance(row, BadRow):
            raise InputError(str(row))
        yield row.prompt + row.response


def initialise(model: Transformer, seed: int) -> Transformer:
    """Normal weights of standard deviation 1 / sqrt(fan-in); norms stay at one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    return model


def _fit(config: PretrainConfig, model: Transformer, packer: Packer) -> None:
    training = config.training
    optimizer = build_language_model_optimizer(model, training)
    started, tokens = time.monotonic(), 0
    with progress("pre-training", training.max_steps) as advance:
        for step in range(training.max_steps):
            set_learning_rate(optimizer, training, step)
            stop_if_asked()
            batches = packer.step(step, training.batch_size, training.seed)
            losses = _accumulate(model, batches)
            nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            tokens += sum(len(batch.tokens) for batch in batches)
            if (step + 1) % _LOG_EVERY == 0:
                shown = ", ".join(f"{loss:.3f}" for loss in losses.tolist())
                _log.info("step %d  loss per head: %s", step + 1, shown)
            speed = tokens / (time.monotonic() - started)
            advance(step + 1, f"loss {losses[0]:.3f}  {speed:,.0f} tokens/s")


def _accumulate(model: Transformer, batches: list[Batch]) -> Tensor:
    """Backward through the sum of the heads' mean losses; the means [n_future_tokens]."""
    heads = range(1, model.config.n_future_tokens + 1)
    counts = [[max(0, n - k) for batch in batches for n in batch.layout.lengths] for k in heads]
    totals = torch.tensor([max(1, sum(count)) for count in counts], device=batches[0].tokens.device)
    means = torch.zeros(len(heads), device=totals.device)
    for batch in batches:
        sums = torch.stack(future_token_losses(model, batch)) / totals
        sums.sum().backward()
        means += sums.detach()
    return means


def future_token_losses(model: Transformer, batch: Batch) -> list[Tensor]:
    """Cross-entropy of each head k = 1, 2, ... on the token k ahead, summed over the stream."""
    ends = batch.layout.boundaries[1:].long()
    lengths = torch.tensor(batch.layout.lengths, device=ends.device)
    left = ends.repeat_interleave(lengths) - torch.arange(len(batch.tokens), device=ends.device)
    losses = []
    for ahead, logits in enumerate(model.head_logits(batch.tokens, batch.layout), 1):
        here = torch.nonzero(left > ahead)[:, 0]
        target = batch.tokens[here + ahead]
        losses.append(F.cross_entropy(logits[here].float(), target, reduction="sum"))
    return losses
