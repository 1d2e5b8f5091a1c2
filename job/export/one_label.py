"""The config.json of a critic in Hugging Face's layout: a trunk with a head of one label."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from job.common.errors import InputError
from job.model import hf_config
from job.model.architecture import TransformerConfig
from job.model.json_values import read_object
from job.model.trunk_folder import Layout, find_trunk

Task = Literal["TokenClassification", "SequenceClassification"]
_LABEL = "value"


def one_label_config(
    trunk: str | Path, architecture: TransformerConfig, task: Task, max_positions: int
) -> dict[str, Any]:
    """What describes a critic on a trunk to transformers; keys that all its versions read.

    Args:
        max_positions: tokens of the longest sequence, where the trunk does not say.

    Raises:
        InputError: no supported architecture of transformers is such a trunk.
    """
    config = _trunk_config(trunk, architecture, max_positions)
    (language_model,) = config["architectures"]
    config["architectures"] = [language_model.replace("CausalLM", task)]
    for name in ("_name_or_path", "dtype", "transformers_version"):
        config.pop(name, None)
    return config | {
        "torch_dtype": "float32",  # of the trained tensors
        "tie_word_embeddings": False,
        "id2label": {"0": _LABEL},
        "label2id": {_LABEL: 0},
        # where nothing is said, transformers drops a tenth of what goes into the head
        "classifier_dropout": 0.0,
    }


def _trunk_config(
    trunk: str | Path, architecture: TransformerConfig, max_positions: int
) -> dict[str, Any]:
    found = find_trunk(trunk)
    if found.layout is Layout.HUGGING_FACE:
        return read_object(found.description, "the architecture")
    try:
        return hf_config.write(architecture, "float32", max_positions)
    except ValueError as error:
        raise InputError(f"{trunk}: {error}") from None
