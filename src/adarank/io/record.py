"""Records: what ran, on what, and what came out. Every published number has one."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("adarank", "torch", "transformers", "safetensors", "tokenizers", "numpy", "scikit-learn")


def versions() -> dict[str, str]:
    """Python and the packages that numbers depend on."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions | {"torch": str(torch.__version__)}  # which build, too: its package's version may leave that out


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, threads and accelerator."""
    machine: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
    }
    if device.startswith("cuda"):
        machine["accelerator"] = torch.cuda.get_device_name(device)
        machine["tf32"] = torch.backends.cuda.matmul.allow_tf32
    return machine


class Clock:
    """Seconds since it was made, and the process's peak memory since then (on Linux; elsewhere, since it began)."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.begun = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._linux = False
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now (proc(5))
            self._linux = True

    def spent(self) -> dict[str, Any]:
        """Seconds, and the peak resident memory in bytes, mapped input files included."""
        return {
            "begun": self.begun,
            "seconds": round(time.perf_counter() - self._started, 3),
            "peak_resident_bytes": self._peak(),
        }

    def _peak(self) -> int:
        if self._linux:
            lines = Path("/proc/self/status").read_text().splitlines()
            return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


Note = Callable[[str], None]
"""Told, in a sentence, what stage begins."""
