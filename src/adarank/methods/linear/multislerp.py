"""Multi-SLERP: the weighted mean of directions, at the weighted mean of lengths.

    s = Σ_t w_t x_t / (‖x_t‖ + eps)                      x_t = τ_t, or W_t if there is no base
    merged = base + (Σ_t w_t ‖x_t‖) · cos(eps) · s / ‖s‖
    merged = base + Σ_t w_t x_t                          where the directions cancel: ‖s‖ ≤ eps

The w_t are divided by their sum unless normalize_weights is false. Each tensor is one vector.

Defined as interpolation in the tangent space at the mean direction s / ‖s‖: Σ_t w_t of the tangents at that point is
zero, so the point itself comes out. What is left of the way there and back is the factor cos(eps), as mergekit takes
no tangent for shorter than eps. Where directions cancel, mergekit takes the weighted mean of two models, and refuses
more than two, also where all of them equal the base.

Goddard, "MultiSLERP", goddard.blog/posts/multislerp-wow-what-a-cool-idea.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adarank.methods.base import (
    AlignedCheckpoints,
    Deltas,
    Flag,
    Method,
    OriginKind,
    PerTensor,
    RecipeError,
    TensorWeights,
    flag,
    length,
    rest,
    weighted_sum,
)


class MultiSlerp(Method):
    """Weighted mean of directions at the weighted mean length, of task vectors or, if no base is given, of models."""

    name: ClassVar[str] = "multislerp"
    formula: ClassVar[str] = "W = W₀ + (Σ_t w_t ‖τ_t‖ / Σ_t w_t) s / ‖s‖; s = Σ_t w_t τ_t / ‖τ_t‖"
    source: ClassVar[str] = "mergekit's multislerp; Goddard, goddard.blog/posts/multislerp-wow-what-a-cool-idea"
    per_model: ClassVar[tuple[str, ...]] = ("weight",)

    weight: PerTensor = Field(
        TensorWeights({}, ()), description="per model: a number, a list over the layers, or filters"
    )
    normalize_weights: Flag = Field(flag(True), description="divide by the sum of the weights")
    eps: PerTensor = Field(rest(1e-8), ge=0, description="added to every length")

    def origin_kind(self, network: AlignedCheckpoints) -> OriginKind:
        """What task vectors are counted from."""
        return "zero" if network.base is None else "pretrained"

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        if len(deltas) == 1:
            return origin + next(iter(deltas.values()))
        eps = self.eps.of("", name)
        weights = self._weights(name, deltas)
        lengths = {task: length(deltas[task]) for task in deltas}
        total = torch.zeros_like(origin)
        for task in deltas:
            if lengths[task]:
                total.add_(deltas[task], alpha=weights[task] / (lengths[task] + eps))
        whole = length(total)
        if whole <= eps:
            return weighted_sum(origin, deltas, weights.__getitem__)
        mean_length = sum(weights[task] * lengths[task] for task in deltas)
        return total.mul_(mean_length * math.cos(eps) / whole).add_(origin)

    def check(self, network: AlignedCheckpoints) -> None:
        """Raise a sentence if the settings do not fit these models."""
        for name in network.merged():
            total = sum(self.weight.of(task, name) for task in network.experts)
            if self.normalize_weights.of("", name) and abs(total) < 1e-8:
                raise RecipeError(
                    f"multislerp: the weights of tensor '{name}' sum to 0. Change them, or set normalize_weights: false."
                )

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`."""
        return 3

    def _weights(self, name: str, tasks: Iterable[str]) -> dict[str, float]:
        weights = {task: self.weight.of(task, name) for task in tasks}
        total = sum(weights.values()) if self.normalize_weights.of("", name) else 1.0
        return {task: weight / total for task, weight in weights.items()}
