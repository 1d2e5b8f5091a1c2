"""TRL's RewardTrainer: pairs, each sequence scored at its last token, sequence classification."""

from __future__ import annotations

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import DataCollatorForPreference, RewardTrainer

from peers.examples import Examples
from peers.hugging_face import TakesTurns, arguments, freeze, noting_loss, noting_rows
from peers.turns import Turns


def main() -> None:
    turns = Turns()
    settings = turns.settings
    model = AutoModelForSequenceClassification.from_pretrained(settings.folder, num_labels=1)
    freeze(model, settings.n)
    tokenizer = AutoTokenizer.from_pretrained(settings.folder)
    given = arguments(settings)
    given["per_device_train_batch_size"] //= 2  # pairs
    trainer = noting_loss(RewardTrainer, turns)(
        model=model,
        args=RewardConfig(**given, **settings.options),
        train_dataset=Dataset.from_list(
            Examples(settings.data).pairs("chosen_ids", "rejected_ids")
        ),
        data_collator=noting_rows(DataCollatorForPreference(tokenizer.pad_token_id), turns),
        processing_class=tokenizer,
        callbacks=[TakesTurns(turns)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
