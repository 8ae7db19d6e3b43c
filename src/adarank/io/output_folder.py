"""An output's folder: filled beside its place, put there in one step, and replaced only as far as its record goes.

    .NAME.0123456789abcdef.partial/    a run's workspace, beside the output NAME
        adarank-workspace              says that it is adarank's: nothing without it is ever removed
        new/                           what is being written; after the exchange, what was replaced
        old/                           what was there, for a moment, where two folders cannot be exchanged in one step
    .NAME.state/adarank-workspace      the same for what an interrupted run goes on from

Whoever calls these functions holds the output's lock (`lock.hold`), so a workspace that is found there is of a run that
was killed.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from adarank.errors import OutputError, itemise
from adarank.io.files import file_sha256

RECORD = "adarank.json"
MARK = "adarank-workspace"
DIGEST = "record_sha256"
_UNKNOWN = "0" * 64  # what stands in a record for its digest while that is computed
_QUICK_BYTES = 2**20  # where an output is to be replaced, larger files are compared by their length alone
_AT_FDCWD, _EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def workspace(out: Path) -> Iterator[Path]:
    """A folder of this run's own beside `out`, with an empty folder `new` in it. It is gone when the block ends."""
    work = out.parent / f".{out.name}.{secrets.token_hex(8)}.partial"
    try:
        make_ours(work)
        (work / "new").mkdir()
        yield work
    finally:
        remove_ours(work)


