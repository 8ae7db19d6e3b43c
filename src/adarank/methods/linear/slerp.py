"""SLERP: along the great circle from the base to one other model.

    cos θ = ⟨W₀, W₁⟩ / (‖W₀‖ ‖W₁‖), each tensor as one vector
    merged = (sin((1 - t)·θ) · W₀ + sin(t·θ) · W₁) / sin θ
    merged = (1 - t) · W₀ + t · W₁        where |cos θ| > 0.9995

Shoemake, "Animating rotation with quaternion curves", 1985.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adarank.methods.base import AlignedCheckpoints, Deltas, Method, OriginKind, PerTensor, check_one_other, length

_PARALLEL = 0.9995


class Slerp(Method):
    """Spherical interpolation between the base (t = 0) and one other model (t = 1), each tensor as one vector."""

    name: ClassVar[str] = "slerp"
    origin: ClassVar[OriginKind] = "pretrained"
    formula: ClassVar[str] = "W = (sin((1-t)θ) W₀ + sin(tθ) W₁) / sin θ; cos θ = ⟨W₀, W₁⟩ / (‖W₀‖ ‖W₁‖)"
    source: ClassVar[str] = "mergekit's slerp; Shoemake 1985"

    t: PerTensor = Field(description="0 the base, 1 the other: a number, a list over the layers, or filters")

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        other = next(iter(deltas.values())) + origin
        first, second = arc(_cosine(origin, other), self.t.of("", name))
        return first * origin + second * other

    def check(self, network: AlignedCheckpoints) -> None:
        """Raise a sentence if the settings do not fit these models."""
        check_one_other(self.name, network)

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`."""
        return 4


def arc(cosine: float, t: float) -> tuple[float, float]:
    """Coefficients of both ends at share `t` of the way between unit vectors at this cosine."""
    if abs(cosine) > _PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _cosine(first: Tensor, second: Tensor) -> float:
    """Of both as vectors. A vector of length up to 1e-8 counts as zero, at a right angle to all."""
    a, b = (norm if norm > 1e-8 else 1.0 for norm in (length(first), length(second)))
    return max(-1.0, min(1.0, float(((first / a) * (second / b)).sum(dtype=torch.float64))))
