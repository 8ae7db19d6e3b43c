"""CART: sum the task vectors about the weight average, each cut to its top directions.

    origin = mean_t W_t
    merged = origin + λ · Σ_t top_k(W_t - origin)        k = max(1, ⌊rank · r⌋)

With `energy`, k is chosen for each matrix and task: the smallest with Σ_{r≤k} s_r² ≥ energy · Σ_r s_r².

About the average the task vectors sum to zero, so at full rank CART is the average: every gain comes from what
the cut takes away. For the same reason biases and norms, which are not cut, stay at the average whatever λ is.

Choi, Kim, Lee, Hong, "Revisiting Weight Averaging for Model Merging", arXiv:2412.12153.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from adarank.methods.base import AlignedCheckpoints, Deltas, Method, OriginKind, RecipeError
from adarank.sparsify.threshold import top_count
from adarank.spectral.svd import effective_rank, low_rank_sum


class CART(Method):
    """Centred task arithmetic with rank-reduced task vectors. Needs no data.

    Arguments:
        rank: share of each matrix's singular components to keep, in (0, 1]. The paper finds 0.08 good
            across models and numbers of tasks.
        energy: if given, in place of rank: share of each task vector's squared norm to keep, in (0, 1].
        scale: λ, multiplies the summed task vectors.
    """

    name: ClassVar[str] = "cart"
    origin: ClassVar[OriginKind] = "average"
    formula: ClassVar[str] = "W = W̄ + λ Σ_t SVD_k(W_t - W̄)"
    source: ClassVar[str] = "Choi et al. 2024, arXiv:2412.12153"
    spectral: ClassVar[bool] = True

    rank: float = Field(0.08, gt=0, le=1, description="share of singular components kept")
    energy: float | None = Field(None, gt=0, le=1, description="share of squared norm kept, in place of rank")
    scale: float = Field(1.0, alias="lambda", description="λ")

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        return low_rank_sum(name, origin, deltas, lambda s: (self._count(s), self.scale))

    def merge_other(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged tensor that is not decomposed."""
        return origin

    def workspace(self, tasks: int, decomposed: bool) -> int:
        """Copies of a tensor in float32 that the formula holds; see `Method.workspace`. What is averaged needs none beside its origin."""
        return super().workspace(tasks, decomposed) if decomposed else 0

    def check(self, network: AlignedCheckpoints) -> None:
        """Raise a sentence if the settings do not fit these models."""
        if self.energy is not None and "rank" in self.model_fields_set:
            raise RecipeError(
                f"cart: rank ({self.rank}) and energy ({self.energy}) both say how many components to keep. Give one."
            )

    def notes(self, network: AlignedCheckpoints) -> list[str]:
        """A sentence where the settings change nothing: with two experts."""
        if len(network.tasks) != 2:
            return []
        return [
            "About the average, two experts have equal and opposite task vectors: 'cart' gives their average, whatever its settings. "
            "With two experts use a method about the base, such as tsv_m, or adarank."
        ]

    def _count(self, s: Tensor) -> int:
        return top_count(self.rank, s.numel()) if self.energy is None else effective_rank(s, self.energy)
