"""LLaMA-Factory's freeze tuning of a reward model: pairs, a value head on a language model.

Its own arguments, loading, freezing, collator and trainer; only its reading of text is left out,
for the data is tokenised. Its extra module `norm` would unfreeze the norms of every layer, and is
not asked for: the final norm stays frozen. The value head's dropout of a tenth is turned off, as no
first loss could be compared otherwise.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors.torch import load_file
from torch import nn

from peers.examples import Examples
from peers.hugging_face import TakesTurns, arguments, noting_loss, noting_rows
from peers.turns import Settings, Turns


def given_arguments(settings: Settings) -> dict[str, Any]:
    given = arguments(settings) | {
        "stage": "rm",
        "do_train": True,
        "model_name_or_path": settings.folder,
        "finetuning_type": "freeze",
        "freeze_trainable_layers": settings.n,
        "dataset": "tokenised already",
        "template": "empty",
    }
    given["per_device_train_batch_size"] //= 2  # pairs
    return given | settings.options


def examples(settings: Settings) -> list[dict[str, Any]]:
    """Pairs as its own preprocessing leaves them."""
    pairs = Examples(settings.data).pairs("chosen_input_ids", "rejected_input_ids")
    nothing = dict.fromkeys(("images", "videos", "audios"))
    return [
        pair | _completed(pair, "chosen") | _completed(pair, "rejected") | nothing for pair in pairs
    ]


def _completed(pair: dict[str, Any], key: str) -> dict[str, Any]:
    ids = pair[f"{key}_input_ids"]
    return {f"{key}_attention_mask": [1] * len(ids), f"{key}_labels": ids}


def use_head(model: Any, folder: str) -> None:
    """Begin with the head in the model's folder."""
    stored = load_file(Path(folder) / "model.safetensors")
    head = {name: stored[f"score.{name}"] for name in ("weight", "bias")}
    model.v_head.summary.load_state_dict(head)
    for module in model.v_head.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def without_sound() -> None:
    """Let it import torchaudio, of the same build as torch if at all; text needs none."""
    nothing = ModuleType("torchaudio")
    nothing.__spec__ = ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = nothing


def main() -> None:
    turns = Turns()
    without_sound()
    from llamafactory.data import PairwiseDataCollatorWithPadding, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_model, load_tokenizer
    from llamafactory.train.rm.trainer import PairwiseTrainer

    settings = turns.settings
    model_args, data_args, training_args, finetuning_args, _ = get_train_args(
        given_arguments(settings)
    )
    tokenizing = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(tokenizing["tokenizer"], data_args)
    model = load_model(
        tokenizing["tokenizer"], model_args, finetuning_args, True, add_valuehead=True
    )
    use_head(model, settings.folder)
    collate = PairwiseDataCollatorWithPadding(
        template=template, model=model, pad_to_multiple_of=8, **tokenizing
    )
    trainer = noting_loss(PairwiseTrainer, turns)(
        model=model,
        args=training_args,
        finetuning_args=finetuning_args,
        data_collator=noting_rows(collate, turns),
        train_dataset=examples(settings),
        callbacks=[TakesTurns(turns)],
        **tokenizing,
    )
    trainer.train()


if __name__ == "__main__":
    main()
