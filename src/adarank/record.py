"""Records: what ran, on what, and what came out. Every published number has one."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import sys
import time
from datetime import datetime, timezone
from typing import Any

import torch

_PACKAGES = ("adarank", "torch", "transformers", "safetensors", "tokenizers", "numpy", "scikit-learn")


def versions() -> dict[str, str]:
    """Python and the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, threads and accelerator."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
    }
    if device.startswith("cuda"):
        found["accelerator"] = torch.cuda.get_device_name(device)
        found["tf32"] = torch.backends.cuda.matmul.allow_tf32
    return found


class Clock:
    """Seconds since it was made, and the process's peak memory."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.begun = datetime.now(timezone.utc).isoformat(timespec="seconds")

    def spent(self) -> dict[str, Any]:
        """Seconds, and the peak resident memory in bytes, mapped input files included."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {
            "begun": self.begun,
            "seconds": round(time.perf_counter() - self._started, 3),
            "peak_resident_bytes": peak,
        }
