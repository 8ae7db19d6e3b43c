"""PyTorch's zip archives, checked by the CRC-32 that they hold of each member: its own reader does not look at them."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adarank.io.parsing import repetition

_BLOCK = 1 << 22
_FORM = "form"


def is_zip(file: Path) -> bool:
    """True for an archive, as `torch.save` writes it since PyTorch 1.6; older files are pickles alone."""
    with file.open("rb") as handle:
        return handle.read(4) == b"PK\x03\x04"


def check_archive(file: Path, tensors: bool = True) -> None:
    """Compare every member of an archive with its CRC-32. Of a file that is no archive there is nothing to compare.

    Arguments:
        tensors: read the tensors' bytes too; else only what says where they are, which is little.

    Raises:
        ValueError: bytes are not those that were written, or a member is there twice.
        OSError: the file cannot be read.
    """
    if not is_zip(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            check_members(archive, tensors)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        # RuntimeError: a member that is encrypted
        raise ValueError(f"damaged archive: {error}") from None


def check_members(archive: zipfile.ZipFile, tensors: bool) -> None:
    """As `check_archive`, of an archive that is open.

    Raises:
        ValueError: a member is there twice.
        zipfile.BadZipFile, zlib.error, EOFError, ...: bytes are not those that were written.
    """
    members = archive.infolist()
    repeated = repetition([member.filename for member in members])
    if repeated is not None:
        raise ValueError(f"damaged archive: it holds {members[repeated].filename!r} twice")
    for member in members:
        if not tensors and member.filename.split("/")[1:2] == ["data"]:
            continue
        with archive.open(member) as handle:
            while handle.read(_BLOCK):  # the CRC is compared at the end
                pass


def load_saved(file: Path, mmap: bool = False) -> Any:
    """What `torch.save` wrote, on the CPU, without running code from it, its archive checked.

    Arguments:
        mmap: map tensors instead of reading them.

    Raises:
        ValueError: damaged, as far as a CRC-32 tells.
        pickle.UnpicklingError: it would need to run code.
        RuntimeError, ...: damaged in another way; see `pickled.DAMAGED`.
    """
    check_archive(file)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap and is_zip(file))


def signed(content: Mapping[str, Any]) -> dict[str, Any]:
    """What `load_signed` reads: `content` with a digest of all in it but the tensors' bytes, which the archive checks."""
    return {**content, _FORM: hashlib.sha256(_form(content).encode()).hexdigest()}


def load_signed(file: Path, mmap: bool = False) -> dict[str, Any]:
    """What adarank kept for a later run, exactly as it was.

    Raises:
        ValueError: it is not what adarank saved.
        pickle.UnpicklingError, RuntimeError, ...: as for `load_saved`.
    """
    content = load_saved(file, mmap)
    if not isinstance(content, dict):
        raise ValueError("it holds no mapping")
    form = content.pop(_FORM, None)
    if form != hashlib.sha256(_form(content).encode()).hexdigest():
        raise ValueError("it does not hold what adarank saved")
    return content


def _form(value: Any) -> str:
    """Text that tells two values apart, unless they differ in the numbers of tensors alone."""
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(value.shape)}{value.stride()}{value.layout}"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key!r}:{_form(own)}' for key, own in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}[{','.join(map(_form, value))}]"
    return f"{type(value).__name__} {value!r}"
