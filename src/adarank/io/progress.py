"""How far a long stage has come, for whoever listens: reading, hashing, scoring, the search of a start, writing.

Whoever begins a stage says how much there is to do, whoever works inside it says what is done; neither knows who shows it.
The command line listens. A stage inside another is part of it, and not shown by itself.

    with listening(lambda what, done, total: print(what, done, total)):
        with stage("Hashing the inputs", total=2):
            advance()
            advance()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

Listener = Callable[[str, float, float | None], None]
"""Called with a stage, how much of it is done, and how much there is; None if that is not known."""


@dataclass
class _Stage:
    what: str
    total: float | None
    shown: bool
    done: float = 0


_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
_current: ContextVar[_Stage | None] = ContextVar("stage", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """While it is open, `listener` hears of every stage."""
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)


@contextmanager
def stage(what: str, total: float | None = None) -> Iterator[None]:
    """While it is open, what `advance` counts is part of this stage.

    Arguments:
        total: how much there is to do, in any unit; None if that is not known.
    """
    before = _current.set(_Stage(what, total, shown=_current.get() is None))
    try:
        advance(0)
        yield
    finally:
        _current.reset(before)


def advance(amount: float = 1) -> None:
    """Say that so much more of the current stage is done; outside of any it is nobody's concern."""
    now, listener = _current.get(), _listener.get()
    if now is not None:
        now.done = now.done + amount if now.total is None else min(now.done + amount, now.total)
        if now.shown and listener is not None:
            listener(now.what, now.done, now.total)
