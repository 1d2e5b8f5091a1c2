"""The tensors of a file that torch.save wrote, read without executing anything in it.

Shapes are read without torch, and nothing else is then.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from job.common.errors import InputError, file_error, first_line

Stored = TypeVar("Stored")


def read_named(
    file: Path, load: Callable[[Path], object], kind: type[Stored]
) -> Mapping[str, Stored]:
    """What `load` reads from a weight file: a value of `kind` under each name.

    Raises:
        InputError: the file cannot be read, is damaged, or holds anything else.
    """
    _check_zip(file)
    try:
        stored = load(file)
    except pickle.UnpicklingError:
        raise InputError(
            f"{file}: damaged, or holds more than tensors; code in a weight file is never run"
        ) from None
    except Exception as error:  # a damaged file can raise anything
        reason = first_line(error, named=True)
        raise file_error(error, f"{file}: not a readable weight file: {reason}") from None
    if not isinstance(stored, dict) or not all(
        isinstance(k, str) and isinstance(v, kind) for k, v in stored.items()
    ):
        raise InputError(f"{file}: expected a dictionary of named tensors")
    return stored


def _check_zip(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            zipped = zipfile.is_zipfile(stream)
    except OSError as error:
        raise file_error(error, f"{file}: cannot read the weights: {error.strerror}") from None
    if not zipped:
        raise InputError(f"{file}: truncated, or no zip file as torch.save writes it")


@dataclass(frozen=True)
class StoredShape:
    """A tensor of a weight file, of which nothing else is read."""

    sizes: tuple[int, ...]


def stored_shapes(file: Path) -> object:
    """The pickle of a weight file, with a StoredShape for each tensor."""
    with zipfile.ZipFile(file) as archive:
        top = archive.namelist()[0].partition("/")[0]  # as torch.load finds it
        content = archive.read(f"{top}/data.pkl")
    return _ShapeReader(io.BytesIO(content), encoding="utf-8").load()


class _ShapeReader(pickle.Unpickler):
    """Imports nothing: a name in the file finds a stand-in from here, or is refused."""

    def find_class(self, module: str, name: str, /) -> Any:
        full = f"{module}.{name}"
        if _TYPE.fullmatch(full):
            return None  # the shape does not depend on it
        if full not in _STAND_INS:
            raise pickle.UnpicklingError(f"{full} is no part of a state dict")
        return _STAND_INS[full]

    def persistent_load(self, pid: Any, /) -> None:
        """A storage, which is left unread."""


def _tensor(storage: None, offset: int, sizes: tuple[int, ...], *_: object) -> StoredShape:
    if not isinstance(sizes, tuple) or not all(type(size) is int for size in sizes):
        raise pickle.UnpicklingError("a tensor without a shape")
    return StoredShape(sizes)


def _parameter(data: StoredShape, *_: object) -> StoredShape:
    return data


# A type of storage, or of the numbers in it.
_TYPE = re.compile(r"torch(\.storage)?\.\w*Storage|torch\.(u?int|b?float|complex|bool)\w*")
_STAND_INS: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
