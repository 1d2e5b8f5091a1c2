"""What computing the prompt of several solutions once gives a training step.

    python bench/shared_prompts.py --out bench/results/shared_prompts.json

Trains a critic of 16 blocks (dim 512, float32, CPU) with N = 0, 2 and 4 on data with 1, 4 and 16
solutions a problem, whose prompts are 37.6 % of the tokens as in GSM8K: packed, with every sequence
by itself, and packed with shared prompts, where solutions of a problem come together in a step, of
16 sequences, or of 64 with 16 solutions.
Both learn from the same sequences in each step, from the same weights; they take turns, step by
step, in one process. Before any figure counts, their first losses must agree to 1e-4. Which rounds
count is decided by other processes' load, and by nothing else. Tokens per second are those of all
sequences, also where they are computed once for several.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import OtherLoad, command_line, say, table, write_record

from job.common.schema import ObjectiveConfig, TrainingConfig
from job.data.packing import Batch, Packer, single_units
from job.data.shared_prompts import SharedPrompts
from job.data.token_cache import TokenizedSet
from job.distributed.world import World
from job.memory.footprint import copy_share
from job.model.architecture import TransformerConfig
from job.model.critic import Critic, unfreeze_last_blocks
from job.run.value_metrics import ValueMetrics
from job.training.learner import Learner
from job.training.objective import Objective

ARCHITECTURE = TransformerConfig(dim=512, n_layers=16, n_heads=8, vocab_size=8192, ffn_hidden=1376)
TRAINING = TrainingConfig(batch_size=16, learning_rate=1e-4, warmup_steps=0, min_lr_ratio=1.0)
SOLUTIONS, UNFREEZE = (1, 4, 16), (0, 2, 4)
PROMPT, RESPONSE = (48, 178), (80, 295)  # fewest and most tokens; 37.6 % of the means are prompt
PROBLEMS = 64
QUIET = 0.03  # of the machine is what other processes may use in a counted round
PATIENCE = 4  # times as many rounds are run at most; then the quietest count
TOLERANCE = 1e-4  # of the first loss
CPU = torch.device("cpu")


def write_solutions(folder: Path, solutions: int, seed: int) -> TokenizedSet:
    """Random prompts, random responses to each, and random outcomes, in the stored form."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    prompts = rng.integers(*PROMPT, PROBLEMS, endpoint=True).repeat(solutions)
    lengths = prompts + rng.integers(*RESPONSE, len(prompts), endpoint=True)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    tokens = rng.integers(ARCHITECTURE.vocab_size, size=offsets[-1], dtype=np.uint32)
    for row in range(len(prompts)):
        first = offsets[row - row % solutions]
        tokens[offsets[row] :][: prompts[row]] = tokens[first:][: prompts[row]]
    tokens.tofile(folder / "tokens.bin")
    np.savez(
        folder / "index.npz",
        offsets=offsets,
        response_starts=prompts,
        rewards=rng.integers(2, size=len(prompts)).astype(np.float64),
        problems=(np.arange(len(prompts)) // solutions).astype(np.uint64),
        lines=np.arange(1, len(prompts) + 1),
    )
    (folder / "bad_rows.jsonl").touch()
    return TokenizedSet(folder)


def sequences(solutions: int) -> int:
    """Of a step: solutions of a problem come together in a quarter of it at most."""
    return max(TRAINING.batch_size, 4 * solutions)


class Side:
    """One way to train: with shared prompts or without, on the same sequences in each step."""

    def __init__(
        self, data: TokenizedSet, n: int, solutions: int, seed: int, *, shares: bool
    ) -> None:
        prompts, self._seed = SharedPrompts(data), seed
        self._sequences = sequences(solutions)
        packers = [
            Packer(
                data,
                single_units(len(data)),
                dim=ARCHITECTURE.dim,
                budget=TRAINING.token_budget,
                device=CPU,
                prompt_value=True,
                prompts=one,
                together=solutions,
                copy_share=copy_share(ARCHITECTURE),
            )
            for one in (prompts, prompts if shares else None)
        ]
        self._order, self._packer = packers
        torch.manual_seed(seed)
        critic = Critic(ARCHITECTURE)
        critic.initialise_head(0.5, seed)
        unfreeze_last_blocks(critic, n)
        training = replace(TRAINING, num_unfrozen_layers=n, batch_size=self._sequences)
        self._learner = Learner(critic, Objective(ObjectiveConfig()), training, World())

    def batches(self, step: int) -> list[Batch]:
        """Those of the sequences that come together with shared prompts."""
        plan = self._order.plan(step, self._sequences, self._seed)
        return [self._packer.assemble(u) for u in self._packer.split(np.concatenate(plan))]

    def step(self, step: int) -> Sample:
        began = time.perf_counter()
        batches = self.batches(step)
        loss = self._learner.step(step, batches, ValueMetrics()).loss
        seconds = time.perf_counter() - began
        tokens = sum(batch.layout.n_keys for batch in batches)
        return Sample(loss, seconds, tokens, sum(len(batch.tokens) for batch in batches))


@dataclass(frozen=True)
class Sample:
    """A step: loss, seconds, tokens of all sequences, and those that were computed."""

    loss: float
    seconds: float
    tokens: int
    computed: int


@dataclass(frozen=True)
class Round:
    """The same step of both, and what share of the machine others used meanwhile."""

    plain: Sample
    shared: Sample
    other_load: float


def take_turns(plain: Side, shared: Side, step: int) -> Round:
    load = OtherLoad()
    sides = [plain, shared] if step % 2 else [shared, plain]
    taken = {id(side): side.step(step) for side in sides}
    return Round(taken[id(plain)], taken[id(shared)], load.share())


def measure(data: TokenizedSet, n: int, solutions: int, steps: int, seed: int) -> dict[str, Any]:
    """Medians over the counted rounds of one setting."""
    plain, shared = (Side(data, n, solutions, seed, shares=s) for s in (False, True))
    first = take_turns(plain, shared, 0)
    apart = abs(first.shared.loss / first.plain.loss - 1)
    assert apart < TOLERANCE, f"first losses {first.plain.loss} and {first.shared.loss}"
    rounds: list[Round] = []
    while sum(r.other_load < QUIET for r in rounds) < steps and len(rounds) < PATIENCE * steps:
        rounds.append(take_turns(plain, shared, len(rounds) + 1))
    counted = sorted(rounds, key=lambda r: r.other_load)[:steps]
    ratios = sorted(r.plain.seconds / r.shared.seconds for r in counted)
    return {
        "solutions": solutions,
        "sequences": sequences(solutions),
        "num_unfrozen_layers": n,
        "plain_tokens_per_second": statistics.median(
            r.plain.tokens / r.plain.seconds for r in counted
        ),
        "shared_tokens_per_second": statistics.median(
            r.shared.tokens / r.shared.seconds for r in counted
        ),
        "fewer_tokens": sum(r.plain.computed for r in counted)
        / sum(r.shared.computed for r in counted),
        "faster": statistics.median(ratios),
        "faster_from_to": [ratios[0], ratios[-1]],
        "first_loss_error": apart,
        "largest_other_load": max(r.other_load for r in counted),
        "rounds": [asdict(r) for r in counted],
    }


def show(results: list[dict[str, Any]]) -> str:
    header = ["solutions, N", "plain tok/s", "shared tok/s", "fewer tokens", "faster", "other load"]
    rows = [
        [
            f"{one['solutions']}, {one['num_unfrozen_layers']}",
            f"{one['plain_tokens_per_second']:.0f}",
            f"{one['shared_tokens_per_second']:.0f}",
            f"{one['fewer_tokens']:.2f}",
            f"{one['faster']:.2f}",
            f"{one['largest_other_load']:.1%}",
        ]
        for one in results
    ]
    return table(header, rows)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=7, help="counted rounds (default: 7)")
    parser.add_argument("--solutions", type=int, nargs="+", default=SOLUTIONS, metavar="K")
    parser.add_argument("--unfreeze", type=int, nargs="+", default=UNFREEZE, metavar="N")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for solutions in options.solutions:
            data = write_solutions(Path(folder, str(solutions)), solutions, options.seed)
            for n in options.unfreeze:
                results.append(measure(data, n, solutions, options.steps, options.seed))
                say(show(results[-1:]))
    print(show(results))
    if options.out:
        record = {"architecture": asdict(ARCHITECTURE), "settings": results}
        write_record(options.out, record, seed=options.seed, packages=["numpy"])


if __name__ == "__main__":
    main()
