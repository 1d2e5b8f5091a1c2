"""The identity of a trunk: one digest of the weights and the architecture that a critic uses.

Frozen weights are never written to a checkpoint: their fingerprint is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from job.durability.files import write_atomic
from job.durability.preemption import stop_if_asked
from job.model.architecture import PARAMS, WEIGHTS, TransformerConfig, read_architecture
from job.model.weights import NOT_LOADED, open_weights
from job.outcome import InputError
from job.telemetry.progress import progress

FORMAT = 1  # part of the cache key: raise it when the digest is made up differently
BLOCK = 64 * 2**20  # bytes hashed as one; part of what a digest means
THREADS = 8
_log = logging.getLogger(__name__)


def fingerprint(folder: str | Path, cache_dir: str | Path) -> str:
    """The sha256, as 64 hex digits, of the trunk in a folder of Meta's layout.

    Any bit of a tensor that a critic uses, its name, shape and dtype, and the architecture belong
    to it; heads, the order and strides of what is stored, and the form of params.json do not.
    It is kept below `cache_dir` for as long as both files keep path, size and time of change.

    Raises:
        InputError: the architecture or the weights cannot be read, or a tensor is no dense floats.
    """
    architecture = _normalised(read_architecture(folder))
    file = Path(cache_dir) / "fingerprints" / f"{_key(Path(folder), architecture)}.json"
    found = _cached(file)
    if found is None:
        found = _sha256({"architecture": architecture, "tensors": _tensors(Path(folder))})
        _keep(file, found)
    return found


def _normalised(architecture: TransformerConfig) -> Any:
    """As JSON values, with every number a float: equal architectures give equal text."""
    return json.loads(json.dumps(asdict(architecture)), parse_int=float)


def _sha256(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _key(folder: Path, architecture: Any) -> str:
    # The architecture too: later code may read another one from the same file.
    return _sha256([FORMAT, architecture, [_stamp(folder / name) for name in (PARAMS, WEIGHTS)]])


def _stamp(file: Path) -> list[str | int] | None:
    """Path, bytes and nanoseconds of the last change; None for no file, which has no digest."""
    try:
        found = file.stat()
    except OSError:
        return None
    return [str(file.resolve()), found.st_size, found.st_mtime_ns]


def _cached(file: Path) -> str | None:
    """The digest in a cache file; None if there is none or it is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, str) and re.fullmatch("[0-9a-f]{64}", found) else None


def _keep(file: Path, digest: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(digest) + "\n")
    except OSError as error:
        _log.warning("%s: cannot keep the base's fingerprint: %s", file, error.strerror)


def _tensors(folder: Path) -> dict[str, Any]:
    """Shape, dtype and digests of the blocks, by name, of the tensors that a critic uses."""
    used = {k: v for k, v in open_weights(folder).items() if not k.startswith(NOT_LOADED)}
    for name, tensor in used.items():
        if not tensor.is_floating_point() or tensor.layout is not torch.strided or tensor.is_meta:
            raise InputError(f"{folder / WEIGHTS}: {name} is no dense array of floats")
    blocks = {name: _blocks(tensor) for name, tensor in used.items()}
    digests = iter(_digests([block for parts in blocks.values() for block in parts]))
    return {
        name: [list(tensor.shape), str(tensor.dtype), [next(digests) for _ in blocks[name]]]
        for name, tensor in used.items()
    }


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of whole rows, at most BLOCK bytes unless one row is more; strides play no part."""
    rows = torch.atleast_1d(tensor)
    bytes_per_row = rows.nbytes // max(1, len(rows))
    return rows.split(max(1, BLOCK // max(1, bytes_per_row)))


def _digests(blocks: Sequence[Tensor]) -> list[str]:
    done, total, digests = 0, sum(block.nbytes for block in blocks) >> 20, []
    with ThreadPoolExecutor(THREADS) as pool, progress("fingerprint of the base", total) as advance:
        for block, digest in zip(blocks, pool.map(_digest, blocks), strict=True):
            stop_if_asked()
            digests.append(digest)
            done += block.nbytes
            advance(done >> 20, "MiB")
    return digests


def _digest(block: Tensor) -> str:
    # As bytes, since numpy has no bfloat16; a copy only of a block that does not lie in order.
    as_bytes = block.contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(as_bytes.data).hexdigest()
