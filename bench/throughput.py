"""Real tokens per second of one training step, beside those whom people use today.

    python bench/throughput.py --out bench/results/throughput.json
    python bench/throughput.py --unfrozen 2 --solutions 1 --contestants packed floor Trainer
    python bench/throughput.py --device cuda --shape 1b --out FILE

Contestants are processes of their own, which train on the same rows from the same weights and take
turns, step by step. A step is everything from the fetching of its data to its update:

    packed                     the product: Packer, Critic and Learner
    packed, group_by_problem   the product with solutions of a problem in a row (a quarter of a step
                               at most), which compute their prompt once; where there are several
    packed, before             the product of another checkout, with --before
    packed, pairs              the product with the pairwise loss, on the same rows as pairs
    floor                      the matrix products of the linear layers alone, on packed tokens
    Trainer                    transformers' Trainer: token classification, squared errors
    Trainer, group_by_length   the same with batches of similar length
    TRL                        its RewardTrainer on pairs, with its default recomputation
    TRL, no recomputation      the same with gradient_checkpointing=False
    LLaMA-Factory              its freeze tuning of a reward model on pairs, as it is by default
    LLaMA-Factory, no recomputation

The blocks below the last N are frozen in each of them. Tokens are those of all sequences, without
padding; the real share is above 1 where a shared prompt is computed once. Before any
figure counts, each contestant's first loss must be what the untouched critic gives for the same
rows, and its trainable parameters and AdamW's settings must be the product's, but for what
`contestants.KINDS` names; else the benchmark ends with an error. A problem has one solution, or
four that share their prompt. Which rounds count is decided by other processes' load, and by nothing
else. Peers' environments are made once (see contestants.py): minutes, and 2 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import OtherLoad, command_line, origin, say, table
from contestants import BEFORE, FLOOR, KINDS, PACKED, PAIRS, Contestant, Step, add_before, versions
from peers.turns import Settings
from torch import Tensor, nn

from job.common.nested import to_dict
from job.common.schema import ObjectiveConfig, TrainingConfig
from job.data.packing import Batch, Indices, Packer, single_units
from job.data.token_cache import TokenizedSet
from job.model import hf_config
from job.model.architecture import TransformerConfig
from job.model.critic import Critic, unfreeze_last_blocks
from job.model.layout import to_hugging_face
from job.model.safetensors_file import save_tensors
from job.training.objective import Objective

ARCHITECTURE = TransformerConfig(dim=512, n_layers=16, n_heads=8, vocab_size=8192, ffn_hidden=1376)
SHAPES = {
    "micro": TransformerConfig(dim=32, n_layers=4, n_heads=4, vocab_size=64, multiple_of=8),
    "small": ARCHITECTURE,
    "1b": TransformerConfig(  # Llama 3.2's, with a smaller vocabulary
        dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, vocab_size=32000, ffn_hidden=8192
    ),
}
TRAINING = TrainingConfig(
    num_unfrozen_layers=2,
    batch_size=8,
    learning_rate=1e-4,
    warmup_steps=0,
    min_lr_ratio=1.0,
)
SHORTEST, LONGEST = 64, 512  # tokens of a sequence, its prompt included
PROMPT_SHARE = 3 / 8  # of tokens, as in GSM8K
SPREAD = 0.25  # of the responses to one problem around their mean length
BATCHES = 48  # of the data: Trainer sorts within a few of them
WARM_UP = 3  # steps of each contestant that are not counted
QUIET = 0.03  # of the machine is what other processes may use in a counted round
PATIENCE = 4  # times as many rounds are run at most; then the quietest count
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}  # of the first loss; bf16 has three digits
PAD = 0  # as token; no sequence has it
CPU = torch.device("cpu")


# Data


def write_examples(
    folder: Path,
    vocab_size: int,
    seed: int,
    *,
    solutions: int = 1,
    sequences: int = TRAINING.batch_size,
) -> TokenizedSet:
    """Random sequences, every other one right, in the product's stored form.

    Args:
        solutions: of a problem, one after the other, with the same prompt.
        sequences: of a step.
    """
    count = BATCHES * sequences
    generator = np.random.default_rng(seed)
    prompts, lengths = _draw_lengths(generator, count, solutions)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    tokens = generator.integers(PAD + 1, vocab_size, size=offsets[-1], dtype=np.uint32)
    for first in range(0, count, solutions):
        shared = tokens[offsets[first] :][: prompts[first]]
        for other in range(first + 1, first + solutions):
            tokens[offsets[other] :][: prompts[first]] = shared
    tokens.tofile(folder / "tokens.bin")
    np.savez(
        folder / "index.npz",
        offsets=offsets,
        response_starts=prompts,
        rewards=1.0 - np.arange(count) % 2,
        problems=np.arange(count, dtype=np.uint64) // np.uint64(solutions),
        lines=np.arange(1, count + 1),
    )
    (folder / "bad_rows.jsonl").touch()
    return TokenizedSet(folder)


def _draw_lengths(
    generator: np.random.Generator, count: int, solutions: int
) -> tuple[Indices, Indices]:
    """Tokens of each prompt and of each whole sequence, int64 [count]."""
    means = generator.integers(SHORTEST, LONGEST, count // solutions, endpoint=True)
    means = means.repeat(solutions)
    prompts = (PROMPT_SHARE * means).astype(np.int64)
    if solutions == 1:
        return prompts, means
    factors = generator.uniform(1 - SPREAD, 1 + SPREAD, count)
    lengths = prompts + ((means - prompts) * factors).astype(np.int64)
    return prompts, np.clip(lengths, SHORTEST, LONGEST)


# The critic that all of them begin with


def make_critic(config: TransformerConfig, seed: int) -> Critic:
    """A critic with random weights, the last blocks unfrozen."""
    torch.manual_seed(seed)
    critic = Critic(config)
    for name, parameter in critic.trunk.named_parameters():
        if "norm" in name:  # so that a norm lost in conversion would show
            nn.init.uniform_(parameter, 0.5, 1.5)
    critic.initialise_head(0.5, 0)
    with torch.no_grad():
        critic.value_head.weight *= config.dim**0.5  # so that values differ, and losses with them
    unfreeze_last_blocks(critic, TRAINING.num_unfrozen_layers)
    return critic


def make_packer(data: TokenizedSet, config: TransformerConfig) -> Packer:
    return Packer(
        data,
        single_units(len(data)),
        dim=config.dim,
        budget=TRAINING.token_budget,
        device=CPU,
    )


def write_model(critic: Critic, folder: Path) -> None:
    """The critic as a language model with a head of one label, in Hugging Face's layout."""
    config = critic.trunk.config
    named = {name: p.detach() for name, p in critic.trunk.named_parameters()}
    head = {f"score.{name}": p.detach() for name, p in critic.value_head.named_parameters()}
    unused = {"lm_head.weight": torch.zeros(config.vocab_size, config.dim)}
    tensors = to_hugging_face(named, config.head_width) | head | unused
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, folder / "model.safetensors")
    described = hf_config.write(config, "float32", LONGEST) | {
        "id2label": {"0": "value"},
        "label2id": {"value": 0},
        "classifier_dropout": 0.0,  # where nothing is said, transformers takes 0.1
        "pad_token_id": PAD,
    }
    (folder / "config.json").write_text(json.dumps(described))
    _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    """Three words: libraries want a tokenizer, though the data is tokenised."""
    special = ["<pad>", "<s>", "</s>"]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {text: number for number, text in enumerate(special)},
            "unk_token": "<pad>",
        },
    }
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@torch.no_grad()
def expected_loss(critic: Critic, data: TokenizedSet, rows: Sequence[int]) -> float:
    """The critic's mean squared error at the response tokens of some rows, in one batch."""
    outputs, batch = _outputs(critic, data, rows)
    objective = Objective(ObjectiveConfig())
    return objective.loss(outputs, batch, 0, objective.counts(batch)).item()


