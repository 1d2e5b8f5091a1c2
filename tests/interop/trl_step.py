"""One step of TRL's RewardTrainer on a folder and a pair of better and worse token ids.

Prints the scores before and after it as JSON.
"""

from __future__ import annotations

import json
import sys

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer


def main(folder: str, pair: list[list[int]]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)

    def scores() -> list[float]:
        with torch.no_grad():
            return [model(input_ids=torch.tensor([ids])).logits.item() for ids in pair]

    before = scores()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = RewardConfig(
        output_dir="trl",
        max_steps=1,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    data = Dataset.from_dict({"chosen_ids": [pair[0]], "rejected_ids": [pair[1]]})
    trainer = RewardTrainer(
        model=model,
        args=settings,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    result = trainer.train()
    moved = sum(not weights[name].equal(p.detach()) for name, p in model.named_parameters())
    found = {"before": before, "after": scores(), "loss": result.training_loss, "moved": moved}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
