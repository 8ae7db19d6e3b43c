"""The exact k-th largest magnitude, of one tensor or of a whole model that is never in memory at once.

The bits of non-negative float32 numbers, read as integers, are ordered as the numbers are. So the k-th largest of many
is found in two steps: count the numbers by their upper 16 bits, then those of one such bucket by their lower 16 bits.
A whole model is read twice for that, and what is kept between tensors are 65,536 counts per task.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from adarank.alignment.task_vectors import AlignedCheckpoints, OriginKind
from adarank.io import processes

_BUCKETS = 2**16
_BLOCK = 2**20  # numbers counted at a time: many more than there are buckets, and few enough to stay in a cache


def kth_largest(flat: Tensor, rank: int) -> float:
    """The `rank`-th largest (1 is the largest) of non-negative float32 numbers.

    Of numbers in memory by NumPy's selection, a third of what counting costs.
    """
    if flat.device.type == "cpu":
        return float(np.partition(flat.numpy(), -rank)[-rank])
    upper, rank = _descend(_count(flat), rank)
    lower, _ = _descend(_count(flat, upper), rank)
    return _number(upper, lower)


def global_thresholds(
    network: AlignedCheckpoints,
    origin: OriginKind,
    density: float,
    device: torch.device | str,
    change: Callable[[str, str, Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """task -> the ⌊density·d⌋-th largest of the d magnitudes |τ| of its whole model, exactly.

    Arguments:
        change: (task, tensor name, task vector) -> what is ranked in its place, if not the task vector itself.
    """
    names = network.merged()
    total = sum(network.tensors[name].numel for name in names)
    rank = top_count(density, total)

    def counted(upper: dict[str, int]) -> dict[str, Tensor]:
        counts = {task: torch.zeros(_BUCKETS, dtype=torch.int64, device=device) for task in network.tasks}
        for name in processes.share(names):
            in_blocks = change is None and network.in_place()
            for part in network.blocks(name, origin, _BLOCK) if in_blocks else [network]:
                deltas = part.deltas(name, part.origin(name, origin, device), origin)
                for task in network.tasks:
                    delta = deltas[task] if change is None else change(task, name, deltas[task])
                    counts[task] += _count(delta.abs().float().flatten(), upper.get(task))
        return {task: processes.add_up(of_task) for task, of_task in counts.items()}

    buckets = {task: _descend(counts, rank) for task, counts in counted({}).items()}
    upper = {task: bucket for task, (bucket, _) in buckets.items()}
    lower = {task: _descend(counts, buckets[task][1])[0] for task, counts in counted(upper).items()}
    return {task: _number(upper[task], lower[task]) for task in network.tasks}


def trimmed(delta: Tensor, threshold: float) -> Tensor:
    """A task vector with the entries below a magnitude set to 0: a new tensor."""
    return delta * (delta.abs().float() >= threshold)


def _count(flat: Tensor, upper: int | None = None) -> Tensor:
    """How many numbers have each value of the upper 16 bits or, of those with `upper` there, of the lower 16."""
    counts = torch.zeros(_BUCKETS, dtype=torch.int64, device=flat.device)
    for bits in flat.view(torch.int32).split(_BLOCK):
        high = bits >> 16
        counts += torch.bincount(high if upper is None else bits[high == upper] & 0xFFFF, minlength=_BUCKETS)
    return counts


def _descend(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bucket that holds the `rank`-th largest, and its rank there."""
    from_top = counts.flip(0).cumsum(0)
    position = int((from_top < rank).sum())
    above = int(from_top[position - 1]) if position else 0
    return _BUCKETS - 1 - position, rank - above


def _number(upper: int, lower: int) -> float:
    return torch.tensor((upper << 16) | lower, dtype=torch.int32).view(torch.float32).item()


def top_count(share: float, rank: int) -> int:
    """How many of `rank` components a share keeps: ⌊share·rank⌋, at least 1 (CART's k)."""
    return min(rank, max(1, math.floor(share * rank + 1e-9)))