@torch.no_grad()
def expected_pair_loss(
    critic: Critic, data: TokenizedSet, rows: Sequence[int], *, by_means: bool
) -> float:
    """Its pairwise loss, of means over the response or of last tokens; rows are better, worse."""
    outputs, batch = _outputs(critic, data, rows)
    parts = outputs.split(batch.lengths.tolist())
    scores = torch.stack([part.mean() if by_means else part[-1] for part in parts])
    better, worse = scores.reshape(-1, 2).T
    return F.softplus(worse - better).mean().item()


def _outputs(critic: Critic, data: TokenizedSet, rows: Sequence[int]) -> tuple[Tensor, Batch]:
    batch = make_packer(data, critic.trunk.config).assemble(np.array(rows)[:, None])
    return critic(batch.tokens, batch.layout, batch.positions), batch


# Measurement


@dataclass(frozen=True)
class Case:
    """What is trained, on what."""

    shape: str
    device: str
    n: int
    solutions: int
    sequences: int  # of a step
    seed: int

    @property
    def architecture(self) -> TransformerConfig:
        return SHAPES[self.shape]

    def __str__(self) -> str:
        return f"N={self.n}, {self.solutions} solution(s) a problem, {self.sequences} a step"


@dataclass(frozen=True)
class Round:
    """A step of each contestant, and the share of the machine that other processes used."""

    steps: dict[str, Step]
    other_load: float


