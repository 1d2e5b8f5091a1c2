"""The identity of a trunk: one digest of the weights and the architecture that a critic uses.

Frozen weights are never written to a checkpoint: their fingerprint is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from job.common.derived import sealed_text, sealed_value
from job.common.errors import InputError, file_error
from job.common.files import write_atomic
from job.common.progress import progress
from job.common.signals import stop_if_asked
from job.model.architecture import TransformerConfig
from job.model.architecture_file import read_architecture
from job.model.stored import StoredTensor
from job.model.trunk_folder import TrunkFolder, find_trunk
from job.model.weights import open_weights

FORMAT = 1  # part of the cache key: raise it when the digest is made up differently
BLOCK = 64 * 2**20  # bytes hashed as one; part of what a digest means
THREADS = 8
_log = logging.getLogger(__name__)


def fingerprint(folder: str | Path, cache_dir: str | Path, *, verify: bool = False) -> str:
    """The sha256, as 64 hex digits, of the trunk in a folder of either layout.

    Any bit of a tensor that a critic uses, its name, shape and dtype, and the architecture belong
    to it; heads, the order, strides and files of what is stored, and the form of params.json or
    config.json do not. It is of the content as it is stored: one model has another fingerprint in
    another layout.
    It is kept below `cache_dir` for as long as all files keep path, size and time of change;
    `verify` reads the weights nevertheless.

    Raises:
        InputError: the architecture or the weights cannot be read, or a tensor is no dense floats.
    """
    config, trunk = read_architecture(folder), find_trunk(folder)
    architecture = _normalised(config)
    file = Path(cache_dir) / "fingerprints" / f"{_key(trunk, architecture)}.json"
    found = None if verify else _cached(file)
    if found is None:
        found = _sha256({"architecture": architecture, "tensors": _tensors(trunk, config)})
        _keep(file, found)
    return found


def _normalised(architecture: TransformerConfig) -> Any:
    """As JSON values, with every number a float: equal architectures give equal text."""
    return json.loads(json.dumps(asdict(architecture)), parse_int=float)


def _sha256(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _key(trunk: TrunkFolder, architecture: Any) -> str:
    # The architecture too: later code may read another one from the same file.
    return _sha256([FORMAT, architecture, [_stamp(file) for file in trunk.files()]])


def _stamp(file: Path) -> list[str | int]:
    """Path, bytes and nanoseconds of the last change."""
    try:
        found = file.stat()
    except OSError as error:
        raise file_error(error, f"{file}: cannot read the trunk: {error.strerror}") from None
    return [str(file.resolve()), found.st_size, found.st_mtime_ns]


def _cached(file: Path) -> str | None:
    """The digest in a cache file; None if there is none or it is damaged."""
    try:
        found = sealed_value(file.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, str) else None


def _keep(file: Path, digest: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, sealed_text(digest))
    except OSError as error:
        _log.warning("%s: cannot keep the trunk's fingerprint: %s", file, error.strerror)


def _tensors(trunk: TrunkFolder, config: TransformerConfig) -> dict[str, Any]:
    """Shape, dtype and digests of the blocks, by name, of the tensors that a critic uses."""
    used = open_weights(trunk.folder, config)
    for tensor in used.values():
        if not tensor.is_dense_floats:
            raise InputError(f"{tensor.files[0]}: {tensor.name} is no dense array of floats")
    blocks = {name: _blocks(tensor) for name, tensor in used.items()}
    digests = iter(_digests([block for parts in blocks.values() for block in parts]))
    return {
        tensor.name: [list(tensor.shape), str(tensor.dtype), [next(digests) for _ in blocks[name]]]
        for name, tensor in used.items()
    }


@dataclass(frozen=True)
class _Block:
    """Whole rows of a tensor that are hashed as one."""

    tensor: StoredTensor
    rows: slice
    nbytes: int


def _blocks(tensor: StoredTensor) -> list[_Block]:
    """Blocks of at most BLOCK bytes unless one row is more; strides and files play no part."""
    rows, *others = tensor.shape or (1,)
    row = tensor.dtype.itemsize * math.prod(others)
    step = max(1, BLOCK // max(1, row))
    starts = range(0, rows, step) if rows else [0]  # one of no rows, as torch splits them
    ends = [min(start + step, rows) for start in starts]
    return [_Block(tensor, slice(a, b), (b - a) * row) for a, b in zip(starts, ends, strict=True)]


def _digests(blocks: Sequence[_Block]) -> list[str]:
    done, total, digests = 0, sum(block.nbytes for block in blocks) >> 20, []
    with ThreadPoolExecutor(THREADS) as pool, progress("fingerprint of the base", total) as advance:
        for block, digest in zip(blocks, pool.map(_digest, blocks), strict=True):
            stop_if_asked()
            digests.append(digest)
            done += block.nbytes
            advance(done >> 20, "MiB")
    return digests


def _digest(block: _Block) -> str:
    rows = block.tensor.stored_rows(block.rows)
    # As bytes, since numpy has no bfloat16; a copy only of a block that does not lie in order.
    as_bytes = rows.contiguous().flatten().view(torch.uint8).numpy()
    digest = hashlib.sha256(as_bytes.data).hexdigest()
    block.tensor.release(block.rows)
    return digest
