"""TIES' processing of task vectors, each kept as its task's own: trimmed, then cut to what has the elected sign.

    s_t = τ_t where |τ_t| ≥ θ_t, else 0             θ_t over the whole model: `threshold.global_thresholds`
    γ = sign(Σ_t s_t)
    τ̂_t = [sign(s_t) = γ] s_t                       nothing where the s_t cancel exactly

Σ_t τ̂_t is what TIES-Merging adds; AdaMerging++ learns a λ for each τ̂_t.
Yadav et al., "TIES-Merging", arXiv:2306.01708; Yang et al., "AdaMerging", arXiv:2310.02575.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor

from adarank.alignment.task_vectors import BLOCK
from adarank.sparsify.threshold import trimmed


class Agreeing(Mapping[str, Tensor]):
    """task -> τ̂_t of one tensor, as lazy as the task vectors, which are gone through once more to elect the sign.

    Arguments:
        deltas: task -> τ_t.
        thresholds: task -> θ_t.
    """

    def __init__(self, deltas: Mapping[str, Tensor], thresholds: Mapping[str, float]) -> None:
        self._deltas, self._thresholds = deltas, thresholds

    def __getitem__(self, task: str) -> Tensor:
        vector = self._trimmed(task)
        return vector.mul_(vector.sign() == self._elected)

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)

    @cached_property
    def _elected(self) -> Tensor:
        tasks = iter(self._deltas)
        total = self._trimmed(next(tasks))
        for task in tasks:
            total += self._trimmed(task)
        return total.sign_()

    def _trimmed(self, task: str) -> Tensor:
        return trimmed(self._deltas[task], self._thresholds[task])


class Election:
    """Sums of positive and of negative entries, one task vector at a time, until the sign of the total chooses.

    Arguments:
        like: a tensor of the shape, dtype and device of what will be added.
        zero_is_positive: where the total is exactly 0, take the positive entries, as mergekit; else neither, as the
            TIES paper.
    """

    def __init__(self, like: Tensor, zero_is_positive: bool) -> None:
        self._shape = like.shape
        sums = (torch.zeros(like.numel(), dtype=like.dtype, device=like.device) for _ in "12345")
        self._total, self._up, self._down, self._up_weight, self._down_weight = sums
        self._zero_is_positive = zero_is_positive

    def add(self, vector: Tensor, weight: float = 1.0) -> None:
        """Take in `vector`, which counts as `weight` where it agrees."""
        for part, total, up, down, up_weight, down_weight in self._blocks(vector.reshape(-1)):
            total += part
            up += part.clamp(min=0)
            down += part.clamp(max=0)
            up_weight += weight * (part > 0)
            down_weight += weight * (part < 0)

    def result(self) -> tuple[Tensor, Tensor]:
        """The sum of the entries whose sign was elected, and the sum of their weights. Uses up the election."""
        for total, up, down, up_weight, down_weight in self._blocks():
            positive = total >= 0 if self._zero_is_positive else total > 0
            negative = total < 0
            up.mul_(positive).add_(down.mul_(negative))
            up_weight.mul_(positive).add_(down_weight.mul_(negative))
        return self._up.view(self._shape), self._up_weight.view(self._shape)

    def _blocks(self, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Views of the others and the sums that stay in the processor's cache: temporaries are as small."""
        sums = (self._total, self._up, self._down, self._up_weight, self._down_weight)
        return zip(*(tensor.split(BLOCK) for tensor in (*others, *sums)), strict=True)
