"""Writing checkpoints: tensor by tensor, and whole or not at all.

Shapes and dtypes of a merge are known before its first number, so a safetensors header can be written
first and every tensor's bytes after it: nothing but the current tensor is in memory.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from adarank.errors import OutputError
from adarank.io.checkpoint import NAMES, cast
from adarank.io.hub import local_path
from adarank.io.lock import hold, resolved
from adarank.io.output_folder import (
    DIGEST,
    MARK,
    RECORD,
    check_replaceable,
    clear_leavings,
    leavings,
    list_files,
    make_ours,
    record_digest,
    remove_ours,
    settle,
    workspace,
)
from adarank.io.progress import advance
from adarank.io.state import write_state

BUNDLE = "bundle.json"
__all__ = [  # RECORD is looked for here by whoever reads outputs
    "BUNDLE", "RECORD", "SHARD_BYTES", "Layout", "TensorFile", "atomic_folder", "check_output", "check_shards", "claimed", "json_text", "layout_bytes",
    "locked", "state_folder", "write_checkpoint", "write_json", "write_record", "write_state", "write_tensors", "write_text",
]  # fmt: skip

_NAME, _TEMPORARY = 255, "." * 32  # the longest name that file systems hold; what temporary names beside it need more
_HEAD_BYTES = 64  # of a header without tensors: its length, its own metadata, and blanks up to a multiple of 8
_NUMBERS = re.compile(r"\[\s+-?\d[-+.,eE\d\s]*\]")

SHARD_BYTES = 5 * 10**9

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Tensor name -> (shape, dtype), in the order in which the tensors will be written."""


@contextmanager
def claimed(out: Path, force: bool = False) -> Iterator[Path]:
    """While it is open this run alone writes to `out`; yields its path, links followed.

    What killed runs left there is removed first.

    Raises:
        OutputError: another run writes there, `out` exists and `force` is not given, or it may not be replaced.
    """
    place = resolved(out)
    try:
        check_output(place, force)  # without the lock: who is refused anyhow keeps nobody else off
    except OutputError:
        if leavings(place):
            with suppress(OutputError), locked(place):
                clear_leavings(place)
        raise
    with locked(place):
        with _disk_errors(out):
            clear_leavings(place)
        check_output(place, force)
        yield place


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """`lock.hold`, with a sentence where its file cannot be made."""
    with ExitStack() as stack:
        with _disk_errors(out):
            stack.enter_context(hold(out))
        yield


@contextmanager
def atomic_folder(out: Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends, and vanishes when it fails.

    What was in the place of `out` stays there until then.

    Raises:
        OutputError: another run writes there, `out` exists and `force` is not given, or it holds what adarank did not
            write, or the disk is full or read-only.
    """
    with claimed(out, force) as place, _disk_errors(out), workspace(place) as work:
        yield work / "new"
        check_output(place, force)  # again: it may have taken hours
        settle(work, place)


def check_output(out: Path, force: bool) -> None:
    """Refuse an output path that would overwrite something, or that no folder can have, before any work is done."""
    local_path(out, kind=OutputError)
    place = out.resolve()
    if os.path.ismount(place) or place in (Path.cwd(), *Path.cwd().parents):
        raise OutputError(
            f"{out}: an output takes its folder's place whole, and the working folder, those around it and mount points stay where they are. Give the name of a new folder."
        )
    parent = next(p for p in (place, *place.parents) if p.exists())
    if parent != place and not parent.is_dir():
        raise OutputError(f"{out}: {parent} is no folder, so nothing can be written in it. Give another path.")
    longest = max((len(os.fsencode(part)) for part in place.parts), default=0)
    if longest > _NAME - len(_TEMPORARY):
        raise OutputError(
            f"{out}: a name of {longest} bytes, and {_NAME - len(_TEMPORARY)} are the most. Give a shorter one."
        )
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{out}: {parent} is not writable. Give another output folder or mend its permissions.")
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out}: is a file, and an output is a folder. Give another path.")
    if not any(out.iterdir()):
        return
    if not force:
        raise OutputError(f"{out}: already exists. Give another path, or --force to replace it.")
    check_replaceable(out)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write an output's record, last of its files: it lists all of them with their hashes, and holds its own at its end."""
    record["files"] = list_files(folder)
    record.pop(DIGEST, None)
    record[DIGEST] = "0" * 64  # in the place of what is computed over it
    record[DIGEST] = record_digest(_encoded(json_text(record)))
    write_json(folder / RECORD, record)


_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your share of the disk (its quota) is used up",
    errno.EFBIG: "a file would be larger than the system allows",
}


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise OutputError(
                f"{out}: {_FULL[error.errno]}. Nothing was left behind; free space or give another path."
            ) from None
        which = f", {error.filename}" if error.filename else ""
        raise OutputError(
            f"{out}: cannot be written ({error.strerror or error}{which}). Give another output folder."
        ) from None


