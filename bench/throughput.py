"""Real tokens per second of one training step, beside a padded transformers loop.

    python bench/throughput.py --out bench/results/throughput.json

A step is data assembly, forward, backward, clipping and optimizer, on CPU in float32. The
contestants start from the same weights and take turns, step by step, in one process:

    packed          the product: Packer, Critic and Learner
    padded          transformers' LlamaModel and a linear head, each batch padded to its longest
                    sequence, the same blocks frozen by requires_grad=False
    padded, sorted  the same on batches of similar length, as Trainer's group_by_length makes them
    floor           the matrix products of the linear layers alone, on the packed tokens

Padding does not count as tokens. Before any figure counts, each contestant's first loss must equal
what the untouched critic gives for the same sequences. Each one's peak memory is measured in a
process of its own. Which rounds count is decided by other processes' load, and by nothing else.
"""

from __future__ import annotations

import abc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import OtherLoad, command_line, peak_memory_mb, say, table, write_record
from torch import Tensor, nn

from job.common.nested import to_dict
from job.common.schema import ObjectiveConfig, TrainingConfig
from job.data.packing import Indices, Packer, single_units, step_units
from job.data.token_cache import TokenizedSet
from job.distributed.world import World
from job.model.architecture import TransformerConfig
from job.model.critic import Critic, unfreeze_last_blocks
from job.model.transformer import Trunk
from job.run.value_metrics import ValueMetrics
from job.training.learner import Learner
from job.training.objective import Objective

ARCHITECTURE = TransformerConfig(dim=512, n_layers=16, n_heads=8, vocab_size=8192, ffn_hidden=1376)
TRAINING = TrainingConfig(
    num_unfrozen_layers=2,
    batch_size=8,
    learning_rate=1e-4,
    warmup_steps=0,
    min_lr_ratio=1.0,
)
SHORTEST, LONGEST = 64, 512  # tokens of a sequence, its prompt included
PROMPT_SHARE = 4  # one in so many tokens
BATCHES = 50  # Trainer's group_by_length sorts within 50 batches
WARM_UP = 3  # steps of each contestant that are not counted
STEPS_ALONE = 3  # of a contestant in its own process, for its peak memory
QUIET = 0.03  # of the machine is what other processes may use in a counted round
PATIENCE = 4  # times as many rounds are run at most; then the quietest count
TOLERANCE = 1e-4  # of the first loss
CPU = torch.device("cpu")

Schedule = Callable[[int], Indices]  # step -> the rows of its batch


# Data


def write_examples(folder: Path, vocab_size: int, seed: int) -> TokenizedSet:
    """Random sequences with random outcomes, in the product's stored form."""
    count = BATCHES * TRAINING.batch_size
    generator = np.random.default_rng(seed)
    lengths = generator.integers(SHORTEST, LONGEST, count, endpoint=True)
    generator.integers(vocab_size, size=lengths.sum(), dtype=np.uint32).tofile(
        folder / "tokens.bin"
    )
    np.savez(
        folder / "index.npz",
        offsets=np.concatenate(([0], np.cumsum(lengths))),
        response_starts=lengths // PROMPT_SHARE,
        rewards=generator.integers(2, size=count).astype(np.float64),
        problems=np.arange(count, dtype=np.uint64),
        lines=np.arange(1, count + 1),
    )
    (folder / "bad_rows.jsonl").touch()
    return TokenizedSet(folder)


def shuffled(data: TokenizedSet, seed: int) -> Schedule:
    """The product's own order."""
    return lambda step: step_units(len(data), TRAINING.batch_size, step, seed)


def sorted_by_length(data: TokenizedSet, seed: int) -> Schedule:
    """Batches of similar length, in random order."""
    batches = np.argsort(data.lengths, kind="stable").reshape(-1, TRAINING.batch_size)
    order = np.random.default_rng(seed).permutation(len(batches))
    return lambda step: batches[order[step % len(order)]]


class Contestant(abc.ABC):
    """A way to train on the data; the critic gives its weights, or is itself trained."""

    order: Callable[[TokenizedSet, int], Schedule] = staticmethod(shuffled)

    def __init__(self, critic: Critic, data: TokenizedSet, seed: int) -> None:
        self.data, self.seed = data, seed
        self.rows = self.order(data, seed)

    @abc.abstractmethod
    def step(self, step: int) -> float | None:
        """Run step `step` (from 0); the loss before its update, if there is one."""

    def computed_tokens(self, step: int) -> int:
        """Tokens of a step, with padding."""
        return self.real_tokens(step)

    def real_tokens(self, step: int) -> int:
        return int(self.data.lengths[self.rows(step)].sum())


# The product


