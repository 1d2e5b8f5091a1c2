"""The config.json of a critic in Hugging Face's layout: a trunk, a head of one label or bins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from job.common.errors import InputError
from job.model import hf_config
from job.model.architecture import TransformerConfig
from job.model.json_values import read_object
from job.model.trunk_folder import Layout, find_trunk

Task = Literal["TokenClassification", "SequenceClassification"]
_LABEL = "value"
# Of the trunk's own description: where it came from, and another head that stood on it.
_NOT_COPIED = (
    "_name_or_path",
    "dtype",
    "transformers_version",
    "num_labels",
    "problem_type",
)


def one_label_config(
    trunk: str | Path,
    architecture: TransformerConfig,
    task: Task,
    max_positions: int,
    *,
    outputs_are_values: bool,
    bin_centres: Sequence[float] | None = None,
) -> dict[str, Any]:
    """What describes a critic on a trunk to transformers; keys that all its versions read.

    Args:
        max_positions: tokens of the longest sequence, where the trunk does not say.
        outputs_are_values: so that nothing may be applied to them; logits, otherwise.
        bin_centres: what the labels stand for whose probabilities the outputs give; by default
            there is one label, the value.

    Raises:
        InputError: no supported architecture of transformers is such a trunk.
    """
    file, config = _trunk_config(trunk, architecture, max_positions)
    family = hf_config.model_family(file, config)
    config["architectures"] = [f"{family}For{task}"]
    for name in _NOT_COPIED:
        config.pop(name, None)
    names = [_LABEL]
    if bin_centres is not None:
        names = [f"bin_{i}" for i in range(len(bin_centres))]
        config["bin_centres"] = list(bin_centres)
    elif outputs_are_values:
        # of a single label a pipeline, and vLLM after it, takes the sigmoid unless this is said
        config["problem_type"] = "regression"
    return (
        config
        | hf_config.rope_keys(architecture)
        | {
            "torch_dtype": "float32",  # of the trained tensors
            "tie_word_embeddings": False,
            "id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)},
            # where nothing is said, transformers drops a tenth of what goes into the head
            "classifier_dropout": 0.0,
        }
    )


def _trunk_config(
    trunk: str | Path, architecture: TransformerConfig, max_positions: int
) -> tuple[Path, dict[str, Any]]:
    """The file that describes a trunk, and what config.json says of it."""
    found = find_trunk(trunk)
    if found.layout is Layout.HUGGING_FACE:
        return found.description, read_object(found.description, "the architecture")
    try:
        return found.description, hf_config.write(architecture, "float32", max_positions)
    except ValueError as error:
        raise InputError(f"{trunk}: {error}") from None
