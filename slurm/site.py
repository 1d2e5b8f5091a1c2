"""What all runs of a user share: trunk, data, cluster profile and image, in a file of their own.

It stands below every configuration: what a configuration says itself goes before it. `submit.py
init` writes it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from job.common.config import merge_config
from job.common.errors import InputError, file_error, listing
from job.common.files import write_atomic
from job.common.nested import filled, flatten, is_unset, to_dict
from job.common.possible_values import impossible_values
from job.common.schema import EMBEDDED, CriticConfig, DataConfig
from job.common.text_values import dump

VARIABLE = "CRITIC_SITE"
_HEAD = (
    "# What all my runs share; what a configuration says itself goes before it (docs/slurm.md).\n"
)
_PATHS = ("model.path", "data.train", "data.validation", "cluster", "image")


@dataclass
class SiteModel:
    path: str | None = None


@dataclass
class SiteData:
    train: str | None = None
    validation: str | None = None
    fields: Any = None  # of these files, as is the template
    template: str | None = None


@dataclass
class SiteMlflow:
    tracking_uri: str | None = None


@dataclass
class SiteConfig:
    """The keys of a site file; the sections are those of a critic's configuration."""

    model: SiteModel = field(default_factory=SiteModel)
    data: SiteData = field(default_factory=SiteData)
    mlflow: SiteMlflow = field(default_factory=SiteMlflow)
    cluster: str | None = None  # a profile in configs/cluster, or a file
    image: str | None = None  # critic.sif, or none; default: the profile's


@dataclass(frozen=True)
class Site:
    """A site file and what it says; or none, which says nothing."""

    file: Path | None = None
    values: SiteConfig = field(default_factory=SiteConfig)

    def fill(self, tree: dict[str, Any]) -> dict[str, Any]:
        """A configuration's own values, and where it has none the site's."""
        below = _given(to_dict(self.values) | {"cluster": None, "image": None})
        data = tree.get("data")
        if isinstance(data, dict) and not is_unset(data.get("train")):
            for of_other_files in ("fields", "template"):
                below.get("data", {}).pop(of_other_files, None)
        return filled(tree, below)

    def source(self, key: str, value: object) -> str:
        """How a message about a value begins, if it is the site's."""
        own = self.file is not None and flatten(to_dict(self.values)).get(key) == str(value)
        return f"{self.file}: " if own else ""


def find_site(asked: str | None) -> Site:
    """The site file that is asked for or named by CRITIC_SITE, else the user's own if it is there.

    Raises:
        InputError: one that is named is not there, or it is wrong; its keys are named.
    """
    file = site_file(asked)
    named = asked or os.environ.get(VARIABLE)
    # not Path.exists, which fails where a folder on the way is another user's
    if file is None or not (named or os.access(file, os.F_OK)):
        return Site()
    return Site(file, _load(file))


def site_file(asked: str | None) -> Path | None:
    """Where the site file is or would be; None where no home is known, as cron may have it."""
    if named := asked or os.environ.get(VARIABLE):
        return Path(named).absolute()
    folder, home = os.environ.get("XDG_CONFIG_HOME", ""), os.environ.get("HOME")
    if not Path(folder).is_absolute():  # which the XDG specification wants to be ignored
        if not home:
            return None
        folder = f"{home}/.config"
    return Path(folder, "critic-job", "site.yaml")


def advice(asked: str | None) -> str:
    """What helps where a configuration lacks what a site file can say."""
    if site_file(asked) is None:
        return f"no site file either: HOME is not set; name one with --site FILE or {VARIABLE}"
    return "or once, for all your runs:\n  python slurm/submit.py init"


def can_give(keys: Sequence[str]) -> bool:
    """Whether a site file can say one of these keys."""
    return not set(keys).isdisjoint(flatten(to_dict(SiteConfig())))


def impossible(values: SiteConfig) -> Iterator[str]:
    """One line per value that cannot work."""
    named = flatten(to_dict(values))
    for key in _PATHS:
        path = named[key]
        if path is not None and _is_path(key, path) and not Path(path).is_absolute():
            yield f"{key}: {path!r} is no whole path, and means another file in each folder"
    data = DataConfig(**_given(vars(values.data)))
    yield from impossible_values(CriticConfig(data=data))


def _is_path(key: str, value: str) -> bool:
    if key == "cluster":
        return value.endswith(".yaml")
    return value != ("none" if key == "image" else EMBEDDED)


def write_site(file: Path, values: SiteConfig) -> None:
    """Write a site file, whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    file = file.resolve()  # the file behind a link stays behind it
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, _HEAD + dump(_given(to_dict(values))))
    except OSError as error:
        raise file_error(error, f"{file}: cannot write: {error.strerror}") from None


def _load(file: Path) -> SiteConfig:
    values = merge_config(SiteConfig, file)
    if problems := list(impossible(values)):
        raise InputError(f"{file}: impossible site" + listing(problems))
    return values


def _given(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree without what nobody has given."""
    inner = {k: _given(v) if isinstance(v, dict) else v for k, v in tree.items()}
    return {k: v for k, v in inner.items() if v is not None and v != {}}
