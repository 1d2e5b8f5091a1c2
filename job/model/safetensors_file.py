"""Writes safetensors files; where the file system refuses, the error is its own, with the path."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from job.common.files import let_others_read


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors by name, marked as torch's.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(file)) from None
    let_others_read(file)  # which the library does not, whatever the umask
