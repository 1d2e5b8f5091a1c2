"""A trained critic on disk: what was trained, and what it takes to use it together with its trunk.

It is a checkpoint of a run, or a delta, which holds the same in files that execute nothing:

    facts.json           step, identity of trunk and data, last evaluation
    config.yaml          the run's configuration
    critic.safetensors   the trained parameters, float32, under the critic's names
    manifest.json        checksums of these three
"""

from __future__ import annotations

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from job.common.config import load_stored_config
from job.common.errors import InputError, file_error, listing
from job.common.nested import difference, refuse_differences, to_dict
from job.common.schema import CriticConfig, Loss, ObjectiveConfig
from job.distributed.world import World
from job.model.architecture import TransformerConfig
from job.model.architecture_file import read_architecture
from job.model.critic import Critic, unfreeze_last_blocks
from job.model.fingerprint import fingerprint
from job.model.shards import fill
from job.run.checkpoint_store import newest_intact, read_facts
from job.run.start_folder import start_folder

TENSORS = "critic.safetensors"
_BIAS, _WEIGHT = "value_head.bias", "value_head.weight"
# What a command that only uses a critic may set otherwise than its training did.
_MAY_BE_SET = (
    "model.path",
    "tokenizer.path",
    "data.",
    "training.micro_batch_tokens",
    "training.prefix_cache",
    "training.threads",
    "distributed.",
)
_log = logging.getLogger(__name__)


class Weights(ABC):
    """The trained parameters of one critic, read where they are used."""

    shapes: Mapping[str, tuple[int, ...]]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One parameter, whole and on the host."""

    @abstractmethod
    def fill(self, parameters: Mapping[str, Tensor], world: World) -> None:
        """Copy into parameters, whole or sharded; every rank must call this."""


class _CheckpointWeights(Weights):
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        stored = FileSystemReader(folder).read_metadata().state_dict_metadata
        self._stored = {
            name.removeprefix("model."): tensor
            for name, tensor in stored.items()
            if name.startswith("model.") and isinstance(tensor, TensorStorageMetadata)
        }
        self.shapes = {name: tuple(tensor.size) for name, tensor in self._stored.items()}

    def read(self, name: str) -> Tensor:
        stored = self._stored[name]
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        reader = FileSystemReader(self._folder)
        with warnings.catch_warnings():  # of no process group, which no_dist asks for
            warnings.simplefilter("ignore", UserWarning)
            load({f"model.{name}": tensor}, storage_reader=reader, no_dist=True)
        return tensor

    def fill(self, parameters: Mapping[str, Tensor], world: World) -> None:
        tensors = {f"model.{name}": parameters[name] for name in sorted(self.shapes)}
        load(tensors, storage_reader=FileSystemReader(self._folder), process_group=world.group)


class _DeltaWeights(Weights):
    def __init__(self, folder: Path) -> None:
        self._file = folder / TENSORS
        try:
            self._opened = safe_open(self._file, "pt")
        except (OSError, SafetensorError) as error:
            raise file_error(error, f"{self._file}: cannot read the delta: {error}") from None
        names = self._opened.keys()
        self.shapes = {name: tuple(self._opened.get_slice(name).get_shape()) for name in names}

    def read(self, name: str) -> Tensor:
        return self._opened.get_tensor(name)

    def fill(self, parameters: Mapping[str, Tensor], world: World) -> None:
        for name in sorted(self.shapes):
            fill(parameters[name], self.read(name))


def open_weights(folder: Path) -> Weights:
    """The trained parameters of a checkpoint or a delta."""
    return _DeltaWeights(folder) if (folder / TENSORS).is_file() else _CheckpointWeights(folder)


@dataclass(frozen=True)
class TrainedCritic:
    """A trained critic, its trunk, and how it was trained.

    Attributes:
        folder: a checkpoint or a delta.
        facts: its facts.json.
        config: the run's configuration, with what the command sets otherwise.
    """

    folder: Path
    facts: dict[str, Any]
    config: CriticConfig

    @classmethod
    def find(
        cls, source: Path, trunk: str | None = None, overrides: Sequence[str] = ()
    ) -> TrainedCritic:
        """The critic in `source`: a run (its newest good checkpoint), a checkpoint or a delta.

        Args:
            trunk: where the trunk lies, if not where the run's configuration says.
            overrides: `key=value`, of what does not belong to the critic.

        Raises:
            InputError: there is none, or the critic does not allow an override.
        """
        folder = newest_intact(source)
        file = folder / "config.yaml"
        stored = load_stored_config(CriticConfig, file)
        config = load_stored_config(CriticConfig, file, [*_whole(folder, stored), *overrides])
        problem = f"{folder}: this belongs to the critic and cannot be set (there -> asked for)"
        refuse_differences(to_dict(stored), to_dict(config), problem, _MAY_BE_SET)
        if trunk is not None:
            config.model.path = trunk
        return cls(folder, read_facts(folder), config)

    @property
    def num_unfrozen_layers(self) -> int:
        return int(self.facts["identity"]["num_unfrozen_layers"])

    @property
    def architecture(self) -> TransformerConfig:
        """That of the trunk, which `check` has found to be the one of the training."""
        return read_architecture(self.config.model.path)

    @property
    def weights(self) -> Weights:
        return open_weights(self.folder)

    def on_meta(self) -> Critic:
        """The critic without weights, its last N blocks trainable."""
        with torch.device("meta"):
            critic = Critic(
                self.architecture,
                head_bias=self.config.training.value_head.bias,
                head_outputs=self.config.objective.head_outputs,
            )
        unfreeze_last_blocks(critic, self.num_unfrozen_layers)
        return critic

    def check(self, *, verify: bool = False) -> None:
        """See that trunk and trained parameters are those that this critic is made of.

        Args:
            verify: read all of the trunk, even if its fingerprint is known.

        Raises:
            InputError: another trunk or architecture, or parameters that do not fit N. Both sides
                are named.
        """
        self._check_trunk(Path(self.config.model.path), verify)
        there = self.weights.shapes
        wanted = {name: tuple(p.shape) for name, p in _trainable(self.on_meta()).items()}
        problems = [
            f"{name}: {wanted.get(name, 'nothing')} expected, {there.get(name, 'nothing')} there"
            for name in sorted(wanted.keys() | there.keys())
            if wanted.get(name) != there.get(name)
        ]
        if problems:
            raise InputError(
                f"{self.folder}: {len(problems)} parameter(s) do not fit a critic with "
                f"num_unfrozen_layers {self.num_unfrozen_layers}" + listing(problems)
            )

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raise InputError unless this is the tokenizer of the critic's training."""
        there = self.facts["identity"].get("tokenizer", fingerprint)
        if there != fingerprint:
            raise InputError(
                f"{self.folder}: trained with another tokenizer: "
                f"{difference('tokenizer', there, fingerprint)}; name the right one with "
                "--override tokenizer.path=PATH"
            )

    def _check_trunk(self, trunk: Path, verify: bool) -> None:
        if not trunk.is_dir():
            raise InputError(
                f"{trunk}: the trunk that {self.folder} was trained on is not here; "
                "name its folder with --trunk"
            )
        here = {
            "architecture": asdict(read_architecture(trunk)),
            "base": fingerprint(trunk, self.config.data.cache_dir, verify=verify),
        }
        there = {name: self.facts["identity"][name] for name in here}
        problem = (
            f"{self.folder}: not trained on the trunk {trunk} (trained on -> there); "
            "name the right one with --trunk"
        )
        refuse_differences(there, here, problem)


