"""What any version of transformers makes of exported critics: tokens and values.

    python read_critics.py FOLDER ...

Each folder has critic/ and, in cases.json, texts and chats; beside them is written found.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def read(folder: Path) -> dict[str, Any]:
    """The ids of each text and each chat, and the value after each chat's last token."""
    import torch
    import transformers

    cases = json.loads((folder / "cases.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "critic")
    asked = {"tokenize": True, "return_dict": False}
    found = {
        "version": transformers.__version__,
        "texts": [tokenizer(text)["input_ids"] for text in cases["texts"]],
        "chats": [tokenizer.apply_chat_template(chat, **asked) for chat in cases["chats"]],
        "prompts": [
            tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, **asked)
            for chat in cases["chats"]
        ],
        "pad": tokenizer.pad_token_id,
        "end": tokenizer.eos_token,
    }
    if (folder / "critic" / "config.json").exists():
        cls = transformers.AutoModelForTokenClassification
        model = cls.from_pretrained(folder / "critic").eval()
        with torch.no_grad():
            logits = [model(input_ids=torch.tensor([ids])).logits for ids in found["chats"]]
        found["values"] = [values[0, -1, 0].item() for values in logits]
    return found


if __name__ == "__main__":
    for name in sys.argv[1:]:
        found = read(Path(name))
        Path(name, "found.json").write_text(json.dumps(found))
