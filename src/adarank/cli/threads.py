"""How PyTorch's threads wait for each other. Nothing here may import PyTorch: its OpenMP reads the environment as it is loaded."""

from __future__ import annotations

import os
import sys


def wait_passively() -> None:
    """Let threads sleep while they wait instead of spinning, unless `OMP_WAIT_POLICY` is set: then it is the user's choice.

    Threads that spin keep a core busy that another process may want, and the step that waits for that process' share
    takes many times as long; on cores of its own, sleeping costs nothing that can be measured. Sets `OMP_WAIT_POLICY` for any
    OpenMP, and `KMP_BLOCKTIME` (milliseconds of spinning) for Intel's and LLVM's, which spins a while under either policy.
    Once PyTorch is loaded this would have no effect, so nothing is set.

    Example:
        >>> from adarank.cli.threads import wait_passively
        >>> wait_passively()
        >>> import torch
    """
    if "torch" in sys.modules or "OMP_WAIT_POLICY" in os.environ:
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("KMP_BLOCKTIME", "0")
