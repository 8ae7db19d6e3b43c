"""Threads follow what a process may use of the cores: a container's share, where it has one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adarank.cli.threads import quota_of

PROGRAM = """
import os, pathlib, sys
from adarank.cli import threads
threads.bound_cores = lambda: 8
threads.keep_to_quota(pathlib.Path(sys.argv[1]))
print(os.environ.get("OMP_NUM_THREADS"))
"""


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu.max": "no number"}, None),
        ({}, None),
    ],
)
def test_a_control_groups_share_is_read_in_both_versions(
    files: dict[str, str], cores: float | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quota_of(tmp_path) == cores


@pytest.mark.parametrize(
    ("share", "given", "threads"),
    [
        ("150000 100000", None, "2"),
        ("max 100000", None, "None"),
        ("900000 100000", None, "None"),
        ("100000 100000", "5", "5"),
    ],
)
def test_threads_keep_to_the_share_unless_the_user_says(
    share: str, given: str | None, threads: str, tmp_path: Path
) -> None:
    (tmp_path / "cpu.max").write_text(share)
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)} | ({"OMP_NUM_THREADS": given} if given else {})
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == threads