def make_critic(config: TransformerConfig, seed: int) -> Critic:
    """A critic with random weights, the last blocks unfrozen."""
    torch.manual_seed(seed)
    critic = Critic(config)
    for name, parameter in critic.trunk.named_parameters():
        if "norm" in name:  # so that a norm lost in conversion would show
            nn.init.uniform_(parameter, 0.5, 1.5)
    critic.initialise_head(0.5, 0)
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


class Packed(Contestant):
    """The product: packed sequences, the frozen prefix without gradients."""

    def __init__(self, critic: Critic, data: TokenizedSet, seed: int) -> None:
        super().__init__(critic, data, seed)
        self.packer = make_packer(data, critic.trunk.config)
        self.learner = Learner(critic, Objective(ObjectiveConfig()), TRAINING, World())

    def step(self, step: int) -> float:
        batches = self.packer.step(step, TRAINING.batch_size, self.seed)
        return self.learner.step(step, batches, ValueMetrics()).loss


@torch.no_grad()
def expected_loss(critic: Critic, data: TokenizedSet, rows: Indices) -> float:
    """The critic's loss on rows of the data, in one packed batch."""
    batch = make_packer(data, critic.trunk.config).assemble(rows[:, None])
    objective = Objective(ObjectiveConfig())
    outputs = critic(batch.tokens, batch.layout, batch.positions)
    return objective.loss(outputs, batch, 0, objective.counts(batch)).item()


# transformers

_LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


class LlamaCritic(nn.Module):
    """transformers' LlamaModel and a linear head, with the weights of one of our critics."""

    def __init__(self, critic: Critic) -> None:
        super().__init__()
        from transformers import LlamaModel

        self.trunk = LlamaModel(llama_config(critic.trunk.config))
        self.trunk.load_state_dict(llama_weights(critic.trunk))
        self.value_head = nn.Linear(critic.trunk.config.dim, 1)
        self.value_head.load_state_dict(critic.value_head.state_dict())

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Values [b, t] of padded sequences [b, t]; the mask is 0 on padding."""
        output = self.trunk(input_ids=tokens, attention_mask=mask, use_cache=False)
        return self.value_head(output.last_hidden_state)[..., 0]

    def freeze(self, n_trainable: int) -> None:
        """Leave the last blocks, the norm and the head trainable."""
        self.trunk.embed_tokens.requires_grad_(False)
        self.trunk.layers[: len(self.trunk.layers) - n_trainable].requires_grad_(False)


def llama_config(config: TransformerConfig) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=config.dim,
        intermediate_size=config.ffn_width,
        num_hidden_layers=config.n_trunk_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_width,
        vocab_size=config.vocab_size,
        max_position_embeddings=LONGEST,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )


def llama_weights(trunk: Trunk) -> dict[str, Tensor]:
    """A trunk's weights under transformers' names and in its layout."""
    weights = {
        "embed_tokens.weight": trunk.get_parameter("tok_embeddings.weight").detach(),
        "norm.weight": trunk.norm.weight.detach(),
    }
    for index, block in enumerate(trunk.layers):
        for ours, theirs in _LAYER_NAMES.items():
            weight = block.get_parameter(f"{ours}.weight").detach()
            if ours in ("attention.wq", "attention.wk"):
                weight = _pair_halves(weight, trunk.config.head_width)
            weights[f"layers.{index}.{theirs}.weight"] = weight
    return weights


def _pair_halves(weight: Tensor, width: int) -> Tensor:
    """Reorder rows: RoPE turns neighbouring channels in Meta's layout, halves in transformers'."""
    return weight.unflatten(0, (-1, width // 2, 2)).transpose(1, 2).flatten(0, 2)


@dataclass(frozen=True)
class PaddedBatch:
    """b sequences padded to t tokens: tokens, masks [b, t] and rewards [b]."""

    tokens: Tensor
    mask: Tensor
    responses: Tensor
    rewards: Tensor


def pad(data: TokenizedSet, rows: Indices) -> PaddedBatch:
    """Pad rows of the data to the longest of them."""
    sequences = [
        torch.from_numpy(data.tokens[data.offsets[row] : data.offsets[row + 1]].astype(np.int64))
        for row in rows
    ]
    tokens = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    positions = torch.arange(tokens.shape[1])
    mask = positions < torch.from_numpy(data.lengths[rows])[:, None]
    responses = mask & (positions >= torch.from_numpy(data.response_starts[rows])[:, None])
    rewards = torch.from_numpy(data.rewards[rows].astype(np.float32))
    return PaddedBatch(tokens, mask.long(), responses, rewards)


class Padded(Contestant):
    """A plain training loop around transformers' model."""

    def __init__(self, critic: Critic, data: TokenizedSet, seed: int) -> None:
        super().__init__(critic, data, seed)
        self.model = LlamaCritic(critic)
        self.model.freeze(TRAINING.num_unfrozen_layers)
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = _adamw(self.trainable)

    def step(self, step: int) -> float:
        batch = pad(self.data, self.rows(step))
        errors = self.model(batch.tokens, batch.mask) - batch.rewards[:, None]
        loss = (errors.square() * batch.responses).sum() / batch.responses.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trainable, TRAINING.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def computed_tokens(self, step: int) -> int:
        lengths = self.data.lengths[self.rows(step)]
        return len(lengths) * int(lengths.max())


