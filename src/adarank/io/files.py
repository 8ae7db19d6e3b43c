"""Single files beside and of checkpoints: JSON, safetensors headers, hashes. What is wrong with one is said in a sentence."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from adarank.errors import CheckpointError, reading
from adarank.io.parsing import parse_json
from adarank.io.progress import advance

if TYPE_CHECKING:
    from torch import Tensor

_MAPPED_BYTES = 2**26


def check_file(path: Path) -> None:
    """Refuse what is no file and may never end: a folder, a pipe, a device, a link to nothing.

    Raises:
        CheckpointError: it is one of these.
    """
    with reading(CheckpointError, path):
        path.stat()
    if not path.is_file():
        raise CheckpointError(f"{path}: is no file, and one is needed there. Copy or download it again.")


def open_safetensors(file: Path) -> Any:
    """A safetensors file, its header read; a `CheckpointError` if it is not one, or not whole."""
    check_file(file)
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise CheckpointError(f"{file}: not a whole safetensors file ({error}). Copy or download it again.") from None


class MappedFile:
    """The tensors of a safetensors file, each a view of its bytes on disk, without all pages that were read staying resident.

    They would for as long as the file is mapped, so that a merge that reads a whole model would seem to hold it. So the file is
    mapped anew after some bytes; a mapping before goes with the last tensor that looks at it.

    Arguments:
        handle: the opened file.
        mapped_bytes: after so many that were read the file is mapped anew.
    """

    def __init__(self, path: Path, handle: Any, mapped_bytes: int = _MAPPED_BYTES) -> None:
        self._path, self._handle, self._most, self._read = path, handle, mapped_bytes, 0
        self._stamp = _stamp(path)

    def get_tensor(self, name: str) -> Tensor:
        """The tensor of this name.

        Raises:
            CheckpointError: the file is another than when it was opened.
        """
        if self._read >= self._most:
            self._handle, self._read = open_safetensors(self._path), 0
            if _stamp(self._path) != self._stamp:
                raise CheckpointError(f"{self._path}: changed while it was read. Run again when nothing writes to it.")
        tensor: Tensor = self._handle.get_tensor(name)
        self._read += tensor.nbytes
        return tensor


def _stamp(path: Path) -> tuple[int, int, int]:
    of_file = path.stat()
    return of_file.st_ino, of_file.st_size, of_file.st_mtime_ns


def read_json(path: Path, kind: type = dict) -> Any:
    """What a JSON file holds, which must be of one kind; of no file that kind's empty value.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    with reading(CheckpointError, path):
        if not path.exists() and not path.is_symlink():
            return kind()
    check_file(path)
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not readable JSON ({error}). Copy or download it again.") from None
    if not isinstance(content, kind):
        wanted = "object" if kind is dict else "list"
        raise CheckpointError(f"{path}: a JSON {wanted} was needed, got a {type(content).__name__}.")
    return content


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with reading(CheckpointError, path), path.open("rb") as handle:
        for block in iter(lambda: handle.read(1 << 22), b""):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()