def write_text(path: Path, text: str, scratch: Path | None = None) -> None:
    """Write a small file whole, as `write_bytes` does."""
    write_bytes(path, _encoded(text), scratch)


def write_bytes(path: Path, content: bytes, scratch: Path | None = None) -> None:
    """Write a small file whole: to a temporary name (in `scratch`, on the same disk, if it is given), then renamed."""
    partial = (scratch or path.parent) / f".{path.name}.{secrets.token_hex(8)}.partial"
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _encoded(text: str) -> bytes:
    """UTF-8; a lone surrogate, which JSON may hold and UTF-8 may not, as the escape that it is in JSON."""
    return text.encode("utf-8", errors="backslashreplace")


def write_json(path: Path, content: Any, scratch: Path | None = None) -> None:
    """Write `content` as `json_text` does, whole or not at all; `scratch` as for `write_text`."""
    write_text(path, json_text(content), scratch)


def json_text(content: Any) -> str:
    """Indented JSON with each list of numbers on one line."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    return _NUMBERS.sub(lambda numbers: " ".join(numbers.group().split()), text) + "\n"


@contextmanager
def state_folder(folder: Path) -> Iterator[Path]:
    """A folder in which a run keeps what it may go on from; one with nothing in it is not left behind.

    Raises:
        OutputError: it is there, and adarank did not make it; or it cannot be made.
    """
    with _disk_errors(folder):
        make_ours(folder)
    try:
        yield folder
    finally:
        if folder.is_dir() and [path.name for path in folder.iterdir()] == [MARK]:
            remove_ours(folder)


def write_checkpoint(
    folder: Path, layout: Layout, tensors: Iterator[tuple[str, Tensor]], max_shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Stream `tensors` into `folder` as model.safetensors, or shards of at most `max_shard_bytes` with an index.

    A tensor that is larger by itself has a shard of its own.

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


def write_folders(
    folder: Path,
    layout: Layout,
    tensors: Iterator[tuple[str, Tensor]],
    paths: Sequence[str] = (),
    max_shard_bytes: int | None = None,
) -> None:
    """As `write_checkpoint`, with the tensors whose names start with one of `paths` and a slash in that folder.

    Arguments:
        paths: of a sentence encoder's further modules. Their tensors come after all others, module by module.
    """
    of = {name: next((path for path in paths if name.startswith(f"{path}/")), "") for name in layout}
    for path in dict.fromkeys(["", *of.values()]):
        part = {name.removeprefix(f"{path}/"): spec for name, spec in layout.items() if of[name] == path}
        (folder / path).mkdir(parents=True, exist_ok=True)
        inside = ((name.removeprefix(f"{path}/"), tensor) for name, tensor in tensors)
        write_checkpoint(folder / path, part, inside, max_shard_bytes or SHARD_BYTES)


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
        advance(_nbytes((shape, dtype)))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A small safetensors file with metadata, whole or not at all. The same content always gives the same bytes."""
    path = path.resolve()  # a link is followed
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with partial.open("wb") as handle:
            _write_header(handle, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}, metadata)
            for tensor in tensors.values():
                _write_tensor(handle, tensor.cpu())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_shards(layout: Layout, limit: int) -> None:
    """Refuse a limit that a file of one tensor would be beyond.

    Raises:
        OutputError: some tensors do not fit; the largest is named.
    """
    sizes = {name: _entry_bytes(name, spec) + _nbytes(spec) for name, spec in layout.items()}
    beyond = {name: size for name, size in sizes.items() if size + _HEAD_BYTES > limit}
    if beyond:
        name, size = max(beyond.items(), key=lambda item: item[1])
        raise OutputError(
            f"max_shard_size: {limit} bytes, and {len(beyond)} tensor(s) do not fit in a file of that size: '{name}' needs {size + _HEAD_BYTES}. Give at least that."
        )


def _shard_names(layout: Layout, limit: int) -> dict[str, list[str]]:
    """File -> its tensors. A file is as long as its tensors and what its header says of them."""
    groups: list[list[str]] = [[]]
    size = _HEAD_BYTES
    for name, spec in layout.items():
        needed = _entry_bytes(name, spec) + _nbytes(spec)
        if groups[-1] and size + needed > limit:
            groups.append([])
            size = _HEAD_BYTES
        groups[-1].append(name)
        size += needed
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups)}


def _entry_bytes(name: str, spec: tuple[tuple[int, ...], torch.dtype]) -> int:
    """What a header says of a tensor takes at most so many bytes, wherever it stands."""
    far = 10**15
    return len(json.dumps({name: {"dtype": NAMES[spec[1]], "shape": list(spec[0]), "data_offsets": [far, far]}}))


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
