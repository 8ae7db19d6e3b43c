"""Writing checkpoints: tensor by tensor, and whole or not at all.

Shapes and dtypes of a merge are known before its first number, so a safetensors header can be written
first and every tensor's bytes after it: nothing but the current tensor is in memory.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from adarank.errors import OutputError
from adarank.io.checkpoint import NAMES, cast

RECORD = "adarank.json"
BUNDLE = "bundle.json"

_NUMBERS = re.compile(r"\[\s+-?\d[-+.,eE\d\s]*\]")

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Tensor name -> (shape, dtype), in the order in which the tensors will be written."""


@contextmanager
def atomic_folder(out: Path, force: bool = False) -> Iterator[Path]:
    """A temporary sibling folder that becomes `out` when the block ends, and vanishes when it fails.

    Raises:
        OutputError: `out` exists and `force` is not given, or it is not an output of adarank, or the disk
            is full or read-only.
    """
    check_output(out, force)
    partial = out.parent / f".{out.name}.partial"  # a fixed name, so that a killed run's leavings are found
    with _disk_errors(out):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            _replace(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_output(out: Path, force: bool) -> None:
    """Refuse an output path that would overwrite something, before any work is done."""
    parent = next(p for p in (out, *out.resolve().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{out}: {parent} is not writable. Give another output folder or mend its permissions.")
    if not out.exists():
        return
    if out.is_file():
        raise OutputError(f"{out}: is a file, and an output is a folder. Give another path.")
    if not any(out.iterdir()):
        return
    if not force:
        raise OutputError(f"{out}: already exists. Give another path, or --force to replace it.")
    if not (out / RECORD).exists():
        raise OutputError(
            f"{out}: holds files that adarank did not write (no {RECORD}), so --force will not remove it. Give another path."
        )


def _replace(partial: Path, out: Path) -> None:
    for file in partial.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    old = out.parent / f".{out.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OutputError(
                f"{out}: the disk is full. Nothing was left behind; free space or give another path."
            ) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise OutputError(f"{out}: cannot be written ({error.strerror}). Give another output folder.") from None
        raise


def write_text(path: Path, text: str) -> None:
    """Write a small file whole: to a temporary name, then renamed."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON with each list of numbers on one line, whole or not at all."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    write_text(path, _NUMBERS.sub(lambda found: " ".join(found.group().split()), text) + "\n")


def write_checkpoint(
    folder: Path, layout: Layout, tensors: Iterator[tuple[str, Tensor]], max_shard_bytes: int = 5 * 10**9
) -> list[Path]:
    """Stream `tensors` into `folder` as model.safetensors, or shards of at most `max_shard_bytes` with an index.

    Arguments:
        layout: name -> (shape, dtype) of every tensor, in the order of `tensors`.
        tensors: (name, tensor) pairs; each is cast to the layout's dtype, moved to the CPU and written.

    Raises:
        OutputError: the tensors do not follow the layout (a bug, not a user's mistake).
    """
    shards = _shard_names(layout, max_shard_bytes)
    for file, names in shards.items():
        with TensorFile(folder / file, {name: layout[name] for name in names}) as handle:
            for _ in names:
                written, tensor = next(tensors, ("nothing", torch.zeros(0)))
                handle.write(written, tensor)
                del tensor  # the next one is made before this name is bound again
    weight_map = {name: file for file, names in shards.items() for name in names}
    if len(shards) > 1:
        index = {"metadata": {"total_size": layout_bytes(layout)}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    return [folder / file for file in shards]


class TensorFile:
    """One safetensors file, written tensor by tensor: the header first, then each tensor's bytes as it comes.

    Arguments:
        layout: name -> (shape, dtype) of every tensor, in the order in which they will be written.

    Raises:
        OutputError: the tensors do not follow the layout (a bug, not a user's mistake), or the layout's dtype cannot
            hold a value.
    """

    def __init__(self, path: Path, layout: Layout, metadata: Mapping[str, str] | None = None) -> None:
        self._path, self._layout = path, layout
        self._expected = iter(layout)
        self._handle = path.open("wb")
        _write_header(self._handle, layout, metadata)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._handle.close()
        missing = next(self._expected, None)
        if kind is None and missing is not None:
            raise OutputError(f"{self._path.name}: tensor '{missing}' was never written.")

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor: cast to the layout's dtype, moved to the CPU and written."""
        wanted = next(self._expected, "nothing")
        shape, dtype = self._layout.get(wanted, ((), tensor.dtype))
        if name != wanted or tuple(tensor.shape) != shape:
            raise OutputError(
                f"{self._path.name}: expected tensor '{wanted}' {shape}, got '{name}' {tuple(tensor.shape)}."
            )
        _write_tensor(self._handle, cast(tensor, dtype, name, "Give another out_dtype, such as bfloat16.").cpu())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A small safetensors file with metadata. The same content always gives the same bytes."""
    with path.open("wb") as handle:
        _write_header(handle, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}, metadata)
        for tensor in tensors.values():
            _write_tensor(handle, tensor.cpu())


def _shard_names(layout: Layout, limit: int) -> dict[str, list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, spec in layout.items():
        if groups[-1] and size + _nbytes(spec) > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += _nbytes(spec)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups)}


def layout_bytes(layout: Layout) -> int:
    """Bytes of all tensors of a layout, headers not among them."""
    return sum(_nbytes(spec) for spec in layout.values())


def _nbytes(spec: tuple[tuple[int, ...], torch.dtype]) -> int:
    return torch.Size(spec[0]).numel() * spec[1].itemsize


def _write_header(handle: IO[bytes], layout: Layout, metadata: Mapping[str, str] | None = None) -> None:
    """The safetensors header: its length in 8 little-endian bytes, then JSON padded to a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, spec in layout.items():
        end = offset + _nbytes(spec)
        header[name] = {"dtype": NAMES[spec[1]], "shape": list(spec[0]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    handle.write(len(text).to_bytes(8, "little"))
    handle.write(text)


def _write_tensor(handle: IO[bytes], tensor: Tensor) -> None:
    if tensor.numel():
        handle.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