def settle(work: Path, out: Path) -> None:
    """Put `work/new` in the place of `out`. A kill at any moment leaves the old or the new output there.

    Where the system cannot exchange two folders in one step there is a moment in which the old one lies in `work`;
    `clear_leavings` of the next run puts it back.
    """
    new, old = work / "new", work / "old"
    for file in new.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if not out.exists():
        new.rename(out)
        return
    new.chmod(stat.S_IMODE(out.stat().st_mode))
    if _exchanged(new, out):
        return
    out.rename(old)
    try:
        new.rename(out)
    except BaseException:
        old.rename(out)
        raise


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two folders in one step (renameat2(2)). False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # not in every C library
    if function is None:
        return False
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return bool(function(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0)


def clear_leavings(out: Path) -> None:
    """Remove what killed runs left of their workspaces, and put back an output that one of them had in hand."""
    for work in leavings(out):
        old = work / "old"
        if old.exists() and not out.exists():
            old.rename(out)
        remove_ours(work)
        with suppress(OSError):  # a kill may have left it empty
            work.rmdir()


def leavings(out: Path) -> list[Path]:
    """The workspaces beside `out`: of a run that goes on, or of runs that were killed."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{16}}\.partial")
    if not out.parent.is_dir():
        return []
    return sorted(path for path in out.parent.iterdir() if pattern.fullmatch(path.name) and is_ours(path))


def make_ours(folder: Path) -> None:
    """A folder that adarank may remove with all that is in it; one that is adarank's already stays as it is.

    Raises:
        OutputError: it is there, and adarank did not make it.
    """
    check_ours(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MARK).exists():
        return
    try:
        (folder / MARK).write_text(
            "adarank works here and removes this folder. Keep nothing in it.\n", encoding="utf-8"
        )
    except OSError:
        (folder / MARK).unlink(missing_ok=True)
        folder.rmdir()
        raise


def check_ours(folder: Path) -> None:
    """Refuse a folder that adarank would work in, and that it did not make."""
    if os.path.lexists(folder) and not is_ours(folder):
        raise OutputError(
            f"{folder}: is not adarank's, and stands where a run keeps what it may go on from. Move it, or give another output path."
        )


def is_ours(folder: Path) -> bool:
    """True for a folder that adarank made, or an empty one: a kill may come before its mark is written."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return (folder / MARK).is_file() or not any(folder.iterdir())


def remove_ours(folder: Path) -> None:
    """Remove a folder that adarank made, its mark last: what a kill leaves of it is still known to be adarank's."""
    if folder.is_symlink() or not (folder / MARK).is_file():
        return
    for path in folder.iterdir():
        if path.name == MARK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    with suppress(OSError):  # what could not be removed keeps its mark, and the next run tries again
        if [path.name for path in folder.iterdir()] in ([], [MARK]):
            (folder / MARK).unlink(missing_ok=True)
            folder.rmdir()


def list_files(folder: Path, known: Mapping[str, str | None] = MappingProxyType({})) -> dict[str, dict[str, Any]]:
    """Path under `folder` -> what tells a file from others: its length and its SHA-256. The record is not among them.

    Arguments:
        known: the same paths -> SHA-256, where it is known already.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / RECORD)
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {
        name: {"bytes": path.stat().st_size, "sha256": known.get(name) or file_sha256(path)}
        for name, path in names.items()
    }


def record_digest(content: bytes) -> str:
    """The SHA-256 of a record's bytes, with zeros in the place of the digest that it holds of itself, its last entry."""
    return sha256(_DIGEST_ENTRY.sub(f'"{DIGEST}": "{_UNKNOWN}"'.encode(), content))


def record_problems(out: Path) -> list[str]:
    """What is wrong with a record's bytes, by the digest at their end, in sentences."""
    content = (out / RECORD).read_bytes()
    if DIGEST.encode() not in content:
        return [f"{RECORD}: holds no hash of itself (an older version wrote it, or it was changed)"]
    held = f'"{DIGEST}": "{record_digest(content)}"'
    return [] if held.encode() in content else [f"{RECORD}: is not as adarank wrote it"]


_DIGEST_ENTRY = re.compile(rb'"%s": "[0-9a-f]{64}"(?=\n}\n\Z)' % DIGEST.encode())


def sha256(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def check_replaceable(out: Path) -> None:
    """Refuse to replace a folder in which anything is that its record does not list as it is.

    Raises:
        OutputError: it has no record, or one without a list; files were added or changed. All are listed.
    """
    if not (out / RECORD).exists():
        raise OutputError(
            f"{out}: holds files that adarank did not write (no {RECORD}), so --force will not remove it. Give another path."
        )
    listed = read_list(out / RECORD)
    if listed is None:
        raise OutputError(
            f"{out}: its {RECORD} does not list the files of an output (it is no record, or one of an older version), so "
            "--force will not remove it. Remove the folder yourself, or give another path."
        )
    problems = differences(out, listed)
    if problems:
        raise OutputError(
            itemise(
                f"{out}: --force replaces what adarank wrote, and not what was added or changed since:",
                problems,
                "Move these elsewhere, or give another path.",
                10,
            )
        )


def read_list(record: Path) -> Mapping[str, Any] | None:
    """The files that a record lists -> what tells each from others; None if it lists none."""
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    files = content.get("files") if isinstance(content, dict) and isinstance(content.get("versions"), dict) else None
    return files if isinstance(files, dict) and all(isinstance(entry, dict) for entry in files.values()) else None


def differences(out: Path, listed: Mapping[str, Any], whole: bool = False) -> list[str]:
    """How a folder differs from its record's list, in words: what was added or changed.

    Arguments:
        whole: compare every byte, also of large files, and name what is missing.
    """
    folders = {parent.as_posix() for name in listed for parent in Path(name).parents}
    problems = []
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_symlink():
            problems.append(f"{name}: is a link")
        elif path.is_dir():
            problems += [] if name in folders else [f"{name}: is a folder that adarank did not make"]
        elif name != RECORD and name not in listed:
            problems.append(f"{name}: is not in the list of {RECORD}")
        elif name != RECORD and whole and "sha256" not in listed[name]:
            problems.append(f"{name}: {RECORD} has no hash of it (an older version wrote it), so it cannot be checked")
        elif name != RECORD and not is_as_listed(path, listed[name], whole):
            problems.append(f"{name}: is not as adarank wrote it")
    missing = [f"{name}: is missing" for name in listed if not (out / name).is_file()]
    return problems + (missing if whole else [])


def is_as_listed(file: Path, entry: Mapping[str, Any], whole: bool = False) -> bool:
    """True if a file is what a list says of it.

    Arguments:
        whole: compare the hash of a large file too; else its length is enough.
    """
    if not file.is_file() or file.stat().st_size != entry.get("bytes"):
        return False
    if not whole and file.stat().st_size > _QUICK_BYTES:
        return True
    return file_sha256(file) == entry.get("sha256")


def check_outside(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output in whose place any of the inputs lies, links followed.

    Raises:
        OutputError: some do; all are listed.
    """
    place = out.resolve()
    inside = sorted({str(path) for path in inputs if path.exists() and path.resolve().is_relative_to(place)})
    if inside and place.exists() and any(place.iterdir()):
        problems = [f"{path}: is read by this run" for path in inside]
        raise OutputError(
            itemise(f"{out}: what the run reads lies inside its own output.", problems, "Give another path.", 10)
        )
