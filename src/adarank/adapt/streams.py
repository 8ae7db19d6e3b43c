"""What blocks gave on every batch, in files: one for each stream, block and batch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

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

    def forget(self, place: int) -> None:
        """What the block at a place gave is not needed any more."""
        shutil.rmtree(self.folder / str(place), ignore_errors=True)

    def _path(self, stream: str, place: int, batch: str) -> Path:
        return self.folder / str(place) / f"{stream}-{batch}.pt"
