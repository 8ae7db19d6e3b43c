"""Files in which an unfinished run, and what it can find again, are kept."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adarank.errors import OutputError, RecipeError
from adarank.io.archive import load_signed, signed
from adarank.io.pickled import DAMAGED

_STATE = {"fingerprint", "losses", "seconds", "resumed_from", "judged", "judging_seconds", "starts"}
_BY_STEP = _STATE | {"learned", "optimiser", "rng", "kept", "start", "best", "nearest", "memory"}
_BY_BLOCK = _STATE | {"blocks"}


def read_state(path: Path, fingerprint: str) -> dict[str, Any]:
    """A saved state.

    Raises:
        RecipeError: it is damaged, no state, or belongs to another run.
    """
    try:
        content: dict[str, Any] = load_signed(path)
    except (pickle.UnpicklingError, *DAMAGED) as error:
        raise RecipeError(f"{path}: the saved state is damaged ({error}). Delete it to start anew.") from None
    if not isinstance(content, dict) or not any(content.keys() >= keys for keys in (_BY_STEP, _BY_BLOCK)):
        raise RecipeError(f"{path}: not a saved state of this version. Delete it to start anew.")
    if content["fingerprint"] != fingerprint:
        raise RecipeError(
            f"{path}: the saved state belongs to another run (inputs or settings differ). Delete it to start anew, or give another output path."
        )
    return content


def read_kept(path: Path, mapped: bool = False) -> Any:
    """What `write_state` saved to be found again; None if there is nothing or it is damaged: then it is computed anew.

    Arguments:
        mapped: leave tensors in the file until they are read.
    """
    try:
        return load_signed(path, mapped)
    except (pickle.UnpicklingError, *DAMAGED):
        return None


def write_state(path: Path, content: Mapping[str, Any], what: str) -> None:
    """Save what a later run may take up, whole or not at all.

    Raises:
        OutputError: the disk is full or read-only.
    """
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(signed(content), partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # PyTorch's writer raises RuntimeError on a full disk
        raise OutputError(
            f"{path}: {what} cannot be saved ({error}). Free space or give another output path."
        ) from None
