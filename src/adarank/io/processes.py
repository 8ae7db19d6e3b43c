"""Several processes that share the work of one command, on one machine or on many with a shared folder.

`torchrun` (or `accelerate launch`) starts them and tells each its rank; they speak through `torch.distributed` with gloo.
Whoever has work to share asks this file, which knows of one process only where no others joined:

    with joined(rank, size):
        sums = mapped(file_sha256, files)        each process hashes its share, and all get all sums

A process that dies closes its connections, so whoever waits for it is woken at once. Those that are left call the roll, name
who is missing, or what a process that stopped has said, and stop too.
"""

from __future__ import annotations

import os
import platform
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from adarank.errors import Interrupted, ProcessError

T = TypeVar("T")
R = TypeVar("R")

_MEETING = timedelta(minutes=5)
_WAIT = timedelta(days=1)  # for a process that works; one that has died is noticed at once
_ROLL_CALL_SECONDS = 5.0
_POLL_SECONDS = 0.05


@dataclass
class _Group:
    """The processes that joined.

    Attributes:
        store: keys that all see.
        names: what an error calls each process.
        speaker: the rank that says what went wrong; none as long as nothing did.
    """

    rank: int
    size: int
    store: Any
    names: list[str]
    speaker: int | None = None

    def roll_call(self) -> str:
        """Who stopped or is missing, in a sentence; empty if all are there."""
        self.speaker = 0
        with suppress(RuntimeError):  # the process that kept the keys is gone
            self.store.set(f"here/{self.rank}", "")
        ends = time.monotonic() + _ROLL_CALL_SECONDS
        missing = [rank for rank in range(self.size) if rank != self.rank]
        while missing and time.monotonic() < ends:
            for rank in list(missing):
                if self._has(f"stopped/{rank}"):
                    return f"{self.names[rank]} stopped: {self.store.get(f'stopped/{rank}').decode()}"
                if self._has(f"here/{rank}"):
                    missing.remove(rank)
            time.sleep(_POLL_SECONDS)
        self.speaker = min(rank for rank in range(self.size) if rank not in missing)
        names = ", ".join(self.names[rank] for rank in missing)
        return f"{names} ended without a word: killed, or the machine failed." if missing else ""

    def stopped(self, why: str) -> None:
        """Leave word for whoever will wait for this process."""
        self.speaker = 0
        with suppress(RuntimeError):
            self.store.set(f"stopped/{self.rank}", why)

    def wait_for_speaker(self) -> None:
        """Launchers end all processes once one has ended: the speaker's words come first."""
        if self.rank == self.speaker:
            with suppress(RuntimeError):
                self.store.set("said", "")
        ends = time.monotonic() + _ROLL_CALL_SECONDS
        while self.rank != self.speaker and time.monotonic() < ends and not self._has("said"):
            time.sleep(_POLL_SECONDS)

    def _has(self, key: str) -> bool:
        try:
            return bool(self.store.check([key]))
        except RuntimeError:
            return False


_group: ContextVar[_Group | None] = ContextVar("processes", default=None)


class _Unreachable(KeyboardInterrupt):
    """Another process cannot be reached any more. For this one that is an interruption: what is kept, stays."""


@contextmanager
def joined(rank: int, size: int, local_rank: int = 0) -> Iterator[None]:
    """While it is open this process shares its work with the others. The address at which they meet is in the environment.

    Arguments:
        rank: which of `size` processes this is, from 0 on.
        local_rank: which of those on this machine: its GPU, if there are any.

    Raises:
        ProcessError: they do not meet.
    """
    try:
        store, rank, size = next(rendezvous("env://", rank, size, timeout=_MEETING))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_WAIT)
        names: list[Any] = [None] * size
        dist.all_gather_object(names, f"process {rank} of {size} (number {os.getpid()} on {platform.node()})")
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"process {rank} of {size} does not meet the others ({error}). Check MASTER_ADDR and MASTER_PORT."
        ) from None
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    group = _Group(rank, size, store, names)
    token = _group.set(group)
    try:
        yield
    finally:
        _group.reset(token)
        if group.speaker is not None:
            group.wait_for_speaker()
        with suppress(RuntimeError):
            dist.destroy_process_group()


@contextmanager
def stopping_together() -> Iterator[None]:
    """If this process stops inside, the others are told; if another one stops or dies, this one stops with an error about it.

    Raises:
        ProcessError: another process stopped or died; says which, and why if that is known.
    """
    group = _group.get()
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as error:
        if group is None:
            raise
        for number in (signal.SIGINT, signal.SIGTERM):  # which a launcher sends to all once one has ended
            with suppress(ValueError):  # not in the main thread
                signal.signal(number, signal.SIG_IGN)
        sentence = group.roll_call()
        if not sentence and not isinstance(error, _Unreachable):
            raise
        sentence = sentence or "A connection between the processes broke."
        kept = str(error) if isinstance(error, Interrupted) else "The same command starts again, from what is kept."
        raise ProcessError(f"{sentence}\nThe other processes stopped with it. {kept}") from None
    except BaseException as error:
        if group is not None:
            group.stopped(str(error) or type(error).__name__)
        raise


