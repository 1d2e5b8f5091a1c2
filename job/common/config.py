"""The configuration: merge of schema, file and overrides, and validation. Free of torch.

Every wrong key, type or value is an InputError that names the key and its source.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import enum
import functools
import io
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from job.common.errors import InputError, file_error, first_line, listing, quoted, short
from job.common.possible_values import impossible_in_new, impossible_values
from job.common.text_values import (
    element_sections,
    hint_at,
    is_sources,
    is_text,
    is_utf8,
    sources_of,
    text_of,
    with_quotes,
)

Schema = TypeVar("Schema")
_NO_MAPPING = "a configuration is a mapping of keys to values"
_Tree = dict[str, Any]
_Layers = Sequence[tuple[str, DictConfig]]  # each with its source


class NoValueError(InputError):
    """Keys that must have a value and have none."""

    def __init__(self, file: str | Path, keys: Sequence[str]) -> None:
        self.keys = keys
        super().__init__(
            f"{file}: no value for {', '.join(keys)}; "
            f"give one in the file or with --override {keys[0]}=VALUE"
        )


def load_config(
    schema: type[Schema],
    file: str | Path,
    overrides: Sequence[str] = (),
    fill: Callable[[_Tree], _Tree] | None = None,
) -> Schema:
    """Merge schema defaults, YAML file and `key=value` overrides, and check every value.

    Args:
        fill: gives what the file says with the gaps in it filled; overrides go before that too.

    Raises:
        InputError: the file cannot be read; a key is unknown, has no value (NoValueError), or a
            value has the wrong type or an impossible size. Keys, sources and the nearest valid keys
            are named.
    """
    layer = _read_yaml(Path(file), schema)
    if fill is not None:
        layer = OmegaConf.create(fill(cast(_Tree, OmegaConf.to_container(layer))))
    return _checked(schema, file, _layers(schema, file, layer, overrides), impossible_in_new)


def _layers(schema: type, file: str | Path, layer: DictConfig, overrides: Sequence[str]) -> _Layers:
    return [(str(file), layer), *(_parse_override(text, schema) for text in overrides)]


def _checked(
    schema: type[Schema],
    file: str | Path,
    layers: _Layers,
    impossible: Callable[[Any], Iterator[str]] = impossible_values,
) -> Schema:
    config = _merged(schema, file, layers)
    problems = list(impossible(config))
    if problems:
        raise InputError(f"{file}: impossible configuration" + listing(problems))
    return config


def merge_config(schema: type[Schema], file: str | Path, overrides: Sequence[str] = ()) -> Schema:
    """Merge schema defaults, YAML file and overrides into an object of any dataclass.

    Raises:
        InputError: the file cannot be read; a key is unknown, has no value or the wrong type.
    """
    layer = _read_yaml(Path(file), schema)
    return _merged(schema, file, _layers(schema, file, layer, overrides))


def _merged(schema: type[Schema], file: str | Path, layers: _Layers) -> Schema:
    for source, layer in layers:
        _check_keys(schema, layer, source)
    return cast(Schema, _to_object(_merge(schema, layers), file))


def load_stored_config(
    schema: type[Schema], file: str | Path, overrides: Sequence[str] = ()
) -> Schema:
    """`load_config` for a file that a run has left, perhaps one of an earlier version."""
    stored = OmegaConf.to_container(_read_yaml(Path(file), schema))
    before = OmegaConf.create(completed(cast(dict[str, Any], stored), schema))
    return _checked(schema, file, _layers(schema, file, before, overrides))


def completed(stored: dict[str, Any], schema: type) -> dict[str, Any]:
    """A stored configuration in which each key that it lacks means what was done without it."""
    sections = sections_of(schema)
    whole = dict(stored)
    for f in dataclasses.fields(schema):
        if f.name in sections:
            whole[f.name] = completed(stored.get(f.name) or {}, sections[f.name])
        elif f.name not in stored:
            default = f.default_factory() if callable(f.default_factory) else f.default
            value = f.metadata.get("before", default)
            whole[f.name] = value.name if isinstance(value, enum.Enum) else value
    return whole


def kept_from_before(stored: dict[str, Any], asked: Any) -> dict[str, Any]:
    """What a run of an earlier version means otherwise than a configuration that says nothing else.

    Args:
        stored: the run's configuration, `completed`.
        asked: what it is to go on with, of the same schema.

    Returns:
        By key, what was done before the key existed, where the run still does it and the default,
        which is asked for, is something else.
    """
    kept: dict[str, Any] = {}
    for f in dataclasses.fields(asked):
        value = getattr(asked, f.name)
        if dataclasses.is_dataclass(value):
            inner = kept_from_before(stored.get(f.name) or {}, value)
            kept |= {f"{f.name}.{key}": before for key, before in inner.items()}
        elif value == f.default and stored.get(f.name) == f.metadata.get("before", value) != value:
            kept[f.name] = f.metadata["before"]
    return kept


def set_key(config: Any, key: str, value: Any) -> None:
    """Set `a.b` of a configuration; a choice by its name, as configurations are stored."""
    *sections, name = key.split(".")
    section = functools.reduce(getattr, sections, config)
    kind = type(getattr(section, name))
    is_named = issubclass(kind, enum.Enum) and isinstance(value, str)
    setattr(section, name, kind[value] if is_named else value)


def refuse_undecodable(arguments: Sequence[str]) -> None:
    """Raise InputError for an argument that is not UTF-8, and can stand in no file."""
    if wrong := next((one for one in arguments if not is_utf8(one)), None):
        raise InputError(f"{short(wrong)!a}: this argument is not UTF-8 text")


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        refuse_undecodable(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}\n{self.format_usage()}see {self.prog} --help")


def _own_name() -> str:
    """The command that runs: a file of the package, or a folder's `__main__`."""
    file = Path(sys.argv[0])
    return file.parent.name if file.stem == "__main__" else file.stem


