"""Checkpoints of torch.distributed.checkpoint, as FSDP's trainers write them, read tensor by tensor.

    .metadata            a pickle: names, shapes, dtypes, and which part of which tensor lies where
    __RANK_N.distcp      the parts, one after another, each as `torch.save` writes a tensor

Nothing of a pickle's code is imported or run. A tensor is put together of its parts as it is read, one part at a time.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adarank.errors import CheckpointError
from adarank.io.archive import check_members
from adarank.io.files import check_file
from adarank.io.pickled import DAMAGED, damaged
from adarank.io.pickled_modules import Inert, RestrictedUnpickler

METADATA = ".metadata"
_MODEL = ("model", "state_dict", "model_state_dict")  # what trainers call the model's part beside the optimiser's
_TENSOR, _BYTES = "TensorStorageMetadata", "BytesStorageMetadata"


def is_distributed(folder: Path) -> bool:
    """Whether a folder is a checkpoint of torch.distributed.checkpoint."""
    return (folder / METADATA).is_file()


@dataclass(frozen=True)
class Part:
    """A block of one tensor, and where its bytes lie."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


@dataclass(frozen=True)
class Assembled:
    """A tensor, and the parts that make it up."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]


@dataclass
class DistributedFile:
    """All tensors of a checkpoint's model, by their names in its state dict.

    Arguments:
        folder: of the checkpoint.

    Attributes:
        tensors: name -> what makes it up.
        unused: what lies beside the model's tensors -> why it is not read.

    Raises:
        CheckpointError: it is damaged, not whole, or written in a way that is not read.
    """

    folder: Path
    tensors: dict[str, Assembled] = field(init=False)
    unused: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        path = self.folder / METADATA
        try:
            self._read(_unpickled(path))
        except DAMAGED as error:
            raise damaged(path, error) from None
        self._check_files()

    @property
    def files(self) -> list[Path]:
        """The files that hold the model's tensors, and what says what lies where."""
        parts = {part.file for tensor in self.tensors.values() for part in tensor.parts}
        return [self.folder / METADATA, *sorted(parts)]

    def get_tensor(self, name: str) -> Tensor:
        """The tensor of this name, put together.

        Raises:
            CheckpointError: a part is damaged, or none of this tensor.
        """
        tensor = self.tensors[name]
        if len(tensor.parts) == 1:
            return _loaded(tensor.parts[0], name, tensor.dtype)
        whole = torch.empty(tensor.shape, dtype=tensor.dtype)
        for part in tensor.parts:
            place = tuple(slice(at, at + size) for at, size in zip(part.offsets, part.sizes, strict=True))
            whole[place] = _loaded(part, name, tensor.dtype)
        return whole

    def _read(self, content: Any) -> None:
        entries: Mapping[str, Any] = _field(content, "state_dict_metadata")
        places = {
            (_field(index, "fqn"), tuple(getattr(index, "offset", None) or ())): info
            for index, info in _field(content, "storage_data").items()
        }
        inside = _names(entries, getattr(content, "planner_data", None))
        unread = {type(entry).__name__ for entry in entries.values()} - {_TENSOR, _BYTES}
        if unread:
            raise ValueError(f"it holds {', '.join(sorted(unread))}")
        self.tensors = {
            inside[key]: _assembled(self.folder, key, entry, places)
            for key, entry in entries.items()
            if key in inside and type(entry).__name__ == _TENSOR
        }
        others = [key for key in entries if key not in inside or type(entries[key]).__name__ != _TENSOR]
        groups = dict.fromkeys(key.split(".", 1)[0] for key in others)
        self.unused = {
            f"{group}: {sum(key.split('.', 1)[0] == group for key in others)} entries": "no tensors of the model"
            for group in groups
        }

    def _check_files(self) -> None:
        """Every part lies in its file, and the parts of each tensor are all of it."""
        lost = []
        for name, tensor in self.tensors.items():
            lost += [f"{name}: {p.file.name} lacks it" for p in tensor.parts if not _holds(p)]
            if sum(math.prod(part.sizes) for part in tensor.parts) != math.prod(tensor.shape):
                lost.append(f"{name}: its parts are not all of it")
        if lost:
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            raise CheckpointError(
                f"{self.folder}: {len(lost)} part(s) of tensors are missing ({'; '.join(lost[:3])}{more}). Copy all files of the checkpoint, of every rank."
            )


