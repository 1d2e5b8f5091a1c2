"""transformers' Trainer: token classification with one label, squared errors of response tokens.

The model's own loss of one label is a cross entropy over one class, which is always 0, so that it
gets another; and where config.json says nothing, a tenth of what goes into the head is dropped.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
)

from peers.examples import IGNORED, Examples
from peers.hugging_face import TakesTurns, arguments, freeze, noting_loss, noting_rows
from peers.turns import Turns


def squared_error(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Mean over the labelled tokens of the batch."""
    labelled = labels != IGNORED
    return (outputs.logits[..., 0] - labels)[labelled].square().mean()


def main() -> None:
    turns = Turns()
    settings = turns.settings
    model = AutoModelForTokenClassification.from_pretrained(settings.folder)
    freeze(model, settings.n)
    tokenizer = AutoTokenizer.from_pretrained(settings.folder)
    trainer = noting_loss(Trainer, turns)(
        model=model,
        args=TrainingArguments(**arguments(settings), **settings.options),
        train_dataset=Examples(settings.data).labelled(),
        data_collator=noting_rows(DataCollatorForTokenClassification(tokenizer), turns),
        processing_class=tokenizer,
        compute_loss_func=squared_error,
        callbacks=[TakesTurns(turns)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
