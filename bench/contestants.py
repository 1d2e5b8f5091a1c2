"""Contestants of bench/throughput.py: processes that train on the same data, a step at a time.

Peers run in virtual environments of their own, `critic-peers/NAME-...` in the user's cache folder.
They are made once from `peers/NAME.txt`, wherever pip finds packages, and anew when that changes;
what `peers/NAME.alone.txt` lists comes without what it asks for itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import venv
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from common import ROOT, say
from peers.turns import Settings

BENCH = ROOT / "bench"


@dataclass(frozen=True)
class Kind:
    """A contestant before it runs.

    Attributes:
        module: of `peers`, which is run.
        environment: whose requirements it runs with; None for the product's own.
        options: for that module alone.
        shares: whether it is another one only where problems have several solutions.
        pairs: whether it learns from pairs, and so is compared with the product that does.
        lacks: parts of the product's trainable ones that it does not train.
        differs: in a line, what else is not as in the product.
        checkout: whose code it runs; by default this one's.
    """

    module: str
    environment: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    shares: bool = False
    pairs: bool = False
    lacks: tuple[str, ...] = ()
    differs: str = ""
    checkout: Path = ROOT


def _product(kind: str, **more: Any) -> Kind:
    return Kind("product", options={"kind": kind}, **more)


_TRAINER = Kind("trainer", "transformers")
_REWARD_TRAINER = Kind(
    *("reward_trainer", "trl"),
    pairs=True,
    lacks=("head bias",),
    differs="pairs are compared by their last tokens",
)
_FREEZE_TUNING = Kind(
    *("freeze_tuning", "llamafactory"),
    pairs=True,
    lacks=("final norm",),
    differs="pairs are compared by their last tokens; the language-model head is computed too",
)
PACKED, PAIRS, FLOOR, BEFORE = "packed", "packed, pairs", "floor", "packed, before"
KINDS = {
    PACKED: _product("packed"),
    "packed, group_by_problem": _product("grouped", shares=True),
    PAIRS: _product("pairs", pairs=True),
    FLOOR: _product("floor"),
    "Trainer": _TRAINER,
    "Trainer, group_by_length": replace(
        _TRAINER, options={"train_sampling_strategy": "group_by_length"}
    ),
    "TRL": _REWARD_TRAINER,
    "TRL, no recomputation": replace(_REWARD_TRAINER, options={"gradient_checkpointing": False}),
    "LLaMA-Factory": _FREEZE_TUNING,
    "LLaMA-Factory, no recomputation": replace(
        _FREEZE_TUNING, options={"disable_gradient_checkpointing": True}
    ),
}


def add_before(checkout: Path) -> None:
    """Let the product of another checkout, which has bench/peers/product.py, be a contestant."""
    KINDS[BEFORE] = _product("packed", checkout=checkout.resolve())


@dataclass(frozen=True)
class Step:
    """What one step took.

    Attributes:
        rows: of the data, which it trained on; of pairs, one after the other.
        computed_tokens: with padding.
        loss: before the update; None of what has none.
        peak_memory_mb: of the process so far.
    """

    seconds: float
    rows: list[int]
    computed_tokens: int
    loss: float | None
    peak_memory_mb: float


class Contestant:
    """A running one; its methods raise RuntimeError, with its last words, if it has ended."""

    def __init__(self, kind: Kind, settings: Settings) -> None:
        self.kind = kind
        self._said = Path(settings.scratch) / "said.txt"
        python = sys.executable if kind.environment is None else str(environment(kind.environment))
        with self._said.open("w") as said:
            self._process = subprocess.Popen(
                [python, "-m", f"peers.{kind.module}"],
                cwd=kind.checkout / "bench",
                env=_variables(kind, settings),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
        self.pid = self._process.pid
        self._tell(asdict(replace(settings, options=kind.options)))

    def __enter__(self) -> Contestant:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()  # the end of its input ends it
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    @cached_property
    def ready(self) -> dict[str, Any]:
        """What it trains, once it is ready for its first step."""
        return self._answer()

    def step(self) -> Step:
        self._tell({"step": True})
        return Step(**self._answer())

    def _tell(self, what: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # no answer will come, and say why
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            said = self._said.read_text()[-3000:]
            raise RuntimeError(f"peers.{self.kind.module} ended:\n{said}")
        found: dict[str, Any] = json.loads(answer)
        return found


def _variables(kind: Kind, settings: Settings) -> dict[str, str]:
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(kind.checkout)}
    if kind.environment is not None:
        del variables["PYTHONPATH"]  # peers know nothing of the product
    if settings.device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables


def environment(name: str) -> Path:
    """The interpreter of a peer's environment, which is made where it is missing."""
    digest = hashlib.blake2b(sys.version.encode(), digest_size=6)
    for file in _requirements(name):
        digest.update(file.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "critic-peers"
    folder = cache / f"{name}-{digest.hexdigest()}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            say(f"making the environment of {name} in {folder}")
            made = Path(scratch) / "environment"
            _make(made, name)
            if not folder.exists():  # somebody else may have been faster
                made.rename(folder)
    return folder / "bin/python"


def _requirements(name: str) -> list[Path]:
    return sorted((BENCH / "peers").glob(f"{name}*.txt"), reverse=True)


def _make(folder: Path, name: str) -> None:
    venv.create(folder, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", "-q"]
    for file in _requirements(name):
        alone = ["--no-deps"] if file.name.endswith(".alone.txt") else []
        subprocess.run([*pip, *alone, "-r", str(file)], check=True)


def versions(names: list[str]) -> dict[str, list[str]]:
    """The packages that matter in each environment that these contestants use."""
    used = {environment for name in names if (environment := KINDS[name].environment) is not None}
    return {
        name: [
            line
            for file in _requirements(name)
            for line in file.read_text().splitlines()
            if line.startswith(_NAMED)
        ]
        for name in sorted(used)
    }


_NAMED = ("torch==", "transformers==", "trl==", "accelerate==", "llamafactory==")
