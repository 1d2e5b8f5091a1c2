"""Training and validation data of a critic: found or tokenised, checked, ready to be packed."""

from __future__ import annotations

import functools
import logging
import shutil
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from job.common.data_file import check_readable, described
from job.common.errors import InputError
from job.common.schema import AUTO, EMBEDDED, CriticConfig, Spread
from job.data.packing import Indices, Packer, first_valued, single_units
from job.data.pairs import balanced_pairs, with_others
from job.data.shared_prompts import SAVES_ENOUGH, SharedPrompts, shared_in_evaluations
from job.data.stored_targets import Targets
from job.data.token_cache import TokenizedSet, count_shared_problems, load_split
from job.data.tokenizer import Tokenizer, load_tokenizer
from job.data.weights import Weights, position_weights
from job.distributed.world import World
from job.memory.footprint import copy_share
from job.memory.settings import forward_budget
from job.model.architecture_file import read_architecture
from job.run.directory import RunDirectory

_PROBLEMS = 4  # of a step at least, however many solutions each has
_UNKNOWN_SHARE = 0.01  # of tokens; fewer may be rare characters
_log = logging.getLogger("job.train")


@dataclass(frozen=True)
class CriticData:
    """Training and validation sets, ready to be packed."""

    train: Packer
    validation: Packer
    mean_reward: float
    tokenizer: str  # its fingerprint

    def resize(self, tokens: int) -> None:
        """Have micro-batches of at most so many tokens from now on."""
        self.train.resize(tokens)
        self.validation.resize(tokens)


def check_sources(config: CriticConfig) -> None:
    """Raise InputError where a data file cannot be read; before everything that takes time."""
    for source in (config.data.train, config.data.validation):
        if source != EMBEDDED and not isinstance(source, float):
            check_readable(source)


def load_critic_data(
    config: CriticConfig, run: RunDirectory, world: World, *, verify: bool = False
) -> CriticData:
    """Tokenise (or find) both sets and check them against each other and the model.

    Where micro-batches are still to be chosen, the sets are to be resized before they are used.

    Raises:
        InputError: bad rows, unreadable files, or tokens that the model does not have.
    """
    architecture = read_architecture(config.model.path)
    tokenizer = load_tokenizer(config.tokenizer.path or config.model.path)
    train, validation = (
        _load_checked(config, split, tokenizer, architecture.vocab_size, run, verify)
        for split in ("train", "validation")
    )
    check_targets(config, train)
    if shared := count_shared_problems(train, validation):
        _log.warning("%d problem(s) are in both training and validation data", shared)
    _log.info(
        "%d training and %d validation sequences, mean reward %.3f and %.3f",
        *(len(train), len(validation), train.rewards.mean(), validation.rewards.mean()),
    )
    kept = sample_of_problems(validation.problems, config.evaluation.max_sequences)
    warn_of_one_label(validation.rewards[kept])
    pack = functools.partial(
        Packer,
        dim=architecture.dim,
        budget=forward_budget(config),
        device=world.device,
        rank=world.rank,
        world=world.size,
        prompt_value=config.objective.trains_prompts,
        copy_share=copy_share(architecture),
    )
    prompts, grouped = training_prompts(config, train)
    return CriticData(
        pack(
            train,
            _training_units(config, train),
            weights=_training_weights(config, train),
            spread=config.objective.spread,
            prompts=prompts,
            together=grouped,
        ),
        pack(validation, kept[:, None], prompts=shared_in_evaluations(validation)),
        float(train.rewards.mean()),
        tokenizer.fingerprint,
    )


def _load_checked(
    config: CriticConfig,
    split: str,
    tokenizer: Tokenizer,
    vocab_size: int,
    run: RunDirectory,
    verify: bool,
) -> TokenizedSet:
    """A set whose tokens the model has; rows that were left out are listed in the run directory."""
    found = load_split(config.data, split, tokenizer, verify=verify, seed=config.training.seed)
    _keep_bad_rows(found, run, split)
    check_tokens(found, vocab_size)
    warn_of_unknown(found, tokenizer, f"{split} data")
    return found


def training_prompts(config: CriticConfig, train: TokenizedSet) -> tuple[SharedPrompts | None, int]:
    """Prompts that trained sequences share, and how many come `together`.

    None where solutions of one problem meet by chance alone: too rarely to be worth it.
    """
    pairs = bool(config.objective.all_terms.pairwise)
    if config.data.group_by_problem is False and not pairs:
        return None, 1
    prompts = SharedPrompts(train)
    grouped = together(config, prompts)
    return (prompts if pairs or grouped > 1 else None), grouped