@contextmanager
def alone() -> Iterator[None]:
    """While it is open this process works for itself, as if no others had joined."""
    token = _group.set(None)
    try:
        yield
    finally:
        _group.reset(token)


def rank() -> int:
    """Which of the processes this is; 0 where it is alone."""
    group = _group.get()
    return group.rank if group else 0


def size() -> int:
    """How many processes share the work."""
    group = _group.get()
    return group.size if group else 1


def speaks() -> bool:
    """Whether this process says what went wrong: the first of those that are left."""
    group = _group.get()
    return group is None or group.rank == (group.speaker or 0)


def names() -> list[str]:
    """What errors call each of the processes, by rank; nothing where there is one."""
    group = _group.get()
    return list(group.names) if group else []


def share(items: Sequence[T]) -> Sequence[T]:
    """Those of the items that are this process's: every n-th."""
    return items[rank() :: size()]


def gathered(value: T) -> list[T]:
    """Every process's value, by rank, in every process. All must call it."""
    values: list[Any] = [None] * size()
    if size() == 1:
        return [value]
    with _reaching():
        dist.all_gather_object(values, value)
    return values


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives in the first process, in every process. All must call it."""
    made: list[Any] = [make() if rank() == 0 else None]
    if size() > 1:
        with _reaching():
            dist.broadcast_object_list(made, src=0)
    value: T = made[0]
    return value


def from_owner(rank: int, value: T | None) -> T:
    """The value that the process of this rank has of something, in every process. All must call it.

    Arguments:
        value: None in all others.
    """
    made: list[Any] = [value]
    if size() > 1:
        with _reaching():
            dist.broadcast_object_list(made, src=rank)
    of_owner: T = made[0]
    return of_owner


def shared_out(names: Iterable[str]) -> list[str]:
    """Of the names that this process has those that are its to work on: each is one process's of those that have it, in turn.
    All must call it."""
    having: dict[str, list[int]] = {}
    for number, of_one in enumerate(gathered(list(names))):
        for name in of_one:
            having.setdefault(name, []).append(number)
    return [name for place, (name, ranks) in enumerate(having.items()) if ranks[place % len(ranks)] == rank()]


def balanced(sizes: Sequence[int]) -> list[int]:
    """The rank of the process that takes each item: the largest first, each to whoever has least."""
    taken, ranks = [0] * size(), [0] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        ranks[place] = taken.index(min(taken))
        taken[ranks[place]] += sizes[place]
    return ranks


def mapped(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """The function's value of every item, in every process; each computes its share. All must call it."""
    return whole([function(item) for item in share(items)])


def whole(mine: Sequence[R]) -> list[R]:
    """The values of all items, of those of each process's share. All must call it."""
    parts = gathered(mine)
    return [parts[number % len(parts)][number // len(parts)] for number in range(sum(map(len, parts)))]


def add_up(tensor: Tensor) -> Tensor:
    """Add to the tensor, in place, the same tensor of every other process. All must call it; all get the same bits."""
    if size() > 1:
        with _reaching():
            dist.all_reduce(tensor)
    return tensor


def from_rank(tensor: Tensor, source: int) -> None:
    """Make the tensor, in place, that of the process of this rank. All must call it, with a contiguous tensor on the CPU."""
    if size() > 1:
        with _reaching():
            dist.broadcast(tensor, src=source)


def add_up_at(rank: int, tensor: Tensor) -> None:
    """Add to the tensor of the process of this rank, in place, that of every other; theirs hold anything afterwards. All must call it."""
    if size() > 1:
        with _reaching():
            dist.reduce(tensor, dst=rank)


def meet() -> None:
    """Wait until all processes have come here."""
    gathered(None)


def check_agreement(what: str, value: Any) -> None:
    """Refuse to go on where processes do not see the same.

    Arguments:
        value: plain data.

    Raises:
        ProcessError: some differ from the first; names them.
    """
    values = gathered(value)
    others = [name for name, other in zip(names(), values, strict=False) if other != values[0]]
    if others:
        raise ProcessError(
            f"{what}: {', '.join(others)} sees another than process 0. All must run the same adarank on the same files, in a folder that all machines share."
        )


@contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise _Unreachable(str(error)) from None
