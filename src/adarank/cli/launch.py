"""A command that `torchrun` or `accelerate launch` started in several processes. Nothing here imports PyTorch before it must."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from adarank.errors import RecipeError

_streams: dict[int, int] = {}  # of a silent process: what its output and its errors went to
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """What a launcher says to each process that it starts.

    Attributes:
        rank: which of `size` processes this is, from 0 on.
        local_rank: which of those on this machine.
    """

    rank: int
    size: int
    local_rank: int = 0


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """What the environment says of several processes; None where there is one."""
    rank, size, local = (environment.get(name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if not all(environment.get(name) for name in _NEEDED) or not (rank + size + local).isdecimal() or int(size) < 2:
        return None
    return Launch(int(rank), int(size), int(local))


@contextmanager
def together() -> Iterator[None]:
    """While it is open the process shares its work with those that were started with it. Only the first prints.

    Raises:
        ProcessError: they do not meet.
    """
    launch = launched()
    if launch is None:
        yield
        return
    if launch.rank > 0:
        _silence()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what its connections warn of is said in a sentence
    from adarank.io import processes

    with processes.joined(launch.rank, launch.size, launch.local_rank):
        yield


@contextmanager
def stopping_together(options: argparse.Namespace) -> Iterator[None]:
    """What goes wrong inside is known to all processes.

    Raises:
        RecipeError: a command that does not share its work.
        ProcessError: another process stopped or died.
    """
    launch = launched()
    if launch is None:
        yield
        return
    from adarank.io import processes

    with processes.stopping_together():
        if not options.shares:
            raise RecipeError(
                f"{launch.size} processes were started, and of all commands merge alone shares its work. Run this one without the launcher."
            )
        yield


def speaks() -> bool:
    """Whether this process says what went wrong: the first, or the first of those that are left."""
    launch = launched()
    if launch is None:
        return True
    from adarank.io import processes

    if processes.speaks():
        _speak()
    return processes.speaks()


def _silence() -> None:
    """From now on nothing is printed, by libraries neither."""
    sys.stdout.flush()
    sys.stderr.flush()
    _streams.update({number: os.dup(number) for number in (1, 2)})
    nothing = os.open(os.devnull, os.O_WRONLY)
    for number in _streams:
        os.dup2(nothing, number)
    os.close(nothing)


def _speak() -> None:
    """Undo `_silence`."""
    for number, stream in _streams.items():
        os.dup2(stream, number)
    _streams.clear()