def together(config: CriticConfig, prompts: SharedPrompts) -> int:
    """Solutions of one problem that come one after the other in an epoch, at most: a share of a
    step, so that it has several problems; 1 where they are not grouped by problem.
    """
    groups, most = config.data.group_by_problem, max(1, config.training.batch_size // _PROBLEMS)
    if groups is False:
        return 1
    saving = prompts.saving(most)
    if groups == AUTO and saving < SAVES_ENOUGH:
        return 1
    _log.info(
        "data.group_by_problem: up to %d solutions of a problem come together: %.2f times fewer "
        "tokens to compute",
        most,
        saving,
    )
    return most


def sample_of_problems(problems: NDArray[np.uint64], most: int | None) -> Indices:
    """At most so many rows, problem by problem in an order of chance, ascending: int64 [n].

    The first rows of a file may be of few problems, or the easy ones. The chance is the same in
    every run, so that evaluations of different runs are of the same rows.
    """
    if most is None or most >= len(problems):
        return np.arange(len(problems))
    _, problem_of_row = np.unique(problems, return_inverse=True)
    order = np.random.default_rng(0).permutation(problem_of_row.max() + 1)
    return np.sort(np.argsort(order[problem_of_row], kind="stable")[:most])


def warn_of_one_label(rewards: NDArray[np.float64]) -> None:
    if np.ptp(rewards) == 0:
        _log.warning(
            "all %d solutions of the evaluations have the reward %g: no figure of theirs tells a "
            "good critic from a constant, and checkpoint.keep_best keeps none by them",
            len(rewards),
            rewards[0],
        )


def check_tokens(found: TokenizedSet, vocab_size: int) -> None:
    """Raise InputError unless the model has every token of a set."""
    largest = max(int(chunk.max()) for chunk in found.token_chunks())
    if largest >= vocab_size:
        raise InputError(
            f"tokenizer.path: token {largest} does not exist in the model "
            f"(vocabulary of {vocab_size}); tokenizer and model do not match"
        )


def warn_of_unknown(found: TokenizedSet, tokenizer: Tokenizer, name: str) -> None:
    """Say so where a tokenizer does not know what a set is made of: nothing is learnt of that."""
    text = tokenizer.named.get("unk_token", "<unk>")
    unknown = tokenizer.token_id(text)
    if unknown is None or unknown in (tokenizer.bos_id, tokenizer.eos_id):
        return  # as GPT-2's, which knows every text
    share = sum(np.count_nonzero(c == unknown) for c in found.token_chunks()) / len(found.tokens)
    if share > _UNKNOWN_SHARE:
        _log.warning(
            "%s: %.0f %% of the tokens are %s: the trunk's tokenizer does not know such texts",
            name,
            100 * share,
            text,
        )


def _training_units(config: CriticConfig, train: TokenizedSet) -> Indices:
    if not config.objective.all_terms.pairwise:
        return single_units(len(train))
    pairs = balanced_pairs(train.rewards, train.problems, train.response_lengths)
    if not len(pairs):
        raise InputError(
            f"{described(config.data.train)}: no two solutions of one problem with different "
            "rewards; the pairwise loss needs some (is problem_id right?)"
        )
    _log.info("%d length-balanced pairs", len(pairs))
    return pairs if config.objective.ranks_only else with_others(pairs, len(train))


def check_targets(config: CriticConfig, train: TokenizedSet) -> None:
    """Raise InputError where targets at positions and the objective do not go together."""
    objective = config.objective
    if train.targets is None:
        if objective.spread is not Spread.none:
            raise InputError(
                f"objective.spread: no row of {config.data.train} has targets at positions "
                "(in the field targets, or that which data.fields.targets names)"
            )
        return
    if objective.ranks_only or objective.all_terms.td:
        raise InputError(
            f"{config.data.train}: rows have targets at positions (in the field targets, unless "
            "data.fields.targets names another); they are learnt by objective.target=monte_carlo, "
            "or objective.terms without td"
        )
    _warn_of_unused(
        train.targets, first_valued(train, np.arange(len(train)), objective.trains_prompts)
    )


def _warn_of_unused(targets: Targets, first: Indices) -> None:
    """Say so where targets lie before their sequence's first valued position, int64 [sequences]."""
    unused = np.count_nonzero(targets.at < first.repeat(np.diff(targets.offsets)))
    if unused:
        _log.warning(
            "%d of %d targets are not learnt: they lie before the response, where a value is read "
            "only with a prompt and objective.prompt_value=true",
            unused,
            len(targets.at),
        )


def _training_weights(config: CriticConfig, train: TokenizedSet) -> Weights:
    rows = np.arange(len(train))
    positions = train.lengths - first_valued(train, rows, config.objective.trains_prompts)
    if train.targets is not None:
        firsts, lengths = (train.lengths - positions).tolist(), train.lengths.tolist()
        spread, targets = config.objective.spread, train.targets
        each = zip(range(len(train)), firsts, lengths, strict=True)
        found = (targets.spread(row, first, n, spread)[1].sum() for row, first, n in each)
        positions = np.fromiter(found, np.float64, len(train))
    return position_weights(
        config.objective.weighting,
        config.objective.balance_labels,
        positions=positions,
        rewards=train.rewards,
        problems=train.problems,
    )


def _keep_bad_rows(found: TokenizedSet, run: RunDirectory, split: str) -> None:
    if found.n_skipped:
        listed = run.file(f"bad_rows.{split}.jsonl")
        if run.writes:
            shutil.copyfile(found.folder / "bad_rows.jsonl", listed)
        _log.warning("%s data: %d row(s) left out, listed in %s", split, found.n_skipped, listed)
