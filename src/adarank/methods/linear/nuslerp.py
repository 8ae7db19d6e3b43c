"""NuSLERP: along the great circle between two task vectors or, without a base, between two models.

    t = w_b / (w_a + w_b)                                      ½ where the weights sum to 0
    x_a, x_b = τ_a, τ_b                                        W_a, W_b if there is no base
    merged = base + (sin((1 - t)·θ) · x_a + sin(t·θ) · x_b) / sin θ
    merged = base + (1 - t) · x_a + t · x_b                    where x_a and x_b are parallel

θ is the angle of whole tensors; with nuslerp_flatten false, of vectors along the last dimension, or the first with
nuslerp_row_wise. mergekit's own variant of Shoemake's SLERP.
"""

from __future__ import annotations

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
)

_PARALLEL = 1e-7  # sin²θ: what float32 cannot tell from 0


class NuSlerp(Method):
    """Spherical interpolation between two experts' task vectors, or between two models if no base is given."""

    name: ClassVar[str] = "nuslerp"
    formula: ClassVar[str] = (
        "W = W₀ + (sin((1-t)θ) τ_a + sin(tθ) τ_b) / sin θ; t = w_b / (w_a + w_b), cos θ = ⟨τ_a, τ_b⟩ / (‖τ_a‖ ‖τ_b‖)"
    )
    source: ClassVar[str] = "mergekit's nuslerp; Shoemake 1985"
    per_model: ClassVar[tuple[str, ...]] = ("weight",)

    weight: PerTensor = Field(
        TensorWeights({}, ()), description="per model: a number, a list over the layers, or filters"
    )
    nuslerp_flatten: Flag = Field(flag(True), description="one angle for each tensor")
    nuslerp_row_wise: Flag = Field(
        flag(False), description="if not flat: vectors along the first dimension, else the last"
    )

    def origin_kind(self, network: AlignedCheckpoints) -> OriginKind:
        """What task vectors are counted from."""
        return "zero" if network.base is None else "pretrained"

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        first, second = deltas
        weights = [self.weight.of(task, name) for task in (first, second)]
        t = 0.5 if abs(sum(weights)) < 1e-6 else weights[1] / sum(weights)
        a, b = deltas[first], deltas[second]
        cosine = self._cosine(name, a, b)
        parallel = 1 - cosine.square() <= _PARALLEL
        angle = torch.where(parallel, 1.0, cosine.acos())
        share_a, share_b = (
            torch.where(parallel, share, torch.sin(share * angle) / torch.sin(angle)).to(origin.dtype)
            for share in (1 - t, t)
        )
        return origin + share_a * a + share_b * b

    def check(self, network: AlignedCheckpoints) -> None:
        """Raise a sentence if the settings do not fit these models."""
        if len(network.experts) != 2:
            raise RecipeError(
                f"models: 'nuslerp' needs two experts beside the base, got {len(network.experts)}"
                f" ({', '.join(network.tasks)}). Give two, or use linear or task_arithmetic."
            )

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`."""
        return 5

    def _cosine(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """In float64, of a shape that broadcasts to the tensors'. Norms below 1e-7 count as that."""
        if self.nuslerp_flatten.of("", name) or a.dim() == 0:
            dimensions = tuple(range(a.dim()))
        else:
            dimensions = (0,) if self.nuslerp_row_wise.of("", name) else (-1,)
        norms = [
            torch.linalg.vector_norm(x, dim=dimensions, keepdim=True, dtype=torch.float64).clamp(min=1e-7)
            for x in (a, b)
        ]
        product = a * b
        if dimensions:  # a sum over no dimensions would be one over all
            product = product.sum(dim=dimensions, keepdim=True, dtype=torch.float64)
        cosine: Tensor = product / (norms[0] * norms[1])
        return cosine.double().clamp(-1, 1)
