"""Memory of this process."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress


def give_back() -> None:
    """Give what was freed back to the system, where the C library can be told to: it keeps blocks of some megabytes for later.

    For the ends of stages that held much: a budget counts what the process holds, used or not.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)
