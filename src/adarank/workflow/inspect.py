"""What is inside: a checkpoint's tensors, its task vector's norms and ranks, or an output's λ and masks per layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from adarank.alignment.adapters import with_adapter
from adarank.alignment.align import align
from adarank.errors import CheckpointError
from adarank.io.adapter import Adapter, is_adapter
from adarank.io.checkpoint import Checkpoint, check_finite
from adarank.io.files import read_json
from adarank.io.progress import advance, stage
from adarank.io.writer import RECORD
from adarank.spectral.mask_file import FILE, MaskFile
from adarank.spectral.svd import as_matrix, decompose, effective_rank


@dataclass(frozen=True)
class TensorRow:
    """One tensor. The last three are None without a base, and ranks for what is no matrix.

    Attributes:
        norm: Frobenius norm of the tensor.
        delta: norm of its task vector ÷ norm of the base's tensor.
        rank, rank95: components, and those that hold 95% of the task vector's energy.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    norm: float
    delta: float | None = None
    rank: int | None = None
    rank95: int | None = None


@dataclass(frozen=True)
class LayerRow:
    """One tensor of an adapted output: λ and, for a matrix, kept components per task, of a soft mask those at ½ or above."""

    name: str
    lam: tuple[float, ...]
    kept: tuple[int, ...]
    sizes: tuple[int, ...]
    soft: bool = False


def inspect_checkpoint(path: Path, base: Path | None = None) -> list[TensorRow]:
    """Every tensor of a checkpoint, one in memory at a time; with a base, its task vector too. Of an adapter only with its base."""
    start = Checkpoint(base) if base is not None else None
    checkpoint = with_adapter(start, Adapter(path)) if start is not None and is_adapter(path) else Checkpoint(path)
    if start is None:
        with stage("Reading the tensors", len(checkpoint.tensors)):
            return [_plain(checkpoint, name) for name in checkpoint.tensors]
    network = align(start, {"checkpoint": checkpoint}, task_heads=True)
    member = network.experts["checkpoint"]
    rows = []
    with stage("Decomposing the task vector", len(network.tensors)):
        for name in network.tensors:
            if (
                name in member.names
                and network.tensors[name].dtype.is_floating_point
                and name not in network.heads["checkpoint"]
            ):
                origin = network.origin(name, "pretrained")
                rows.append(_against(name, origin, member.read(name), member.info(name).dtype))
            advance()
    heads = [_plain(checkpoint, member.names[name]) for name in network.heads["checkpoint"]]
    return rows + heads


def inspect_output(path: Path) -> tuple[tuple[str, ...], list[LayerRow]]:
    """Tasks, and λ and masks of every tensor of an adapted output.

    Raises:
        CheckpointError: the output has no masks: its method was data-free.
    """
    masks = MaskFile.load(path / FILE)
    rows = []
    for name, lam in masks.lam.items():
        mask = masks.masks.get(name)
        kept = () if mask is None else tuple(masks.kept(name))
        soft = mask is not None and mask.is_floating_point()
        rows.append(LayerRow(name, tuple(lam.tolist()), kept, masks.sizes.get(name, ()), soft))
    return masks.tasks, rows


def method_of(path: Path) -> str:
    """The method that made an output, by its record."""
    method = (read_json(path / RECORD).get("recipe") or {}).get("merge_method")
    if not isinstance(method, str):
        raise CheckpointError(f"{path / RECORD}: a damaged record, without its recipe's merge_method. Copy it again.")
    return method


def is_adapted(path: Path) -> bool:
    """True for an output folder with masks."""
    return (path / RECORD).exists() and (path / FILE).exists()


def _plain(checkpoint: Checkpoint, name: str) -> TensorRow:
    info = checkpoint.tensors[name]
    tensor = check_finite(checkpoint.read(name), name, info.file)
    advance()
    return TensorRow(name, info.shape, _dtype(info.dtype), _norm(tensor))


def _against(name: str, origin: torch.Tensor, tensor: torch.Tensor, dtype: torch.dtype) -> TensorRow:
    delta = tensor - origin
    norm, start = _norm(tensor), _norm(origin)
    share = _norm(delta) / start if start > 0 else None  # undefined for a zero base
    matrix = as_matrix(delta)
    if min(matrix.shape) < 2 or delta.dim() < 2:
        return TensorRow(name, tuple(tensor.shape), _dtype(dtype), norm, share)
    if (
        max(matrix.shape) > 16 * min(matrix.shape) and min(matrix.shape) > 512
    ):  # a vocabulary: its SVD would take minutes
        return TensorRow(name, tuple(tensor.shape), _dtype(dtype), norm, share, min(matrix.shape))
    s = decompose(matrix, name).s
    return TensorRow(name, tuple(tensor.shape), _dtype(dtype), norm, share, s.numel(), effective_rank(s))


def _norm(tensor: torch.Tensor) -> float:
    return float(tensor.double().norm())  # in float32 a norm is 0.1% off at 10⁷ entries


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
