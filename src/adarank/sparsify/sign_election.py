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
        self._total, self._up, self._down, self._up_weight, self._down_weight = (
            torch.zeros_like(like) for _ in "12345"
        )
        self._zero_is_positive = zero_is_positive

    def add(self, vector: Tensor, weight: float = 1.0) -> None:
        """Take in `vector`, which counts as `weight` where it agrees."""
        self._total += vector
        self._up += vector.clamp(min=0)
        self._down += vector.clamp(max=0)
        self._up_weight += weight * (vector > 0)
        self._down_weight += weight * (vector < 0)

    def result(self) -> tuple[Tensor, Tensor]:
        """The sum of the entries whose sign was elected, and the sum of their weights. Uses up the election."""
        up = self._total >= 0 if self._zero_is_positive else self._total > 0
        down = self._total < 0
        total = self._up.mul_(up).add_(self._down.mul_(down))
        return total, self._up_weight.mul_(up).add_(self._down_weight.mul_(down))