class PaddedSorted(Padded):
    order = staticmethod(sorted_by_length)


def _adamw(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """The product's optimizer: no decay of norms and biases."""
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() == 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": TRAINING.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=TRAINING.learning_rate,
        betas=(TRAINING.betas[0], TRAINING.betas[1]),
        fused=True,
    )


# The floor


class Floor(Contestant):
    """Matrix products into buffers: all linear layers forward, the trainable ones backward."""

    def __init__(self, critic: Critic, data: TokenizedSet, seed: int) -> None:
        super().__init__(critic, data, seed)
        frozen = critic.trunk.first_trainable_block()
        self.forward_only = _matrices(critic.trunk.layers[:frozen])
        self.trained = _matrices(critic.trunk.layers[frozen:])
        rows = TRAINING.batch_size * LONGEST
        sizes = {size for matrix in self.trained for size in matrix.shape}
        self.inputs, self.outputs, self.input_gradients = (
            {size: torch.randn(rows, size) for size in sizes} for _ in range(3)
        )
        self.gradients = {matrix.shape: torch.empty_like(matrix) for matrix in self.trained}

    def step(self, step: int) -> None:
        t = self.real_tokens(step)
        for matrix in [*self.forward_only, *self.trained]:
            out, inner = matrix.shape
            torch.mm(self.inputs[inner][:t], matrix.T, out=self.outputs[out][:t])
        for matrix in self.trained:
            out, inner = matrix.shape
            upstream = self.outputs[out][:t]
            torch.mm(upstream.T, self.inputs[inner][:t], out=self.gradients[matrix.shape])
            torch.mm(upstream, matrix, out=self.input_gradients[inner][:t])


def _matrices(blocks: Any) -> list[Tensor]:
    linears = (m for block in blocks for m in block.modules() if isinstance(m, nn.Linear))
    return [linear.weight.detach() for linear in linears]


CONTESTANTS: dict[str, type[Contestant]] = {
    "packed": Packed,
    "padded": Padded,
    "padded, sorted": PaddedSorted,
    "floor": Floor,
}


# Measurement


@dataclass(frozen=True)
class Sample:
    """One step: its time, real tokens, tokens with padding, and loss."""

    seconds: float
    tokens: int
    computed_tokens: int
    loss: float | None


def take_step(contestant: Contestant, step: int) -> Sample:
    started = time.perf_counter()
    loss = contestant.step(step)
    seconds = time.perf_counter() - started
    return Sample(seconds, contestant.real_tokens(step), contestant.computed_tokens(step), loss)


@dataclass(frozen=True)
class Round:
    """A step of each contestant, and the share of the machine that other processes used."""

    samples: dict[str, Sample]
    other_load: float


def take_turns(contestants: dict[str, Contestant], step: int) -> Round:
    """The contestants' steps one after another, so that all meet the machine in the same state."""
    load = OtherLoad()
    samples = {name: take_step(contestant, step) for name, contestant in contestants.items()}
    finished = Round(samples, load.share())
    times = ", ".join(f"{name} {sample.seconds:.2f} s" for name, sample in samples.items())
    say(f"step {step + 1}: {times}; others {finished.other_load:.0%}")
    return finished


def measure(contestants: dict[str, Contestant], steps: int) -> list[Round]:
    """The quietest rounds, in order; ends once there are `steps` quiet ones."""
    rounds: list[Round] = []
    for step in range(WARM_UP, WARM_UP + PATIENCE * steps):
        rounds.append(take_turns(contestants, step))
        if sum(r.other_load < QUIET for r in rounds) == steps:
            break
    loudest = sorted(r.other_load for r in rounds)[steps - 1]
    return [r for r in rounds if r.other_load <= loudest]


def check_first_losses(
    first: Round, contestants: dict[str, Contestant], critic: Critic
) -> dict[str, float]:
    """Relative difference of each first loss from the untouched critic's.

    Raises:
        AssertionError: the contestants do not compute the same thing.
    """
    differences = {}
    for name, contestant in contestants.items():
        loss = first.samples[name].loss
        if loss is not None:
            expected = expected_loss(critic, contestant.data, contestant.rows(0))
            differences[name] = abs(loss - expected) / expected
            assert differences[name] < TOLERANCE, f"{name}: loss {loss}, the critic's {expected}"
    return differences


