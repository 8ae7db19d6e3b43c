"""Several processes of adarank, as a launcher starts them, and what may happen to one of them.

Starting Python and PyTorch takes longer than such a merge, so one process imports all, and forks for every run:

    with Processes() as processes:
        processes.run(2, ["merge", "cart.yaml", "out"], folder)
        processes.run(2, ["merge", "cart.yaml", "out"], folder, dies=(1, 3))     process 1 is killed where it writes its third tensor
        processes.run(2, ["merge", "cart.yaml", "out"], folder, fails=1)         process 1 meets an error where it writes
        processes.run(2, ["merge", "adarank.yaml", "out"], folder, steps=(1, 3, "dies"))     where it composes weights the third time
        processes.run(2, [], folder, many=[("cart.yaml", "out")])                merges by processes that stay joined
        processes.run(2, [], folder, calls=("file.py", "function"))              a function of a file; each prints what it returns as JSON
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_SECONDS = 100  # for a run that hangs: every process of it is ended


class Ended(NamedTuple):
    """A process that has ended: its exit code (-N for signal N), and all that it printed."""

    code: int
    said: str


class Processes:
    """Runs commands in several processes of one thread each."""

    def __enter__(self) -> Processes:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__]
        self.server = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.server.communicate()

    def run(
        self,
        count: int,
        arguments: Sequence[str],
        folder: Path,
        dies: tuple[int, int] | None = None,
        fails: int | None = None,
        many: Sequence[tuple[str, str]] = (),
        steps: tuple[int, int, str] | None = None,
        calls: tuple[str, str] | None = None,
    ) -> list[Ended]:
        """Run a command in `count` processes in `folder`; by rank what came of them."""
        assert self.server.stdin
        assert self.server.stdout
        changes = {"dies": dies, "fails": fails, "many": many, "steps": steps, "calls": calls}
        order = {"count": count, "arguments": list(arguments), "folder": str(folder), "changes": changes}
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        return [Ended(*each) for each in json.loads(self.server.stdout.readline())]


def free_port() -> str:
    """The number of a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _serve() -> None:
    import torch
    import transformers

    import adarank.workflow.merge  # noqa: F401 (before the forks, not after each)
    from adarank.cli import show  # noqa: F401 (before the forks, not after each)

    torch.set_num_threads(1)
    _ = transformers.BertForSequenceClassification, transformers.BertTokenizerFast  # imported as they are named
    for line in sys.stdin:
        print(json.dumps(_forked(**json.loads(line))), flush=True)


def _forked(count: int, arguments: list[str], folder: str, changes: dict[str, Any]) -> list[tuple[int, str]]:
    with tempfile.TemporaryDirectory() as place:
        started = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        files = [Path(place) / str(rank) for rank in range(count)]
        children = []
        for rank, file in enumerate(files):
            child = os.fork()
            if child == 0:
                os.environ.update({**started, "RANK": str(rank)})
                os.chdir(folder)
                _end_here(file, changes, arguments)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        return [(code, file.read_text(encoding="utf-8")) for code, file in zip(codes, files, strict=True)]


def _end_here(file: Path, changes: dict[str, Any], arguments: list[str]) -> None:
    """A child's whole life."""
    signal.alarm(_SECONDS)
    code = 70
    handle = file.open("w", encoding="utf-8")
    os.dup2(handle.fileno(), 1)
    os.dup2(handle.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    try:
        code = _run_here(changes, arguments)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _at_write(number: int, action: Callable[[], None]) -> None:
    """Do something where the tensor of this number is written."""
    from adarank.io.tensor_file import TensorFile

    _at_call(TensorFile, number, action)


def _at_step(number: int, action: Callable[[], None]) -> None:
    """Do something where merged weights are composed for the time of this number."""
    from adarank.adapt.live_weights import LiveWeights

    _at_call(LiveWeights, number, action)


def _at_call(kind: Any, number: int, action: Callable[[], None]) -> None:
    write, seen = kind.write, []

    def changed(self: Any, *given: Any) -> None:
        seen.append(given)
        if len(seen) == number:
            action()
        write(self, *given)

    kind.write = changed


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _fail() -> None:
    from adarank.errors import CheckpointError

    raise CheckpointError("a disk that cannot be read")


def _run_here(changes: dict[str, Any], arguments: list[str]) -> int:
    rank = int(os.environ["RANK"])
    if changes["dies"] and changes["dies"][0] == rank:
        _at_write(changes["dies"][1], _die)
    if changes["steps"] and changes["steps"][0] == rank:
        _at_step(changes["steps"][1], {"dies": _die, "fails": _fail, "is told to stop": _stop}[changes["steps"][2]])
    if changes["fails"] == rank:
        _at_write(1, _fail)
    if changes["many"] or changes["calls"]:
        from adarank import merge_recipe
        from adarank.io.processes import joined

        with joined(rank, int(os.environ["WORLD_SIZE"])):
            for recipe, out in changes["many"]:
                merge_recipe(recipe, out)
            if changes["calls"]:
                file, function = changes["calls"]
                print(json.dumps(runpy.run_path(file)[function]()))
        return 0
    from adarank.cli.main import main

    return main(arguments)


if __name__ == "__main__":
    _serve()
