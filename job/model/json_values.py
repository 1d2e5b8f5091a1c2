"""Values of a JSON file, checked against the fields that they are for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from job.common.errors import InputError, file_error, quoted

_LARGEST_SIZE = 10**7  # far above any model's, and nothing overflows


def read_object(file: Path, what: str) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        InputError: it cannot be read or is anything else; `what` says what it should hold.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise file_error(error, f"{file}: cannot read {what}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: {what} is a JSON object")
    return values


def check_values(file: Path, values: Mapping[str, Any], schema: type) -> None:
    """Raise InputError unless each value has its field's type, and each number a possible size."""
    types = {f.name: str(f.type).partition(" | ") for f in fields(schema)}
    for name, value in values.items():
        kind, _, optional = types[name]
        if optional and value is None:
            continue
        found = quoted(value)
        if kind == "bool" and not isinstance(value, bool):
            raise InputError(f"{file}: {name} must be true or false, not {found}")
        if kind == "int" and not (type(value) is int and 0 < value <= _LARGEST_SIZE):
            raise InputError(
                f"{file}: {name} must be an integer from 1 to {_LARGEST_SIZE}, not {found}"
            )
        if kind == "float" and not (type(value) in (int, float) and 0 < value < math.inf):
            raise InputError(f"{file}: {name} must be a positive number, not {found}")


def check_complete(file: Path, values: Mapping[str, Any], schema: type) -> None:
    """Raise InputError unless each field without a default has a value."""
    required = {f.name for f in fields(schema) if f.default is MISSING}
    if missing := sorted(required - values.keys()):
        raise InputError(f"{file}: no value for {', '.join(missing)}")
