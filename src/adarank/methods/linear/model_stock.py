"""Model Stock: between the base and the average, the closer to the base the more the task vectors disagree.

    c = mean over pairs of τ_a·τ_b / max(‖τ_a‖ ‖τ_b‖, 1e-6), clamped to [-1, 1]
    t = T·c / (1 + (T - 1)·c)                   0 where the divisor is 0
    merged = base + t · mean_t τ_t

The floor is mergekit's: task vectors as short as 1e-3, such as many a bias has, count as less alike than they are. Angles are those of whole tensors or, with filter_wise, of their rows (the last dimension).
Jang et al., "Model Stock: All we need is just a few fine-tuned models", arXiv:2403.19522, Eq. 4.
"""

from __future__ import annotations

from itertools import combinations
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adarank.methods.base import AlignedCheckpoints, Deltas, Flag, Method, OriginKind, RecipeError, flag, scaled_mean


class ModelStock(Method):
    """The average, drawn back to the base by the angles between task vectors. Needs at least two experts.

    Every pair of task vectors is formed anew from the mapped files, so that two are in memory at a time.
    """

    name: ClassVar[str] = "model_stock"
    origin: ClassVar[OriginKind] = "pretrained"
    formula: ClassVar[str] = "W = W₀ + t mean_t τ_t; t = T c / (1 + (T - 1) c), c = mean_{a<b} cos(τ_a, τ_b)"
    source: ClassVar[str] = "mergekit's model_stock; Jang et al. 2024, arXiv:2403.19522"

    filter_wise: Flag = Field(flag(False), description="an angle for each row instead of each tensor")

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        count = len(deltas)
        pairs = list(combinations(deltas, 2))
        cosine = torch.stack([self._cosine(name, deltas, a, b) for a, b in pairs]).mean(0)
        divisor = 1 + (count - 1) * cosine
        share = torch.where(divisor.abs() < 1e-6, 0.0, count * cosine / divisor)
        return origin + share * (scaled_mean(origin, deltas, 1.0) - origin)

    def check(self, network: AlignedCheckpoints) -> None:
        """Raise a sentence if the settings do not fit these models."""
        if len(network.experts) < 2:
            raise RecipeError(
                "models: 'model_stock' measures angles between experts and needs two or more, got one. Add experts."
            )

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`."""
        return 3

    def _cosine(self, name: str, deltas: Deltas, first: str, second: str) -> Tensor:
        """cos(τ_a, τ_b) of whole tensors, shape (); filter-wise one for each row, shape (…, 1)."""
        by_row = self.filter_wise.of("", name)
        a, b = (deltas[task] if by_row else deltas[task].flatten() for task in (first, second))
        # by sum, which adds in pairs: PyTorch's float32 norms add one by one, and are 0.1% off at 10⁷ entries
        norms = (a * a).sum(dim=-1).sqrt() * (b * b).sum(dim=-1).sqrt()
        cosine: Tensor = ((a * b).sum(dim=-1) / norms.clamp(min=1e-6)).clamp(-1, 1)
        return cosine.unsqueeze(-1) if by_row and a.dim() else cosine
