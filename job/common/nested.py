"""Configurations as plain nested dictionaries: flattened, compared. Free of torch."""

from __future__ import annotations

import dataclasses
import enum
import re
from typing import Any

from omegaconf import MISSING

from job.common.errors import InputError, listing

_DIGEST = re.compile(r"[0-9a-f]{32,64}(\.\w+)?")
# What is compared by a digest, of which people need no more than that it differs.
_CONTENTS = {
    "base": "the weights of the trunk",
    "tokenizer": "the vocabulary or the rules of the tokenizer",
    "train_data": "the rows of data.train, or their fields, template or tokens,",
    "validation_data": "the rows of data.validation, or their fields, template or tokens,",
    "critic": "the trained weights of the critic",
    "data": "the rows of the data, or their fields, template or tokens,",
}


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain nested dicts, enums by name."""
    return dataclasses.asdict(config, dict_factory=_by_name)


def _by_name(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {k: v.name if isinstance(v, enum.Enum) else v for k, v in items}


def filled(tree: dict[str, Any], below: dict[str, Any]) -> dict[str, Any]:
    """`tree`, and where it says nothing (no key, null or `???`) what stands in `below`."""
    whole = dict(below)
    for key, value in tree.items():
        under = below.get(key)
        if isinstance(value, dict) and isinstance(under, dict):
            whole[key] = filled(value, under)
        elif key not in below or not is_unset(value):
            whole[key] = value
    return whole


def is_unset(value: Any) -> bool:
    return value is None or value == MISSING


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line per key that differs between two nested configurations."""
    a, b = flatten(old), flatten(new)
    keys = [key for key in sorted(a | b) if a.get(key, "absent") != b.get(key, "absent")]
    return [difference(key, a.get(key, "absent"), b.get(key, "absent")) for key in keys]


def difference(key: str, old: object, new: object) -> str:
    """How two values differ; of contents that only their digests stand for, that they do."""
    if _is_digest(old) and _is_digest(new):
        return f"{_CONTENTS.get(key, key)} differ ({str(old)[:8]} -> {str(new)[:8]})"
    return f"{key}: {old} -> {new}"


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def refuse_differences(
    old: dict[str, Any], new: dict[str, Any], problem: str, may_differ: tuple[str, ...] = ()
) -> None:
    """Raise InputError with one line per key that differs and does not begin as one that may."""
    changed = [line for line in differences(old, new) if not line.startswith(may_differ)]
    if changed:
        raise InputError(problem + listing(changed))
