"""How a command ends: what it says of what went wrong, and its exit code."""

from __future__ import annotations

import argparse
import os
import sys
import traceback

from adarank.cli.launch import speaks, stopping_together
from adarank.errors import AdaRankError, Interrupted, RecipeError

BUG = 70  # sysexits.h: an internal software error
INTERRUPTED = 130  # as shells have it: 128 and the number of SIGINT
_MOST_THREADS = 1024


def ended(options: argparse.Namespace) -> int:
    """Run a command; its exit code, once it has said what went wrong."""
    try:
        with stopping_together(options):
            _set_threads(options.threads)
            return int(options.run(options) or 0)
    except Interrupted as stopped:
        say(str(stopped))
        return INTERRUPTED
    except AdaRankError as error:
        say(f"adarank: {error}")
        return 1
    except KeyboardInterrupt:
        say(f"adarank: interrupted. {options.left(options)}")
        return INTERRUPTED
    except BrokenPipeError:  # whoever read what is printed has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, MemoryError) as error:  # of the system: no file at fault that a reader knew of
        say(f"adarank: {_of_the_system(error)}")
        return 1
    except Exception as error:  # the last resort: nobody planned for it, so it is ours to mend
        if speaks():
            traceback.print_exc()
        say(
            f"adarank: a bug in adarank ({type(error).__name__}), not in what you gave it. No output was left behind. "
            "Please report the lines above, the command and the versions of adarank and torch."
        )
        return BUG


def say(message: str) -> None:
    """A message on stderr, as wide as the terminal; of several processes one says it."""
    from adarank.cli.console import tell

    if speaks():
        tell(message)


def _of_the_system(error: OSError | MemoryError) -> str:
    if isinstance(error, MemoryError):
        return "there is not enough memory. Close other programs, or merge smaller models."
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}the system refuses ({error.strerror or error}). Check the path, its permissions and the free space."


def _set_threads(count: int | None) -> None:
    if count is None:
        return
    if not 1 <= count <= _MOST_THREADS:
        raise RecipeError(
            f"--threads {count}: a number from 1 to {_MOST_THREADS} is needed. Leave it out for PyTorch's choice."
        )
    import torch

    torch.set_num_threads(count)
