"""Karcher mean: the direction whose angles to the models' directions have the smallest mean square, at their mean length.

    u_t = W_t / ‖W_t‖                                    a tensor no longer than tol has no direction
    m = mean_t u_t / ‖mean_t u_t‖                        the first u_t where that mean is shorter than tol
    v = mean_t θ_t (u_t - cos θ_t m) / sin θ_t           cos θ_t = ⟨u_t, m⟩; up to max_iter times, until ‖v‖ < tol,
    m ← cos ‖v‖ m + sin ‖v‖ v / ‖v‖                      m is moved
    merged = m · mean_t ‖W_t‖                            over all models, those without a direction too

Each tensor is one vector. With two models this is SLERP's direction at t = ½. A u_t opposite to m has no direction as
seen from m and does not move it.

Karcher, "Riemannian center of mass and mollifier smoothing", 1977; for merging: Wang et al., arXiv:2603.04972.
The meaning of max_iter and tol is that of mergekit 0.1.5.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adarank.methods.base import Deltas, Method, OriginKind, PerTensor, length, rest

_OPPOSITE = 1e-6  # sin θ beyond a right angle below which float32 tells no direction


class Karcher(Method):
    """Mean of the models on the sphere: of their directions, at the mean of their lengths, each tensor as one vector."""

    name: ClassVar[str] = "karcher"
    origin: ClassVar[OriginKind] = "zero"
    merges_base: ClassVar[bool] = True
    formula: ClassVar[str] = (
        "W = m mean_t ‖W_t‖; m = argmin_{‖m‖=1} Σ_t θ_t², cos θ_t = ⟨m, W_t⟩ / ‖W_t‖, by at most max_iter steps"
    )
    source: ClassVar[str] = "mergekit's karcher; Karcher 1977; Wang et al. 2026, arXiv:2603.04972"

    max_iter: int = Field(10, ge=0, description="steps at most; with 0 the normalised mean of the directions")
    tol: PerTensor = Field(rest(1e-5), ge=0, description="steps shorter than this, in radians, are the last")

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        if len(deltas) == 1:
            return origin + next(iter(deltas.values()))
        tolerance = self.tol.of("", name)
        lengths = {task: length(deltas[task]) for task in deltas}
        pointing = [task for task in deltas if lengths[task] > tolerance]
        if not pointing:
            return torch.zeros_like(origin)

        mean = _start(deltas, lengths, pointing, tolerance)
        for _ in range(self.max_iter):
            step = _step(mean, deltas, lengths, pointing)
            angle = length(step)
            if angle < tolerance or angle == 0:
                break
            mean = mean.mul_(math.cos(angle)).add_(step, alpha=math.sin(angle) / angle)
            mean /= length(mean)
        return mean.mul_(sum(lengths.values()) / len(deltas))

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`."""
        return 7  # the mean, a step, a direction and its tangent


def _start(deltas: Deltas, lengths: dict[str, float], tasks: list[str], tolerance: float) -> Tensor:
    """The normalised mean of the directions, or the first one where they cancel."""
    first = deltas[tasks[0]] / lengths[tasks[0]]
    mean = torch.zeros_like(first)
    for task in tasks:
        mean.add_(deltas[task], alpha=1 / (lengths[task] * len(tasks)))
    whole = length(mean)
    return mean.div_(whole) if whole >= tolerance and whole > 0 else first


def _step(mean: Tensor, deltas: Deltas, lengths: dict[str, float], tasks: list[str]) -> Tensor:
    """Mean of the tangents at `mean` that lead to the directions, each as long as its angle."""
    total = torch.zeros_like(mean)
    for task in tasks:
        direction = deltas[task] / lengths[task]
        cosine = float((direction * mean).sum(dtype=torch.float64))
        tangent = direction - cosine * mean
        sine = length(tangent)
        if cosine > 0 or sine > _OPPOSITE:
            total.add_(tangent, alpha=(math.atan2(sine, cosine) / sine if sine else 1.0) / len(tasks))
    return total