def take_turns(contestants: Mapping[str, Contestant], first: int = 0) -> Round:
    """The contestants' steps one after another, so that all meet the machine in the same state.

    The one at place `first` begins; whoever does has the caches of the round's last.
    """
    names = [*contestants]
    first %= len(names)
    load = OtherLoad([contestant.pid for contestant in contestants.values()])
    taken = {name: contestants[name].step() for name in [*names[first:], *names[:first]]}
    steps = {name: taken[name] for name in names}
    finished = Round(steps, load.share())
    times = ", ".join(f"{name} {step.seconds:.2f} s" for name, step in steps.items())
    say(f"{times}; others {finished.other_load:.0%}")
    return finished


def measure(contestants: Mapping[str, Contestant], steps: int) -> list[Round]:
    """The quietest rounds, in order; ends once there are `steps` quiet ones."""
    rounds: list[Round] = []
    while len(rounds) < PATIENCE * steps:
        rounds.append(take_turns(contestants, first=len(rounds)))
        if sum(r.other_load < QUIET for r in rounds) == steps:
            break
    loudest = sorted(r.other_load for r in rounds)[steps - 1]
    return [r for r in rounds if r.other_load <= loudest]


def check_first_losses(
    first: Round, critic: Critic, data: TokenizedSet, tolerance: float
) -> dict[str, float]:
    """Relative difference of each first loss from the untouched critic's.

    Raises:
        AssertionError: a contestant does not compute the same thing.
    """
    differences = {}
    for name, step in first.steps.items():
        if step.loss is not None:
            expected = _expected(name, critic, data, step.rows)
            differences[name] = abs(step.loss - expected) / expected
            assert differences[name] < tolerance, f"{name}: loss {step.loss}, not {expected}"
    return differences


def _expected(name: str, critic: Critic, data: TokenizedSet, rows: Sequence[int]) -> float:
    if not KINDS[name].pairs:
        return expected_loss(critic, data, rows)
    return expected_pair_loss(critic, data, rows, by_means=name == PAIRS)


def check_what_is_trained(ready: Mapping[str, dict[str, Any]], case: Case) -> None:
    """Raise AssertionError unless all train the product's parameters, but for what is named, and
    with its settings of AdamW.
    """
    sizes = {"head bias": 1, "final norm": case.architecture.dim if case.n else 0}
    trained = _trained(case)
    for name, found in ready.items():
        if name == FLOOR:
            continue
        expected = trained - sum(sizes[part] for part in KINDS[name].lacks)
        count = found["trainable"]
        assert count == expected, f"{name} trains {count:,} parameters, not {expected:,}"
        for *given, decay in found["adamw"]:
            wanted = [TRAINING.learning_rate, *TRAINING.betas, 1e-8]
            assert given == wanted, f"{name}: AdamW with {given}, not {wanted}"
            assert decay in (0.0, TRAINING.weight_decay), f"{name}: weight decay {decay}"