def summarise(rounds: list[Round]) -> dict[str, dict[str, float]]:
    """Medians over rounds, and their ratios."""
    taken = {name: [r.samples[name] for r in rounds] for name in rounds[0].samples}
    speed = {
        name: statistics.median(sample.tokens / sample.seconds for sample in samples)
        for name, samples in taken.items()
    }
    return {
        name: {
            "tokens_per_second": speed[name],
            "seconds_per_step": statistics.median(sample.seconds for sample in samples),
            "real_share": sum(s.tokens for s in samples) / sum(s.computed_tokens for s in samples),
            "packed_is_faster_by": speed["packed"] / speed[name],
            "share_of_floor": speed[name] / speed["floor"],
        }
        for name, samples in taken.items()
    }


def peak_memory(name: str, seed: int) -> float:
    """Peak resident MB of a contestant that runs a few steps in a process of its own."""
    command = [sys.executable, __file__, "--alone", name, "--seed", str(seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


def run_alone(name: str, data: TokenizedSet, seed: int) -> float:
    """Peak resident MB of this process after a few steps of one contestant."""
    contestant = CONTESTANTS[name](make_critic(ARCHITECTURE, seed), data, seed)
    for step in range(STEPS_ALONE):
        contestant.step(step)
    return peak_memory_mb()


def compare(data: TokenizedSet, steps: int, seed: int) -> dict[str, Any]:
    """Measure all contestants."""
    peaks = {name: peak_memory(name, seed) for name in CONTESTANTS if name != "floor"}
    contestants = {
        name: kind(make_critic(ARCHITECTURE, seed), data, seed)
        for name, kind in CONTESTANTS.items()
    }
    warm = [take_turns(contestants, step) for step in range(WARM_UP)]
    errors = check_first_losses(warm[0], contestants, make_critic(ARCHITECTURE, seed))
    rounds = measure(contestants, steps)
    return {
        "settings": settings(steps),
        "contestants": {
            name: {
                **figures,
                "peak_memory_mb": peaks.get(name),
                "first_loss_error": errors.get(name),
            }
            for name, figures in summarise(rounds).items()
        },
        "largest_loss_difference_packed_padded": largest_loss_difference(warm + rounds),
        "largest_other_load": max(r.other_load for r in rounds),
        "rounds": [asdict(r) for r in rounds],
    }


def settings(steps: int) -> dict[str, Any]:
    return {
        "architecture": asdict(ARCHITECTURE),
        "training": to_dict(TRAINING),
        "sequence_tokens": [SHORTEST, LONGEST],
        "prompt_share": 1 / PROMPT_SHARE,
        "dtype": "float32",
        "steps": steps,
        "warm_up_steps": WARM_UP,
        "quiet_below": QUIET,
    }


def largest_loss_difference(rounds: list[Round]) -> float:
    """Over the steps of the two contestants that train on the same batches, relative."""
    pairs = [(r.samples["packed"].loss, r.samples["padded"].loss) for r in rounds]
    return max(abs(ours - theirs) / ours for ours, theirs in pairs if ours and theirs)


# Report


def show(results: dict[str, Any]) -> str:
    header = ["", "real share", "tok/s", "packed is faster by", "share of floor", "peak MB"]
    rows = [
        [
            name,
            f"{figures['real_share']:.2f}",
            f"{figures['tokens_per_second']:.0f}",
            f"{figures['packed_is_faster_by']:.2f}",
            f"{figures['share_of_floor']:.2f}",
            "-" if figures["peak_memory_mb"] is None else f"{figures['peak_memory_mb']:.0f}",
        ]
        for name, figures in results["contestants"].items()
    ]
    errors = [c["first_loss_error"] for c in results["contestants"].values()]
    return "\n".join(
        [
            table(header, rows),
            f"first losses agree to {max(e for e in errors if e is not None):.0e}, "
            f"all losses of packed and padded to "
            f"{results['largest_loss_difference_packed_padded']:.0e}; "
            f"other processes used at most {results['largest_other_load']:.1%} of the machine in a "
            f"counted round",
        ]
    )


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=12, help="counted steps (default: 12)")
    parser.add_argument("--alone", choices=CONTESTANTS, help="print one contestant's peak memory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = write_examples(Path(folder), ARCHITECTURE.vocab_size, options.seed)
        if options.alone:
            print(run_alone(options.alone, data, options.seed))
            return
        results = compare(data, options.steps, options.seed)
    print(show(results))
    if options.out:
        write_record(options.out, results, seed=options.seed, packages=["transformers", "numpy"])


if __name__ == "__main__":
    main()
