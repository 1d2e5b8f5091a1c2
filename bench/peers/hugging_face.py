"""What the peers that are built on transformers' Trainer share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from peers.turns import Settings, Turns

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]
_FOREVER = 1_000_000  # steps; the benchmark says when it is over


def arguments(settings: Settings) -> dict[str, Any]:
    """Of a TrainingArguments: the product's optimizer, and nothing logged or saved."""
    first, second = settings.betas
    return {
        "output_dir": settings.scratch,
        "max_steps": _FOREVER,
        "per_device_train_batch_size": settings.sequences,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "adam_beta1": first,
        "adam_beta2": second,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        "use_cpu": settings.device == "cpu",
        "bf16": settings.device == "cuda",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,  # `rows` has to reach the collator
    }


def freeze(model: Any, n: int) -> None:
    """Leave the last n blocks, the norm with them, and the head trainable."""
    trunk = model.base_model
    trunk.requires_grad_(False)
    if n:
        trunk.layers[-n:].requires_grad_(True)
        trunk.norm.requires_grad_(True)


class TakesTurns(TrainerCallback):
    """Lets the loop of a Trainer go on for one step at a time."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._turns.ready(given["model"], given["optimizer"].param_groups)
        self._wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._turns.done()
        self._wait()

    def _wait(self) -> None:
        if not self._turns.wait():
            raise SystemExit


def noting_rows(collate: Collate, turns: Turns) -> Collate:
    """A collator that says which rows it is given."""

    def noted(examples: list[dict[str, Any]]) -> dict[str, Any]:
        bare = [{k: v for k, v in one.items() if k != "rows"} for one in examples]
        batch = collate(bare)
        turns.batch([row for one in examples for row in one["rows"]], batch["input_ids"].numel())
        return batch

    return noted


def noting_loss(kind: Any, turns: Turns) -> Any:
    """A class of trainers that says what its loss is."""

    class Noting(kind):  # type: ignore[misc]
        def compute_loss(self, *given: Any, **named: Any) -> Any:
            found = super().compute_loss(*given, **named)
            turns.loss(found[0] if isinstance(found, tuple) else found)
            return found

    return Noting