def _whole(folder: Path, config: CriticConfig) -> list[str]:
    """Overrides that lead from anywhere to what a run's relative paths name, where it is there.

    Not its data.cache_dir: what a command caches goes where it is called. But states that the
    run has kept are read where they are.
    """
    if folder.parent.name != "checkpoints":
        return []  # a delta, which may lie anywhere
    start = start_folder(folder.absolute().parents[1], config.run.dir)
    named = {
        "model.path": config.model.path,
        "tokenizer.path": config.tokenizer.path,
        "training.prefix_cache_dir": config.prefix_cache_folder,
    }
    if start is None:
        return []
    return [f"{k}={start / path}" for k, path in named.items() if path and (start / path).exists()]


def find_weights(
    source: Path, critic: nn.Module, identity: dict[str, Any], objective: ObjectiveConfig
) -> Path:
    """The folder whose weights a new run can begin with: `source` is a run, checkpoint or delta.

    Raises:
        InputError: nothing there to load, another trunk, a head whose outputs mean something else,
            with a bias there and none here or the other way round, or it trained blocks that are
            frozen here.
    """
    folder = newest_intact(source)
    stored = read_facts(folder)["identity"]
    names = ("architecture", "base")
    there, here = {n: stored.get(n) for n in names}, {n: identity[n] for n in names}
    refuse_differences(there, here, f"{folder}: trained on another trunk (there -> here)")
    shapes, wanted = open_weights(folder).shapes, _trainable(critic)
    outputs = (shapes[_WEIGHT][0], wanted[_WEIGHT].shape[0])
    if outputs[0] != outputs[1]:
        raise InputError(
            f"{folder}: outputs of the head (objective.loss, objective.bins): "
            f"{outputs[0]} -> {outputs[1]} (there -> here)"
        )
    if objective.loss is Loss.hl_gauss:
        _check_centres(folder, objective.sigma)
    trained, trainable = shapes.keys(), wanted.keys()
    if (_BIAS in trained) != (_BIAS in trainable):
        change = " -> ".join(str(_BIAS in names).lower() for names in (trained, trainable))
        raise InputError(f"{folder}: training.value_head.bias: {change} (there -> here)")
    if frozen := sorted(trained - trainable):
        raise InputError(
            f"{folder} trained {len(frozen)} parameter(s) that would be frozen here; "
            "raise training.num_unfrozen_layers" + listing(frozen, 3)
        )
    return folder


def _check_centres(folder: Path, sigma: float) -> None:
    """Raise InputError where as many bins have other centres, which sigma decides."""
    there = load_stored_config(CriticConfig, folder / "config.yaml").objective.sigma
    if there != sigma:
        raise InputError(
            f"{folder}: bins of the head (objective.sigma): {there:g} -> {sigma:g} (there -> here)"
        )


def load_weights(critic: nn.Module, folder: Path, world: World) -> None:
    """Put a checkpoint's or a delta's trained weights into a critic, on every rank."""
    weights = open_weights(folder)
    weights.fill(_trainable(critic), world)
    _log.info("loaded %d trained tensors from %s", len(weights.shapes), folder)


def _trainable(critic: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in critic.named_parameters() if p.requires_grad}