def _trained(case: Case) -> int:
    with torch.device("meta"):
        critic = Critic(case.architecture)
    unfreeze_last_blocks(critic, case.n)
    return sum(p.numel() for p in critic.parameters() if p.requires_grad)


def compare(case: Case, names: Sequence[str], steps: int, folder: Path) -> dict[str, Any]:
    """Measure some contestants on one case; `folder` is theirs."""
    (folder / "data").mkdir()
    data = write_examples(
        folder / "data",
        case.architecture.vocab_size,
        case.seed,
        solutions=case.solutions,
        sequences=case.sequences,
    )
    critic = make_critic(case.architecture, case.seed)
    write_model(critic, folder / "model")
    with ExitStack() as stack:
        contestants = {
            name: stack.enter_context(Contestant(KINDS[name], settings(case, folder, name)))
            for name in names
        }
        ready = {name: contestant.ready for name, contestant in contestants.items()}
        check_what_is_trained(ready, case)
        first = take_turns(contestants)
        errors = check_first_losses(first, critic, data, TOLERANCE[case.device])
        for _ in range(WARM_UP - 1):
            take_turns(contestants)
        rounds = measure(contestants, steps)
    lengths = data.lengths
    figures = summarise(rounds, lengths)
    for name, found in figures.items():
        kind = KINDS[name]
        found["trainable_parameters"] = ready[name]["trainable"]
        found["first_loss_error"] = errors.get(name)
        found["differs"] = [*(f"no {part}" for part in kind.lacks), *filter(None, [kind.differs])]
    return {
        "case": asdict(case),
        "contestants": figures,
        "largest_other_load": max(r.other_load for r in rounds),
        "rounds": [_recorded(r, lengths) for r in rounds],
    }


def settings(case: Case, folder: Path, name: str) -> Settings:
    scratch = folder / "scratch" / name
    scratch.mkdir(parents=True)
    return Settings(
        folder=str(folder / "model"),
        data=str(folder / "data"),
        n=case.n,
        sequences=case.sequences,
        learning_rate=TRAINING.learning_rate,
        betas=list(TRAINING.betas),
        weight_decay=TRAINING.weight_decay,
        max_grad_norm=TRAINING.max_grad_norm,
        seed=case.seed,
        device=case.device,
        scratch=str(scratch),
    )


def summarise(rounds: Sequence[Round], lengths: Indices) -> dict[str, dict[str, Any]]:
    """Medians over rounds with their quartiles, and their ratios to the product's."""
    taken = {name: [r.steps[name] for r in rounds] for name in rounds[0].steps}
    speeds = {name: [_speed(step, lengths) for step in steps] for name, steps in taken.items()}
    median = {name: statistics.median(found) for name, found in speeds.items()}
    figures: dict[str, dict[str, Any]] = {}
    for name, steps in taken.items():
        tokens = sum(int(lengths[step.rows].sum()) for step in steps)
        own = PAIRS if KINDS[name].pairs and PAIRS in median else PACKED
        figures[name] = {
            "tokens_per_second": median[name],
            "quartiles": [float(q) for q in np.quantile(speeds[name], [0.25, 0.75])],
            "tokens_per_second_over_all": tokens / sum(step.seconds for step in steps),
            "seconds_per_step": statistics.median(step.seconds for step in steps),
            "real_share": tokens / sum(step.computed_tokens for step in steps),
            "packed_is_faster_by": _ratio(median, own, name),
            "share_of_floor": _ratio(median, name, FLOOR),
            "peak_memory_mb": None if name == FLOOR else steps[-1].peak_memory_mb,
        }
    return figures


