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
