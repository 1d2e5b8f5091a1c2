"""A few steps of a configuration, measured stage by stage, as one of the job's processes.

They are a training's own steps on its own data, without run directory, checkpoints and MLflow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from job.common.progress import progress
from job.common.schema import CriticConfig, TrainingConfig
from job.distributed.world import World, joined_world
from job.memory.fit import prediction
from job.memory.recorder import Recorder
from job.model.architecture import TransformerConfig
from job.model.architecture_file import read_architecture
from job.model.critic import Critic
from job.model.packed_layout import PackedLayout
from job.run.directory import RunDirectory
from job.run.value_metrics import ValueMetrics
from job.training.compilation import choose_compilation
from job.training.data import CriticData, load_critic_data
from job.training.gpu import check_gpu
from job.training.learner import Learner
from job.training.memory_report import choose_by_memory, heaviest
from job.training.objective import Objective
from job.training.preparation import load_critic, prepare_inputs, set_up_torch

STEPS = 4
_WARM_TOKENS = 64

Figures = dict[str, float]


def measure(config: CriticConfig, scratch: Path) -> list[dict[str, Any]] | None:
    """What each rank's memory was at each stage, beside the prediction; None but on rank 0.

    Stages: before the critic is there, when it is loaded, after an update (weights and optimizer
    state), after a backward pass (gradients too), and the peak of all steps.
    """
    set_up_torch(config)
    with joined_world(config.distributed) as world:
        run = RunDirectory(scratch, is_main=False)  # nothing of it is kept
        world.main_first(lambda: prepare_inputs(config))
        check_gpu(config.distributed.fsdp, read_architecture(config.model.path), world.device)
        choose_compilation(config, world)
        choose_by_memory(config, run, world)
        data = world.main_first(lambda: load_critic_data(config, run, world))
        with Recorder(world.device) as recorder:
            ranks = world.gather(_measured(config, data, world, recorder))
        return ranks if world.is_main else None


def _measured(
    config: CriticConfig, data: CriticData, world: World, recorder: Recorder
) -> dict[str, Any]:
    setting = heaviest(config, data, world)
    warm_up(world.device)
    stages: dict[str, Figures] = {"before": _now(recorder)}
    with recorder.phase("load"):
        critic = load_critic(config, data, world, lambda: None)
    objective = Objective(config.objective)
    learner = Learner(critic, objective, config.training, world, recorder.phase)
    stages["loaded"] = _now(recorder)
    learner.optimizer.register_step_pre_hook(
        lambda *_: stages.__setitem__("backward", _now(recorder))
    )
    with progress("measuring", STEPS) as advance:
        first = _first_of_largest(config.training)
        for step in range(STEPS):
            _step(learner, data, first + step)
            stages["update"] = _now(recorder)
            advance(step + 1, f"N={config.training.num_unfrozen_layers}")
    summary = recorder.summary()
    stages["peak"] = dict(summary["peak"])
    return {
        "num_unfrozen_layers": config.training.num_unfrozen_layers,
        "predicted": prediction(setting),
        "stages": stages,
        "recorder": summary,
    }


def warm_up(device: torch.device) -> None:
    """Take a step with a tiny critic: libraries and workspaces come with their first use."""
    critic = Critic(TransformerConfig(dim=64, n_layers=2, n_heads=2, vocab_size=8)).to(device)
    optimizer = torch.optim.AdamW(critic.parameters(), fused=True)
    tokens = torch.zeros(2 * _WARM_TOKENS, dtype=torch.int64, device=device)
    layout = PackedLayout([_WARM_TOKENS, _WARM_TOKENS], device)
    critic(tokens, layout, torch.arange(len(tokens), device=device)).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
    optimizer.step()


def _first_of_largest(training: TrainingConfig) -> int:
    """The first step of the stage that takes the most memory."""
    ns = [stage.num_unfrozen_layers for stage in training.all_stages]
    return sum(stage.steps for stage in training.all_stages[: ns.index(max(ns))])


def _step(learner: Learner, data: CriticData, step: int) -> None:
    training = learner.config
    batches = data.train.step(step, training.batch_size, training.seed)
    learner.step(step, batches, ValueMetrics())


def _now(recorder: Recorder) -> Figures:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return recorder.now()