def _ratio(median: Mapping[str, float], above: str, below: str) -> float | None:
    return median[above] / median[below] if above in median and below in median else None


def _speed(step: Step, lengths: Indices) -> float:
    return float(lengths[step.rows].sum()) / step.seconds


def _recorded(one: Round, lengths: Indices) -> dict[str, Any]:
    steps = {
        name: {
            "seconds": step.seconds,
            "tokens": int(lengths[step.rows].sum()),
            "computed_tokens": step.computed_tokens,
            "loss": step.loss,
        }
        for name, step in one.steps.items()
    }
    return {"steps": steps, "other_load": one.other_load}


# Report


def show(found: Mapping[str, Any]) -> str:
    header = [
        *("", "real share", "tok/s", "quartiles", "packed is faster by", "share of floor"),
        *("peak MB", "trained"),
    ]
    rows = [
        [
            name,
            f"{one['real_share']:.2f}",
            f"{one['tokens_per_second']:.0f}",
            "{:.0f}-{:.0f}".format(*one["quartiles"]),
            _number(one["packed_is_faster_by"], ".2f"),
            _number(one["share_of_floor"], ".2f"),
            _number(one["peak_memory_mb"], ".0f"),
            f"{one['trainable_parameters']:,}",
        ]
        for name, one in found["contestants"].items()
    ]
    errors = [one["first_loss_error"] for one in found["contestants"].values()]
    differing = [
        f"{name}: {'; '.join(one['differs'])}"
        for name, one in found["contestants"].items()
        if one["differs"]
    ]
    return "\n".join(
        [
            str(Case(**found["case"])),
            table(header, rows),
            *differing,
            f"first losses agree to {max((e for e in errors if e is not None), default=0):.0e}; "
            f"other processes used at most {found['largest_other_load']:.1%} of the machine in a "
            "counted round",
        ]
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _write(file: Path, record: Mapping[str, Any]) -> None:
    """Replace the record at once; it is written after each case."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(file)


def _cases(options: argparse.Namespace) -> list[Case]:
    return [
        Case(options.shape, options.device, n, solutions, options.sequences, options.seed)
        for solutions in options.solutions
        for n in options.unfrozen
    ]


def main() -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=12, help="counted steps of a case (default: 12)")
    add("--shape", choices=SHAPES, default="small", help="of the trunk (default: small)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu; bf16 on cuda")
    add("--unfrozen", type=int, nargs="+", default=[0, 2, 4, 8], metavar="N", help="0 2 4 8")
    add("--solutions", type=int, nargs="+", default=[1, 4], help="of a problem (default: 1 4)")
    sequences = TRAINING.batch_size
    add("--sequences", type=int, default=sequences, metavar="K", help=f"of a step ({sequences})")
    add("--contestants", nargs="+", choices=KINDS, default=list(KINDS), metavar="NAME", help="all")
    add("--before", type=Path, metavar="CHECKOUT", help="of another commit, beside these")
    options = parser.parse_args()
    if options.before is not None:
        add_before(options.before)
        options.contestants.append(BEFORE)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here")
    record = origin(options.seed, ["numpy"]) | {
        "peers": versions(options.contestants),
        "training": to_dict(replace(TRAINING, batch_size=options.sequences)),
        "architecture": asdict(SHAPES[options.shape]),
        "sequence_tokens": [SHORTEST, LONGEST],
        "prompt_share": PROMPT_SHARE,
        "dtype": "float32" if options.device == "cpu" else "bfloat16",
        "steps": options.steps,
        "quiet_below": QUIET,
        "cases": [],
    }
    for case in _cases(options):
        say(str(case))
        names = [n for n in options.contestants if case.solutions > 1 or not KINDS[n].shares]
        with tempfile.TemporaryDirectory() as folder:
            found = compare(case, names, options.steps, Path(folder))
        print(show(found), flush=True)
        record["cases"].append(found)
        if options.out is not None:
            _write(options.out, record)


if __name__ == "__main__":
    main()
