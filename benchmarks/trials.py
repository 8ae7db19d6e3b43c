"""What concurrent_merges.py and kills.py share: tiny models, commands, runs in forked processes, and what they left.

Starting Python and PyTorch takes longer than such a merge, so a process that has imported all forks for each run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch

import text_zoo
from adarank.cli import show  # noqa: F401
from adarank.cli.main import main
from adarank.outputs import bundle as serving  # noqa: F401 (imported before forks, not after each)
from adarank.workflow import demo, search  # noqa: F401 (imported before forks, not after each)

LEARN = {"batch_size": 4, "check_every": 1}
RECIPES: dict[str, dict[str, Any]] = {
    "cart": {"parameters": {"rank": 0.25}},
    "task_arithmetic": {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.3}},
    "ties": {"merge_method": "ties_merging", "parameters": {}},
    "emr": {"merge_method": "emr"},
    "regmean": {"merge_method": "regmean", "parameters": {"examples": 8}},
    "adarank": {
        "merge_method": "adarank",
        "parameters": {"rank": 0.25, "lambda": 1.0},
        "adapt": {"steps": 4, "check_every": 2, **LEARN},
    },
    "surgery": {
        "merge_method": "surgery",
        "parameters": {"rank": 2},
        "adapt": {"steps": 3, "check_every": 1, **LEARN},
    },
    "multitask": {"merge_method": "multitask", "parameters": {"steps": 3, "batch_size": 4, "save_every": 1}},
}
_CHANGING = (
    "begun",
    "seconds",
    "seconds_in_steps",
    "seconds_judging",
    "peak_resident_bytes",
    "resumed_from",
    "record_sha256",
)
State = Mapping[str, str]
"""File name -> hash of its content."""


def make_zoo(folder: Path) -> Path:
    """Two tiny text classifiers, their base, their data, and a recipe for each of `RECIPES`."""
    torch.set_num_threads(1)
    text_zoo.make_zoo(folder)
    for name, changes in RECIPES.items():
        text_zoo.recipe(folder, f"{name}.yaml", **changes)
    return folder


@dataclass
class Child:
    """A forked process, and the file that its output goes to."""

    pid: int
    output: Path

    def wait(self) -> int:
        """Its exit code; -N if signal N ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> int:
        """End it at once, if it has not ended; its exit code."""
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def said(self) -> str:
        """All that it has printed."""
        return self.output.read_text(encoding="utf-8", errors="replace")


def fork(arguments: Sequence[str], output: Path, before: Callable[[], None] | None = None) -> Child:
    """Run a command of the command line in a process of its own; `before` is called there first."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Child(pid, output)
    code = 70
    try:
        sys.stdout = sys.stderr = output.open("w", encoding="utf-8")
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        if before:
            before()
        code = main(list(arguments))
        sys.stdout.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stdout.flush()
    finally:
        os._exit(code)
    raise AssertionError("never reached")


def run(arguments: Sequence[str], output: Path) -> float:
    """Run a command to its end; returns the seconds that it took. Stops the benchmark if it fails."""
    started = time.perf_counter()
    child = fork(arguments, output)
    code = child.wait()
    if code:
        raise SystemExit(f"{' '.join(arguments)} ended with {code}:\n{child.said()}")
    return time.perf_counter() - started


def dying_at(number: int, folder: Path) -> Callable[[], None]:
    """Called in a child: it kills itself at the file operation of this number on what lies under `folder`."""

    def watch() -> None:
        seen = 0
        place = str(folder)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in _OPERATIONS and any(place in str(argument) for argument in arguments):
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return watch


def counting(folder: Path, report: Path) -> Callable[[], None]:
    """Called in a child: it counts its file operations under `folder` into the file `report`."""

    def watch() -> None:
        place = str(folder)
        handle = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in _OPERATIONS and any(place in str(argument) for argument in arguments):
                os.write(handle, b".")

        sys.addaudithook(hook)

    return watch


_OPERATIONS = frozenset(
    {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.listdir", "os.scandir", "shutil.rmtree"}
)


def state(path: Path) -> State | None:
    """What is at a path, file by file; None if nothing is. Of records what differs from run to run is left out."""
    if path.is_file():
        return {"": _hash(path)}
    if not path.exists():
        return None
    return {file.relative_to(path).as_posix(): _hash(file) for file in sorted(path.rglob("*")) if file.is_file()}


def _hash(file: Path) -> str:
    content = file.read_bytes()
    if file.suffix == ".json":
        try:
            content = json.dumps(_lasting(json.loads(content)), sort_keys=True).encode()
        except ValueError:
            content = b"not JSON" + content
    return hashlib.sha256(content).hexdigest()[:16]


def _lasting(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _lasting(value) for key, value in content.items() if key not in _CHANGING}
    return [_lasting(value) for value in content] if isinstance(content, list) else content


def fresh(folder: Path) -> Path:
    """The folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
