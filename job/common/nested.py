"""Configurations as plain nested dictionaries: flattened, compared. Free of torch."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from omegaconf import MISSING

from job.common.errors import InputError, listing


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
    return [f"{key}: {a.get(key, 'absent')} -> {b.get(key, 'absent')}" for key in keys]


def refuse_differences(
    old: dict[str, Any], new: dict[str, Any], problem: str, may_differ: tuple[str, ...] = ()
) -> None:
    """Raise InputError with one line per key that differs and does not begin as one that may."""
    changed = [line for line in differences(old, new) if not line.startswith(may_differ)]
    if changed:
        raise InputError(problem + listing(changed))
