"""Small files that tell where something stands. One that cannot be read counts as absent.

Whatever is whole beside it is worth more: a run goes on from its checkpoints, though its status is
gone. Each such file is named once, in a warning.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, TypeVar

import yaml

from job.common.text_values import load_plain

Value = TypeVar("Value", dict[str, Any], list[Any])
_named: set[Path] = set()
_log = logging.getLogger(__name__)


def read_json(file: Path, kind: type[Value]) -> Value | None:
    """The JSON value of this kind in a file; None if there is none, or it cannot be read."""
    try:
        content = json.loads(file.read_bytes())
        if not isinstance(content, kind):
            raise TypeError(f"no JSON {'object' if kind is dict else 'array'}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        name_unreadable(file, error)
        return None
    return content


def read_yaml(file: Path) -> dict[str, Any] | None:
    """The mapping in a YAML file; None if there is none, or it cannot be read."""
    try:
        content = load_plain(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError("no mapping of keys to values")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        name_unreadable(file, error)
        return None
    return content


def name_unreadable(file: Path, error: object) -> None:
    """Warn, once, of a file that counts as absent."""
    if file.absolute() not in _named:
        _named.add(file.absolute())
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        _log.warning("%s: not readable, and taken as absent: %s", file, reason)
