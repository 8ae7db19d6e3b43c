"""One run at a time at each output: a lock file beside it, which the operating system frees when its process ends.

`.NAME.adarank.lock` lies beside the output NAME while a run writes there, and says whose run it is. It is the system's lock on the
file that counts, not the file: what a killed run leaves of it holds nobody up.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from adarank.errors import OutputError
from adarank.io.hub import local_path

# With the process that holds it: a forked one inherits this, and not the lock.
_HELD: ContextVar[frozenset[tuple[int, Path]]] = ContextVar("held", default=frozenset())
_ATTEMPTS = 5


def resolved(path: Path | str) -> Path:
    """The path that an output has once links are followed: as given, if there are none to follow.

    Raises:
        OutputError: the links lead round in a circle, or the path is no path.
    """
    local_path(path, kind=OutputError)
    path = Path(path)
    try:
        place = path.resolve()
        absolute = Path(os.path.abspath(path))
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a circle, before Python 3.13
        raise OutputError(f"{str(path)!r}: is no path to write to ({error}). Give another path.") from None
    if place.is_symlink():  # from Python 3.13 on a circle resolves to a link
        raise OutputError(f"{path}: is a link that leads back to itself. Give another path.")
    return path if place == absolute and path.name not in ("", "..") else place


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """While it is open no other run, of this process or another one, holds the output `path`. May be nested.

    Missing folders above it are made, and removed again if nothing was written into them.

    Raises:
        OutputError: another run holds it; says which, if that is known.
        OSError: the folder cannot be made or written.
    """
    place = path.resolve()
    if (os.getpid(), place) in _HELD.get():
        yield
        return
    missing = [folder for folder in place.parents if not folder.exists()]
    try:
        lock = _acquired(path, place)
        token = _HELD.set(_HELD.get() | {(os.getpid(), place)})
        try:
            yield
        finally:
            _HELD.reset(token)
            with suppress(OSError):  # while it is held: who has opened it sees that it is gone, and tries anew
                os.unlink(lock.lock_file)
            lock.release()
    finally:
        for folder in missing:  # the deepest first; those with something in them stay
            with suppress(OSError):
                folder.rmdir()


def _acquired(path: Path, place: Path) -> FileLock:
    file = place.parent / f".{place.name}.adarank.lock"
    for attempt in range(_ATTEMPTS):
        before = _holder(file)  # trying to lock it may cut its words off, in older versions of the library
        lock = FileLock(file, timeout=0)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            holder = _holder(file) or before
            raise OutputError(
                f"{path}: another run is writing there{f' ({holder})' if holder else ''}. Wait until it ends, or give another path."
            ) from None
        except FileNotFoundError:  # another run, which made the folder too, has just removed it
            if attempt + 1 == _ATTEMPTS:
                raise
            continue
        if not isinstance(lock, SoftFileLock):  # which has words of its own, where the file system knows no locks
            with suppress(OSError):  # where locked files cannot be written, nobody is named
                file.write_text(f"process {os.getpid()} on {platform.node()}\n", encoding="utf-8")
        return lock
    raise AssertionError("the last attempt returns or raises")


def _holder(file: Path) -> str:
    try:
        return " ".join(file.read_text(encoding="utf-8").split())
    except (OSError, ValueError):
        return ""
