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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from adarank.errors import OutputError
from adarank.io import processes
from adarank.io.checkpoint import NAMES
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
from adarank.io.state import write_state
from adarank.io.tensor_file import Layout, Streamed, TensorFile, layout_bytes, spec_bytes, write_header, write_tensor

BUNDLE = "bundle.json"
__all__ = [  # RECORD is looked for here by whoever reads outputs
    "BUNDLE", "RECORD", "SHARD_BYTES", "Layout", "Shard", "Streamed", "TensorFile", "atomic_folder", "check_output", "check_shards", "claimed", "json_text", "layout_bytes",
    "locked", "planned_shards", "state_folder", "write_checkpoint", "write_folders", "write_json", "write_record", "write_state", "write_tensors", "write_text",
]  # fmt: skip

_NAME, _TEMPORARY = 255, "." * 32  # the longest name that file systems hold; what temporary names beside it need more
_HEAD_BYTES = 64  # of a header without tensors: its length, its own metadata, and blanks up to a multiple of 8
_NUMBERS = re.compile(r"\[\s+-?\d[-+.,eE\d\s]*\]")

SHARD_BYTES = 5 * 10**9


@contextmanager
def claimed(out: Path, force: bool = False) -> Iterator[Path]:
    """While it is open this run alone writes to `out`; yields its path, links followed.

    What killed runs left there is removed first.

    Raises:
        OutputError: another run writes there, `out` exists and `force` is not given, or it may not be replaced.
    """
    place = resolved(out)
    try:
        # Without the lock: who is refused anyhow keeps nobody else off. An output that is to be replaced may just be
        # changing under another run's hands, so it is looked at with the lock alone.
        _check_place(place, force)
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
    if _check_place(out, force):
        check_replaceable(out)


def _check_place(out: Path, force: bool) -> bool:
    """As `check_output`, but for what an output consists of that is to be replaced; returns whether there is one."""
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
        return False
    if not out.is_dir():
        raise OutputError(f"{out}: is a file, and an output is a folder. Give another path.")
    if not any(out.iterdir()):
        return False
    if not force:
        raise OutputError(f"{out}: already exists. Give another path, or --force to replace it.")
    return True


def write_record(folder: Path, record: dict[str, Any], known: Mapping[str, str | None] = MappingProxyType({})) -> None:
    """Write an output's record, last of its files: it lists all of them with their hashes, and holds its own at its end.

    Arguments:
        known: path of a file in `folder` -> its SHA-256, where that is known already.
    """
    record["files"] = list_files(folder, known)
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


@dataclass(frozen=True)
class Shard:
    """One file of weights.

    Attributes:
        path: where it lies in the output.
        names: of its tensors in the output -> in the file.
    """

    path: Path
    names: Mapping[str, str]


def planned_shards(layout: Layout, paths: Sequence[str] = (), max_shard_bytes: int | None = None) -> list[Shard]:
    """The files of weights that an output of this layout has, in the order of their tensors.

    Arguments:
        paths, max_shard_bytes: as for `write_folders`.
    """
    of = {name: next((path for path in paths if name.startswith(f"{path}/")), "") for name in layout}
    shards = []
    for path in dict.fromkeys(["", *of.values()]):
        inside = {name.removeprefix(f"{path}/"): name for name in layout if of[name] == path}
        files = _shard_names({short: layout[name] for short, name in inside.items()}, max_shard_bytes or SHARD_BYTES)
        shards += [
            Shard(Path(path) / file, {inside[short]: short for short in of_file}) for file, of_file in files.items()
        ]
    return shards


def write_folders(
    folder: Path,
    layout: Layout,
    tensors: Callable[[Layout], Iterator[tuple[str, Tensor | Streamed]]],
    paths: Sequence[str] = (),
    max_shard_bytes: int | None = None,
) -> dict[str, str | None]:
    """Stream tensors into `folder` as model.safetensors, or shards of at most `max_shard_bytes` with an index.

    A tensor that is larger by itself has a shard of its own. Of several processes each writes every n-th file.

    Arguments:
        layout: name -> (shape, dtype) of every tensor.
        tensors: given a part of the layout, (name, tensor) of its tensors in order. Each is cast to the layout's dtype, moved
            to the CPU and written.
        paths: folders of a sentence encoder's further modules: tensors whose names start with one of them and a slash lie there.
            They come after all others, module by module.

    Returns:
        The files that this process wrote, by their paths in `folder` -> their SHA-256, if it is known.

    Raises:
        OutputError: the tensors do not follow the layout (a bug, not a user's mistake).
    """
    shards = planned_shards(layout, paths, max_shard_bytes)
    mine = processes.share(shards)
    given = tensors({name: layout[name] for shard in mine for name in shard.names})
    digests = {shard.path.as_posix(): _write_shard(folder / shard.path, shard, layout, given) for shard in mine}
    for name, _ in given:
        raise OutputError(f"{folder.name}: tensor '{name}' is in no file.")
    if processes.rank() == 0:
        _write_indices(folder, layout, shards)
    return digests


def _write_shard(
    path: Path, shard: Shard, layout: Layout, given: Iterator[tuple[str, Tensor | Streamed]]
) -> str | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with TensorFile(path, {short: layout[name] for name, short in shard.names.items()}, hashed=True) as handle:
        for _ in shard.names:
            name, tensor = next(given, ("nothing", torch.zeros(0)))
            handle.write(shard.names.get(name, name), tensor)
            del tensor  # the next one is made before this name is bound again
    return handle.sha256


def _write_indices(folder: Path, layout: Layout, shards: Sequence[Shard]) -> None:
    """What says in which file a tensor lies, where a folder has several."""
    for parent in dict.fromkeys(shard.path.parent for shard in shards):
        inside = [shard for shard in shards if shard.path.parent == parent]
        if len(inside) > 1:
            weight_map = {short: shard.path.name for shard in inside for short in shard.names.values()}
            total = layout_bytes({name: layout[name] for shard in inside for name in shard.names})
            (folder / parent).mkdir(parents=True, exist_ok=True)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(folder / parent / "model.safetensors.index.json", index)


def write_checkpoint(
    folder: Path, layout: Layout, tensors: Iterator[tuple[str, Tensor]], max_shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Stream all tensors of a layout, in its order, into `folder`; returns the files. See `write_folders`."""
    write_folders(folder, layout, lambda wanted: tensors, (), max_shard_bytes)
    return [folder / shard.path for shard in planned_shards(layout, (), max_shard_bytes)]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A small safetensors file with metadata, whole or not at all. The same content always gives the same bytes."""
    path = path.resolve()  # a link is followed
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with partial.open("wb") as handle:
            write_header(handle, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}, metadata)
            for tensor in tensors.values():
                write_tensor(handle, tensor.cpu())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_shards(layout: Layout, limit: int) -> None:
    """Refuse a limit that a file of one tensor would be beyond.

    Raises:
        OutputError: some tensors do not fit; the largest is named.
    """
    sizes = {name: _entry_bytes(name, spec) + spec_bytes(spec) for name, spec in layout.items()}
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
        needed = _entry_bytes(name, spec) + spec_bytes(spec)
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
