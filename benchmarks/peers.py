"""What the comparisons with other merging tools share: environments of their own, calls into them, differences, records."""

from __future__ import annotations

import json
import subprocess
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from adarank.io.record import machine, versions

State = Mapping[str, Tensor]
_VERSIONS = """
import importlib.metadata as m, json, sys
print(json.dumps({d.metadata["Name"]: d.version for d in m.distributions()}))
"""


def environment(folder: Path, requirements: Sequence[str]) -> Path:
    """The Python of a virtual environment with these packages in it, made and filled as far as it is not yet.

    Arguments:
        requirements: each `name==version`. They are installed one after the other, each together with those before:
            torch first, so that nothing else chooses another one.
    """
    python = folder.absolute() / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    there = installed(python)
    for number, requirement in enumerate(requirements):
        name, _, version = requirement.partition("==")
        if there.get(name, "").split("+")[0] != version:
            subprocess.run([python, "-m", "pip", "install", "-q", *requirements[: number + 1]], check=True)
    return python


def installed(python: Path) -> dict[str, str]:
    """Package -> version in the environment of `python`."""
    found: dict[str, str] = last_line([str(python), "-c", _VERSIONS])
    return found


def last_line(command: Sequence[str], folder: Path | None = None) -> Any:
    """Run a command that prints JSON in its last line; that. Its progress stays on stderr."""
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def relative(ours: Tensor, theirs: Tensor) -> float:
    """max |a - b| / max(|a|, |b|): 0 where both are zero, at most 2."""
    a, b = ours.double(), theirs.double()
    return float((a - b).abs().max() / max(a.abs().max(), b.abs().max()).clamp(min=1e-30)) if a.numel() else 0.0


def largest(ours: State, theirs: State) -> tuple[float, str]:
    """The largest `relative` difference of any tensor, and its name ("" if all are equal); NaN counts as larger."""
    worst, where = 0.0, ""
    for name in theirs:
        found = relative(ours[name], theirs[name])
        if not found <= worst:
            worst, where = found, name
    return worst, where


def head(
    peer: str, what: str, command: str, settings: Mapping[str, Any], seed: int, python: Path, packages: Sequence[str]
) -> dict[str, Any]:
    """The beginning of a record: what ran on what; `packages` are those of the peer's environment that count."""
    there = installed(python)
    return {
        "kind": "peer",
        "name": peer,
        "what": what,
        "command": command,
        "settings": settings,
        "seed": seed,
        "versions": versions(),
        "peer_environment": {name: there[name] for name in packages},
        "machine": machine(),
    }
