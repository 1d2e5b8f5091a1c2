"""The list of a checkpoint's files with their checksums: what is in it, and that it is whole."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from job.common.files import named

MANIFEST = "manifest.json"
FACTS = "facts.json"  # what the checkpoint belongs to
_FORMAT = 1


class DamagedError(Exception):
    """A checkpoint that is not as it was written. The message names file and defect."""


@dataclass(frozen=True)
class FileSum:
    """Size in bytes and SHA-256 of one file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> FileSum:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return cls(file.stat().st_size, digest)


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint folder holds, and which attempt committed it at which step."""

    step: int
    attempt: int
    files: dict[str, FileSum]

    def write(self, folder: Path) -> None:
        with named(folder / MANIFEST):
            (folder / MANIFEST).write_text(self._text())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises DamagedError unless every byte of the manifest is as it was written."""
        try:
            text = (folder / MANIFEST).read_text(encoding="utf-8")
            content = json.loads(text)
            files = {name: FileSum(**sums) for name, sums in content["files"].items()}
            manifest = cls(content["step"], content["attempt"], files)
        except FileNotFoundError:
            raise DamagedError(f"{folder / MANIFEST} is missing") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise DamagedError(f"{folder / MANIFEST} is not readable") from None
        if text != manifest._text():
            raise DamagedError(f"{folder / MANIFEST} was changed")
        return manifest

    def verify(self, folder: Path) -> None:
        """Raise DamagedError unless every file is there, whole and unchanged."""
        for name, expected in self.files.items():
            file = folder / name
            if not file.is_file():
                raise DamagedError(f"{file} is missing")
            if (size := file.stat().st_size) != expected.bytes:
                raise DamagedError(f"{file} has {size} bytes instead of {expected.bytes}")
            if FileSum.of(file) != expected:
                raise DamagedError(f"{file} was changed: its checksum differs")

    def _text(self) -> str:
        """The file's whole text; a checksum of the rest comes first."""
        body = {"format": _FORMAT, **asdict(self)}
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        return json.dumps({"sha256": digest, **body}, indent=2, sort_keys=False) + "\n"
