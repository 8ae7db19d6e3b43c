"""Rank-reduced Task Arithmetic (SVD_k): each task vector cut to its top directions, then summed.

    merged = base + λ · Σ_t top_k(τ_t)        k = max(1, ⌊rank · r⌋)

AdaRank (arXiv:2503.22178), Equation 2; at full rank it is Task Arithmetic.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from adarank.methods.base import Deltas, Method, OriginKind, weighted_sum
from adarank.sparsify.threshold import top_count
from adarank.spectral.svd import low_rank_sum


class SVDk(Method):
    """Task Arithmetic with low-rank task vectors. Needs no data.

    Arguments:
        rank: share of each matrix's singular components to keep, in (0, 1].
        scale: λ, multiplies the summed task vectors, of matrices and of all other tensors alike.
    """

    name: ClassVar[str] = "svd_k"
    origin: ClassVar[OriginKind] = "pretrained"
    formula: ClassVar[str] = "W = W₀ + λ Σ_t SVD_k(τ_t)"
    source: ClassVar[str] = "Lee et al. 2025, arXiv:2503.22178, Eq. 2"
    spectral: ClassVar[bool] = True

    rank: float = Field(0.16, gt=0, le=1, description="share of singular components kept")
    scale: float = Field(0.3, alias="lambda", description="λ")

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""
        return low_rank_sum(name, origin, deltas, lambda s: (top_count(self.rank, s.numel()), self.scale))

    def merge_other(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged tensor that is not decomposed."""
        return weighted_sum(origin, deltas, lambda task: self.scale)
