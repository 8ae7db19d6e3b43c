"""What `adarank demo` prints, how long it takes and how much memory: the record of the kind "demo" that the README shows.

    python benchmarks/demo.py FOLDER [--quick] [--threads 2]

FOLDER is new; the demo's model is written there and taken away again.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from records import FOLDER, Records

from adarank.io.record import machine, versions

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    out = options.folder / "adarank-demo"
    flags = ["--threads", str(options.threads), *(["--quick"] if options.quick else [])]
    command = [sys.executable, "-m", "adarank.cli.main", "demo", out.name, *flags]
    options.folder.mkdir(parents=True)
    started = time.perf_counter()
    done = subprocess.run(
        command, cwd=options.folder, env={**os.environ, "COLUMNS": "120"}, check=True, capture_output=True, text=True
    )
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    shutil.rmtree(options.folder)
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    # where the package lies is this machine's business
    shown = [line for line in lines if "site-packages" not in line and str(ROOT) not in line]
    # each step's line is left out
    progress = [line.rstrip() for line in done.stderr.splitlines() if str(ROOT) not in line and line[:5] != "step "]
    Records(FOLDER / "demo-8.jsonl").write(
        {
            "kind": "demo",
            "name": "quick" if options.quick else "whole",
            "command": " ".join(["adarank", "demo", *flags]),
            "shown": shown,
            "progress": progress,
            "seconds": round(seconds, 1),
            "peak_resident_bytes": peak,
            "versions": versions(),
            "machine": machine(),
        },
    )
    print("\n".join([*shown, f"{seconds:.0f} s, peak {peak / 1e6:.0f} MB"]))


if __name__ == "__main__":
    main()