def command_line(
    description: str,
    command: str | None = None,
    *,
    of_a_critic: bool = False,
    required: bool = True,
) -> argparse.ArgumentParser:
    """The options that all commands with a configuration share, or all with a trained critic."""
    parser = _Parser(
        prog=f"python -m job.{command or _own_name()}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if of_a_critic:
        about = "a run, one of its checkpoints, or a delta"
        parser.add_argument("--critic", required=required, type=Path, metavar="PATH", help=about)
        about = "its trunk; default: as the run was configured"
        parser.add_argument("--trunk", "--base", metavar="DIR", help=about)
    else:
        parser.add_argument(
            "--config", required=required, metavar="FILE", help="a YAML configuration"
        )
    parser.add_argument(
        "--override", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="may repeat"
    )
    return parser


def at_least(low: float, kind: Callable[[str], float] = float) -> Callable[[str], float]:
    """The `type` of an option that takes finite numbers of this kind from `low` on."""

    def read(text: str) -> float:
        if not low <= (value := kind(text)) < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: {low:g} or more")
        return value

    read.__name__ = kind.__name__  # which argparse names where a text is no number
    return read


def add_verify(parser: argparse.ArgumentParser) -> None:
    """The option of all commands that use what earlier ones have made."""
    about = "read cached data and trunk whole before they are used, not only samples of them"
    parser.add_argument("--verify", action="store_true", help=about)


def _read_yaml(path: Path, schema: type) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)  # first as it stands, so that errors speak of that
        loaded = OmegaConf.load(io.StringIO(with_quotes(path.read_text("utf-8"), schema)))
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.strerror is None:  # OmegaConf's, of one value
            raise InputError(f"{path}: {_NO_MAPPING}") from None
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise file_error(error, f"{path}: cannot read the configuration: {reason}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    except (OmegaConfBaseException, RecursionError, ValueError) as error:
        raise InputError(f"{path}: {_essence(error)}") from None
    if not isinstance(loaded, DictConfig):
        raise InputError(f"{path}: {_NO_MAPPING}")
    return loaded


def _parse_override(text: str, schema: type) -> tuple[str, DictConfig]:
    source = f"--override {short(text)}"
    key, equals, value = text.partition("=")
    if not equals or not key or any(not part for part in key.split(".")):
        raise InputError(f"{source}: write it as key=value, with dots between key parts")
    hint = hint_at(schema, key)
    try:
        if is_text(hint):
            return source, _nested(key, text_of(value))
        if is_sources(hint) and not value.lstrip().startswith("["):
            return source, _nested(key, sources_of(value))
        OmegaConf.from_dotlist([text])  # first as it stands, so that errors speak of that
        return source, OmegaConf.from_dotlist([f"{key}={with_quotes(value, hint)}"])
    except (OmegaConfBaseException, RecursionError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{source}: {_essence(error)}") from None


def _nested(key: str, value: str | float | None) -> DictConfig:
    tree: Any = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return OmegaConf.create(tree)


def _check_keys(schema: type, layer: DictConfig, source: str) -> None:
    plain = cast(dict[str, Any], OmegaConf.to_container(layer))
    unknown = list(_unknown_keys(plain, schema))
    if unknown:
        raise InputError(f"{source}: {len(unknown)} key(s) do not fit" + listing(unknown))


def _merge(schema: type, layers: _Layers) -> DictConfig:
    """All layers at once, which takes as long as one; each by itself only to say which is wrong."""
    try:
        return cast(DictConfig, OmegaConf.merge(_defaults(schema), *(one for _, one in layers)))
    except OmegaConfBaseException:
        for end, (source, _) in enumerate(layers, 1):
            try:
                OmegaConf.merge(_defaults(schema), *(one for _, one in layers[:end]))
            except OmegaConfBaseException as error:
                problem = _wrong_element(schema, layers[end - 1][1]) or _named(error)
                raise InputError(f"{source}: {problem}") from None
        raise


def _wrong_element(schema: type, layer: DictConfig) -> str | None:
    """What is wrong with an entry of a list, of which OmegaConf does not say that it is in one."""
    for prefix, element, entry in _elements(cast(_Tree, OmegaConf.to_container(layer)), schema):
        try:
            OmegaConf.merge(OmegaConf.structured(element), entry)
        except OmegaConfBaseException as error:
            return prefix + _named(error)
    return None


def _elements(tree: _Tree, schema: type, prefix: str = "") -> Iterator[tuple[str, type, _Tree]]:
    sections, listed = sections_of(schema), element_sections(schema)
    for key, value in tree.items():
        if key in sections:
            yield from _elements(value, sections[key], f"{prefix}{key}.")
        elif key in listed:
            for i, entry in enumerate(value or ()):
                yield f"{prefix}{key}[{i}].", listed[key], entry


def _named(error: OmegaConfBaseException) -> str:
    return (f"{error.full_key}: " if error.full_key else "") + _essence(error)


@functools.cache
def _defaults(schema: type) -> DictConfig:
    """A schema's own values; a merge copies them before it changes any."""
    return OmegaConf.structured(schema)


def _unknown_keys(tree: dict[Any, Any], schema: type, prefix: str = "") -> Iterator[str]:
    """One line per key of `tree` that the schema lacks, or that is a section on one side only."""
    sections, listed = sections_of(schema), element_sections(schema)
    types = {f.name: f.type for f in dataclasses.fields(schema)}
    valid = list(types)
    for key, value in tree.items():
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, 3, 0.5)
            hint = f"nearest: {', '.join(near)}; " if near else ""
            yield f"{prefix}{key}: unknown key ({hint}valid here: {', '.join(valid)})"
        elif key in sections:
            yield from _unknown_in_section(value, sections[key], f"{prefix}{key}")
        elif key in listed:
            yield from _unknown_in_list(value, listed[key], f"{prefix}{key}")
        elif isinstance(value, dict) and not str(types[key]).startswith(("Any", "dict")):
            yield f"{prefix}{key}: a single value, not the section {quoted(value)}"
        elif types[key] == "bool" and type(value) in (int, float):  # else 2 would be true
            yield f"{prefix}{key}: true or false, not {value}"


def _unknown_in_list(value: Any, schema: type, name: str) -> Iterator[str]:
    if isinstance(value, list):
        for i, one in enumerate(value):
            yield from _unknown_in_section(one, schema, f"{name}[{i}]")
    elif not isinstance(value, str) or "${" not in value:  # which may stand for a list
        inside = ", ".join(f.name for f in dataclasses.fields(schema))
        yield f"{name}: a list of sections with {inside}; not {quoted(value)}"


def _unknown_in_section(value: Any, schema: type, name: str) -> Iterator[str]:
    if isinstance(value, dict):
        yield from _unknown_keys(value, schema, f"{name}.")
    else:
        inside = ", ".join(f.name for f in dataclasses.fields(schema))
        yield f"{name}: a section with {inside}; not {quoted(value)}"


def sections_of(schema: type) -> dict[str, type]:
    return {
        f.name: cast(type, f.default_factory)
        for f in dataclasses.fields(schema)
        if dataclasses.is_dataclass(f.default_factory)
    }


def _to_object(merged: DictConfig, file: str | Path) -> object:
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise NoValueError(file, missing)
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise InputError(f"{file}: {_named(error)}") from None


def _essence(error: Exception) -> str:
    """A library's message; YAML keeps it apart from where it stood."""
    return short(first_line(getattr(error, "problem", None) or error))
