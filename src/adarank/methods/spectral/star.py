"""STAR: each task vector cut by the share of its nuclear norm, which is then restored.

    k_t = smallest k with Σ_{r≤k} s_r ≥ share · Σ_r s_r
    merged = base + λ/T · Σ_t (Σ_r s_r / Σ_{r≤k} s_r) · top_k(τ_t)
    merged = base + λ/T · Σ_t τ_t        all other tensors

Lee et al., "STAR: Spectral Truncation and Rescale for Model Merging", arXiv:2502.10339.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from adarank.methods.base import Deltas, Method, OriginKind, scaled_mean
from adarank.spectral.svd import low_rank_sum


class STAR(Method):
    """Spectral truncation and rescaling, then the mean. Needs no data.

    Arguments:
        share: of the nuclear norm (the sum of singular values) that is kept, in (0, 1].
        scale: λ, multiplies the mean task vector.
    """

    name: ClassVar[str] = "star"
    origin: ClassVar[OriginKind] = "pretrained"
    formula: ClassVar[str] = "W = W₀ + λ/T Σ_t (‖τ_t‖_* / ‖SVD_k(τ_t)‖_*) SVD_k(τ_t)"
    source: ClassVar[str] = "Lee et al. 2025, arXiv:2502.10339"
    spectral: ClassVar[bool] = True

    share: float = Field(0.4, gt=0, le=1, description="share of the nuclear norm kept")
    scale: float = Field(1.0, alias="lambda", description="λ")

    def merge_matrix(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged matrix, by the method's formula."""

        def cut(s: Tensor) -> tuple[int, float]:
            k = smallest_rank(s, self.share)
            kept = s[:k].sum()
            return k, self.scale * (float(s.sum() / kept) if kept > 0 else 1.0) / len(deltas)

        return low_rank_sum(name, origin, deltas, cut)

    def merge_other(self, name: str, origin: Tensor, deltas: Deltas) -> Tensor:
        """One merged tensor that is not decomposed."""
        return scaled_mean(origin, deltas, self.scale)


def smallest_rank(s: Tensor, share: float) -> int:
    """The fewest top components whose singular values sum to `share` of all."""
    cumulative = s.double().cumsum(0)
    return min(s.numel(), int((cumulative < share * cumulative[-1]).sum()) + 1)
