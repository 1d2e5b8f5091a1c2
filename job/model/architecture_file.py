"""A trunk's architecture, read from a folder in either layout. Free of torch and numpy."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from job.common.errors import InputError, quoted
from job.model import hf_config
from job.model.architecture import LinearScaling, RopeScaling, TransformerConfig, config_field_names
from job.model.json_values import check_complete, check_values, read_object
from job.model.pickle_shapes import StoredShape, read_named, stored_shapes
from job.model.trunk_folder import Layout, TrunkFolder, find_trunk

# Meta's params.json says `use_scaled_rope` and no factor. Those of the published models, by width
# and blocks: Llama 3.1 and 3.3 (8B, 70B, 405B), and Llama 3.2 (1B, 3B).
_PUBLISHED_FACTORS = {
    (4096, 32): 8.0,
    (8192, 80): 8.0,
    (16384, 126): 8.0,
    (2048, 16): 32.0,
    (3072, 28): 32.0,
}
# Keys of params.json that say nothing about the architecture.
_IGNORED_PARAMS = {"use_scaled_rope", "rope_scaling", "max_seq_len", "max_batch_size"}
_EMBEDDING = "tok_embeddings.weight"


def read_architecture(folder: str | Path) -> TransformerConfig:
    """The architecture in a folder's params.json or config.json.

    Raises:
        InputError: no such file, or it lacks, misspells or contradicts something, or describes a
            model that is not supported.
    """
    trunk = find_trunk(folder)
    file = trunk.description
    values = _meta_values(trunk) if trunk.layout is Layout.META else hf_config.read(file).values
    values["rope_scaling"] = _rope_scaling(file, values["rope_scaling"])
    check_values(file, values, TransformerConfig)
    check_complete(file, values, TransformerConfig)
    try:
        return TransformerConfig(**values)
    except ValueError as error:
        raise InputError(f"{file}: {error}") from None


def check_window(folder: str | Path, max_length: int) -> None:
    """Raise InputError where a trunk attends to fewer tokens than sequences may have."""
    trunk = find_trunk(folder)
    if trunk.layout is Layout.META:
        return
    window = hf_config.read(trunk.description).window
    if window is not None and window < max_length:
        raise InputError(
            f"{trunk.description}: sliding_window {window} is less than data.max_length "
            f"{max_length}, and attention here sees the whole sequence; set data.max_length to "
            f"{window} or less (data.overlong says what becomes of longer ones)"
        )


def _meta_values(trunk: TrunkFolder) -> dict[str, Any]:
    file = trunk.description
    params = read_object(file, "the architecture")
    unknown = sorted(params.keys() - config_field_names() - _IGNORED_PARAMS)
    if unknown:
        raise InputError(f"{file}: unknown parameter(s) {', '.join(unknown[:10])}")
    known = {k: v for k, v in params.items() if k in config_field_names()}
    if known.get("vocab_size", -1) == -1:  # Llama 1 and 2 leave it to the tokenizer
        known["vocab_size"] = _stored_vocabulary(trunk, known.get("dim"))
    scaled = params.get("use_scaled_rope", False)
    if not isinstance(scaled, bool):
        raise InputError(f"{file}: use_scaled_rope must be true or false, not {scaled!r}")
    if scaled and "rope_scaling" not in params:
        known["rope_scaling"] = {"factor": _published_factor(file, params)}
    else:
        known["rope_scaling"] = params.get("rope_scaling")
    return known


def _published_factor(file: Path, params: dict[str, Any]) -> float:
    shape = params.get("dim"), params.get("n_layers")
    if shape not in _PUBLISHED_FACTORS:
        raise InputError(
            f"{file}: use_scaled_rope without a factor, and no published model has dim {shape[0]} "
            f'and n_layers {shape[1]}; add "rope_scaling": {{"factor": 8.0}}, with its factor '
            "(rope_scaling in config.json of the same model)"
        )
    return _PUBLISHED_FACTORS[shape]


def _rope_scaling(file: Path, values: object) -> RopeScaling | LinearScaling | None:
    """Scaling as an object of params.json; one without `rope_type` is Llama-3's."""
    if values is None:
        return None
    linear = isinstance(values, dict) and values.get("rope_type") == "linear"
    schema = LinearScaling if linear else RopeScaling
    known = [f.name for f in fields(schema)]
    if not isinstance(values, dict) or not values.keys() <= set(known):
        found = quoted(values)
        raise InputError(f"{file}: rope_scaling must hold {', '.join(known)}; not {found}")
    check_values(file, values, schema)
    check_complete(file, values, schema)
    scaling = schema(**values)
    if isinstance(scaling, RopeScaling) and scaling.high_freq_factor <= scaling.low_freq_factor:
        raise InputError(f"{file}: rope_scaling: high_freq_factor must exceed low_freq_factor")
    return scaling


def _stored_vocabulary(trunk: TrunkFolder, dim: object) -> int:
    """Rows of the embedding; in several files it is split by columns, or since Llama 3 by rows."""
    shapes = []
    for file in trunk.weight_files():
        embedding = read_named(file, stored_shapes, StoredShape).get(_EMBEDDING)
        if embedding is None or len(embedding.sizes) != 2:
            raise InputError(f"{file}: no matrix {_EMBEDDING} to read vocab_size from")
        shapes.append(embedding.sizes)
    by_rows = all(columns == dim for _, columns in shapes)
    return sum(rows for rows, _ in shapes) if by_rows else shapes[0][0]
