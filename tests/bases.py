"""Bases in folders of either layout, for tests to read and to damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from job.model.architecture import TransformerConfig
from job.model.architecture_file import read_architecture
from job.model.transformer import Transformer, Trunk
from job.model.weights import load_trunk, save_hugging_face, save_transformer

CUT_BY_ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
CUT_BY_COLUMNS = ("wo", "w2")


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Random norms and biases too, so that none of them can be left out unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            scale = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.normal_(0, scale, generator=generator).add_(mean)


def language_model(config: TransformerConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(config)
    randomise(model)
    return model.to(dtype)


def write_meta(folder: Path, model: Transformer) -> Path:
    save_transformer(model, folder)
    return folder


def write_hugging_face(folder: Path, model: Transformer) -> Path:
    save_hugging_face(model, folder, 64)
    return folder


def write_parts(folder: Path, model: Transformer, n: int, embedding_dim: int) -> Path:
    """Meta's layout in n files, as n model-parallel ranks write it."""
    save_transformer(model, folder)
    (folder / "consolidated.pth").unlink()
    parts: list[dict[str, Tensor]] = [{} for _ in range(n)]
    for name, tensor in model.state_dict().items():
        module = name.split(".")[-2]
        if module == "tok_embeddings":
            cut = tensor.chunk(n, embedding_dim)
        elif module in (*CUT_BY_ROWS, *CUT_BY_COLUMNS):
            cut = tensor.chunk(n, 0 if module in CUT_BY_ROWS or tensor.dim() == 1 else 1)
        else:
            cut = (tensor,) * n
        for part, piece in zip(parts, cut, strict=True):
            part[name] = piece.clone()
    for number, part in enumerate(parts):
        torch.save(part, folder / f"consolidated.{number:02}.pth")
    return folder


def write_shards(folder: Path, model: Transformer, n: int) -> Path:
    """Hugging Face's layout in n shards with an index."""
    write_hugging_face(folder, model)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(n):
        shard = f"model-{number + 1:05}-of-{n:05}.safetensors"
        held = dict(list(tensors.items())[number::n])
        save_file(held, folder / shard)
        weight_map |= dict.fromkeys(held, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def loaded(folder: Path) -> Trunk:
    trunk = Trunk(read_architecture(folder))
    load_trunk(trunk, folder)
    return trunk


def change_json(file: Path, **changes: Any) -> None:
    """Change some values of a JSON object; `...` takes one out."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def change_safetensors(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
