"""The folder of a trunk, in Meta's layout or in Hugging Face's, and its files. Free of torch.

Meta's          params.json; consolidated.pth, or consolidated.00.pth, .01.pth, ... of one model
Hugging Face's  config.json; model.safetensors, or model.safetensors.index.json and its shards
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

from job.common.errors import InputError, file_error, listing
from job.model.json_values import read_object

PARAMS, WEIGHTS = "params.json", "consolidated.pth"
CONFIG, SAFETENSORS = "config.json", "model.safetensors"
INDEX = f"{SAFETENSORS}.index.json"
_PARTS = "consolidated.[0-9][0-9].pth"
_PICKLED = "pytorch_model*.bin"
_WANTED = (
    f"model.path must be a folder with {PARAMS} and {WEIGHTS} (Meta's layout) or with {CONFIG} and "
    f"{SAFETENSORS} (Hugging Face's)"
)


class Layout(enum.Enum):
    META = "Meta's layout"
    HUGGING_FACE = "Hugging Face's layout"


@dataclass(frozen=True)
class TrunkFolder:
    """A folder whose layout is known."""

    folder: Path
    layout: Layout

    @property
    def description(self) -> Path:
        """The file that states the architecture."""
        return self.folder / (PARAMS if self.layout is Layout.META else CONFIG)

    @property
    def index(self) -> Path | None:
        """What says which shard holds a tensor, if there are shards."""
        file = self.folder / INDEX
        return file if self.layout is Layout.HUGGING_FACE and file.exists() else None

    def weight_files(self) -> list[Path]:
        """The files with tensors, in order; each is there.

        Raises:
            InputError: one is missing, or there are weights twice.
        """
        find = _meta_files if self.layout is Layout.META else _hugging_face_files
        return find(self.folder)

    def files(self) -> list[Path]:
        """All that a trunk is read from."""
        index = [] if self.index is None else [self.index]
        return [self.description, *index, *self.weight_files()]


def find_trunk(folder: str | Path) -> TrunkFolder:
    """Tell a folder's layout by its files.

    Raises:
        InputError: there is none, or there are two.
    """
    folder = Path(folder)
    try:
        names = {file.name for file in folder.iterdir()}
    except OSError as error:
        raise file_error(
            error, f"{folder}: cannot read the model: {error.strerror}; {_WANTED}"
        ) from None
    pickled = WEIGHTS in names or any(folder.glob(_PARTS))
    hugging_face = bool(names & {CONFIG, SAFETENSORS, INDEX})
    if pickled and hugging_face:
        raise InputError(
            f"{folder}: holds {WEIGHTS} and {CONFIG}: a model in two layouts, or two models; "
            "move one of them into a folder of its own"
        )
    if hugging_face:  # perhaps beside a params.json, as in Mistral's folders
        return TrunkFolder(folder, Layout.HUGGING_FACE)
    if pickled or PARAMS in names:
        return TrunkFolder(folder, Layout.META)
    raise InputError(f"{folder}: cannot read the model: neither {PARAMS} nor {CONFIG}; {_WANTED}")


def _meta_files(folder: Path) -> list[Path]:
    parts, single = sorted(folder.glob(_PARTS)), folder / WEIGHTS
    if parts and single.exists():
        raise InputError(f"{folder}: holds {WEIGHTS} and {parts[0].name}; keep only the model's")
    if not parts:
        _check_there([single])
        return [single]
    wanted = [
        folder / f"consolidated.{n:02}.pth" for n in range(int(parts[-1].suffixes[-2][1:]) + 1)
    ]
    _check_there(wanted)
    return wanted


def _hugging_face_files(folder: Path) -> list[Path]:
    single, index = folder / SAFETENSORS, folder / INDEX
    if single.exists() and index.exists():
        raise InputError(f"{folder}: holds {SAFETENSORS} and {INDEX}; keep only the model's")
    if index.exists():
        shards = sorted({folder / shard for shard in weight_map(index).values()})
        _check_there(shards)
        return shards
    if not single.exists() and any(folder.glob(_PICKLED)):
        raise InputError(
            f"{folder}: weights are read from {SAFETENSORS}, not from pickled {_PICKLED}; "
            "transformers converts them: from_pretrained, then save_pretrained"
        )
    _check_there([single])
    return [single]


def weight_map(index: Path) -> dict[str, str]:
    """The shard that an index names for each tensor.

    Raises:
        InputError: it is no index, or names files elsewhere.
    """
    found = read_object(index, "the index of the weights").get("weight_map")
    if not isinstance(found, dict) or not found:
        raise InputError(f"{index}: weight_map must name the shard of each tensor")
    for name, shard in found.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(f"{index}: {name}: {shard!r} is no file of this folder")
    return found


def _check_there(files: list[Path]) -> None:
    missing = []
    for file in files:
        try:
            file.stat()
        except FileNotFoundError as error:
            missing.append(f"{file}: cannot read the weights: {error.strerror}")
        except OSError as error:
            raise file_error(error, f"{file}: cannot read the weights: {error.strerror}") from None
    if len(missing) == 1:
        raise InputError(f"{missing[0]}; {_WANTED}")
    if missing:
        folder = files[0].parent
        raise InputError(
            f"{folder}: {len(missing)} files of weights are missing" + listing(missing)
        )
