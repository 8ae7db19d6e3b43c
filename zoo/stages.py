"""What builds share: files that appear whole or not at all, so that a build that was cut off goes on; seeds."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def publish(folder: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write into a temporary folder, then give it its final name."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    fill(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def write_json(path: Path, value: object) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_record(path: Path, value: object) -> None:
    """Write a JSON file so that it appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    write_json(temporary, value)
    os.replace(temporary, path)


def read_record(path: Path) -> dict[str, Any]:
    """A JSON file's content, empty where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def begin_with(settings: dict[str, Any], path: Path, out: Path) -> None:
    """Write down what a build is made from; refuse to go on with a folder that something else began."""
    before = read_record(path)
    if before and before != settings:
        raise SystemExit(f"{out} was begun with other settings or data: choose another --out")
    write_record(path, settings)


def seed_for(seed: int, *names: str) -> int:
    """A seed of its own for each named use, so that stages can be redone one by one."""
    return zlib.crc32("/".join([str(seed), *names]).encode())