def _unpickled(path: Path) -> Any:
    check_file(path)
    try:
        with path.open("rb") as handle:
            return RestrictedUnpickler(handle).load()
    except pickle.UnpicklingError as error:
        raise damaged(path, error) from None


def _field(entry: Any, name: str) -> Any:
    """What an object of the pickle has under a name; a `ValueError` if it is no such object."""
    if not isinstance(entry, Inert) or name not in vars(entry):
        raise ValueError(f"no '{name}' where torch.distributed.checkpoint writes it")
    return vars(entry)[name]


def _names(entries: Mapping[str, Any], paths: Any) -> dict[str, str]:
    """Key in the checkpoint -> name in the model's state dict. Where the model's part is under a key of its own, only of what is there."""
    paths = paths if isinstance(paths, Mapping) else {}
    wrapped = {
        key: ".".join(map(str, path[1:]))
        for key in entries
        if isinstance(path := paths.get(key), tuple) and len(path) > 1 and path[0] in _MODEL
    }
    return wrapped or {key: key for key in entries}


def _assembled(folder: Path, key: str, entry: Any, places: Mapping[tuple[str, tuple[int, ...]], Any]) -> Assembled:
    shape, dtype = tuple(_field(entry, "size")), _field(_field(entry, "properties"), "state")[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"no dtype of '{key}'")
    parts = []
    for chunk in _field(entry, "chunks"):
        offsets, sizes = tuple(_field(chunk, "offsets")), tuple(_field(chunk, "sizes"))
        info = places.get((key, offsets))
        if info is None:
            raise ValueError(f"no place of '{key}' at {list(offsets)}")
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(
                f"{folder}: '{key}' is stored by an extension ({', '.join(map(str, info.transform_descriptors))}), such as compression, "
                "and plain tensors are read. Save the checkpoint without it."
            )
        if any(not 0 <= at <= at + size <= whole for at, size, whole in zip(offsets, sizes, shape, strict=True)):
            raise ValueError(f"a part of '{key}' lies outside of it")
        file = str(_field(info, "relative_path"))
        if Path(file).name != file:
            raise ValueError(f"it names a file outside of its folder ({file!r})")
        parts.append(Part(offsets, sizes, folder / file, int(_field(info, "offset")), int(_field(info, "length"))))
    return Assembled(shape, dtype, tuple(parts))


def _holds(part: Part) -> bool:
    return part.file.is_file() and 0 <= part.start <= part.start + part.length <= part.file.stat().st_size


def _loaded(part: Part, name: str, dtype: torch.dtype) -> Tensor:
    try:
        with part.file.open("rb") as handle, io.BufferedReader(_Window(handle, part.start, part.length)) as window:
            with zipfile.ZipFile(window) as archive:
                check_members(archive, True)
            window.seek(0)
            tensor: Any = torch.load(window, map_location="cpu", weights_only=True)
    except (*DAMAGED, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise damaged(part.file, error) from None
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != part.sizes or tensor.dtype != dtype:
        raise CheckpointError(
            f"{part.file}: what lies there is not the part of '{name}' that {METADATA} names. Copy the checkpoint again, all of one save."
        )
    return tensor.detach()


class _Window(io.RawIOBase):
    """A stretch of a file, as a file."""

    def __init__(self, handle: Any, start: int, length: int) -> None:
        self._handle, self._start, self._length, self._at = handle, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence] + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._handle.seek(self._start + self._at)
        count = max(0, min(len(buffer), self._length - self._at))
        given: int = self._handle.readinto(memoryview(buffer)[:count])
        self._at += given
        return given
