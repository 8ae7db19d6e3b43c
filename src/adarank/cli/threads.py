"""How PyTorch's threads wait for each other. Nothing here may import PyTorch: its OpenMP reads the environment as it is loaded."""

from __future__ import annotations

import math
import os
import sys
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


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


def keep_to_quota(root: Path = CGROUPS) -> None:
    """As many threads as this process may use cores, unless `OMP_NUM_THREADS` is set: then it is the user's choice.

    OpenMP counts the cores that the process is bound to, and knows nothing of a container's share of them: threads beyond that share wait
    for each other while the system holds one of them back. What other processes take at the moment is not looked at, as the last
    bits of a result depend on the number of threads, and the same command gives the same bits. Once PyTorch is loaded this would have no effect.

    Arguments:
        root: as for `quota_of`.
    """
    if "torch" in sys.modules or "OMP_NUM_THREADS" in os.environ:
        return
    quota, bound = quota_of(root), bound_cores()
    if quota is not None and math.ceil(quota) < bound:
        os.environ["OMP_NUM_THREADS"] = str(max(1, math.ceil(quota)))


def bound_cores() -> int:
    """How many cores the system may run this process on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quota_of(root: Path = CGROUPS) -> float | None:
    """How many cores' time the process's control group has; None where it has no limit.

    Arguments:
        root: where control groups are mounted, of version 2 (cpu.max) or 1 (cpu.cfs_quota_us).
    """
    with suppress(OSError, ValueError):
        share, period = (root / "cpu.max").read_text().split()
        return None if share == "max" else int(share) / int(period)
    with suppress(OSError, ValueError, ZeroDivisionError):
        share, period = ((root / "cpu" / f"cpu.cfs_{part}_us").read_text() for part in ("quota", "period"))
        return int(share) / int(period) if int(share) > 0 else None
    return None
