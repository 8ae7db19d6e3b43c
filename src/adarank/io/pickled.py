"""Pickled state dicts (`.bin`, `.pt`, `.pth`), read without running any code from them."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adarank.errors import CheckpointError
from adarank.io.archive import check_archive, is_zip
from adarank.io.files import check_file
from adarank.io.quantised import DEQUANTISE

LEGACY = (".bin", ".pt", ".pth")


# What PyTorch's weights-only reader raises on bytes that are no pickle of its own.
DAMAGED = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)


def shared_storage(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> the earlier name whose memory it shares entirely: the tied weights of a state dict."""
    places: dict[tuple[Any, ...], str] = {}
    aliases = {}
    for name, tensor in state.items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        first = places.setdefault(place, name)
        if first != name and tensor.numel():
            aliases[name] = first
    return aliases


def load_pickled(file: Path) -> dict[str, Tensor]:
    """A pickled state dict, read without running any code from it."""
    check_file(file)
    check_members(file, tensors=False)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip(file))
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0][:160]
        if "torchao" in str(error):
            raise CheckpointError(f"{file}: quantised (torchao). {DEQUANTISE}") from None
        raise CheckpointError(
            f"{file}: this pickle needs to run code to load, which adarank never does ({reason}). If you trust its origin, "
            f"convert it once in an isolated environment: torch.load('{file.name}', weights_only=False), then "
            "safetensors.torch.save_file(model.state_dict(), 'model.safetensors'). A CLIP of open_clip is read without its code by "
            "adarank convert."
        ) from None
    except DAMAGED as error:
        raise damaged(file, error) from None
    for wrapper in ("state_dict", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{file}: not a state dict of tensors. Save model.state_dict() with safetensors.")
    return {str(name): tensor for name, tensor in state.items()}


def check_members(file: Path, tensors: bool) -> None:
    """Raise a `CheckpointError` if an archive's members are damaged or repeated; `tensors`: read those of tensors too."""
    try:
        check_archive(file, tensors)
    except (ValueError, OSError) as error:
        raise damaged(file, error) from None


def damaged(file: Path, error: Exception) -> CheckpointError:
    """The error for a weights file that cannot be read, with what was raised."""
    return CheckpointError(
        f"{file}: damaged weights file ({str(error)[:160] or 'it ends too early'}). Copy or download it again."
    )
