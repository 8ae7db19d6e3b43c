"""Memory of this process."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_AT_ONCE = 2**20  # bytes


def give_back_at_once() -> None:
    """From now on blocks of a megabyte or more go back to the system as they are freed, where the C library can be told to.

    It keeps those below 32 MiB otherwise, which is faster, and holds up to twice of what is used: no budget can be kept so.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library than glibc
            for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
                ctypes.CDLL(None).mallopt(option, _AT_ONCE)


def give_back() -> None:
    """Give what was freed back to the system, where the C library can be told to: it keeps blocks of some megabytes for later.

    For the ends of stages that held much: a budget counts what the process holds, used or not.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)
