"""Work that runs beside other work, in a thread: reading and hashing files, which hold nobody up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from typing import Generic, TypeVar

from adarank.io.progress import listening, stage

T = TypeVar("T")


class _Cancelled(Exception):
    """Nobody waits for the work any more."""


class Beside(Generic[T]):
    """What a thread computes."""

    def __init__(self, compute: Callable[[], T]) -> None:
        self._compute = compute
        self._values: list[T] = []
        self._error: BaseException | None = None
        self._cancelled = False
        self._thread = threading.Thread(target=copy_context().run, args=(self._work,), daemon=True)
        self._thread.start()

    def result(self) -> T:
        """What was computed, once it is; what was raised is raised here."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._values[0]

    def cancel(self) -> None:
        """End the work where it next says how far it has come."""
        self._cancelled = True

    def _work(self) -> None:
        try:
            with listening(self._heard), stage("beside"):
                self._values.append(self._compute())
        except BaseException as error:  # for whoever waits
            self._error = error

    def _heard(self, what: str, done: float, total: float | None) -> None:
        if self._cancelled:
            raise _Cancelled


@contextmanager
def beside(compute: Callable[[], T]) -> Iterator[Beside[T]]:
    """While it is open `compute` runs in a thread. What is not finished when the block ends is given up.

    Example:
        with beside(lambda: file_sha256(path)) as hashed:
            merge()
            print(hashed.result())
    """
    work = Beside(compute)
    try:
        yield work
    finally:
        work.cancel()
