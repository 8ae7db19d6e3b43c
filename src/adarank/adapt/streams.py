"""What blocks gave on every batch, in files: one for each stream, block, task and batch."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adarank.errors import RecipeError
from adarank.io.state import read_kept, write_state
from adarank.models.chain import Given, on_cpu, put


@dataclass(frozen=True)
class Streams:
    """The streams of one run.

    Arguments:
        folder: of this run alone.
        device: where what is read is put.
    """

    folder: Path
    device: torch.device

    def keep(self, stream: str, place: int, batch: str, given: Given) -> None:
        """Keep what the block at a place gave on a batch."""
        write_state(self._path(stream, place, batch), {"given": on_cpu(given)}, "what a block gave")

    def read(self, stream: str, places: Sequence[int], batch: str) -> dict[int, Given]:
        """What the blocks at some places gave on a batch."""
        given = {}
        for place in places:
            path = self._path(stream, place, batch)
            kept = read_kept(path)
            if kept is None:
                raise RecipeError(f"{path}: missing or damaged. Delete {self.folder.parent} to start anew.")
            given[place] = put(kept["given"], self.device)
        return given

    def forget(self, stream: str, tasks: Iterable[int], place: int | None = None) -> None:
        """What the block at a place gave on the batches of some tasks, or all blocks, is not needed any more. Other tasks'
        files, which may be another process's, are left alone."""
        places = "*" if place is None else place
        for task in tasks:
            for path in (self.folder / stream).glob(f"{places}/{task}-*"):
                path.unlink(missing_ok=True)

    def _path(self, stream: str, place: int, batch: str) -> Path:
        return self.folder / stream / str(place) / f"{batch}.pt"


def name_of(task: int, batch: Any) -> str:
    """What a batch of a task is called: batches of other contents have other names.

    Arguments:
        task: its number.
    """
    digest = hashlib.blake2b(digest_size=16)
    _add(digest, batch)
    return f"{task}-{digest.hexdigest()}"


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    elif isinstance(value, (Mapping, tuple, list)):
        parts = value.items() if isinstance(value, Mapping) else enumerate(value)
        digest.update(f"{type(value).__name__}{len(value)}".encode())
        for key, part in parts:
            digest.update(repr(key).encode())
            _add(digest, part)
    else:
        digest.update(pickle.dumps(value))
