"""The image of this checkout, built once for all that goes into it, and what was written about it.

    python tests/container/built.py

builds it for the tests to come, beside other work; where that cannot be, the tests say why.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools import Missing, Tools, find_tools, mirror

ROOT = Path(__file__).parents[2]
BUILD_SECONDS = 3000
_INPUTS = ("Dockerfile", ".dockerignore", "constraints.txt", "pyproject.toml", "LICENSE")
_INPUT_FOLDERS = ("job", "slurm", "configs", "containers")
_KEPT = 2
_FREE_BYTES = 30_000_000_000
_BASE = "debian:bookworm-slim"
_OWN_BASE = "localhost/critic-test-base:bookworm"


@dataclass(frozen=True)
class Built:
    """What containers/build.sh has left."""

    sif: Path

    @property
    def facts(self) -> dict[str, Any]:
        return dict(json.loads(Path(f"{self.sif}.json").read_text()))

    @property
    def contents(self) -> dict[str, Any]:
        return dict(json.loads(Path(f"{self.sif}.cdx.json").read_text()))


def build_sandbox(tools: Tools) -> Built:
    """Build the image and the SIF as a folder, where this checkout's are not there yet."""
    folder = tools.folder / "built" / _key()
    result = Built(folder / "critic.sandbox")
    with tools.alone():
        if not (result.sif.exists() and _has_image(tools, result.facts["image"])):
            shutil.rmtree(folder, ignore_errors=True)
            _forget_others(tools, folder.parent)
            folder.mkdir(parents=True)
            build(tools, result.sif, name_of(folder), "--sandbox")
    return result


def _key() -> str:
    """Of everything that goes into the image."""
    files = [ROOT / name for name in _INPUTS]
    for name in _INPUT_FOLDERS:
        files += sorted(p for p in (ROOT / name).rglob("*") if p.is_file() and p.suffix != ".pyc")
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def name_of(folder: Path) -> str:
    return f"localhost/critic-test:{folder.name}"


def _has_image(tools: Tools, image: str) -> bool:
    return tools.run("podman", "image", "exists", image).returncode == 0


def _forget_others(tools: Tools, folder: Path) -> None:
    """What was built of other checkouts but the last few; layers too where disk is short."""
    newest_first = sorted(folder.glob("*"), key=lambda path: -path.stat().st_mtime)
    for other in newest_first[_KEPT:]:
        shutil.rmtree(other)
        tools.run("podman", "rmi", "--force", name_of(other))
    if shutil.disk_usage(tools.folder).free < _FREE_BYTES:
        tools.run("podman", "image", "prune", "--force")


def build(tools: Tools, sif: Path, name: str, *options: str) -> None:
    command = [ROOT / "containers/build.sh", "--base", _base(tools), "--name", name, "--out", sif]
    if wheels := _folder_of_torch():
        command += ["--variant", "cpu", "--find-links", wheels]
    if certificates := os.environ.get("PIP_CERT"):
        command += ["--ca", certificates]
    tools.output(*command, *options, seconds=BUILD_SECONDS)


def _base(tools: Tools) -> str:
    """Debian's own image, or one made of its packages where no registry is in reach."""
    for name in (_BASE, _OWN_BASE):
        if _has_image(tools, name):
            return name
    if tools.run("podman", "pull", "--quiet", _BASE, seconds=300).returncode == 0:
        return _BASE
    archive = tools.folder / "base.tar"
    left_out = [f"--dpkgopt=path-exclude=/usr/share/{x}/*" for x in ("man", "doc", "locale")]
    source = f"deb {mirror()} bookworm main"
    tools.output("mmdebstrap", "--variant=minbase", *left_out, "bookworm", archive, source)
    tools.output("podman", "import", "--quiet", archive, _OWN_BASE)
    archive.unlink()
    return _OWN_BASE


def _folder_of_torch() -> str | None:
    """Where pip here finds a CPU wheel of the pinned torch; None: on its index, if at all."""
    pinned = re.search(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    asked = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    configured = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    for folder in f"{os.environ.get('PIP_FIND_LINKS', '')} {configured}".split():
        if list(Path(folder).glob(f"torch-{pinned[1]}+cpu-cp311-*.whl")):
            return folder
    return None


if __name__ == "__main__":
    with suppress(Missing, AssertionError):  # the tests try again, and say it
        build_sandbox(find_tools())
